"""Models made of diffusers and transformers modules, behind the InpaintModel protocol."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..host import Host, ManagedModule
from ..prompts import EmbeddingFinder, encode_prompts
from ..schedulers import Level
from ..types import Size
from .protocol import Canvas, Conditioning, Denoiser, Guidance, ModelFacts, Posterior, PromptSyntax

MIB = 2**20
DENOISER_BYTES = 1.5 * 65 * MIB / (512 * 512 * 2)
"""Activations of the denoiser per sample, pixel and byte of precision: 1.5 times the live tensors of SD 1.5."""
VAE_ENCODE_BYTES = 1767
VAE_DECODE_BYTES = 2178
"""Activations of the VAE per pixel and byte of precision."""
RESERVE = 300 * MIB
"""Left alone when a batch is sized: kernels' workspaces and the allocator's slack."""
REMEMBERED_PROMPTS = 16

Rows = tuple[Tensor, ...]
"""What the network reads beside timestep and prompt, a row for each picture; the latents come first."""


@dataclass(frozen=True)
class Embedding:
    """A prompt as the text encoders leave it, float32 on the CPU."""

    tokens: Tensor
    """[1, tokens, width]."""
    pooled: Tensor | None = None
    """[1, width]: the whole prompt as one vector, for networks that read one."""


class DiffusersModel(ABC):
    """An InpaintModel made of text encoders, a denoising network and an AutoencoderKL.

    Families differ in how a prompt is encoded and in what their network reads: ``_encode`` and ``_denoise``.
    """

    notices: tuple[str, ...] = ()
    """What should be known of how it was loaded."""

    def __init__(self, facts: ModelFacts, *, denoiser: ManagedModule, vae: ManagedModule, host: Host) -> None:
        config: Any = vae.module.config
        self.facts = replace(facts, latent_format=latent_format(config))
        self.denoiser = denoiser
        self.vae = vae
        self._host = host
        self._scaling_factor = float(config.scaling_factor)
        self._shift_factor = float(config.get("shift_factor") or 0.0)
        self._prompts: OrderedDict[tuple[str, PromptSyntax], Embedding] = OrderedDict()

    @abstractmethod
    def _encode(self, prompts: Sequence[str], syntax: PromptSyntax) -> list[Embedding]:
        """Each prompt through the text encoders, once."""

    @abstractmethod
    def _denoise(self, rows: Rows, timestep: Tensor, embedding: Embedding) -> Tensor:
        """The network's output [N, C, h, w] in float32 for one branch."""

    def encode_prompt(self, prompts: Sequence[str], syntax: PromptSyntax) -> list[Embedding]:
        """See InpaintModel. Recent prompts are remembered, so that a new seed does not reload the text encoder."""
        unknown = [p for p in dict.fromkeys(prompts) if (p, syntax) not in self._prompts]
        fresh = dict(zip(unknown, self._encode(unknown, syntax), strict=True)) if unknown else {}
        result = [fresh[p] if p in fresh else self._prompts[p, syntax] for p in prompts]
        for prompt, embedding in fresh.items():
            # a textual-inversion file may change between runs
            if "embedding:" not in prompt:
                self._prompts[prompt, syntax] = embedding
        while len(self._prompts) > REMEMBERED_PROMPTS:
            self._prompts.popitem(last=False)
        return result

    def encode_image(self, pixels: Tensor) -> Posterior:
        def encode(part: Tensor) -> Tensor:
            distribution = self.vae.module.encode(part).latent_dist  # type: ignore[operator]
            return torch.stack([distribution.mean, distribution.std]).float()

        per_row = VAE_ENCODE_BYTES * pixels.shape[-2] * pixels.shape[-1] * self.vae.dtype.itemsize
        mean, std = torch.cat(self._in_parts(self.vae, per_row, encode, (pixels,)), dim=1)
        return Posterior((mean - self._shift_factor) * self._scaling_factor, std * self._scaling_factor)

    def decode(self, latents: Tensor) -> Tensor:
        def decode(part: Tensor) -> Tensor:
            # many finished pictures are too large to wait for each other beside the network
            return self.vae.module.decode(part, return_dict=False)[0].float().cpu()  # type: ignore[operator]

        area = latents.shape[-2] * latents.shape[-1] * self.facts.downscale**2
        per_row = VAE_DECODE_BYTES * area * self.vae.dtype.itemsize
        raw = latents / self._scaling_factor + self._shift_factor
        return torch.cat(self._in_parts(self.vae, per_row, decode, (raw,)))

    def rows_at_once(self, canvas: Size) -> int:
        """See InpaintModel: any number, each evaluation is split to fit."""
        return sys.maxsize

    def sample(
        self, canvas: Canvas, levels: Sequence[Level], guidance: Guidance, loop: Callable[[Denoiser], Tensor]
    ) -> Tensor:
        """See InpaintModel. Splits the batch where memory is short."""

        def denoiser(state: Tensor, timestep: Tensor, level: Level) -> Tensor:
            return self._predict(self._rows(state, canvas), timestep, guidance)

        return loop(denoiser)

    def _rows(self, state: Tensor, canvas: Canvas) -> Rows:
        """Here the latents [N, 4 or 9, h, w]."""
        if self.facts.conditioning is Conditioning.REPLACE:
            return (state,)
        assert canvas.masked_image is not None
        return (torch.cat([state, canvas.expand(canvas.mask), canvas.expand(canvas.masked_image)], dim=1),)

    def _predict(self, rows: Rows, timestep: Tensor, guidance: Guidance) -> Tensor:
        area = rows[0].shape[-2] * rows[0].shape[-1] * self.facts.downscale**2
        branches = 1 if guidance.negative is None else 2
        per_row = int(DENOISER_BYTES * area * self.denoiser.dtype.itemsize) * branches

        def guided(*part: Tensor) -> Tensor:
            return self._guided(part, timestep, guidance)

        return torch.cat(self._in_parts(self.denoiser, per_row, guided, rows))

    def _guided(self, rows: Rows, timestep: Tensor, guidance: Guidance) -> Tensor:
        """Classifier-free guidance: u + scale * (c - u), both branches in one batch where their prompts are as long."""
        positive, negative = guidance.positive, guidance.negative
        if negative is None:
            return self._denoise(rows, timestep, positive)
        if positive.tokens.shape[1] == negative.tokens.shape[1]:
            both = _per_branch(negative, positive, len(rows[0]))
            twice = tuple(torch.cat([row, row]) for row in rows)
            unconditional, conditional = self._denoise(twice, timestep, both).chunk(2)
        else:
            unconditional = self._denoise(rows, timestep, negative)
            conditional = self._denoise(rows, timestep, positive)
        return unconditional + guidance.scale * (conditional - unconditional)

    def _in_parts(
        self, managed: ManagedModule, bytes_per_row: int, run: Callable[..., Tensor], rows: Rows
    ) -> list[Tensor]:
        """``run`` over as many rows at a time as memory allows, on the module's device and in its precision."""
        device = managed.load(bytes_per_row + RESERVE)
        at_once = max(1, min(len(rows[0]), (self._host.free_memory() - RESERVE) // bytes_per_row))
        parts = []
        for part in zip(*(row.split(at_once) for row in rows), strict=True):
            self._host.check_interrupt()
            parts.append(run(*(row.to(device=device, dtype=managed.dtype) for row in part)))
        return parts


class StableDiffusionModel(DiffusersModel):
    """Stable Diffusion 1 and 2: a CLIP text encoder and a UNet2DConditionModel."""

    def __init__(
        self,
        facts: ModelFacts,
        *,
        tokenizer: Any,
        text_encoder: ManagedModule,
        denoiser: ManagedModule,
        vae: ManagedModule,
        find_embedding: EmbeddingFinder,
        host: Host,
    ) -> None:
        super().__init__(facts, denoiser=denoiser, vae=vae, host=host)
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self._find_embedding = find_embedding

    def _encode(self, prompts: Sequence[str], syntax: PromptSyntax) -> list[Embedding]:
        device = self.text_encoder.load(RESERVE)
        states = encode_prompts(prompts, self.tokenizer, self.text_encoder.module, device, syntax, self._find_embedding)
        return [Embedding(state.cpu()) for state in states]

    def _denoise(self, rows: Rows, timestep: Tensor, embedding: Embedding) -> Tensor:
        (latents,) = rows
        tokens = per_row(embedding.tokens, latents)
        return self.denoiser.module(latents, timestep.to(latents.device), tokens, return_dict=False)[0].float()


LATENT_FORMATS = {(4, 0.18215): "SD15", (4, 0.13025): "SDXL", (16, 1.5305): "SD3", (16, 0.3611): "Flux"}
"""By channels and scaling factor, which every autoencoder has for itself."""


def latent_format(vae_config: Mapping[str, Any]) -> str | None:
    """See ModelFacts.latent_format."""
    if vae_config.get("latents_mean") is not None:
        return None
    return LATENT_FORMATS.get((vae_config["latent_channels"], round(float(vae_config["scaling_factor"]), 5)))


def _per_branch(negative: Embedding, positive: Embedding, rows: int) -> Embedding:
    """Both prompts, each for so many rows."""

    def both(first: Tensor, second: Tensor) -> Tensor:
        return torch.cat([first.expand(rows, *first.shape[1:]), second.expand(rows, *second.shape[1:])])

    pooled = None
    if negative.pooled is not None and positive.pooled is not None:
        pooled = both(negative.pooled, positive.pooled)
    return Embedding(both(negative.tokens, positive.tokens), pooled)


def per_row(embedding: Tensor, rows: Tensor) -> Tensor:
    """[1 or rows, ...] -> [rows, ...], where and as ``rows`` are."""
    return embedding.to(rows).expand(len(rows), *embedding.shape[1:])
