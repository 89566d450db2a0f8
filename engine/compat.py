"""``Compat.DIFFUSERS``: StableDiffusionInpaintPipeline's arithmetic, to rounding.

The whole picture is squeezed to the model's size, the mask cut at one half and sampled at every eighth pixel, nothing
is pasted back, and one generator serves the batch. Follows diffusers 0.42,
pipelines/stable_diffusion/pipeline_stable_diffusion_inpaint.py, the order of its random draws included.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from . import compat_flow, control
from .images import to_bytes
from .models.protocol import Canvas, Conditioning, InpaintModel, PromptSyntax
from .sampling import Stopwatch, decode_pixels, denoise, encode_guidance, make_schedule
from .schedulers import Prediction
from .types import InpaintRequest, InpaintResult, InputError, Size

if TYPE_CHECKING:
    from .host import Host
    from .schedulers import Schedule


def inpaint(request: InpaintRequest, model: InpaintModel, host: Host, seeds: tuple[int, ...]) -> InpaintResult:
    """``request`` (normalised) as the pipeline would run it; image ``b`` of a batch starts from ``seeds[b * count]``.

    ``crop`` does not apply. Pictures come out at ``width`` x ``height``, by default the model's native square; alpha
    is dropped.
    """
    size = target_size(request, model)
    clock = Stopwatch()
    flow = model.facts.prediction_type == Prediction.FLOW
    plan = compat_flow.make_schedule if flow else make_schedule
    schedules = [plan(request, model, size) for _ in request.image]
    evaluations = sum(schedule.evaluations for schedule in schedules)
    progress = host.progress(evaluations, "inpaint (diffusers)", model.facts.latent_format)
    results, done = [], 0
    for source, schedule in enumerate(schedules):
        generator = torch.Generator("cpu").manual_seed(seeds[source * request.count])
        with clock.phase("encode"):
            pixels = preprocess_image(request.image[source, ..., :3], size)
            hole = preprocess_mask(request.mask[source], size)
            canvas = prepare_canvas(model, schedule, pixels, hole, request.count, generator)
            cut = partial(_cut, canvas, source)
            canvas = control.show(canvas, request, cut, schedule, model.facts)
        if source == 0 or model.facts.reads_picture:
            with clock.phase("prompt"):
                guidance = encode_guidance(request, model, PromptSyntax.PLAIN, canvas.pixels)
        with clock.phase("sample"):
            latents = denoise(model, schedule, canvas, guidance, generator, progress, done)
        with clock.phase("decode"):
            latents = compat_flow.decodable(model, latents) if flow else latents
            results.append(decode_pixels(model, latents).cpu())
        done += schedule.evaluations
    masks = torch.cat([preprocess_mask(mask, size)[:, 0] for mask in request.mask])
    return InpaintResult(images=torch.cat(results), mask=masks, seeds=seeds, timings=dict(clock.seconds))


def _cut(canvas: Canvas, source: int, pictures: Tensor) -> Tensor:
    return canvas.expand(preprocess_image(pictures[source], canvas.size) / 2 + 0.5)


def target_size(request: InpaintRequest, model: InpaintModel) -> Size:
    """The requested size, by default the model's own; raises InputError unless the model can paint it."""
    native, cell = model.facts.native_size, model.facts.multiple
    size = Size(request.width or native, request.height or native)
    if size.width % cell or size.height % cell:
        raise InputError(
            f"The size is {size}, but compat=diffusers needs multiples of {cell}; change width and height, or set"
            " compat to off, which takes any size."
        )
    return size


def preprocess_image(image: Tensor, size: Size) -> Tensor:
    """[H, W, 3] in 0..1 -> [1, 3, height, width] in -1..1 through an 8-bit PIL image and its LANCZOS filter."""
    picture = Image.fromarray(to_bytes(image)).resize(size, Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(picture, dtype=np.float32) / 255)
    return pixels.permute(2, 0, 1)[None] * 2 - 1


def preprocess_mask(mask: Tensor, size: Size) -> Tensor:
    """[H, W] in 0..1 -> [1, 1, height, width] of exactly 0 and 1."""
    picture = Image.fromarray(to_bytes(mask)).resize(size, Image.Resampling.LANCZOS)
    return (torch.from_numpy(np.array(picture, dtype=np.float32) / 255) >= 0.5).float()[None, None]


def prepare_canvas(
    model: InpaintModel, schedule: Schedule, pixels: Tensor, hole: Tensor, count: int, generator: torch.Generator
) -> Canvas:
    """Random draws in the pipeline's order: the picture's posterior, the noise, the masked picture's posterior, which
    is drawn even where a 4-channel network never reads it."""
    concat = model.facts.conditioning is Conditioning.CONCAT
    cells = (pixels.shape[-2] // model.facts.downscale, pixels.shape[-1] // model.facts.downscale)
    shape = (model.facts.latent_channels, *cells)
    image = None
    if not (concat and schedule.from_noise):
        image = model.encode_image(pixels).sample(generator).cpu()
    noise = torch.randn((count, *shape), generator=generator)
    masked_image = None
    if concat:
        masked_image = model.encode_image(pixels * (hole < 0.5)).sample(generator).cpu()
    else:
        torch.randn((1, *shape), generator=generator)
    return Canvas(
        noise=noise,
        mask=F.interpolate(hole, size=cells),
        hole=hole,
        image=image,
        masked_image=masked_image,
        pixels=pixels if model.facts.reads_picture else None,
    )
