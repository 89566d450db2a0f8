"""Masks made ready: cleaned up, grown, softened, put on the latent grid.

Masks are float32 ``[B, H, W]`` in 0..1, 1 = repaint. The functions are pure, treat each mask of a batch alone and
answer on the device the mask came on; the arithmetic is NumPy on the CPU (``morphology``), so a mask gives the same
bits whatever device it came from. Work is confined to the mask's bounding box. Grey is kept as grey.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import morphology
from .morphology import HOLE_LEVELS as HOLE_LEVELS
from .morphology import FloatArray as FloatArray
from .morphology import Shape as Shape
from .morphology import opencv as opencv
from .types import Box, InputError, Size, check_range

OnImage = Callable[[int, int], None]
"""Called with (done, total) after each image of a batch; may raise to stop."""

MAX_PIXELS = 1024
"""The largest growth, feather, opening and closing."""
MAX_DOWNSCALE = 64
"""The largest latent cell."""


class Unit(str, Enum):
    """What the lengths of ``MaskOptions`` are given in."""

    PIXELS = "pixels"
    PERCENT = "percent"
    """Of the picture's longer side; ``min_island``: of its area."""


class FeatherSide(str, Enum):
    """Where the soft edge lies."""

    OUTWARD = "outward"
    """Outside the mask, which itself stays as it is."""
    INWARD = "inward"
    """Inside the mask, which does not reach further than before."""
    CENTRED = "centred"
    """Half inside and half outside, 1/2 on the edge."""


@dataclass(frozen=True, kw_only=True)
class MaskOptions:
    """What ``prepare_masks`` does, in this order; the defaults leave the mask alone.

    floor, threshold, invert, close, fill_holes, open, min_island, keep_largest make the user's mask; grow, feather and
    keep_solid come after. What touches the picture's border stays on it throughout.
    """

    floor: float = 0.0
    """0..1: values below it become 0 and the rest stays, which takes faint smears off a grey mask."""
    threshold: float = 0.0
    """0..1: values from here up become 1 and the rest 0; 0 keeps grey as it is."""
    invert: bool = False
    close: float = 0.0
    """Gaps up to about twice as wide are bridged (grow, then shrink)."""
    fill_holes: bool = False
    open: float = 0.0
    """Specks and strokes up to about twice as wide are dropped (shrink, then grow)."""
    min_island: float = 0.0
    """Islands of fewer pixels are dropped; in percent: of the picture's area. An island is what hangs together above
    0, also by a corner."""
    keep_largest: bool = False
    """Only the largest island stays."""
    grow: float = 0.0
    """Negative shrinks."""
    feather: float = 0.0
    """Width of the soft edge, a raised cosine of the Euclidean distance."""
    feather_side: FeatherSide = FeatherSide.OUTWARD
    keep_solid: bool = False
    """The user's mask stays at least as strong as it was, also under an inward feather or a negative ``grow``."""
    shape: Shape = Shape.ROUND
    """Of grow, close and open."""
    unit: Unit = Unit.PIXELS
    """Of grow, feather, close, open and min_island."""

    def __post_init__(self) -> None:
        check_range("floor", self.floor, 0, 1)
        check_range("threshold", self.threshold, 0, 1)
        limit = 100 if self.unit is Unit.PERCENT else MAX_PIXELS
        check_range("grow", self.grow, -limit, limit)
        for name in ("feather", "close", "open"):
            check_range(name, getattr(self, name), 0, limit)
        check_range("min_island", self.min_island, 0, 100 if self.unit is Unit.PERCENT else math.inf)


class PreparedMasks(NamedTuple):
    """The three masks of a run, [B, H, W] each."""

    user: Tensor
    """What was painted, cleaned up: from floor to keep_largest."""
    sampler: Tensor
    """The grown mask on whole latent cells: where the model may paint."""
    stitch: Tensor
    """The grown and feathered mask: how much of what was painted goes into the picture."""


def prepare(mask: Tensor, options: MaskOptions, on_image: OnImage | None = None) -> Tensor:
    """The stitch mask of ``prepare_masks``, [B, H, W]."""
    return prepare_masks(mask, options, on_image=on_image).stitch


def prepare_masks(
    mask: Tensor, options: MaskOptions, downscale: int = 8, on_image: OnImage | None = None
) -> PreparedMasks:
    """The user's, the sampler's and the stitch mask of a mask [B, H, W], as ``options`` say.

    ``downscale`` is the side of a latent cell in pixels, 1..64; the picture need not be whole cells. With an outward
    feather and no shrinking, or with keep_solid, the stitch mask is at least the user's everywhere. Raises InputError
    for a percentage that comes to more than MAX_PIXELS.
    """
    check_range("downscale", downscale, 1, MAX_DOWNSCALE)
    _, height, width = mask.shape
    lengths = _lengths(options, Size(width, height))
    reach = lengths.close + max(lengths.grow, 0) + lengths.feather
    started = _levels(mask, options)
    prepared = PreparedMasks(*(torch.zeros_like(started) for _ in PreparedMasks._fields))
    for index, source in enumerate(started):
        box = bounding_box(source)
        if box is not None:
            box = whole_cells(expand_box(box, math.floor(reach) + 1, height, width), downscale, height, width)
            array = source[box.rows, box.columns].detach().cpu().contiguous().numpy()
            for target, result in zip(prepared, _prepare_one(array, options, lengths, downscale), strict=True):
                target[index, box.rows, box.columns] = torch.from_numpy(result).to(target)
        if on_image is not None:
            on_image(index + 1, mask.shape[0])
    return prepared


def _prepare_one(array: FloatArray, options: MaskOptions, lengths: _Lengths, downscale: int) -> list[FloatArray]:
    """user, sampler, stitch, in this order; ``array`` starts on a cell."""
    user = morphology.closing(array, lengths.close, options.shape)
    if options.fill_holes:
        user = morphology.fill_holes(user)
    user = morphology.opening(user, lengths.open, options.shape)
    if lengths.min_island > 0 or options.keep_largest:
        user = morphology.drop_islands(user, lengths.min_island, keep_largest=options.keep_largest)
    grown = morphology.grow(user, lengths.grow, options.shape)
    stitch = _FEATHERS[options.feather_side](grown, lengths.feather)
    if options.keep_solid:
        grown, stitch = np.maximum(grown, user), np.maximum(stitch, user)
    return [user, _snap_to_grid(grown, downscale), stitch]


def threshold(mask: Tensor, value: float) -> Tensor:
    """1 where the mask is at least ``value``, 0 elsewhere."""
    return (mask >= value).to(mask.dtype)


def invert(mask: Tensor) -> Tensor:
    """1 - mask."""
    return 1 - mask


def grow(mask: Tensor, pixels: float, shape: Shape = Shape.ROUND) -> Tensor:
    """Dilation: each pixel takes the largest value within ``pixels`` of it, as ``shape`` measures that.

    Negative ``pixels`` shrink: the smallest value within reach. What lies outside the picture counts for neither, so
    a mask that touches the border stays on it. -1024..1024; round takes fractions as they are, square rounds down.
    """
    check_range("grow", pixels, -MAX_PIXELS, MAX_PIXELS)
    return _each(mask, lambda array: morphology.grow(array, pixels, shape), margin=max(pixels, 0))


def feather(mask: Tensor, pixels: float, side: FeatherSide = FeatherSide.OUTWARD) -> Tensor:
    """A soft edge of ``pixels`` (0..1024) grey pixels: a raised cosine of the Euclidean distance from the mask.

    Outward the mask itself stays as it is, and the pixel after the last grey one is 0; inward it is the same for what
    is not masked. See ``morphology.feather_outward``, ``feather_inward`` and ``feather_centred`` for the formulas.
    """
    check_range("feather", pixels, 0, MAX_PIXELS)
    return _each(mask, lambda array: _FEATHERS[side](array, pixels), margin=pixels)


def fill_holes(mask: Tensor) -> Tensor:
    """Regions enclosed by the mask become part of it, at the level of what encloses them.

    A region is enclosed when no path of side-by-side pixels leads from it to the picture's border. Grey masks are
    filled level by level: exactly, but for masks with more than HOLE_LEVELS levels and a megapixel of grey, which are
    filled in HOLE_LEVELS even steps.
    """
    return _each(mask, morphology.fill_holes, margin=0)


def bounding_box(mask: Tensor) -> Box | None:
    """The smallest box that holds every pixel above 0 of a mask [H, W] or of all of [B, H, W]; None without any."""
    if mask.ndim == 3:
        mask = mask.amax(dim=0)
    rows, columns = mask.amax(dim=1).nonzero(), mask.amax(dim=0).nonzero()
    if len(rows) == 0:
        return None
    return Box(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def to_latent_grid(mask: Tensor, downscale: int) -> Tensor:
    """The mask [B, H, W] on the latent grid, [B, 1, H / downscale, W / downscale].

    A cell takes the largest value of its pixels, so that no stroke is too thin to survive. H and W must be multiples
    of ``downscale``.
    """
    batch, height, width = mask.shape
    if height % downscale or width % downscale:
        raise InputError(f"The mask is {width}x{height}; the latent grid needs multiples of {downscale}.")
    cells = mask.reshape(batch, 1, height // downscale, downscale, width // downscale, downscale)
    return cells.amax(dim=(3, 5))


def snap_to_grid(mask: Tensor, downscale: int = 8) -> Tensor:
    """The mask [B, H, W] grown out to whole latent cells of ``downscale`` pixels (1..64), at its own size.

    Each pixel takes the largest value of its cell, so the mask survives every way of making it smaller by
    ``downscale``. Cells start at the top left; those at the right and bottom border may be cut short.
    """
    check_range("downscale", downscale, 1, MAX_DOWNSCALE)
    result = torch.zeros_like(mask)
    _, height, width = mask.shape
    for source, target in zip(mask, result, strict=True):
        box = bounding_box(source)
        if box is not None:
            box = whole_cells(box, downscale, height, width)
            array = source[box.rows, box.columns].detach().cpu().contiguous().numpy()
            target[box.rows, box.columns] = torch.from_numpy(_snap_to_grid(array, downscale)).to(target)
    return result


def expand_box(box: Box, margin: int, height: int, width: int) -> Box:
    """``box`` with ``margin`` pixels more on every side, as far as the picture reaches."""
    return Box(
        max(box.left - margin, 0),
        max(box.top - margin, 0),
        min(box.right + margin, width),
        min(box.bottom + margin, height),
    )


def whole_cells(box: Box, side: int, height: int, width: int) -> Box:
    """The smallest box of whole cells around ``box``, as far as the picture reaches."""
    return Box(
        box.left // side * side,
        box.top // side * side,
        min(-(-box.right // side) * side, width),
        min(-(-box.bottom // side) * side, height),
    )


def to_pixels(name: str, length: float, unit: Unit, size: Size) -> float:
    """``length`` in pixels of a picture of ``size``; a percentage is of its longer side.

    Raises InputError, naming the length, for one of more than MAX_PIXELS.
    """
    if unit is Unit.PIXELS:
        return length
    pixels = length / 100 * max(size)
    if abs(pixels) > MAX_PIXELS:
        raise InputError(
            f"{name} is {length:g} % of {size}, {round(pixels)} pixels; give at most {MAX_PIXELS} pixels, which are"
            f" {100 * MAX_PIXELS / max(size):.3g} % here."
        )
    return pixels


_FEATHERS: dict[FeatherSide, Callable[[FloatArray, float], FloatArray]] = {
    FeatherSide.OUTWARD: morphology.feather_outward,
    FeatherSide.INWARD: morphology.feather_inward,
    FeatherSide.CENTRED: morphology.feather_centred,
}


class _Lengths(NamedTuple):
    """The lengths of some options in pixels; the island in pixels of area."""

    grow: float
    feather: float
    close: float
    open: float
    min_island: float


def _lengths(options: MaskOptions, size: Size) -> _Lengths:
    names = ("grow", "feather", "close", "open")
    lengths = {name: to_pixels(name, getattr(options, name), options.unit, size) for name in names}
    area = size.width * size.height / 100 if options.unit is Unit.PERCENT else 1
    return _Lengths(**lengths, min_island=options.min_island * area)


def _levels(mask: Tensor, options: MaskOptions) -> Tensor:
    """floor, threshold and invert, which look at each pixel alone."""
    if options.floor > 0:
        mask = torch.where(mask < options.floor, 0.0, mask)
    if options.threshold > 0:
        mask = threshold(mask, options.threshold)
    return invert(mask) if options.invert else mask


def _each(mask: Tensor, operation: Callable[[FloatArray], FloatArray], margin: float) -> Tensor:
    """``operation`` on each mask's bounding box, with the ``margin`` it reaches and a pixel of what is not masked."""
    result = mask.clone()
    for source, target in zip(mask, result, strict=True):
        box = bounding_box(source)
        if box is not None:
            box = expand_box(box, math.floor(margin) + 1, *source.shape)
            array = source[box.rows, box.columns].detach().cpu().contiguous().numpy()
            target[box.rows, box.columns] = torch.from_numpy(operation(array)).to(target)
    return result


def _snap_to_grid(array: FloatArray, side: int) -> FloatArray:
    height, width = array.shape
    padded = np.pad(array, ((0, -height % side), (0, -width % side)))
    rows = padded.reshape(-1, side, padded.shape[1]).max(axis=1)
    cells = rows.reshape(len(rows), -1, side).max(axis=2)
    return cells.repeat(side, axis=0).repeat(side, axis=1)[:height, :width]
