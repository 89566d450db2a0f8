"""Masks: grown, softened, filled, put on the latent grid.

Masks are float32 ``[B, H, W]`` in 0..1, 1 = repaint. The functions are pure, treat each mask of a batch alone and
answer on the device the mask came on; the arithmetic is NumPy on the CPU, so a mask gives the same bits whatever device
it came from. Work is confined to the mask's bounding box. OpenCV is used where it imports, SciPy otherwise, with the
same result.

Grey is kept as grey: a grey mask is the stack of its level sets {mask >= t}, and growing or filling it does to every
level what it does to a binary mask (flat grey-scale morphology; Serra, Image Analysis and Mathematical Morphology,
1982).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .types import Box, InputError, check_range

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]
OnImage = Callable[[int, int], None]
"""Called with (done, total) after each image of a batch; may raise to stop."""

MAX_PIXELS = 1024
"""The largest growth and feather."""
HOLE_LEVELS = 32
"""Grey masks with more levels than this have their holes filled in so many even steps."""


@dataclass(frozen=True, kw_only=True)
class MaskOptions:
    """What ``prepare`` does, in this order; the defaults leave the mask alone."""

    threshold: float = 0.0
    """0..1: values from here up become 1 and the rest 0; 0 keeps grey as it is."""
    invert: bool = False
    fill_holes: bool = False
    grow: float = 0.0
    """Pixels, round; negative shrinks."""
    feather: float = 0.0
    """Pixels of soft edge outside the mask."""

    def __post_init__(self) -> None:
        check_range("threshold", self.threshold, 0, 1)
        check_range("grow", self.grow, -MAX_PIXELS, MAX_PIXELS)
        check_range("feather", self.feather, 0, MAX_PIXELS)


def prepare(mask: Tensor, options: MaskOptions, on_image: OnImage | None = None) -> Tensor:
    """The mask [B, H, W] after threshold, invert, fill_holes, grow and feather, in this order."""
    if options.threshold > 0:
        mask = threshold(mask, options.threshold)
    if options.invert:
        mask = invert(mask)

    def shape(array: FloatArray) -> FloatArray:
        if options.fill_holes:
            array = _fill_holes(array)
        return _feather(_grow(array, options.grow), options.feather)

    return _each(mask, shape, max(options.grow, 0) + options.feather, on_image)


def threshold(mask: Tensor, value: float) -> Tensor:
    """1 where the mask is at least ``value``, 0 elsewhere."""
    return (mask >= value).to(mask.dtype)


def invert(mask: Tensor) -> Tensor:
    """1 - mask."""
    return 1 - mask


def grow(mask: Tensor, pixels: float) -> Tensor:
    """Dilation by a disk: each pixel takes the largest value within ``pixels`` of it (centre to centre, Euclidean).

    Negative ``pixels`` shrink: the smallest value within reach. What lies outside the picture counts for neither, so
    a mask that touches the border stays on it.
    """
    check_range("grow", pixels, -MAX_PIXELS, MAX_PIXELS)
    return _each(mask, lambda array: _grow(array, pixels), margin=max(pixels, 0))


def feather(mask: Tensor, pixels: float) -> Tensor:
    """A soft edge outside the mask, which itself stays as it is.

    At distance d from a solid mask the value is (1 + cos(pi t)) / 2 with t = d / (pixels + 1): ``pixels`` pixels are
    grey, the next one is 0. Grey values fade as if they lay part-way down that slope. This is the dilation by a
    parabola (van den Boomgaard and Smeulders, The morphological structure of images, 1994) of the values u = 1 - t^2.
    """
    check_range("feather", pixels, 0, MAX_PIXELS)
    return _each(mask, lambda array: _feather(array, pixels), margin=pixels)


def fill_holes(mask: Tensor) -> Tensor:
    """Regions enclosed by the mask become part of it, at the level of what encloses them.

    A region is enclosed when no path of side-by-side pixels leads from it to the picture's border. Grey masks are
    filled level by level: exactly where they hold up to HOLE_LEVELS levels, else in that many even steps.
    """
    return _each(mask, _fill_holes, margin=0)


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


def expand_box(box: Box, margin: int, height: int, width: int) -> Box:
    """``box`` with ``margin`` pixels more on every side, as far as the picture reaches."""
    return Box(
        max(box.left - margin, 0),
        max(box.top - margin, 0),
        min(box.right + margin, width),
        min(box.bottom + margin, height),
    )


def opencv() -> ModuleType | None:
    """OpenCV where it is installed."""
    try:
        import cv2
    except ImportError:
        return None
    return cv2


def _each(
    mask: Tensor, operation: Callable[[FloatArray], FloatArray], margin: float, on_image: OnImage | None = None
) -> Tensor:
    """``operation`` on each mask's bounding box, with the ``margin`` it reaches and a pixel of what is not masked."""
    result = mask.clone()
    for index, (source, target) in enumerate(zip(mask, result, strict=True)):
        box = bounding_box(source)
        if box is not None:
            box = expand_box(box, math.floor(margin) + 1, *source.shape)
            array = source[box.rows, box.columns].detach().cpu().contiguous().numpy()
            target[box.rows, box.columns] = torch.from_numpy(operation(array)).to(target)
        if on_image is not None:
            on_image(index + 1, mask.shape[0])
    return result


def _grow(array: FloatArray, pixels: float) -> FloatArray:
    if pixels == 0:
        return array
    return _dilate(array, pixels) if pixels > 0 else -_dilate(-array, -pixels)


def _dilate(array: FloatArray, radius: float) -> FloatArray:
    low, high = array.min(), array.max()
    if low == high:
        return array
    solid = array == high
    if (solid | (array == low)).all():
        # two levels: a byte each is four times faster
        return np.where(_dilate_disk(solid.view(np.uint8), radius).view(bool), high, low)
    return _dilate_disk(array, radius)


def _dilate_disk(array: npt.NDArray, radius: float) -> npt.NDArray:
    """Flat dilation by the pixels within ``radius``, row by row of the disk; exact, in steps linear in it."""
    result = array.copy()
    row = array.copy()  # dilated by the horizontal span -reach..reach
    before = np.empty_like(row)
    reach = 0
    for dy, span in _disk_rows(radius):
        while reach < span:
            np.copyto(before, row)
            _raise_to_shifted(row, before, 1, axis=1)
            reach += 1
        if dy == 0:
            np.maximum(result, row, out=result)
        else:
            _raise_to_shifted(result, row, dy, axis=0)
    return result


def _disk_rows(radius: float) -> Iterator[tuple[int, int]]:
    """(dy, half-width) of the rows of a disk, from its rim to its middle."""
    squared = math.floor(radius * radius)
    for dy in range(math.isqrt(squared), -1, -1):
        yield dy, math.isqrt(squared - dy * dy)


def _raise_to_shifted(target: npt.NDArray, source: npt.NDArray, shift: int, axis: int, drop: float = 0) -> None:
    """target = max(target, source moved by +shift and by -shift along the axis, less ``drop``), in place."""
    if shift >= target.shape[axis]:
        return
    target, source = (target, source) if axis == 0 else (target.T, source.T)
    ahead, behind = source[:-shift], source[shift:]
    if drop:
        ahead, behind = ahead - np.float32(drop), behind - np.float32(drop)
    np.maximum(target[shift:], ahead, out=target[shift:])
    np.maximum(target[:-shift], behind, out=target[:-shift])


def _feather(array: FloatArray, pixels: float) -> FloatArray:
    """max(array, the slope that falls from it to 0 just beyond ``pixels``)."""
    if pixels == 0:
        return array
    reach = pixels + 1
    peak = array.max()
    solid = array == peak
    if (solid | (array == 0)).all():
        distance = _distance(solid)
        ramp = (distance > 0) & (distance < reach)
        # the squares are whole numbers, and both libraries are right to a thousandth of a pixel
        height = _height(peak) - np.rint(distance[ramp] ** 2) / np.float32(reach * reach)
        slope = _value(np.maximum(height, 0))
    else:
        heights = _dilate_parabola(_height(array), reach)
        ramp = (heights > 0) & (heights < 1)
        slope = _value(heights[ramp])
    faded = array.copy()
    faded[ramp] = np.maximum(array[ramp], slope)
    return faded


def _dilate_parabola(height: FloatArray, reach: float) -> FloatArray:
    """max over q of height(q) - |p - q|^2 / reach^2, one axis after the other."""
    for axis in (0, 1):
        source = height
        height = source.copy()
        for shift in range(1, math.ceil(reach)):
            _raise_to_shifted(height, source, shift, axis, drop=shift * shift / (reach * reach))
    return height


def _height(value: FloatArray | np.float32) -> FloatArray:
    """The place u = 1 - t^2 on the slope where it has this value."""
    t = np.arccos(np.clip(2 * value - 1, -1, 1)) / np.float32(math.pi)
    return (1 - t * t).astype(np.float32)


def _value(height: FloatArray) -> FloatArray:
    t = np.sqrt(1 - height)
    return (np.float32(0.5) * (1 + np.cos(np.float32(math.pi) * t))).astype(np.float32)


def _distance(solid: npt.NDArray[np.bool_]) -> FloatArray:
    """Distance of each pixel to the nearest solid one."""
    cv2 = opencv()
    if cv2 is not None:
        distance: FloatArray = cv2.distanceTransform((~solid).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
        return distance
    from scipy import ndimage

    return ndimage.distance_transform_edt(~solid).astype(np.float32)


def _fill_holes(array: FloatArray) -> FloatArray:
    peak = array.max()
    solid = array == peak
    if (solid | (array == 0)).all():
        return np.where(_enclosed(solid), peak, np.float32(0))
    levels = np.unique(array[array > 0])
    if len(levels) > HOLE_LEVELS:
        levels = levels[-1] * np.arange(1, HOLE_LEVELS + 1, dtype=np.float32) / HOLE_LEVELS
    filled = array.copy()
    for level in levels:
        filled[_enclosed(array >= level)] = level
    return np.maximum(filled, array)


def _enclosed(solid: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """``solid`` and the regions it encloses."""
    cv2 = opencv()
    if cv2 is None:
        from scipy import ndimage

        filled: npt.NDArray[np.bool_] = ndimage.binary_fill_holes(solid)
        return filled
    # a frame of background joins everything that is open to the border
    framed = np.pad(solid.view(np.uint8), 1)
    cv2.floodFill(framed, None, (0, 0), 2)
    return framed[1:-1, 1:-1] != 2
