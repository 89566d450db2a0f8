"""The families that can be loaded."""

from __future__ import annotations

from .family import Family
from .flux import FLUX
from .sd3 import SD3
from .sdxl import SDXL
from .stable_diffusion import SD1, SD2

FAMILIES: dict[str, Family] = {family.name: family for family in (SD1, SD2, SDXL, FLUX, SD3)}
"""By name."""


def supported() -> str:
    """For messages."""
    return ", ".join(family.title for family in FAMILIES.values())
