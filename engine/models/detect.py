"""Recognises a model from headers and config files alone, in milliseconds, and refuses the rest by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from ..types import InputError, ModelFileError
from .ldm import CLIP_PREFIX, OPEN_CLIP_PREFIX, UNET_PREFIX, VAE_PREFIX
from .weight_files import PICKLE_SUFFIXES, SAFE_COPY, Header, read_header, read_json

CONFIGS = Path(__file__).parent / "configs"
SHIPPED = Path(__file__).parent / "shipped"
"""Diffusers folders that come with the pack."""
SUPPORTED = "Stable Diffusion 1.x and 2.x, with 4 or 9 (inpainting) input channels"
PREDICTION_TYPES = ("epsilon", "v_prediction")
CHANNELS = (4, 9)


class Family(str, Enum):
    """Architectures that can be loaded; the values begin the names of the shipped configs."""

    SD1 = "sd15"
    SD2 = "sd2"


class TextLayout(str, Enum):
    """How a single file spells its text encoder."""

    CLIP = "clip"
    """transformers' names, with or without ``text_model.``"""
    OPEN_CLIP = "open_clip"


@dataclass(frozen=True)
class Checkpoint:
    """A single file with UNet, VAE and text encoder, in the original latent-diffusion layout."""

    header: Header
    in_channels: int
    context_width: int
    """Width of the prompt embeddings the UNet reads: 768 for SD1, 1024 for SD2."""
    text_layout: TextLayout


# in_channels of the first convolution, other than those that can be used
_OTHER_CHANNELS = {5: "a depth-guided model", 7: "an upscaler", 8: "an InstructPix2Pix model"}

# what a UNet of the original layout is, by the width of the prompt embeddings it reads
_CONTEXT_FAMILIES = {768: Family.SD1, 1024: Family.SD2}
_OTHER_CONTEXTS = {2048: "an SDXL model", 1280: "an SDXL refiner"}

# what is not a full checkpoint of a known family: parts of key names, description, way out; the first that fits counts
_OTHER_KINDS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("lora_", ".lora_A.", ".lora_down.", ".lora.down.", ".lora_up.", ".hada_w1", ".lokr_w1"), "a LoRA",
     "choose the model it was made for"),
    (("control_model.", "controlnet_cond_embedding.", "input_hint_block.", "controlnet_blocks."), "a ControlNet",
     "choose the model it was made for"),
    (("image_proj.", "ip_adapter."), "an IP-Adapter", "choose the model it was made for"),
    (("emb_params", "string_to_param"), "a textual inversion embedding", "put it in models/embeddings"),
    (("concept_embeds",), "a safety checker", "load it with the safety checker's loader"),
    (("double_stream_modulation_img.", "single_stream_modulation."), "a FLUX.2 model", ""),
    (("double_blocks.", "single_transformer_blocks."), "a FLUX model", ""),
    (("joint_blocks.",), "a Stable Diffusion 3 model", ""),
    (("cap_embedder.",), "a Lumina or Z-Image model", ""),
    (("txt_norm.",), "a Qwen-Image model", ""),
    ((UNET_PREFIX,), "a diffusion model of another family", ""),
    (("decoder.conv_in.",), "a VAE alone", "choose a full checkpoint"),
    (("text_model.encoder.", "encoder.block.0.", "resblocks.0.", "encoder.layers.0.self_attn."), "a text encoder alone",
     "choose a full checkpoint"),
    (("down_blocks.",), "a UNet in diffusers' layout", "put its whole folder into models/diffusers"),
    (("input_blocks.",), "a UNet alone", "choose a full checkpoint, or its diffusers folder"),
    (("transformer_blocks.", "blocks.0.", "layers.0."), "a diffusion transformer", ""),
)  # fmt: skip


def recognise(path: Path) -> Checkpoint:
    """What a single file is; raises ModelFileError naming what was found instead of a usable model."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise ModelFileError(
            f"{path.name} is a pickle, which can run code when opened, and is never opened here: {SAFE_COPY}."
        )
    header = read_header(path)
    stem = header.shape(f"{UNET_PREFIX}input_blocks.0.0.weight")
    if stem is None or header.has_prefix("control_model."):
        raise _not_a_checkpoint(header)
    context = header.shape(f"{UNET_PREFIX}middle_block.1.transformer_blocks.0.attn2.to_k.weight")
    if context is None:
        raise ModelFileError(f"{path.name} holds a diffusion model that reads no prompt; supported are {SUPPORTED}.")
    _refuse_other_unet(header, stem[1], context[1])
    for component, prefixes in (("VAE", (VAE_PREFIX,)), ("text encoder", (CLIP_PREFIX, OPEN_CLIP_PREFIX))):
        if not header.has_prefix(*prefixes):
            raise ModelFileError(
                f"{path.name} holds a UNet but no {component}: choose a full checkpoint, or its diffusers folder."
            )
    layout = TextLayout.OPEN_CLIP if header.has_prefix(OPEN_CLIP_PREFIX) else TextLayout.CLIP
    return Checkpoint(header, stem[1], context[1], layout)


def _refuse_other_unet(header: Header, channels: int, context: int) -> None:
    found = _OTHER_CONTEXTS.get(context)
    if found is None and header.has_prefix(f"{UNET_PREFIX}label_emb."):
        found = "an unCLIP model, which is guided by images,"
    if found is None and channels not in CHANNELS:
        found = f"{_OTHER_CHANNELS.get(channels, 'a model')} with {channels} input channels"
    if found:
        raise ModelFileError(f"{header.path.name} is {found} and cannot be used here; supported are {SUPPORTED}.")


def _not_a_checkpoint(header: Header) -> ModelFileError:
    name = header.path.name
    if not header.tensors:
        return ModelFileError(f"{name} holds no tensors: download it again.")
    for marks, found, way_out in _OTHER_KINDS:
        if any(mark in key for key in header.tensors for mark in marks):
            return ModelFileError(f"{name} is {found}: {way_out or f'supported are {SUPPORTED}'}.")
    first = next(iter(header.tensors))
    return ModelFileError(f"{name} is no known model (its first tensor is {first}); supported are {SUPPORTED}.")


def shipped_config(checkpoint: Checkpoint, prediction_type: str | None = None) -> Path:
    """The config folder that belongs to a checkpoint, ``prediction_type`` overriding what its weights say."""
    family = _CONTEXT_FAMILIES.get(checkpoint.context_width)
    if family is None:
        raise ModelFileError(
            f"{checkpoint.header.path.name} has a UNet of an unusual size (prompt width {checkpoint.context_width}): "
            f"put a folder with its diffusers configs beside it, named {checkpoint.header.path.stem}-config."
        )
    inpaint = checkpoint.in_channels == 9
    if family is Family.SD1:
        return CONFIGS / ("sd15-inpaint" if inpaint else "sd15")
    if inpaint:
        return CONFIGS / "sd2-inpaint"
    predicts_v = (prediction_type or _sd2_prediction_type(checkpoint.header)) == "v_prediction"
    return CONFIGS / ("sd2-v" if predicts_v else "sd2-base")


_SD2_PROBE = f"{UNET_PREFIX}output_blocks.11.1.transformer_blocks.0.norm1.bias"


def _sd2_prediction_type(header: Header) -> str:
    """SD2's 512 and 768 models have the same shapes; training on v left the biases of the last norms far wider.

    ComfyUI decides by the same statistic: the standard deviation of one bias, above 0.09 for v.
    """
    if _SD2_PROBE not in header.tensors:
        return "epsilon"
    return "v_prediction" if header.read(_SD2_PROBE).float().std(unbiased=False).item() > 0.09 else "epsilon"


def is_pipeline_folder(folder: Path) -> bool:
    """Whether a folder looks like a diffusers pipeline."""
    return (folder / "model_index.json").is_file() or (folder / "unet" / "config.json").is_file()


def check_folder(folder: Path) -> None:
    """Raises ModelFileError unless ``folder`` is a diffusers pipeline of a supported family, by its configs."""
    name = folder.name
    if not folder.is_dir():
        raise ModelFileError(f"{name} is neither a folder nor a file: name one that exists.")
    index = folder / "model_index.json"
    kind = str(read_json(index).get("_class_name", "")) if index.is_file() else ""
    if not (folder / "unet" / "config.json").is_file():
        other = next((part for part in ("transformer", "prior", "controlnet") if (folder / part).is_dir()), None)
        found = f"a {kind or 'model'} with a {other}" if other else "a folder without unet/config.json"
        raise ModelFileError(f"{name} is {found}; supported are diffusers folders of {SUPPORTED}.")
    check_unet_config(name, read_json(folder / "unet" / "config.json"))
    for part, key, wanted in (
        ("vae", "_class_name", "AutoencoderKL"),
        ("text_encoder", "model_type", "clip_text_model"),
    ):
        if not (folder / part / "config.json").is_file():
            raise ModelFileError(f"{name} has no {part}/config.json: download the whole folder.")
        value = read_json(folder / part / "config.json").get(key, wanted)
        if value != wanted:
            raise ModelFileError(f"{name} has a {part} of type {value}; supported is {wanted}.")


def check_unet_config(name: str, config: Mapping[str, Any]) -> None:
    """Raises ModelFileError unless the UNet of the model ``name`` is of a supported family."""
    channels = config.get("in_channels", 4)
    found = None
    if config.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        found = f"a model with a {config['_class_name']}"
    elif config.get("addition_embed_type") is not None:
        found = "an SDXL model" if config["addition_embed_type"] == "text_time" else "a model with extra embeddings"
    elif config.get("class_embed_type") is not None:
        found = "an unCLIP model"
    elif channels not in CHANNELS:
        found = f"{_OTHER_CHANNELS.get(channels, 'a model')} with {channels} input channels"
    if found:
        raise ModelFileError(f"{name} is {found} and cannot be used here; supported are {SUPPORTED}.")


def check_prediction_type(prediction_type: str | None) -> None:
    if prediction_type is not None and prediction_type not in PREDICTION_TYPES:
        raise InputError(f"prediction_type is {prediction_type!r}; choose from {', '.join(PREDICTION_TYPES)}.")
