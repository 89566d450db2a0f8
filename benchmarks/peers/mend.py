"""Mend itself, by the engine's functions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ...engine import masks
from ...engine.color import match_around
from ...engine.crop import CropOptions, Sizes
from ...engine.crop_stitch import crop_to_mask, stitch_crops
from ...engine.fill import FillMethod, fill
from ...engine.images import as_mask_batch
from ...engine.masks import MaskOptions
from ...engine.outpaint import Padding, pad
from ...engine.stitch import Blend, StitchOptions, stitch
from ...engine.types import Size
from .contestant import Contestant, Edit, Sides

AS_IT_IS = CropOptions(target=None)
"""Pixel for pixel."""
NODE_DEFAULTS = MaskOptions(fill_holes=True, grow=8, feather=8)
"""Of MendPrepareMask."""
ALPHA_ONLY = StitchOptions(blend=Blend.LINEAR, color_match=0)
"""A probe of black and white would be matched in colour and measure that."""


class Mend(Contestant):
    """With OpenCV where ComfyUI's Python has it."""

    name = "Mend"

    def grow(self, mask: Tensor, pixels: int) -> Tensor:
        return masks.grow(mask, pixels)

    def shrink(self, mask: Tensor, pixels: int) -> Tensor:
        return masks.grow(mask, -pixels)

    def fill_holes(self, mask: Tensor) -> Tensor:
        return masks.fill_holes(mask)

    def prepare(self, mask: Tensor) -> Tensor:
        return masks.prepare_masks(mask, NODE_DEFAULTS).stitch

    def sampler_mask(self, mask: Tensor) -> Tensor:
        return masks.to_latent_grid(masks.prepare_masks(mask, MaskOptions()).sampler, 8)

    def match_color(self, target: Tensor, reference: Tensor, excluded: Tensor) -> Tensor:
        return match_around(target, reference, excluded)

    def crop(self, image: Tensor, mask: Tensor) -> Tensor:
        return crop_to_mask(image, mask).crops[0]

    def crop_mask(self, mask: Tensor, feather: int) -> Tensor:
        black = torch.zeros(*mask.shape, 3)
        return crop_to_mask(black, mask, AS_IT_IS, stitch_mask=masks.feather(mask, feather)).masks[0]

    def round_trip(self, image: Tensor, mask: Tensor, edit: Edit, *, feather: int, target: int | None) -> Tensor:
        options = AS_IT_IS if target is None else CropOptions(target=Sizes((Size(target, target),)))
        return self._round_trip(image, mask, edit, feather, options, StitchOptions())

    def alpha(self, mask: Tensor, feather: int) -> Tensor:
        black = torch.zeros(*mask.shape, 3)
        return self._round_trip(black, mask, torch.ones_like, feather, AS_IT_IS, ALPHA_ONLY)[0, ..., 0]

    def through_vae(self, image: Tensor, mask: Tensor, codec: Edit) -> Tensor:
        return self._round_trip(image, mask, codec, 8, CropOptions(), StitchOptions())

    @staticmethod
    def _round_trip(
        image: Tensor, mask: Tensor, edit: Edit, feather: int, crop: CropOptions, options: StitchOptions
    ) -> Tensor:
        stitch_mask = masks.feather(as_mask_batch(mask), feather)
        cropped = crop_to_mask(image, mask, crop, stitch_mask=stitch_mask)
        return stitch_crops(cropped.record, [edit(crop) for crop in cropped.crops], options=options).images

    def pad(self, image: Tensor, sides: Sides, feather: int) -> tuple[Tensor, Tensor]:
        padded = pad(image, Padding(**vars(sides)), feather)
        return padded.image, padded.mask

    def join(self, original: Tensor, painted: Tensor, mask: Tensor, *, feather: int) -> Tensor:
        return stitch(original, painted, masks.feather(mask, feather)).images

    def fill(self, image: Tensor, mask: Tensor) -> Tensor:
        return fill(image, mask, FillMethod.NEUTRAL)

    def bounding_box(self, mask: Tensor) -> None:
        masks.bounding_box(mask)

    def other_path(self) -> Contestant:
        return MendWithScipy()


class MendWithScipy(Mend):
    """The same without OpenCV, as in a fresh ComfyUI."""

    name = "Mend, SciPy"


def _without_opencv(operation: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(operation)
    def run(*arguments: Any, **options: Any) -> Any:
        cv2 = sys.modules.get("cv2")
        sys.modules["cv2"] = None  # type: ignore[assignment]  # what makes an import fail
        try:
            return operation(*arguments, **options)
        finally:
            if cv2 is None:
                del sys.modules["cv2"]
            else:
                sys.modules["cv2"] = cv2

    return run


for _name, _operation in list(vars(Mend).items()):
    if callable(_operation) and _name != "other_path" and not _name.startswith("_"):
        setattr(MendWithScipy, _name, _without_opencv(_operation))
