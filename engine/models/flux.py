"""FLUX.1: dev and schnell with a mask, and Fill, which was trained to inpaint.

The network reads patches of 2x2 latent cells as tokens. Fill's tokens are longer: behind the state come the latents of
the picture with a hole, and the mask, all 16x16 pixels of it. The mask has to be black and white, as in training.

The guidance scale is an input of the network: 30 suits Fill and 3.5 dev. schnell has none, takes 4 steps and ignores
it. There is no negative prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..host import Host, ManagedModule, Role
from ..memory import MIB
from ..prompts import LAST_LAYER
from .diffusers_model import DiffusersModel, Embedding, Rows, per_row
from .family import Components, Config, Family, Part, State, brain_float, by_variant
from .parts import VAE, build_clip, clip_tokenizer, find_embeddings, read_clip
from .protocol import Canvas, Conditioning, Guidance, ModelFacts, PromptSyntax
from .sdxl import TextReader, vae_precision
from .t5 import T5Reader, t5_part, t5_tokenizer
from .transformer_layouts import FLUX_MARK, flux_layout

PATCH = 2
"""Latent cells along a token's side."""
T5_TOKENS = 512
SCHNELL_T5_TOKENS = 256
"""Of T5, the padding included, that the networks were trained with."""
FILL_GUIDANCE = 30.0
FILL_CHANNELS = 384
NATIVE_SIZE = 1024


def pack(planes: Tensor) -> Tensor:
    """[N, C, h, w] -> tokens [N, h/2 * w/2, 4 * C]."""
    return F.pixel_unshuffle(planes, PATCH).flatten(2).transpose(1, 2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of ``pack``, for planes of ``height`` x ``width`` cells."""
    patches = tokens.transpose(1, 2).unflatten(2, (height // PATCH, width // PATCH))
    return F.pixel_shuffle(patches, PATCH)


def mask_channels(hole: Tensor, downscale: int) -> Tensor:
    """A mask in pixels [N, 1, H, W] as planes of latent cells, a channel for each pixel of a cell."""
    return F.pixel_unshuffle(hole, downscale)


def token_places(height: int, width: int) -> Tensor:
    """What FLUX's rotary embedding reads of each token of a ``height`` x ``width`` latent picture: 0, row, column."""
    rows, columns = torch.meshgrid(torch.arange(height // PATCH), torch.arange(width // PATCH), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).float()


class FluxModel(DiffusersModel):
    """A CLIP text encoder for the prompt as a whole, T5 for its words, and a FluxTransformer2DModel."""

    denoiser_bytes = 1.5 * 471 * MIB / (1024 * 1024 * 2)

    def __init__(
        self,
        facts: ModelFacts,
        *,
        clip: TextReader,
        t5: T5Reader,
        denoiser: ManagedModule,
        vae: ManagedModule,
        host: Host,
    ) -> None:
        super().__init__(facts, denoiser=denoiser, vae=vae, host=host)
        self.clip = clip
        self.t5 = t5

    def _encode(self, prompts: Sequence[str], syntax: PromptSyntax) -> list[Embedding]:
        """T5's states of the words; CLIP's state at the end token, normed and not projected, of the whole."""
        whole = self.clip.read(prompts, syntax)
        # diffusers' pipelines pad to 512 whatever the network
        words = self.t5.read(prompts, syntax, T5_TOKENS if syntax is PromptSyntax.PLAIN else self.t5.length)
        return [Embedding(tokens, state.pooled) for tokens, state in zip(words, whole, strict=True)]

    def _rows(self, state: Tensor, canvas: Canvas) -> Rows:
        """The state [N, 16, h, w]; for Fill also the picture with a hole and the mask, [N, 16 + 64, h, w]."""
        if self.facts.conditioning is Conditioning.REPLACE:
            return (state,)
        assert canvas.masked_image is not None
        mask = mask_channels(canvas.hole, self.facts.downscale)
        return state, torch.cat([canvas.expand(canvas.masked_image), canvas.expand(mask)], dim=1)

    def _guided(self, rows: Rows, timestep: Tensor, guidance: Guidance, apart: bool = False) -> Tensor:
        return self._denoise(rows, timestep, guidance.positive, guidance.scale)

    def _denoise(self, rows: Rows, timestep: Tensor, embedding: Embedding, guidance_scale: float = 1.0) -> Tensor:
        state = rows[0]
        height, width = state.shape[-2:]
        assert embedding.pooled is not None
        network: Any = self.denoiser.module
        output = network(
            hidden_states=pack(torch.cat(rows, dim=1)),
            timestep=(timestep / 1000).to(state).expand(len(state)),
            guidance=state.new_full((len(state),), guidance_scale) if network.config.guidance_embeds else None,
            pooled_projections=per_row(embedding.pooled, state),
            encoder_hidden_states=per_row(embedding.tokens, state),
            txt_ids=state.new_zeros(embedding.tokens.shape[1], 3),
            img_ids=token_places(height, width).to(state),
            return_dict=False,
        )[0]
        return unpack(output, height, width).float()


def build_transformer(config: Config) -> nn.Module:
    from diffusers import FluxTransformer2DModel

    module: nn.Module = FluxTransformer2DModel.from_config(dict(config))
    return module


def read_transformer(state: State, config: Config) -> dict[str, Tensor]:
    """From the layout of the first release or diffusers'."""
    if FLUX_MARK not in state:
        return dict(state)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return flux_layout(config).convert(state, width)


def flux_facts(components: Components) -> ModelFacts:
    transformer = components.configs["transformer"]
    fill = transformer["in_channels"] == FILL_CHANNELS
    return ModelFacts(
        name=components.name,
        conditioning=Conditioning.CONCAT if fill else Conditioning.REPLACE,
        native_size=NATIVE_SIZE,
        scheduler_config={
            **components.scheduler,
            "prediction_type": "flow_prediction",
            "timestep_spacing": "trailing",
        },
        latent_channels=components.configs["vae"]["latent_channels"],
        downscale=components.downscale,
        multiple=components.downscale * PATCH,
        embedded_guidance=True,
        usual_guidance=FILL_GUIDANCE if fill else None,
    )


def make(components: Components) -> DiffusersModel:
    guided = components.configs["transformer"].get("guidance_embeds", False)
    return FluxModel(
        flux_facts(components),
        clip=TextReader(
            components.modules[CLIP.name],
            clip_tokenizer(components, CLIP.name),
            find_embeddings(components, CLIP.name, "clip_l"),
            LAST_LAYER,
        ),
        t5=T5Reader(
            components.modules[T5.name],
            t5_tokenizer(components, T5.name),
            T5_TOKENS if guided else SCHNELL_T5_TOKENS,
        ),
        denoiser=components.modules["transformer"],
        vae=components.modules["vae"],
        host=components.host,
    )


TRANSFORMER = Part(
    "transformer",
    Role.DENOISER,
    "FluxTransformer2DModel",
    build_transformer,
    read_transformer,
    precision=brain_float,
)
CLIP = Part(
    "text_encoder",
    Role.TEXT_ENCODER,
    "clip_text_model",
    build_clip,
    read_clip,
    ("text_encoders.clip_l.transformer.",),
)
T5 = t5_part("text_encoder_2")
FLUX = Family(
    "flux",
    "FLUX.1 (dev, schnell, Fill)",
    (TRANSFORMER, replace(VAE, precision=vae_precision), CLIP, T5),
    by_variant({"dev": "flux-dev", "schnell": "flux-schnell", "fill": "flux-fill"}),
    make,
    ("flow_prediction",),
)
