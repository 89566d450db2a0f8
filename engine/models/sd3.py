"""Stable Diffusion 3 Medium, 3.5 Medium and 3.5 Large, painting with a mask (Esser et al. 2024, arXiv 2403.03206).

Two CLIP text encoders, read one layer before their last without the final norm and joined along the width, are followed
along the tokens by T5, or by zeros where the model was loaded without it; both pooled states join the timestep.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..host import Host, ManagedModule, Role
from ..memory import MIB
from ..types import InputError
from .diffusers_model import DiffusersModel, Embedding, Rows, per_row
from .family import Components, Config, Family, Part, State, by_variant
from .parts import VAE, build_projected_clip, clip_layer, clip_tokenizer, find_embeddings, read_projected_clip
from .protocol import Canvas, Conditioning, ModelFacts, PromptSyntax
from .sdxl import PENULTIMATE, TextReader, vae_precision
from .t5 import T5Reader, t5_part, t5_tokenizer
from .transformer_layouts import SD3_MARK, sd3_layout

T5_TOKENS = 256
"""Of T5, the padding included, as in diffusers' pipelines."""


class SD3Model(DiffusersModel):
    """CLIP text encoders, T5 or not, and an SD3Transformer2DModel."""

    denoiser_bytes = 1.5 * 255 * MIB / (1024 * 1024 * 2)

    def __init__(
        self,
        facts: ModelFacts,
        *,
        clips: tuple[TextReader, TextReader],
        t5: T5Reader | None,
        denoiser: ManagedModule,
        vae: ManagedModule,
        host: Host,
    ) -> None:
        super().__init__(facts, denoiser=denoiser, vae=vae, host=host)
        self.clips = clips
        self.t5 = t5
        config: Any = denoiser.module.config
        self._width = int(config.joint_attention_dim)
        self._largest = int(config.pos_embed_max_size) * facts.multiple

    @property
    def latent_shift(self) -> Tensor:
        """What is taken from the VAE's latents, at the scale of the network's."""
        return self._shift_factor * self._scaling_factor

    def _encode(self, prompts: Sequence[str], syntax: PromptSyntax) -> list[Embedding]:
        first, second = (reader.read(prompts, syntax) for reader in self.clips)
        if self.t5 is None:
            zeros = pipeline_zeros() if syntax is PromptSyntax.PLAIN else T5_TOKENS
            t5 = [torch.zeros(1, zeros, self._width)] * len(prompts)
        else:
            t5 = self.t5.read(prompts, syntax)
        embeddings = []
        for large, huge, words in zip(first, second, t5, strict=True):
            # an embedding made for one encoder alone may fill a chunk that the other has not
            length = min(large.tokens.shape[1], huge.tokens.shape[1])
            clip = torch.cat([large.tokens[:, :length], huge.tokens[:, :length]], dim=-1)
            tokens = torch.cat([F.pad(clip, (0, self._width - clip.shape[-1])), words], dim=1)
            embeddings.append(Embedding(tokens, torch.cat([large.pooled, huge.pooled], dim=-1)))
        return embeddings

    def _rows(self, state: Tensor, canvas: Canvas) -> Rows:
        """The state [N, 16, h, w]; raises InputError for a canvas that the network has no places for."""
        if max(canvas.size) > self._largest:
            raise InputError(
                f"The canvas is {canvas.size}, and {self.facts.name} has places for {self._largest} pixels a side: let"
                " the picture be cropped around the mask, or make it smaller."
            )
        return (state,)

    def _denoise(self, rows: Rows, timestep: Tensor, embedding: Embedding) -> Tensor:
        (state,) = rows
        assert embedding.pooled is not None
        network: Any = self.denoiser.module
        output: Tensor = network(
            hidden_states=state,
            timestep=timestep.to(state.device).expand(len(state)),
            encoder_hidden_states=per_row(embedding.tokens, state),
            pooled_projections=per_row(embedding.pooled, state),
            return_dict=False,
        )[0]
        return output.float()


@functools.cache
def pipeline_zeros() -> int:
    """Tokens that diffusers' pipeline puts where T5's would be, without a T5: 77 in 0.35, as many as T5's later."""
    from diffusers import StableDiffusion3InpaintPipeline

    pipeline: Any = SimpleNamespace(
        text_encoder_3=None,
        tokenizer_max_length=77,
        transformer=SimpleNamespace(config=SimpleNamespace(joint_attention_dim=1)),
    )
    embed: Any = StableDiffusion3InpaintPipeline._get_t5_prompt_embeds
    zeros = embed(pipeline, [""], max_sequence_length=T5_TOKENS, device=torch.device("cpu"), dtype=torch.float32)
    return int(zeros.shape[1])


def build_transformer(config: Config) -> nn.Module:
    from diffusers import SD3Transformer2DModel

    module: nn.Module = SD3Transformer2DModel.from_config(dict(config))
    return module


def read_transformer(state: State, config: Config) -> dict[str, Tensor]:
    """From the layout of the first release or diffusers'."""
    if SD3_MARK not in state:
        return dict(state)
    width = config["num_attention_heads"] * config["attention_head_dim"]
    return sd3_layout(config).convert(state, width)


def sd3_facts(components: Components) -> ModelFacts:
    transformer = components.configs["transformer"]
    return ModelFacts(
        name=components.name,
        conditioning=Conditioning.REPLACE,
        native_size=transformer["sample_size"] * components.downscale,
        scheduler_config={
            **components.scheduler,
            "prediction_type": "flow_prediction",
            "timestep_spacing": "linspace",
        },
        latent_channels=components.configs["vae"]["latent_channels"],
        downscale=components.downscale,
        multiple=components.downscale * transformer["patch_size"],
    )


def make(components: Components) -> DiffusersModel:
    def reader(part: Part, key: str) -> TextReader:
        return TextReader(
            components.modules[part.name],
            clip_tokenizer(components, part.name),
            find_embeddings(components, part.name, key),
            clip_layer(components, part.name, PENULTIMATE),
        )

    t5 = components.modules.get(T5.name)
    return SD3Model(
        sd3_facts(components),
        clips=(reader(CLIP_L, "clip_l"), reader(CLIP_G, "clip_g")),
        t5=None if t5 is None else T5Reader(t5, t5_tokenizer(components, T5.name), T5_TOKENS),
        denoiser=components.modules["transformer"],
        vae=components.modules["vae"],
        host=components.host,
    )


def _clip(name: str, key: str) -> Part:
    prefix = f"text_encoders.{key}.transformer."
    return Part(name, Role.TEXT_ENCODER, "clip_text_model", build_projected_clip, read_projected_clip, (prefix,))


CLIP_L = _clip("text_encoder", "clip_l")
CLIP_G = _clip("text_encoder_2", "clip_g")
T5 = replace(t5_part("text_encoder_3"), optional=True)
TRANSFORMER = Part("transformer", Role.DENOISER, "SD3Transformer2DModel", build_transformer, read_transformer)
SD3 = Family(
    "sd3",
    "Stable Diffusion 3 and 3.5",
    (TRANSFORMER, replace(VAE, precision=vae_precision), CLIP_L, CLIP_G, T5),
    by_variant({"3-medium": "sd3-medium", "3.5-medium": "sd35-medium", "3.5-large": "sd35-large"}),
    make,
    ("flow_prediction",),
)
