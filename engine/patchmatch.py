"""Holes filled with texture and structure from elsewhere in the picture, by PatchMatch.

C. Barnes, E. Shechtman, A. Finkelstein, D. Goldman, PatchMatch: A Randomized Correspondence Algorithm for Structural
Image Editing (2009); the synthesis is pypatchmatch's. What is too large for it is synthesised at half the
resolution, and so on, and gets its detail from the picture: see ``detail``.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYetError
from types import ModuleType

import numpy as np
import numpy.typing as npt

from .detail import Check, fill_reduced
from .masks import FloatArray
from .pull_push import Hole, pull_push
from .types import MissingPackageError

MAX_AREA = 1536 * 1024
"""Pixels synthesised at once: beyond it the resolution is lowered first (seconds each)."""
POLL_SECONDS = 0.1
"""How often a running synthesis asks whether it should go on."""

Bytes = npt.NDArray[np.uint8]

# one after the other: the native library keeps its seed in a global
_worker = ThreadPoolExecutor(1, thread_name_prefix="patchmatch")


def patchmatch(pixels: FloatArray, hole: Hole, radius: int, seed: int, check: Check) -> FloatArray:
    """The pixels [H, W, 3] with the hole [H, W] synthesised from the rest; ``radius``: half the side of a patch.

    At 8 bits up to MAX_AREA; beyond it the hole is at full precision. Raises MissingPackageError.
    """
    if hole.size <= MAX_AREA:
        return _synthesise(pixels, hole, radius, seed, check)

    def patchmatch_halved(picture: FloatArray, wanted: Hole) -> FloatArray:
        return patchmatch(picture, wanted, radius, seed, check)

    return fill_reduced(pixels, hole, 2, patchmatch_halved, seed, check)


def _synthesise(pixels: FloatArray, hole: Hole, radius: int, seed: int, check: Check) -> FloatArray:
    library = _require_library()
    # pictures that a few patches would cover are mirrored outwards first
    frame = 4 * radius if min(hole.shape) < 4 * radius else 0
    # black marks the pixels that no patch reached, so none may be black from the start
    source = np.pad(np.maximum(to_bytes(pixels), 1), ((frame, frame), (frame, frame), (0, 0)), mode="symmetric")
    mirrored = np.pad(hole, frame, mode="symmetric")

    def run() -> Bytes:
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
    """The result of ``run``; when ``check`` raises it ends unheard, for it cannot be stopped, or does not begin."""
    future: Future[Bytes] = _worker.submit(run)
    try:
        while True:
            check()
            try:
                return future.result(timeout=POLL_SECONDS)
            except NotYetError:
                if future.done():
                    raise
    finally:
        future.cancel()


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
