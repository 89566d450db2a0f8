"""Holes of any size, for what can only fill small pictures well: coarse to fine, tile by tile.

Networks that fill holes were trained on small pictures: beyond them they run out of memory, and out of what they can
see across the hole. So what is too large is filled at half the resolution first, and so on. At its own resolution it is
then filled in overlapping tiles, from the rim inwards, and what comes out is moved to agree with the coarse result at
half the resolution, which lays down structure and tone. R. Kulshreshtha et al., Feature Refinement to Improve High
Resolution Image Inpainting (2022) demand the same agreement from the network's features, by optimisation; here it is
one step of back-projection (M. Irani, S. Peleg, Improving Resolution by Image Registration, 1991) on its pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .masks import FloatArray
from .pull_push import Hole, average, enlarge
from .types import Box

TILE = 512
"""The side of a tile, where the window does not say. Its own part is the inner half; the rest is surroundings."""

Filler = Callable[[FloatArray, Hole], FloatArray]
"""Fills a picture [H, W, 3] where its hole [H, W] is; outside it anything may come out."""
Check = Callable[[float], None]
"""Called often with the share that is done; may raise to stop."""


@dataclass(frozen=True)
class Window:
    """The pictures that a filler takes."""

    area: int
    """Pixels it is good at, at once."""
    multiple: int
    """Of both sides."""
    square: int = 0
    """The side of a square, where it takes only this."""

    @property
    def tile(self) -> int:
        """The side of a tile; an even number."""
        return self.square or TILE

    @property
    def cell(self) -> int:
        """The side of a tile's own part."""
        return self.tile // 2

    @property
    def overlap(self) -> int:
        """Pixels over which a tile fades into those that were filled before it."""
        return self.tile // 16

    @property
    def shallow(self) -> float:
        """Holes that are nowhere deeper see their surroundings in each tile, and need no coarse result."""
        return self.tile / 4

    def holds(self, hole: Hole) -> bool:
        height, width = hole.shape
        return max(height, width) <= self.square if self.square else height * width <= self.area

    def missing(self, length: int) -> int:
        """Pixels to add to a side."""
        return (self.square or -(-length // self.multiple) * self.multiple) - length


def fill_tiled(pixels: FloatArray, hole: Hole, filler: Filler, window: Window, check: Check) -> FloatArray:
    """The pixels [H, W, 3] with the hole [H, W] filled by ``filler``, whatever their size; the rest bit for bit.

    What is under the hole is never looked at.
    """
    if not hole.any():
        return pixels
    levels = [_Level(np.where(hole[..., None], np.float32(0), pixels), hole, window)]
    while not levels[-1].fits and levels[-1].depth.max() > window.shallow:
        levels.append(levels[-1].halved())
    passes, done = sum(len(level.cells) for level in levels), 0

    def counted(pixels: FloatArray, hole: Hole) -> FloatArray:
        nonlocal done
        check(done / passes)
        done += 1
        return _fitted(pixels, hole, filler, window)

    filled = None
    for level in reversed(levels):
        filled = level.fill(counted, filled)
    height, width = hole.shape
    assert filled is not None
    return np.where(hole[..., None], filled[:height, :width], pixels)


class _Level:
    """The picture at one resolution: as it is where it fits the window, else with even sides, in cells."""

    def __init__(self, pixels: FloatArray, hole: Hole, window: Window) -> None:
        self.window = window
        self.fits = window.holds(hole)
        self.pixels: FloatArray = pixels if self.fits else _even(pixels)
        self.hole: Hole = hole if self.fits else _even(hole)
        self.depth = _depth(self.hole)
        # the shallow first: each tile then borders on something that is known or filled
        self.cells = (
            [Box(0, 0, hole.shape[1], hole.shape[0])]
            if self.fits
            else sorted(
                _cells(self.hole, window.cell), key=lambda cell: float(self.depth[cell.rows, cell.columns].max())
            )
        )

    def halved(self) -> _Level:
        """At half the resolution; only what has no known pixel is a hole there."""
        reduced, known = average(self.pixels, ~self.hole, 2)
        return _Level(reduced, known == 0, self.window)

    def fill(self, filler: Filler, guide: FloatArray | None) -> FloatArray:
        """``guide``: the result at half the resolution, where there is one."""
        if self.fits:
            return filler(self.pixels, self.hole)
        result, done = self.pixels.copy(), np.zeros_like(self.hole)
        for cell in self.cells:
            tile = _tile_around(cell, self.hole, self.window)
            view = (tile.rows, tile.columns)
            weight = _weight(cell, tile, self.window.overlap)
            wanted = self.hole[view] & (~done[view] | (weight > 0))
            part = None if guide is None else guide[_half(tile.rows), _half(tile.columns)]
            filled = _guided(result[view], self.hole[view], wanted, filler, part)
            share = wanted * np.where(done[view], weight, weight > 0)
            result[view] += (filled - result[view]) * share[..., None]
            done[cell.rows, cell.columns] |= self.hole[cell.rows, cell.columns]
        return result


def _guided(pixels: FloatArray, hole: Hole, wanted: Hole, filler: Filler, guide: FloatArray | None) -> FloatArray:
    """The pixels with what is wanted filled, and moved so that its means over 2 by 2 pixels are the guide's."""
    if guide is not None and wanted.all():
        return enlarge(guide, 2)
    filled = np.where(wanted[..., None], filler(pixels, wanted), pixels)
    if guide is None:
        return filled
    means, _ = average(filled, np.ones_like(wanted), 2)
    # where something is known in a cell, the guide's mean is of that alone
    _, share = average(filled, hole, 2)
    correction = np.where(share[..., None] == 1, guide - means, 0).astype(np.float32)
    return np.clip(filled + enlarge(correction, 2), 0, 1)


def _fitted(pixels: FloatArray, hole: Hole, filler: Filler, window: Window) -> FloatArray:
    """``filler`` on a picture of a size it takes, mirrored outwards where it is too small."""
    height, width = hole.shape
    border = ((0, window.missing(height)), (0, window.missing(width)))
    framed = np.pad(pixels, (*border, (0, 0)), mode="symmetric")
    return filler(framed, np.pad(hole, border, mode="symmetric"))[:height, :width]


def _cells(hole: Hole, side: int) -> Iterator[Box]:
    """The squares of a grid in which there is something to fill."""
    height, width = hole.shape
    for top in range(0, height, side):
        for left in range(0, width, side):
            cell = Box(left, top, min(left + side, width), min(top + side, height))
            if hole[cell.rows, cell.columns].any():
                yield cell


def _tile_around(cell: Box, hole: Hole, window: Window) -> Box:
    """A tile with the cell in its middle, as far as the picture lets it; its corners are at even places."""
    height, width = hole.shape
    side, margin = window.tile, (window.tile - window.cell) // 2
    left = max(min(cell.left - margin, width - side), 0)
    top = max(min(cell.top - margin, height - side), 0)
    return Box(left, top, min(left + side, width), min(top + side, height))


def _weight(cell: Box, tile: Box, overlap: int) -> FloatArray:
    """1 in the cell, falling to 0 within ``overlap`` pixels around it, [H, W] of the tile."""
    rows = _ramp(tile.top, tile.bottom, cell.top, cell.bottom, overlap)
    columns = _ramp(tile.left, tile.right, cell.left, cell.right, overlap)
    return rows[:, None] * columns


def _ramp(start: int, stop: int, first: int, last: int, overlap: int) -> FloatArray:
    place = np.arange(start, stop)
    away = np.maximum(np.maximum(first - place, place - (last - 1)), 0)
    return np.maximum(1 - away / np.float32(overlap), 0).astype(np.float32)


def _even(array: Any) -> Any:
    """A row and a column more where their number is odd."""
    border = ((0, array.shape[0] % 2), (0, array.shape[1] % 2), (0, 0))
    return np.pad(array, border[: array.ndim], mode="symmetric")


def _half(span: slice) -> slice:
    return slice(span.start // 2, span.stop // 2)


def _depth(hole: Hole) -> FloatArray:
    """Distance to the nearest known pixel."""
    from scipy import ndimage

    depth: FloatArray = ndimage.distance_transform_edt(hole).astype(np.float32)
    return depth
