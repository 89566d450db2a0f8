"""Two pictures mixed band by band of detail: Burt and Adelson, A multiresolution spline (1983)."""

from __future__ import annotations

import numpy as np

from .morphology import BoolArray, FloatArray, squared_distance

MAX_BAND = 16
"""Pixels over which the coarsest band changes from one picture to the other where the mask has a hard edge."""
LEVELS = 5
"""Bands of detail: up to 1, 2, 4 and 8 pixels, and the rest."""
SOFT_EDGE = 2.0
"""Masks whose edge is narrower than this many pixels have a hard one."""


def mix_bands(original: FloatArray, painted: FloatArray, mask: FloatArray) -> FloatArray:
    """``original`` [H, W, 3] where the mask [H, W] is 0, ``painted`` where it is 1, to the bit at both ends.

    Between, fine detail changes over quickly in the middle of the mask's edge and tone slowly over all of it, so that
    neither doubled contours nor a step remain. A mask with a hard edge has no between outside itself, so the tone of
    the original reaches up to MAX_BAND pixels into it (half of that for masks hardly wider). The pyramid is not
    decimated: its bands are differences of Gaussians and add up to the picture.
    """
    edge, width = soft_edge(mask)
    difference = painted - original
    mixed = original.copy()
    for band, share in zip(bands(difference), band_shares(edge, width), strict=True):
        mixed += share[..., None] * band
    mixed = mixed.clip(0, 1)
    mixed[edge == 1] = painted[edge == 1]
    mixed[mask == 0] = original[mask == 0]
    return mixed


def bands(picture: FloatArray) -> list[FloatArray]:
    """LEVELS pictures [H, W, C], finest detail first, that add up to the picture."""
    from scipy import ndimage

    result, finer = [], picture
    for level in range(LEVELS - 1):
        sigma = 2.0**level
        coarser = ndimage.gaussian_filter(picture, (sigma, sigma, 0), mode="nearest")
        result.append(finer - coarser)
        finer = coarser
    return [*result, finer]


def band_shares(edge: FloatArray, width: float) -> list[FloatArray]:
    """The painted picture's share [H, W] in each band: 0 and 1 where ``edge`` is, the steeper the finer the band.

    ``edge`` rises from 0 to 1 over ``width`` pixels; a band of details of s pixels changes over within 2 s of them.
    """
    steepness = [max(1.0, width / 2.0 ** (level + 1)) for level in range(LEVELS - 1)]
    return [np.clip((edge - 0.5) * np.float32(steep) + 0.5, 0, 1).astype(np.float32) for steep in [*steepness, 1.0]]


def soft_edge(mask: FloatArray) -> tuple[FloatArray, float]:
    """The mask's own soft edge or, where that is hard, one inside it; and its width in pixels."""
    width = edge_width(mask)
    if width >= SOFT_EDGE:
        return mask, width
    covered = mask > 0
    if covered.all():
        return mask, 1.0
    inside = np.sqrt(squared_distance(~covered, (2 * MAX_BAND) ** 2).astype(np.float32))
    width = max(min(MAX_BAND, float(inside.max()) / 2), 1.0)
    # half a pixel in: the first masked pixel lies that far behind the edge
    ramp = np.clip((inside - np.float32(0.5)) / np.float32(width), 0, 1)
    return (mask * _smooth(ramp)).astype(np.float32), width


def edge_width(mask: FloatArray) -> float:
    """The mean width in pixels of the grey between 0 and 1 along the contour at one half; 0 where there is none."""
    grey = float(np.count_nonzero((mask > 0) & (mask < 1)))
    length = _contour_length(mask >= 0.5)
    return grey / length if length else 0.0


def _contour_length(inside: BoolArray) -> int:
    """Neighbours on different sides."""
    return sum(int(np.count_nonzero(np.diff(inside.astype(np.int8), axis=axis))) for axis in (0, 1))


def _smooth(ramp: FloatArray) -> FloatArray:
    """Level at both ends."""
    return ramp * ramp * (3 - 2 * ramp)
