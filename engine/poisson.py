"""The smoothest surface through given values: Laplace's equation on any shape."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from .morphology import BoolArray, FloatArray

ITERATIONS = 40
"""Conjugate-gradient steps at full size; every halving of the picture has twice as many."""
MAX_ITERATIONS = 400
PRECISION = 1e-12
"""The mean squared residual at which a level is done; what it leaves is far below an 8-bit step."""
SMALLEST = 4
"""Pixels a side at which a picture is not halved any more."""


def membrane(values: FloatArray, known: BoolArray, domain: BoolArray) -> FloatArray:
    """``values`` [H, W, C] where ``known`` [H, W], and between them the surface that bends least, over ``domain``.

    Solves Laplace's equation with the known pixels as Dirichlet values; elsewhere on the border of the domain, and of
    the picture, the surface meets it level (Neumann). Parts of the domain without a known pixel, and everything outside
    it, are 0. Cascadic multigrid (Bornemann and Deuflhard, The cascadic multigrid method for elliptic problems, 1996):
    the solution at half size, doubled, is improved by conjugate gradients, with more steps on coarser levels.
    """
    from scipy import ndimage

    result = np.zeros_like(values)
    parts, _ = ndimage.label(domain)
    for index, (rows, columns) in enumerate(ndimage.find_objects(parts), start=1):
        part = parts[rows, columns] == index
        held = known[rows, columns] & part
        if held.any():
            planes = np.ascontiguousarray(values[rows, columns].transpose(2, 0, 1))
            solved = _cascade(planes * held, held, part, ITERATIONS)
            result[rows, columns][part] = solved.transpose(1, 2, 0)[part]
    return result


def _cascade(planes: FloatArray, known: BoolArray, domain: BoolArray, iterations: int) -> FloatArray:
    """``planes`` [C, H, W] hold 0 where nothing is known."""
    if (known | ~domain).all():
        return planes
    if max(known.shape) > SMALLEST:
        guess = _doubled(_cascade(*_halved(planes, known, domain), min(2 * iterations, MAX_ITERATIONS)), known.shape)
    else:
        guess = np.broadcast_to(planes.sum(axis=(1, 2), keepdims=True) / known.sum(), planes.shape)
    return _conjugate_gradients(np.where(known, planes, guess * domain), domain & ~known, domain, iterations)


def _halved(planes: FloatArray, known: BoolArray, domain: BoolArray) -> tuple[FloatArray, BoolArray, BoolArray]:
    """Means of what is known in every 2x2 pixels."""
    odd = [(0, side % 2) for side in known.shape]
    count = _sums(np.pad(known, odd).astype(np.float32))
    total = _sums(np.pad(planes, [(0, 0), *odd]))
    return (
        (total / np.maximum(count, np.float32(1))).astype(np.float32),
        count > 0,
        _sums(np.pad(domain, odd).astype(np.float32)) > 0,
    )


def _sums(array: FloatArray) -> FloatArray:
    return array[..., ::2, ::2] + array[..., 1::2, ::2] + array[..., ::2, 1::2] + array[..., 1::2, 1::2]


def _doubled(planes: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """Linear interpolation to twice the size, cut to ``shape``."""
    for axis in (1, 2):
        last = planes.shape[axis] - 1
        positions = np.arange(last + 1)
        before, after = (planes.take((positions + step).clip(0, last), axis=axis) for step in (-1, 1))
        planes = np.stack([0.75 * planes + 0.25 * before, 0.75 * planes + 0.25 * after], axis=axis + 1)
        planes = planes.reshape(*planes.shape[:axis], -1, *planes.shape[axis + 2 :])
    return planes[:, : shape[0], : shape[1]]


def _conjugate_gradients(planes: FloatArray, unknown: BoolArray, domain: BoolArray, iterations: int) -> FloatArray:
    """Steps towards the solution from a guess; only ``unknown`` pixels move. One system for each channel."""
    free = unknown.astype(np.float32)
    across = (domain[:, 1:] & domain[:, :-1]).astype(np.float32)
    down = (domain[1:] & domain[:-1]).astype(np.float32)
    enough = PRECISION * float(free.sum())

    def laplacian(field: FloatArray) -> FloatArray:
        """Differences to the neighbours in the domain, summed."""
        result = np.zeros_like(field)
        flow = across * (field[:, :, 1:] - field[:, :, :-1])
        result[:, :, :-1] -= flow
        result[:, :, 1:] += flow
        flow = down * (field[:, 1:] - field[:, :-1])
        result[:, :-1] -= flow
        result[:, 1:] += flow
        result *= free
        return result

    solution = planes.astype(np.float32)
    residual = -laplacian(solution)
    direction = residual.copy()
    energy = _dot(residual, residual)
    for _ in range(iterations):
        if float(energy.max()) <= enough:
            break
        bent = laplacian(direction)
        step = energy / np.maximum(_dot(direction, bent), 1e-30)
        solution += _per_channel(step) * direction
        residual -= _per_channel(step) * bent
        previous, energy = energy, _dot(residual, residual)
        direction *= _per_channel(energy / np.maximum(previous, 1e-30))
        direction += residual
    return solution


def _dot(a: FloatArray, b: FloatArray) -> npt.NDArray[np.float64]:
    return np.array([np.vdot(x, y) for x, y in zip(a, b, strict=True)], dtype=np.float64)


def _per_channel(factors: npt.NDArray[np.float64]) -> FloatArray:
    return factors.astype(np.float32)[:, None, None]
