"""Runs under ComfyUI's own Python: MendInpaint from end to end on tiny models, in pretended graphics memory.

Prints as one line of JSON how far each picture is from the one that plain modules make on the CPU; test_memory.py says
how far it may be.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from unittest import mock

import inside
import torch
from inside import CPU, VRAM, fake_vram
from torch import Tensor

inside.boot()
sys.path.insert(0, str(inside.ROOT / "tests"))

import comfy.model_management as mm  # noqa: E402
from comfyui_mend.engine.host import LocalHost  # noqa: E402
from comfyui_mend.engine.inpaint import inpaint  # noqa: E402
from comfyui_mend.engine.memory import log  # noqa: E402
from comfyui_mend.engine.models import diffusers_model  # noqa: E402
from comfyui_mend.engine.models.diffusers_model import StableDiffusionModel  # noqa: E402
from comfyui_mend.engine.types import Compat, Crop, InpaintRequest  # noqa: E402
from comfyui_mend.nodes.comfy_host import ComfyHost, MendModel  # noqa: E402
from comfyui_mend.nodes.inpaint import MendInpaint  # noqa: E402
from tiny import engine_model, photo_and_mask, tiny_pipeline  # noqa: E402

MEMORIES = {
    "full": (1000.0, "NORMAL_VRAM"),
    "40 %": (0.4, "NORMAL_VRAM"),
    "10 %": (0.1, "NORMAL_VRAM"),
    "no VRAM": (1000.0, "NO_VRAM"),
}

COMMON = {"scheduler": "K_EULER_ANCESTRAL", "steps": 3, "guidance_scale": 5.0, "seed": 3, "count": 2}
RUNS = {
    "first": {"prompt": "a cat", "negative_prompt": "blurry", "strength": 1.0},
    # the negative prompt's embeddings are remembered, the prompt's come from the encoder
    "new prompt": {"prompt": "a (dog:1.3)", "negative_prompt": "blurry", "strength": 0.7},
    "long prompt": {"prompt": "a cat " * 60, "negative_prompt": "blurry", "strength": 0.7},
    "whole picture": {"prompt": "a cat", "negative_prompt": "", "strength": 0.7, "crop": Crop.OFF.value},
    "compat": {"prompt": "a cat", "negative_prompt": "", "strength": 0.7, "compat": Compat.DIFFUSERS.value},
}
# with --gpu-only the pictures live on the card
PLACES = {"picture on the card": (VRAM, CPU), "mask on the card": (CPU, VRAM), "both on the card": (VRAM, VRAM)}


# beside the activations of real pictures a tiny network would weigh nothing, and always fit
NO_ACTIVATIONS = {"RESERVE": 0, "VAE_ENCODE_BYTES": 1, "VAE_DECODE_BYTES": 1}


def expected(channels: int, image: Tensor, mask: Tensor, runs: Iterable[str] = RUNS) -> dict[str, Tensor]:
    host = LocalHost(CPU)
    model = engine_model(tiny_pipeline(in_channels=channels), host)
    pictures = {}
    for name in runs:
        options = RUNS[name]
        enums = {"crop": Crop(options.get("crop", "auto")), "compat": Compat(options.get("compat", "off"))}
        request = InpaintRequest(image=image, mask=mask, **{**COMMON, **options, **enums})
        pictures[name] = inpaint(request, model, host).images
    return pictures


def differences(model: MendModel, image: Tensor, mask: Tensor, wanted: dict[str, Tensor]) -> dict[str, float]:
    """The largest difference from the picture wanted, of every run and place."""

    def difference(name: str, image_on: torch.device = CPU, mask_on: torch.device = CPU) -> float:
        made, _, _ = MendInpaint.execute(
            model=model, image=image.to(image_on), mask=mask.to(mask_on), **COMMON, **RUNS[name]
        ).result
        assert made.device == image_on
        return float((made.to(CPU) - wanted[name]).abs().max())

    return {name: difference(name) for name in RUNS} | {
        place: difference("new prompt", *devices) for place, devices in PLACES.items()
    }


def pictures() -> dict:
    """Differences from the CPU's pictures, and the most of the UNet that was on the card as it ran."""
    image, mask = photo_and_mask()
    report = {}
    for channels in (9, 4):
        wanted = expected(channels, image, mask)
        for memory, (share, state) in MEMORIES.items():
            pipeline = tiny_pipeline(in_channels=channels)
            with (
                mock.patch.multiple(diffusers_model, **NO_ACTIVATIONS),
                mock.patch.object(StableDiffusionModel, "denoiser_bytes", 1e-3),
                fake_vram(share * mm.module_size(pipeline.unet), vram_state=state),
                torch.inference_mode(),
            ):
                host = ComfyHost()
                model = MendModel(engine_model(pipeline, host), host)
                unet, shares = model.model.denoiser.patcher, []
                pipeline.unet.register_forward_pre_hook(
                    lambda *_, unet=unet, shares=shares: shares.append(unet.loaded_size() / unet.model_size())
                )
                report[f"{channels} channels, {memory}"] = {
                    "differences": differences(model, image, mask, wanted),
                    "most loaded": max(shares),
                }
                mm.unload_all_models()
    return report


def bands() -> dict:
    """One run where the VAE never fits: the difference, and the largest input of its convolutions."""
    image, mask = photo_and_mask()
    wanted = expected(4, image, mask, ["new prompt"])
    report = {}
    for memory, (share, state) in MEMORIES.items():
        pipeline = tiny_pipeline(in_channels=4)
        largest = {}

        def watch(_, inputs, largest=largest):
            where = str(inputs[0].device)
            largest[where] = max(largest.get(where, 0), inputs[0].numel())

        for layer in pipeline.vae.modules():
            if isinstance(layer, torch.nn.Conv2d):
                layer.register_forward_pre_hook(watch)
        huge = {**NO_ACTIVATIONS, "VAE_ENCODE_BYTES": 2**20, "VAE_DECODE_BYTES": 2**20, "BAND_BYTES": (2**20,)}
        with (
            mock.patch.multiple(diffusers_model, **huge),
            mock.patch.object(StableDiffusionModel, "denoiser_bytes", 1e-3),
            fake_vram(share * mm.module_size(pipeline.vae), vram_state=state),
            torch.inference_mode(),
        ):
            host = ComfyHost()
            model = MendModel(engine_model(pipeline, host), host)
            made, _, _ = MendInpaint.execute(model=model, image=image, mask=mask, **COMMON, **RUNS["new prompt"]).result
            difference = float((made - wanted["new prompt"]).abs().max())
            report[memory] = {"difference": difference, "largest": largest}
            mm.unload_all_models()
    return report


def out_of_memory() -> dict:
    """A card on which the UNet fails on more than one row."""
    image, mask = photo_and_mask()
    wanted = expected(9, image, mask, ["new prompt"])
    pipeline, rows, lines = tiny_pipeline(in_channels=9), [], []

    def fail(_, inputs):
        rows.append(len(inputs[0]))
        if rows[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    pipeline.unet.register_forward_pre_hook(fail)
    with (
        fake_vram(2.0**40),
        torch.inference_mode(),
        mock.patch.object(log, "warning", lambda text, *words: lines.append(text % words)),
    ):
        host = ComfyHost()
        model = MendModel(engine_model(pipeline, host), host)
        made, _, _ = MendInpaint.execute(model=model, image=image, mask=mask, **COMMON, **RUNS["new prompt"]).result
        mm.unload_all_models()
    return {"rows": rows, "difference": float((made - wanted["new prompt"]).abs().max()), "log": lines}


if __name__ == "__main__":
    with torch.no_grad():
        inside.answer({check.__name__: check() for check in (pictures, bands, out_of_memory)})
