"""A hole that was filled at a lower resolution gets its detail from the picture itself.

Between the reduced fill and what is known a nearest-neighbour field is searched (C. Barnes et al., PatchMatch: A
Randomized Correspondence Algorithm for Structural Image Editing, 2009), and at full resolution the patches it names
vote for each pixel, as on the finest level of Y. Wexler, E. Shechtman, M. Irani, Space-Time Completion of Video (2007).
One step of back-projection (M. Irani, S. Peleg, Improving Resolution by Image Registration, 1991) then returns the
reduced fill's own tone and structure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .masks import FloatArray
from .pull_push import Hole, average, enlarge

SEARCH_RADIUS = 3
"""Half the side of the patches that are looked for in the reduced picture, in its pixels."""
GRID = 2
"""Distance of neighbouring patches there; at most the radius, so that what they cover is known."""
SWEEPS = 4
JUMPS = (1, 2, 4, 8)
"""How far a match is passed on at once, in patches."""

Field = npt.NDArray[np.int64]
Check = Callable[[], None]
"""Called often; may raise to stop."""


def fill_reduced(
    pixels: FloatArray,
    hole: Hole,
    factor: int,
    filler: Callable[[FloatArray, Hole], FloatArray],
    seed: int,
    check: Check,
) -> FloatArray:
    """The pixels [H, W, 3] with the hole [H, W] filled by ``filler`` at 1 / factor of the size, then in detail.

    What is under the hole is never looked at, and pixels outside it stay bit for bit. ``seed`` decides the search.
    """
    height, width = hole.shape
    # whole cells of the reduced picture
    border = ((0, -height % factor), (0, -width % factor))
    pixels, hole = np.pad(pixels, (*border, (0, 0)), mode="symmetric"), np.pad(hole, border, mode="symmetric")
    reduced, known = average(pixels, ~hole, factor)
    if (known == 0).any():
        reduced = np.where(known[..., None] == 0, filler(reduced, known == 0), reduced)
    return _at_full_resolution(pixels, hole, reduced, known, factor, seed, check)[:height, :width]


def _at_full_resolution(
    pixels: FloatArray, hole: Hole, reduced: FloatArray, known: FloatArray, factor: int, seed: int, check: Check
) -> FloatArray:
    """The hole with the pixels its patches came from, and the tone of ``reduced``, where it has been synthesised."""
    field = _nearest_neighbours(reduced, known, np.random.default_rng(seed), check)
    # without a field nowhere is a whole patch known
    voted = enlarge(reduced, factor) if field is None else _vote(pixels, hole, field, factor)
    result = np.where(hole[..., None], voted, pixels)
    means, _ = average(result, np.ones_like(hole), factor)
    correction = np.where(known[..., None] == 0, reduced - means, 0)
    corrected = np.clip(result + enlarge(correction.astype(np.float32), factor), 0, 1)
    return np.where(hole[..., None], corrected, pixels)


@dataclass(frozen=True)
class _Patches:
    """The patches around all pixels of a picture, which is framed so that none reaches out of it."""

    flat: FloatArray
    """[N, C]."""
    stride: int
    offsets: Field

    @classmethod
    def of(cls, picture: FloatArray) -> _Patches:
        framed = np.pad(picture, ((SEARCH_RADIUS, SEARCH_RADIUS), (SEARCH_RADIUS, SEARCH_RADIUS), (0, 0)), mode="edge")
        stride = framed.shape[1]
        span = np.arange(0, 2 * SEARCH_RADIUS + 1, 2)
        return cls(framed.reshape(-1, framed.shape[-1]), stride, (span[:, None] * stride + span).ravel())

    def at(self, rows: Field, columns: Field) -> FloatArray:
        """Every other pixel of each patch, [N, K, C]: neighbouring ones say much the same."""
        patches: FloatArray = self.flat[(rows * self.stride + columns)[:, None] + self.offsets]
        return patches


def _nearest_neighbours(
    picture: FloatArray, known: FloatArray, generator: np.random.Generator, check: Check
) -> Field | None:
    """For each patch of the grid where it meets the hole: how far off the known patch most like it is, [h, w, 2].

    None when no patch is known as a whole. Matches come from chance, spread to neighbours and improve by trying places
    around them, as in PatchMatch; every patch at once, so they also jump.
    """
    from scipy import ndimage

    height, width = known.shape
    whole = ndimage.minimum_filter(known, 2 * SEARCH_RADIUS + 1, mode="constant", cval=0) == 1
    sources = np.argwhere(whole)
    if len(sources) == 0:
        return None
    touched = ndimage.maximum_filter(known < 1, 2 * GRID + 1)[::GRID, ::GRID]
    grid = np.argwhere(touched)
    targets = grid * GRID
    patches = _Patches.of(picture)
    wanted = patches.at(*targets.T)
    best = generator.choice(sources, len(targets))
    cost = ((patches.at(*best.T) - wanted) ** 2).sum(axis=(1, 2))

    def attempt(candidates: Field) -> None:
        rows, columns = candidates.T
        inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
        inside[inside] = whole[rows[inside], columns[inside]]
        chosen = np.flatnonzero(inside)
        tried = ((patches.at(rows[chosen], columns[chosen]) - wanted[chosen]) ** 2).sum(axis=(1, 2))
        better = tried < cost[chosen]
        best[chosen[better]] = candidates[chosen[better]]
        cost[chosen[better]] = tried[better]

    place = np.full(touched.shape, -1)
    place[touched] = np.arange(len(grid))
    for _ in range(SWEEPS):
        check()
        for jump in JUMPS:
            for step in ((0, jump), (jump, 0), (0, -jump), (-jump, 0)):
                from_grid = np.clip(grid + step, 0, np.array(touched.shape) - 1)
                neighbour = place[tuple(from_grid.T)]
                neighbour = np.where(neighbour < 0, np.arange(len(grid)), neighbour)
                attempt(best[neighbour] - targets[neighbour] + targets)
        reach = max(height, width)
        while reach >= 1:
            attempt(best + generator.integers(-reach, reach, best.shape, endpoint=True))
            reach //= 2
    field = np.zeros((*touched.shape, 2), np.int64)
    field[touched] = best - targets
    return field


def _vote(pixels: FloatArray, hole: Hole, field: Field, factor: int) -> FloatArray:
    """Each pixel of the hole as the mean of where the four patches around it come from, by their nearness."""
    spacing = GRID * factor
    rows, columns = np.nonzero(hole)
    # the middle of the reduced pixel a patch is centred on
    down, right = ((axis - (factor - 1) / 2) / spacing for axis in (rows, columns))
    total = np.zeros((len(rows), pixels.shape[-1]), np.float32)
    for lower in (0, 1):
        for further in (0, 1):
            row, column = np.floor(down).astype(int) + lower, np.floor(right).astype(int) + further
            weight = (1 - np.abs(down - row)) * (1 - np.abs(right - column))
            row, column = np.clip(row, 0, field.shape[0] - 1), np.clip(column, 0, field.shape[1] - 1)
            source = np.stack([rows, columns], axis=-1) + factor * field[row, column]
            total += weight[:, None].astype(np.float32) * pixels[tuple(source.T)]
    voted = pixels.copy()
    voted[hole] = total
    return voted
