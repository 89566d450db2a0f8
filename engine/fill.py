"""Filling a hole: from plain grey to content-aware synthesis and networks made for it.

A fill either is the result (removing an object) or gives an inpainting model something sensible to start from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .blend import paste
from .images import pair
from .marching import navier_stokes, telea
from .masks import FloatArray, OnImage, bounding_box, expand_box, opencv
from .patchmatch import MAX_AREA, from_bytes, patchmatch, to_bytes
from .pull_push import Hole, pull_push
from .tiles import Window, fill_tiled
from .types import MAX_SEED, Box, InputError, check_range

MAX_RADIUS = 64
CONTEXT = 1.0
"""Surroundings that PatchMatch and networks see, on each side, as a share of the hole's longer side."""
MIN_CONTEXT = 64
"""The same in pixels, at least."""
LARGE_CONTEXT = 0.25
"""The same share for holes so large that they are first filled at a lower resolution."""
RING = 24
"""Pixels around the hole whose grain the noise takes on."""
GRAIN_SIGMA = 4.0
"""Pixels: what is finer than this there is grain."""
MAX_REFLECTIONS = 16
"""How often a pixel that is mirrored into the hole is mirrored again, before it takes the nearest one."""

OPENCV_LEAST_SIDE = 2
"""Pixels; in a single row or column OpenCV's fills read beyond the picture."""

OnProgress = Callable[[float, int], None]
"""Called often with (images done, also in parts; images in all); may raise to stop."""


class FillMethod(str, Enum):
    """How a hole is filled."""

    NEUTRAL = "neutral"
    """Mid grey, what inpainting models are trained to see under a mask."""
    EDGE = "edge"
    """Each pixel repeats the nearest one that is kept."""
    MIRROR = "mirror"
    """The surroundings reflected at the hole's rim; outside a picture this is mirror padding."""
    BLUR = "blur"
    """The colours around the hole flow into it smoothly."""
    NOISE = "noise"
    """The same with noise as strong and of the same colours as the grain of the surroundings."""
    TELEA = "telea"
    """Weighted means from the rim inwards (Telea 2004)."""
    NAVIER_STOKES = "navier-stokes"
    """Lines of equal brightness continue into the hole (Bertalmio et al. 2001)."""
    PATCHMATCH = "patchmatch"
    """Texture and structure copied from elsewhere in the picture (Barnes et al. 2009); pypatchmatch."""
    LAMA = "lama"
    """The network LaMa (Suvorov et al. 2022), which continues patterns and large structures; spandrel."""
    MAT = "mat"
    """The network MAT (Li et al. 2022), which invents what fits into large holes; spandrel_extra_arches."""


NETWORKS = (FillMethod.LAMA, FillMethod.MAT)


class FillNetwork(Protocol):
    """What fills holes for the methods in NETWORKS; ``models.fill_model`` loads it from a file."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def architecture(self) -> str:
        """The method's name, in any case."""
        ...

    @property
    def window(self) -> Window: ...

    def fill(self, pixels: FloatArray, hole: Hole, seed: int) -> FloatArray:
        """A picture [H, W, 3] of a size the window takes, filled where the hole [H, W] is."""
        ...


@dataclass(frozen=True)
class _Options:
    radius: int
    seed: int
    network: FillNetwork | None
    check: Callable[[float], None]
    """Called often with the share of the region that is done."""


DEFAULT_RADIUS = {FillMethod.TELEA: 5, FillMethod.NAVIER_STOKES: 5, FillMethod.PATCHMATCH: 3}
"""Pixels looked at around each pixel (Telea, Navier-Stokes); half the side of the compared patches (PatchMatch)."""


def fill(
    image: Tensor,
    mask: Tensor,
    method: FillMethod = FillMethod.PATCHMATCH,
    *,
    radius: int | None = None,
    seed: int = 0,
    network: FillNetwork | None = None,
    on_image: OnImage | None = None,
    on_progress: OnProgress | None = None,
) -> Tensor:
    """The image [B, H, W, 3 or 4] with the hole of the mask [B, H, W] filled.

    The hole is every pixel above 0; grey values mix the fill with the original in their proportion, and where the mask
    is 0 the image stays as it is, bit for bit. An alpha channel becomes opaque where something was filled. ``radius``
    (1..64) means what DEFAULT_RADIUS says; other methods have none. ``seed`` decides what PatchMatch, MAT and the
    noise choose, the same for every image of a batch. ``network`` is needed by the methods in NETWORKS.

    PatchMatch computes the hole at 8 bits, and so do Telea and Navier-Stokes where OpenCV does them; where it is not
    installed ``marching`` does, and the hole differs slightly. What is too large for PatchMatch or a network is filled
    at a lower resolution, then in detail, or in tiles: see ``detail`` and ``tiles``.

    Raises InputError when the mask leaves nothing to fill from and when the network is missing or another one, and
    MissingPackageError.
    """
    method = FillMethod(method)
    _check_network(method, network)
    if radius is None:
        radius = DEFAULT_RADIUS.get(method, 1)
    check_range("radius", radius, 1, MAX_RADIUS)
    check_range("seed", seed, 0, MAX_SEED)
    images, masks = pair(image, mask)
    result = images.clone()
    for index, (original, alpha) in enumerate(zip(images, masks, strict=True)):
        hole = (alpha > 0).cpu().numpy()
        if method is not FillMethod.NEUTRAL and hole.all():
            raise InputError(
                f"The mask of image {index + 1} covers the whole picture, so there is nothing to fill it from; make the"
                ' mask smaller or use the method "neutral".'
            )
        regions = _regions(hole, method, radius, network)
        for done, box in enumerate(regions):

            def check(share: float, done: float = index + done / len(regions), part: float = 1 / len(regions)) -> None:
                if on_progress is not None:
                    on_progress(done + share * part, len(images))

            check(0)
            view = (slice(index, index + 1), box.rows, box.columns)
            pixels = original[box.rows, box.columns, :3].detach().cpu().numpy()
            options = _Options(radius, seed, network, check)
            filled = _FILLERS[method](pixels, hole[box.rows, box.columns], options)
            result[view] = paste(images[view], torch.from_numpy(filled)[None].to(images), masks[view])
        if on_progress is not None:
            on_progress(index + 1, len(images))
        if on_image is not None:
            on_image(index + 1, len(images))
    return result


def _check_network(method: FillMethod, network: FillNetwork | None) -> None:
    if method not in NETWORKS:
        return
    if network is None:
        raise InputError(
            f'The fill method "{method.value}" needs its network: use Fill (Mend) with Load Fill Model (Mend) connected'
            " to its fill_model, or `mend fill --model FILE`, or choose another method."
        )
    if network.architecture.lower() != method.value:
        raise InputError(
            f'The fill method is "{method.value}" but {network.name} is a {network.architecture} model; choose the'
            f' method "{network.architecture.lower()}", or another model.'
        )


def _regions(hole: Hole, method: FillMethod, radius: int, network: FillNetwork | None) -> list[Box]:
    """The parts of the picture to work on; they hold the whole hole and what its filling depends on."""
    height, width = hole.shape
    if method is FillMethod.PATCHMATCH:
        return _separate_regions(hole)
    if method in NETWORKS:
        assert network is not None
        return _separate_regions(hole, least=network.window.tile)
    box = bounding_box(torch.from_numpy(hole))
    if box is None:
        return []
    margins = {
        FillMethod.NEUTRAL: 0,
        FillMethod.EDGE: 1,
        FillMethod.MIRROR: max(box.size) + 1,
        FillMethod.BLUR: 32,
        FillMethod.NOISE: RING,
    }
    return [expand_box(box, margins.get(method, 2 * radius + 2), height, width)]


def _separate_regions(hole: Hole, least: int = 0) -> list[Box]:
    """Boxes around the parts of the hole with their context, of at least so many pixels a side where the picture has
    them; those that meet are joined."""
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
        boxes = found if boxes else [_with_context(box, least, height, width) for box in found]
        covered = np.zeros_like(hole)
        for box in boxes:
            covered[box.rows, box.columns] = True


def _with_context(box: Box, least: int, height: int, width: int) -> Box:
    margin = max(_context(box), -(-(least - min(box.size)) // 2))
    return expand_box(box, margin, height, width)


def _context(box: Box) -> int:
    """Pixels of surroundings on each side, fewer for holes so large that they would exceed MAX_AREA."""
    longer = max(box.size)
    # (width + 2 m) (height + 2 m) = MAX_AREA
    half_sum = (box.width + box.height) / 2
    fitting = (math.sqrt(max(half_sum**2 - box.width * box.height + MAX_AREA, 0)) - half_sum) / 2
    return max(MIN_CONTEXT, round(LARGE_CONTEXT * longer), min(round(CONTEXT * longer), math.floor(fitting)))


def _fill_neutral(pixels: FloatArray, hole: Hole, options: _Options) -> FloatArray:
    return np.full_like(pixels, 0.5)


def _fill_edge(pixels: FloatArray, hole: Hole, options: _Options) -> FloatArray:
    rows, columns = _nearest_kept(hole)
    return pixels[rows, columns]


def _fill_mirror(pixels: FloatArray, hole: Hole, options: _Options) -> FloatArray:
    """Each pixel p takes the one at r + (r - p), where r is the nearest pixel that is kept.

    What is mirrored out of the picture is folded back at its border, and what is mirrored into the hole is mirrored
    again.
    """
    nearest = _nearest_kept(hole)
    places = np.nonzero(hole)
    sources = np.stack(places)
    inside = np.arange(sources.shape[1])
    for _ in range(MAX_REFLECTIONS):
        options.check(0)
        at = sources[:, inside]
        mirrored = 2 * nearest[:, at[0], at[1]] - at
        sources[:, inside] = [_folded(axis, length) for axis, length in zip(mirrored, hole.shape, strict=True)]
        inside = inside[hole[tuple(sources[:, inside])]]
    # between two holes that mirror each other
    sources[:, inside] = nearest[:, places[0][inside], places[1][inside]]
    filled = pixels.copy()
    filled[places] = pixels[tuple(sources)]
    return filled


def _folded(places: npt.NDArray[np.intp], length: int) -> npt.NDArray[np.intp]:
    """Indices beyond 0..length - 1 reflected at these."""
    if length == 1:
        return np.zeros_like(places)
    wrapped = np.abs(places) % (2 * (length - 1))
    return np.minimum(wrapped, 2 * (length - 1) - wrapped)


def _nearest_kept(hole: Hole) -> npt.NDArray[np.intp]:
    """For each pixel the row and column of the nearest one that is kept, [2, H, W]."""
    from scipy import ndimage

    nearest = np.indices(hole.shape, np.intp)
    box = bounding_box(torch.from_numpy(hole))
    assert box is not None
    # a pixel next to the hole is always nearer than what is beyond it
    box = expand_box(box, 1, *hole.shape)
    found = ndimage.distance_transform_edt(hole[box.rows, box.columns], return_distances=False, return_indices=True)
    nearest[:, box.rows, box.columns] = found + np.array([box.top, box.left])[:, None, None]
    return nearest


def _fill_blur(pixels: FloatArray, hole: Hole, options: _Options) -> FloatArray:
    return pull_push(pixels, hole)


def _fill_noise(pixels: FloatArray, hole: Hole, options: _Options) -> FloatArray:
    """The smooth fill plus normal noise with the covariance of the grain in a ring around the hole.

    The grain is what differs from the local mean. No colour goes beyond those of the ring.
    """
    from scipy import ndimage

    def blur(plane: FloatArray) -> FloatArray:
        blurred: FloatArray = ndimage.gaussian_filter(plane, GRAIN_SIGMA, mode="nearest")
        return blurred

    ring = ~hole & (ndimage.maximum_filter(hole.view(np.uint8), 2 * RING + 1) > 0)
    known = (~hole).astype(np.float32)
    visible = np.where(hole[..., None], np.float32(0), pixels)
    share = blur(known)[ring]
    local = np.stack([blur(visible[..., channel])[ring] / share for channel in range(3)], axis=-1)
    grain = (pixels[ring] - local).astype(np.float64)
    variances, axes = np.linalg.eigh(grain.T @ grain / len(grain))
    spread = axes * np.sqrt(np.maximum(variances, 0))
    draws = np.random.default_rng(options.seed).standard_normal((int(hole.sum()), 3)) @ spread.T
    filled = pull_push(pixels, hole)
    noisy = filled[hole] + draws.astype(np.float32)
    filled[hole] = np.clip(noisy, pixels[ring].min(axis=0), pixels[ring].max(axis=0))
    return filled


def _fill_telea(pixels: FloatArray, hole: Hole, options: _Options) -> FloatArray:
    cv2 = opencv()
    if cv2 is None or min(hole.shape) < OPENCV_LEAST_SIDE:
        return telea(pixels, hole, options.radius)
    source = to_bytes(_covered(pixels, hole))
    return from_bytes(cv2.inpaint(source, hole.astype(np.uint8), options.radius, cv2.INPAINT_TELEA))


def _fill_navier_stokes(pixels: FloatArray, hole: Hole, options: _Options) -> FloatArray:
    cv2 = opencv()
    if cv2 is None or min(hole.shape) < OPENCV_LEAST_SIDE:
        return navier_stokes(pixels, hole, options.radius)
    source = to_bytes(_covered(pixels, hole))
    return from_bytes(cv2.inpaint(source, hole.astype(np.uint8), options.radius, cv2.INPAINT_NS))


def _covered(pixels: FloatArray, hole: Hole) -> FloatArray:
    """With each pixel's nearest kept one under a hole that meets the border: there OpenCV looks at what is under it."""
    if not (hole[[0, -1]].any() or hole[:, [0, -1]].any()):
        return pixels
    rows, columns = _nearest_kept(hole)
    return pixels[rows, columns]


def _fill_patchmatch(pixels: FloatArray, hole: Hole, options: _Options) -> FloatArray:
    return patchmatch(pixels, hole, options.radius, options.seed, lambda: options.check(0))


def _fill_network(pixels: FloatArray, hole: Hole, options: _Options) -> FloatArray:
    network = options.network
    assert network is not None

    def filler(picture: FloatArray, wanted: Hole) -> FloatArray:
        return network.fill(picture, wanted, options.seed)

    return fill_tiled(pixels, hole, filler, network.window, seed=options.seed, check=options.check)


_FILLERS: dict[FillMethod, Callable[[FloatArray, Hole, _Options], FloatArray]] = {
    FillMethod.NEUTRAL: _fill_neutral,
    FillMethod.EDGE: _fill_edge,
    FillMethod.MIRROR: _fill_mirror,
    FillMethod.BLUR: _fill_blur,
    FillMethod.NOISE: _fill_noise,
    FillMethod.TELEA: _fill_telea,
    FillMethod.NAVIER_STOKES: _fill_navier_stokes,
    FillMethod.PATCHMATCH: _fill_patchmatch,
    FillMethod.LAMA: _fill_network,
    FillMethod.MAT: _fill_network,
}
