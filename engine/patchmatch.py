"""Holes filled with texture and structure from elsewhere in the picture, by PatchMatch.

C. Barnes, E. Shechtman, A. Finkelstein, D. Goldman, PatchMatch: A Randomized Correspondence Algorithm for Structural
Image Editing (2009); the synthesis is pypatchmatch's. What is too large for it is synthesised reduced by a whole
factor. The pixels of the full picture then come from where the reduced ones were found: a nearest-neighbour field is
searched between the synthesised hole and what is known, and the patches it names vote at full resolution, as on the
finest level of Y. Wexler, E. Shechtman, M. Irani, Space-Time Completion of Video (2007).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYetError
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import numpy.typing as npt

from .masks import FloatArray
from .pull_push import Hole, average, enlarge, pull_push
from .types import MissingPackageError

MAX_AREA = 1536 * 1024
"""Pixels synthesised at once: beyond it the resolution is lowered first (seconds each)."""
POLL_SECONDS = 0.1
"""How often a running synthesis asks whether it should go on."""

SEARCH_RADIUS = 3
"""Half the side of the patches that are looked for in the reduced picture, in its pixels."""
GRID = 2
"""Distance of neighbouring patches there; at most the radius, so that what they cover is known."""
SWEEPS = 6
JUMPS = (1, 2, 4, 8)
"""How far a match is passed on at once, in patches."""

Bytes = npt.NDArray[np.uint8]
Field = npt.NDArray[np.int64]
Check = Callable[[], None]
"""Called often; may raise to stop."""

# the native library keeps its seed in a global
_lock = threading.Lock()


def patchmatch(pixels: FloatArray, hole: Hole, radius: int, seed: int, check: Check) -> FloatArray:
    """The pixels [H, W, 3] with the hole [H, W] synthesised from the rest; ``radius``: half the side of a patch.

    At 8 bits up to MAX_AREA; beyond it the hole is at full precision. Raises MissingPackageError.
    """
    height, width = hole.shape
    factor = math.ceil(math.sqrt(height * width / MAX_AREA))
    if factor == 1:
        return _synthesise(pixels, hole, radius, seed, check)
    # whole cells of the reduced picture
    border = ((0, -height % factor), (0, -width % factor))
    pixels, hole = np.pad(pixels, (*border, (0, 0)), mode="symmetric"), np.pad(hole, border, mode="symmetric")
    reduced, known = average(pixels, ~hole, factor)
    reduced = _synthesise(reduced, known == 0, radius, seed, check)
    return _at_full_resolution(pixels, hole, reduced, known, factor, seed, check)[:height, :width]


def _synthesise(pixels: FloatArray, hole: Hole, radius: int, seed: int, check: Check) -> FloatArray:
    if not hole.any():
        return pixels
    library = _require_library()
    # pictures that a few patches would cover are mirrored outwards first
    frame = 4 * radius if min(hole.shape) < 4 * radius else 0
    # black marks the pixels that no patch reached, so none may be black from the start
    source = np.pad(np.maximum(to_bytes(pixels), 1), ((frame, frame), (frame, frame), (0, 0)), mode="symmetric")
    mirrored = np.pad(hole, frame, mode="symmetric")

    def run() -> Bytes:
        with _lock:
            library.set_random_seed(seed)
            return library.inpaint(source, mirrored, patch_size=radius)

    found = _wait_for(run, check)[frame : frame + hole.shape[0], frame : frame + hole.shape[1]]
    filled = from_bytes(found)
    missed = (found == 0).all(axis=-1)
    if missed.any():
        # where so little is known that no patch fits into it
        filled[missed] = pull_push(pixels, hole)[missed]
    return filled


def _wait_for(run: Callable[[], Bytes], check: Check) -> Bytes:
    """The result of ``run``, which cannot be stopped: when ``check`` raises, it ends unheard."""
    executor = ThreadPoolExecutor(1)
    future: Future[Bytes] = executor.submit(run)
    executor.shutdown(wait=False)
    while True:
        check()
        try:
            return future.result(timeout=POLL_SECONDS)
        except NotYetError:
            if future.done():
                raise


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


def _require_library() -> ModuleType:
    try:
        from patchmatch import patch_match
    except ImportError as error:
        raise MissingPackageError(
            'The fill method "patchmatch" needs the package pypatchmatch; run "pip install pypatchmatch" in ComfyUI\'s'
            " Python, or choose another method."
        ) from error
    if not patch_match.patchmatch_available:
        raise MissingPackageError(
            'The fill method "patchmatch" found pypatchmatch without a native library for this system; choose another'
            " method."
        )
    return patch_match


def to_bytes(pixels: FloatArray) -> Bytes:
    return np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)


def from_bytes(pixels: Bytes) -> FloatArray:
    return pixels.astype(np.float32) / np.float32(255)
