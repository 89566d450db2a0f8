"""What an edit did to a picture, in numbers: beside the mask, at its contour, in colour, place and grain.

Works on any two pictures of one size and a mask, whatever made them. Colour values are sRGB in 0..1, so 1/255 is one
level of an 8-bit file. What cannot be measured is None: there is nothing outside a full mask, and no contour of an
empty one.

The contour is where the mask crosses half of its largest value; a mask that only the picture's border cuts off has none
there. Everything about the contour is computed in the mask's bounding box and its surroundings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .color import delta_e_2000, srgb_to_lab
from .grain import grain_level
from .images import as_images, as_mask_batch, as_masks, size_of
from .masks import OnImage, bounding_box, expand_box, grow
from .registration import Shift, shift_between
from .types import Box, InputError, MendError, Size, check_range

FloatArray = npt.NDArray[np.float32]
Region = npt.NDArray[np.bool_]

CONTOUR_DISTANCE = 8
"""Pixels from the contour to the two lines beside it that it is compared with."""
FLAT = 0.25 / 255
"""Mean differences of neighbours below a quarter of a level count as this, so that flat areas have a ratio too."""
RING_SIGMA = 2.0
"""Standard deviation, in pixels, of the Gaussian that weighs colours on either side of a point of the contour."""
RING_REACH = 6
"""Pixels it reaches."""
MAX_POINTS = 2**16
"""A longer contour is sampled at so many points."""
SURROUNDINGS = 32
"""Pixels around the mask's bounding box whose grain the inside's is compared with."""
LEAST_GRAIN_PIXELS = 256
"""Pixels, each with its eight neighbours in the same region, from which grain can be told."""
FLAT_GRAIN = 0.1 / 255
"""Grain below this counts as this."""
STRIP = 2**20
"""Pixels compared at once."""


class LimitExceededError(MendError):
    """A comparison went beyond its limits; the message has the figures."""

    __module__ = "mend"


class Offset(NamedTuple):
    """Where the original lies in a larger picture: pixels from its left and upper edge."""

    left: int
    top: int


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What still passes; None does not check. Raises InputError for what is out of range."""

    outside: float | None = None
    """0..1: the largest change of a channel where the mask is 0; 0 asks for identity."""
    seam: float | None = None
    """The largest ``Seam.ratio``."""
    ring: float | None = None
    """The largest ``Ring.step``."""
    shift: float | None = None
    """Pixels the surroundings may be displaced by."""
    grain_low: float | None = None
    """The smallest ``Grain.ratio``: below it the inside is too smooth."""
    grain_high: float | None = None
    """The largest ``Grain.ratio``."""

    def __post_init__(self) -> None:
        for name, high in (("outside", 1), ("seam", 1e6), ("ring", 1e6), ("shift", 1e6)):
            _check(name, getattr(self, name), high)
        _check("grain_low", self.grain_low, 1e6)
        _check("grain_high", self.grain_high, 1e6)


def _check(name: str, value: float | None, high: float) -> None:
    if value is not None:
        check_range(f"The limit {name}", value, 0, high)


@dataclass(frozen=True)
class Change:
    """How far channels differ between before and after."""

    max: float
    mean: float
    """Over pixels and channels."""
    changed: int
    """Pixels that are not bit-identical."""
    share: float
    """The same as a share of the area."""


@dataclass(frozen=True)
class Seam:
    """How much neighbours differ across the contour, over how much they do on lines beside it.

    The mean |difference|, over channels, of side-by-side pixels that lie on different sides of the contour, over the
    mean of the same on the lines CONTOUR_DISTANCE pixels inside and outside (Euclidean; where the mask is too thin or
    the picture ends, the one that exists). 1 cannot be told from the surroundings, above 1 shows as a line.
    """

    ratio: float
    before: float
    """The same line in the picture before: well above 1 where the mask follows the edge of an object."""


@dataclass(frozen=True)
class Ring:
    """Colour on either side of the contour, in CIEDE2000: the median over its points.

    Around each point the colours within RING_REACH pixels are averaged, inside and outside apart, weighted by a
    Gaussian. Medians, so that objects which cross the contour do not count as a seam.
    """

    step: float
    """Between the inside and the outside of the picture after: the tone step that shows at the seam. Below 1 cannot be
    seen; texture alone makes up to 4."""
    step_before: float
    """The same in the picture before."""
    drift: float
    """Between before and after, just inside: how far the colour at the rim moved from what was there."""


@dataclass(frozen=True)
class Grain:
    """High-frequency noise inside the mask over that around it, in the picture after."""

    ratio: float
    """1 is even; below 1 the inside is smoother."""
    before: float
    """The same in the picture before."""
    inside: float
    """Standard deviation, 0..1, in the picture after."""
    outside: float


@dataclass(frozen=True, kw_only=True)
class ImageComparison:
    """The figures of one picture."""

    size: Size
    coverage: float
    """Share of the pixels where the mask is above 0."""
    outside: Change | None
    """Where the mask is 0; None when that is nowhere."""
    inside: Change | None
    """Where the mask is above 0."""
    seam: Seam | None
    ring: Ring | None
    shift: Shift | None
    """How far the content outside the mask is displaced; None when there is too little to see it by."""
    grain: Grain | None

    def __str__(self) -> str:
        parts = [f"mask {self.coverage:.1%}"]
        if self.outside:
            parts.append(f"outside max {levels(self.outside.max)}, {self.outside.changed} px changed")
        if self.seam:
            parts.append(f"seam {self.seam.ratio:.2f}")
        if self.ring:
            parts.append(f"ring delta E {self.ring.step:.2f}")
        if self.shift:
            parts.append(f"shift {self.shift.distance:.2f} px")
        if self.grain:
            parts.append(f"grain {self.grain.ratio:.2f}")
        return "; ".join(parts)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """All pictures, and what went beyond the limits."""

    images: tuple[ImageComparison, ...]
    limits: Limits
    failures: tuple[str, ...] = field(default=())
    """One sentence for each limit that a picture exceeds."""

    @property
    def passed(self) -> bool:
        return not self.failures

    def enforce(self) -> None:
        """Raise LimitExceededError unless everything passed."""
        if self.failures:
            raise LimitExceededError(" ".join(self.failures))

    def report(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "passed": self.passed,
            "failures": list(self.failures),
            "limits": asdict(self.limits),
            "images": [_plain(image) for image in self.images],
        }

    def to_json(self) -> str:
        return json.dumps(self.report())

    def __str__(self) -> str:
        lines = [str(image) for image in self.images]
        if len(lines) > 1:
            lines = [f"Picture {number}: {line}" for number, line in enumerate(lines, 1)]
        return "\n".join([*lines, *self.failures])


def levels(value: float) -> str:
    """A colour difference as people read it: "3.1/255"."""
    return f"{value * 255:.3g}/255"


def compare(
    before: Tensor,
    after: Tensor,
    mask: Tensor,
    limits: Limits = Limits(),
    *,
    offset: Offset | None = None,
    on_image: OnImage | None = None,
) -> Comparison:
    """Compare ``before`` and ``after`` [B, H, W, 3 or 4] where the mask [B, H, W] says what was to be repainted.

    Where there are several results for each input (result b * count + n, as ``inpaint`` makes them), or one mask, each
    result is compared with its own input and mask. Alpha is compared where both have it.

    ``offset`` says where ``before`` lies in a larger ``after``, as outpainting makes it; the new area then counts as
    repainted. Without it pictures of different sizes raise InputError.
    """
    pictures = align(before, after, mask, offset)
    images = []
    for triple in pictures:
        images.append(_compare_one(triple))
        if on_image is not None:
            on_image(len(images), len(pictures))
    return Comparison(images=tuple(images), limits=limits, failures=tuple(_all_failures(images, limits)))


def failures(image: ImageComparison, limits: Limits) -> Iterator[str]:
    """One sentence for each limit that is exceeded; what could not be measured exceeds none."""
    outside, seam, ring, shift, grain = image.outside, image.seam, image.ring, image.shift, image.grain
    if outside and limits.outside is not None and outside.max > limits.outside:
        allowed = levels(limits.outside) if limits.outside else "no change"
        yield (
            f"{outside.changed} pixels outside the mask ({outside.share:.1%}) changed, by up to"
            f" {levels(outside.max)}, and {allowed} is allowed: paste the result back over the original with the mask."
        )
    if seam and limits.seam is not None and seam.ratio > limits.seam:
        yield (
            f"the seam has {seam.ratio:.2f} times the contrast of its surroundings ({seam.before:.2f} before), and"
            f" {limits.seam:g} is allowed: feather the mask or blend the stitch."
        )
    if ring and limits.ring is not None and ring.step > limits.ring:
        yield (
            f"the colour steps by a delta E of {ring.step:.2f} across the seam ({ring.step_before:.2f} before), and"
            f" {limits.ring:g} is allowed: match the colours."
        )
    if shift and limits.shift is not None and shift.distance > limits.shift:
        yield (
            f"what lies outside the mask moved by {shift.dx:+.2f}, {shift.dy:+.2f} pixels, and {limits.shift:g} is"
            " allowed: register the result before it is stitched."
        )
    if grain and limits.grain_low is not None and grain.ratio < limits.grain_low:
        yield f"{_grain_sentence(grain)} {limits.grain_low:g} is the least allowed: add grain."
    if grain and limits.grain_high is not None and grain.ratio > limits.grain_high:
        yield f"{_grain_sentence(grain)} {limits.grain_high:g} is allowed: it is too noisy or too detailed."


def _grain_sentence(grain: Grain) -> str:
    return f"the inside has {grain.ratio:.2f} times the grain of its surroundings ({grain.before:.2f} before), and"


def _all_failures(images: list[ImageComparison], limits: Limits) -> Iterator[str]:
    for number, image in enumerate(images, 1):
        for sentence in failures(image, limits):
            yield f"Picture {number}: {sentence}"


def _plain(image: ImageComparison) -> dict[str, Any]:
    plain = asdict(image)
    plain["size"] = image.size._asdict()
    plain["shift"] = image.shift and image.shift._asdict()
    return plain


# --- which is compared with which


class Triple(NamedTuple):
    """One comparison, on the CPU."""

    before: Tensor
    """[H, W, 3 or 4]"""
    after: Tensor
    """[H, W, 3 or 4]"""
    mask: FloatArray
    """[H, W]"""


@dataclass(frozen=True)
class Pictures:
    """Batches whose lengths divide the number of comparisons; a shorter one serves them in groups."""

    before: Tensor
    after: Tensor
    masks: Tensor
    offset: Offset | None

    def __len__(self) -> int:
        return max(len(self.before), len(self.after), len(self.masks))

    def __iter__(self) -> Iterator[Triple]:
        for index in range(len(self)):
            before, after, mask = (
                batch[index * len(batch) // len(self)].detach().cpu() for batch in (self.before, self.after, self.masks)
            )
            if self.offset is not None:
                before, mask = _place(before, after, mask, self.offset)
            yield Triple(before, after, mask.numpy())


def align(before: Tensor, after: Tensor, mask: Tensor, offset: Offset | None = None) -> Pictures:
    """Which is compared with which: see ``compare``."""
    before, after = as_images(before), as_images(after)
    if offset is None and size_of(before) != size_of(after):
        raise InputError(
            f"before is {size_of(before)} and after is {size_of(after)}; compare pictures of one size: for an"
            " outpainted picture the padded one is before, or say at which offset the original lies in it."
        )
    masks = as_mask_batch(mask)
    masks = as_masks(masks, after[:1].expand(len(masks), -1, -1, -1))
    pictures = Pictures(before, after, masks, offset)
    if any(len(pictures) % len(batch) for batch in (before, after, masks)):
        raise InputError(
            f"There are {len(before)} pictures before, {len(after)} after and {len(masks)} masks; give one of each, or"
            " as many as there are results, or one for every so many results."
        )
    return pictures


def _place(before: Tensor, after: Tensor, mask: Tensor, offset: Offset) -> tuple[Tensor, Tensor]:
    """``before`` on the canvas of ``after``, and the mask with all that is new."""
    height, width = before.shape[:2]
    room = Size(after.shape[1], after.shape[0])
    box = Box(offset.left, offset.top, offset.left + width, offset.top + height)
    if offset.left < 0 or offset.top < 0 or box.right > room.width or box.bottom > room.height:
        raise InputError(
            f"before is {Size(width, height)} and does not fit into after, {room}, at {offset.left},{offset.top};"
            " give the pixels that were added at the left and at the top."
        )
    canvas, repainted = after[..., : before.shape[-1]].clone(), torch.ones_like(mask)
    if canvas.shape[-1] < before.shape[-1]:
        before = before[..., : canvas.shape[-1]]
    canvas[box.rows, box.columns] = before
    repainted[box.rows, box.columns] = mask[box.rows, box.columns]
    return canvas, repainted


# --- one picture


def _compare_one(triple: Triple) -> ImageComparison:
    before, after, mask = triple
    channels = min(before.shape[-1], after.shape[-1])
    outside, inside = _changes(before[..., :channels], after[..., :channels], mask)
    before, after = before[..., :3], after[..., :3]
    box = bounding_box(torch.from_numpy(mask))
    height, width = mask.shape
    seam, ring, grain = None, None, None
    if box is not None:
        near = expand_box(box, SURROUNDINGS, height, width)
        old, new = (np.ascontiguousarray(picture[near.rows, near.columns].numpy()) for picture in (before, after))
        area = mask[near.rows, near.columns]
        solid = area >= area.max() / 2
        seam, ring, grain = _seam(old, new, solid), _ring(old, new, solid), _grain(old, new, solid, area == 0)
    return ImageComparison(
        size=Size(width, height),
        coverage=float((mask > 0).mean()),
        outside=outside,
        inside=inside,
        seam=seam,
        ring=ring,
        shift=_shift(before, after, mask, outside),
        grain=grain,
    )


def _changes(before: Tensor, after: Tensor, mask: FloatArray) -> tuple[Change | None, Change | None]:
    """(outside, inside), in strips of rows so that memory stays bounded."""
    channels = before.shape[-1]
    outside, inside = _Tally(channels), _Tally(channels)
    rows = max(STRIP // mask.shape[1], 1)
    for top in range(0, len(mask), rows):
        strip = slice(top, top + rows)
        each = (after[strip] - before[strip]).abs().permute(2, 0, 1).contiguous().numpy()
        largest, total = np.maximum.reduce(each), np.add.reduce(each)
        kept = mask[strip] == 0
        outside.add(largest[kept], total[kept])
        inside.add(largest[~kept], total[~kept])
    return outside.change(), inside.change()


class _Tally:
    """Adds up pixels' differences."""

    def __init__(self, channels: int) -> None:
        self.channels, self.pixels, self.changed = channels, 0, 0
        self.max, self.sum = 0.0, 0.0

    def add(self, largest: FloatArray, total: FloatArray) -> None:
        """Of each pixel: its channels' largest difference, and their sum."""
        self.pixels += len(largest)
        self.changed += int(np.count_nonzero(largest))
        self.max = max(self.max, float(largest.max(initial=0)))
        self.sum += float(total.sum(dtype=np.float64))

    def change(self) -> Change | None:
        if not self.pixels:
            return None
        mean = self.sum / (self.pixels * self.channels)
        return Change(max=self.max, mean=mean, changed=self.changed, share=self.changed / self.pixels)


def _shift(before: Tensor, after: Tensor, mask: FloatArray, outside: Change | None) -> Shift | None:
    if outside is None:
        return None
    if outside.max == 0:
        return Shift(0.0, 0.0, 1.0)
    shift = shift_between(before, after, torch.from_numpy((mask == 0).astype(np.float32)))
    return shift if shift.confidence > 0 else None


# --- the contour


def _seam(before: FloatArray, after: FloatArray, solid: Region) -> Seam | None:
    """See ``Seam``."""
    contour = _pairs_across(solid)
    beside = np.concatenate([_pairs_across(_grown(solid, pixels)) for pixels in (-CONTOUR_DISTANCE, CONTOUR_DISTANCE)])
    if not len(contour) or not len(beside):
        return None
    ratio, ratio_before = (
        max(_mean_step(picture, contour), FLAT) / max(_mean_step(picture, beside), FLAT) for picture in (after, before)
    )
    return Seam(ratio=ratio, before=ratio_before)


def _grown(solid: Region, pixels: float) -> Region:
    grown: Region = grow(torch.from_numpy(solid.astype(np.float32))[None], pixels)[0].numpy() > 0
    return grown


def _pairs_across(solid: Region) -> npt.NDArray[np.intp]:
    """[N, 2]: the places, in the flattened picture, of side-by-side pixels with the region's edge between them."""
    width = solid.shape[1]
    below = np.flatnonzero(solid[1:] != solid[:-1])
    rows, columns = np.nonzero(solid[:, 1:] != solid[:, :-1])
    first = np.concatenate([below, rows * width + columns])
    return np.stack([first, first + np.repeat([width, 1], [len(below), len(rows)])], axis=1)


def _mean_step(picture: FloatArray, pairs: npt.NDArray[np.intp]) -> float:
    """The mean |difference| of the two pixels of each pair, over pairs and channels."""
    colors = picture.reshape(-1, picture.shape[-1])
    return float(np.abs(colors[pairs[:, 0]] - colors[pairs[:, 1]]).mean(dtype=np.float64))


def _ring(before: FloatArray, after: FloatArray, solid: Region) -> Ring | None:
    """See ``Ring``."""
    points = _contour_points(solid)
    if not len(points):
        return None
    new_inside, new_outside = (_local_lab(after, region, points) for region in (solid, ~solid))
    old_inside, old_outside = (_local_lab(before, region, points) for region in (solid, ~solid))
    return Ring(
        step=_median_difference(new_inside, new_outside),
        step_before=_median_difference(old_inside, old_outside),
        drift=_median_difference(old_inside, new_inside),
    )


def _contour_points(solid: Region) -> npt.NDArray[np.intp]:
    """(row, column) of the inside's pixels that have a neighbour outside, at most MAX_POINTS of them, evenly."""
    edge = np.zeros_like(solid)
    for flat, inner in ((edge, solid), (edge.T, solid.T)):
        flat[1:] |= inner[1:] & ~inner[:-1]
        flat[:-1] |= inner[:-1] & ~inner[1:]
    points = np.argwhere(edge)
    return points[:: -(-len(points) // MAX_POINTS)] if len(points) else points


def _local_lab(picture: FloatArray, region: Region, points: npt.NDArray[np.intp]) -> Tensor:
    """The Gaussian mean of the region's colours around each point, in Lab [N, 3]."""
    total, weight = np.zeros((len(points), 3)), np.zeros((len(points), 1))
    limit = np.array(region.shape) - 1
    for dy, dx in np.ndindex(2 * RING_REACH + 1, 2 * RING_REACH + 1):
        shift = np.array([dy - RING_REACH, dx - RING_REACH])
        squared = int((shift**2).sum())
        if squared > RING_REACH**2:
            continue
        places = points + shift
        within = ((places >= 0) & (places <= limit)).all(axis=1)
        rows, columns = np.clip(places, 0, limit).T
        share = (within & region[rows, columns])[:, None] * np.exp(-squared / (2 * RING_SIGMA**2))
        total += share * picture[rows, columns]
        weight += share
    return srgb_to_lab(torch.from_numpy(total / weight))


def _median_difference(first: Tensor, second: Tensor) -> float:
    return float(np.median(delta_e_2000(first, second).numpy()))


def _grain(before: FloatArray, after: FloatArray, inside: Region, outside: Region) -> Grain | None:
    """None where either region is too small to tell grain from detail."""
    if min(np.count_nonzero(_grown(region, -1.5)) for region in (inside, outside)) < LEAST_GRAIN_PIXELS:
        return None
    weights = [torch.from_numpy(region.astype(np.float32))[None] for region in (inside, outside)]
    (level, level_around), (old, old_around) = (
        [max(float(grain_level(torch.from_numpy(picture)[None], weight).mean()), FLAT_GRAIN) for weight in weights]
        for picture in (after, before)
    )
    return Grain(ratio=level / level_around, before=old / old_around, inside=level, outside=level_around)
