"""Grain: how much of it a picture has, and more of the same.

The grain of photographs has a grain size, and a decoder smooths the finest away first. So it is measured at three
scales, and what is missing is made of three noises: white, and white blurred by one and by two pixels.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .types import InputError

FloatArray = npt.NDArray[np.float32]

SCALES = 3
"""Blocks of 1, 2 and 4 pixels a side are compared with their neighbours."""
BLURS = (0.0, 1.0, 2.0)
"""Standard deviations, in pixels, of the noises that grain is made of."""
LEAST_PIXELS = 64
"""Fewer measured pixels than this say nothing."""
QUIET_SHARE = 0.5
"""The share of the pixels, those with the least contrast around them, that is measured."""
CONTRAST_BLUR = 2.0
LOCAL = 6.0
"""Standard deviation, in pixels, of the surroundings in which the painted part's own grain counts."""
NORMAL_MEDIAN = 0.6745
"""The median of |x| for a normal x of standard deviation 1."""
PERIOD = 128
"""Frequencies a side on which filters are integrated."""


def grain_level(images: Tensor, weight: Tensor) -> Tensor:
    """The standard deviation of the grain in images [B, H, W, 3 or 4] (0..1) where weight [B, H, W] (0..1) is above
    half: [B, 3], 0 where fewer than LEAST_PIXELS can be measured.

    Immerkaer, Fast noise variance estimation (1996), with two changes that keep edges out: the median absolute
    deviation stands for the mean (Donoho 1995), and only the quieter half of the pixels is measured, as told by the
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


def _level(image: FloatArray, measured: npt.NDArray[np.bool_], scale: int) -> FloatArray:
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


def _inner(measured: npt.NDArray[np.bool_], scale: int) -> npt.NDArray[np.bool_]:
    """The pixels whose residual comes from measured ones alone."""
    from scipy import ndimage

    return ndimage.minimum_filter(measured, len(_kernel(scale)), mode="nearest")


def _quiet(image: FloatArray, measured: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Those of the measured pixels around which the picture changes least."""
    from scipy import ndimage

    blurred = ndimage.gaussian_filter(image.mean(axis=-1), CONTRAST_BLUR, mode="nearest")
    if min(blurred.shape) < 2 or not measured.any():
        return measured
    rows, columns = np.gradient(blurred)
    contrast = rows**2 + columns**2
    return measured & (contrast <= np.quantile(contrast[measured], QUIET_SHARE))


def _shape(values: Tensor) -> str:
    return "x".join(map(str, values.shape))
