"""Several places in one picture, and one place in many frames.

``regions`` takes a mask apart into the places that are worth a crop of their own; ``stable_boxes`` keeps the crop of a
video from jumping with its mask.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .crop import CropOptions, CropPlan, plan, union, with_context
from .images import size_of
from .masks import bounding_box, expand_box
from .types import Box, InputError, Size, check_range

MAX_REGIONS = 256
"""More are specks, not regions."""
MAX_SMOOTHING = 1000.0
AT_REST = 0.75
"""Pixels by which a smooth path may leave a box of whole pixels before that follows; half a pixel would flutter."""


class Video(str, Enum):
    """How the crops of a batch move together."""

    OFF = "off"
    """Each picture has a crop of its own."""
    UNION = "union"
    """One box holds the masks of all frames and stands still."""
    SMOOTHED = "smoothed"
    """A box of one size follows the mask on a smooth path."""


@dataclass(frozen=True, eq=False)
class Region:
    """One place of a picture that is repainted as a whole."""

    box: Box
    """The bounding box of its part of the mask."""
    where: Tensor
    """Bool [box height, box width]: the pixels that belong to it."""
    plan: CropPlan

    def own(self, masks: Tensor) -> Tensor:
        """Masks [B, H, W] with everything outside the region set to 0."""
        alone = torch.zeros_like(masks)
        rows, columns = self.box.rows, self.box.columns
        alone[:, rows, columns] = masks[:, rows, columns] * self.where.to(masks)
        return alone


def regions(masks: Tensor, options: CropOptions, context: Box | None = None) -> list[Region]:
    """The separate places of masks [B, H, W], taken together, in reading order; [] for empty masks.

    Pixels above 0 that touch, diagonally too, belong together, and so do parts whose boxes with context (factor and
    pixels; not the minimum size) meet. Each pixel above 0 belongs to one region. ``context`` is shown in all of them.
    Raises InputError for more than MAX_REGIONS.
    """
    covered = masks.amax(dim=0) > 0
    hull = bounding_box(covered)
    if hull is None:
        return []
    from scipy import ndimage

    labels, _ = ndimage.label(covered[hull.rows, hull.columns].cpu().numpy(), structure=np.ones((3, 3)))
    parts = [
        Box(hull.left + columns.start, hull.top + rows.start, hull.left + columns.stop, hull.top + rows.stop)
        for rows, columns in ndimage.find_objects(labels)
    ]
    picture = size_of(masks)
    groups = _join(parts, picture, options)
    if len(groups) > MAX_REGIONS:
        raise InputError(
            f"The mask has {len(groups)} separate regions, and at most {MAX_REGIONS} are cropped one by one; drop its"
            " small islands first, raise the context so that neighbours join, or crop them together."
        )
    region_of = np.zeros(len(parts) + 1, np.int32)
    for number, group in enumerate(groups):
        region_of[np.array(group) + 1] = number + 1
    numbers = region_of[labels]
    found = []
    for number, group in enumerate(groups):
        box = _hull([parts[part] for part in group])
        inside = numbers[box.top - hull.top : box.bottom - hull.top, box.left - hull.left : box.right - hull.left]
        where = torch.from_numpy(inside == number + 1)
        found.append(Region(box, where.to(masks.device), plan(box, picture, options, context)))
    return sorted(found, key=lambda region: (region.box.top, region.box.left))


def _join(parts: Sequence[Box], picture: Size, options: CropOptions) -> list[list[int]]:
    """Indices of the parts whose boxes with context meet, and meet again once they are joined."""
    from scipy import ndimage

    groups = [[index] for index in range(len(parts))]
    while True:
        covered = np.zeros((picture.height, picture.width), bool)
        boxes = [_hull([parts[part] for part in group]) for group in groups]
        for box in boxes:
            seen = expand_box(with_context(box, options), 0, picture.height, picture.width)
            covered[seen.rows, seen.columns] = True
        labels, count = ndimage.label(covered, structure=np.ones((3, 3)))
        if count == len(groups):
            return groups
        joined: dict[int, list[int]] = defaultdict(list)
        for box, group in zip(boxes, groups, strict=True):
            joined[int(labels[box.top, box.left])] += group
        groups = list(joined.values())


def _hull(boxes: Sequence[Box]) -> Box:
    hull = boxes[0]
    for box in boxes[1:]:
        hull = union(hull, box)
    return hull


def stable_boxes(boxes: Sequence[Box | None], mode: Video, smoothing: float = 8.0) -> list[Box]:
    """Boxes of one size for the frames of a video, each holding the box its frame has; None = nothing in that frame.

    UNION gives every frame the smallest box that holds them all. SMOOTHED moves a box of constant size along the
    centres, filtered by a Gaussian of ``smoothing`` frames (0..1000), which is symmetric and so neither lags nor leads;
    the ends repeat, and frames without a box lie on the line between their neighbours. The size is what the frame
    farthest from its place on the path needs. OFF leaves the boxes as they are.

    Raises InputError when no frame has a box.
    """
    check_range("smoothing", smoothing, 0, MAX_SMOOTHING)
    known = [box for box in boxes if box is not None]
    if not known:
        raise InputError("The masks of all frames are empty; paint what to repaint in at least one of them.")
    if mode is Video.UNION:
        return [_hull(known)] * len(boxes)
    if mode is Video.OFF and len(known) == len(boxes):
        return known
    if mode is Video.OFF:
        raise InputError("A frame has an empty mask; only union and smoothed boxes know where it would be.")
    across = _follow([None if box is None else (box.left, box.right) for box in boxes], smoothing)
    down = _follow([None if box is None else (box.top, box.bottom) for box in boxes], smoothing)
    return [Box(left, top, right, bottom) for (left, right), (top, bottom) in zip(across, down, strict=True)]


def _follow(spans: Sequence[tuple[int, int] | None], smoothing: float) -> list[tuple[int, int]]:
    """Spans of one length along one axis, on a smooth path, each holding the one that is known of its frame."""
    frames = np.arange(len(spans))
    known = np.array([index for index, span in enumerate(spans) if span is not None])
    low, high = np.array([span for span in spans if span is not None], dtype=np.float64).T
    centre = _smooth(np.interp(frames, known, (low + high) / 2), smoothing)
    reach = np.maximum(high - centre[known], centre[known] - low).max()
    length = math.ceil(2 * (reach + AT_REST))
    held = dict(zip(known.tolist(), zip(low.tolist(), high.tolist(), strict=True), strict=True))
    starts = list[int]()
    for frame, ideal in enumerate((centre - length / 2).tolist()):
        start = starts[-1] if starts and abs(starts[-1] - ideal) <= AT_REST else math.floor(ideal + 0.5)
        if frame in held:
            lowest, highest = held[frame]
            start = int(max(highest - length, min(start, lowest)))
        starts.append(start)
    return [(start, start + length) for start in starts]


def _smooth(path: npt.NDArray[np.float64], sigma: float) -> npt.NDArray[np.float64]:
    if sigma == 0 or len(path) == 1:
        return path
    from scipy import ndimage

    smoothed: npt.NDArray[np.float64] = ndimage.gaussian_filter1d(path, sigma, mode="nearest")
    return smoothed
