"""Putting the painted part back so that nobody sees where it begins."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .blend import match_ring, paste
from .types import Blend, check_range


@dataclass(frozen=True, kw_only=True)
class StitchOptions:
    """How ``stitch`` joins; raises InputError for what is out of range."""

    blend: Blend = Blend.AUTO
    color_match: float = 1.0
    """0..1: how much of the tone difference measured on the ring is taken off."""
    max_shift: float = 16 / 255
    """0..1: the largest colour correction; beyond it the difference is content."""
    register: bool = False
    """Measure on the ring how far the painted picture moved, and move it back (whole and part pixels)."""
    grain: float = 0.0
    """0..1: how much of the surroundings' grain is added where the painted part has less."""
    seed: int = 0
    """Decides the grain."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "blend", Blend(self.blend))
        check_range("color_match", self.color_match, 0, 1)
        check_range("max_shift", self.max_shift, 0, 1)
        check_range("grain", self.grain, 0, 1)


@dataclass(frozen=True)
class Stitched:
    """The joined pictures and what was measured on the way."""

    images: Tensor
    """[B, H, W, C] as the originals; where the mask is 0 they are the originals bit for bit."""
    reports: tuple[str, ...] = ()
    """One line for each picture: the blend that was used and the figures behind it."""


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
    above 0); beyond it both pictures show the same thing, so tone, shift and grain are measured there.
    """
    repainted = mask if repainted is None else repainted
    return Stitched(paste(original, match_ring(painted, original[..., :3], repainted), mask))
