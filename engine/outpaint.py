"""Room for more picture: a larger canvas, and the mask that says where the picture goes on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .fill import FillMethod, fill
from .images import as_images
from .masks import OnImage
from .types import MAX_SIDE, InputError, Size, check_area, check_range

MAX_PADDING = MAX_SIDE


@dataclass(frozen=True)
class Padding:
    """Pixels added on each side, 0..16384."""

    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0

    def __post_init__(self) -> None:
        for name, pixels in vars(self).items():
            if pixels < 0:
                raise InputError(f"{name} is {pixels}, but padding can only add pixels; crop the picture first.")
            check_range(name, pixels, 0, MAX_PADDING)


@dataclass(frozen=True)
class Padded:
    """A picture on its larger canvas."""

    image: Tensor
    """[B, H + top + bottom, W + left + right, C]; the original pixels bit for bit where they now lie."""
    mask: Tensor
    """[B, ...] at that size: 1 on the new area, falling to 0 inside the original."""


def pad(
    image: Tensor,
    padding: Padding,
    feather: int = 0,
    method: FillMethod = FillMethod.EDGE,
    *,
    seed: int = 0,
    on_image: OnImage | None = None,
) -> Padded:
    """The image [B, H, W, 3 or 4] on a larger canvas, the new area filled by ``method`` and masked.

    On padded sides the mask reaches ``feather`` pixels into the original, falling as a smoothstep of the distance; with
    two sides in play what they keep multiplies, which keeps corners smooth. Where the picture is too small for the
    feather it gets what fits: up to the far side, or to the middle between two padded sides. No padding gives the
    image back under an empty mask. Raises InputError for a negative feather and a canvas too large to work on.
    """
    method = FillMethod(method)
    if feather < 0:
        raise InputError(f"feather is {feather}; give 0 or more pixels.")
    images = as_images(image)
    _, height, width, _ = images.shape
    check_area(Size(padding.left + width + padding.right, padding.top + height + padding.bottom))
    canvas = _repeat_edges(images, padding)
    keep_rows = _keep(height, padding.top, padding.bottom, feather).to(images.device)
    keep_columns = _keep(width, padding.left, padding.right, feather).to(images.device)
    mask = (1 - keep_rows[:, None] * keep_columns[None, :]).expand(len(images), -1, -1)
    if method is not FillMethod.EDGE and padding != Padding():
        canvas = fill(canvas, _new_area(canvas, height, width, padding), method, seed=seed, on_image=on_image)
    return Padded(canvas, mask.contiguous())


def _repeat_edges(images: Tensor, padding: Padding) -> Tensor:
    batch, height, width, channels = images.shape
    left, top = padding.left, padding.top
    right, bottom = left + width, top + height
    canvas = images.new_empty(batch, bottom + padding.bottom, right + padding.right, channels)
    canvas[:, top:bottom, left:right] = images
    canvas[:, top:bottom, :left] = images[:, :, :1]
    canvas[:, top:bottom, right:] = images[:, :, -1:]
    canvas[:, :top] = canvas[:, top : top + 1]
    canvas[:, bottom:] = canvas[:, bottom - 1 : bottom]
    return canvas


def _new_area(canvas: Tensor, height: int, width: int, padding: Padding) -> Tensor:
    """1 outside the original, [1, H, W] of the canvas."""
    area = canvas.new_ones(1, *canvas.shape[1:3])
    area[:, padding.top : padding.top + height, padding.left : padding.left + width] = 0
    return area


def _keep(length: int, before: int, after: int, feather: int) -> Tensor:
    """How much of the original is kept along one axis: 0 in the padding, rising to 1 inside the original."""
    room = length // 2 if before and after else length
    rise = _rise(length, min(feather, room))
    keep = torch.zeros(before + length + after)
    inside = keep[before : before + length]
    inside.fill_(1)
    if before:
        inside *= rise
    if after:
        inside *= rise.flip(0)
    return keep


def _rise(length: int, feather: int) -> Tensor:
    """Smoothstep over the first ``feather`` pixels, then 1."""
    t = (torch.arange(1, length + 1, dtype=torch.float64) / (feather + 1)).clamp(max=1)
    return (t * t * (3 - 2 * t)).float()
