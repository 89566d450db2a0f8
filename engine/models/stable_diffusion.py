"""Stable Diffusion 1 and 2, 4 or 9 channels: one CLIP text encoder and a UNet."""

from __future__ import annotations

from ..host import Role
from ..prompts import LAST_LAYER
from . import ldm
from .detect import Found
from .diffusers_model import DiffusersModel, StableDiffusionModel
from .family import Components, Family, Part, by_variant
from .parts import UNET, VAE, build_clip, clip_layer, clip_tokenizer, find_embeddings, read_clip
from .protocol import Conditioning, ModelFacts

TEXT_ENCODER = Part(
    "text_encoder",
    Role.TEXT_ENCODER,
    "clip_text_model",
    build_clip,
    read_clip,
    # SD2's is OpenCLIP's
    (ldm.CLIP_PREFIX, ldm.OPEN_CLIP_PREFIX),
)


def unet_facts(components: Components) -> ModelFacts:
    """Of a model with a UNet2DConditionModel."""
    unet = components.configs["unet"]
    return ModelFacts(
        name=components.name,
        conditioning=Conditioning.CONCAT if unet["in_channels"] == 9 else Conditioning.REPLACE,
        native_size=unet["sample_size"] * components.downscale,
        scheduler_config=components.scheduler,
        latent_channels=components.configs["vae"]["latent_channels"],
        downscale=components.downscale,
    )


def make(components: Components) -> DiffusersModel:
    name = TEXT_ENCODER.name
    return StableDiffusionModel(
        unet_facts(components),
        tokenizer=clip_tokenizer(components, name),
        text_encoder=components.modules[name],
        denoiser=components.modules["unet"],
        vae=components.modules["vae"],
        find_embedding=find_embeddings(
            components, name, "clip_h" if components.configs[name]["hidden_size"] == 1024 else "clip_l"
        ),
        host=components.host,
        # of SD2's text encoder the last layer is left out already
        layer=clip_layer(components, name, LAST_LAYER),
    )


def _sd2_config(found: Found, prediction_type: str | None) -> str | None:
    if prediction_type is not None and found.variant in ("", "v"):
        return "sd2-v" if prediction_type == "v_prediction" else "sd2-base"
    return {"": "sd2-base", "v": "sd2-v", "inpaint": "sd2-inpaint"}.get(found.variant)


PARTS = (UNET, VAE, TEXT_ENCODER)
SD1 = Family("sd1", "Stable Diffusion 1.x", PARTS, by_variant({"": "sd15", "inpaint": "sd15-inpaint"}), make)
SD2 = Family("sd2", "Stable Diffusion 2.x", PARTS, _sd2_config, make)
