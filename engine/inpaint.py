"""The main path: a picture, a mask and a prompt in; the picture with the masked part repainted out.

normalise -> plan a crop around each mask -> encode -> denoise -> decode -> stitch back, so that every pixel whose mask
is 0 leaves as it came, bit for bit.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import compat, control, crop, images
from .crop import CONTEXT, CropOptions, CropPlan
from .host import Host
from .masks import bounding_box, to_latent_grid
from .memory import is_out_of_memory
from .models.protocol import Canvas, Conditioning, InpaintModel, Place, PromptSyntax
from .regions import regions
from .sampling import Stopwatch, decode_pixels, denoise, encode_guidance, make_schedule
from .schedulers import Schedule
from .stitch import StitchOptions, stitch
from .types import MAX_SEED, Compat, Crop, InpaintRequest, InpaintResult, InputError, Size, check_total

log = logging.getLogger("mend")

MAX_BATCH_PIXELS = 64 * 512 * 512
"""Canvas pixels that are worked on together: a float32 RGB copy of them is 200 MB, and there are a few."""


APART = CropOptions(context_factor=1 + 2 * CONTEXT)
"""Parts of a mask whose surroundings of this size meet are painted together."""
PART_SEED = 0x9E3779B9
"""Added to the seed for each further part of a mask: far from the seeds of neighbouring pictures in the 32 bits that
torch's generator takes."""
SOFT_EDGE = 0.1
"""Soft mask values from here up are pasted as painted; below, where next to nothing was repainted, they fade."""


@dataclass(frozen=True, eq=False)
class Part:
    """What is cropped and repainted as one: the mask of an input image, or a separate part of it."""

    source: int
    """The input image."""
    plan: CropPlan
    stitch_mask: Tensor
    """[1, H, W] of the whole picture."""
    sampler_mask: Tensor


@dataclass(frozen=True)
class Job:
    """One part to paint for one result."""

    part: Part
    output: int
    seed: int

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
    if model.facts.mask_rule is not None and request.compat is Compat.OFF:
        request = replace(request, soft=True)
    request = normalise(request)
    control.check(request.controls, model.facts)
    seeds = seeds_of(request)
    if request.strength == 0:
        return _unchanged(request, seeds, "Strength is 0: the picture is returned as it came.")
    if request.compat is Compat.DIFFUSERS:
        return compat.inpaint(request, model, host, seeds)

    clock = Stopwatch()
    jobs = plan_jobs(request, model, seeds)
    if not jobs:
        return _unchanged(request, seeds, "The mask is empty: the picture is returned as it came.")
    if not model.facts.reads_picture:
        with clock.phase("prompt"):
            guidance = encode_guidance(request, model, PromptSyntax.COMFY)
    results = request.image.repeat_interleave(request.count, dim=0)
    groups = batches(jobs, model)
    evaluations = sum(make_schedule(request, model, group[0].part.plan.canvas).evaluations for group in groups)
    progress = host.progress(evaluations, "inpaint", model.facts.latent_format)
    reports: list[tuple[str, ...]] = [()] * len(results)
    done = 0
    while groups:
        group = groups.pop(0)
        schedule = make_schedule(request, model, group[0].part.plan.canvas)
        generators = [job.generator for job in group]
        try:
            with clock.phase("encode"):
                canvas = prepare_canvas(request, model, group, generators, schedule)
            if model.facts.reads_picture:
                with clock.phase("prompt"):
                    guidance = encode_guidance(request, model, PromptSyntax.COMFY, canvas.pixels)
            with clock.phase("sample"):
                latents = denoise(model, schedule, canvas, guidance, generators, progress, done)
        except (RuntimeError, MemoryError) as error:
            if len(group) == 1 or not is_out_of_memory(error):
                raise
            log.warning("Not enough memory for %d pictures together; trying again with half as many.", len(group))
            groups[:0] = [group[: len(group) // 2], group[len(group) // 2 :]]
            continue
        with clock.phase("decode"):
            painted = decode_pixels(model, latents)
        with clock.phase("paste"):
            for job, pixels, cells in zip(group, painted, canvas.mask, strict=True):
                reports[job.output] += paste_job(request, job, pixels[None].to(results), cells.to(results), results)
        done += schedule.evaluations
    untouched = request.image.shape[0] - len({job.part.source for job in jobs})
    notices = [f"{untouched} of the masks are empty: their pictures are returned as they came."] if untouched else []
    usual = model.facts.usual_guidance
    if usual is not None and not usual / 2 <= request.guidance_scale <= usual * 2:
        notices.append(
            f"{model.facts.name} was made for a guidance_scale of about {usual:g}; it was {request.guidance_scale:g}."
        )
    strongest = max(float(job.part.stitch_mask.max()) for job in jobs)
    if strongest < 1:
        notices.append(
            f"The mask is nowhere above {strongest:.2g}, so the original shows through; set a threshold in Prepare Mask"
            " where it should not."
        )
    return InpaintResult(
        images=results,
        mask=request.mask,
        seeds=seeds,
        notices=tuple(notices),
        reports=tuple("; ".join(lines) for lines in reports),
        timings=dict(clock.seconds),
    )


def normalise(request: InpaintRequest) -> InpaintRequest:
    """The same request with image [B, H, W, 3 or 4] and both masks [B, H, W] at the size the result will have."""
    if request.compat is Compat.DIFFUSERS and (request.soft or request.sampler_mask is not None):
        raise InputError(
            "compat=diffusers knows one mask of black and white; set compat to off for a soft or a sampler mask."
        )
    image, mask = images.pair(request.image, request.mask)
    sampler_mask = mask if request.sampler_mask is None else images.as_masks(request.sampler_mask, image)
    own = images.size_of(image)
    if request.compat is Compat.OFF and (request.width or request.height):
        size = Size(request.width or own.width, request.height or own.height)
        image = images.resize(image, size)
        mask, sampler_mask = images.resize_mask(mask, size), images.resize_mask(sampler_mask, size)
    if request.soft and request.sampler_mask is None:
        # the sampling itself fades; fading the paste too would bring back what was repainted
        mask = (mask / SOFT_EDGE).clamp(max=1)
    if request.count > 1:
        check_total(image.shape[0] * request.count, images.size_of(image))
    controls = tuple(control.fit(image) for control in request.controls)
    return replace(request, image=image, mask=mask, sampler_mask=sampler_mask, controls=controls)


def seeds_of(request: InpaintRequest) -> tuple[int, ...]:
    """The seed of each result: seed, seed + 1, ... (modulo 2**64)."""
    total = request.image.shape[0] * request.count
    return tuple((request.seed + i) % (MAX_SEED + 1) for i in range(total))


def plan_jobs(request: InpaintRequest, model: InpaintModel, seeds: tuple[int, ...]) -> list[Job]:
    """Jobs for each result whose masks are not empty; parts of one picture get noise of their own."""
    jobs = []
    for source in range(len(request.image)):
        outputs = range(source * request.count, (source + 1) * request.count)
        for number, part in enumerate(parts_of(request, model, source)):
            jobs += [Job(part, output, (seeds[output] + number * PART_SEED) % (MAX_SEED + 1)) for output in outputs]
    return jobs


def parts_of(request: InpaintRequest, model: InpaintModel, source: int) -> list[Part]:
    """The parts of one input image, without those in which either mask is empty."""
    assert request.sampler_mask is not None
    stitch_mask, sampler_mask = request.mask[source : source + 1], request.sampler_mask[source : source + 1]
    touched = torch.maximum(stitch_mask, sampler_mask)
    box = bounding_box(touched)
    if box is None:
        return []
    size, facts = images.size_of(request.image), model.facts
    if request.crop is Crop.OFF:
        found = [Part(source, crop.whole(size, facts.multiple), stitch_mask, sampler_mask)]
    elif request.crop is Crop.AUTO:
        found = [Part(source, crop.around(box, size, facts.native_size, facts.multiple), stitch_mask, sampler_mask)]
    else:
        found = [
            Part(
                source,
                crop.around(region.box, size, facts.native_size, facts.multiple),
                region.own(stitch_mask),
                region.own(sampler_mask),
            )
            for region in regions(touched, APART)
        ]
    return [part for part in found if part.stitch_mask.any() and part.sampler_mask.any()]


def batches(jobs: list[Job], model: InpaintModel) -> list[list[Job]]:
    """Jobs that run together: their canvases have one size, and all of them at most MAX_BATCH_PIXELS."""
    by_canvas: dict[Size, list[Job]] = defaultdict(list)
    for job in jobs:
        by_canvas[job.part.plan.canvas].append(job)
    result = []
    for canvas, group in by_canvas.items():
        at_once = min(model.rows_at_once(canvas), max(1, MAX_BATCH_PIXELS // (canvas.width * canvas.height)))
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

    The hole is every pixel the sampler's mask touches at all, so that an inpainting model sees nothing of what it is to
    replace, and a latent cell is repainted when any of its pixels is in the hole: strokes thinner than a cell survive.
    The VAE's posterior mean is used, where diffusers draws a sample.
    """
    parts = list(dict.fromkeys(job.part for job in jobs))
    rows = torch.tensor([parts.index(job.part) for job in jobs])
    pixels = torch.cat([part.plan.cut(request.image[part.source, None, ..., :3]) for part in parts])
    hole = torch.cat([part.plan.cut_hole(part.sampler_mask) for part in parts])
    pixels, hole = pixels.cpu().permute(0, 3, 1, 2) * 2 - 1, hole.cpu()
    soft = torch.cat([part.plan.cut_mask(part.sampler_mask) for part in parts]).cpu() if request.soft else None

    facts = model.facts
    concat = facts.conditioning is Conditioning.CONCAT
    image = None if concat and schedule.from_noise and soft is None else _latents(model, pixels)[rows]
    masked_image = _latents(model, pixels * (1 - hole[:, None]))[rows] if concat else None
    shape = (1, facts.latent_channels, *(side // facts.downscale for side in pixels.shape[-2:]))
    noise = torch.cat([torch.randn(shape, generator=generator) for generator in generators])
    canvas = Canvas(
        noise=noise,
        mask=to_latent_grid(hole, facts.downscale)[rows],
        hole=hole[rows, None],
        image=image,
        masked_image=masked_image,
        pixels=pixels[rows] if facts.reads_picture else None,
        soft=None if soft is None else to_latent_grid(soft, facts.downscale)[rows],
        places=tuple(Place(images.size_of(request.image), job.part.plan, job.part.source) for job in jobs),
    )

    def cut(pictures: Tensor) -> Tensor:
        rows = [place.plan.cut(pictures[place.source, None]) for place in canvas.places]
        return torch.cat(rows).cpu().permute(0, 3, 1, 2)

    return control.show(canvas, request, cut, schedule, facts)


def _latents(model: InpaintModel, pixels: Tensor) -> Tensor:
    """Latents are small: the loop's arithmetic runs on the CPU in float32, only the network on its own device."""
    return model.encode_image(pixels).mean.cpu()


def paste_job(request: InpaintRequest, job: Job, canvas: Tensor, cells: Tensor, results: Tensor) -> tuple[str, ...]:
    """Join one painted canvas [1, h, w, 3], of whose latent ``cells`` [1, h', w'] those of 1 were repainted, into its
    place in ``results``, and report how."""
    part, box = job.part, job.part.plan.box
    view = (slice(job.output, job.output + 1), box.rows, box.columns)
    # a cell that the mask only touches is new as a whole, and the other parts of the mask are new as well
    new = part.plan.uncut_mask(F.interpolate(cells[None], size=canvas.shape[1:3])[0]) > 0
    assert request.sampler_mask is not None
    new |= request.sampler_mask[part.source, None, box.rows, box.columns] > 0
    joined = stitch(
        results[view],
        part.plan.uncut(canvas),
        part.stitch_mask[:, box.rows, box.columns],
        StitchOptions(blend=request.blend, color_match=request.color_match, grain=request.grain, seed=job.seed),
        repainted=new.to(results),
    )
    results[view] = joined.images
    return joined.reports


def _unchanged(request: InpaintRequest, seeds: tuple[int, ...], notice: str) -> InpaintResult:
    pictures = request.image.repeat_interleave(request.count, dim=0)
    return InpaintResult(images=pictures, mask=request.mask, seeds=seeds, notices=(notice,))
