"""Room for more picture: a larger canvas, and the mask that says where the picture goes on.

``Room`` is what a person asks for (sides in pixels or percent, a size, an aspect ratio); ``Room.place`` turns it into a
``Placement`` of one picture, whose ``Padding`` is whole pixels; ``pad`` makes the canvas.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from .fill import FillMethod, FillNetwork, OnProgress, fill
from .images import as_images, resize, size_of
from .types import MAX_SIDE, Box, InputError, Size, check_area, check_range

MAX_PADDING = MAX_SIDE
MAX_MULTIPLE = 1024
SIDES = ("left", "top", "right", "bottom")


class Unit(str, Enum):
    """What a length is counted in."""

    PIXELS = "pixels"
    PERCENT = "percent"
    """Of the picture's width for left and right, of its height for top and bottom."""


class Length(NamedTuple):
    """A distance along one axis of a picture."""

    value: float = 0
    unit: Unit = Unit.PIXELS

    def pixels(self, side: int) -> int:
        """Whole pixels (halves away from 0) on an axis of ``side`` pixels."""
        exact = self.value * side / 100 if self.unit is Unit.PERCENT else self.value
        if not math.isfinite(exact):
            raise InputError(f"A length is {self.value}; give a number of pixels or percent.")
        return int(math.copysign(math.floor(abs(exact) + 0.5), exact))

    def __str__(self) -> str:
        return f"{self.value:g}{'%' if self.unit is Unit.PERCENT else ' pixels'}"


NONE = Length()


class Aspect(NamedTuple):
    """Width to height."""

    width: float
    height: float

    @property
    def ratio(self) -> float:
        return self.width / self.height

    def __str__(self) -> str:
        return f"{self.width:g}:{self.height:g}"


def parse_target(text: str) -> Size | Aspect | None:
    """ "1024x768" is a size, "16:9" an aspect ratio, and an empty text neither."""
    if not text.strip():
        return None
    found = re.fullmatch(r"\s*(\d{1,6}(?:\.\d{1,6})?)\s*([xX×*:/])\s*(\d{1,6}(?:\.\d{1,6})?)\s*", text)
    if found is not None and float(found[1]) > 0 and float(found[3]) > 0:
        if found[2] in ":/":
            return Aspect(float(found[1]), float(found[3]))
        if found[1].isdecimal() and found[3].isdecimal():
            return Size(int(found[1]), int(found[3]))
    raise InputError(f"The target is {text!r}; give a size like 1024x768 or an aspect ratio like 16:9.")


class Anchor(str, Enum):
    """Where the picture stays on its canvas; the room goes to the other sides."""

    TOP_LEFT = "top-left"
    TOP = "top"
    TOP_RIGHT = "top-right"
    LEFT = "left"
    CENTER = "center"
    RIGHT = "right"
    BOTTOM_LEFT = "bottom-left"
    BOTTOM = "bottom"
    BOTTOM_RIGHT = "bottom-right"

    def before(self, width: int, height: int) -> tuple[int, int]:
        """How much of the room for each axis (negative: of the cut) goes to the left and to the top.

        Of an odd number the right and the bottom take the pixel more.
        """
        return (
            0 if "left" in self.value else width if "right" in self.value else math.trunc(width / 2),
            0 if "top" in self.value else height if "bottom" in self.value else math.trunc(height / 2),
        )


class Fitting(str, Enum):
    """What may happen to a picture that has another shape than the canvas asked for."""

    EXTEND = "extend"
    """It keeps every pixel: room is added, nothing cut."""
    CROP = "crop"
    """Room is added where it is too small and it is cut where it is too large; for an aspect ratio the canvas has the
    area of the picture."""
    FIT = "fit"
    """It is scaled to the largest size that fits into the canvas, then room is added; an aspect ratio, which has no
    size to scale to, is extended to."""


@dataclass(frozen=True)
class Padding:
    """Pixels added on each side, -16384..16384; negative ones are cut off."""

    left: int = 0
    top: int = 0
    right: int = 0
    bottom: int = 0

    def __post_init__(self) -> None:
        for name, pixels in vars(self).items():
            check_range(name, pixels, -MAX_PADDING, MAX_PADDING)

    @property
    def sides(self) -> tuple[int, int, int, int]:
        """Left, top, right, bottom."""
        return self.left, self.top, self.right, self.bottom

    @property
    def added(self) -> Padding:
        """Without what is cut."""
        return Padding(*(max(pixels, 0) for pixels in self.sides))

    @property
    def cut(self) -> Padding:
        """Without what is added."""
        return Padding(*(min(pixels, 0) for pixels in self.sides))

    def __add__(self, other: Padding) -> Padding:
        return Padding(*(mine + yours for mine, yours in zip(self.sides, other.sides, strict=True)))

    def __sub__(self, other: Padding) -> Padding:
        return Padding(*(mine - yours for mine, yours in zip(self.sides, other.sides, strict=True)))

    def canvas(self, picture: Size) -> Size:
        """The size a picture has afterwards. Raises InputError where nothing of it would be left."""
        kept = Size(
            picture.width + min(self.left, 0) + min(self.right, 0),
            picture.height + min(self.top, 0) + min(self.bottom, 0),
        )
        if min(kept) < 1:
            raise InputError(f"Cutting {self} off a picture of {picture} leaves nothing of it; cut less.")
        return Size(picture.width + self.left + self.right, picture.height + self.top + self.bottom)

    def place(self, picture: Size) -> Box:
        """Where what is kept of a picture lies on its canvas."""
        canvas, added = self.canvas(picture), self.added
        return Box(added.left, added.top, canvas.width - added.right, canvas.height - added.bottom)

    def __str__(self) -> str:
        return ", ".join(f"{name} {pixels}" for name, pixels in vars(self).items() if pixels) or "nothing"


def to_size(picture: Size, target: Size, anchor: Anchor = Anchor.CENTER) -> Padding:
    """The padding that brings a picture to ``target`` pixels; sides that are too long are cut."""
    width, height = target.width - picture.width, target.height - picture.height
    left, top = anchor.before(width, height)
    return Padding(left, top, width - left, height - top)


def aspect_size(picture: Size, aspect: Aspect, fitting: Fitting = Fitting.EXTEND) -> Size:
    """The size of this aspect ratio, to the nearest pixel, that a picture grows to.

    The smallest that holds all of it; with ``Fitting.CROP`` the one with its area.
    """
    if fitting is Fitting.CROP:
        area = picture.width * picture.height
        return Size(max(round(math.sqrt(area * aspect.ratio)), 1), max(round(math.sqrt(area / aspect.ratio)), 1))
    return Size(
        max(picture.width, round(picture.height * aspect.ratio)),
        max(picture.height, round(picture.width / aspect.ratio)),
    )


def to_multiple(picture: Size, padding: Padding, multiple: int, anchor: Anchor = Anchor.CENTER) -> Padding:
    """``padding`` with the pixels more that make both sides of the canvas multiples of ``multiple``.

    They go to the sides that grow already, to both in halves (of an odd number the right and the bottom take the pixel
    more), and where none does to those that ``anchor`` leaves free.
    """
    check_range("multiple", multiple, 1, MAX_MULTIPLE)
    canvas = padding.canvas(picture)
    width, height = -canvas.width % multiple, -canvas.height % multiple
    left, top = anchor.before(width, height)
    if padding.left > 0 or padding.right > 0:
        left = _share(width, padding.left, padding.right)
    if padding.top > 0 or padding.bottom > 0:
        top = _share(height, padding.top, padding.bottom)
    return padding + Padding(left, top, width - left, height - top)


def _share(pixels: int, before: int, after: int) -> int:
    """What of ``pixels`` goes to the first of two sides, of which at least one grows."""
    if before <= 0:
        return 0
    return pixels // 2 if after > 0 else pixels


class Placement(NamedTuple):
    """What becomes of one picture."""

    scaled: Size
    """The size it is brought to first."""
    padding: Padding


@dataclass(frozen=True, kw_only=True)
class Room:
    """What is asked for: so much on each side, or a target to reach; raises InputError for both.

    Negative sides are cut off.
    """

    left: Length = NONE
    top: Length = NONE
    right: Length = NONE
    bottom: Length = NONE
    target: Size | Aspect | None = None
    anchor: Anchor = Anchor.CENTER
    """Where a picture stays that grows to ``target``."""
    fitting: Fitting = Fitting.EXTEND
    """How it gets there."""
    multiple: int = 1
    """1..1024: the canvas grows to whole multiples of it, see ``to_multiple``."""

    def __post_init__(self) -> None:
        check_range("multiple", self.multiple, 1, MAX_MULTIPLE)
        for name in SIDES:
            length: Length = getattr(self, name)
            if self.target is not None and length.value:
                raise InputError(
                    f"{name} is {length} and the target is {self.target}; set the sides to 0 or leave the target empty."
                )

    def place(self, picture: Size) -> Placement:
        """Where a picture of this size goes. Raises InputError for a canvas too large to work on, for cutting all of
        it, and for a target size that it does not fit into with ``Fitting.EXTEND``."""
        scaled = picture
        if self.target is None:
            padding = Padding(
                self.left.pixels(picture.width),
                self.top.pixels(picture.height),
                self.right.pixels(picture.width),
                self.bottom.pixels(picture.height),
            )
        else:
            if isinstance(self.target, Size):
                target = self.target
                scaled = self._scaled(picture, target)
            else:
                target = aspect_size(picture, self.target, self.fitting)
            check_area(target)
            padding = to_size(scaled, target, self.anchor)
        padding = to_multiple(scaled, padding, self.multiple, self.anchor)
        check_area(padding.canvas(scaled))
        return Placement(scaled, padding)

    def _scaled(self, picture: Size, target: Size) -> Size:
        if self.fitting is Fitting.FIT:
            scale = min(target.width / picture.width, target.height / picture.height)
            return Size(max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
        if self.fitting is Fitting.EXTEND and (picture.width > target.width or picture.height > target.height):
            raise InputError(
                f"The picture is {picture}, which does not fit into {target}; give a larger size, or choose"
                ' "crop" (what sticks out is cut) or "fit" (it is scaled first).'
            )
        return picture


@dataclass(frozen=True)
class Padded:
    """A picture on its larger canvas."""

    image: Tensor
    """[B, H + top + bottom, W + left + right, C]; the original pixels bit for bit where they now lie."""
    mask: Tensor
    """[B, ...] at that size: 1 on the new area, falling to 0 inside the original."""
    box: Box
    """Where the original, or what is left of it, lies."""
    notices: tuple[str, ...] = ()
    """Sentences the user should see: that the feather was cut short, and where."""


def make_room(
    image: Tensor,
    room: Room,
    feather: int = 0,
    method: FillMethod = FillMethod.EDGE,
    *,
    seed: int = 0,
    network: FillNetwork | None = None,
    on_progress: OnProgress | None = None,
) -> Padded:
    """``pad`` by what ``room`` asks for; ``Fitting.FIT`` scales the image first (antialiased bicubic)."""
    images = as_images(image)
    scaled, padding = room.place(size_of(images))
    return pad(resize(images, scaled), padding, feather, method, seed=seed, network=network, on_progress=on_progress)


def pad(
    image: Tensor,
    padding: Padding,
    feather: int = 0,
    method: FillMethod = FillMethod.EDGE,
    *,
    seed: int = 0,
    network: FillNetwork | None = None,
    on_progress: OnProgress | None = None,
) -> Padded:
    """The image [B, H, W, 3 or 4] on a larger canvas, the new area filled by ``method`` and masked.

    On sides that grow the mask reaches ``feather`` pixels into the original, falling as a smoothstep of the distance;
    with two sides in play what they keep multiplies, which keeps corners smooth. Where the picture is too small for the
    feather it gets what fits: up to the far side, or to the middle between two sides that grow; a notice says so. Sides
    that are cut have no feather. No padding gives the image back under an empty mask. Raises InputError for a negative
    feather, for cutting the whole picture and for a canvas too large to work on.
    """
    method = FillMethod(method)
    check_range("feather", feather, 0, MAX_PADDING, "pixels")
    images = as_images(image)
    picture = size_of(images)
    canvas_size, box, added = padding.canvas(picture), padding.place(picture), padding.added
    check_area(canvas_size)
    kept = images[:, _span(padding.top, box.height), _span(padding.left, box.width)]
    canvas = _repeat_edges(kept, added)
    keep_rows = keep_profile(box.height, added.top, added.bottom, feather, feather).to(images.device)
    keep_columns = keep_profile(box.width, added.left, added.right, feather, feather).to(images.device)
    mask = (1 - keep_rows[:, None] * keep_columns[None, :]).expand(len(images), -1, -1)
    if method is not FillMethod.EDGE and added != Padding():
        canvas = fill(
            canvas, new_area(canvas_size, box).to(canvas), method, seed=seed, network=network, on_progress=on_progress
        )
    return Padded(canvas, mask.contiguous(), box, _feather_notices(box.size, added, feather))


def _span(padding: int, length: int) -> slice:
    """The part of an axis that is kept, of which ``padding`` is added to (or cut from) the start."""
    start = max(-padding, 0)
    return slice(start, start + length)


def _repeat_edges(images: Tensor, padding: Padding) -> Tensor:
    batch, height, width, channels = images.shape
    left, top = padding.left, padding.top
    right, bottom = left + width, top + height
    canvas = images.new_empty(batch, bottom + padding.bottom, right + padding.right, channels)
    canvas[:, top:bottom, left:right] = images
    canvas[:, top:bottom, :left] = images[:, :, :1]
    canvas[:, top:bottom, right:] = images[:, :, -1:]
    canvas[:, :top] = canvas[:, top : top + 1]
    canvas[:, bottom:] = canvas[:, bottom - 1 : bottom]
    return canvas


def new_area(canvas: Size, box: Box) -> Tensor:
    """1 outside ``box``, [1, H, W] of the canvas."""
    area = torch.ones(1, canvas.height, canvas.width)
    area[:, box.rows, box.columns] = 0
    return area


def keep_profile(length: int, before: int, after: int, feather_before: int, feather_after: int) -> Tensor:
    """How much is kept along an axis of ``length`` pixels that grows by ``before`` and ``after``: 0 on what is new,
    rising to 1 over the feathers, as far as they fit."""
    room = feather_room(length, before, after)
    keep = torch.zeros(before + length + after)
    inside = keep[before : before + length]
    inside.fill_(1)
    if before:
        inside *= rise(length, min(feather_before, room))
    if after:
        inside *= rise(length, min(feather_after, room)).flip(0)
    return keep


def feather_room(length: int, before: int, after: int) -> int:
    """Pixels a feather may reach in from one side: half of them where both sides have one."""
    return length // 2 if before and after else length


def rise(length: int, feather: int) -> Tensor:
    """Smoothstep over the first ``feather`` of ``length`` pixels, then 1."""
    t = (torch.arange(1, length + 1, dtype=torch.float64) / (feather + 1)).clamp(max=1)
    return (t * t * (3 - 2 * t)).float()


def _feather_notices(kept: Size, added: Padding, feather: int) -> tuple[str, ...]:
    axes = (("wide", kept.width, added.left, added.right), ("high", kept.height, added.top, added.bottom))
    return tuple(
        f"The feather is {feather} pixels, but the picture is only {length} {axis}"
        f"{' and grows on both sides' if before and after else ''}: {feather_room(length, before, after)} were used."
        for axis, length, before, after in axes
        if (before or after) and feather > feather_room(length, before, after)
    )
