"""The arithmetic of masks: NumPy kernels on one mask [H, W], float32 in 0..1.

What lies outside the array counts for nothing: neither does it feed growth nor does it eat into the mask. Large masks
are worked on in tiles that fit the processor's cache, and tiles in which nothing can change are passed over. Results
depend neither on the tiles nor on OpenCV, which is used where it imports and is faster; SciPy otherwise.

Grey is kept as grey: a grey mask is the stack of its level sets {mask >= t}, and growing or filling it does to every
level what it does to a binary mask (flat grey-scale morphology; Serra, Image Analysis and Mathematical Morphology,
1982).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from enum import Enum
from types import ModuleType
from typing import TypeVar

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]
BoolArray = npt.NDArray[np.bool_]
Array = TypeVar("Array", bound=npt.NDArray)

TILE = 256
"""Side of a tile; with what it sees around it, a tile of float32 fits the second-level cache."""
NEAR = 64
"""Distances up to here are found by shifting, larger ones by a distance transform: which is faster, not which is right,
since both are exact."""
HOLE_LEVELS = 32
"""Even steps in which holes are filled in masks with more levels than this and more grey than MAX_NODES."""
MAX_NODES = 2**20
"""Grey pixels up to which holes are filled exactly, however many levels there are."""


class Shape(str, Enum):
    """What "within so many pixels" means."""

    ROUND = "round"
    """A disk: Euclidean distance, centre to centre."""
    SQUARE = "square"
    """A square of 2 * pixels + 1: the larger of the horizontal and the vertical distance."""


def opencv() -> ModuleType | None:
    """OpenCV where it is installed."""
    try:
        import cv2
    except ImportError:
        return None
    return cv2


# --- growing and shrinking


def grow(array: FloatArray, pixels: float, shape: Shape = Shape.ROUND) -> FloatArray:
    """Flat dilation: each pixel takes the largest value within ``pixels``; negative: erosion, the smallest."""
    if pixels == 0:
        return array
    if pixels < 0:
        return -grow(-array, -pixels, shape)
    if shape is Shape.SQUARE:
        return _dilate_square(array, math.floor(pixels))
    return in_tiles(array, math.floor(pixels), lambda tile: _dilate_disk(tile, pixels))


def closing(array: FloatArray, pixels: float, shape: Shape = Shape.ROUND) -> FloatArray:
    """Grow, then shrink: gaps and bays up to twice ``pixels`` wide fill up, and the rest stays."""
    return grow(grow(array, pixels, shape), -pixels, shape)


def opening(array: FloatArray, pixels: float, shape: Shape = Shape.ROUND) -> FloatArray:
    """Shrink, then grow: specks and strokes up to twice ``pixels`` wide vanish, and the rest stays."""
    return grow(grow(array, -pixels, shape), pixels, shape)


def _dilate_disk(array: FloatArray, radius: float) -> FloatArray:
    low, high = array.min(), array.max()
    solid = array == high
    if not (solid | (array == low)).all():
        return _dilate_rows(array, radius)
    squared = math.floor(radius * radius)
    return np.where(squared_distance(solid, squared + 1) <= squared, high, low)


def _dilate_rows(array: Array, radius: float) -> Array:
    """Dilation by a disk, one row of the disk after the other; in steps linear in the radius."""
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


def _dilate_square(array: Array, radius: int) -> Array:
    """One axis after the other, the span doubled with each step."""
    result = array.copy()
    for axis in (0, 1):
        reach, furthest = 0, min(radius, array.shape[axis] - 1)
        while reach < furthest:
            shift = min(reach + 1, furthest - reach)
            _raise_to_shifted(result, result.copy(), shift, axis)
            reach += shift
    return result


def _raise_to_shifted(target: npt.NDArray, source: npt.NDArray, shift: int, axis: int) -> None:
    """target = max(target, source moved by +shift and by -shift along the axis), in place."""
    if shift >= target.shape[axis]:
        return
    target, source = (target, source) if axis == 0 else (target.T, source.T)
    np.maximum(target[shift:], source[:-shift], out=target[shift:])
    np.maximum(target[:-shift], source[shift:], out=target[:-shift])


# --- soft edges


def feather_outward(array: FloatArray, pixels: float) -> FloatArray:
    """max(array, a slope that falls from it and reaches 0 at ``pixels`` + 1).

    At distance d from a solid mask the value is (1 + cos(pi t)) / 2 with t = d / (pixels + 1). Grey values fade as if
    they lay part-way down that slope: the values u = 1 - t^2 are dilated by the parabola (van den Boomgaard and
    Smeulders, The morphological structure of images, 1994).
    """
    if pixels == 0:
        return array
    reach = pixels + 1
    return in_tiles(array, math.ceil(reach), lambda tile: _feather_tile(tile, reach))


def feather_inward(array: FloatArray, pixels: float) -> FloatArray:
    """The same slope laid inside: what is not masked, feathered outward. The mask's rim of ``pixels`` turns grey."""
    if pixels == 0:
        return array
    kept = 1 - array
    faded = feather_outward(kept, pixels)
    return np.where(faded > kept, 1 - faded, array)


def feather_centred(array: FloatArray, pixels: float) -> FloatArray:
    """The slope laid across the mask's edge, half inside and half outside, 1/2 on the edge itself.

    At the signed distance s from the edge of a solid mask the value is (1 - sin(pi s / (pixels + 1))) / 2; the edge
    runs between the pixels, so the first ones have s = -1/2 and +1/2. Where a grey mask is even it stays as it is. A
    stroke narrower than the slope grows faint, but does not vanish.
    """
    if pixels == 0:
        return array
    reach = pixels / 2 + 1
    return in_tiles(array, math.ceil(reach), lambda tile: _centred_tile(tile, pixels))


def _feather_tile(array: FloatArray, reach: float) -> FloatArray:
    peak = array.max()
    solid = array == peak
    if (solid | (array == 0)).all():
        limit = math.ceil(reach * reach)
        squares = np.arange(limit + 1, dtype=np.float32) / np.float32(reach * reach)
        slope = _value(np.maximum(_height(peak) - squares, 0))
        slope[0] = peak
        return slope[squared_distance(solid, limit)]
    heights = _dilate_parabola(_height(array), reach)
    ramp = (heights > 0) & (heights < 1)
    faded = array.copy()
    faded[ramp] = np.maximum(array[ramp], _value(heights[ramp]))
    return faded


def _height(value: FloatArray | np.float32) -> FloatArray:
    """The place u = 1 - t^2 on the slope where it has this value."""
    t = np.arccos(np.clip(2 * value - 1, -1, 1)) / np.float32(math.pi)
    return (1 - t * t).astype(np.float32)


def _value(height: FloatArray) -> FloatArray:
    t = np.sqrt(1 - height)
    return (np.float32(0.5) * (1 + np.cos(np.float32(math.pi) * t))).astype(np.float32)


def _centred_tile(array: FloatArray, pixels: float) -> FloatArray:
    """By two parabolic dilations, of the mask and of what it leaves out, each from a height of its own.

    With D and K their values, R (sqrt(1 - D) - sqrt(1 - K)) is the signed distance between pixel centres: of a solid
    mask's two terms one is 0 everywhere.
    """
    reach = pixels / 2 + 1
    solid = array == 1
    if (solid | (array == 0)).all():
        limit = math.ceil(reach * reach)
        distance = np.sqrt(np.arange(limit + 1, dtype=np.float32))
        away, inside = (distance[squared_distance(part, limit)] for part in (solid, ~solid))
        return _centred_value(away - inside, pixels)
    away = np.sqrt(1 - np.maximum(_dilate_parabola(_centred_height(array, pixels), reach), 0))
    inside = np.sqrt(1 - np.maximum(_dilate_parabola(_centred_height(1 - array, pixels), reach), 0))
    return _centred_value(np.float32(reach) * (away - inside), pixels)


def _centred_value(distance: FloatArray, pixels: float) -> FloatArray:
    """The slope at a signed distance between pixel centres, half a pixel of which lies on either side of the edge."""
    from_edge = distance - np.clip(distance, -1, 1) / 2
    quarter_turns = np.clip(from_edge / np.float32(pixels + 1), -0.5, 0.5)
    return (np.float32(0.5) * (1 - np.sin(np.float32(math.pi) * quarter_turns))).astype(np.float32)


def _centred_height(value: FloatArray, pixels: float) -> FloatArray:
    """The height y^2 from which an even grey comes out as it went in.

    It solves sqrt(1 - y^2) - y = x, where x is the signed distance over R at which the slope has this value.
    """
    from_edge = np.float32(-(pixels + 1) / math.pi) * np.arcsin(np.clip(2 * value - 1, -1, 1))
    distance = from_edge + np.clip(from_edge, -0.5, 0.5)
    x = np.clip(distance / np.float32(pixels / 2 + 1), -1, 1)
    y = (np.sqrt(2 - x * x) - x) / 2
    return (y * y).astype(np.float32)


def _dilate_parabola(height: FloatArray, reach: float) -> FloatArray:
    """max over q of height(q) - |p - q|^2 / reach^2, one axis after the other."""
    for _ in ("columns", "rows"):
        # rows of memory shift faster than columns do, so the second axis is turned into the first
        source = height
        height = source.copy()
        lowered = np.empty_like(source)
        for shift in range(1, math.ceil(reach)):
            np.subtract(source, np.float32(shift * shift / (reach * reach)), out=lowered)
            _raise_to_shifted(height, lowered, shift, axis=0)
        height = np.ascontiguousarray(height.T)
    return height


# --- distance


def squared_distance(solid: BoolArray, limit: int) -> npt.NDArray:
    """Squared distance of each pixel to the nearest solid one, in whole numbers; ``limit`` where it is that or more."""
    reach = math.isqrt(max(limit - 1, 0))
    if reach > NEAR:
        return _squared_distance_far(solid, limit)
    # after Felzenszwalb and Huttenlocher, Distance transforms of sampled functions, 2012: down the columns, then along
    # the rows the envelope of parabolas; upside down, as what is left of the limit, in the smallest type that holds it
    dtype = np.min_scalar_type(limit)
    column = np.maximum(limit - np.arange(reach + 1, -1, -1) ** 2, 0).astype(dtype)
    # rows of memory shift faster than columns do
    source = np.ascontiguousarray(column.take(_nearness_in_column(solid, reach)).T)
    left = source.copy()
    for shift in range(1, reach + 1):
        _raise_to_shifted(left, _less(source, shift * shift), shift, axis=0)
    return (limit - left).T


def _nearness_in_column(solid: BoolArray, reach: int) -> ByteArray:
    """``reach`` + 1 on solid pixels, less 1 for each pixel up or down the column, and 0 beyond; in doubling steps."""
    near: ByteArray = solid * np.uint8(reach + 1)
    step = 1
    while step <= reach:
        _raise_to_shifted(near, _less(near, step), step, axis=0)
        step *= 2
    return near


def _less(array: Array, drop: int) -> Array:
    """max(array - drop, 0) of whole numbers without a sign."""
    # an array, because NumPy's maximum with a scalar is ten times slower
    drops = np.full_like(array, drop)
    np.subtract(np.maximum(array, drops), drops, out=drops)
    return drops


def _squared_distance_far(solid: BoolArray, limit: int) -> npt.NDArray:
    if not solid.any():
        return np.full(solid.shape, limit)
    cv2 = opencv()
    if cv2 is not None:
        distance: FloatArray = cv2.distanceTransform((~solid).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    else:
        from scipy import ndimage

        distance = ndimage.distance_transform_edt(~solid)
    # both are right to a thousandth of a pixel
    return np.minimum(np.rint(distance.astype(np.float64) ** 2), limit).astype(np.int64)


# --- holes and islands


def fill_holes(array: FloatArray) -> FloatArray:
    """Each pixel takes the lowest level that has to be crossed on the way from it to the border, side by side.

    Solid masks: what they enclose. Grey masks with more than HOLE_LEVELS levels and more than MAX_NODES grey pixels
    are filled in HOLE_LEVELS even steps.
    """
    peak = array.max()
    solid = array == peak
    if (solid | (array == 0)).all():
        return np.where(_enclosed(solid), peak, np.float32(0))
    inside = _enclosed(array > 0)
    grey = inside & ~solid
    if np.count_nonzero(grey & (array > 0)) <= MAX_NODES:
        filled = array.copy()
        filled[grey] = _escape_levels(array, inside, grey)
        return filled
    return _fill_by_levels(array)


def _fill_by_levels(array: FloatArray) -> FloatArray:
    levels = np.unique(array[array > 0])
    if len(levels) > HOLE_LEVELS:
        levels = levels[-1] * np.arange(1, HOLE_LEVELS + 1, dtype=np.float32) / HOLE_LEVELS
    filled = array.copy()
    for level in levels:
        filled[_enclosed(array >= level)] = level
    return np.maximum(filled, array)


def _enclosed(solid: BoolArray) -> BoolArray:
    """``solid`` and the regions it encloses."""
    # a frame of background joins everything that is open to the border
    framed = np.pad(solid.view(np.uint8), 1)
    cv2 = opencv()
    if cv2 is not None:
        cv2.floodFill(framed, None, (0, 0), 2)
        return framed[1:-1, 1:-1] != 2
    from scipy import ndimage

    regions, _ = ndimage.label(framed == 0)
    return regions[1:-1, 1:-1] != regions[0, 0]


def _escape_levels(array: FloatArray, inside: BoolArray, grey: BoolArray) -> FloatArray:
    """The filled values of the ``grey`` pixels; outside of ``inside`` the mask is 0 and open to the border.

    The way out with the lowest crossing runs along a minimum spanning tree (Hu, The maximum capacity route problem,
    1961), here of the grey pixels, the holes between them and the outside; the peak is never crossed.
    """
    from scipy import ndimage
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import breadth_first_order, minimum_spanning_tree

    # nodes: 0 the outside, then the holes, then each pixel of the grey between them
    holes, count = ndimage.label(grey & (array == 0))
    between = grey & (array > 0)
    values = np.concatenate([np.zeros(1 + count, np.float32), array[between]])
    pixels = np.arange(1 + count, len(values), dtype=np.int32)
    node = np.where(inside & ~grey, -1, holes).astype(np.int32)
    node[between] = pixels
    framed, places = np.pad(node, 1), np.flatnonzero(np.pad(between, 1))
    width = framed.shape[1]
    neighbours = np.sort(np.stack([framed.ravel()[places + step] for step in (-width, -1, 1, width)], axis=1), axis=1)
    # each pair once: with an earlier node, and not twice with the same
    paired = (neighbours >= 0) & (neighbours < pixels[:, None])
    paired[:, 1:] &= neighbours[:, 1:] != neighbours[:, :-1]
    pairs = np.concatenate([np.zeros(1 + count, np.int64), paired.sum(axis=1)])
    targets = neighbours[paired]
    crossings = np.maximum(values[targets], np.repeat(values, pairs))
    graph = csr_array((crossings, targets, np.concatenate([[0], np.cumsum(pairs)])), shape=(len(values), len(values)))

    reached, before = breadth_first_order(minimum_spanning_tree(graph), 0, directed=False)
    highest = np.full(len(values), array.max())
    highest[reached] = values[reached]
    before = np.where(before < 0, np.arange(len(values)), before)
    # the highest crossing of the way so far, each round twice as far
    while before.any() and not np.array_equal(before, before[before]):
        highest = np.maximum(highest, highest[before])
        before = before[before]
    highest = np.maximum(highest, highest[before])
    return highest[node[grey]]


def islands(array: FloatArray) -> tuple[npt.NDArray[np.int32], int]:
    """The parts above 0 that touch each other, also by a corner, numbered from 1; and how many they are."""
    from scipy import ndimage

    labels, count = ndimage.label(array > 0, structure=np.ones((3, 3)))
    return labels, count


def drop_islands(array: FloatArray, smallest: float = 0, *, keep_largest: bool = False) -> FloatArray:
    """Without the islands of fewer than ``smallest`` pixels, and without all but the largest (several that are equally
    large stay)."""
    labels, count = islands(array)
    if count == 0:
        return array
    pixels = np.bincount(labels.ravel())[1:]
    kept = pixels >= max(smallest, pixels.max() if keep_largest else 0)
    return np.where(np.concatenate([[True], kept])[labels], array, np.float32(0))


# --- tiles


def in_tiles(array: FloatArray, reach: int, operation: Callable[[FloatArray], FloatArray]) -> FloatArray:
    """``operation``, which sees ``reach`` pixels far and leaves even ground alone, on one tile after the other."""
    result = array.copy()
    height, width = array.shape
    side = max(TILE, 4 * reach)
    for top in range(0, height, side):
        for left in range(0, width, side):
            rows, columns = slice(top, top + side), slice(left, left + side)
            above, before = max(top - reach, 0), max(left - reach, 0)
            seen = array[above : top + side + reach, before : left + side + reach]
            if seen.min() != seen.max():
                seen = np.ascontiguousarray(seen)
                done = operation(seen)[top - above :, left - before :]
                result[rows, columns] = done[:side, :side]
    return result
