"""What the engine asks of a model that inpaints: encode, predict, decode, and a few facts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol

import torch
from torch import Tensor


class Conditioning(str, Enum):
    """How the picture outside the mask reaches the denoiser."""

    CONCAT = "concat"
    """9 input channels: latents, mask, masked image's latents; the network was trained to inpaint."""
    REPLACE = "replace"
    """4 input channels: an ordinary network; the kept area is put back, noised, after every step."""


class PromptSyntax(str, Enum):
    COMFY = "comfy"
    """ComfyUI's CLIPTextEncode: (word:1.2) emphasis, embedding:name, any length in chunks of 75."""
    PLAIN = "plain"
    """diffusers: literal text, truncated to 77 tokens."""


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What the engine must know of a model before it runs."""

    name: str
    """For messages and metadata: the file's or folder's name."""
    conditioning: Conditioning
    native_size: int
    """Pixels: the side of the square the network was trained on, e.g. 512."""
    scheduler_config: Mapping[str, Any]
    """The checkpoint's scheduler_config.json: betas, prediction_type, steps_offset, ..."""
    latent_channels: int = 4
    downscale: int = 8
    """Pixels per latent cell, along one axis."""

    @property
    def prediction_type(self) -> str:
        """ "epsilon" or "v_prediction"."""
        return str(self.scheduler_config.get("prediction_type", "epsilon"))


@dataclass(frozen=True)
class Posterior:
    """The VAE's Gaussian over latents, scaled as the denoiser wants them; each [B, C, h, w]."""

    mean: Tensor
    std: Tensor

    def sample(self, generator: torch.Generator) -> Tensor:
        """One draw, made on the generator's device: mean + std * noise."""
        noise = torch.randn(self.mean.shape, generator=generator, device=generator.device, dtype=self.mean.dtype)
        return self.mean + self.std * noise.to(self.mean.device)


@dataclass(frozen=True)
class Guidance:
    """Prompt embeddings, each [1, tokens, width], and the classifier-free guidance scale (Ho & Salimans, 2022).

    ``negative`` is None where only the prompt's branch runs.
    """

    positive: Tensor
    negative: Tensor | None
    scale: float


class InpaintModel(Protocol):
    """A latent diffusion model the engine can paint with. All tensors in and out are float32 on the CPU or on the
    model's device; the model casts."""

    @property
    def facts(self) -> ModelFacts: ...

    def encode_prompt(self, prompts: Sequence[str], syntax: PromptSyntax) -> list[Tensor]:
        """Embeddings of each prompt, [1, tokens, width]; tokens may differ between prompts."""
        ...

    def encode_image(self, pixels: Tensor) -> Posterior:
        """``pixels`` [B, 3, H, W] in -1..1, sides multiples of ``facts.downscale``."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> pixels [B, 3, H, W], nominally -1..1, not clamped."""
        ...

    def predict(self, model_input: Tensor, timestep: Tensor, guidance: Guidance) -> Tensor:
        """The guided network output (epsilon or v) for ``model_input`` [B, 4 or 9, h, w] at one, possibly
        fractional, timestep; [B, 4, h, w]. Splits the batch where memory is short."""
        ...
