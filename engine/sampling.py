"""The denoising loop: one canvas, one schedule, one model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .host import Progress
from .models.protocol import Conditioning, Guidance, InpaintModel
from .schedulers import Schedule


@dataclass(frozen=True, kw_only=True)
class Canvas:
    """What a run paints on: N pictures of one size, in latent space, [N, C, h, w] each."""

    noise: Tensor
    mask: Tensor
    """[N or 1, 1, h, w]; 1 = repaint."""
    image: Tensor | None
    """The clean picture's latents; needed unless the run starts from noise on a CONCAT model."""
    masked_image: Tensor | None
    """The latents of the picture with a hole; needed by CONCAT models."""

    def expand(self, planes: Tensor) -> Tensor:
        return planes.expand(len(self.noise), -1, -1, -1)


def denoise(
    model: InpaintModel,
    schedule: Schedule,
    canvas: Canvas,
    guidance: Guidance,
    generators: Sequence[torch.Generator] | torch.Generator,
    progress: Progress,
    first_step: int = 0,
) -> Tensor:
    """The clean latents [N, C, h, w] at the end of ``schedule``.

    A CONCAT model is shown the mask and the masked picture beside the latents; for a REPLACE model the kept area is put
    back after every evaluation, at the noise level the state has then. ``generators`` feed stochastic schedulers, one
    per row or one for all. ``progress`` counts evaluations on from ``first_step``.
    """
    conditioning = model.facts.conditioning
    noise_generators = generators if isinstance(generators, torch.Generator) else list(generators)
    latents = schedule.start(canvas.noise, None if canvas.image is None else canvas.expand(canvas.image))
    for index in range(schedule.evaluations):
        scaled = schedule.scale(latents, index)
        output = model.predict(
            _network_input(scaled, canvas, conditioning), schedule.timesteps[index], guidance
        ).to(latents)
        preview = schedule.denoised(scaled, output, index)
        latents = schedule.step(output, index, latents, noise_generators)
        if conditioning is Conditioning.REPLACE:
            assert canvas.image is not None
            kept = schedule.renoise(canvas.expand(canvas.image), canvas.noise, index)
            latents = (1 - canvas.mask) * kept + canvas.mask * latents
        progress.update(first_step + index + 1, preview)
    return latents


def _network_input(scaled: Tensor, canvas: Canvas, conditioning: Conditioning) -> Tensor:
    if conditioning is Conditioning.REPLACE:
        return scaled
    assert canvas.masked_image is not None
    return torch.cat([scaled, canvas.expand(canvas.mask), canvas.expand(canvas.masked_image)], dim=1)
