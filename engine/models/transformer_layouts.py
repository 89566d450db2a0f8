"""The key names of the first releases of FLUX and Stable Diffusion 3, and diffusers' names for the same weights.

A layer of a file is one layer of the module or several: files keep query, key and value in one matrix, FLUX's single
blocks their MLP's first layer with them. The last modulation is shift before scale in the files and scale before shift
in diffusers. Sizes come from the tensors and the config, so that networks of any size are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .ldm import rename


@dataclass(frozen=True)
class Layout:
    """How the layers of a file become those of a module."""

    names: Mapping[str, str]
    """Layers that are one layer of the module."""
    fused: Mapping[str, Sequence[str]]
    """Layers that are several, one after the other: the first ones as wide as the network, the last takes the rest."""
    swapped: frozenset[str] = frozenset()
    """Layers of the module whose two halves are in the other order."""

    def convert(self, state: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
        """The module's state dict; unknown keys stay as they are."""
        return dict(self._tensors(state, width))

    def _tensors(self, state: Mapping[str, Tensor], width: int) -> Iterator[tuple[str, Tensor]]:
        for key, tensor in state.items():
            layer, _, kind = key.rpartition(".")
            if layer in self.fused:
                parts = self.fused[layer]
                sizes = [width] * (len(parts) - 1)
                for part, rows in zip(parts, tensor.split([*sizes, len(tensor) - sum(sizes)]), strict=True):
                    yield f"{part}.{kind}", rows
                continue
            new = rename(key, self.names)
            if new.rpartition(".")[0] in self.swapped:
                tensor = torch.cat(tensor.chunk(2)[::-1])
            yield new, tensor


FLUX_MARK = "double_blocks.0.img_attn.qkv.weight"
SD3_MARK = "joint_blocks.0.context_block.attn.qkv.weight"
"""Keys that the files have and diffusers' folders do not."""

_FLUX_ENDS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_FLUX_EMBEDDERS = {"time_in": "timestep_embedder", "vector_in": "text_embedder", "guidance_in": "guidance_embedder"}
_FLUX_DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}
_FLUX_DOUBLE_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
_FLUX_SINGLE = {"modulation.lin": "norm.linear", "linear2": "proj_out"}
_FLUX_SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}


def flux_layout(config: Mapping[str, Any]) -> Layout:
    """For a FluxTransformer2DModel's config."""
    names = dict(_FLUX_ENDS)
    for old, new in _FLUX_EMBEDDERS.items():
        names |= _embedder(old, f"time_text_embed.{new}", ("in_layer", "out_layer"))
    fused: dict[str, Sequence[str]] = {}
    for block in range(config["num_layers"]):
        old, new = f"double_blocks.{block}", f"transformer_blocks.{block}"
        names |= _inside(old, new, _FLUX_DOUBLE) | _scales(old, new, _FLUX_DOUBLE_NORMS)
        fused[f"{old}.img_attn.qkv"] = [f"{new}.attn.to_{part}" for part in "qkv"]
        fused[f"{old}.txt_attn.qkv"] = [f"{new}.attn.add_{part}_proj" for part in "qkv"]
    for block in range(config["num_single_layers"]):
        old, new = f"single_blocks.{block}", f"single_transformer_blocks.{block}"
        names |= _inside(old, new, _FLUX_SINGLE) | _scales(old, new, _FLUX_SINGLE_NORMS)
        fused[f"{old}.linear1"] = [*(f"{new}.attn.to_{part}" for part in "qkv"), f"{new}.proj_mlp"]
    return Layout(names, fused, frozenset({"norm_out.linear"}))


_SD3_ENDS = {
    "x_embedder.proj": "pos_embed.proj",
    "pos_embed": "pos_embed.pos_embed",
    "context_embedder": "context_embedder",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_SD3_BLOCK = {
    "x_block.adaLN_modulation.1": "norm1.linear",
    "context_block.adaLN_modulation.1": "norm1_context.linear",
    "x_block.attn.proj": "attn.to_out.0",
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "x_block.attn2.proj": "attn2.to_out.0",
    "x_block.attn2.ln_q": "attn2.norm_q",
    "x_block.attn2.ln_k": "attn2.norm_k",
    "context_block.attn.proj": "attn.to_add_out",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
    "x_block.mlp.fc1": "ff.net.0.proj",
    "x_block.mlp.fc2": "ff.net.2",
    "context_block.mlp.fc1": "ff_context.net.0.proj",
    "context_block.mlp.fc2": "ff_context.net.2",
}


def sd3_layout(config: Mapping[str, Any]) -> Layout:
    """For an SD3Transformer2DModel's config."""
    names = dict(_SD3_ENDS)
    for old, new in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder")):
        names |= _embedder(f"{old}.mlp", f"time_text_embed.{new}", ("0", "2"))
    fused: dict[str, Sequence[str]] = {}
    last = config["num_layers"] - 1
    for block in range(last + 1):
        old, new = f"joint_blocks.{block}", f"transformer_blocks.{block}"
        names |= _inside(old, new, _SD3_BLOCK)
        fused[f"{old}.x_block.attn.qkv"] = [f"{new}.attn.to_{part}" for part in "qkv"]
        fused[f"{old}.x_block.attn2.qkv"] = [f"{new}.attn2.to_{part}" for part in "qkv"]
        fused[f"{old}.context_block.attn.qkv"] = [f"{new}.attn.add_{part}_proj" for part in "qkv"]
    # the text ends in the last block, which only scales and shifts it
    swapped = frozenset({"norm_out.linear", f"transformer_blocks.{last}.norm1_context.linear"})
    return Layout(names, fused, swapped)


def _inside(old: str, new: str, names: Mapping[str, str]) -> dict[str, str]:
    return {f"{old}.{inner}": f"{new}.{name}" for inner, name in names.items()}


def _scales(old: str, new: str, names: Mapping[str, str]) -> dict[str, str]:
    """Norms, whose weight is called scale in most files."""
    kinds = ("scale", "weight")
    return {f"{old}.{inner}.{kind}": f"{new}.{name}.weight" for inner, name in names.items() for kind in kinds}


def _embedder(old: str, new: str, layers: Sequence[str]) -> dict[str, str]:
    return {f"{old}.{layer}": f"{new}.linear_{number}" for number, layer in enumerate(layers, start=1)}
