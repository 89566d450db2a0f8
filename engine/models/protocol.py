"""What the engine asks of a model that inpaints: encode, sample, decode, and a few facts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..crop import CropPlan
from ..schedulers import Level
from ..types import Size

if TYPE_CHECKING:
    from ..control import Hint


class Conditioning(str, Enum):
    """How the picture outside the mask reaches the denoiser."""

    CONCAT = "concat"
    """The network was trained to inpaint: it also reads the mask and the masked image's latents."""
    REPLACE = "replace"
    """An ordinary network; the kept area is put back, noised, after every step."""


class PromptSyntax(str, Enum):
    COMFY = "comfy"
    """ComfyUI's CLIPTextEncode: (word:1.2) emphasis, embedding:name, any length in chunks of 75."""
    PLAIN = "plain"
    """diffusers: literal text, truncated to 77 tokens."""


MaskRule = Callable[[Tensor, Sequence[Level], int], Tensor]
"""(soft mask [N, 1, h, w], the run's levels, index of an evaluation) -> how much that may change each cell, 0..1."""


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
    multiple: int = 0
    """Pixels that the sides of a canvas are multiples of; 0 for ``downscale``."""
    embedded_guidance: bool = False
    """Whether the network reads the guidance scale as a number of its own (FLUX dev and Fill); nothing is guided away
    from a negative prompt then."""
    usual_guidance: float | None = None
    """The guidance scale the network was made for, where that is far from the usual 5 to 9."""
    reads_picture: bool = False
    """Whether prompts are read together with the picture they are to change (Qwen-Image-Edit)."""
    mask_rule: MaskRule | None = None
    """What to do with a soft mask in the place of the engine's own rule."""
    control_width: int | None = None
    """Width of the prompt embeddings, which tells which ControlNets fit: 768, 1024, 2048; None where none of ours can
    be followed."""
    latent_format: str | None = None
    """The name ComfyUI has for these latents, by which it draws previews: "SD15", "SDXL", "SD3", "Flux", ...; None for
    latents that are this model's own."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "multiple", self.multiple or self.downscale)

    @property
    def prediction_type(self) -> str:
        """ "epsilon", "v_prediction" or "flow_prediction"."""
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
    """What the model's ``encode_prompt`` made of the prompts, and the classifier-free guidance scale (Ho & Salimans,
    2022).

    ``negative`` is None where only the prompt's branch runs.
    """

    positive: Any
    negative: Any
    scale: float


@dataclass(frozen=True)
class Place:
    """Where in the picture a row of a canvas lies."""

    picture: Size
    plan: CropPlan
    source: int = 0
    """The input picture's number in its batch."""


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """What a run paints on: N pictures of one size, in latent space, [N, C, h, w] each."""

    noise: Tensor
    mask: Tensor
    """[N or 1, 1, h, w]; 1 = repaint."""
    hole: Tensor
    """[N or 1, 1, H, W] in pixels, 0 or 1: what the model is not shown."""
    image: Tensor | None
    """The clean picture's latents; needed unless the run is not soft and starts from noise on a CONCAT model."""
    masked_image: Tensor | None
    """The latents of the picture with a hole; needed by CONCAT models."""
    pixels: Tensor | None = None
    """The picture, [N, 3, H, W] in -1..1; only for models that read it with their prompts."""
    soft: Tensor | None = None
    """[N, 1, h, w] in 0..1: the share of the evaluations, counted from the end, that may change each cell."""
    places: tuple[Place, ...] = ()
    """Of each row; empty where the whole picture was brought to the canvas."""
    hints: tuple[Hint, ...] = ()
    """What ControlNets are shown; only for models with a ``control_width``."""

    @property
    def size(self) -> Size:
        """In pixels."""
        return Size(self.hole.shape[-1], self.hole.shape[-2])

    def expand(self, planes: Tensor) -> Tensor:
        return planes.expand(len(self.noise), -1, -1, -1)


Denoiser = Callable[[Tensor, Tensor, Level], Tensor]
"""(state [N, C, h, w], timestep, the state's noise level) -> the guided network output for it, of the kind that
``ModelFacts.prediction_type`` says. States have unit variance, those of a flow the level's own; the timestep is a
scalar and possibly fractional."""


class InpaintModel(Protocol):
    """A latent diffusion model the engine can paint with. All tensors in and out are float32 on the CPU or on the
    model's device; the model casts."""

    @property
    def facts(self) -> ModelFacts: ...

    def encode_prompt(
        self, prompts: Sequence[str | None], syntax: PromptSyntax, pictures: Tensor | None = None
    ) -> list[Any]:
        """Each prompt as ``sample`` wants it in its guidance; None, which is no prompt at all, as zeros.

        ``pictures`` [N, 3, H, W] in -1..1 are those of the canvas, which only models with ``reads_picture`` look at.
        """
        ...

    def encode_image(self, pixels: Tensor) -> Posterior:
        """``pixels`` [B, 3, H, W] in -1..1, sides multiples of ``facts.downscale``."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> pixels [B, 3, H, W], nominally -1..1, not clamped."""
        ...

    def rows_at_once(self, canvas: Size) -> int:
        """How many pictures of that size may be sampled together; more than fit at once are the model's affair where it
        can split them."""
        ...

    def sample(
        self, canvas: Canvas, levels: Sequence[Level], guidance: Guidance, loop: Callable[[Denoiser], Tensor]
    ) -> Tensor:
        """What ``loop`` returns, which is called once, with the network ready for ``canvas``.

        ``levels`` are those the loop will visit. The model is given the loop, and not the other way round, because
        ComfyUI's own models live inside a call of ComfyUI's.
        """
        ...
