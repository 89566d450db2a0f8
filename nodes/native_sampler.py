"""The engine's schedules and loop as a SAMPLER of ComfyUI, for graphs that sample by themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..engine.models.protocol import Canvas, Conditioning, Denoiser, Guidance, MaskRule, ModelFacts
from ..engine.sampling import denoise, plan_for
from ..engine.schedulers import Level, Prediction, Schedule
from ..engine.types import MAX_SEED, InputError, Sigmas
from .native import TIME_AXIS, NativeDenoiser, mask_rule, scheduler_config, sigmas_of

DEFAULT_CELLS = 128 * 128
"""Latent cells of a picture of 1024 x 1024 pixels."""


class ScheduledSampler(comfy.samplers.Sampler):
    """One entry of the scheduler menu, for the noise levels of one model."""

    def __init__(self, patcher: ModelPatcher, scheduler: str, steps: int, strength: float, sigmas: Sigmas) -> None:
        name = type(getattr(patcher.model, "model_config", patcher.model)).__name__
        self.config = scheduler_config(patcher, name)
        self.scheduler, self.steps, self.strength, self.sigmas = scheduler, steps, strength, sigmas

    @property
    def prediction(self) -> Prediction:
        return Prediction(self.config["prediction_type"])

    def schedule(self, cells: int) -> Schedule:
        """A fresh schedule for a canvas of so many latent cells."""
        return plan_for(self.config, self.scheduler, self.steps, self.strength, sigmas=self.sigmas, cells=cells)

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        """The clean latents, where ``noise`` is. ComfyUI calls; ``sigmas`` must be those of this sampler."""
        frames = noise.ndim == 5
        if frames and noise.shape[TIME_AXIS] != 1:
            raise InputError("Sampler (Mend) is for pictures, and these latents have frames: use ComfyUI's samplers.")

        def flat(latents: Tensor | None) -> Tensor | None:
            return latents.squeeze(TIME_AXIS) if frames and latents is not None else latents

        plain_noise, clean, mask = flat(noise), flat(latent_image), flat(denoise_mask)
        assert plain_noise is not None
        schedule = self.schedule(plain_noise.shape[-2] * plain_noise.shape[-1])
        flow = self.prediction is Prediction.FLOW
        expected = sigmas_of(schedule.levels, flow)
        if sigmas.shape != expected.shape or not torch.allclose(sigmas.cpu().float(), expected, rtol=1e-3, atol=1e-4):
            raise InputError(
                "Sampler (Mend) was given other sigmas than its own: connect its second output, and for FLUX the latent"
                " to its latent input."
            )
        options = extra_args.get("model_options", {})
        rule = mask_rule(options.get("denoise_mask_function"), flow, lambda: model_wrap)
        kept = torch.ones_like(plain_noise[:, :1]) if mask is None else mask[:, :1]
        canvas = Canvas(
            noise=plain_noise,
            mask=kept,
            hole=kept,
            image=clean,
            masked_image=None,
            soft=kept if rule is not None and mask is not None else None,
        )

        def call(x: Tensor, sigma: Tensor) -> Tensor:
            guided: Tensor = model_wrap(x, sigma, **extra_args)
            return guided

        model = _Guided(
            self._facts(mask is not None, rule), NativeDenoiser(call, noise.device, self.prediction, frames)
        )
        seed = extra_args.get("seed") or 0
        generators = [
            torch.Generator("cpu").manual_seed((seed + row) % (MAX_SEED + 1)) for row in range(len(plain_noise))
        ]
        result = denoise(
            model, schedule, canvas, Guidance(None, None, 1.0), generators, _Callback(callback, schedule.evaluations)
        )
        return result.unsqueeze(TIME_AXIS) if frames else result

    def _facts(self, masked: bool, rule: MaskRule | None) -> ModelFacts:
        return ModelFacts(
            name="MODEL",
            # without a mask nothing is put back
            conditioning=Conditioning.REPLACE if masked else Conditioning.CONCAT,
            native_size=0,
            scheduler_config=self.config,
            mask_rule=rule,
        )


def sigmas_for(sampler: ScheduledSampler, latents: Tensor | None) -> Tensor:
    """The SIGMAS that belong to a sampler, for a picture of the size of ``latents``."""
    cells = DEFAULT_CELLS if latents is None else latents.shape[-2] * latents.shape[-1]
    return sigmas_of(sampler.schedule(cells).levels, sampler.prediction is Prediction.FLOW)


@dataclass(frozen=True)
class _Guided:
    """A network that is ready already, as far as the loop needs an InpaintModel."""

    facts: ModelFacts
    denoiser: Denoiser

    def sample(
        self, canvas: Canvas, levels: Sequence[Level], guidance: Guidance, loop: Callable[[Denoiser], Tensor]
    ) -> Tensor:
        return loop(self.denoiser)


@dataclass(frozen=True)
class _Callback:
    """ComfyUI's callback as a Progress."""

    callback: Any
    total: int

    def update(self, step: int, preview: Tensor | None = None) -> None:
        if self.callback is not None:
            self.callback(step - 1, preview, preview, self.total)
