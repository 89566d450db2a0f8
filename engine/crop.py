"""What part of the picture the model sees, cut out and put back.

A ``CropPlan`` knows three spaces: the picture, the ``box`` in it, and the ``canvas`` the model works on (the box
resampled to ``scaled``, then padded to whole latent cells). ``cut`` goes there, ``uncut`` comes back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from . import images
from .types import Box, Size

CONTEXT = 0.5
"""Surroundings shown on each side, as a share of the mask's mean side."""
MIN_CONTEXT = 32
"""Pixels of surroundings shown on each side, at least."""
MAX_ASPECT = 2.0
"""A long thin mask is shown with enough surroundings to keep the canvas within this aspect ratio."""
KEEP_SCALE = (0.75, 1.25)
"""Canvas area over native area within which the crop is used pixel for pixel, without resampling."""


@dataclass(frozen=True)
class CropPlan:
    """A box of the picture and the canvas it becomes."""

    box: Box
    scaled: Size
    """The box's size on the canvas; equal to the box's own where nothing is resampled."""
    canvas: Size
    """``scaled`` rounded up to whole latent cells; the rest repeats the edge."""

    def cut(self, picture: Tensor) -> Tensor:
        """Images [B, H, W, C] -> canvas [B, h, w, C]."""
        part = picture[:, self.box.rows, self.box.columns]
        return self._pad(images.resize(part, self.scaled).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def cut_mask(self, mask: Tensor) -> Tensor:
        """Masks [B, H, W] -> canvas [B, h, w]."""
        part = mask[:, self.box.rows, self.box.columns]
        return self._pad(images.resize_mask(part, self.scaled)[:, None])[:, 0]

    def cut_hole(self, mask: Tensor) -> Tensor:
        """Masks [B, H, W] -> canvas [B, h, w] of 0 and 1: 1 where ``cut`` may show anything that the mask touches."""
        hole = (self.cut_mask(mask) > 0).to(mask)
        if self.scaled == self.box.size:
            return hole
        # the pictures' bicubic filter reaches a pixel further than the masks' bilinear one, the larger of both pixels
        reach = math.ceil(max(1, self.scaled.width / self.box.width, self.scaled.height / self.box.height))
        return F.max_pool2d(hole[:, None], 2 * reach + 1, stride=1, padding=reach)[:, 0]

    def uncut(self, canvas: Tensor) -> Tensor:
        """Canvas [B, h, w, C] -> the box's part of the picture, [B, box height, box width, C]."""
        return images.resize(canvas[:, : self.scaled.height, : self.scaled.width], self.box.size)

    def uncut_mask(self, canvas: Tensor) -> Tensor:
        """Canvas masks [B, h, w] -> the box's part of the picture, [B, box height, box width]."""
        return images.resize_mask(canvas[:, : self.scaled.height, : self.scaled.width], self.box.size)

    def _pad(self, planes: Tensor) -> Tensor:
        right, bottom = self.canvas.width - self.scaled.width, self.canvas.height - self.scaled.height
        return F.pad(planes, (0, right, 0, bottom), mode="replicate") if right or bottom else planes


def whole(picture: Size, multiple: int) -> CropPlan:
    """The whole picture, pixel for pixel; ``multiple`` is the side of a latent cell in pixels."""
    return CropPlan(Box(0, 0, picture.width, picture.height), picture, _round_up(picture, multiple))


def around(mask_box: Box, picture: Size, native_size: int, multiple: int) -> CropPlan:
    """The mask's surroundings, sized for a network trained on ``native_size`` x ``native_size`` pixels.

    The box holds the mask with context on every side, reaches the native size where the picture has room (so that
    nothing needs resampling), and stays inside the picture. A larger box is scaled to the native area.
    """
    width, height = _wanted(mask_box, native_size)
    width, height = _snap(width, picture.width, multiple), _snap(height, picture.height, multiple)
    left = _place(mask_box.left, mask_box.right, width, picture.width)
    top = _place(mask_box.top, mask_box.bottom, height, picture.height)
    box = Box(left, top, left + width, top + height)
    ratio = width * height / native_size**2
    if KEEP_SCALE[0] <= ratio <= KEEP_SCALE[1]:
        scaled = box.size
    else:
        scale = 1 / math.sqrt(ratio)
        scaled = Size(max(multiple, round(width * scale)), max(multiple, round(height * scale)))
    return CropPlan(box, scaled, _round_up(scaled, multiple))


def _wanted(mask_box: Box, native_size: int) -> tuple[int, int]:
    context = max(MIN_CONTEXT, round(CONTEXT * (mask_box.width + mask_box.height) / 2))
    width, height = mask_box.width + 2 * context, mask_box.height + 2 * context
    if max(width, height) <= native_size:
        return native_size, native_size
    return max(width, math.ceil(height / MAX_ASPECT)), max(height, math.ceil(width / MAX_ASPECT))


def _snap(wanted: int, available: int, multiple: int) -> int:
    """The side in whole cells where the picture has room for them, else all there is."""
    rounded = math.ceil(wanted / multiple) * multiple
    return min(rounded, available)


def _place(low: int, high: int, side: int, available: int) -> int:
    """Where a box of ``side`` starts: centred on low..high, shifted to lie inside 0..available."""
    centred = (low + high - side) // 2
    return max(0, min(centred, available - side))


def _round_up(size: Size, multiple: int) -> Size:
    return Size(math.ceil(size.width / multiple) * multiple, math.ceil(size.height / multiple) * multiple)
