"""Filling a hole without a model: from plain grey to content-aware synthesis.

A fill either is the result (removing an object) or gives an inpainting model something sensible to start from.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from .blend import paste
from .images import pair, resize
from .marching import Hole, navier_stokes, telea
from .masks import FloatArray, OnImage, bounding_box, expand_box, opencv
from .types import Box, InputError, MissingPackageError, Size, check_range

MAX_RADIUS = 64
CONTEXT = 1.0
"""Surroundings PatchMatch may copy from, on each side, as a share of the hole's longer side."""
MIN_CONTEXT = 64
"""The same in pixels, at least."""
MAX_AREA = 1536 * 1024
"""Pixels PatchMatch works on at once: beyond it first the surroundings are cut, then the resolution (seconds each)."""
RELAXATIONS = 4
"""Jacobi sweeps on each level of the blur pyramid."""

# the native library keeps its seed in a global
_patchmatch_lock = threading.Lock()


class FillMethod(str, Enum):
    """How a hole is filled."""

    NEUTRAL = "neutral"
    """Mid grey, what inpainting models are trained to see under a mask."""
    EDGE = "edge"
    """Each pixel repeats the nearest one that is kept."""
    BLUR = "blur"
    """The colours around the hole flow into it smoothly."""
    TELEA = "telea"
    """Weighted means from the rim inwards (Telea 2004)."""
    NAVIER_STOKES = "navier-stokes"
    """Lines of equal brightness continue into the hole (Bertalmio et al. 2001)."""
    PATCHMATCH = "patchmatch"
    """Texture and structure copied from elsewhere in the picture (Barnes et al. 2009); pypatchmatch."""


@dataclass(frozen=True)
class _Options:
    radius: int
    seed: int


DEFAULT_RADIUS = {FillMethod.TELEA: 5, FillMethod.NAVIER_STOKES: 5, FillMethod.PATCHMATCH: 3}
"""Pixels looked at around each pixel (Telea, Navier-Stokes); half the side of the compared patches (PatchMatch)."""


def fill(
    image: Tensor,
    mask: Tensor,
    method: FillMethod = FillMethod.PATCHMATCH,
    *,
    radius: int | None = None,
    seed: int = 0,
    on_image: OnImage | None = None,
) -> Tensor:
    """The image [B, H, W, 3 or 4] with the hole of the mask [B, H, W] filled.

    The hole is every pixel above 0; grey values mix the fill with the original in their proportion, and where the mask
    is 0 the image stays as it is, bit for bit. An alpha channel becomes opaque where something was filled. ``radius``
    (1..64) means what DEFAULT_RADIUS says; other methods have none. ``seed`` decides PatchMatch's search, the same for
    every image of a batch. PatchMatch computes the hole at 8 bits, and so do Telea and Navier-Stokes where OpenCV does
    them; where it is not installed ``marching`` does, and the hole differs slightly.

    Raises InputError when the mask leaves nothing to fill from, and MissingPackageError.
    """
    method = FillMethod(method)
    if radius is None:
        radius = DEFAULT_RADIUS.get(method, 1)
    check_range("radius", radius, 1, MAX_RADIUS)
    options = _Options(radius, seed)
    images, masks = pair(image, mask)
    result = images.clone()
    for index, (original, alpha) in enumerate(zip(images, masks, strict=True)):
        hole = (alpha > 0).cpu().numpy()
        if method is not FillMethod.NEUTRAL and hole.all():
            raise InputError(
                f"The mask of image {index + 1} covers the whole picture, so there is nothing to fill it from; make the"
                ' mask smaller or use the method "neutral".'
            )
        for box in _regions(hole, method, options):
            view = (slice(index, index + 1), box.rows, box.columns)
            pixels = original[box.rows, box.columns, :3].detach().cpu().numpy()
            filled = _FILLERS[method](pixels, hole[box.rows, box.columns], options)
            result[view] = paste(images[view], torch.from_numpy(filled)[None].to(images), masks[view])
        if on_image is not None:
            on_image(index + 1, len(images))
    return result


def _regions(hole: Hole, method: FillMethod, options: _Options) -> list[Box]:
    """The parts of the picture to work on; they hold the whole hole and what its filling depends on."""
    height, width = hole.shape
    if method is FillMethod.PATCHMATCH:
        return _separate_regions(hole)
    margin = {FillMethod.NEUTRAL: 0, FillMethod.EDGE: 1, FillMethod.BLUR: 32}.get(method, 2 * options.radius + 2)
    box = bounding_box(torch.from_numpy(hole))
    return [] if box is None else [expand_box(box, margin, height, width)]


def _separate_regions(hole: Hole) -> list[Box]:
    """Boxes around the parts of the hole with their context; those that meet are joined."""
    from scipy import ndimage

    height, width = hole.shape
    covered, boxes = hole, list[Box]()
    while True:
        # boxes that overlap or touch merge into one component of the next round
        found = [
            Box(columns.start, rows.start, columns.stop, rows.stop)
            for rows, columns in ndimage.find_objects(ndimage.label(covered, structure=np.ones((3, 3)))[0])
        ]
        if len(found) == len(boxes):
            return found
        boxes = found if boxes else [expand_box(box, _context(box), height, width) for box in found]
        covered = np.zeros_like(hole)
        for box in boxes:
            covered[box.rows, box.columns] = True


def _context(box: Box) -> int:
    """Pixels of surroundings on each side, fewer for holes so large that they would exceed MAX_AREA."""
    wanted = max(MIN_CONTEXT, round(CONTEXT * max(box.size)))
    # (width + 2 m) (height + 2 m) = MAX_AREA
    half_sum = (box.width + box.height) / 2
    fitting = (math.sqrt(max(half_sum**2 - box.width * box.height + MAX_AREA, 0)) - half_sum) / 2
    return max(MIN_CONTEXT, min(wanted, math.floor(fitting)))


def _fill_neutral(pixels: FloatArray, hole: Hole, options: _Options) -> FloatArray:
    return np.full_like(pixels, 0.5)


def _fill_edge(pixels: FloatArray, hole: Hole, options: _Options) -> FloatArray:
    from scipy import ndimage

    rows, columns = ndimage.distance_transform_edt(hole, return_distances=False, return_indices=True)
    return pixels[rows, columns]


def _fill_blur(pixels: FloatArray, hole: Hole, options: _Options) -> FloatArray:
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    known = torch.from_numpy(~hole).to(planes)[None, None]
    return _pull_push(planes, known)[0].permute(1, 2, 0).contiguous().numpy()


def _pull_push(planes: Tensor, known: Tensor) -> Tensor:
    """Planes [1, C, H, W] with colours where ``known`` [1, 1, H, W] is 0 taken from coarser and coarser means.

    Gortler et al., The Lumigraph (1996), section 3.4; on each level the unknown is then relaxed towards the membrane
    (Laplace's equation), which removes the pyramid's blocks.
    """
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


def _fill_telea(pixels: FloatArray, hole: Hole, options: _Options) -> FloatArray:
    cv2 = opencv()
    if cv2 is None:
        return telea(pixels, hole, options.radius)
    return _from_bytes(cv2.inpaint(_to_bytes(pixels), hole.astype(np.uint8), options.radius, cv2.INPAINT_TELEA))


def _fill_navier_stokes(pixels: FloatArray, hole: Hole, options: _Options) -> FloatArray:
    cv2 = opencv()
    if cv2 is None:
        return navier_stokes(pixels, hole, options.radius)
    return _from_bytes(cv2.inpaint(_to_bytes(pixels), hole.astype(np.uint8), options.radius, cv2.INPAINT_NS))


def _fill_patchmatch(pixels: FloatArray, hole: Hole, options: _Options) -> FloatArray:
    height, width = hole.shape
    if height * width <= MAX_AREA:
        return _patchmatch(pixels, hole, options)
    scale = math.sqrt(MAX_AREA / (height * width))
    small = Size(max(round(width * scale), 1), max(round(height * scale), 1))
    # the object to remove must not bleed into the pixels that stay
    clean = torch.from_numpy(_fill_blur(pixels, hole, options))[None]
    reduced = resize(clean, small)[0].numpy()
    holes = F.adaptive_max_pool2d(torch.from_numpy(hole).float()[None], (small.height, small.width))[0].numpy() > 0
    synthesised = torch.from_numpy(_patchmatch(reduced, holes, options))[None]
    return resize(synthesised, Size(width, height))[0].numpy()


def _patchmatch(pixels: FloatArray, hole: Hole, options: _Options) -> FloatArray:
    patch_match = _require_patchmatch()
    # pictures that a few patches would cover are mirrored outwards first
    frame = 4 * options.radius if min(hole.shape) < 4 * options.radius else 0
    # black marks the pixels that no patch reached, so none may be black from the start
    source = np.pad(np.maximum(_to_bytes(pixels), 1), ((frame, frame), (frame, frame), (0, 0)), mode="symmetric")
    with _patchmatch_lock:
        patch_match.set_random_seed(options.seed)
        found = patch_match.inpaint(source, np.pad(hole, frame, mode="symmetric"), patch_size=options.radius)
    found = found[frame : frame + hole.shape[0], frame : frame + hole.shape[1]]
    filled = _from_bytes(found)
    missed = (found == 0).all(axis=-1)
    if missed.any():
        # where so little is known that no patch fits into it
        filled[missed] = _fill_blur(pixels, hole, options)[missed]
    return filled


def _require_patchmatch() -> ModuleType:
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


def _to_bytes(pixels: FloatArray) -> npt.NDArray[np.uint8]:
    return np.rint(np.clip(pixels, 0, 1) * 255).astype(np.uint8)


def _from_bytes(pixels: npt.NDArray[np.uint8]) -> FloatArray:
    return pixels.astype(np.float32) / np.float32(255)


_FILLERS: dict[FillMethod, Callable[[FloatArray, Hole, _Options], FloatArray]] = {
    FillMethod.NEUTRAL: _fill_neutral,
    FillMethod.EDGE: _fill_edge,
    FillMethod.BLUR: _fill_blur,
    FillMethod.TELEA: _fill_telea,
    FillMethod.NAVIER_STOKES: _fill_navier_stokes,
    FillMethod.PATCHMATCH: _fill_patchmatch,
}
