"""The networks that families share - a UNet, CLIP text encoders, a VAE - and every spelling of their weights in use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..host import Role
from ..prompts import EmbeddingFinder, TextLayer, folder_embeddings
from ..types import InputError, ModelFileError
from . import ldm
from .family import Components, Config, Part, State, shipped
from .modules import TOWER

# VAEs saved before diffusers 0.18 name their attention's projections so
_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# what files hold beside the network: CLIP's temperature, a VAE's training, a checkpoint's markers
_UNUSED_TEXT_KEYS = ("embeddings.position_ids", "logit_scale")
_UNUSED_VAE_PREFIXES = ("loss.", "model_ema.")
_MARKERS = ("v_pred", "ztsnr")


# --- UNet


def build_unet(config: Config) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return _from_config(UNet2DConditionModel, config)


def read_unet(state: State, config: Config) -> dict[str, Tensor]:
    """From the original layout or diffusers'."""
    state = {key: tensor for key, tensor in state.items() if key not in _MARKERS}
    return ldm.convert(state, ldm.unet_names(config)) if "input_blocks.0.0.weight" in state else state


UNET = Part("unet", Role.DENOISER, "UNet2DConditionModel", build_unet, read_unet)


# --- VAE


def build_vae(config: Config) -> nn.Module:
    from diffusers import AutoencoderKL

    return _from_config(AutoencoderKL, config)


def read_vae(state: State, config: Config) -> dict[str, Tensor]:
    """From the original layout, diffusers' or its old one."""
    state = {key: tensor for key, tensor in state.items() if not key.startswith(_UNUSED_VAE_PREFIXES)}
    if any(key.startswith("decoder.mid.") for key in state):
        return ldm.convert(state, ldm.vae_names(config))
    return {_modern_vae_key(key): tensor for key, tensor in state.items()}


def _modern_vae_key(key: str) -> str:
    block, _, weight = key.rpartition(".")
    parent, _, layer = block.rpartition(".")
    if parent.endswith("attentions.0") and layer in _OLD_VAE_ATTENTION:
        return f"{parent}.{_OLD_VAE_ATTENTION[layer]}.{weight}"
    return key


VAE_PREFIXES = (ldm.VAE_PREFIX, "vae.")
VAE = Part("vae", Role.VAE, "AutoencoderKL", build_vae, read_vae, VAE_PREFIXES)


def _from_config(model_class: Any, config: Config) -> nn.Module:
    module: nn.Module = model_class.from_config(dict(config))
    return module


# --- CLIP


def build_clip(config: Config) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig.from_dict(dict(config)))


def build_projected_clip(config: Config) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    return CLIPTextModelWithProjection(CLIPTextConfig.from_dict(dict(config)))


def read_clip(state: State, config: Config) -> dict[str, Tensor]:
    """CLIP's text tower from OpenCLIP's names or transformers', without its projection."""
    return {key: tensor for key, tensor in read_projected_clip(state, config).items() if "text_projection" not in key}


def read_projected_clip(state: State, config: Config) -> dict[str, Tensor]:
    """As read_clip, with the projection of the pooled state."""
    if any(key.startswith("transformer.resblocks.") for key in state):
        state = ldm.convert_open_clip(state, config)
    plain = {key.removeprefix(TOWER): tensor for key, tensor in state.items()}
    return {key: tensor for key, tensor in plain.items() if key not in _UNUSED_TEXT_KEYS}


def load_tokenizer(folder: Path | None, text_encoder: Mapping[str, Any]) -> Any:
    """The CLIPTokenizer for a text encoder's config, from ``folder`` or, when None, the shipped one."""
    from transformers import CLIPTokenizer

    length = text_encoder.get("max_position_embeddings", 77)
    if folder is not None:
        try:
            return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True, model_max_length=length)
        except (OSError, ValueError) as error:
            raise ModelFileError(
                f"{folder.parent.name} has a tokenizer that cannot be read ({error}): download it again."
            ) from error
    clip = shipped("tokenizer")
    return CLIPTokenizer(
        str(clip / "vocab.json"),
        str(clip / "merges.txt"),
        model_max_length=length,
        # OpenCLIP's encoders (SD2's and SDXL's second), which are told by their activation, were trained on id 0
        # behind the end of the text
        pad_token="!" if text_encoder.get("hidden_act") == "gelu" else "<|endoftext|>",
    )


def clip_layer(components: Components, part: str, default: TextLayer) -> TextLayer:
    """The layer of a text encoder that is read: the family's own, or the user's choice."""
    skip, layers = components.options.clip_skip, int(components.configs[part]["num_hidden_layers"])
    if skip > layers:
        raise InputError(
            f"clip_skip is {skip}, and a text encoder of {components.name} has {layers} layers: give a lower value."
        )
    return default._replace(from_end=skip) if skip else default


def find_embeddings(components: Components, part: str, key: str) -> EmbeddingFinder:
    """The host's textual-inversion files, for one text encoder; ``key`` as for folder_embeddings."""
    width = int(components.configs[part]["hidden_size"])
    return folder_embeddings(components.host.model_folders("embeddings"), width, key)


def clip_tokenizer(components: Components, part: str = "text_encoder") -> Any:
    """That of one text encoder."""
    folder = components.tokenizer_folder(part.replace("text_encoder", "tokenizer"))
    return load_tokenizer(folder, components.configs[part])
