"""Tiny Qwen-Image models as they lie on disk: diffusers' folder, and the three files that ComfyUI's users have."""

from __future__ import annotations

import json
from contextlib import nullcontext
from unittest import mock

from comfyui_mend.engine.models import wan_vae
from safetensors.torch import save_file
from tiny_qwen import tiny_language_model
from tiny_single_file import save_configs

VOCABULARY = 152_064
PICTURE_TOKEN = 151_655
"""Of Qwen2.5-VL as it is published, whose tokenizer ComfyUI has."""


def save_folder(pipeline, folder, name):
    """``name`` is the pipeline's for which the model was published."""
    with mock.patch.object(pipeline, "processor", None) if hasattr(pipeline, "processor") else nullcontext():
        pipeline.save_pretrained(folder)
    index = folder / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": name}))
    return folder


def published_language_model(**options):
    """A tiny one that has a row for each of Qwen2.5's tokens."""
    model = tiny_language_model(vocab_size=VOCABULARY, **options)
    model.config.image_token_id, model.config.vision_start_token_id = PICTURE_TOKEN, PICTURE_TOKEN - 3
    return model


def with_published_vocabulary(pipeline):
    """The pipeline with such a language model."""
    pipeline.text_encoder = published_language_model()
    return pipeline


def comfy_names(text_encoder):
    """Its weights as ComfyUI's files name them."""
    return {
        key.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor
        for key, tensor in text_encoder.state_dict().items()
        if not key.startswith("lm_head.")
    }


def split_states(pipeline):
    """(denoiser, text encoder, VAE) under the names that ComfyUI's files have."""
    names = {new: old for old, new in wan_vae.wan_names(pipeline.vae.config).items()}
    vae = {}
    for key, tensor in pipeline.vae.state_dict().items():
        layer = max((name for name in names if key.startswith(f"{name}.")), key=len)
        vae[names[layer] + key[len(layer) :]] = tensor
    return dict(pipeline.transformer.state_dict()), comfy_names(pipeline.text_encoder), vae


def save_split(pipeline, models, name):
    """Into the folders of ComfyUI's models, and beside the denoiser the configs of the tiny sizes, without a
    tokenizer; {input of Load Model: file}."""
    places = {
        "model": ("diffusion_models", f"{name}.safetensors"),
        "text_encoder": ("text_encoders", f"{name}_vl.safetensors"),
        "vae": ("vae", f"{name}_vae.safetensors"),
    }
    for (folder, file), state in zip(places.values(), split_states(pipeline), strict=True):
        (models / folder).mkdir(parents=True, exist_ok=True)
        save_file({key: tensor.contiguous().clone() for key, tensor in state.items()}, models / folder / file)
    save_configs(models / "diffusion_models" / f"{name}-config", pipeline, ("transformer", "vae", "text_encoder"))
    return {part: file for part, (_, file) in places.items()}
