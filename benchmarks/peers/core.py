"""ComfyUI without packs."""

from __future__ import annotations

import torch
from torch import Tensor

from .comfy import call, load_builtin
from .contestant import Contestant, Edit, NotOfferedError, Sides


class _Vae:
    """As much of a VAE as the nodes ask for: it crops to whole cells, and remembers what it was shown."""

    def __init__(self) -> None:
        self.shown = torch.empty(0)

    def spacial_compression_encode(self) -> int:
        return 8

    def encode(self, pixels: Tensor) -> Tensor:
        self.shown = pixels
        return torch.zeros(1, 4, pixels.shape[1] // 8, pixels.shape[2] // 8)


class Core(Contestant):
    name = "ComfyUI"

    def __init__(self) -> None:
        load_builtin("nodes_mask")

    def grow(self, mask: Tensor, pixels: int) -> Tensor:
        return call("GrowMask", mask=mask, expand=pixels)[0]

    def shrink(self, mask: Tensor, pixels: int) -> Tensor:
        return self.grow(mask, -pixels)

    def sampler_mask(self, mask: Tensor) -> Tensor:
        import comfy.sampler_helpers

        latents = (1, 4, mask.shape[1] // 8, mask.shape[2] // 8)
        return comfy.sampler_helpers.prepare_mask(mask[:, None], latents, "cpu")

    def through_vae(self, image: Tensor, mask: Tensor, codec: Edit) -> Tensor:
        # what the sampler does not touch comes out of the VAE as it went in
        vae = _Vae()
        nothing = [[torch.zeros(1, 1), {}]]
        call("InpaintModelConditioning", positive=nothing, negative=nothing, pixels=image, vae=vae, mask=mask)
        height, width = vae.shown.shape[1:3]
        return codec(image[:, :height, :width])

    def join(self, original: Tensor, painted: Tensor, mask: Tensor, *, feather: int) -> Tensor:
        if feather:
            raise NotOfferedError
        return call("ImageCompositeMasked", destination=original, source=painted, x=0, y=0, mask=mask)[0]

    def pad(self, image: Tensor, sides: Sides, feather: int) -> tuple[Tensor, Tensor]:
        padded, mask = call("ImagePadForOutpaint", image=image, **vars(sides), feathering=feather)
        return padded, mask[None] if mask.ndim == 2 else mask


class CoreEncodeForInpaint(Contestant):
    """VAE Encode (for Inpainting), which grows its mask itself."""

    name = "ComfyUI VAEEncodeForInpaint"

    def grow(self, mask: Tensor, pixels: int) -> Tensor:
        image = torch.zeros(*mask.shape, 3)
        (latent,) = call("VAEEncodeForInpaint", pixels=image, vae=_Vae(), mask=mask, grow_mask_by=pixels)
        return latent["noise_mask"][0]
