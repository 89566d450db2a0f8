"""Stable Diffusion 1 and 2 as diffusers and transformers modules, behind the InpaintModel protocol."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..host import Host, ManagedModule
from ..prompts import EmbeddingFinder, encode_prompts
from .protocol import Guidance, ModelFacts, Posterior, PromptSyntax

MIB = 2**20
DENOISER_BYTES = 1.5 * 65 * MIB / (512 * 512 * 2)
"""Activations of the denoiser per sample, pixel and byte of precision: 1.5 times the live tensors of SD 1.5."""
VAE_ENCODE_BYTES = 1767
VAE_DECODE_BYTES = 2178
"""Activations of the VAE per pixel and byte of precision."""
RESERVE = 300 * MIB
"""Left alone when a batch is sized: kernels' workspaces and the allocator's slack."""
REMEMBERED_PROMPTS = 16


class DiffusersModel:
    """An InpaintModel made of a CLIP text encoder, a UNet2DConditionModel and an AutoencoderKL."""

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
        self.facts = facts
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.denoiser = denoiser
        self.vae = vae
        self._find_embedding = find_embedding
        self._host = host
        self._scaling_factor = float(vae.module.config.scaling_factor)  # type: ignore[union-attr, arg-type]
        self._prompts: OrderedDict[tuple[str, PromptSyntax], Tensor] = OrderedDict()

    def encode_prompt(self, prompts: Sequence[str], syntax: PromptSyntax) -> list[Tensor]:
        """See InpaintModel. Recent prompts are remembered, so that a new seed does not reload the text encoder."""
        unknown = [p for p in dict.fromkeys(prompts) if (p, syntax) not in self._prompts]
        fresh: dict[str, Tensor] = {}
        if unknown:
            device = self.text_encoder.load(RESERVE)
            embeddings = encode_prompts(
                unknown, self.tokenizer, self.text_encoder.module, device, syntax, self._find_embedding
            )
            # on the CPU like the remembered ones: a device mixed within one pair would not go into one batch
            fresh = {prompt: embedding.cpu() for prompt, embedding in zip(unknown, embeddings, strict=True)}
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
        parts = self._in_parts(self.vae, per_row, encode, pixels)
        mean, std = torch.cat(parts, dim=1) * self._scaling_factor
        return Posterior(mean, std)

    def decode(self, latents: Tensor) -> Tensor:
        def decode(part: Tensor) -> Tensor:
            # many finished pictures are too large to wait for each other beside the network
            return self.vae.module.decode(part, return_dict=False)[0].float().cpu()  # type: ignore[operator]

        area = latents.shape[-2] * latents.shape[-1] * self.facts.downscale**2
        per_row = VAE_DECODE_BYTES * area * self.vae.dtype.itemsize
        return torch.cat(self._in_parts(self.vae, per_row, decode, latents / self._scaling_factor))

    def predict(self, model_input: Tensor, timestep: Tensor, guidance: Guidance) -> Tensor:
        area = model_input.shape[-2] * model_input.shape[-1] * self.facts.downscale**2
        branches = 1 if guidance.negative is None else 2
        per_row = int(DENOISER_BYTES * area * self.denoiser.dtype.itemsize) * branches

        def guided(part: Tensor) -> Tensor:
            return self._guided(part, timestep, guidance)

        return torch.cat(self._in_parts(self.denoiser, per_row, guided, model_input))

    def _guided(self, rows: Tensor, timestep: Tensor, guidance: Guidance) -> Tensor:
        """Classifier-free guidance: u + scale * (c - u), both branches in one batch where their prompts are as long."""
        positive, negative = guidance.positive, guidance.negative
        if negative is None:
            return self._denoise(rows, timestep, positive)
        if positive.shape[1] == negative.shape[1]:
            both = torch.cat([_per_row(negative, rows), _per_row(positive, rows)])
            unconditional, conditional = self._denoise(torch.cat([rows, rows]), timestep, both).chunk(2)
        else:
            unconditional = self._denoise(rows, timestep, negative)
            conditional = self._denoise(rows, timestep, positive)
        return unconditional + guidance.scale * (conditional - unconditional)

    def _denoise(self, rows: Tensor, timestep: Tensor, embeddings: Tensor) -> Tensor:
        embeddings = _per_row(embeddings, rows).to(rows)
        output = self.denoiser.module(rows, timestep.to(rows.device), embeddings, return_dict=False)[0]
        return output.float()

    def _in_parts(
        self, managed: ManagedModule, bytes_per_row: int, run: Callable[[Tensor], Tensor], rows: Tensor
    ) -> list[Tensor]:
        """``run`` over as many rows at a time as memory allows, on the module's device and in its precision."""
        device = managed.load(bytes_per_row + RESERVE)
        at_once = max(1, min(len(rows), (self._host.free_memory() - RESERVE) // bytes_per_row))
        parts = []
        for part in rows.split(at_once):
            self._host.check_interrupt()
            parts.append(run(part.to(device=device, dtype=managed.dtype)))
        return parts


def _per_row(embeddings: Tensor, rows: Tensor) -> Tensor:
    """[1, tokens, width] -> [rows, tokens, width]; already per row stays."""
    return embeddings if len(embeddings) == len(rows) else embeddings.expand(len(rows), -1, -1)
