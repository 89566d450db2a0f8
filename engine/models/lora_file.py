"""What is in a LoRA file, whoever wrote it: kohya's trainers, LyCORIS, diffusers, peft. Only its header is read."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from torch import Tensor

from ..types import ModelFileError
from .weight_files import PICKLE_SUFFIXES, Header, read_header


class Target(str, Enum):
    """The networks of a model that LoRA files know; text encoders have the names of their folders in a pipeline."""

    DENOISER = "denoiser"
    TEXT_ENCODER = "text_encoder"
    TEXT_ENCODER_2 = "text_encoder_2"
    TEXT_ENCODER_3 = "text_encoder_3"

    @classmethod
    def of(cls, network: str) -> Target | None:
        """That of the network in this folder of a pipeline, if LoRA files know it."""
        if network in ("unet", "transformer"):
            return cls.DENOISER
        return next((target for target in cls if target.value == network), None)


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """What a file holds for one layer."""

    target: Target
    name: str
    """As the file has it, without what names the network."""
    keys: Mapping[str, str]
    """The names of its tensors in the file, by what they are: "down", "up", "alpha", ..."""

    @property
    def flat_name(self) -> str:
        return flat(self.name)

    @property
    def targets(self) -> tuple[Target, ...]:
        """FLUX has T5 in second place, and files for it call it the third all the same; no other encoder has its
        names."""
        is_third = self.target is Target.TEXT_ENCODER_3
        return (self.target, Target.TEXT_ENCODER_2) if is_third else (self.target,)


@dataclass(frozen=True)
class LoraFile:
    """A file's table of contents."""

    header: Header
    layers: tuple[LoraLayer, ...]
    unknown: tuple[str, ...]
    """Names of tensors that belong to no layer."""

    @property
    def name(self) -> str:
        return self.header.path.name

    def tensors(self, layer: LoraLayer) -> dict[str, Tensor]:
        """The factors of a layer in float32, by what they are."""
        return {kind: self.header.read(key).float() for kind, key in layer.keys.items() if kind != "alpha"}

    def width(self, layer: LoraLayer) -> int:
        """How many numbers the layer reads; 0 where its factors do not tell."""
        shape = self.header.shape(layer.keys["down"]) if "down" in layer.keys else None
        return shape[1] if shape else 0

    def alpha(self, layer: LoraLayer) -> float | None:
        """What a change is multiplied with before its rank divides it: the layer's own tensor, or what peft wrote into
        the metadata; None where neither says, which means the rank."""
        if "alpha" in layer.keys:
            return float(self.header.read(layer.keys["alpha"]))
        settings = self._peft_settings(layer.target)
        patterns = settings.get("alpha_pattern") or {}
        fitting = (value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", layer.name))
        alpha = next(fitting, settings.get("lora_alpha"))
        if alpha is None or "down" not in layer.keys:
            return None
        rank = self.header.tensors[layer.keys["down"]].shape[0]
        # rank-stabilised LoRA divides by the root of the rank: Kalajdzievski, arXiv 2312.03732
        return float(alpha) * math.sqrt(rank) if settings.get("use_rslora") else float(alpha)

    def _peft_settings(self, target: Target) -> dict[str, Any]:
        """A network's LoraConfig, which diffusers keeps in the files it writes."""
        try:
            settings = json.loads(self.header.metadata.get("lora_adapter_metadata", "{}"))
        except ValueError:
            return {}
        return {
            key.removeprefix(prefix): value
            for key, value in settings.items()
            for prefix in _PEFT_PREFIXES[target]
            if key.startswith(prefix)
        }


_PEFT_PREFIXES = {
    # a network saved alone has no prefix
    Target.DENOISER: ("unet.", "transformer.", ""),
    Target.TEXT_ENCODER: ("text_encoder.",),
    Target.TEXT_ENCODER_2: ("text_encoder_2.",),
    Target.TEXT_ENCODER_3: ("text_encoder_3.",),
}


# the end of a tensor's name -> what it is; the first that fits counts
_TENSORS = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".alpha": "alpha",
    ".dora_scale": "magnitude",
    ".lora_magnitude_vector": "row_magnitude",
    ".lora_magnitude_vector.weight": "row_magnitude",
    ".lora_magnitude_vector.default.weight": "row_magnitude",
    ".diff": "diff",
    ".diff_b": "diff_b",
    ".w_norm": "diff",
    ".b_norm": "diff_b",
    **{f".hada_{factor}": f"hada_{factor}" for factor in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
    **{f".lokr_{factor}": f"lokr_{factor}" for factor in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
}

# what is neither known here nor may be left out, as the rest would paint another picture without it
_REFUSED = (
    (re.compile(r"\.(oft_blocks|oft_diag|oft_R)\b"), "OFT"),
    (re.compile(r"\.boft_\w+"), "BOFT"),
    (re.compile(r"\.(a1|a2|b1|b2)\.weight$"), "GLoRA"),
    (re.compile(r"\.(on_input|ia3_l)$"), "IA3"),
    (re.compile(r"\.(set_weight|reshape_weight)$"), "a LoRA that replaces weights or their shapes"),
    (re.compile(r"\.lora_B(\.default)?\.bias$"), "a LoRA with biases"),
    (re.compile(r"processor\.(\w+_)?lora\d\."), "an XLabs LoRA"),
)

# leading parts of layer names -> the network; the first that fits counts
_PREFIXES = (
    ("lora_te1_", Target.TEXT_ENCODER),
    ("lora_te2_", Target.TEXT_ENCODER_2),
    ("lora_te3_", Target.TEXT_ENCODER_3),
    ("lora_te_", Target.TEXT_ENCODER),
    ("text_encoder_2.", Target.TEXT_ENCODER_2),
    ("text_encoder_3.", Target.TEXT_ENCODER_3),
    ("text_encoder.", Target.TEXT_ENCODER),
    ("lora_unet_", Target.DENOISER),
    ("lora_transformer_", Target.DENOISER),
    ("lycoris_", Target.DENOISER),
    ("model.diffusion_model.", Target.DENOISER),
    ("diffusion_model.", Target.DENOISER),
    ("unet.", Target.DENOISER),
    ("transformer.", Target.DENOISER),
    ("", Target.DENOISER),
)


def read_lora(path: Path) -> LoraFile:
    """What is in a LoRA file, from its header. Raises ModelFileError for what is none, or of a kind not known here."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise ModelFileError(
            f"{path.name} is a pickle, which can run code when opened: turn it into a .safetensors file with"
            " `mend models convert`, which only reads its numbers, or download the LoRA as .safetensors."
        )
    if not path.is_file():
        raise ModelFileError(f"{path.name} is not there any more: choose another LoRA, or refresh the menu.")
    header = read_header(path)
    layers: dict[tuple[Target, str], dict[str, str]] = defaultdict(dict)
    unknown = []
    for key in header.tensors:
        for pattern, kind in _REFUSED:
            if pattern.search(key):
                raise ModelFileError(
                    f"{path.name} is {kind}, which cannot be used here ({key}); supported are LoRA, LoCon, LoHa, LoKr"
                    " and DoRA."
                )
        ending = next((ending for ending in _TENSORS if key.endswith(ending)), None)
        if ending is None:
            unknown.append(key)
        else:
            layers[_target_and_name(key.removesuffix(ending))][_TENSORS[ending]] = key
    # an alpha alone changes nothing
    complete = {place: keys for place, keys in layers.items() if keys.keys() - {"alpha"}}
    unknown += [key for place, keys in layers.items() if place not in complete for key in keys.values()]
    if not complete:
        first = next(iter(header.tensors), "none")
        raise ModelFileError(f"{path.name} is not a LoRA (its first tensor is {first}): choose a LoRA file.")
    return LoraFile(header, tuple(LoraLayer(*place, keys) for place, keys in complete.items()), tuple(unknown))


def _target_and_name(layer: str) -> tuple[Target, str]:
    layer = layer.removeprefix("base_model.model.")
    prefix, target = next(entry for entry in _PREFIXES if layer.startswith(entry[0]))
    name = layer.removeprefix(prefix)
    if ".processor." in name:  # diffusers before 0.22
        name = re.sub(r"\.to_out$", ".to_out.0", name.replace(".processor.", "."))
    return target, name


def flat(name: str) -> str:
    """kohya's trainers write a layer's name with "_" for every ".", which is what all forms can be brought to."""
    return name.replace(".", "_").removeprefix("text_model_")


# widths of the prompt embeddings that a UNet reads
_CONTEXT_FAMILIES = {
    768: "Stable Diffusion 1.x",
    1024: "Stable Diffusion 2.x",
    2048: "SDXL",
    1280: "the SDXL refiner",
}
# parts of flat layer names that tell other architectures; the first that fits counts
_NAMED_FAMILIES = (
    (("double_stream_modulation", "single_stream_modulation", "to_qkv_mlp_proj"), "FLUX.2"),
    (("double_blocks", "single_blocks", "single_transformer_blocks"), "FLUX"),
    (("img_mlp", "txt_mlp", "img_mod", "txt_mod"), "Qwen-Image"),
    (("joint_blocks",), "Stable Diffusion 3"),
    (("noise_refiner", "adaLN_modulation"), "Z-Image or Lumina"),
)
# the attentions of FLUX, Stable Diffusion 3 and Qwen-Image have the same names in diffusers: by the widths they read,
# and FLUX, which has this many blocks of them, and Qwen-Image, which has 60, by their number
_JOINT_ATTENTION = re.compile(r"transformer_blocks_(\d+)_attn_(to|add)_")
_JOINT_FAMILIES = {1536: "Stable Diffusion 3", 2432: "Stable Diffusion 3", 3072: "FLUX"}
_FLUX_BLOCKS, _SD3_BLOCKS = 19, 38


def family_named(names: Iterable[str]) -> str | None:
    """The family of a denoiser with layers of these flat names; None where they do not tell, as those of UNets."""
    listing = "\n".join(names)
    return next((family for marks, family in _NAMED_FAMILIES if any(mark in listing for mark in marks)), None)


def family_by_layers(file: LoraFile) -> str | None:
    """The models a file is made for; None where the names and shapes of its layers do not tell."""
    layers = [layer for layer in file.layers if layer.target is Target.DENOISER]
    named = family_named(layer.flat_name for layer in layers)
    return named or _family_by_prompts(file, layers) or _family_by_blocks(file, layers)


def family_of(file: LoraFile) -> str | None:
    """The models a file seems to be made for, by its layers or by what it says itself."""
    metadata = file.header.metadata
    own = metadata.get("modelspec.architecture") or metadata.get("ss_base_model_version")
    return family_by_layers(file) or own


def _family_by_prompts(file: LoraFile, layers: Sequence[LoraLayer]) -> str | None:
    widths = (file.width(layer) for layer in layers if re.search(r"attn2_to_[kv]$", layer.flat_name))
    return next((_CONTEXT_FAMILIES[width] for width in widths if width in _CONTEXT_FAMILIES), None)


def _family_by_blocks(file: LoraFile, layers: Sequence[LoraLayer]) -> str | None:
    attentions = [(layer, found) for layer in layers if (found := _JOINT_ATTENTION.match(layer.flat_name))]
    blocks = max((int(found[1]) + 1 for _, found in attentions), default=0)
    widths = (file.width(layer) for layer, _ in attentions)
    family = next((_JOINT_FAMILIES[width] for width in widths if width in _JOINT_FAMILIES), None)
    if blocks > _SD3_BLOCKS or (family == "FLUX" and blocks > _FLUX_BLOCKS):
        return "Qwen-Image"
    return family
