"""The families that can be loaded."""

from __future__ import annotations

from . import qwen_text, t5
from .family import Family
from .flux import FLUX
from .qwen_image import QWEN_IMAGE, QWEN_IMAGE_EDIT, QWEN_IMAGE_EDIT_2509, QWEN_IMAGE_EDIT_2511
from .sd3 import SD3
from .sdxl import SDXL
from .stable_diffusion import SD1, SD2

_QWEN = (QWEN_IMAGE, QWEN_IMAGE_EDIT, QWEN_IMAGE_EDIT_2509, QWEN_IMAGE_EDIT_2511)
FAMILIES: dict[str, Family] = {family.name: family for family in (SD1, SD2, SDXL, FLUX, SD3, *_QWEN)}
"""By name."""

TOKENIZER_FOLDERS = (t5.TOKENIZER_FOLDERS, qwen_text.TOKENIZER_FOLDERS)
"""Kinds of ``Host.model_folders`` that ComfyUI has beside its models, for files that cannot hold their tokenizer."""


def supported() -> str:
    """For messages."""
    return ", ".join(family.title for family in FAMILIES.values())
