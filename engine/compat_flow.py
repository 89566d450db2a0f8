"""``Compat.DIFFUSERS`` for flow models: FluxFillPipeline, FluxInpaintPipeline and StableDiffusion3InpaintPipeline.

What these do otherwise than the pipelines of ``compat``: they start from the picture's latents at every strength, at 1
with a share of zero, and so draw the picture's posterior first in every run; they round the number of steps up; they
know Euler's solver alone. Follows diffusers 0.42.
"""

from __future__ import annotations

import functools
import inspect

from torch import Tensor

from .models.protocol import InpaintModel
from .models.sd3 import SD3Model
from .sampling import make_schedule as default_schedule
from .schedulers import Schedule
from .types import InpaintRequest, InputError, Size


def make_schedule(request: InpaintRequest, model: InpaintModel, canvas: Size) -> Schedule:
    """See sampling.make_schedule; raises InputError for another scheduler than the pipelines'."""
    if request.scheduler != "K_EULER":
        raise InputError(
            f"The scheduler is {request.scheduler}, but diffusers' pipelines for {model.facts.name} run with K_EULER;"
            " choose that, or set compat to off."
        )
    schedule = default_schedule(request, model, canvas)
    schedule.from_noise = False
    return schedule


def decodable(model: InpaintModel, latents: Tensor) -> Tensor:
    """``latents`` as the pipeline hands them to the VAE: for Stable Diffusion 3 without the VAE's shift.

    The default decodes them with the shift with which they were encoded. Reported as huggingface/diffusers#13611; where
    the installed diffusers has it right, so is this.
    """
    if isinstance(model, SD3Model) and pipeline_forgets_shift():
        return latents - model.latent_shift
    return latents


@functools.cache
def pipeline_forgets_shift() -> bool:
    """Whether the installed StableDiffusion3InpaintPipeline decodes without the VAE's shift, by its source."""
    from diffusers import StableDiffusion3InpaintPipeline

    try:
        source = inspect.getsource(StableDiffusion3InpaintPipeline.__call__)
    except OSError:  # installed without sources; every release up to 0.42.1 forgets it
        return True
    return "shift_factor" not in source
