"""Runs under ComfyUI's own Python: FLUX, Stable Diffusion 3 and Qwen-Image of diffusers' modules, in pretended graphics
memory.

Prints as one line of JSON how far each picture is from the one that plain modules make on the CPU; test_flow_models.py
says how far it may be.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import inside
import torch
from inside import CPU, VramTensor, fake_vram

inside.boot()
sys.path.insert(0, str(inside.ROOT / "tests"))

import comfy.model_management as mm  # noqa: E402
from comfyui_mend.engine.host import Host, LocalHost  # noqa: E402
from comfyui_mend.engine.inpaint import inpaint  # noqa: E402
from comfyui_mend.engine.models import diffusers_model, flux, qwen_image, sd3  # noqa: E402
from comfyui_mend.engine.models.t5 import TOKENIZER_FOLDERS, load_t5_tokenizer  # noqa: E402
from comfyui_mend.engine.types import InpaintRequest  # noqa: E402
from comfyui_mend.nodes.comfy_host import ComfyHost, MendModel  # noqa: E402
from comfyui_mend.nodes.inpaint import MendInpaint  # noqa: E402
from tiny import photo_and_mask  # noqa: E402
from tiny_flow import make_model, tiny_flux, tiny_sd3  # noqa: E402
from tiny_qwen import make_qwen_model, tiny_qwen_image, tiny_qwen_image_edit  # noqa: E402

# torch refuses it for subclasses; the vision tower asks how many patches there are
VramTensor.tolist = lambda tensor: tensor.data_on_cpu.tolist()
FOLDER = Path(tempfile.mkdtemp())
MODELS = ("fill", "schnell", "sd3", "qwen", "qwen edit")
MEMORIES = {"full": (1000.0, "NORMAL_VRAM"), "40 %": (0.4, "NORMAL_VRAM"), "no VRAM": (1000.0, "NO_VRAM")}
OPTIONS = {"prompt": "a (red:1.3) cat", "negative_prompt": "dog", "scheduler": "UniPC", "steps": 3, "strength": 0.9}
# beside the activations of real pictures a tiny network would weigh nothing, and always fit
NO_ACTIVATIONS = {"RESERVE": 0, "VAE_ENCODE_BYTES": 1, "VAE_DECODE_BYTES": 1}


def make(name: str, host: Host) -> tuple[Any, Any]:
    """A pipeline, always with the same weights, and the model of its modules."""
    if name == "qwen":
        pipeline = tiny_qwen_image(FOLDER)
        return pipeline, make_qwen_model(qwen_image.QWEN_IMAGE, pipeline, host=host)
    if name == "qwen edit":
        pipeline = tiny_qwen_image_edit(FOLDER)
        return pipeline, make_qwen_model(qwen_image.QWEN_IMAGE_EDIT, pipeline, host=host)
    if name == "sd3":
        return (pipeline := tiny_sd3()), make_model(sd3, pipeline, host=host)
    return (pipeline := tiny_flux(name)), make_model(flux, pipeline, host=host)


def pictures() -> dict[str, Any]:
    """Differences from the CPU's pictures, and the most of the transformer that was on the card as it ran."""
    image, mask = photo_and_mask(width=128, height=96)
    report = {}
    for name in MODELS:
        request = InpaintRequest(image=image, mask=mask, seed=3, guidance_scale=4.0, **OPTIONS)
        local = LocalHost(CPU)
        wanted = inpaint(request, make(name, local)[1], local).images
        for memory, (share, state) in MEMORIES.items():
            size = mm.module_size(make(name, local)[0].transformer)
            with (
                mock.patch.multiple(diffusers_model, **NO_ACTIVATIONS),
                mock.patch.object(flux.FluxModel, "denoiser_bytes", 1e-3),
                mock.patch.object(sd3.SD3Model, "denoiser_bytes", 1e-3),
                mock.patch.object(qwen_image.QwenImageModel, "denoiser_bytes", 1e-3),
                mock.patch.object(qwen_image.QwenImageEditModel, "denoiser_bytes", 1e-3),
                fake_vram(share * size, vram_state=state),
                torch.inference_mode(),
            ):
                host = ComfyHost()
                pipeline, model = make(name, host)
                wrapped = MendModel(model, host)
                patcher, shares = model.denoiser.patcher, []
                pipeline.transformer.register_forward_pre_hook(
                    lambda *_, patcher=patcher, shares=shares: shares.append(
                        patcher.loaded_size() / patcher.model_size()
                    )
                )
                made, _, _ = MendInpaint.execute(
                    model=wrapped, image=image, mask=mask, seed=3, guidance_scale=4.0, **OPTIONS
                ).result
                report[f"{name}, {memory}"] = {
                    "difference": float((made.to(CPU) - wanted).abs().max()),
                    "most loaded": max(shares),
                }
                mm.unload_all_models()
    return report


def tokenizer() -> list[int]:
    """ComfyUI's own T5 tokenizer, found where the host says it is."""
    (folder,) = ComfyHost().model_folders(TOKENIZER_FOLDERS)
    return list(load_t5_tokenizer(folder)("a cat", padding="max_length", max_length=6)["input_ids"])


if __name__ == "__main__":
    with torch.no_grad():
        inside.answer({check.__name__: check() for check in (pictures, tokenizer)})
