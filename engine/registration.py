"""How far one picture is displaced against another, to a fraction of a pixel.

Edit models give the whole picture back a little displaced. Phase correlation (Kuglin and Hines, The phase correlation
image alignment method, 1975) finds the whole pixels; the fraction comes from a weighted least-squares fit of the
picture's gradients (Lucas and Kanade, An iterative image registration technique, 1981), which leaves out what has
changed (Tukey's biweight).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .morphology import FloatArray
from .types import InputError

LUMINANCE = np.array([0.2126, 0.7152, 0.0722], dtype=np.float32)
"""Rec. 709, on the coded values."""
LARGEST_SHARE = 0.125
"""Shifts are looked for up to this share of the shorter side."""
COARSE_PIXELS = 2**16
FINE_PIXELS = 2**19
"""Larger pictures are averaged over whole blocks down to so many pixels before they are compared."""
SMOOTH, LOCAL_MEAN = 1.0, 8.0
"""Standard deviations, in pixels, of the two Gaussians whose difference is compared: grain and tone do not count."""
ERODED = 3
"""Pixels by which the Gaussian reaches over the weight's edge."""
TAPS = 3
"""Lanczos's a: the pixels to either side that a fractional shift reads."""
CANDIDATES = 4
ITERATIONS = 12
LEAST_STEP = 1e-3
LARGEST_CORRECTION = 2.0
"""Pixels the fit may move away from the whole-pixel start: further is no longer the same peak."""
CLEAR_ERROR = 0.1
"""Pixels of standard error at which the confidence halves."""
TUKEY = 4.685
"""Standard deviations beyond which a difference is content; 95 % efficient on pure noise."""
FLAT = 1e-5
"""Standard deviation below which a picture has no texture."""
LEAST_WEIGHT = 64.0
"""Pixels that must be comparable."""
LEAST_SHIFT = 0.05
"""Pixels; moving a picture by less costs more sharpness than it gains."""
LEAST_CONFIDENCE = 0.4
"""Of a shift that is undone."""


class Shift(NamedTuple):
    """A displacement in pixels, positive to the right and down."""

    dx: float
    dy: float
    confidence: float = 1.0
    """0..1: the correlation of both pictures once aligned, lowered where too little texture decides the shift."""

    @property
    def distance(self) -> float:
        """Pixels."""
        return math.hypot(self.dx, self.dy)

    @property
    def worth_undoing(self) -> bool:
        return self.distance >= LEAST_SHIFT and self.confidence >= LEAST_CONFIDENCE

    def __neg__(self) -> Shift:
        return Shift(-self.dx, -self.dy, self.confidence)


NO_SHIFT = Shift(0.0, 0.0, 0.0)


def shift_between(reference: Tensor, moved: Tensor, weight: Tensor | None = None) -> Shift:
    """How far the content of ``moved`` [H, W, 3] lies from where ``reference`` [H, W, 3] has it.

    ``moved`` at (x, y) shows what ``reference`` shows at (x - dx, y - dy): ``apply_shift(reference, shift)`` looks like
    ``moved``, and ``apply_shift(moved, -shift)`` is back in place. ``weight`` [H, W] in 0..1 says where both show the
    same thing (default: everywhere); what lies under 0 does not matter. An even gain and offset between the two do not
    matter either. Without texture to decide by the shift is 0 with a confidence of 0. Raises InputError for pictures
    of different sizes.
    """
    if reference.shape != moved.shape or (weight is not None and weight.shape != reference.shape[:2]):
        raise InputError(
            f"A shift is measured between pictures of one size, and these are {_shape(reference)} and {_shape(moved)}"
            f"{'' if weight is None else f' with a weight of {_shape(weight)}'}; resize them first."
        )
    pair = _Pair(
        _luminance(reference),
        _luminance(moved),
        np.ones(reference.shape[:2], np.float32) if weight is None else _array(weight),
    )
    pixels = pair.weight.size
    fine = pair.reduced(math.ceil(math.sqrt(pixels / FINE_PIXELS)))
    again = math.ceil(math.sqrt(fine.weight.size / COARSE_PIXELS))
    coarse = fine.reduced(again).band_passed()
    fit = _fit(coarse, _whole_pixels(coarse))
    scale = fine.scale
    if again > 1:
        fit = _fit(fine.band_passed(), (fit.dx * again, fit.dy * again))
    return Shift(fit.dx * scale, fit.dy * scale, fit.confidence)


def apply_shift(images: Tensor, shift: Shift) -> Tensor:
    """The images [B, H, W, C] with their content moved ``dx`` to the right and ``dy`` down; the edge repeats.

    Whole pixels are moved bit for bit; fractions are interpolated with Lanczos's windowed sinc and clamped to 0..1.
    """
    moved = np.stack([_translate(_array(image), shift.dx, shift.dy) for image in images])
    if not (float(shift.dx).is_integer() and float(shift.dy).is_integer()):
        moved = moved.clip(0, 1)
    return torch.from_numpy(moved).to(images)


class _Pair(NamedTuple):
    """Two pictures [H, W] and where they are comparable; ``scale`` pixels of the input are one of theirs."""

    reference: FloatArray
    moved: FloatArray
    weight: FloatArray
    scale: int = 1

    def reduced(self, factor: int) -> _Pair:
        """Means over blocks of ``factor`` pixels; a block counts as its least certain pixel."""
        factor = min(factor, *self.weight.shape)
        if factor <= 1:
            return self
        reference, moved, weight = (_blocks(array, factor) for array in self[:3])
        return _Pair(reference.mean(axis=(1, 3)), moved.mean(axis=(1, 3)), weight.min(axis=(1, 3)), self.scale * factor)

    def band_passed(self) -> _Pair:
        """The detail between grain and tone; the weight loses what its surroundings reach into."""
        from scipy import ndimage

        total = ndimage.gaussian_filter(self.weight, LOCAL_MEAN, mode="nearest") + np.float32(1e-6)

        def detail(array: FloatArray) -> FloatArray:
            mean = ndimage.gaussian_filter(array * self.weight, LOCAL_MEAN, mode="nearest") / total
            return ndimage.gaussian_filter(array - mean, SMOOTH, mode="nearest")

        weight = ndimage.minimum_filter(self.weight, 2 * ERODED + 1, mode="nearest")
        return self._replace(reference=detail(self.reference), moved=detail(self.moved), weight=weight)


def _whole_pixels(pair: _Pair) -> tuple[float, float]:
    """(dx, dy) of the phase correlation's best peak, by the correlation of what overlaps; 0 is always considered."""
    from scipy import fft

    height, width = pair.weight.shape
    reach = int(LARGEST_SHARE * min(height, width))
    window = pair.weight * _taper(height)[:, None] * _taper(width)[None]
    shape = (fft.next_fast_len(height + reach), fft.next_fast_len(width + reach, real=True))
    cross = np.conj(fft.rfft2(pair.reference * window, shape)) * fft.rfft2(pair.moved * window, shape)
    power = np.abs(cross)
    # frequencies that hold next to nothing would only add noise
    surface = fft.irfft2(cross / (power + np.float32(0.1) * power.mean() + np.float32(1e-20)), shape)
    near = np.roll(surface, (reach, reach), axis=(0, 1))[: 2 * reach + 1, : 2 * reach + 1]
    best, found = _agreement(pair, 0, 0), (0, 0)
    for _ in range(CANDIDATES):
        y, x = (int(index) for index in np.unravel_index(np.argmax(near), near.shape))
        near[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2] = -np.inf
        agreement = _agreement(pair, x - reach, y - reach)
        if agreement > best:
            best, found = agreement, (x - reach, y - reach)
    return found


def _agreement(pair: _Pair, dx: int, dy: int) -> float:
    """The weighted correlation of what overlaps after a shift by whole pixels."""
    height, width = pair.weight.shape
    here = (slice(max(-dy, 0), height - max(dy, 0)), slice(max(-dx, 0), width - max(dx, 0)))
    there = (slice(max(dy, 0), height + min(dy, 0)), slice(max(dx, 0), width + min(dx, 0)))
    return _correlation(
        pair.reference[here], pair.moved[there], (pair.weight[here] * pair.weight[there]).astype(np.float32)
    )


def _correlation(a: FloatArray, b: FloatArray, weight: FloatArray) -> float:
    total = float(weight.sum())
    if total < LEAST_WEIGHT:
        return 0.0
    a = a - (a * weight).sum() / total
    b = b - (b * weight).sum() / total
    scale = math.sqrt(float((a * a * weight).sum()) * float((b * b * weight).sum()))
    return float((a * b * weight).sum()) / scale if scale > total * FLAT**2 else 0.0


def _fit(pair: _Pair, start: tuple[float, float]) -> Shift:
    """The shift near ``start`` that leaves the least weighted difference."""
    dx, dy = start
    best = NO_SHIFT
    for _ in range(ITERATIONS):
        warped = _translate(pair.moved, -dx, -dy)
        weight = pair.weight * _overlap(pair.weight, round(dx), round(dy))
        if weight.sum() < LEAST_WEIGHT:
            return NO_SHIFT
        rows, columns = np.gradient(pair.reference + warped)
        # the pixels as one row each: x and y gradient, gain, offset
        used = weight > 0
        terms = np.stack([columns[used] / 2, rows[used] / 2, pair.reference[used], np.ones_like(warped[used])])
        target, certain = warped[used].astype(np.float64), weight[used].astype(np.float64)
        solution = _robust_least_squares(terms.astype(np.float64), target, certain)
        if solution is None:
            return NO_SHIFT
        step_x, step_y, error = solution
        dx, dy = dx - step_x, dy - step_y
        if math.hypot(dx - start[0], dy - start[1]) > LARGEST_CORRECTION:
            return NO_SHIFT
        correlation = _correlation(pair.reference, warped, weight)
        confidence = max(correlation, 0) / (1 + (error * pair.scale / CLEAR_ERROR) ** 2)
        best = Shift(dx, dy, confidence)
        if math.hypot(step_x, step_y) < LEAST_STEP:
            break
    return best


def _robust_least_squares(
    terms: npt.NDArray[np.float64], target: npt.NDArray[np.float64], weight: npt.NDArray[np.float64]
) -> tuple[float, float, float] | None:
    """The step (x, y) in pixels and its standard error, from gain * (reference + gradient . step) + offset = target."""
    certain = weight
    for _ in range(2):
        weighted = terms * certain
        normal = weighted @ terms.T
        if np.linalg.cond(normal[:2, :2]) > 1e6 or np.linalg.det(normal) == 0:
            return None
        solution = np.linalg.solve(normal, weighted @ target)
        residual = target - solution @ terms
        spread = max(1.4826 * float(np.median(np.abs(residual))), 1e-6)
        certain = weight * np.clip(1 - (residual / (TUKEY * spread)) ** 2, 0, None) ** 2
    gain = float(solution[2])
    if abs(gain) < 0.1:
        return None
    # the smoothing makes one independent value out of 4 pi sigma^2 of them
    variance = spread**2 * 4 * math.pi * SMOOTH**2
    error = math.sqrt(variance / max(float(np.linalg.eigvalsh(normal[:2, :2])[0]), 1e-12)) / abs(gain)
    return float(solution[0]) / gain, float(solution[1]) / gain, error


def _overlap(weight: FloatArray, dx: int, dy: int) -> FloatArray:
    """The weight at (x + dx, y + dy), 0 outside the picture and near its edge."""
    height, width = weight.shape
    result = np.zeros_like(weight)
    margin = ERODED
    top, bottom = max(margin - dy, 0), min(height - margin - dy, height)
    left, right = max(margin - dx, 0), min(width - margin - dx, width)
    if top < bottom and left < right:
        result[top:bottom, left:right] = weight[top + dy : bottom + dy, left + dx : right + dx]
    return result


def _translate(array: FloatArray, dx: float, dy: float) -> FloatArray:
    """Content of [H, W] or [H, W, C] moved right and down, one axis after the other."""
    for axis, shift in ((0, dy), (1, dx)):
        whole = math.floor(shift)
        fraction = shift - whole
        positions = np.arange(array.shape[axis]) - whole
        last = array.shape[axis] - 1
        if fraction == 0:
            if whole:
                array = array.take(positions.clip(0, last), axis=axis)
            continue
        source = array
        array = np.zeros_like(source)
        for tap, share in zip(range(-TAPS, TAPS), _lanczos(fraction), strict=True):
            array += share * source.take((positions + tap).clip(0, last), axis=axis)
    return array


def _lanczos(fraction: float) -> FloatArray:
    """The shares of the pixels -TAPS..TAPS - 1 in the value ``fraction`` left of pixel 0."""
    distance = np.arange(-TAPS, TAPS) + fraction
    shares = np.sinc(distance) * np.sinc(distance / TAPS)
    return (shares / shares.sum()).astype(np.float32)


def _taper(length: int) -> FloatArray:
    """A window that fades over an eighth of the length at both ends (Tukey's)."""
    fade = max(length // 8, 1)
    ramp = (np.arange(length) + 0.5) / fade
    return (0.5 - 0.5 * np.cos(np.pi * np.minimum(np.minimum(ramp, ramp[::-1]), 1))).astype(np.float32)


def _blocks(array: FloatArray, factor: int) -> FloatArray:
    """[rows, factor, columns, factor] of the whole blocks."""
    height, width = (side // factor * factor for side in array.shape)
    return array[:height, :width].reshape(height // factor, factor, width // factor, factor)


def _luminance(image: Tensor) -> FloatArray:
    return _array(image)[..., :3] @ LUMINANCE


def _array(values: Tensor) -> FloatArray:
    array: FloatArray = values.detach().float().cpu().numpy()
    return array


def _shape(values: Tensor) -> str:
    return "x".join(map(str, values.shape))
