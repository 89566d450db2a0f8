"""Putting the painted part back so that nobody sees where it begins.

    registration -> tone -> grain -> blend

Each step measures beside what was repainted, where both pictures show the same thing, and corrects the painted picture;
the original is only ever read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .blend import paste
from .grain import add_grain
from .images import as_images, as_masks, pair, size_of
from .masks import bounding_box, expand_box
from .morphology import BoolArray, FloatArray, squared_distance
from .multiband import mix_bands
from .registration import TAPS, Shift, apply_shift, shift_between
from .tone import RING_PIXELS, measure_tone, seam_step
from .types import MAX_SEED, Blend, Box, InputError, check_range

MAX_SHIFT = 16 / 255
"""The largest colour correction: beyond it the difference is content, not the VAE's tone shift."""
SMALL_ERROR = 0.5 / 255
"""A tone difference along the rim that nobody sees."""


@dataclass(frozen=True, kw_only=True)
class StitchOptions:
    """How ``stitch`` joins; raises InputError for what is out of range."""

    blend: Blend = Blend.AUTO
    color_match: float = 1.0
    """0..1: how much of the tone difference measured around the repainted area is taken off; with 0 no blend changes
    the painted colours where the mask is 1."""
    max_shift: float = MAX_SHIFT
    """0..1: the largest colour correction; beyond it the difference is content."""
    register: bool = False
    """Measure how far the painted picture moved, and move it back (whole and part pixels)."""
    grain: float = 0.0
    """0..1: how much of the surroundings' grain is added where the painted part has less."""
    seed: int = 0
    """Decides the grain: picture i of a batch has that of seed + i."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "blend", Blend(self.blend))
        check_range("color_match", self.color_match, 0, 1)
        check_range("max_shift", self.max_shift, 0, 1)
        check_range("grain", self.grain, 0, 1)
        check_range("seed", self.seed, 0, MAX_SEED)


@dataclass(frozen=True)
class Stitched:
    """The joined pictures and what was measured on the way."""

    images: Tensor
    """[B, H, W, C] as the originals; where the mask is 0 they are the originals bit for bit."""
    reports: tuple[str, ...] = ()
    """One line for each picture: the blend that was used and the figures behind it."""
    notices: tuple[str, ...] = ()
    """What the user should see of it."""


def stitch(
    original: Tensor,
    painted: Tensor,
    mask: Tensor,
    options: StitchOptions = StitchOptions(),
    *,
    repainted: Tensor | None = None,
) -> Stitched:
    """``painted`` [B, H, W, 3] joined into ``original`` [B, H, W, 3 or 4] by the stitch mask [B, H, W].

    ``repainted`` [B, H, W] is above 0 wherever the painter was free to change the picture (default: where the mask is
    above 0); beyond it both pictures show the same thing, so shift, tone and grain are measured there. A single
    original, painted picture or mask serves a whole batch. Every blend gives the original where the mask is 0, bit for
    bit, and the corrected painted picture where it is 1, save for multiband on a hard edge (see ``mix_bands``). An
    alpha channel becomes opaque where something was painted.

    ``Blend.AUTO`` is linear where one offset evens the tone out to half an 8-bit level along the rim; else Poisson
    where that at least halves what is left; else multiband: the rim shows other content, which a correction would
    bleed inwards. Its choice is dropped for linear where it has the larger error: the tone difference that is left
    along the rim (``Tone.left_by``) plus the step across the mask's edge (``tone.seam_step``).

    Raises InputError for pictures that do not fit together.
    """
    original, mask = pair(original, mask)
    painted = as_images(painted)[..., :3]
    if size_of(painted) != size_of(original):
        raise InputError(
            f"The painted picture is {size_of(painted)} and the original {size_of(original)}; resize the painted one to"
            " the original's size first."
        )
    batch = max(len(original), len(painted))
    if {len(original), len(painted)} - {1, batch}:
        raise InputError(
            f"There are {len(original)} originals and {len(painted)} painted pictures; give one, or one for each."
        )
    original = original.expand(batch, -1, -1, -1)
    masks = mask.expand(batch, -1, -1)
    free = masks if repainted is None else as_masks(repainted, original)
    images = original.clone()
    reports = []
    for index in range(batch):
        new = painted[index if len(painted) > 1 else 0]
        seed = (options.seed + index) % (MAX_SEED + 1)
        reports.append(_stitch_one(images[index], new, masks[index], free[index] > 0, options, seed))
    return Stitched(images, tuple(reports))


class _Part(NamedTuple):
    """One picture's box around the mask, on the CPU."""

    original: Tensor
    """[H, W, C]."""
    painted: Tensor
    """[H, W, 3]."""
    mask: Tensor
    """[H, W]."""
    repainted: BoolArray

    def joined(self, blend: Blend) -> Tensor:
        """[H, W, C]."""
        result = paste(self.original[None], self.painted[None], self.mask[None])[0]
        if blend is Blend.MULTIBAND:
            mixed = mix_bands(self.original[..., :3].numpy(), self.painted.numpy(), self.mask.numpy())
            result[..., :3] = torch.from_numpy(mixed)
        return result

    def corrected(self, correction: FloatArray) -> _Part:
        """With ``correction`` [H, W, 3] or [3] added to what was painted."""
        return self._replace(painted=(self.painted + torch.from_numpy(correction)).clamp(0, 1))


def _stitch_one(
    target: Tensor, painted: Tensor, mask: Tensor, repainted: Tensor, options: StitchOptions, seed: int
) -> str:
    """Join one painted picture [H, W, 3] into ``target`` [H, W, C], in place; the report."""
    if not mask.any():
        return "the mask is empty: the picture stays as it was"
    notes = []
    box = bounding_box(torch.maximum(mask, repainted.to(mask)))
    assert box is not None
    box = expand_box(box, RING_PIXELS + 1, *mask.shape)
    view = (box.rows, box.columns)
    new = painted[view]
    if options.register:
        shift = shift_between(target[..., :3], painted, (~repainted).float())
        if shift.worth_undoing:
            new = _moved_back(painted, shift, box)
            notes.append(f"moved back by {-shift.dx:+.2f}, {-shift.dy:+.2f} px")
        else:
            notes.append("not moved")
    original, new, alpha = (part.detach().cpu().contiguous() for part in (target[view], new, mask[view]))
    part = _Part(original, new, alpha, repainted[view].cpu().numpy())
    part, blend, note = _match_tone(part, options)
    notes.append(note)
    if options.grain > 0:
        part, note = _match_grain(part, options.grain, seed)
        notes.append(note)
    target[view] = part.joined(blend).to(target)
    chosen = f"auto chose {blend.value}" if options.blend is Blend.AUTO else blend.value
    return "; ".join([chosen, *notes])


def _moved_back(painted: Tensor, shift: Shift, box: Box) -> Tensor:
    """The box's part of the picture with the shift undone; what comes in from beyond the picture repeats its edge."""
    height, width, _ = painted.shape
    wider = expand_box(box, math.ceil(max(abs(shift.dx), abs(shift.dy))) + TAPS, height, width)
    back = apply_shift(painted[None, wider.rows, wider.columns], -shift)[0]
    top, left = box.top - wider.top, box.left - wider.left
    return back[top : top + box.height, left : left + box.width]


def _match_tone(part: _Part, options: StitchOptions) -> tuple[_Part, Blend, str]:
    """The part with its tone matched, the blend to join it by, and why."""
    linear = Blend.LINEAR if options.blend is Blend.AUTO else options.blend
    if options.color_match == 0:
        return part, linear, "colours as they are"
    original, painted = part.original[..., :3].numpy(), part.painted.numpy()
    tone = measure_tone(original, painted, part.repainted, options.max_shift)
    if tone is None:
        return part, linear, "nothing around the mask to match the tone with"
    offset = _within(tone.offset, options.max_shift)
    strength = np.float32(options.color_match)
    even = part.corrected(strength * offset)
    note = f"tone off by {_levels(_rms(tone.offset))}"
    if options.blend in (Blend.LINEAR, Blend.MULTIBAND):
        return even, options.blend, note
    local = _within(tone.local(), options.max_shift)
    followed = part.corrected(strength * local)
    left, left_local = tone.left_by(offset), tone.left_by(local)
    note += f"; one offset leaves {_levels(left)}, following the rim {_levels(left_local)}"
    if options.blend is Blend.POISSON:
        return followed, Blend.POISSON, note
    if left <= SMALL_ERROR:
        return even, Blend.LINEAR, note
    chosen, blend = (followed, Blend.POISSON) if left_local <= max(SMALL_ERROR, left / 2) else (even, Blend.MULTIBAND)
    left_chosen = left_local if blend is Blend.POISSON else left
    error, error_linear = left_chosen + _seam_step(chosen, blend), left + _seam_step(even, Blend.LINEAR)
    note += f"; with the step at the seam that is {_levels(error)}, {_levels(error_linear)} for linear"
    return (chosen, blend, note) if error <= error_linear else (even, Blend.LINEAR, note)


def _seam_step(part: _Part, blend: Blend) -> float:
    return seam_step(part.joined(blend)[..., :3].numpy(), part.mask.numpy())


def _match_grain(part: _Part, strength: float, seed: int) -> tuple[_Part, str]:
    """The part with the grain it lacks against the original around it, and how much that was."""
    around = squared_distance(part.repainted, RING_PIXELS**2 + 1)
    ring = (around > 0) & (around <= RING_PIXELS**2)
    inside = part.mask.numpy() >= 0.5
    original, painted = part.original[..., :3].numpy(), part.painted.numpy()
    generator = torch.Generator("cpu").manual_seed(seed)
    grainy, wanted, had = add_grain(painted, original, inside, ring, strength, generator)
    note = f"grain {_levels(had)} inside, {_levels(wanted)} around"
    return part._replace(painted=torch.from_numpy(grainy)), note


def _within(correction: FloatArray, largest: float) -> FloatArray:
    return correction.clip(-np.float32(largest), np.float32(largest))


def _rms(values: FloatArray) -> float:
    return float(np.sqrt(np.mean(values**2)))


def _levels(value: float) -> str:
    return f"{value * 255:.1f}/255"
