"""Mend itself, by the engine's functions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor

from ...engine import masks
from ...engine.fill import FillMethod, fill
from ...engine.masks import MaskOptions
from ...engine.outpaint import Padding, pad
from ...engine.stitch import Blend, StitchOptions, stitch
from .contestant import Contestant, Sides

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
        return masks.prepare(mask, MaskOptions(fill_holes=True, grow=8, feather=8))

    def sampler_mask(self, mask: Tensor) -> Tensor:
        return masks.to_latent_grid(mask, 8)

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
    if callable(_operation) and _name != "other_path":
        setattr(MendWithScipy, _name, _without_opencv(_operation))
