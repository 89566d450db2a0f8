"""By how much a painted picture's tone is off, as seen around what was painted.

A VAE, or an edit model, shifts the tone of the whole picture a little, and not evenly. Beyond the repainted area both
pictures show the same thing, so there the shift can be measured. Everything is NumPy on one picture [H, W, 3], 0..1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .morphology import BoolArray, FloatArray, squared_distance
from .poisson import membrane

RING_PIXELS = 24
"""How far from the repainted area the surroundings are compared."""
RIM_PIXELS = 8
"""How far from it they decide the local tone."""
INNER_RIM_PIXELS = 2
FIELD_BLUR = 2.0
"""Standard deviation, in pixels, of the Gaussian that takes grain and decoder noise out of the local tone."""
SLOW = 17
"""Side, in pixels, of the square over which a tone difference is a matter of tone, not of texture."""
LEVEL = np.float32(1 / 255)
REPEATED = 0.25 * LEVEL
"""Pixels closer than this in every channel are copies."""
TUKEY = 4.685
"""Standard deviations beyond which a difference is content; 95 % efficient on pure noise."""
MEDIAN_TO_SIGMA = np.float32(1.4826)
"""Standard deviation of a normal distribution over its median absolute deviation."""


@dataclass(frozen=True)
class Tone:
    """What would have to be added to the painted picture, beside the repainted area, to meet the original."""

    offset: FloatArray
    """[3]: everywhere the same; robust against content."""
    difference: FloatArray
    """[H, W, 3]: pixel by pixel."""
    rim: BoolArray
    """[H, W]: where ``difference`` is compared."""
    trusted: BoolArray
    """[H, W]: the part of the rim whose difference is tone and not content."""
    domain: BoolArray
    """[H, W]: where a local correction is sought."""

    def local(self) -> FloatArray:
        """[H, W, 3]: the correction that meets the original at each part of the rim and is harmonic between.

        The correction field of Poisson image editing (Perez, Gangnet and Blake 2003, equation 4): painted + field has
        the painted picture's gradients and the original's values on the rim. Where the picture ends, and where the rim
        shows other content, the field meets it level.
        """
        rest = self.difference - self.offset
        weight = self.trusted.astype(np.float32)
        mean = _blurred(rest * weight[..., None]) / np.maximum(_blurred(weight[..., None]), np.float32(1e-6))
        return membrane(mean, self.trusted, self.domain) + self.offset

    def left_by(self, correction: FloatArray) -> float:
        """0..1: the root mean square of what a correction [H, W, 3] leaves along the rim, means over SLOW pixels."""
        return float(np.sqrt(np.mean(_slow(self.difference - correction, self.rim)[self.rim] ** 2)))


def measure_tone(original: FloatArray, painted: FloatArray, repainted: BoolArray, largest: float) -> Tone | None:
    """The tone difference around ``repainted`` [H, W]; None where there is nothing to compare.

    Differences more than ``largest`` away from the common offset are content. Where the painted picture repeats the
    original to the pixel beside the repainted area it was pasted before and shows no tone there: then the inside of the
    rim is compared instead, provided that it still shows what the original does.
    """
    around = squared_distance(repainted, RING_PIXELS**2 + 1)
    ring = (around > 0) & (around <= RING_PIXELS**2)
    if not ring.any():
        return None
    difference = original - painted
    rim = ring & (around <= RIM_PIXELS**2)
    if (np.abs(difference[rim]).max(axis=-1) < REPEATED).mean() > 0.5:
        return _inner_tone(original, difference, repainted, largest)
    offset, spread = robust_mean(difference[ring])
    trusted = rim & _near(difference, offset, spread, largest)
    return Tone(offset, difference, rim, trusted, domain=around <= RIM_PIXELS**2)


def _inner_tone(original: FloatArray, difference: FloatArray, repainted: BoolArray, largest: float) -> Tone | None:
    inside = squared_distance(~repainted, RIM_PIXELS**2 + 1)
    rim = repainted & (inside <= RIM_PIXELS**2)
    offset, spread = robust_mean(difference[rim])
    rough, texture = (robust_mean((values - _slow(values, rim))[rim])[1] for values in (difference, original))
    same_content = bool((rough <= np.maximum(texture / 2, 2 * LEVEL)).all())
    if not same_content or np.abs(offset).max() > largest:
        return None
    near = _near(difference, offset, spread, largest)
    trusted = rim & near & (inside <= INNER_RIM_PIXELS**2)
    return Tone(offset, difference, rim & near, trusted, domain=repainted)


def _near(difference: FloatArray, offset: FloatArray, spread: FloatArray, largest: float) -> BoolArray:
    return (np.abs(difference - offset) <= np.maximum(TUKEY * spread, np.float32(largest))).all(axis=-1)


def robust_mean(sample: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Mean and standard deviation [C] of a sample [N, C] without its outliers: Tukey's biweight around the median."""
    centre = np.median(sample, axis=0)
    spread = np.maximum(MEDIAN_TO_SIGMA * np.median(np.abs(sample - centre), axis=0), LEVEL / 2)
    for _ in range(3):
        certain = np.clip(1 - ((sample - centre) / (TUKEY * spread)) ** 2, 0, None) ** 2
        centre = (certain * sample).sum(axis=0) / certain.sum(axis=0)
    return centre.astype(np.float32), spread.astype(np.float32)


def _slow(values: FloatArray, measured: BoolArray) -> FloatArray:
    """[H, W, C]: the mean of the measured pixels' values over SLOW pixels; 0 where none is near."""
    from scipy import ndimage

    size = (SLOW, SLOW, 1)
    weight = measured.astype(np.float32)[..., None]
    total = ndimage.uniform_filter(values * weight, size, mode="constant")
    share = ndimage.uniform_filter(weight, size, mode="constant")
    return np.where(share > np.float32(0.5 / SLOW**2), total / np.maximum(share, np.float32(1e-9)), np.float32(0))


def _blurred(array: FloatArray) -> FloatArray:
    from scipy import ndimage

    blurred: FloatArray = ndimage.gaussian_filter(array, (FIELD_BLUR, FIELD_BLUR, 0), mode="constant", truncate=3)
    return blurred


def seam_step(picture: FloatArray, mask: FloatArray) -> float:
    """0..1: how far the picture's tone steps across the mask's edge beyond what its slope there explains.

    For every two neighbours on different sides of the edge (where the mask crosses half of its largest value): their
    difference, inside minus outside, less the mean of the differences one pixel further to either side. Averaged over
    SLOW pixels along the edge, where texture cancels and a step does not; of that the root mean square.
    """
    from scipy import ndimage

    inside = mask >= mask.max() / 2
    total = np.zeros_like(picture)
    count = np.zeros(mask.shape, np.float32)
    for axis in (0, 1):
        if inside.shape[axis] < 4:
            continue
        values, sides, sums, counts = (np.moveaxis(array, axis, 0) for array in (picture, inside, total, count))
        steps = np.diff(values, axis=0)
        excess = steps[1:-1] - (steps[:-2] + steps[2:]) / 2
        crossing = np.diff(sides.astype(np.int8), axis=0)[1:-1]
        sums[1:-2] += excess * crossing[..., None]
        counts[1:-2] += np.abs(crossing)
        # a pair belongs to both of its pixels, so that mirrored pictures measure the same
        sums[2:-1] += excess * crossing[..., None]
        counts[2:-1] += np.abs(crossing)
    edge = count > 0
    if not edge.any():
        return 0.0
    pairs = ndimage.uniform_filter(count, SLOW, mode="constant")[edge]
    means = [ndimage.uniform_filter(total[..., channel], SLOW, mode="constant")[edge] / pairs for channel in range(3)]
    return float(np.sqrt(np.mean(np.stack(means) ** 2)))
