"""Stable Diffusion XL and its inpainting model (Podell et al., SDXL, arXiv 2307.01952).

Two text encoders are read one layer before their last, without the final norm, and joined along the width; the pooled
state of the second and six numbers of size and place, the micro-conditioning of section 2.2, join the timestep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..host import Host, ManagedModule, Role
from ..prompts import EmbeddingFinder, PromptStates, TextLayer, encode_prompts
from . import ldm
from .diffusers_model import RESERVE, DiffusersModel, Embedding, Rows, per_row
from .family import Components, Config, Family, Part, SizeConditioning, by_variant
from .parts import (
    UNET,
    VAE,
    build_clip,
    build_projected_clip,
    clip_layer,
    clip_tokenizer,
    find_embeddings,
    read_clip,
    read_projected_clip,
)
from .protocol import Canvas, ModelFacts, Place, PromptSyntax
from .stable_diffusion import unet_facts

PENULTIMATE = TextLayer(from_end=2, normed=False)


@dataclass(frozen=True)
class TextReader:
    """A CLIP text encoder and how it is read."""

    encoder: ManagedModule
    tokenizer: Any
    find_embedding: EmbeddingFinder
    layer: TextLayer = PENULTIMATE

    def read(self, prompts: Sequence[str], syntax: PromptSyntax) -> list[PromptStates]:
        """The states of each prompt, on the CPU."""
        device = self.encoder.load(RESERVE)
        states = encode_prompts(
            prompts, self.tokenizer, self.encoder.module, device, syntax, self.find_embedding, self.layer
        )
        return [PromptStates(state.tokens.cpu(), state.pooled.cpu()) for state in states]


class SDXLModel(DiffusersModel):
    """SDXL with 4 or 9 channels."""

    denoiser_bytes = 1.5 * 158 * 2**20 / (1024 * 1024 * 2)

    def __init__(
        self,
        facts: ModelFacts,
        *,
        readers: tuple[TextReader, TextReader],
        denoiser: ManagedModule,
        vae: ManagedModule,
        host: Host,
        size_conditioning: SizeConditioning = SizeConditioning.CANVAS,
    ) -> None:
        super().__init__(facts, denoiser=denoiser, vae=vae, host=host)
        self.readers = readers
        self.size_conditioning = size_conditioning

    def _encode(self, prompts: Sequence[str], syntax: PromptSyntax) -> list[Embedding]:
        first, second = (reader.read(prompts, syntax) for reader in self.readers)
        return [_join(*states) for states in zip(first, second, strict=True)]

    def _rows(self, state: Tensor, canvas: Canvas) -> Rows:
        """The latents, and of each picture the micro-conditioning [N, 6]."""
        return (*super()._rows(state, canvas), self._time_ids(canvas))

    def _time_ids(self, canvas: Canvas) -> Tensor:
        if self.size_conditioning is SizeConditioning.PICTURE and canvas.places:
            return torch.tensor([place_ids(place) for place in canvas.places])
        width, height = canvas.size
        return torch.tensor([[height, width, 0, 0, height, width]] * len(canvas.noise), dtype=torch.float32)

    def _denoise(self, rows: Rows, timestep: Tensor, embedding: Embedding) -> Tensor:
        latents, time_ids = rows
        assert embedding.pooled is not None
        added = {"text_embeds": per_row(embedding.pooled, latents), "time_ids": time_ids}
        return self.denoiser.module(
            latents,
            timestep.to(latents.device),
            per_row(embedding.tokens, latents),
            added_cond_kwargs=added,
            return_dict=False,
        )[0].float()


def _join(first: PromptStates, second: PromptStates) -> Embedding:
    # an embedding made for one encoder alone may fill a chunk that the other has not
    length = min(first.tokens.shape[1], second.tokens.shape[1])
    return Embedding(torch.cat([first.tokens[:, :length], second.tokens[:, :length]], dim=-1), second.pooled)


def place_ids(place: Place) -> list[float]:
    """Original height and width, top and left of the crop, height and width of the canvas.

    As in training, the original size is the picture's own, and the crop is measured after the picture was resized so
    that the crop fills the canvas.
    """
    plan, canvas = place.plan, place.plan.canvas
    around = plan.outside.padding if plan.outside is not None else None
    top = max(plan.box.top - (around.top if around else 0), 0) * plan.scaled.height / plan.extent.height
    left = max(plan.box.left - (around.left if around else 0), 0) * plan.scaled.width / plan.extent.width
    return [float(n) for n in (place.picture.height, place.picture.width, top, left, canvas.height, canvas.width)]


def vae_precision(config: Config, dtype: torch.dtype) -> torch.dtype:
    """SDXL's VAE overflows in half precision, and says so; the repaired ones say that they do not."""
    return torch.float32 if dtype is torch.float16 and config.get("force_upcast", True) else dtype


def make(components: Components) -> DiffusersModel:
    def reader(part: Part, key: str) -> TextReader:
        return TextReader(
            components.modules[part.name],
            clip_tokenizer(components, part.name),
            find_embeddings(components, part.name, key),
            clip_layer(components, part.name, PENULTIMATE),
        )

    return SDXLModel(
        unet_facts(components),
        readers=(reader(CLIP_L, "clip_l"), reader(CLIP_G, "clip_g")),
        denoiser=components.modules["unet"],
        vae=components.modules["vae"],
        host=components.host,
        size_conditioning=components.options.size_conditioning,
    )


CLIP_L = Part("text_encoder", Role.TEXT_ENCODER, "clip_text_model", build_clip, read_clip, (ldm.SDXL_CLIP_PREFIX,))
CLIP_G = Part(
    "text_encoder_2",
    Role.TEXT_ENCODER,
    "clip_text_model",
    build_projected_clip,
    read_projected_clip,
    (ldm.SDXL_OPEN_CLIP_PREFIX,),
)
SDXL = Family(
    "sdxl",
    "SDXL",
    (UNET, replace(VAE, precision=vae_precision), CLIP_L, CLIP_G),
    by_variant({"": "sdxl", "inpaint": "sdxl-inpaint"}),
    make,
)
