"""The key names of the original latent-diffusion checkpoints, and diffusers' names for the same weights.

A layout is a map from the name of a layer in the file to its name in the module. It is derived from the module's
config, so it holds for any size of network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
CLIP_PREFIX = "cond_stage_model.transformer."
OPEN_CLIP_PREFIX = "cond_stage_model.model."
SDXL_CLIP_PREFIX = "conditioner.embedders.0.transformer."
SDXL_OPEN_CLIP_PREFIX = "conditioner.embedders.1.model."

_UNET_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_VAE_RESNET = {"nin_shortcut": "conv_shortcut"}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def rename(key: str, names: Mapping[str, str]) -> str:
    """``key`` with the longest of its leading parts that ``names`` knows replaced; unknown keys stay as they are."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        new = names.get(".".join(parts[:length]))
        if new is not None:
            return ".".join((new, *parts[length:]))
    return key


def unet_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Layer names of a UNet, original -> diffusers, for a UNet2DConditionModel config."""
    layers = config["layers_per_block"]
    names = {
        "time_embed.0": "time_embedding.linear_1",
        "time_embed.2": "time_embedding.linear_2",
        "label_emb.0.0": "add_embedding.linear_1",
        "label_emb.0.2": "add_embedding.linear_2",
        "input_blocks.0.0": "conv_in",
        "middle_block.1": "mid_block.attentions.0",
        "out.0": "conv_norm_out",
        "out.2": "conv_out",
    }
    names.update(_inside("middle_block.0", "mid_block.resnets.0", _UNET_RESNET))
    names.update(_inside("middle_block.2", "mid_block.resnets.1", _UNET_RESNET))

    # the original numbers every layer in one row, diffusers by level
    index = 1
    for level, kind in enumerate(config["down_block_types"]):
        for layer in range(layers):
            names.update(_inside(f"input_blocks.{index}.0", f"down_blocks.{level}.resnets.{layer}", _UNET_RESNET))
            if "CrossAttn" in kind:
                names[f"input_blocks.{index}.1"] = f"down_blocks.{level}.attentions.{layer}"
            index += 1
        if level < len(config["down_block_types"]) - 1:
            names[f"input_blocks.{index}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            index += 1

    index = 0
    for level, kind in enumerate(config["up_block_types"]):
        attention = "CrossAttn" in kind
        for layer in range(layers + 1):
            names.update(_inside(f"output_blocks.{index}.0", f"up_blocks.{level}.resnets.{layer}", _UNET_RESNET))
            if attention:
                names[f"output_blocks.{index}.1"] = f"up_blocks.{level}.attentions.{layer}"
            index += 1
        if level < len(config["up_block_types"]) - 1:
            names[f"output_blocks.{index - 1}.{2 if attention else 1}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    return names


def vae_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Layer names of a VAE, original -> diffusers, for an AutoencoderKL config."""
    levels = len(config["block_out_channels"])
    layers = config["layers_per_block"]
    names: dict[str, str] = {}
    for half in ("encoder", "decoder"):
        names[f"{half}.norm_out"] = f"{half}.conv_norm_out"
        names.update(_inside(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0", _VAE_RESNET))
        names.update(_inside(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1", _VAE_RESNET))
        names.update(_inside(f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0", _VAE_ATTENTION))
    for level in range(levels):
        for layer in range(layers):
            names.update(
                _inside(
                    f"encoder.down.{level}.block.{layer}", f"encoder.down_blocks.{level}.resnets.{layer}", _VAE_RESNET
                )
            )
        names[f"encoder.down.{level}.downsample"] = f"encoder.down_blocks.{level}.downsamplers.0"
        # the original counts the decoder's levels from the picture, diffusers from the latents
        up = levels - 1 - level
        for layer in range(layers + 1):
            names.update(
                _inside(f"decoder.up.{level}.block.{layer}", f"decoder.up_blocks.{up}.resnets.{layer}", _VAE_RESNET)
            )
        names[f"decoder.up.{level}.upsample"] = f"decoder.up_blocks.{up}.upsamplers.0"
    return names


def open_clip_names(config: Mapping[str, Any]) -> dict[str, str]:
    """Layer names of OpenCLIP's text tower -> transformers, for a CLIPTextConfig; fused projections excepted."""
    names = {
        "positional_embedding": "embeddings.position_embedding.weight",
        "token_embedding": "embeddings.token_embedding",
        "ln_final": "final_layer_norm",
    }
    for layer in range(config["num_hidden_layers"]):
        names.update(_inside(f"transformer.resblocks.{layer}", f"encoder.layers.{layer}", _OPEN_CLIP_LAYER))
    return names


def _inside(old: str, new: str, names: Mapping[str, str]) -> dict[str, str]:
    """``names`` of the layers inside one block, and the block's own name for the rest."""
    return {old: new, **{f"{old}.{inner}": f"{new}.{name}" for inner, name in names.items()}}


def component(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The part of a checkpoint under ``prefix``, which is removed."""
    return {key[len(prefix) :]: tensor for key, tensor in state.items() if key.startswith(prefix)}


def convert(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    return {rename(key, names): tensor for key, tensor in state.items()}


def convert_open_clip(state: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """OpenCLIP's text tower as transformers' CLIPTextModel has it.

    Query, key and value share one matrix [3 * width, width] there. Layers beyond ``num_hidden_layers`` are left out:
    SD2 reads the last but one of 24, so its text encoder ends there.
    """
    names = open_clip_names(config)
    return dict(_open_clip_tensors(state, names, config["num_hidden_layers"]))


def _open_clip_tensors(
    state: Mapping[str, Tensor], names: Mapping[str, str], layers: int
) -> Iterator[tuple[str, Tensor]]:
    for key, tensor in state.items():
        parts = key.split(".")
        if parts[:2] == ["transformer", "resblocks"] and int(parts[2]) >= layers:
            continue
        if key == "attn_mask":  # causal by construction here
            continue
        if key == "text_projection":  # applied from the right there
            yield "text_projection.weight", tensor.T.contiguous()
            continue
        block, _, fused = key.rpartition(".attn.in_proj_")
        if not block:
            yield rename(key, names), tensor
            continue
        for projection, part in zip("qkv", tensor.chunk(3), strict=True):
            yield f"{names[block]}.self_attn.{projection}_proj.{fused}", part
