"""Schedules of flow-matching models (FLUX, SD3, Qwen-Image): a state is (1 - sigma) * clean + sigma * gaussian.

The noise levels are those of diffusers' FlowMatchEulerDiscreteScheduler: evenly spaced and shifted towards the noisy
end, for some models the more the larger the picture (Esser et al. 2024, arXiv 2403.03206).

Beside that scheduler's own settings a config may say

- ``timestep_spacing``: "trailing" for 1, 1 - 1/N, ..., 1/N before the shift, as FLUX is sampled, or "linspace" for N
  values from 1 nearly to 0, as Stable Diffusion 3 is; by default trailing where there is ``use_dynamic_shifting``;
- ``mu``: the shift, where it does not follow from the size of the picture.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .schedulers import MAX_STEPS, Generators, Level, Prediction, Schedule, correct_only_predicted
from .types import InputError, Sigmas, check_range

FLOW_SCHEDULERS = {
    "K_EULER": "FlowMatchEulerDiscreteScheduler",
    "DPMSolverMultistep": "DPMSolverMultistepScheduler",
    "UniPC": "UniPCMultistepScheduler",
    "DEIS": "DEISMultistepScheduler",
}
"""The schedulers of the menu that can follow a flow, and the diffusers class that solves."""
CELLS_PER_TOKEN = 4
"""The transformers read patches of 2 x 2 latent cells."""
ALMOST_NOISE = 0.9999
"""Multistep solvers compute with the logarithm of the signal, which pure noise does not have."""

NEAREST = 2e-7
"""What the second level must differ from pure noise by, in the float32 that solvers compute with."""


class FlowSchedule(Schedule):
    """A run whose steps a diffusers scheduler takes, the last one excepted."""

    def __init__(self, scheduler: Any, **common: Any) -> None:
        super().__init__(init_noise_sigma=1.0, prediction=Prediction.FLOW, **common)
        self._scheduler = scheduler

    def step(self, output: Tensor, index: int, latents: Tensor, generators: Generators) -> Tensor:
        """See Schedule. At sigma 0 the state is the guess at the clean latents, whatever the solver; the formula of
        DEIS has no value there."""
        if index == self.evaluations - 1:
            return self.denoised(latents, output, index)
        stepped: Tensor = self._scheduler.step(output, self.timesteps[index], latents, return_dict=False)[0]
        return stepped


def plan_flow(
    name: str,
    config: Mapping[str, Any],
    steps: int,
    strength: float,
    *,
    sigmas: Sigmas = Sigmas.DEFAULT,
    cells: int,
) -> Schedule:
    """The schedule of one run; see schedulers.plan.

    ``cells`` of the canvas in latent space decide the shift where the config says ``use_dynamic_shifting``, unless it
    gives a ``mu``. Raises InputError, also for a scheduler that no flow can follow.
    """
    if name not in FLOW_SCHEDULERS:
        raise InputError(
            f"{name} cannot follow a flow-matching model such as FLUX, Stable Diffusion 3 or Qwen-Image; choose one of"
            f" {', '.join(FLOW_SCHEDULERS)}."
        )
    check_range("steps", steps, 1, MAX_STEPS)
    if not 0 < strength <= 1:
        raise InputError(f"strength is {strength}, which leaves no step to run; give a value above 0, up to 1.")
    if name != "K_EULER" and sigmas is Sigmas.DEFAULT:
        # a last sigma of nearly 0 is a jump of many octaves, over which multistep solvers extrapolate wildly
        config = {**config, "timestep_spacing": "trailing"}
    levels = noise_levels(config, steps, sigmas, cells)
    if not (levels.diff() < 0).all() or levels[1] > 1 - NEAREST:
        raise InputError(
            f"The canvas is so large that {steps} noise levels for it lie too close together; take fewer steps, or let"
            " the picture be cropped around the mask."
        )
    begin = steps - _running_steps(steps, strength)
    scheduler = _solver(name, config, levels)
    scheduler.set_begin_index(begin)
    return FlowSchedule(
        scheduler,
        timesteps=scheduler.timesteps[begin:],
        levels=[Level(1 - sigma, sigma) for sigma in levels[begin:].tolist()],
        from_noise=strength == 1.0,
    )


def _running_steps(steps: int, strength: float) -> int:
    """As many as diffusers' flow pipelines run: rounded up, where those of Stable Diffusion round down."""
    return max(steps - int(steps - steps * strength), 1)


def noise_levels(config: Mapping[str, Any], steps: int, sigmas: Sigmas, cells: int) -> Tensor:
    """``steps`` + 1 sigmas from (nearly) 1 down to 0, [steps + 1] float32; see ``plan_flow``."""
    import diffusers

    scheduler_class: Any = diffusers.FlowMatchEulerDiscreteScheduler
    accepted = inspect.signature(scheduler_class.__init__).parameters
    settings = {key: value for key, value in config.items() if key in accepted}
    if sigmas is not Sigmas.DEFAULT:
        settings |= {f"use_{s.value}_sigmas": s is sigmas for s in Sigmas if s is not Sigmas.DEFAULT}
    scheduler = scheduler_class(**settings)
    dynamic = bool(settings.get("use_dynamic_shifting"))
    options: dict[str, Any] = {"num_inference_steps": steps}
    if config.get("timestep_spacing", "trailing" if dynamic else "linspace") == "trailing":
        options["sigmas"] = np.linspace(1.0, 1 / steps, steps)
    if dynamic:
        options["mu"] = config.get("mu", _mu(scheduler.config, cells // CELLS_PER_TOKEN))
    with np.errstate(over="ignore", invalid="ignore"):  # of a shift beyond all pictures; plan_flow refuses it
        scheduler.set_timesteps(**options)
    return torch.as_tensor(scheduler.sigmas)


def _mu(config: Mapping[str, Any], tokens: int) -> float:
    """The shift for a picture of so many tokens, linear between two sizes, as diffusers' FLUX pipelines have it."""
    slope = (config["max_shift"] - config["base_shift"]) / (config["max_image_seq_len"] - config["base_image_seq_len"])
    return float(config["base_shift"] + slope * (tokens - config["base_image_seq_len"]))


def _solver(name: str, config: Mapping[str, Any], sigmas: Tensor) -> Any:
    import diffusers

    solver_class = getattr(diffusers, FLOW_SCHEDULERS[name])
    count = len(sigmas) - 1
    trained = config.get("num_train_timesteps", 1000)
    if name == "K_EULER":
        scheduler = solver_class(num_train_timesteps=trained)
        scheduler.set_timesteps(count)
        scheduler.sigmas = sigmas
    else:
        scheduler = solver_class(
            num_train_timesteps=trained, prediction_type=Prediction.FLOW.value, use_flow_sigmas=True
        )
        scheduler.set_timesteps(count)
        scheduler.sigmas = _below_pure_noise(sigmas)
    if name == "UniPC":
        correct_only_predicted(scheduler)
    scheduler.timesteps = sigmas[:-1] * trained
    return scheduler


def _below_pure_noise(sigmas: Tensor) -> Tensor:
    """The same with the first below 1, and still above the second."""
    first = sigmas[:1].clamp(max=max(ALMOST_NOISE, float(1 + sigmas[1]) / 2))
    return torch.cat([first, sigmas[1:]])
