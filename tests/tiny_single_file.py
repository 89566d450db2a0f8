"""The tiny pipeline as one file in the original latent-diffusion layout, as most checkpoints are distributed."""

from __future__ import annotations

from pathlib import Path

import torch
from comfyui_mend.engine.models import ldm
from safetensors.torch import save_file
from tiny import tiny_pipeline


def original_state(pipeline, text_layout="clip"):
    """The pipeline's weights under the original names.

    ``text_layout``: "clip" (cond_stage_model.transformer.text_model.*), "bare_clip" (without text_model) or
    "open_clip" (fused projections and one layer more, as in SD2).
    """
    state = original_state_of(pipeline.unet, pipeline.vae, pipeline.text_encoder, open_clip=text_layout == "open_clip")
    if text_layout == "bare_clip":
        state = {key.replace("transformer.text_model.", "transformer."): value for key, value in state.items()}
    return {key: value.contiguous().clone() for key, value in state.items()}


def original_state_of(unet, vae, text_encoder, open_clip=False):
    state = {**original_unet(unet), **original_vae(vae)}
    if open_clip:
        text = open_clip_state(text_encoder)
        return {**state, **{ldm.OPEN_CLIP_PREFIX + key: value for key, value in text.items()}}
    text = {key.removeprefix("text_model."): value for key, value in text_encoder.state_dict().items()}
    return {**state, **{f"{ldm.CLIP_PREFIX}text_model.{key}": value for key, value in text.items()}}


def original_unet(unet, prefix=ldm.UNET_PREFIX):
    return _renamed(unet.state_dict(), _inverse(ldm.unet_names(unet.config)), prefix)


def original_vae(vae, prefix=ldm.VAE_PREFIX):
    return _renamed(_convolved(vae.state_dict()), _inverse(ldm.vae_names(vae.config)), prefix)


def save_single_file(path: Path, pipeline=None, *, dtype=torch.float32, text_layout="clip", extra=None, **options):
    """Writes ``path`` and, beside it, the folder of configs that a network of unusual size needs."""
    pipeline = pipeline or tiny_pipeline(**options)
    state = {key: value.to(dtype) for key, value in original_state(pipeline, text_layout).items()}
    save_file({**state, **(extra or {})}, path)
    save_configs(path.with_name(path.stem + "-config"), pipeline)
    return path


def save_configs(folder: Path, pipeline, parts=("unet", "vae", "text_encoder")) -> Path:
    """Configs only: no weights, no tokenizer."""
    for part in parts:
        module = getattr(pipeline, part)
        (folder / part).mkdir(parents=True, exist_ok=True)
        text = module.config.to_json_string() if part.startswith("text_encoder") else module.to_json_string()
        (folder / part / "config.json").write_text(text)
    pipeline.scheduler.save_pretrained(folder / "scheduler")
    return folder


def _inverse(names):
    return {new: old for old, new in names.items()}


def _renamed(state, names, prefix):
    return {prefix + ldm.rename(key, names): value for key, value in state.items()}


def _convolved(vae_state):
    """The original VAE's attention is made of 1x1 convolutions."""
    return {
        key: value[:, :, None, None] if ".attentions.0.to_" in key and value.ndim == 2 else value
        for key, value in vae_state.items()
    }


def open_clip_state(text_encoder):
    """A CLIP text tower under OpenCLIP's names, with or without transformers' projection."""
    config = text_encoder.config
    text = {key.removeprefix("text_model."): value for key, value in text_encoder.state_dict().items()}
    projection = text.pop("text_projection.weight", None)
    names = _inverse(ldm.open_clip_names(config.to_dict()))
    state = {
        ldm.rename(key, names): value
        for key, value in text.items()
        if not any(f".{projection}_proj." in key for projection in "qkv")
    }
    for layer in range(config.num_hidden_layers):
        attention = f"encoder.layers.{layer}.self_attn"
        for kind in ("weight", "bias"):
            fused = torch.cat([text[f"{attention}.{part}_proj.{kind}"] for part in "qkv"])
            state[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = fused
    state["logit_scale"] = torch.tensor(4.6)
    if projection is not None:
        return {**state, "text_projection": projection.T.contiguous()}
    # one layer more, and a projection: in every SD2 file, and not read
    mark = f"resblocks.{config.num_hidden_layers - 1}."
    last = {
        key.replace(mark, f"resblocks.{config.num_hidden_layers}."): value + 1
        for key, value in state.items()
        if mark in key
    }
    return {**state, **last, "text_projection": torch.ones(config.hidden_size, config.hidden_size)}
