"""Saves two runs as an ordinary diffusers folder."""

from __future__ import annotations

import shutil
from pathlib import Path

from .pipeline import load_runs

LIMIT = 20_000_000
"""Bytes that the whole folder may have."""
PARTS = ("unet", "vae", "text_encoder")
CARD = Path(__file__).with_name("model_card.md")


def export(vae_run: Path, unet_run: Path, preset: str, target: Path) -> int:
    """Writes fp16 safetensors beside their configs and the model card, replacing ``target`` in one move.

    Returns the folder's bytes; raises SystemExit when there are more than LIMIT.
    """
    pipeline = load_runs(vae_run, unet_run, preset)
    for part in PARTS:
        getattr(pipeline, part).half()
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial, safe_serialization=True)
    shutil.copyfile(CARD, partial / "README.md")
    size = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    if size > LIMIT:
        raise SystemExit(f"{partial} has {size / 1e6:.1f} MB, more than the {LIMIT / 1e6:.0f} MB that may be shipped.")
    shutil.rmtree(target, ignore_errors=True)
    partial.replace(target)
    return size
