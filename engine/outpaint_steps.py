"""Growing a picture step by step: every piece is painted at the model's own size, next to what is there already.

A frame of new area around a large picture, painted at once, would be shown to the model as the whole canvas scaled
down. Here the picture grows by ``stages`` instead, each a strip on one side that is at most half a window wide, and a
strip is walked in windows of the model's native size, pixel for pixel. Every window sees what is painted beside it,
before it and behind it. Where the whole canvas of a stage fits into one window, all sides are painted together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import images
from .fill import FillMethod, FillNetwork, fill
from .host import Host, ManagedModule, Progress, Role
from .inpaint import SOFT_EDGE, inpaint, normalise, seeds_of
from .models.protocol import InpaintModel
from .outpaint import NONE, Length, Padding, Unit, keep_profile, new_area, rise
from .sampling import Stopwatch
from .types import MAX_SEED, MAX_SIDE, Box, Compat, Crop, InpaintRequest, InpaintResult, InputError, Size, check_range

MIN_GROWTH = 16
"""Pixels a stage may add to a side, at least."""
MIN_WINDOW = 64
WINDOW_SEED = 0x6A09E667
"""Added to the seed for each further window: 2**32 times the square root of 2, less 1. Torch's CPU generator uses the
lower 32 bits of a seed; multiples of this one stay far apart in them, and from the parts of a mask (inpaint.PART_SEED),
so that windows keep clear of the batch's seed + i too."""
CONTEXT = 4
"""A window shows at least one part in so many of what is there already."""


@dataclass(frozen=True, kw_only=True)
class GrowthOptions:
    """How ``outpaint`` walks; raises InputError for what is out of range."""

    growth: Length = NONE
    """The most a stage adds to a side: pixels, or percent of the side it has by then; 16 pixels at least. 0 is half a
    window."""
    overlap: int = 64
    """0..16384 pixels of what earlier stages and windows painted that are painted again, fading out as a smoothstep.
    The original is reached into as far as the request's mask does, whatever the overlap."""
    window: int = 0
    """64..16384 pixels: the side of the square that the model is shown. 0 is its native size, pixel for pixel; larger
    windows are shown scaled down to it: fewer runs and more overview, less detail."""
    fill: FillMethod | None = None
    """What each stage's new area shows before it is painted; None leaves what the canvas has there. It is seen where
    strength is below 1, and by models that were not made for inpainting."""
    network: FillNetwork | None = None
    """For the fills that need one."""

    def __post_init__(self) -> None:
        if self.growth.value and self.growth.unit is Unit.PIXELS:
            check_range("growth", self.growth.pixels(0), MIN_GROWTH, MAX_SIDE, "pixels, or 0 for half a window")
        elif self.growth.value:
            check_range("growth", self.growth.value, 1, 10000, "percent, or 0 for half a window")
        check_range("overlap", self.overlap, 0, MAX_SIDE, "pixels")
        if self.window:
            check_range("window", self.window, MIN_WINDOW, MAX_SIDE, "pixels, or 0 for the model's native size")

    def growth_within(self, window: int | None) -> Length:
        """``growth`` for windows of this side; None: the model is shown everything at once."""
        if self.growth.value:
            return self.growth
        return Length(MAX_SIDE if window is None else max(window // 2, MIN_GROWTH))


class Stage(NamedTuple):
    """One step of growth, on the final canvas."""

    known: Box
    """What is there before."""
    extent: Box
    """And after."""
    reach: Padding
    """Pixels painted again on the inner side of what is new."""
    windows: tuple[Box, ...]
    """What the model is shown, one after the other; together they hold all that is new and the reach."""

    @property
    def step(self) -> Padding:
        known, extent = self.known, self.extent
        return Padding(
            known.left - extent.left, known.top - extent.top, extent.right - known.right, extent.bottom - known.bottom
        )


def stages(size: Size, padding: Padding, growth: Length, window: int | None = None) -> tuple[Padding, ...]:
    """The steps in which a picture of ``size`` grows by ``padding``; they add up to it.

    What is cut goes first, in a step of its own. No step adds more than ``growth`` (pixels, or percent of the side as
    it is by then; at least 16 pixels) to a side; a side that needs several steps grows in parts as even as can be. The
    sides take turns: left, top, right, bottom. Steps whose canvas fits into a square of ``window`` pixels, and all
    where it is None, add to all sides at once.
    """
    steps = [padding.cut] if padding.cut != Padding() else []
    size, missing = padding.cut.canvas(size), padding.added
    while missing != Padding():
        step = _next_step(size, missing, growth)
        together = window is None or max(step.canvas(size)) <= window
        steps += [step] if together else [Padding(**{side: n}) for side, n in vars(step).items() if n]
        size, missing = step.canvas(size), missing - step
    return tuple(steps)


def _next_step(size: Size, missing: Padding, growth: Length) -> Padding:
    across, down = (max(growth.pixels(side), MIN_GROWTH) for side in size)
    parts = (
        math.ceil(pixels / max(math.ceil(pixels / limit), 1))
        for pixels, limit in zip(missing.sides, (across, down, across, down), strict=True)
    )
    return Padding(*parts)


def plan_stages(mask: Tensor, original: Box, window: int | None, options: GrowthOptions) -> list[Stage]:
    """How the picture at ``original`` grows to the canvas of ``mask`` [B, H, W], which is the request's; in windows of
    ``window`` pixels, or one for each stage where it is None."""
    canvas = images.size_of(mask)
    left, top, right, bottom = original
    padding = Padding(left, top, canvas.width - right, canvas.height - bottom)
    reach = _reach(mask, original, options.overlap)
    known, plan = original, list[Stage]()
    for step in stages(original.size, padding, options.growth_within(window), window):
        extent = Box(known.left - step.left, known.top - step.top, known.right + step.right, known.bottom + step.bottom)
        plan.append(Stage(known, extent, reach, walk(extent, step, reach, window)))
        known = extent
    return plan


def _reach(mask: Tensor, original: Box, overlap: int) -> Padding:
    """``overlap``, and no less than the mask reaches into the original from each side."""
    inside = mask[:, original.rows, original.columns].amax(dim=0) > 0
    columns, rows = inside.all(dim=0).long(), inside.all(dim=1).long()
    depths = (int(line.cumprod(0).sum()) for line in (columns, rows, columns.flip(0), rows.flip(0)))
    # the faint end of a feather counts as 0 (images.NEARLY), which hides up to a fourteenth of it
    return Padding(*(max(overlap, depth + depth // 8 + 1) if depth else overlap for depth in depths))


def walk(extent: Box, step: Padding, reach: Padding, window: int | None) -> tuple[Box, ...]:
    """The windows of a stage that ends at ``extent``: all of it where it fits into one, else squares from one end to
    the other of the strip that ``step`` adds on one side.

    A square holds the strip's thickness, the ``reach`` and a quarter of a window more of what is there already, and
    shares at least a quarter of itself with the one before.
    """
    if window is None or max(extent.size) <= window:
        return (extent,)
    ((side, thickness),) = ((side, pixels) for side, pixels in vars(step).items() if pixels)
    depth = getattr(reach, side)
    square = max(window, thickness + depth + window // CONTEXT)
    shared = max(depth, square // CONTEXT)
    if side in ("left", "right"):
        left = extent.left if side == "left" else max(extent.right - square, extent.left)
        right = min(left + square, extent.right)
        spans = _spread(extent.top, extent.bottom, square, shared)
        return tuple(Box(left, top, right, bottom) for top, bottom in spans)
    top = extent.top if side == "top" else max(extent.bottom - square, extent.top)
    bottom = min(top + square, extent.bottom)
    return tuple(Box(left, top, right, bottom) for left, right in _spread(extent.left, extent.right, square, shared))


def _spread(low: int, high: int, length: int, shared: int) -> Iterator[tuple[int, int]]:
    """Evenly spaced spans of ``length`` that cover low..high, each with ``shared`` or more in common with the next."""
    slack = high - low - length
    if slack <= 0:
        yield low, high
        return
    steps = math.ceil(slack / (length - shared))
    for index in range(steps + 1):
        start = low + slack * index // steps
        yield start, start + length


def window_mask(stage: Stage, index: int, overlap: int) -> Tensor:
    """What the window ``index`` of a stage paints, [h, w] of its box: 1 on what is new, falling to 0 over the stage's
    reach and over ``overlap`` pixels of what the window before has painted."""
    known, extent, box, step, reach = stage.known, stage.extent, stage.windows[index], stage.step, stage.reach
    keep_rows = keep_profile(known.height, step.top, step.bottom, reach.top, reach.bottom)
    keep_columns = keep_profile(known.width, step.left, step.right, reach.left, reach.right)
    rows = keep_rows[box.top - extent.top : box.bottom - extent.top]
    columns = keep_columns[box.left - extent.left : box.right - extent.left]
    mask = 1 - rows[:, None] * columns[None, :]
    if index == 0:
        return mask
    before = stage.windows[index - 1]
    if before.top == box.top:
        return mask * _fresh(box.width, before.right - box.left, overlap)[None, :]
    return mask * _fresh(box.height, before.bottom - box.top, overlap)[:, None]


def _fresh(length: int, painted: int, overlap: int) -> Tensor:
    """0 on the first ``painted`` pixels, of which the last ``overlap`` rise to the 1 of the others."""
    fade = min(overlap, painted)
    return torch.cat([torch.zeros(painted - fade), rise(length - painted + fade, fade)])


@torch.inference_mode()
def outpaint(
    request: InpaintRequest,
    original: Box,
    model: InpaintModel,
    host: Host,
    options: GrowthOptions = GrowthOptions(),
) -> InpaintResult:
    """Paint what lies around ``original`` on the canvas, stage by stage; see this module's head for why.

    ``request`` is the one for ``inpaint``: the ``image`` and ``mask`` that ``pad`` made, whose ``box`` is ``original``.
    Where the mask is 0 the canvas is returned bit-identical, and no window paints over the original by more than the
    mask says. With ``Crop.OFF`` each stage is a single window, everything that is there by then.

    Window n (from 0, over all stages) of a picture with seed s is painted with the seed s + n * WINDOW_SEED modulo
    2**64, so that no two windows have the same noise; a run that takes one window gives what ``inpaint`` gives. The
    model sees one window at a time: the memory it needs does not grow with the canvas.

    Raises MendError for input or a model that cannot be used, for a width, height or ``compat`` in the request, which
    would move the canvas, and the host's own interrupt.
    """
    request = _normalise(request, original)
    seeds = seeds_of(request)
    window = None if request.crop is Crop.OFF else options.window or model.facts.native_size
    plan = plan_stages(request.mask, original, window, options)
    canvas = request.image.repeat_interleave(request.count, dim=0)
    if not plan:
        notice = "No room was added, so nothing was painted."
        return InpaintResult(images=canvas, mask=request.mask, seeds=seeds, notices=(notice,))

    windows = sum(len(stage.windows) for stage in plan)
    bar = host.progress(windows * request.steps, "outpaint", model.facts.latent_format)
    clock, results = Stopwatch(), list[InpaintResult]()
    for stage in plan:
        with clock.phase("fill"):
            _fill(canvas, stage, options, request.seed, host)
        for index, box in enumerate(stage.windows):
            number = len(results)
            part = _window_request(request, canvas, stage, index, options.overlap)
            part = replace(part, seed=(request.seed + number * WINDOW_SEED) % (MAX_SEED + 1))
            painted = inpaint(part, model, _Share(host, bar, number * request.steps, request.steps))
            canvas[:, box.rows, box.columns] = painted.images
            # the figures are kept, the pictures are not
            results.append(replace(painted, images=painted.images[:0].clone(), mask=painted.mask[:0].clone()))
            bar.update(len(results) * request.steps)
    return _summary(results, canvas, request.mask, seeds, clock)


def _normalise(request: InpaintRequest, original: Box) -> InpaintRequest:
    if request.compat is not Compat.OFF or request.width or request.height:
        raise InputError(
            "Outpainting paints on the canvas as it is; leave width and height at 0 and compat off, and resize the"
            " picture before."
        )
    request = normalise(request)
    canvas = images.size_of(request.image)
    if not (
        0 <= original.left < original.right <= canvas.width and 0 <= original.top < original.bottom <= canvas.height
    ):
        raise InputError(
            f"The original is said to lie at {tuple(original)} (left, top, right, bottom) of a canvas of {canvas}; give"
            " the box of the padded picture."
        )
    return request


def _fill(canvas: Tensor, stage: Stage, options: GrowthOptions, seed: int, host: Host) -> None:
    """Fill what is new in a stage from what is there, in place."""
    if options.fill is None:
        return
    known, extent = stage.known, stage.extent
    inner = Box(known.left - extent.left, known.top - extent.top, known.right - extent.left, known.bottom - extent.top)
    view = canvas[:, extent.rows, extent.columns]
    hole = new_area(extent.size, inner).to(canvas)

    def check(done: float, total: int) -> None:
        host.check_interrupt()

    view.copy_(fill(view, hole, options.fill, seed=seed, network=options.network, on_progress=check))


def _window_request(request: InpaintRequest, canvas: Tensor, stage: Stage, index: int, overlap: int) -> InpaintRequest:
    """The request that paints one window: its part of every picture and of both masks, within the window's own mask."""
    box = stage.windows[index]
    view = (slice(None), box.rows, box.columns)
    own = window_mask(stage, index, overlap).to(request.mask)
    # soft sampling fades by itself, see inpaint.normalise
    paste = (own / SOFT_EDGE).clamp(max=1) if request.soft else own
    assert request.sampler_mask is not None
    stitch_mask, sampler_mask = request.mask[view].minimum(paste), request.sampler_mask[view].minimum(own)
    return replace(
        request,
        image=canvas[view],
        mask=stitch_mask.repeat_interleave(request.count, dim=0),
        sampler_mask=sampler_mask.repeat_interleave(request.count, dim=0),
        count=1,
        controls=tuple(control.part(box, request.count) for control in request.controls),
    )


def _summary(
    windows: list[InpaintResult], canvas: Tensor, mask: Tensor, seeds: tuple[int, ...], clock: Stopwatch
) -> InpaintResult:
    timings = clock.seconds
    for phase, seconds in (item for result in windows for item in result.timings.items()):
        timings[phase] += seconds
    reports = zip(*(result.reports for result in windows if result.reports), strict=True)
    return InpaintResult(
        images=canvas,
        mask=mask,
        seeds=seeds,
        notices=tuple(dict.fromkeys(notice for result in windows for notice in result.notices)),
        reports=tuple("; ".join(filter(None, lines)) for lines in reports),
        timings=dict(timings),
    )


@dataclass(frozen=True)
class _ShareOfBar:
    """A bar that fills its share of a longer one."""

    bar: Progress
    total: int
    start: int
    share: int

    def update(self, step: int, preview: Tensor | None = None) -> None:
        self.bar.update(self.start + self.share * step // self.total, preview)


@dataclass(frozen=True)
class _Share:
    """A host on which a run moves its share of the whole bar; everything else is the host's own."""

    host: Host
    bar: Progress
    start: int
    share: int

    @property
    def name(self) -> str:
        return self.host.name

    def dtype(self, role: Role) -> torch.dtype:
        return self.host.dtype(role)

    def manage(self, module: nn.Module, role: Role) -> ManagedModule:
        return self.host.manage(module, role)

    def free_memory(self) -> int:
        return self.host.free_memory()

    def total_memory(self) -> int:
        return self.host.total_memory()

    def progress(self, total: int, description: str, latent_format: str | None = None) -> Progress:
        return _ShareOfBar(self.bar, total, self.start, self.share)

    def check_interrupt(self) -> None:
        self.host.check_interrupt()

    def model_folders(self, kind: str) -> Sequence[Path]:
        return self.host.model_folders(kind)
