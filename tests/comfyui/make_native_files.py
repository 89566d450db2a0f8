"""Runs under ComfyUI's own Python: small random files that ComfyUI's own loaders take for Stable Diffusion 1.5.

The UNet has the widths by which ComfyUI knows the family, but a single level of one block; text encoder and VAE have
their real sizes. Writes below the models folder given: checkpoints/small-sd15.safetensors and
small-sd15-inpainting.safetensors, controlnet/small-control.safetensors, loras/small-lora.safetensors.
"""

from __future__ import annotations

import sys
from pathlib import Path

import inside
import torch

inside.boot()

import comfy.cldm.cldm  # noqa: E402
import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.sd1_clip  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch import nn  # noqa: E402

UNET = {
    "image_size": 32,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [1],
    "channel_mult": [1],
    "transformer_depth": [1],
    "transformer_depth_output": [1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 768,
    "use_linear_in_transformer": False,
    "use_spatial_transformer": True,
    "legacy": False,
    "adm_in_channels": None,
    "num_heads": 8,
    "use_temporal_attention": False,
}
VAE = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}
LORA_RANK = 4


def random_state(module: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Weights that keep activations of about unit size: norms 1, matrices by their width."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, parameter in module.state_dict().items():
        if parameter.ndim < 2:
            value = torch.ones(parameter.shape) if name.endswith("weight") else torch.zeros(parameter.shape)
        else:
            value = torch.randn(parameter.shape, generator=generator) / parameter[0].numel() ** 0.5
        state[name] = value.half()
    return state


def unet(channels: int) -> dict[str, torch.Tensor]:
    module = openaimodel.UNetModel(**UNET, in_channels=channels, operations=comfy.ops.disable_weight_init)
    return random_state(module, 1)


def text_encoder() -> dict[str, torch.Tensor]:
    return random_state(comfy.sd1_clip.SD1ClipModel(dtype=torch.float32).clip_l.transformer, 2)


def vae() -> dict[str, torch.Tensor]:
    from comfy.ldm.models.autoencoder import AutoencoderKL

    return random_state(AutoencoderKL(ddconfig=VAE, embed_dim=4), 3)


def control_net() -> dict[str, torch.Tensor]:
    config = {key: value for key, value in UNET.items() if key not in ("out_channels", "transformer_depth_output")}
    module = comfy.cldm.cldm.ControlNet(
        **config, in_channels=4, hint_channels=3, operations=comfy.ops.disable_weight_init
    )
    return {f"control_model.{key}": value for key, value in random_state(module, 4).items()}


def lora() -> dict[str, torch.Tensor]:
    """Kohya's names; query of the first attention."""
    generator = torch.Generator().manual_seed(5)
    state = {}
    for name, (outputs, inputs) in {
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": (320, 320),
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (320, 768),
        "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (768, 768),
    }.items():
        state[f"{name}.lora_up.weight"] = torch.randn(outputs, LORA_RANK, generator=generator) / 2
        state[f"{name}.lora_down.weight"] = torch.randn(LORA_RANK, inputs, generator=generator) / inputs**0.5
        state[f"{name}.alpha"] = torch.tensor(float(LORA_RANK))
    return state


def main(models: Path) -> None:
    parts = {f"first_stage_model.{key}": value for key, value in vae().items()}
    parts |= {f"cond_stage_model.transformer.{key}": value for key, value in text_encoder().items()}
    for name, channels in (("small-sd15", 4), ("small-sd15-inpainting", 9)):
        network = {f"model.diffusion_model.{key}": value for key, value in unet(channels).items()}
        write(parts | network, models / "checkpoints" / f"{name}.safetensors")
    write(control_net(), models / "controlnet" / "small-control.safetensors")
    write(lora(), models / "loras" / "small-lora.safetensors")


def write(state: dict[str, torch.Tensor], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in state.items()}, path)


if __name__ == "__main__":
    with torch.no_grad():
        main(Path(sys.argv[1]))
    inside.answer("done")
