"""ComfyUI-Inpaint-CropAndStitch: Inpaint Crop and Inpaint Stitch, on either of their two code paths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .comfy import call
from .contestant import Contestant, Edit

PACK = "Inpaint-CropAndStitch"
CPU, GPU = "cpu (compatible)", "gpu (much faster)"


class CropAndStitch(Contestant):
    def __init__(self, mode: str) -> None:
        self.mode = mode
        self.name = f"CropAndStitch, {mode[:3].upper()} path"

    def grow(self, mask: Tensor, pixels: int) -> Tensor:
        return self._mask(mask, mask_fill_holes=False, mask_expand_pixels=pixels, mask_blend_pixels=0)

    def fill_holes(self, mask: Tensor) -> Tensor:
        return self._mask(mask, mask_fill_holes=True, mask_blend_pixels=0)

    def prepare(self, mask: Tensor) -> Tensor:
        return self._mask(mask)

    def crop(self, image: Tensor, mask: Tensor) -> Tensor:
        return self._crop(image, mask)[1]

    def crop_mask(self, mask: Tensor, feather: int) -> Tensor:
        black = torch.zeros(*mask.shape, 3)
        return self._crop(black, mask, mask_blend_pixels=feather, output_resize_to_target_size=False)[2]

    def round_trip(self, image: Tensor, mask: Tensor, edit: Edit, *, feather: int, target: int | None) -> Tensor:
        size = {"output_resize_to_target_size": False}
        if target is not None:
            size = {"output_target_width": target, "output_target_height": target}
        stitcher, crop, _ = self._crop(image, mask, mask_blend_pixels=feather, **size)
        return call("InpaintStitchImproved", stitcher=stitcher, inpainted_image=edit(crop))[0]

    def alpha(self, mask: Tensor, feather: int) -> Tensor:
        black = torch.zeros(*mask.shape, 3)
        return self.round_trip(black, mask, torch.ones_like, feather=feather, target=None)[0, ..., 0]

    def through_vae(self, image: Tensor, mask: Tensor, codec: Edit) -> Tensor:
        return self.round_trip(image, mask, codec, feather=32, target=512)

    def join(self, original: Tensor, painted: Tensor, mask: Tensor, *, feather: int) -> Tensor:
        # filling holes takes longest, and these masks have none
        settings = {
            "mask_blend_pixels": feather,
            "mask_fill_holes": False,
            "output_resize_to_target_size": False,
        }
        stitcher, _, _ = self._crop(original, mask, **settings)
        crop = self._crop(painted, mask, **settings)[1]
        return call("InpaintStitchImproved", stitcher=stitcher, inpainted_image=crop)[0]

    def other_path(self) -> Contestant:
        return CropAndStitch(GPU if self.mode == CPU else CPU)

    def _mask(self, mask: Tensor, **settings: Any) -> Tensor:
        """The mask after the crop node's preparation; its context is so wide that nothing is cut off."""
        black = torch.zeros(*mask.shape, 1).expand(-1, -1, -1, 3)
        everything = torch.ones_like(mask)
        settings = {"output_resize_to_target_size": False, "output_padding": "0", **settings}
        return self._crop(black, mask, optional_context_mask=everything, **settings)[2]

    def _crop(self, image: Tensor, mask: Tensor, **settings: Any) -> tuple[dict, Tensor, Tensor]:
        stitcher, crop, crop_mask = call(
            "InpaintCropImproved", image=image, mask=mask, device_mode=self.mode, **settings
        )
        return stitcher, crop, crop_mask
