"""Colours that flow into a hole, and the steps between resolutions that this and other fills take."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from .masks import FloatArray

Hole = npt.NDArray[np.bool_]

RELAXATIONS = 4
"""Jacobi sweeps on each level of the pyramid."""


def pull_push(pixels: FloatArray, hole: Hole) -> FloatArray:
    """The pixels [H, W, C] with colours from around the hole [H, W] spread smoothly over it.

    S. Gortler et al., The Lumigraph (1996), section 3.4: colours where there are none come from coarser and coarser
    means; on each level they are then relaxed towards the membrane (Laplace's equation), which removes the pyramid's
    blocks.
    """
    return _to_pixels(_pull_push(_to_planes(pixels), torch.from_numpy(~hole).float()[None, None]))


def average(pixels: FloatArray, known: Hole, factor: int) -> tuple[FloatArray, FloatArray]:
    """The means [h, w, C] of the known pixels in cells of ``factor`` by ``factor``, and the share [h, w] of them.

    Height and width must be multiples of ``factor``. A cell without known pixels is 0.
    """
    weight = torch.from_numpy(known).float()[None, None]
    planes = torch.where(weight > 0, _to_planes(pixels), 0)
    share = F.avg_pool2d(weight, factor)
    means = F.avg_pool2d(planes, factor) / share.clamp(min=1e-12)
    return _to_pixels(means), share[0, 0].numpy()


def enlarge(pixels: FloatArray, factor: int) -> FloatArray:
    """The pixels [h, w, C] ``factor`` times as large, bilinearly."""
    return _to_pixels(F.interpolate(_to_planes(pixels), scale_factor=factor, mode="bilinear", align_corners=False))


def _pull_push(planes: Tensor, known: Tensor) -> Tensor:
    """Planes [1, C, H, W] with colours where ``known`` [1, 1, H, W] is 0."""
    if known.all():
        return planes
    height, width = planes.shape[-2:]
    even = (0, width % 2, 0, height % 2)
    weighted = F.avg_pool2d(F.pad(planes * known, even), 2)
    weight = F.avg_pool2d(F.pad(known, even), 2)
    coarse = _pull_push(weighted / weight.clamp(min=1e-12), (weight > 0).to(weight))
    guess = F.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)[..., :height, :width]
    result = torch.where(known > 0, planes, guess)
    for _ in range(RELAXATIONS):
        framed = F.pad(result, (1, 1, 1, 1), mode="replicate")
        mean = (framed[..., :-2, 1:-1] + framed[..., 2:, 1:-1] + framed[..., 1:-1, :-2] + framed[..., 1:-1, 2:]) / 4
        result = torch.where(known > 0, planes, mean)
    return result


def _to_planes(pixels: FloatArray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]


def _to_pixels(planes: Tensor) -> FloatArray:
    pixels: FloatArray = planes[0].permute(1, 2, 0).contiguous().numpy()
    return pixels
