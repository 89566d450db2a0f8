"""Holes of any size, for what fills small pictures well.

Networks that fill holes were trained on small pictures: beyond them they run out of memory, and out of what they can
see across the hole. So a picture that is too large is filled tile by tile where the hole is shallow, as scratches and
letters are, and each tile still sees both of its sides. A deep hole is filled at half the resolution, and so on, which
lays down structure and tone, and then in detail.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from .detail import fill_reduced
from .masks import FloatArray
from .pull_push import Hole
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
        """The side of a tile."""
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
        """Holes that are nowhere deeper show each tile what is on both of their sides."""
        return self.tile / 4

    def holds(self, hole: Hole) -> bool:
        height, width = hole.shape
        return max(height, width) <= self.square if self.square else height * width <= self.area

    def missing(self, length: int) -> int:
        """Pixels to add to a side."""
        return (self.square or -(-length // self.multiple) * self.multiple) - length


def fill_tiled(
    pixels: FloatArray, hole: Hole, filler: Filler, window: Window, *, seed: int = 0, check: Check
) -> FloatArray:
    """The pixels [H, W, 3] with the hole [H, W] filled by ``filler``, whatever their size; the rest bit for bit.

    What is under the hole is never looked at. ``seed`` decides where detail is looked for.
    """
    if not hole.any():
        return pixels
    check(0)
    visible = np.where(hole[..., None], np.float32(0), pixels)

    def fill(picture: FloatArray, wanted: Hole) -> FloatArray:
        return _fitted(picture, wanted, filler, window)

    if window.holds(hole):
        filled = fill(visible, hole)
    elif (depth := _depth(hole)).max() <= window.shallow:
        filled = _fill_by_tiles(visible, hole, depth, fill, window, check)
    else:

        def fill_halved(picture: FloatArray, wanted: Hole) -> FloatArray:
            return fill_tiled(picture, wanted, filler, window, seed=seed, check=lambda share: check(share / 2))

        filled = fill_reduced(visible, hole, 2, fill_halved, seed, lambda: check(0.5))
    return np.where(hole[..., None], filled, pixels)


def _fill_by_tiles(
    pixels: FloatArray, hole: Hole, depth: FloatArray, filler: Filler, window: Window, check: Check
) -> FloatArray:
    result, done = pixels.copy(), np.zeros_like(hole)
    # the shallow first: each tile then borders on what is known or filled
    cells = sorted(_cells(hole, window.cell), key=lambda cell: float(depth[cell.rows, cell.columns].max()))
    for index, cell in enumerate(cells):
        check(index / len(cells))
        tile = _tile_around(cell, hole, window)
        view = (tile.rows, tile.columns)
        weight = _weight(cell, tile, window.overlap)
        wanted = hole[view] & (~done[view] | (weight > 0))
        filled = filler(result[view], wanted)
        # what was filled before fades into it
        share = wanted * np.where(done[view], weight, weight > 0)
        result[view] += (filled - result[view]) * share[..., None]
        done[cell.rows, cell.columns] |= hole[cell.rows, cell.columns]
    return result


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
    """A tile with the cell in its middle, as far as the picture lets it."""
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


def _depth(hole: Hole) -> FloatArray:
    """Distance to the nearest known pixel."""
    from scipy import ndimage

    depth: FloatArray = ndimage.distance_transform_edt(hole).astype(np.float32)
    return depth
