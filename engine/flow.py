"""Schedules of flow-matching models (FLUX, Stable Diffusion 3): a state is (1 - sigma) * clean + sigma * gaussian.

The noise levels are those of diffusers' FlowMatchEulerDiscreteScheduler for every solver: evenly spaced and shifted
towards the noisy end, for some models the more the larger the picture (Esser et al. 2024, arXiv 2403.03206).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from .schedulers import MAX_STEPS, DiffusersSchedule, Level, Prediction, Schedule
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
            f"{name} cannot follow a flow-matching model such as FLUX or Stable Diffusion 3; choose one of"
            f" {', '.join(FLOW_SCHEDULERS)}."
        )
    check_range("steps", steps, 1, MAX_STEPS)
    if not 0 < strength <= 1:
        raise InputError(f"strength is {strength}, which leaves no step to run; give a value above 0, up to 1.")
    levels = noise_levels(config, steps, sigmas, cells)
    begin = steps - _running_steps(steps, strength)
    scheduler = _solver(name, config, levels)
    scheduler.set_begin_index(begin)
    return DiffusersSchedule(
        scheduler,
        {},
        None,
        timesteps=scheduler.timesteps[begin:],
        levels=[Level(1 - sigma, sigma) for sigma in levels[begin:].tolist()],
        init_noise_sigma=1.0,
        from_noise=strength == 1.0,
        prediction=Prediction.FLOW,
    )


def _running_steps(steps: int, strength: float) -> int:
    """As many as diffusers' flow pipelines run: rounded up, where those of Stable Diffusion round down."""
    return steps - int(max(steps - steps * strength, 0))


def noise_levels(config: Mapping[str, Any], steps: int, sigmas: Sigmas, cells: int) -> torch.Tensor:
    """steps + 1 sigmas from (nearly) 1 down to 0, float32."""
    import diffusers

    scheduler_class: Any = diffusers.FlowMatchEulerDiscreteScheduler
    accepted = inspect.signature(scheduler_class.__init__).parameters
    settings = {key: value for key, value in config.items() if key in accepted}
    if sigmas is not Sigmas.DEFAULT:
        settings |= {f"use_{s.value}_sigmas": s is sigmas for s in Sigmas if s is not Sigmas.DEFAULT}
    scheduler = scheduler_class(**settings)
    if settings.get("use_dynamic_shifting"):
        mu = config.get("mu", _mu(scheduler.config, cells // CELLS_PER_TOKEN))
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=mu)
    else:
        scheduler.set_timesteps(steps)
    return torch.as_tensor(scheduler.sigmas)


def _mu(config: Mapping[str, Any], tokens: int) -> float:
    """The shift for a picture of so many tokens, linear between two sizes, as diffusers' FLUX pipelines have it."""
    slope = (config["max_shift"] - config["base_shift"]) / (config["max_image_seq_len"] - config["base_image_seq_len"])
    return float(config["base_shift"] + slope * (tokens - config["base_image_seq_len"]))


def _solver(name: str, config: Mapping[str, Any], sigmas: torch.Tensor) -> Any:
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
        scheduler.sigmas = sigmas.clamp(max=ALMOST_NOISE)
    scheduler.timesteps = sigmas[:-1] * trained
    return scheduler
