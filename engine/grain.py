"""Grain: how much of it a picture has, and more of the same.

The grain of photographs has a grain size: it is white noise that the sensor's filters, a lens or a compression blurred.
Measured at two scales it has a strength and a blur, and what is missing is made as such.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .morphology import BoolArray, FloatArray
from .types import InputError

SCALES = 2
"""Pixels, and blocks of 2 x 2, are compared with their neighbours; larger ones would take texture for grain."""
MAX_BLUR = 1.0
"""Standard deviation, in pixels, of the most blurred grain that is made: what looks coarser is mostly texture."""
LEAST_PIXELS = 64
"""Fewer measured pixels than this say nothing."""
QUIET_SHARE = 0.25
"""The share of the pixels, those with the least contrast around them, that is measured."""
CONTRAST_BLUR = 2.0
LOCAL = 6.0
"""Standard deviation, in pixels, of the surroundings in which the painted part's own grain counts."""
NORMAL_MEDIAN = 0.6745
"""The median of |x| for a normal x of standard deviation 1."""
SUPPORT = 33
"""Pixels that hold the taps of the widest blur."""


def grain_level(images: Tensor, weight: Tensor) -> Tensor:
    """The standard deviation of the grain in images [B, H, W, 3 or 4] (0..1) where weight [B, H, W] (0..1) is above
    half: [B, 3], 0 where fewer than LEAST_PIXELS can be measured.

    Immerkaer, Fast noise variance estimation (1996), with two changes that keep edges out: the median absolute
    deviation stands for the mean (Donoho 1995), and only the quietest quarter of the pixels is measured, as told by the
    gradient of the blurred picture (after Tai and Yang 2008). White noise gives its own standard deviation; noise that
    a decoder or a lens has blurred gives less.
    """
    if weight.shape != images.shape[:3]:
        raise InputError(
            f"Grain is measured in images {_shape(images)} with a weight {_shape(weight)}; give one weight of the same"
            " height and width for each image."
        )
    levels = [
        _level(_array(image)[..., :3], _array(certain) > 0.5, scale=0)
        for image, certain in zip(images, weight, strict=True)
    ]
    return torch.from_numpy(np.stack(levels)).to(images.device)


def add_grain(
    painted: FloatArray,
    original: FloatArray,
    inside: BoolArray,
    around: BoolArray,
    strength: float,
    generator: torch.Generator,
) -> tuple[FloatArray, float, float]:
    """``painted`` [H, W, 3] with the grain that it lacks ``inside`` [H, W] against ``original`` ``around`` it.

    Returns it with both levels, of the original and of the painted picture (the largest channel's at the finest scale).
    The noise has the variance that is missing at each scale, is shared by the channels as far as the original's is, and
    fades where the painted picture has texture of its own. ``strength`` in 0..1 is how much of it is added.
    """
    wanted = np.stack([_level(original, around, scale) for scale in range(SCALES)])
    have = np.stack([_level(painted, inside, scale) for scale in range(SCALES)])
    lacking = np.clip(wanted**2 - have**2, 0, None)
    levels = float(wanted[0].max()), float(have[0].max())
    if not _measurable(inside) or not lacking[0].any():
        return painted, *levels
    noise = _noise(lacking, _shared(original, around), painted.shape[:2], generator)
    room = _room(painted, wanted[0], have[0])
    return (painted + np.float32(strength) * room[..., None] * noise).clip(0, 1), *levels


def _measurable(measured: BoolArray) -> bool:
    return int(np.count_nonzero(_inner(measured, 0))) * QUIET_SHARE >= LEAST_PIXELS


def _noise(variances: FloatArray, shared: float, shape: tuple[int, ...], generator: torch.Generator) -> FloatArray:
    """[H, W, 3]: blurred noise with the ``variances`` [SCALES, 3] of residuals, a share of it common to the channels.

    The blur is the channels' common one; the strength is each channel's own, and right at the finest scale.
    """
    from scipy import ndimage

    blurs, responses = _responses()
    coarseness = float(variances[1].sum() / variances[0].sum())
    blur = float(np.interp(coarseness, responses[:, 1] / responses[:, 0], blurs))
    response = float(np.interp(blur, blurs, responses[:, 0]))
    white = torch.randn((*shape, 4), generator=generator).numpy()
    blurred = ndimage.gaussian_filter(white, (blur, blur, 0), mode="reflect") if blur > blurs[1] / 2 else white
    mixed = math.sqrt(shared) * blurred[..., 3:] + math.sqrt(1 - shared) * blurred[..., :3]
    return (np.sqrt(variances[0] / response) * mixed).astype(np.float32)


@lru_cache
def _responses() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Blurs [N] in pixels, and [N, SCALES]: the variance of the residual of white noise with that blur.

    The sum of squares of the taps of both filters together; they are separable, so that along one axis, squared.
    """
    from scipy import ndimage

    blurs = np.linspace(0, MAX_BLUR, 41)
    impulse = np.zeros(SUPPORT)
    impulse[SUPPORT // 2] = 1
    taps = [ndimage.gaussian_filter(impulse, blur) if blur else impulse for blur in blurs]
    energies = [[np.sum(np.convolve(tap, _kernel(scale)) ** 2) ** 2 for scale in range(SCALES)] for tap in taps]
    return blurs, np.array(energies)


def _shared(image: FloatArray, measured: BoolArray) -> float:
    """0..1: the mean correlation of the channels' grain."""
    sample = _residual(image, 0)[_quiet(image, _inner(measured, 0))]
    spread = np.median(np.abs(sample), axis=0) / NORMAL_MEDIAN
    if not spread.all():
        return 1.0
    usual = np.clip(sample / spread, -3, 3)
    correlation = np.corrcoef(usual, rowvar=False)
    return float(np.clip((correlation.sum() - 3) / 6, 0, 1))


def _room(painted: FloatArray, wanted: FloatArray, have: FloatArray) -> FloatArray:
    """[H, W] in 0..1: 1 where the painted picture is as smooth as on the whole, 0 where its own detail is enough."""
    from scipy import ndimage

    # an edge is no grain: it counts as twice the wanted level at most
    energy = np.minimum(_residual(painted, 0) ** 2, (2 * wanted) ** 2).mean(axis=-1)
    local = ndimage.gaussian_filter(energy, LOCAL, mode="nearest")
    target, usual = float((wanted**2).mean()), float((have**2).mean())
    room: FloatArray = np.sqrt(np.clip((target - local) / max(target - usual, 1e-12), 0, 1)).astype(np.float32)
    return room


def _level(image: FloatArray, measured: BoolArray, scale: int) -> FloatArray:
    """The grain of one picture [H, W, 3] at a scale, as the standard deviation of its residual: [3]."""
    residual = _residual(image, scale)
    sample = residual[_quiet(image, _inner(measured, scale))]
    if len(sample) < LEAST_PIXELS:
        return np.zeros(3, np.float32)
    return (np.median(np.abs(sample), axis=0) / NORMAL_MEDIAN).astype(np.float32)


def _residual(image: FloatArray, scale: int) -> FloatArray:
    """The difference of two Laplacians of block means; white noise keeps its standard deviation at scale 0."""
    from scipy import ndimage

    for axis in (0, 1):
        image = ndimage.correlate1d(image, _kernel(scale), axis=axis, mode="reflect")
    return image


@lru_cache
def _kernel(scale: int) -> FloatArray:
    """Second difference of neighbouring blocks' means, along one axis: [1, -2, 1] / sqrt(6) where blocks are pixels."""
    block = 2**scale
    means = np.full(block, 1 / block, dtype=np.float32)
    apart = np.zeros(2 * block + 1, dtype=np.float32)
    apart[[0, block, 2 * block]] = np.array([1, -2, 1]) / np.sqrt(6)
    return np.convolve(apart, means).astype(np.float32)


def _array(values: Tensor) -> FloatArray:
    array: FloatArray = values.detach().float().cpu().numpy()
    return array


def _inner(measured: BoolArray, scale: int) -> BoolArray:
    """The pixels whose residual comes from measured ones alone."""
    from scipy import ndimage

    return ndimage.minimum_filter(measured, len(_kernel(scale)), mode="nearest")


def _quiet(image: FloatArray, measured: BoolArray) -> BoolArray:
    """Those of the measured pixels around which the picture changes least."""
    from scipy import ndimage

    if min(measured.shape) < 2 or not measured.any():
        return measured
    weight = measured.astype(np.float32)
    blurred, share = (
        ndimage.gaussian_filter(values, CONTRAST_BLUR, mode="nearest")
        for values in (image.mean(axis=-1) * weight, weight)
    )
    blurred /= np.maximum(share, np.float32(1e-6))
    rows, columns = np.gradient(blurred)
    contrast = rows**2 + columns**2
    return measured & (contrast <= np.quantile(contrast[measured], QUIET_SHARE))


def _shape(values: Tensor) -> str:
    return "x".join(map(str, values.shape))
