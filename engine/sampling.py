"""The denoising loop - one canvas, one schedule, one model - and what surrounds it in every run."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .flow import plan_flow
from .host import Progress
from .models.protocol import Canvas, Conditioning, Denoiser, Guidance, InpaintModel, ModelFacts, PromptSyntax
from .schedulers import Prediction, Schedule, plan
from .types import Compat, InpaintRequest, MendError, Sigmas, Size


@dataclass
class Stopwatch:
    """Seconds by phase."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start


def make_schedule(request: InpaintRequest, model: InpaintModel, canvas: Size) -> Schedule:
    """The schedule for a canvas of that many pixels."""
    facts = model.facts
    return plan_for(
        facts.scheduler_config,
        request.scheduler,
        request.steps,
        request.strength,
        sigmas=request.sigmas,
        compat=request.compat,
        cells=canvas.width // facts.downscale * (canvas.height // facts.downscale),
    )


def plan_for(
    config: Mapping[str, Any],
    scheduler: str,
    steps: int,
    strength: float,
    *,
    sigmas: Sigmas,
    cells: int,
    compat: Compat = Compat.OFF,
) -> Schedule:
    """The schedule of one run, by what the model predicts; see schedulers.plan and flow.plan_flow."""
    if config.get("prediction_type") == Prediction.FLOW:
        return plan_flow(scheduler, config, steps, strength, sigmas=sigmas, cells=cells)
    return plan(scheduler, config, steps, strength, sigmas=sigmas, compat=compat)


def encode_guidance(
    request: InpaintRequest, model: InpaintModel, syntax: PromptSyntax, pictures: Tensor | None = None
) -> Guidance:
    """Prompt embeddings; the negative branch only where it counts. ``pictures``: see InpaintModel.encode_prompt."""
    if model.facts.embedded_guidance:
        (positive,) = model.encode_prompt([request.prompt], syntax, pictures)
        return Guidance(positive, None, request.guidance_scale)
    if request.guidance_scale <= 1:
        (positive,) = model.encode_prompt([request.prompt], syntax, pictures)
        return Guidance(positive, None, 1.0)
    unwanted = None if request.zero_negative and not request.negative_prompt else request.negative_prompt
    negative, positive = model.encode_prompt([unwanted, request.prompt], syntax, pictures)
    return Guidance(positive, negative, request.guidance_scale)


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
    back after every evaluation, at the noise level the state has then. A soft canvas does that with either, and lets
    go of a cell the earlier the higher its value: a value of 0.3 is a strength of 0.3 there (Levin and Fried,
    Differential Diffusion, arXiv 2306.00950). ``generators`` feed stochastic schedulers, one per row or one for all.
    ``progress`` counts evaluations on from ``first_step``.
    """
    noise_generators = generators if isinstance(generators, torch.Generator) else list(generators)

    def loop(denoiser: Denoiser) -> Tensor:
        latents = _start(schedule, canvas, model.facts)
        for index in range(schedule.evaluations):
            scaled = schedule.scale(latents, index)
            output = denoiser(scaled, schedule.timesteps[index], schedule.levels[index].normal).to(latents)
            preview = schedule.denoised(scaled, output, index)
            latents = schedule.step(output, index, latents, noise_generators)
            free = _free_cells(canvas, model.facts, schedule, index)
            if free is not None:
                assert canvas.image is not None
                kept = schedule.renoise(canvas.expand(canvas.image), canvas.noise, index)
                latents = (1 - free) * kept + free * latents
            progress.update(first_step + index + 1, preview)
        return latents

    return model.sample(canvas, schedule.levels, guidance, loop)


def _start(schedule: Schedule, canvas: Canvas, facts: ModelFacts) -> Tensor:
    latents = schedule.start(canvas.noise, None if canvas.image is None else canvas.expand(canvas.image))
    if canvas.soft is None:
        return latents
    free = _free_cells(canvas, facts, schedule, 0)
    # solvers of second order go back to the state before: of a cell let go in between, it must be the picture's
    assert free is not None and canvas.image is not None
    return (1 - free) * schedule.levels[0].mix(canvas.expand(canvas.image), canvas.noise) + free * latents


def _free_cells(canvas: Canvas, facts: ModelFacts, schedule: Schedule, index: int) -> Tensor | None:
    """How much evaluation ``index`` may change each cell, 0..1; None where it may change everything."""
    if canvas.soft is None:
        return canvas.mask if facts.conditioning is Conditioning.REPLACE else None
    if facts.mask_rule is not None:
        return facts.mask_rule(canvas.soft, schedule.levels, index)
    # as many as a run of that strength has: rounded down, but at least one
    running = (canvas.soft * schedule.evaluations + 1e-4).floor().clamp(min=1)
    return ((running >= schedule.evaluations - index) & (canvas.soft > 0)).to(canvas.soft)


def decode_pixels(model: InpaintModel, latents: Tensor) -> Tensor:
    """Latents [N, C, h, w] -> images [N, H, W, 3] in 0..1. Raises MendError where the network overflowed."""
    pixels = model.decode(latents)
    if not torch.isfinite(pixels).all():
        raise MendError(
            f"{model.facts.name} produced invalid numbers (NaN); load it with precision fp32 or bf16, or lower the"
            " guidance scale."
        )
    return (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
