"""Recognises a model from headers and config files alone, in milliseconds, and names what it is.

What is recognised here is more than can be loaded: ``load`` decides, and refuses the rest by the name it gets here.
Nothing is guessed from a file's name.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from ..types import ModelFileError
from .ldm import VAE_PREFIX
from .weight_files import DTYPES, PICKLE_SUFFIXES, SAFE_COPY, Header, read_header, read_json

CONFIGS = Path(__file__).parent / "configs"
SHIPPED = Path(__file__).parent / "shipped"
"""Diffusers folders that come with the pack."""
PREDICTION_TYPES = ("epsilon", "v_prediction")
"""What a user may set for the networks that can be trained on either."""

STILL_MARK = "__index_timestep_zero__"
"""In ComfyUI's files of Qwen-Image-Edit 2511 and later: the network takes the tokens of the picture it edits for free
of noise."""
WAN_VAE = "AutoencoderKLQwenImage"
"""diffusers' class of Wan's and Qwen-Image's VAE."""
WAN_CHANNELS = 16

DENOISER_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
"""Of a checkpoint, of some split files, and of a file of the network alone."""


class Kind(str, Enum):
    """What role a file plays."""

    MODEL = "model"
    """A denoiser, with or without its text encoders and VAE."""
    VAE = "vae"
    TEXT_ENCODER = "text_encoder"
    OTHER = "other"


@dataclass(frozen=True)
class TextEncoder:
    """What tells one text encoder from another."""

    architecture: str
    """"clip", "t5" or "qwen2_5_vl"."""
    width: int
    layers: int


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a file or folder is."""

    name: str
    """Its own, for messages."""
    kind: Kind
    what: str
    """With its article: "an SDXL inpainting model"."""
    family: str = ""
    """Of a MODEL: "sd1", "sdxl", "flux", ...; empty where it cannot be told."""
    variant: str = ""
    """Within the family: "inpaint", "fill", "3.5-medium", ...; empty for the plain one."""
    header: Header | None = None
    """Of a single file."""
    prefix: str = ""
    """What the denoiser's keys begin with."""
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    """What the file itself says of its schedule."""
    quantised: bool = False
    """Whether numbers beside the weights say how to read them."""
    native: bool = False
    """Whether ComfyUI loads it by itself and paints with it as this engine would."""
    text_encoder: TextEncoder | None = None
    latent_channels: int = 0
    """Of a VAE."""
    vae_class: str = ""
    """Of a VAE: "AutoencoderKL" or "AutoencoderKLQwenImage"."""
    way_out: str = ""
    """What to do instead, where there is something to do."""


@dataclass(frozen=True)
class Denoiser:
    """What one of the rules below says of a network."""

    family: str
    what: str
    variant: str = ""
    native: bool = False
    way_out: str = ""


@dataclass(frozen=True)
class Keys:
    """The tensors of a file below a prefix."""

    header: Header
    prefix: str

    def has(self, *keys: str) -> bool:
        return all(self.prefix + key in self.header.tensors for key in keys)

    def side(self, key: str, axis: int) -> int:
        """Of a tensor's shape; 0 where there is none."""
        shape = self.header.shape(self.prefix + key)
        return shape[axis] if shape is not None and len(shape) > axis else 0

    def first(self, ending: str) -> str:
        """The first key of that ending, or an empty one."""
        found = (key for key in self.header.tensors if key.startswith(self.prefix) and key.endswith(ending))
        return next(found, self.prefix)[len(self.prefix) :]


# --- single files


# what is neither a denoiser, a VAE nor a text encoder: parts of key names, description, way out; the first that fits
_ADD_ONS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("lora_controlnet",), "a control-LoRA", "choose the model it was made for"),
    (("lora_", ".lora_A.", ".lora_down.", ".lora.down.", ".lora_up.", ".hada_w1", ".lokr_w1"), "a LoRA",
     "choose the model it was made for, and add this with Load LoRA (Mend)"),
    (("control_model.", "controlnet_cond_embedding.", "input_hint_block.", "controlnet_blocks.",
      "controlnet_x_embedder.", "control_add_embedding."), "a ControlNet",
     "choose the model it was made for, and load this with Load ControlNet (Mend)"),
    (("image_proj.", "ip_adapter."), "an IP-Adapter", "choose the model it was made for"),
    (("emb_params", "string_to_param"), "a textual inversion embedding", "put it in models/embeddings"),
    (("concept_embeds",), "a safety checker", "load it with the safety checker's loader"),
)  # fmt: skip
_QUANTISED = re.compile(
    r"(^|\.)(scaled_fp8|scale_weight|weight_scale|comfy_quant|qweight|wscales|absmax|quant_state\.\w+)$", re.MULTILINE
)


def recognise(path: Path) -> Found:
    """What a single file is; raises ModelFileError for what is no safetensors file at all."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise ModelFileError(
            f"{path.name} is a pickle, which can run code when opened, and is never opened here: {SAFE_COPY}."
        )
    header = read_header(path)
    if not header.tensors:
        raise ModelFileError(f"{path.name} holds no tensors: download it again.")
    return _add_on(header) or _model(header) or _vae(header) or _text_encoder(header) or _unknown(header)


def _add_on(header: Header) -> Found | None:
    for marks, what, way_out in _ADD_ONS:
        if any(mark in header.listing for mark in marks):
            return Found(name=header.path.name, kind=Kind.OTHER, what=what, way_out=way_out, header=header)
    # what embeddings for SDXL are made of
    if header.tensors.keys() <= {"clip_l", "clip_g"}:
        return Found(
            name=header.path.name,
            kind=Kind.OTHER,
            what="a textual inversion embedding",
            way_out="put it in models/embeddings",
            header=header,
        )
    return None


def _model(header: Header) -> Found | None:
    for prefix in DENOISER_PREFIXES:
        keys = Keys(header, prefix)
        for rule in _RULES:
            if (denoiser := rule(keys)) is not None:
                return Found(
                    name=header.path.name,
                    kind=Kind.MODEL,
                    what=denoiser.what,
                    family=denoiser.family,
                    variant=denoiser.variant,
                    header=header,
                    prefix=prefix,
                    scheduler=_own_schedule(header),
                    quantised=_QUANTISED.search(header.listing) is not None,
                    native=denoiser.native,
                    way_out=denoiser.way_out,
                )
    return None


def _own_schedule(header: Header) -> dict[str, Any]:
    """Markers, tensors without meaning of their own, that models trained on v carry since SDXL."""
    if "v_pred" not in header.tensors:
        return {}
    schedule: dict[str, Any] = {"prediction_type": "v_prediction"}
    if "ztsnr" in header.tensors:
        schedule |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return schedule


def _vae(header: Header) -> Found | None:
    for prefix in (VAE_PREFIX, "vae.", ""):
        vae_class, channels = vae_of(Keys(header, prefix))
        if channels:
            return Found(
                name=header.path.name,
                kind=Kind.VAE,
                what=_vae_what(vae_class, channels),
                way_out="choose a model, and this beside it as its VAE",
                header=header,
                prefix=prefix,
                latent_channels=channels,
                vae_class=vae_class,
            )
    return None


def _vae_what(vae_class: str, channels: int) -> str:
    if vae_class != WAN_VAE:
        return "a VAE alone"
    return "a VAE of Wan or Qwen-Image" if channels == WAN_CHANNELS else "a VAE of films"


def vae_of(keys: Keys) -> tuple[str, int]:
    """The class and the channels of the VAE below a prefix, in any spelling; ("", 0) where there is none."""
    channels = keys.side("decoder.conv1.weight", 1)
    if channels and keys.has("decoder.middle.0.residual.0.gamma"):
        return WAN_VAE, channels
    channels = keys.side("decoder.conv_in.weight", 1)
    # the convolutions of an autoencoder for films have a side in time
    films = keys.side("decoder.conv_in.weight", 4) > 0
    return ("" if not channels else WAN_VAE if films else "AutoencoderKL"), channels


_TEXT_LAYERS = (
    ("text_model.encoder.layers.{}.mlp.fc1.weight", "clip"),
    ("encoder.layers.{}.mlp.fc1.weight", "clip"),
    ("transformer.resblocks.{}.mlp.c_fc.weight", "clip"),
    ("encoder.block.{}.layer.0.SelfAttention.q.weight", "t5"),
)
# Qwen2.5-VL, which other language models are told from by their lack of biases or of eyes
_QWEN_LAYERS = ("model.layers.{}.", "model.language_model.layers.{}.", "language_model.layers.{}.", "layers.{}.")
_QWEN_WIDTH = "mlp.gate_proj.weight"


def _text_encoder(header: Header) -> Found | None:
    if header.has_prefix("vision_model.", "visual.transformer."):
        return _part(header, "a CLIP vision model")
    encoder = text_encoder_of(Keys(header, ""))
    if encoder is not None:
        return Found(
            name=header.path.name,
            kind=Kind.TEXT_ENCODER,
            what="a text encoder alone",
            way_out="choose a model, and this beside it as its text encoder",
            header=header,
            quantised=_QUANTISED.search(header.listing) is not None,
            text_encoder=encoder,
        )
    if header.has_prefix("model.layers.0.self_attn.", "model.language_model."):
        return _part(header, "a language model, a text encoder of other families")
    return None


def text_encoder_of(keys: Keys) -> TextEncoder | None:
    """The text encoder below a prefix, in any spelling."""
    for pattern, architecture in _TEXT_LAYERS:
        width = keys.side(pattern.format(0), 1)
        if width:
            return TextEncoder(architecture, width, _layers(keys, pattern))
    for layer in _QWEN_LAYERS:
        first = layer.format(0)
        if keys.has(f"{first}self_attn.k_proj.bias") and keys.first("visual.blocks.0.mlp.gate_proj.weight"):
            width = keys.side(first + _QWEN_WIDTH, 1)
            return TextEncoder("qwen2_5_vl", width, _layers(keys, layer + _QWEN_WIDTH))
    return None


def _layers(keys: Keys, pattern: str) -> int:
    return next(layer for layer in itertools.count(1) if not keys.has(pattern.format(layer)))


def _part(header: Header, what: str) -> Found:
    return Found(name=header.path.name, kind=Kind.OTHER, what=what, header=header)


# what a diffusion model of another family shows, most telling first; "native": ComfyUI paints pictures with it
_OTHER_MODELS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("patch_embedding.", "head.modulation"), "a Wan video model"),
    (("txt_in.individual_token_refiner.",), "a HunyuanVideo model"),
    (("adaln_single.emb.timestep_embedder.",), "a PixArt or LTX-Video model"),
    (("txt_in.text_norm.",), "a Qwen-Image 2.1 model"),
    (("cond_seq_linear.",), "an AuraFlow model"),
    (("clip_txt_mapper.", "clip_txt_pooled_mapper."), "a Stable Cascade model"),
    (("caption_projection.0.linear.",), "a HiDream model"),
    (("transformer_blocks.", "blocks.0.", "layers.0.", "double_blocks.", "model.diffusion_model."),
     "a diffusion model of another family"),
)  # fmt: skip


def _unknown(header: Header) -> Found:
    for marks, what in _OTHER_MODELS:
        if any(mark in header.listing for mark in marks):
            return Found(name=header.path.name, kind=Kind.MODEL, what=what, header=header)
    first = next(iter(header.tensors))
    return Found(
        name=header.path.name, kind=Kind.OTHER, what=f"no known model (its first tensor is {first})", header=header
    )


# --- denoisers

# in_channels of a UNet -> variant and what it is called
_CHANNELS = {
    4: ("", "{} model"),
    9: ("inpaint", "{} inpainting model"),
    8: ("ip2p", "InstructPix2Pix model ({})"),
    5: ("depth", "depth-guided model ({})"),
    7: ("upscaler", "upscaler ({})"),
}
# width of the prompt embeddings a UNet reads -> family and title
_CONTEXTS = {
    768: ("sd1", "Stable Diffusion 1.x"),
    1024: ("sd2", "Stable Diffusion 2.x"),
    2048: ("sdxl", "SDXL"),
    1280: ("sdxl-refiner", "SDXL refiner"),
}
_KOLORS_ADM = 5632
_SDXL_BASE = "choose an SDXL base or inpainting model; the refiner only finishes what one of these began"


def _unet(keys: Keys) -> Denoiser | None:
    """The original layout of UNets, and diffusers' own."""
    if keys.has("input_blocks.0.0.weight"):
        stem, middle, vector = "input_blocks.0.0.weight", "middle_block.1.", "label_emb.0.0.weight"
        probe = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
    elif keys.has("conv_in.weight") and keys.first(".attn2.to_k.weight"):
        stem, middle, vector = "conv_in.weight", "mid_block.attentions.0.", "add_embedding.linear_1.weight"
        probe = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"
    else:
        return None
    block = f"{middle}transformer_blocks.0.attn2.to_k.weight"
    width = keys.side(block, 1) or keys.side(keys.first(".attn2.to_k.weight"), 1)
    if not width:
        return Denoiser("", "a diffusion model that reads no prompt")
    adm = keys.side(vector, 1)
    markers = keys.header.tensors
    if width == 2048 and adm == _KOLORS_ADM:
        return Denoiser("kolors", "a Kolors model")
    if width == 2048 and not keys.has(block):
        return Denoiser("sdxl", "an SDXL model with parts left out (SSD-1B or Vega)", "pruned")
    if any(key.startswith(("edm_mean", "edm_vpred.")) for key in markers):
        return Denoiser("sdxl", "an SDXL model with an EDM schedule (Playground 2.5 or CosXL)", "edm")
    if width in (768, 1024) and (adm or keys.has("class_embedding.linear_1.weight")):
        return Denoiser(_CONTEXTS[width][0], "an unCLIP model, which is guided by images,", "unclip")
    denoiser = describe_unet(width, keys.side(stem, 1))
    # SD2's 512 and 768 models have the same shapes
    if denoiser.family == "sd2" and not denoiser.variant and _was_trained_on_v(keys.header, keys.prefix + probe):
        return Denoiser("sd2", denoiser.what, "v", native=True)
    return denoiser


def describe_unet(width: int, channels: int) -> Denoiser:
    """By the width of the prompt embeddings and the input channels of a UNet."""
    family, title = _CONTEXTS.get(width, ("", "Stable Diffusion"))
    if family == "sdxl-refiner":
        return Denoiser(family, "the SDXL refiner", way_out=_SDXL_BASE)
    variant, text = _CHANNELS.get(channels, ("other", f"{{}} model with {channels} input channels"))
    what = text.format(title)
    if channels in (5, 7, 8):
        what += f" with {channels} input channels"
    article = "an" if what[0].lower() in "aeiou" or what.startswith("SDXL") else "a"
    return Denoiser(family, f"{article} {what}", variant, native=channels in (4, 9))


def _was_trained_on_v(header: Header, bias: str) -> bool:
    """Training on v left the biases of SD2's last norms far wider.

    ComfyUI decides by the same statistic: the standard deviation of one bias, above 0.09 for v.
    """
    info = header.tensors.get(bias)
    if info is None or info.dtype not in DTYPES:
        return False
    return header.read(bias).float().std(unbiased=False).item() > 0.09


def _flux_2(keys: Keys) -> Denoiser | None:
    if keys.has("single_stream_modulation.lin.weight") or keys.has("single_stream_modulation.linear.weight"):
        return Denoiser("flux2", "a FLUX.2 model", native=True)
    return None


# width of FLUX's packed input -> variant and what it is called
_FLUX_INPUTS = {64: ("dev", "a FLUX model"), 128: ("control", "a FLUX canny or depth model"),
                384: ("fill", "a FLUX Fill model")}  # fmt: skip


def _flux(keys: Keys) -> Denoiser | None:
    """BFL's layout, and diffusers'. Kontext and the many finetunes have the shapes of dev."""
    if keys.has("double_blocks.0.img_attn.qkv.weight", "img_in.weight"):
        width, guided = keys.side("img_in.weight", 1), keys.has("guidance_in.in_layer.weight")
    elif keys.has("x_embedder.weight", "single_transformer_blocks.0.attn.to_q.weight"):
        width = keys.side("x_embedder.weight", 1)
        guided = keys.has("time_text_embed.guidance_embedder.linear_1.weight")
    else:
        return None
    if keys.first("distilled_guidance_layer.in_proj.weight"):
        return Denoiser("chroma", "a Chroma model", native=True)
    if width == 64 and not guided:
        return Denoiser("flux", "a FLUX schnell model", "schnell", native=True)
    variant, what = _FLUX_INPUTS.get(width, ("other", f"a FLUX model with {width} input channels"))
    return Denoiser("flux", what, variant, native=variant in ("dev", "fill"))


def _sd3(keys: Keys) -> Denoiser | None:
    """The original layout, and diffusers'; the original's depth is told by its width, 64 a layer."""
    if keys.has("joint_blocks.0.context_block.attn.qkv.weight"):
        width, channels = keys.side("x_embedder.proj.weight", 0), keys.side("x_embedder.proj.weight", 1)
        dual, normed = (
            keys.has("joint_blocks.0.x_block.attn2.qkv.weight"),
            keys.has("joint_blocks.0.context_block.attn.ln_q.weight"),
        )
    elif keys.has("pos_embed.proj.weight", "transformer_blocks.0.attn.add_q_proj.weight"):
        width, channels = keys.side("pos_embed.proj.weight", 0), keys.side("pos_embed.proj.weight", 1)
        dual, normed = (
            keys.has("transformer_blocks.0.attn2.to_q.weight"),
            keys.has("transformer_blocks.0.attn.norm_added_q.weight"),
        )
    else:
        return None
    return _describe_sd3(channels, dual, normed or width == 38 * 64)


def _describe_sd3(channels: int, dual: bool, normed: bool) -> Denoiser:
    if channels not in (0, 16):
        return Denoiser("sd3", f"a Stable Diffusion 3 model with {channels} input channels", "other")
    if dual:
        return Denoiser("sd3", "a Stable Diffusion 3.5 Medium model", "3.5-medium", native=True)
    if normed:
        return Denoiser("sd3", "a Stable Diffusion 3.5 Large model", "3.5-large", native=True)
    return Denoiser("sd3", "a Stable Diffusion 3 model", "3-medium", native=True)


def _qwen_image(keys: Keys) -> Denoiser | None:
    """diffusers' names, which all files have. Editing models have the shapes of the plain one, but for the later ones'
    mark."""
    if not keys.has("txt_norm.weight", "img_in.weight", "transformer_blocks.0.attn.add_q_proj.weight"):
        return None
    if keys.side("img_in.weight", 1) == 128:
        return Denoiser("mage-flow", "a Mage-Flow model", native=True)
    if keys.has("time_text_embed.addition_t_embedding.weight"):
        return Denoiser("qwen-image", "a Qwen-Image-Layered model", "layered", native=True)
    if keys.has(STILL_MARK):
        return Denoiser("qwen-image-edit-2511", "a Qwen-Image-Edit model", "still", native=True)
    return Denoiser("qwen-image", "a Qwen-Image model", native=True)


def _lumina(keys: Keys) -> Denoiser | None:
    if not (keys.has("cap_embedder.1.weight") and keys.header.has_prefix(f"{keys.prefix}noise_refiner.")):
        return None
    if keys.side("cap_embedder.1.weight", 0) == 3840:
        return Denoiser("z-image", "a Z-Image model", native=True)
    return Denoiser("lumina2", "a Lumina 2 model", native=True)


_RULES: tuple[Callable[[Keys], Denoiser | None], ...] = (_unet, _flux_2, _flux, _sd3, _qwen_image, _lumina)


# --- diffusers folders

# _class_name of a transformer -> family and what it is
_TRANSFORMERS = {
    "FluxTransformer2DModel": ("flux", "a FLUX model"),
    "Flux2Transformer2DModel": ("flux2", "a FLUX.2 model"),
    "ChromaTransformer2DModel": ("chroma", "a Chroma model"),
    "SD3Transformer2DModel": ("sd3", "a Stable Diffusion 3 model"),
    "QwenImageTransformer2DModel": ("qwen-image", "a Qwen-Image model"),
    "ZImageTransformer2DModel": ("z-image", "a Z-Image model"),
    "Lumina2Transformer2DModel": ("lumina2", "a Lumina 2 model"),
}


def is_pipeline_folder(folder: Path) -> bool:
    """Whether a folder looks like a diffusers pipeline."""
    return any(
        (folder / file).is_file() for file in ("model_index.json", "unet/config.json", "transformer/config.json")
    )


def recognise_folder(folder: Path) -> Found:
    """What a diffusers folder is, by its configs; raises ModelFileError for what is no such folder."""
    if not folder.is_dir():
        raise ModelFileError(f"{folder.name} is neither a folder nor a file: name one that exists.")
    if (folder / "unet" / "config.json").is_file():
        denoiser = _configured_unet(folder)
    elif (folder / "transformer" / "config.json").is_file():
        denoiser = _configured_transformer(folder)
    else:
        denoiser = Denoiser("", _folder_without_denoiser(folder))
    return Found(
        name=folder.name,
        kind=Kind.MODEL,
        what=denoiser.what,
        family=denoiser.family,
        variant=denoiser.variant,
        way_out=denoiser.way_out,
    )


def _pipeline_class(folder: Path) -> str:
    """The _class_name of a folder's model_index.json; empty where there is none."""
    index = folder / "model_index.json"
    return str(read_json(index).get("_class_name", "")) if index.is_file() else ""


def _folder_without_denoiser(folder: Path) -> str:
    kind = _pipeline_class(folder)
    other = next((part for part in ("transformer", "prior", "controlnet") if (folder / part).is_dir()), None)
    return f"a {kind or 'model'} with a {other}" if other else "a folder without unet/config.json"


def _configured_unet(folder: Path) -> Denoiser:
    config = read_json(folder / "unet" / "config.json")
    class_name = config.get("_class_name", "UNet2DConditionModel")
    extra, width = config.get("addition_embed_type"), config.get("cross_attention_dim", 1280)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if class_name != "UNet2DConditionModel":
        return Denoiser("", f"a model with a {class_name}")
    if extra not in (None, "text_time") or config.get("encoder_hid_dim_type") is not None:
        return Denoiser("", "a model with extra embeddings")
    if config.get("class_embed_type") is not None:
        return Denoiser("sd2", "an unCLIP model", "unclip")
    if extra is None:
        # prompts of another width are those of networks made for a trial
        return describe_unet(1024 if width == 1024 else 768, config.get("in_channels", 4))
    if scheduler.is_file() and str(read_json(scheduler).get("_class_name", "")).startswith("EDM"):
        return Denoiser("sdxl", "an SDXL model with an EDM schedule (Playground 2.5 or CosXL)", "edm")
    return describe_unet(1280 if width == 1280 else 2048, config.get("in_channels", 4))


def _configured_transformer(folder: Path) -> Denoiser:
    config = read_json(folder / "transformer" / "config.json")
    class_name = str(config.get("_class_name", "transformer"))
    family, what = _TRANSFORMERS.get(class_name, ("", f"a model with a {class_name}"))
    variant = ""
    if family == "flux":
        variant, what = _FLUX_INPUTS.get(config.get("in_channels", 64), ("other", what))
        if variant == "dev" and not config.get("guidance_embeds", False):
            variant, what = "schnell", "a FLUX schnell model"
    elif family == "sd3":
        normed = config.get("qk_norm") is not None
        return _describe_sd3(config.get("in_channels", 16), bool(config.get("dual_attention_layers")), normed)
    elif family == "qwen-image":
        return _configured_qwen_image(config, _pipeline_class(folder))
    return Denoiser(family, what, variant, native=bool(family))


def _configured_qwen_image(config: Mapping[str, Any], pipeline: str) -> Denoiser:
    """The editing models are told by the pipeline of the folder."""
    if config.get("use_layer3d_rope") or config.get("use_additional_t_cond"):
        return Denoiser("qwen-image", "a Qwen-Image-Layered model", "layered", native=True)
    if config.get("zero_cond_t"):
        return Denoiser("qwen-image-edit-2511", "a Qwen-Image-Edit model", "still", native=True)
    if pipeline.startswith("QwenImageEditPlus"):
        return Denoiser("qwen-image-edit-2509", "a Qwen-Image-Edit model", native=True)
    if pipeline.startswith("QwenImageEdit"):
        return Denoiser("qwen-image-edit", "a Qwen-Image-Edit model", native=True)
    return Denoiser("qwen-image", "a Qwen-Image model", native=True)
