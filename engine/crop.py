"""What part of the picture the model sees, cut out and put back.

A ``CropPlan`` knows three spaces: the picture, the ``box`` in it, and the ``canvas`` the model works on (the box, with
what ``outside`` adds beyond the picture's border, resampled to ``scaled``, then padded to the canvas). ``cut`` goes
there, ``uncut`` comes back. ``plan`` decides all of it from ``CropOptions``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from . import images, masks
from .fill import NETWORKS, FillMethod
from .outpaint import Padding, pad
from .types import MAX_SIDE, Box, InputError, Size, check_area, check_range

CONTEXT = 0.5
"""Surroundings ``around`` shows on each side, as a share of the mask's mean side."""
MIN_CONTEXT = 32
"""Pixels of surroundings shown on each side, at least."""
MAX_ASPECT = 2.0
"""A long thin mask is shown with enough surroundings to keep the canvas within this aspect ratio."""
KEEP_SCALE = 0.25
"""Share by which a canvas may miss the area that was asked for when that saves the resampling."""
UNCHANGED = 1e-6
"""A canvas pixel that comes back this close to what was cut is the same."""
STRETCH = 0.01
"""Relative difference of aspect ratios below which a box is fitted to the canvas without padding."""
MEGAPIXEL = 1024 * 1024
"""As the models' makers and ComfyUI count it."""


def _both_ways(*landscape: tuple[int, int]) -> tuple[Size, ...]:
    upright = [(height, width) for width, height in landscape if width != height]
    return tuple(Size(*size) for size in (*landscape, *upright))


SDXL_SIZES = _both_ways((1024, 1024), (1152, 896), (1216, 832), (1344, 768), (1536, 640))
"""What SDXL was trained on most (Podell et al. 2023, appendix I)."""
SD15_SIZES = _both_ways((512, 512), (576, 448), (640, 384), (704, 384), (768, 320))
"""About 512 x 512 pixels in steps of 64, for Stable Diffusion 1.x and 2.x base."""
SD2_SIZES = _both_ways((768, 768), (832, 704), (896, 640), (960, 640), (1024, 576), (1152, 512))
"""About 768 x 768 pixels in steps of 64, for Stable Diffusion 2.x."""


class Overflow(str, Enum):
    """What happens where the box needs more room than the picture has."""

    INSIDE = "inside"
    """The box is moved inside, and is smaller where even that does not fit."""
    EXTEND = "extend"
    """The box is moved inside; where that does not fit, the picture is continued by a fill."""


class Target(Protocol):
    """What size the canvas should have."""

    def canvas(self, wanted: Size, options: CropOptions) -> Size:
        """The canvas for a box of the size that is wanted."""


@dataclass(frozen=True)
class Area:
    """A canvas of the box's own shape and about this many pixels; raises InputError for what is out of range."""

    pixels: int

    def __post_init__(self) -> None:
        check_range("The target's area", self.pixels, 32 * 32, 64 * MEGAPIXEL, "pixels")

    @classmethod
    def megapixels(cls, value: float) -> Area:
        """``value`` x 1024 x 1024 pixels."""
        check_range("megapixels", value, 0.01, 64)
        return cls(round(value * MEGAPIXEL))

    def canvas(self, wanted: Size, options: CropOptions) -> Size:
        ratio = wanted.width * wanted.height / self.pixels
        if abs(ratio - 1) <= options.keep_scale:
            return round_up(wanted, options.multiple)
        scale = 1 / math.sqrt(ratio)
        scaled = Size(max(round(wanted.width * scale), 1), max(round(wanted.height * scale), 1))
        return round_up(scaled, options.multiple)


@dataclass(frozen=True)
class Sizes:
    """A canvas of one of these sizes, the one whose aspect ratio is nearest to the box's."""

    sizes: tuple[Size, ...]

    def __post_init__(self) -> None:
        if not self.sizes:
            raise InputError("The list of sizes is empty; give at least one width and height.")
        for size in self.sizes:
            check_range("width", size.width, 8, MAX_SIDE)
            check_range("height", size.height, 8, MAX_SIDE)
            check_area(size)

    def canvas(self, wanted: Size, options: CropOptions) -> Size:
        return min(self.sizes, key=lambda size: abs(math.log(size.width * wanted.height / size.height / wanted.width)))


class CanvasSize(str, Enum):
    """What a person can choose from; ``target_of`` makes a Target of it."""

    OWN = "own"
    """The box's own: every pixel stays as it is."""
    EXACT = "exact"
    """One width and height."""
    MEGAPIXELS = "megapixels"
    """About so many pixels, in the box's shape."""
    SDXL = "sdxl"
    """The nearest of SDXL_SIZES."""
    SD15 = "sd15"
    """The nearest of SD15_SIZES."""
    SD2 = "sd2"
    """The nearest of SD2_SIZES."""


def target_of(choice: CanvasSize, exact: Size, megapixels: float) -> Target | None:
    """The target of a choice; ``exact`` and ``megapixels`` count where it needs them."""
    if choice is CanvasSize.OWN:
        return None
    if choice is CanvasSize.EXACT:
        return Sizes((exact,))
    if choice is CanvasSize.MEGAPIXELS:
        return Area.megapixels(megapixels)
    return Sizes({CanvasSize.SDXL: SDXL_SIZES, CanvasSize.SD15: SD15_SIZES, CanvasSize.SD2: SD2_SIZES}[choice])


@dataclass(frozen=True, kw_only=True)
class CropOptions:
    """How a crop is made around a mask; raises InputError for what is out of range."""

    context_factor: float = 1.5
    """1..20: the box is this many times as wide and as high as the mask's bounding box. 1.5 shows a quarter of the
    mask's width on its left, a quarter on its right."""
    context_pixels: int = MIN_CONTEXT
    """0..16384 pixels shown on each side at least, where the factor gives fewer."""
    min_size: int = 512
    """0..16384: the box is at least this many pixels wide and high, where the picture has room."""
    target: Target | None = Area(MEGAPIXEL)
    """What the box is resampled to; None keeps every pixel as it is."""
    multiple: int = 8
    """1..1024: the canvas' sides are multiples of it."""
    keep_scale: float = KEEP_SCALE
    """0..0.9: where the box's area is within this share of the target's, it is used pixel for pixel: an Area target
    then yields the box's own size, and for Sizes the box is grown or trimmed, but never into the mask."""
    max_aspect: float = MAX_ASPECT
    """1..100: a longer box gets more surroundings on its short sides, as far as the picture reaches."""
    overflow: Overflow = Overflow.INSIDE
    fill: FillMethod = FillMethod.EDGE
    """What is shown beyond the picture with Overflow.EXTEND."""
    mask_outside: bool = False
    """Whether the sampler may paint beyond the picture with Overflow.EXTEND; it never comes back."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "overflow", Overflow(self.overflow))
        object.__setattr__(self, "fill", FillMethod(self.fill))
        check_range("context_factor", self.context_factor, 1, 20)
        check_range("context_pixels", self.context_pixels, 0, MAX_SIDE)
        check_range("min_size", self.min_size, 0, MAX_SIDE)
        check_range("multiple", self.multiple, 1, 1024)
        check_range("keep_scale", self.keep_scale, 0, 0.9)
        check_range("max_aspect", self.max_aspect, 1, 100)
        if self.fill in NETWORKS:
            raise InputError(
                f'The fill "{self.fill.value}" needs a network, which a crop has none for; choose another fill, or pad'
                " and fill the picture first."
            )
        if isinstance(self.target, Sizes):
            for size in self.target.sizes:
                self._check_multiple(size)

    def _check_multiple(self, size: Size) -> None:
        for name, side in (("width", size.width), ("height", size.height)):
            if side % self.multiple:
                nearest = max(round(side / self.multiple), 1) * self.multiple
                raise InputError(
                    f"{name} is {side}, which is no multiple of {self.multiple}; give {nearest}, or lower multiple."
                )


@dataclass(frozen=True)
class Outside:
    """Pixels of the crop beyond the picture's border, and what is there."""

    padding: Padding
    fill: FillMethod = FillMethod.EDGE
    masked: bool = False


@dataclass(frozen=True)
class CropPlan:
    """A box of the picture and the canvas it becomes."""

    box: Box
    scaled: Size
    """The size on the canvas of the box and what is outside; equal to ``extent`` where nothing is resampled."""
    canvas: Size
    """``scaled``, or a little more; the rest repeats the edge."""
    outside: Outside | None = None

    @property
    def extent(self) -> Size:
        """The size in picture pixels of the box and what is outside."""
        if self.outside is None:
            return self.box.size
        around = self.outside.padding
        return Size(self.box.width + around.left + around.right, self.box.height + around.top + around.bottom)

    @property
    def resamples(self) -> bool:
        return self.scaled != self.extent

    def cut(self, picture: Tensor) -> Tensor:
        """Images [B, H, W, C] -> canvas [B, h, w, C]."""
        part = picture[:, self.box.rows, self.box.columns]
        if self.outside is not None:
            part = pad(part, self.outside.padding, 0, self.outside.fill).image
        return self._pad(images.resize(part, self.scaled).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def cut_mask(self, mask: Tensor) -> Tensor:
        """Masks [B, H, W] -> canvas [B, h, w]."""
        part = mask[:, self.box.rows, self.box.columns]
        if self.outside is not None:
            around = self.outside.padding
            sides = (around.left, around.right, around.top, around.bottom)
            part = F.pad(part, sides, value=float(self.outside.masked))
        return self._pad(images.resize_mask(part, self.scaled)[:, None])[:, 0]

    def cut_hole(self, mask: Tensor) -> Tensor:
        """Masks [B, H, W] -> canvas [B, h, w] of 0 and 1: 1 where ``cut`` may show anything that the mask touches."""
        hole = (self.cut_mask(mask) > 0).to(mask)
        return self._reached(hole, self.extent, self.scaled)

    def uncut(self, canvas: Tensor) -> Tensor:
        """Canvas [B, h, w, C] -> the box's part of the picture, [B, box height, box width, C].

        A canvas that was enlarged or reduced as a whole comes back as well, at the detail it has.
        """
        across, down = self._used(images.size_of(canvas))
        if across.is_integer() and down.is_integer():
            return self._inside(images.resize(canvas[:, : int(down), : int(across)], self.extent))
        return self._inside(_resize_part(canvas, (across, down), self.extent))

    def uncut_mask(self, canvas: Tensor) -> Tensor:
        """Canvas masks [B, h, w] -> the box's part of the picture, [B, box height, box width]."""
        across, down = self._used(images.size_of(canvas))
        if across.is_integer() and down.is_integer():
            return self._inside(images.resize_mask(canvas[:, : int(down), : int(across)], self.extent))
        return self._inside(_resize_part(canvas[..., None], (across, down), self.extent)[..., 0])

    def changed(self, cut: Tensor, canvas: Tensor, tolerance: float = UNCHANGED) -> Tensor:
        """Where a canvas [B, h, w, 3] that came back shows anything else than was ``cut``: 0 and 1,
        [B, box height, box width], as far as the resampling carries a difference."""
        moved = ((canvas - cut).abs().amax(dim=-1) > tolerance).to(canvas)
        hit = (images.resize_mask(moved[:, : self.scaled.height, : self.scaled.width], self.extent) > 0).to(canvas)
        return self._inside(self._reached(hit, self.scaled, self.extent))

    def _used(self, canvas: Size) -> tuple[float, float]:
        """Width and height of what is not padding on a canvas, of whatever size it came back."""
        return (
            self.scaled.width * canvas.width / self.canvas.width,
            self.scaled.height * canvas.height / self.canvas.height,
        )

    def _inside(self, extent: Tensor) -> Tensor:
        """[B, height, width, ...] of the extent without what is outside the picture."""
        if self.outside is None:
            return extent
        left, top = self.outside.padding.left, self.outside.padding.top
        return extent[:, top : top + self.box.height, left : left + self.box.width]

    @staticmethod
    def _reached(hit: Tensor, before: Size, after: Size) -> Tensor:
        """What a mask touches after bilinear resampling, extended to what pictures' bicubic filter touches: that one
        reaches a pixel further, the larger of both pixels."""
        if before == after:
            return hit
        reach = math.ceil(max(1, after.width / before.width, after.height / before.height))
        while reach > 0:
            hit = masks.grow(hit, min(reach, masks.MAX_PIXELS), masks.Shape.SQUARE)
            reach -= masks.MAX_PIXELS
        return hit

    def _pad(self, planes: Tensor) -> Tensor:
        right, bottom = self.canvas.width - self.scaled.width, self.canvas.height - self.scaled.height
        return F.pad(planes, (0, right, 0, bottom), mode="replicate") if right or bottom else planes


def whole(picture: Size, multiple: int) -> CropPlan:
    """The whole picture, pixel for pixel; ``multiple`` is the side of a latent cell in pixels."""
    return CropPlan(Box(0, 0, picture.width, picture.height), picture, round_up(picture, multiple))


def around(mask_box: Box, picture: Size, native_size: int, multiple: int) -> CropPlan:
    """The mask's surroundings, sized for a network trained on ``native_size`` x ``native_size`` pixels.

    The box holds the mask with context on every side, reaches the native size where the picture has room (so that
    nothing needs resampling), and stays inside the picture. A larger box is scaled to the native area.
    """
    context = max(MIN_CONTEXT, round(CONTEXT * (mask_box.width + mask_box.height) / 2))
    fits = max(mask_box.size) + 2 * context <= native_size
    options = CropOptions(
        context_factor=1,
        context_pixels=context,
        min_size=native_size if fits else 0,
        target=Area(native_size**2),
        multiple=multiple,
    )
    return fit(surroundings(mask_box, options), mask_box, picture, options)


def plan(mask_box: Box, picture: Size, options: CropOptions, context: Box | None = None) -> CropPlan:
    """The crop around a mask that fills ``mask_box``, together with all of ``context``.

    Raises InputError for a canvas too large to work on.
    """
    must = mask_box if context is None else union(mask_box, context)
    planned = fit(surroundings(mask_box, options, context), must, picture, options)
    check_area(planned.canvas)
    return planned


def with_context(mask_box: Box, options: CropOptions, context: Box | None = None) -> Box:
    """The mask's box with the surroundings that factor and pixels ask for, and the context box; may stick out of the
    picture."""
    share = (options.context_factor - 1) / 2
    across = max(options.context_pixels, math.ceil(share * mask_box.width))
    down = max(options.context_pixels, math.ceil(share * mask_box.height))
    wide = Box(mask_box.left - across, mask_box.top - down, mask_box.right + across, mask_box.bottom + down)
    return wide if context is None else union(wide, context)


def surroundings(mask_box: Box, options: CropOptions, context: Box | None = None) -> Box:
    """``with_context``, grown evenly to the minimum size and the largest aspect ratio."""
    box = with_context(mask_box, options, context)
    width, height = max(box.width, options.min_size), max(box.height, options.min_size)
    width, height = (
        max(width, math.ceil(height / options.max_aspect)),
        max(height, math.ceil(width / options.max_aspect)),
    )
    left, top = (box.left + box.right - width) // 2, (box.top + box.bottom - height) // 2
    return Box(left, top, left + width, top + height)


def fit(wanted: Box, must: Box, picture: Size, options: CropOptions) -> CropPlan:
    """The crop that shows ``wanted``, which may stick out of the picture, or all of it that there is.

    Its sizes depend on the sizes of the arguments alone, and ``must`` is in it whatever else gives way.
    """
    inside = options.overflow is Overflow.INSIDE
    size = _smaller(wanted.size, picture) if inside else wanted.size
    in_cells = round_up(size, options.multiple)
    canvas = in_cells if options.target is None else options.target.canvas(size, options)
    covering = _cover(size, canvas)
    ratio = covering.width * covering.height / (canvas.width * canvas.height)
    holds = canvas.width >= must.width and canvas.height >= must.height
    pixel_for_pixel = canvas == in_cells or (abs(ratio - 1) <= options.keep_scale and holds)

    extent = canvas if pixel_for_pixel else covering
    extent = _smaller(extent, picture) if inside else extent
    left = _place((wanted.left, wanted.right), (must.left, must.right), extent.width, picture.width)
    top = _place((wanted.top, wanted.bottom), (must.top, must.bottom), extent.height, picture.height)
    right, bottom = left + extent.width, top + extent.height
    box = Box(max(left, 0), max(top, 0), min(right, picture.width), min(bottom, picture.height))
    beyond = Padding(box.left - left, box.top - top, right - box.right, bottom - box.bottom)
    outside = None if beyond == Padding() else Outside(beyond, options.fill, options.mask_outside)
    return CropPlan(box, extent if pixel_for_pixel else _scaled(extent, canvas), canvas, outside)


def union(one: Box, other: Box) -> Box:
    """The smallest box that holds both."""
    return Box(
        min(one.left, other.left),
        min(one.top, other.top),
        max(one.right, other.right),
        max(one.bottom, other.bottom),
    )


def round_up(size: Size, multiple: int) -> Size:
    """The smallest size of whole multiples that holds ``size``."""
    return Size(math.ceil(size.width / multiple) * multiple, math.ceil(size.height / multiple) * multiple)


def _smaller(one: Size, other: Size) -> Size:
    return Size(min(one.width, other.width), min(one.height, other.height))


def _cover(size: Size, shape: Size) -> Size:
    """The smallest size with the aspect ratio of ``shape`` that holds ``size``."""
    return Size(
        max(size.width, math.ceil(size.height * shape.width / shape.height)),
        max(size.height, math.ceil(size.width * shape.height / shape.width)),
    )


def _scaled(extent: Size, canvas: Size) -> Size:
    """``extent`` at the largest scale that fits the canvas; all of the canvas where that hardly stretches it."""
    across, down = canvas.width / extent.width, canvas.height / extent.height
    if abs(across / down - 1) < STRETCH:
        return canvas
    scale = min(across, down)
    return Size(max(round(extent.width * scale), 1), max(round(extent.height * scale), 1))


def _resize_part(pictures: Tensor, part: tuple[float, float], size: Size) -> Tensor:
    """The top left ``part`` (width, height) of images [B, H, W, C] at another size, as ``images.resize`` does it for
    whole pixels; 0..1."""
    planes = pictures.detach().cpu().permute(0, 3, 1, 2)
    result = torch.empty(*planes.shape[:2], size.height, size.width)
    for plane, target in zip(planes.flatten(0, 1), result.flatten(0, 1), strict=True):
        resized = Image.fromarray(plane.contiguous().numpy()).resize(size, Image.Resampling.BICUBIC, (0, 0, *part))
        target.copy_(torch.from_numpy(np.array(resized)))
    return result.clamp(0, 1).permute(0, 2, 3, 1).to(pictures)


def _place(wanted: tuple[int, int], must: tuple[int, int], side: int, available: int) -> int:
    """Where a box of ``side`` starts along one axis: centred on ``wanted`` as far as it holds ``must``, and moved into
    0..available, or around all of that where it is the longer."""
    start = (wanted[0] + wanted[1] - side) // 2
    start = max(must[1] - side, min(start, must[0]))
    low, high = sorted((0, available - side))
    return max(low, min(start, high))
