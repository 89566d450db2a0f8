"""Runs under ComfyUI's own Python: FLUX, Stable Diffusion 3 and Qwen-Image of diffusers' modules, in pretended graphics
memory.

Prints as one line of JSON how far each picture is from the one that plain modules make on the CPU, and what became of
the modules that only Qwen-Image has; test_flow_models.py says what it should be.
"""

from __future__ import annotations

import inspect
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import inside
import inside_memory  # starts ComfyUI
import torch
from inside import CPU, VramTensor, fake_vram
from inside_memory import ENOUGH, Case, build, dynamic_vram, in_vram, observe
from torch import Tensor, nn

sys.path.insert(0, str(inside.ROOT / "tests"))

import comfy.model_management as mm
from comfy.cli_args import args
from comfyui_mend.engine.host import Host, LocalHost, Role
from comfyui_mend.engine.inpaint import inpaint
from comfyui_mend.engine.models import diffusers_model, flux, qwen_image, qwen_text, sd3, wan_vae
from comfyui_mend.engine.models.t5 import TOKENIZER_FOLDERS, load_t5_tokenizer
from comfyui_mend.engine.models.tiled_vae import TiledVae
from comfyui_mend.engine.types import Crop, InpaintRequest
from comfyui_mend.nodes.comfy_host import ComfyHost, MendModel
from comfyui_mend.nodes.inpaint import MendInpaint
from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope
from tiny import photo_and_mask
from tiny_flow import make_model, tiny_flux, tiny_sd3
from tiny_qwen import (
    VOCABULARY,
    make_qwen_model,
    tiny_language_model,
    tiny_qwen_image,
    tiny_qwen_image_edit,
    tiny_wan_vae,
)

FOLDER = Path(tempfile.mkdtemp())
MODELS = ("fill", "schnell", "sd3", "qwen", "qwen edit")
MEMORIES = {"full": (1000.0, "NORMAL_VRAM"), "40 %": (0.4, "NORMAL_VRAM"), "no VRAM": (1000.0, "NO_VRAM")}
OPTIONS = {
    "prompt": "a (red:1.3) cat",
    "negative_prompt": "dog",
    "scheduler": "UniPC",
    "steps": 3,
    "strength": 0.9,
    "seed": 3,
    "guidance_scale": 4.0,
}
# beside the activations of real pictures a tiny network would weigh nothing, and always fit
NO_ACTIVATIONS = {"RESERVE": 0, "VAE_ENCODE_BYTES": 1, "VAE_DECODE_BYTES": 1}
FAMILIES = (flux.FluxModel, sd3.SD3Model, qwen_image.QwenImageModel, qwen_image.QwenImageEditModel)

run_on_pretended_device, make_tensor = inside.run_on_pretended_device, torch.tensor


def run_with_places(function: Any, inputs: Any, options: Any) -> Any:
    """The places that a tensor on a real card is asked for may be on the processor."""
    if function is torch.ops.aten.index.Tensor and isinstance(inputs[0], VramTensor):
        places = (place if place is None or isinstance(place, VramTensor) else VramTensor(place) for place in inputs[1])
        inputs = (inputs[0], list(places))
    return run_on_pretended_device(function, inputs, options)


@contextmanager
def pretences() -> Iterator[None]:
    """What Qwen-Image's networks ask of a card beyond what others do."""
    patches = [
        mock.patch.object(inside, "run_on_pretended_device", run_with_places),
        # neither of these reaches a subclass of tensors
        mock.patch.object(VramTensor, "tolist", lambda tensor: tensor.data_on_cpu.tolist(), create=True),
        mock.patch.object(
            torch, "tensor", lambda data, *, device=None, **options: make_tensor(data, **options).to(device or CPU)
        ),
    ]
    # diffusers leaves on the card what it computed for each size as long as the program runs; such small ones are full
    for name in ("_compute_video_freqs", "_get_device_freqs"):
        if hasattr(QwenEmbedRope, name):
            patches.append(mock.patch.object(QwenEmbedRope, name, inspect.unwrap(getattr(QwenEmbedRope, name))))
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def make(name: str, host: Host) -> tuple[Any, Any]:
    """A pipeline, always with the same weights, and the model of its modules."""
    if name == "qwen":
        return (pipeline := tiny_qwen_image(FOLDER)), make_qwen_model(qwen_image.QWEN_IMAGE, pipeline, host=host)
    if name == "qwen edit":
        pipeline = tiny_qwen_image_edit(FOLDER)
        return pipeline, make_qwen_model(qwen_image.QWEN_IMAGE_EDIT, pipeline, host=host)
    if name == "sd3":
        return (pipeline := tiny_sd3()), make_model(sd3, pipeline, host=host)
    return (pipeline := tiny_flux(name)), make_model(flux, pipeline, host=host)


@contextmanager
def card(size: float, state: str = "NORMAL_VRAM") -> Iterator[None]:
    """A graphics card of so many bytes, on which activations take none."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(diffusers_model, **NO_ACTIVATIONS))
        for family in FAMILIES:
            stack.enter_context(mock.patch.object(family, "denoiser_bytes", 1e-3))
        stack.enter_context(fake_vram(size, vram_state=state))
        stack.enter_context(torch.inference_mode())
        yield


SCENE = photo_and_mask(width=128, height=96)


def wanted(name: str, model: Any = None) -> Tensor:
    """What plain modules paint on the CPU."""
    host = LocalHost(CPU)
    request = InpaintRequest(image=SCENE[0], mask=SCENE[1], crop=Crop.OFF, **OPTIONS)
    return inpaint(request, model or make(name, host)[1], host).images


def painted(model: MendModel) -> Tensor:
    image, mask = SCENE
    made, _, _ = MendInpaint.execute(model=model, image=image, mask=mask, crop=Crop.OFF.value, **OPTIONS).result
    return made.to(CPU)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def pictures() -> dict[str, Any]:
    """Differences from the CPU's pictures, and the most of the transformer that was on the card as it ran."""
    image, mask = SCENE
    report = {}
    for name in MODELS:
        expected = wanted(name)
        for memory, (share, state) in MEMORIES.items():
            size = mm.module_size(make(name, LocalHost(CPU))[0].transformer)
            with card(share * size, state):
                host = ComfyHost()
                pipeline, model = make(name, host)
                patcher, shares = model.denoiser.patcher, []
                pipeline.transformer.register_forward_pre_hook(
                    lambda *_, patcher=patcher, shares=shares: shares.append(
                        patcher.loaded_size() / patcher.model_size()
                    )
                )
                made = painted(MendModel(model, host))
                report[f"{name}, {memory}"] = {
                    "difference": distance(made, expected),
                    "outside the mask": distance(made[mask == 0], image[mask == 0]),
                    "inside the mask": distance(made[mask == 1], image[mask == 1]),
                    "most loaded": max(shares),
                }
                mm.unload_all_models()
    return report


def turns() -> dict[str, list[float]]:
    """Two models on a card that has room for the larger network of them, one after the other and once more."""
    names = ("qwen edit", "sd3")
    expected = [wanted(name) for name in names]
    size = mm.module_size(make("sd3", LocalHost(CPU))[0].transformer)
    report: dict[str, list[float]] = {"differences": [], "loaded after the other": []}
    with card(1.1 * size):
        models = []
        for name in names:
            host = ComfyHost()
            models.append(MendModel(make(name, host)[1], host))
        for _ in range(2):
            for model, picture in zip(models, expected, strict=True):
                report["differences"].append(distance(painted(model), picture))
            report["loaded after the other"].append(models[0].model.denoiser.patcher.loaded_size())
        mm.unload_all_models()
    return report


def eight_bits() -> dict[str, Any]:
    """ComfyUI told to keep diffusion networks in 8 bits, against a plain network with weights rounded so."""
    pipeline, rounded = make("qwen", LocalHost(CPU))
    for layer in pipeline.transformer.modules():
        if type(layer) is nn.Linear:
            layer.weight.copy_(layer.weight.to(torch.float8_e4m3fn).float())
    expected = wanted("qwen", rounded)
    with mock.patch.object(args, "fp8_e4m3fn_unet", True), card(ENOUGH):
        host = ComfyHost()
        pipeline, model = make("qwen", host)
        made = painted(MendModel(model, host))
        mm.unload_all_models()
    return {
        "difference": distance(made, expected),
        "effect": distance(made, wanted("qwen")),
        "stored": sorted({str(parameter.dtype) for parameter in pipeline.transformer.parameters()}),
    }


# --- modules that only Qwen-Image has


def autoencoder() -> Case:
    """Convolutions of a class of their own, whose weights are read and not called."""

    def run(module: nn.Module, pixels: Tensor) -> Tensor:
        return wan_vae.decode(module, wan_vae.encode(module, pixels).mean)

    return Case(tiny_wan_vae(), Role.VAE, (torch.randn(1, 3, 48, 32),), run)


def autoencoder_in_bands() -> Case:
    def run(module: nn.Module, pixels: Tensor) -> Tensor:
        bands = TiledVae(module, pixels.device, 2**14, lambda: None)
        return bands.decode(bands.encode(pixels).mean).to(pixels.device)

    return Case(tiny_wan_vae(), Role.VAE, (torch.randn(1, 3, 48, 32),), run)


def language_model() -> Case:
    """Rotary embeddings, whose frequencies are buffers."""
    config = tiny_language_model().config.to_dict()
    inputs = (torch.randint(0, VOCABULARY - 6, (1, 20)),)
    return Case(qwen_text.build_language_model(config), Role.TEXT_ENCODER, inputs, lambda m, ids: m(input_ids=ids)[0])


def vision_language_model() -> Case:
    config = tiny_language_model().config
    ids = torch.randint(0, VOCABULARY - 6, (1, 20))
    ids[:, 3:9] = config.image_token_id
    inputs = (ids, torch.randn(24, 3 * 2 * 14 * 14), torch.tensor([[1, 4, 6]]), qwen_text.places(20, 3, (2, 3)))

    def run(module: nn.Module, ids: Tensor, patches: Tensor, grid: Tensor, places: Tensor) -> Tensor:
        return module(input_ids=ids, pixel_values=patches, image_grid_thw=grid, position_ids=places)[0]

    return Case(qwen_text.build_vision_language_model(config.to_dict()), Role.TEXT_ENCODER, inputs, run)


CASES = {case.__name__: case for case in (autoencoder, autoencoder_in_bands, language_model, vision_language_model)}


def of_cases(check: Callable[[], Any]) -> Any:
    """What inside_memory's ``check`` says of these modules."""
    with mock.patch.dict(inside_memory.CASES, CASES, clear=True):
        return check()


def modules() -> dict[str, Any]:
    return of_cases(inside_memory.placements)


def stranded() -> dict[str, Any]:
    return of_cases(inside_memory.plain_modules_are_stranded)


def dynamic() -> dict[str, Any]:
    report = {}
    with mock.patch.dict(inside_memory.CASES, CASES):
        for name in CASES:
            case, expected = build(name)
            with fake_vram(ENOUGH), dynamic_vram():
                managed = ComfyHost().manage(case.module, case.role)
                rows = [observe(case, expected, managed)]
                mm.unload_all_models()
                left = len(in_vram(case.module))
                rows.append(observe(case, expected, managed))
                mm.unload_all_models()
            report[name] = {"rows": rows, "in VRAM after unloading": left}
    return report


def tokenizer() -> list[int]:
    """ComfyUI's own T5 tokenizer, found where the host says it is."""
    (folder,) = ComfyHost().model_folders(TOKENIZER_FOLDERS)
    return list(load_t5_tokenizer(folder)("a cat", padding="max_length", max_length=6)["input_ids"])


CHECKS = (pictures, turns, eight_bits, modules, stranded, dynamic, tokenizer)

if __name__ == "__main__":
    with torch.no_grad(), pretences():
        inside.answer({check.__name__: check() for check in CHECKS})
