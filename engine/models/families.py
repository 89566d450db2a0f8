"""The families that can be loaded."""

from __future__ import annotations

from .family import Family
from .flux import FLUX
from .qwen_image import QWEN_IMAGE, QWEN_IMAGE_EDIT, QWEN_IMAGE_EDIT_2509, QWEN_IMAGE_EDIT_2511
from .sd3 import SD3
from .sdxl import SDXL
from .stable_diffusion import SD1, SD2

_QWEN = (QWEN_IMAGE, QWEN_IMAGE_EDIT, QWEN_IMAGE_EDIT_2509, QWEN_IMAGE_EDIT_2511)
FAMILIES: dict[str, Family] = {family.name: family for family in (SD1, SD2, SDXL, FLUX, SD3, *_QWEN)}
"""By name."""


def supported() -> str:
    """For messages."""
    return ", ".join(family.title for family in FAMILIES.values())
