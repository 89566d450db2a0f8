"""Runs under ComfyUI's own Python: the same tiny weights as diffusers modules and as ComfyUI's MODEL, CLIP and VAE.

Prints as one line of JSON how far the engine's pictures and latents are apart; test_native.py says how far they may be.
"""

from __future__ import annotations

import sys

import inside
import torch

inside.boot()
sys.path.insert(0, str(inside.ROOT / "tests"))

from comfy.cli_args import args  # noqa: E402

args.force_fp32 = args.fp32_text_enc = True

from comfyui_mend.engine.host import LocalHost  # noqa: E402
from comfyui_mend.engine.inpaint import inpaint  # noqa: E402
from comfyui_mend.engine.models.protocol import Posterior  # noqa: E402
from comfyui_mend.engine.schedulers import SCHEDULERS  # noqa: E402
from comfyui_mend.engine.types import Compat, Crop, InpaintRequest  # noqa: E402
from comfyui_mend.nodes.native import NativeModel  # noqa: E402
from native_tiny import native_sd  # noqa: E402
from tiny import engine_model, photo_and_mask, tiny_pipeline  # noqa: E402

HOST = LocalHost(torch.device("cpu"))


class Watched:
    """A model whose latents are kept, and whose VAE gives the mean only, as ComfyUI's does."""

    def __init__(self, model):
        self.model, self.latents = model, []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def encode_image(self, pixels):
        mean = self.model.encode_image(pixels).mean
        return Posterior(mean, torch.zeros_like(mean))

    def decode(self, latents):
        self.latents.append(latents)
        return self.model.decode(latents)


def relative(expected, found):
    return float((expected - found).abs().max() / expected.abs().max())


def compare(reference, native, **options):
    """Relative difference of latents, and largest difference of pictures."""
    image, mask = photo_and_mask()
    request = InpaintRequest(
        image=image,
        mask=mask,
        **{"prompt": "a cat", "negative_prompt": "blurry, (bad:1.3)", "seed": 5, "steps": 8, **options},
    )
    models = [Watched(reference), Watched(native)]
    results = [inpaint(request, model, HOST).images for model in models]
    latents = [torch.cat([part.flatten() for part in model.latents]) for model in models]
    return {
        "latents": relative(*latents),
        "pixels": float((results[0] - results[1]).abs().max()),
        "change": float((results[0] - image).abs().max()) if results[0].shape == image.shape else None,
    }


def stable_diffusion():
    rows = {}
    for channels in (9, 4):
        pipeline = tiny_pipeline(in_channels=channels, groups=32)
        tiny = native_sd(pipeline)
        reference, native = engine_model(pipeline), NativeModel(tiny.model, tiny.vae, tiny.clip, native_size=128)
        for scheduler in SCHEDULERS:
            rows[f"{channels} {scheduler}"] = compare(reference, native, scheduler=scheduler)
        for name, options in {
            "strength .6": {"strength": 0.6, "scheduler": "K_EULER"},
            "compat": {"compat": Compat.DIFFUSERS, "scheduler": "K_EULER"},
            "compat strength .6": {"compat": Compat.DIFFUSERS, "strength": 0.6, "scheduler": "DDIM"},
            "count": {"count": 3, "scheduler": "K_EULER_ANCESTRAL"},
            "soft": {"soft": True},
            "whole": {"crop": Crop.OFF},
            "guidance 1": {"guidance_scale": 1.0},
        }.items():
            rows[f"{channels} {name}"] = compare(reference, native, **options)
    return rows


if __name__ == "__main__":
    with torch.no_grad():
        inside.answer(stable_diffusion())
