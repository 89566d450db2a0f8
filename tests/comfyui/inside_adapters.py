"""Runs under ComfyUI's own Python: a UNet and its ControlNet together in pretended graphics memory.

    python inside_adapters.py

Prints what each share of memory gave as one line of JSON; test_adapter_nodes.py says what it should be.
"""

from __future__ import annotations

import copy

import inside
import torch
from inside import CPU, VRAM, PretendedDevice, fake_vram
from torch import Tensor, nn

inside.boot()

import comfy.model_management as mm  # noqa: E402
from comfyui_mend.engine.control import Influence, controlled  # noqa: E402
from comfyui_mend.engine.host import Role  # noqa: E402
from comfyui_mend.engine.models.controlnet import ControlNet  # noqa: E402
from comfyui_mend.nodes.comfy_host import ComfyHost, ComfyModule  # noqa: E402
from diffusers import ControlNetModel, UNet2DConditionModel  # noqa: E402

SHARES = {"full": 10.0, "60 %": 0.6, "10 %": 0.1}
SIZES = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}


def build() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        in_channels=9, sample_size=16, up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), **SIZES
    )
    network = ControlNetModel(conditioning_embedding_out_channels=(8, 8, 16, 16), **SIZES)
    for module in (unet, network):
        module.eval().requires_grad_(False)
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return unet, network


def inputs(device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = (2, 9, 16, 16), (2, 7, 32), (1, 3, 128, 128)
    return [torch.randn(shape, generator=generator).to(device) for shape in shapes]


def run(unet: nn.Module, network: ControlNet, device: torch.device) -> Tensor:
    latents, prompt, hint = inputs(device)
    with controlled(unet, [Influence(network, hint, 0.8)]):
        return unet(latents, torch.tensor(601.0).to(device), prompt, return_dict=False)[0].to(CPU)


class Plain:
    """A module that is where it is."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.dtype = module, torch.float32


def report() -> dict:
    rows = {}
    for label, share in SHARES.items():
        unet, network = build()
        with PretendedDevice():
            plain = [copy.deepcopy(module).to(VRAM) for module in (unet, network)]
            expected = run(plain[0], ControlNet("plain", Plain(plain[1]), 32), VRAM)
            alone = plain[0](*(x for x in (inputs(VRAM)[0], torch.tensor(601.0).to(VRAM), inputs(VRAM)[1])))[0]
            effect = float((alone.to(CPU) - expected).abs().max())
            del plain, alone
        total = sum(map(mm.module_size, (unet, network)))
        with fake_vram(share * total):
            denoiser = ComfyHost().manage(unet, Role.DENOISER)
            beside = ComfyHost().manage(network, Role.DENOISER)
            asked = count_loads(denoiser, beside)
            found = run(unet, ControlNet("managed", beside, 32), VRAM)
            loaded = sum(module.patcher.loaded_size() for module in (denoiser, beside)) / total
            mm.unload_all_models()
        rows[label] = {"equal": torch.equal(found, expected), "effect": effect, "loaded": loaded, "asked": asked}
    return rows


def count_loads(denoiser: ComfyModule, beside: ComfyModule) -> list[int]:
    """How often ComfyUI is asked when both are loaded, loaded again, and loaded after the ControlNet was moved away."""
    calls, real = [], mm.load_models_gpu

    def counting(*args: object, **options: object) -> object:
        calls.append(args)
        return real(*args, **options)

    mm.load_models_gpu = counting
    asked = []
    try:
        for action in (lambda: None, lambda: None, lambda: beside.patcher.detach(), lambda: None):
            action()
            before = len(calls)
            denoiser.load(0, [beside])
            asked.append(len(calls) - before)
    finally:
        mm.load_models_gpu = real
    return asked


with torch.inference_mode():
    inside.answer(report())
