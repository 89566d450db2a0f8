"""Stable Diffusion 1 and 2, 4 or 9 channels: one CLIP text encoder and a UNet."""

from __future__ import annotations

from ..host import Role
from ..prompts import folder_embeddings
from .detect import Found
from .diffusers_model import DiffusersModel, StableDiffusionModel
from .family import Components, Family, Part, by_variant
from .parts import UNET, VAE, build_clip, clip_tokenizer, read_clip
from .protocol import Conditioning, ModelFacts

TEXT_ENCODER = Part(
    "text_encoder",
    Role.TEXT_ENCODER,
    "clip_text_model",
    build_clip,
    read_clip,
    # SD2's is OpenCLIP's
    ("cond_stage_model.transformer.", "cond_stage_model.model."),
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
    text_encoder = components.configs["text_encoder"]
    width = int(text_encoder["hidden_size"])
    return StableDiffusionModel(
        unet_facts(components),
        tokenizer=clip_tokenizer(components),
        text_encoder=components.modules["text_encoder"],
        denoiser=components.modules["unet"],
        vae=components.modules["vae"],
        find_embedding=folder_embeddings(
            components.host.model_folders("embeddings"), width, "clip_h" if width == 1024 else "clip_l"
        ),
        host=components.host,
    )


def _sd2_config(found: Found, prediction_type: str | None) -> str | None:
    if prediction_type is not None and found.variant in ("", "v"):
        return "sd2-v" if prediction_type == "v_prediction" else "sd2-base"
    return {"": "sd2-base", "v": "sd2-v", "inpaint": "sd2-inpaint"}.get(found.variant)


PARTS = (UNET, VAE, TEXT_ENCODER)
SD1 = Family("sd1", "Stable Diffusion 1.x", PARTS, by_variant({"": "sd15", "inpaint": "sd15-inpaint"}), make)
SD2 = Family("sd2", "Stable Diffusion 2.x", PARTS, _sd2_config, make)
