"""Saves two runs as an ordinary diffusers folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from .pipeline import load_runs
from .tokenizer import write_vocabulary

LIMIT = 20_000_000
"""Bytes that the whole folder may have."""
PARTS = ("unet", "vae", "text_encoder")
CARD = Path(__file__).with_name("model_card.md")


def export(vae_run: Path, unet_run: Path, target: Path) -> int:
    """Writes fp16 safetensors beside their configs and the model card, replacing ``target`` in one move.

    Returns the folder's bytes; raises SystemExit when there are more than LIMIT.
    """
    pipeline = load_runs(vae_run, unet_run)
    for part in PARTS:
        getattr(pipeline, part).half()
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipeline.save_pretrained(partial, safe_serialization=True)
    write_vocabulary(partial / "tokenizer")
    _name_as_ever(partial / "text_encoder" / "model.safetensors")
    _load_as_float32(partial / "text_encoder" / "config.json")
    shutil.copyfile(CARD, partial / "README.md")
    for path in partial.rglob("*.safetensors"):
        path.chmod(0o644)  # safetensors writes files that only their owner may read
    size = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    if size > LIMIT:
        raise SystemExit(f"{partial} has {size / 1e6:.1f} MB, more than the {LIMIT / 1e6:.0f} MB that may be shipped.")
    shutil.rmtree(target, ignore_errors=True)
    partial.replace(target)
    return size


def _load_as_float32(config: Path) -> None:
    """Without a dtype asked for, diffusers' parts load as float32, and transformers' as what their config says."""
    settings = json.loads(config.read_text())
    config.write_text(json.dumps({**settings, "dtype": "float32"}, indent=2) + "\n")


def _name_as_ever(file: Path) -> None:
    """Weights of a CLIPTextModel under ``text_model.``, as transformers before 5.6 named and still needs them."""
    prefix = "text_model."
    state = {prefix + name.removeprefix(prefix): tensor for name, tensor in load_file(file).items()}
    save_file(state, file, metadata={"format": "pt"})
