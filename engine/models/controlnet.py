"""ControlNets: a copy of a UNet's first half that reads a picture and adds to what the UNet's second half gets.

Zhang, Rao and Agrawala, Adding Conditional Control to Text-to-Image Diffusion Models (2023), arXiv 2302.05543. For
Stable Diffusion 1, 2 and XL; a file's layout and size are told by its header.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..host import Host, ManagedModule, Role
from ..types import ModelFileError
from . import ldm
from .load import CONFIG_SUFFIX, walk
from .modules import assemble
from .weight_files import PICKLE_SUFFIXES, read_component, read_header, read_json, read_weights

FOLDER = "controlnet"
"""Where ComfyUI looks for these: models/controlnet."""
STEM = "diffusion_pytorch_model"
SUPPORTED = "ControlNets of Stable Diffusion 1.x, 2.x and XL"
PREFIX = "control_model."
HEAD_WIDTH = 64
"""Channels of an attention head in Stable Diffusion 2 and XL; Stable Diffusion 1 has 8 heads everywhere."""
SD1_CONTEXT = 768


@dataclass(frozen=True, eq=False)
class ControlNet:
    """A ControlNet in its place in memory."""

    name: str
    """Its file's or folder's."""
    managed: ManagedModule
    context_width: int | None
    """Of the prompt embeddings it reads, which tells the family: 768, 1024, 2048; None where it reads none."""


def find_controlnets(host: Host) -> dict[str, Path]:
    """Everything in the host's folders "controlnet" that may be one, by its place below them: files, and folders as
    diffusers saves them. Nothing is opened; pickles are listed too, as choosing one tells how to convert it."""
    found: dict[str, Path] = {}
    for root in host.model_folders(FOLDER):
        for folder, inside, names in walk(root):
            if folder != root and "config.json" in names:
                inside.clear()
                if not folder.name.endswith(CONFIG_SUFFIX):
                    found.setdefault(folder.relative_to(root).as_posix(), folder)
                continue
            for name in names:
                if name.lower().endswith((".safetensors", *PICKLE_SUFFIXES)) and not name.startswith("."):
                    found.setdefault((folder / name).relative_to(root).as_posix(), folder / name)
    return dict(sorted(found.items(), key=lambda entry: entry[0].casefold()))


def load_controlnet(path: Path, host: Host) -> ControlNet:
    """The ControlNet at ``path``: a folder as diffusers saves it, or one .safetensors file in diffusers' layout or that
    of the original code.

    What a file does not say of itself, for networks of an unusual size, a folder beside it with the same name and
    ``-config`` may: it holds the config.json. Raises ModelFileError for everything else, naming what it is.
    """
    dtype = host.dtype(Role.DENOISER)
    if path.is_dir():
        config = read_json(path / "config.json")
        if config.get("_class_name", "ControlNetModel") != "ControlNetModel":
            raise ModelFileError(f"{path.name} is a {config['_class_name']}; supported are {SUPPORTED}.")
        state = dict(read_component(path, STEM, dtype))
    else:
        _refuse_others(path)
        state = read_state(read_weights(path))
        beside = path.with_name(path.stem + CONFIG_SUFFIX)
        config = read_json(beside / "config.json") if beside.is_dir() else infer_config(state, path.name)
    module = assemble(partial(_build, config), state, dtype, path.name)
    width = config.get("cross_attention_dim") if any("attn2" in key for key in state) else None
    return ControlNet(path.name, host.manage(module, Role.DENOISER), width)


def _build(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import ControlNetModel

    module: nn.Module = ControlNetModel.from_config(dict(config))
    return module


# --- files

# what is not a plain ControlNet: parts of key names and description; the first that fits counts
_OTHERS = (
    (("lora_controlnet",), "a control-LoRA"),
    (("control_add_embedding.", "task_embedding", "control_type_proj."), "a ControlNet Union"),
    (("lllite_",), "a ControlNet-LLLite"),
    (("controlnet_blocks.", "controlnet_x_embedder.", "controlnet_single_blocks.", "pos_embed_input."),
     "a ControlNet of a transformer (FLUX, Stable Diffusion 3, Qwen-Image)"),
    (("adapter.body.", "body.0.block1."), "a T2I-Adapter"),
    (("lora_", ".lora_A.", ".lora_down."), "a LoRA"),
)  # fmt: skip
_MARKS = ("controlnet_cond_embedding.conv_in.weight", "input_hint_block.0.weight")


def _refuse_others(path: Path) -> None:
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise ModelFileError(
            f"{path.name} is a pickle, which can run code when opened: turn it into a .safetensors file with"
            " `mend models convert`, which only reads its numbers, or download the ControlNet as .safetensors."
        )
    if not path.exists():
        raise ModelFileError(f"{path.name} is not there any more: choose another ControlNet, or refresh the menu.")
    keys = read_header(path).tensors
    for marks, found in _OTHERS:
        if any(mark in key for key in keys for mark in marks):
            raise ModelFileError(f"{path.name} is {found}, which cannot be used here; supported are {SUPPORTED}.")
    if not any(key.endswith(_MARKS) for key in keys):
        first = next(iter(keys), "none")
        raise ModelFileError(
            f"{path.name} is not a ControlNet (its first tensor is {first}); supported are {SUPPORTED}."
        )


_ORIGINAL_NAMES = {
    "input_hint_block.0": "controlnet_cond_embedding.conv_in",
    "input_hint_block.14": "controlnet_cond_embedding.conv_out",
    **{f"input_hint_block.{2 * block + 2}": f"controlnet_cond_embedding.blocks.{block}" for block in range(6)},
    "middle_block_out.0": "controlnet_mid_block",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}


def read_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A ControlNet's weights under the names of diffusers, from any layout; other networks in the file are left out."""
    if any(key.startswith(PREFIX) for key in state):
        state = ldm.component(state, PREFIX)
    if "input_hint_block.0.weight" not in state:
        return dict(state)
    down_blocks, layers = _down_blocks(state)
    names = ldm.unet_names({"layers_per_block": layers, "down_block_types": down_blocks, "up_block_types": ()})
    zero_convolutions = {key.split(".")[1] for key in state if key.startswith("zero_convs.")}
    names |= _ORIGINAL_NAMES | {f"zero_convs.{n}.0": f"controlnet_down_blocks.{n}" for n in zero_convolutions}
    return ldm.convert(state, names)


def _down_blocks(state: Mapping[str, Tensor]) -> tuple[list[str], int]:
    """The kinds of the original layout's down blocks, and how many layers each has."""
    kinds, layers, in_block = [""], 0, 0
    for index in range(1, 1 + max(int(key.split(".")[1]) for key in state if key.startswith("input_blocks."))):
        if f"input_blocks.{index}.0.op.weight" in state:
            kinds.append("")
            in_block = 0
            continue
        in_block += 1
        layers = max(layers, in_block)
        attends = f"input_blocks.{index}.1.proj_in.weight" in state
        kinds[-1] = "CrossAttnDownBlock2D" if attends else "DownBlock2D"
    return kinds, layers


def infer_config(state: Mapping[str, Tensor], name: str) -> dict[str, Any]:
    """The config.json of a ControlNet from its weights [names of diffusers]; ``name`` is for messages."""

    def count(pattern: str) -> int:
        """One more than the largest number in the place of the pattern's group."""
        return 1 + max((int(m[1]) for m in map(re.compile(pattern).match, state) if m), default=-1)

    blocks = range(count(r"down_blocks\.(\d+)\."))
    attention = [f"down_blocks.{block}.attentions.0." for block in blocks]
    depths = [count(re.escape(prefix) + r"transformer_blocks\.(\d+)\.") for prefix in attention]
    context = next((state[key].shape[1] for key in state if key.endswith("attn2.to_k.weight")), None)
    try:
        widths = [state[f"down_blocks.{block}.resnets.0.conv2.weight"].shape[0] for block in blocks]
        hints = count(r"controlnet_cond_embedding\.blocks\.(\d+)\.")
        hint_widths = [state["controlnet_cond_embedding.conv_in.weight"].shape[0]]
        hint_widths += [state[f"controlnet_cond_embedding.blocks.{n}.weight"].shape[0] for n in range(1, hints, 2)]
        config: dict[str, Any] = {
            "in_channels": state["conv_in.weight"].shape[1],
            "conditioning_channels": state["controlnet_cond_embedding.conv_in.weight"].shape[1],
            "conditioning_embedding_out_channels": hint_widths,
            "block_out_channels": widths,
            "layers_per_block": count(r"down_blocks\.0\.resnets\.(\d+)\."),
            "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
            "transformer_layers_per_block": [max(depth, 1) for depth in depths],
            "cross_attention_dim": context or 2048,
            "attention_head_dim": 8 if context == SD1_CONTEXT else [max(width // HEAD_WIDTH, 1) for width in widths],
            "use_linear_projection": any(
                state[p + "proj_in.weight"].ndim == 2 for p in attention if p + "proj_in.weight" in state
            ),
        }
        if "add_embedding.linear_1.weight" in state:
            config |= {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": state["add_embedding.linear_1.weight"].shape[1],
            }
    except KeyError as error:
        raise ModelFileError(
            f"{name} is a ControlNet of an unknown build (it has no {error.args[0]}); supported are {SUPPORTED}."
        ) from error
    middle = count(r"mid_block\.attentions\.0\.transformer_blocks\.(\d+)\.")
    if middle:
        # the middle follows the last block, which need not attend itself
        config["transformer_layers_per_block"][-1] = middle
    else:
        config["mid_block_type"] = "UNetMidBlock2D"
    return config
