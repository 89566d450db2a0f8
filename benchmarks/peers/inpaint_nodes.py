"""comfyui-inpaint-nodes."""

from __future__ import annotations

from torch import Tensor

from .comfy import call
from .contestant import Contestant

PACK = "inpaint-nodes"


class InpaintNodes(Contestant):
    name = "inpaint-nodes"

    def grow(self, mask: Tensor, pixels: int) -> Tensor:
        return call("INPAINT_ExpandMask", mask=mask, grow=pixels, blur=0, blur_type="gaussian")[0]

    def shrink(self, mask: Tensor, pixels: int) -> Tensor:
        return call("INPAINT_ShrinkMask", mask=mask, shrink=pixels, blur=0, blur_type="gaussian")[0]

    def prepare(self, mask: Tensor) -> Tensor:
        return call("INPAINT_ExpandMask", mask=mask)[0]

    def join(self, original: Tensor, painted: Tensor, mask: Tensor, *, feather: int) -> Tensor:
        matched = self.match_color(painted, original, mask)
        if feather:
            mask = call("INPAINT_ExpandMask", mask=mask, grow=feather // 2, blur=feather // 2 | 1)[0]
        return call("ImageCompositeMasked", destination=original, source=matched, x=0, y=0, mask=mask)[0]

    def match_color(self, target: Tensor, reference: Tensor, excluded: Tensor) -> Tensor:
        return call("INPAINT_ColorMatch", target=target, reference=reference, exclude_mask=excluded, strength=1.0)[0]

    def fill(self, image: Tensor, mask: Tensor) -> Tensor:
        return call("INPAINT_MaskedFill", image=image, mask=mask, fill="neutral", falloff=0)[0]

    def bounding_box(self, mask: Tensor) -> None:
        call("INPAINT_MaskBoundingBox", mask=mask)
