"""The main path: a picture, a mask and a prompt in; the picture with the masked part repainted out.

normalise -> plan a crop around each mask -> encode -> denoise -> decode -> match colour on a ring -> paste back, so
that every pixel whose mask is 0 leaves as it came, bit for bit.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import compat, crop, images
from .blend import match_ring, paste
from .crop import CropPlan
from .host import Host
from .masks import bounding_box, to_latent_grid
from .models.protocol import Conditioning, InpaintModel, PromptSyntax
from .sampling import Canvas, Stopwatch, decode_pixels, denoise, encode_guidance, make_schedule
from .schedulers import Schedule
from .types import MAX_SEED, Compat, Crop, InpaintRequest, InpaintResult, Size, check_total

MAX_BATCH_PIXELS = 64 * 512 * 512
"""Canvas pixels that are worked on together: a float32 RGB copy of them is 200 MB, and there are a few."""


@dataclass(frozen=True)
class Job:
    """One picture to make: the input image it comes from, its seed and its crop."""

    source: int
    output: int
    seed: int
    plan: CropPlan

    @property
    def generator(self) -> torch.Generator:
        """Noise comes from the CPU, so that a seed means the same picture on every machine."""
        return torch.Generator("cpu").manual_seed(self.seed)


@torch.inference_mode()
def inpaint(request: InpaintRequest, model: InpaintModel, host: Host) -> InpaintResult:
    """Repaint what ``request.mask`` marks; the rest of the picture is returned bit-identical.

    With ``width`` and ``height`` the picture is first brought to that size. An empty mask or a strength of 0 gives the
    input back (whatever ``compat`` says), with a notice. Raises MendError for input or a model that cannot be used, and
    the host's own interrupt.
    """
    request = normalise(request)
    seeds = seeds_of(request)
    if request.strength == 0:
        return _unchanged(request, seeds, "Strength is 0: the picture is returned as it came.")
    if request.compat is Compat.DIFFUSERS:
        return compat.inpaint(request, model, host, seeds)

    clock = Stopwatch()
    jobs = plan_jobs(request, model, seeds)
    if not jobs:
        return _unchanged(request, seeds, "The mask is empty: the picture is returned as it came.")
    with clock.phase("prompt"):
        guidance = encode_guidance(request, model, PromptSyntax.COMFY)
    results = request.image.repeat_interleave(request.count, dim=0)
    groups = batches(jobs)
    schedules = [make_schedule(request, model) for _ in groups]
    progress = host.progress(sum(schedule.evaluations for schedule in schedules), "inpaint")
    done = 0
    for group, schedule in zip(groups, schedules, strict=True):
        with clock.phase("encode"):
            generators = [job.generator for job in group]
            canvas = prepare_canvas(request, model, group, generators, schedule)
        with clock.phase("sample"):
            latents = denoise(model, schedule, canvas, guidance, generators, progress, done)
        with clock.phase("decode"):
            painted = decode_pixels(model, latents)
        with clock.phase("paste"):
            for job, pixels, cells in zip(group, painted, canvas.mask, strict=True):
                paste_job(request, job, pixels[None].to(results), cells.to(results), results)
        done += schedule.evaluations
    untouched = request.image.shape[0] - len({job.source for job in jobs})
    notices = (f"{untouched} of the masks are empty: their pictures are returned as they came.",) if untouched else ()
    return InpaintResult(images=results, mask=request.mask, seeds=seeds, notices=notices, timings=dict(clock.seconds))


def normalise(request: InpaintRequest) -> InpaintRequest:
    """The same request with image [B, H, W, 3 or 4] and mask [B, H, W] at the size the result will have."""
    image, mask = images.pair(request.image, request.mask)
    own = images.size_of(image)
    if request.compat is Compat.OFF and (request.width or request.height):
        size = Size(request.width or own.width, request.height or own.height)
        image, mask = images.resize(image, size), images.resize_mask(mask, size)
    if request.count > 1:
        check_total(image.shape[0] * request.count, images.size_of(image))
    return replace(request, image=image, mask=mask)


def seeds_of(request: InpaintRequest) -> tuple[int, ...]:
    """The seed of each result: seed, seed + 1, ... (modulo 2**64)."""
    total = request.image.shape[0] * request.count
    return tuple((request.seed + i) % (MAX_SEED + 1) for i in range(total))


def plan_jobs(request: InpaintRequest, model: InpaintModel, seeds: tuple[int, ...]) -> list[Job]:
    """One job for each result whose mask is not empty."""
    size = images.size_of(request.image)
    facts = model.facts
    jobs = []
    for source, mask in enumerate(request.mask):
        box = bounding_box(mask)
        if box is None:
            continue
        if request.crop is Crop.OFF:
            crop_plan = crop.whole(size, facts.downscale)
        else:
            crop_plan = crop.around(box, size, facts.native_size, facts.downscale)
        outputs = range(source * request.count, (source + 1) * request.count)
        jobs += [Job(source, output, seeds[output], crop_plan) for output in outputs]
    return jobs


def batches(jobs: list[Job]) -> list[list[Job]]:
    """Jobs that run together: their canvases have one size, and all of them at most MAX_BATCH_PIXELS."""
    by_canvas: dict[Size, list[Job]] = defaultdict(list)
    for job in jobs:
        by_canvas[job.plan.canvas].append(job)
    result = []
    for canvas, group in by_canvas.items():
        at_once = max(1, MAX_BATCH_PIXELS // (canvas.width * canvas.height))
        result += [group[start : start + at_once] for start in range(0, len(group), at_once)]
    return result


def prepare_canvas(
    request: InpaintRequest,
    model: InpaintModel,
    jobs: list[Job],
    generators: list[torch.Generator],
    schedule: Schedule,
) -> Canvas:
    """The jobs' crops in latent space, each with noise of its own seed.

    The hole is every pixel the stitch mask touches at all, so that an inpainting model sees nothing of what it is to
    replace, and a latent cell is repainted when any of its pixels is in the hole: strokes thinner than a cell survive.
    The VAE's posterior mean is used, where diffusers draws a sample.
    """
    sources = list(dict.fromkeys(job.source for job in jobs))
    plans = {job.source: job.plan for job in jobs}
    pixels = torch.cat([plans[s].cut(request.image[s : s + 1, ..., :3]) for s in sources])
    hole = torch.cat([plans[s].cut_hole(request.mask[s : s + 1]) for s in sources])
    pixels, hole = pixels.cpu().permute(0, 3, 1, 2) * 2 - 1, hole.cpu()
    rows = torch.tensor([sources.index(job.source) for job in jobs])

    concat = model.facts.conditioning is Conditioning.CONCAT
    image = None if concat and schedule.from_noise else _latents(model, pixels)[rows]
    masked_image = _latents(model, pixels * (1 - hole[:, None]))[rows] if concat else None
    shape = (1, model.facts.latent_channels, *(side // model.facts.downscale for side in pixels.shape[-2:]))
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
    return Canvas(
        noise=noise, mask=to_latent_grid(hole, model.facts.downscale)[rows], image=image, masked_image=masked_image
    )


def _latents(model: InpaintModel, pixels: Tensor) -> Tensor:
    """Latents are small: the loop's arithmetic runs on the CPU in float32, only the network on its own device."""
    return model.encode_image(pixels).mean.cpu()


def paste_job(request: InpaintRequest, job: Job, canvas: Tensor, cells: Tensor, results: Tensor) -> None:
    """Write one painted canvas [1, h, w, 3], of whose latent ``cells`` [1, h', w'] those of 1 were repainted, into its
    place in ``results``."""
    box = job.plan.box
    original = request.image[job.source : job.source + 1, box.rows, box.columns]
    mask = request.mask[job.source : job.source + 1, box.rows, box.columns]
    # a cell that the mask only touches is new as a whole, so tone is compared beyond it
    repainted = (job.plan.uncut_mask(F.interpolate(cells[None], size=canvas.shape[1:3])[0]) > 0).to(mask)
    painted = match_ring(job.plan.uncut(canvas), original[..., :3], repainted)
    results[job.output : job.output + 1, box.rows, box.columns] = paste(original, painted, mask)


def _unchanged(request: InpaintRequest, seeds: tuple[int, ...], notice: str) -> InpaintResult:
    pictures = request.image.repeat_interleave(request.count, dim=0)
    return InpaintResult(images=pictures, mask=request.mask, seeds=seeds, notices=(notice,))
