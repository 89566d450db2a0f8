"""Tiny random models twice: as diffusers modules, and as ComfyUI's own MODEL, CLIP and VAE with the same weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import comfy.model_base
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import torch

CPU = torch.device("cpu")


@dataclass
class Native:
    model: Any
    clip: Any
    vae: Any


def sd_unet_config(channels: int) -> dict[str, Any]:
    """ComfyUI's configuration of tiny.tiny_pipeline's UNet."""
    return {
        "image_size": 32,
        "in_channels": channels,
        "out_channels": 4,
        "model_channels": 32,
        "num_res_blocks": [1, 1],
        "channel_mult": [1, 2],
        "transformer_depth": [0, 1],
        "transformer_depth_output": [0, 0, 1, 1],
        "transformer_depth_middle": 1,
        "context_dim": 32,
        "use_linear_in_transformer": False,
        "use_spatial_transformer": True,
        "legacy": False,
        "adm_in_channels": None,
        "num_heads": 4,
        "num_head_channels": -1,
        "use_temporal_attention": False,
        "dtype": torch.float32,
    }


def native_sd(pipeline: Any, device: torch.device = CPU) -> Native:
    """Of a StableDiffusionInpaintPipeline from tiny.tiny_pipeline(groups=32), the network to run on ``device``."""
    channels = pipeline.unet.config.in_channels
    config = sd_unet_config(channels)
    settings = comfy.supported_models.SD15(dict(config))
    settings.unet_config = config
    settings.set_inference_dtype(torch.float32, None)
    kind = comfy.model_base.ModelType.EPS
    if pipeline.scheduler.config.prediction_type == "v_prediction":
        kind = comfy.model_base.ModelType.V_PREDICTION
    model = comfy.model_base.BaseModel(settings, kind, device=CPU)
    if channels == 9:
        model.set_inpaint()
    names = comfy.utils.unet_to_diffusers(config)
    state = {names[key]: value.clone() for key, value in pipeline.unet.state_dict().items()}
    model.diffusion_model.load_state_dict(state)
    patcher = comfy.model_patcher.ModelPatcher(model, device, CPU)
    return Native(patcher, native_clip(pipeline.text_encoder), native_vae(pipeline.vae))


def native_clip(text_encoder: Any) -> Any:
    target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
    options = {"clip_l_model_config": clip_config(text_encoder.config)}
    clip = comfy.sd.CLIP(target=target, model_options=options, embedding_directory=None)
    state = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in text_encoder.state_dict().items()}
    clip.cond_stage_model.clip_l.load_sd(state)
    return clip


def clip_config(config: Any) -> dict[str, Any]:
    names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "hidden_act")
    fixed = {"max_position_embeddings": 77, "eos_token_id": 49407}
    return {name: getattr(config, name) for name in names} | fixed


def native_vae(vae: Any) -> Any:
    """The widths of the VAE's blocks are multiples of the first."""
    widths = vae.config.block_out_channels
    details = {
        "double_z": True,
        "z_channels": vae.config.latent_channels,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": vae.config.layers_per_block,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    state = {key: value.clone() for key, value in vae.state_dict().items()}
    return comfy.sd.VAE(sd=state, config={"params": {"ddconfig": details, "embed_dim": vae.config.latent_channels}})


def native_sdxl(pipeline: Any) -> Any:
    """The MODEL of a StableDiffusionXLInpaintPipeline from tiny_sdxl.tiny_sdxl."""
    unet = pipeline.unet.config
    config = {
        "image_size": 32,
        "in_channels": unet.in_channels,
        "out_channels": 4,
        "model_channels": 32,
        "num_res_blocks": [2, 2],
        "channel_mult": [1, 2],
        "transformer_depth": [0, 0, 2, 2],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2],
        "transformer_depth_middle": 2,
        "context_dim": unet.cross_attention_dim,
        "use_linear_in_transformer": True,
        "use_spatial_transformer": True,
        "legacy": False,
        "adm_in_channels": unet.projection_class_embeddings_input_dim,
        "num_classes": "sequential",
        "num_heads": -1,
        "num_head_channels": 16,
        "use_temporal_attention": False,
        "dtype": torch.float32,
    }
    settings = comfy.supported_models.SDXL(dict(config))
    settings.unet_config = config
    settings.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.SDXL(settings, comfy.model_base.ModelType.EPS, device=CPU)
    if unet.in_channels == 9:
        model.set_inpaint()
    return patched(model, comfy.utils.unet_to_diffusers(config), pipeline.unet)


def native_flux(pipeline: Any) -> Any:
    """The MODEL of a pipeline from tiny_flow.tiny_flux."""
    channels = pipeline.transformer.config.in_channels // 4
    config = {
        "image_model": "flux",
        "in_channels": channels,
        "out_channels": 16,
        "vec_in_dim": 32,
        "context_in_dim": 32,
        "hidden_size": 32,
        "mlp_ratio": 4.0,
        "num_heads": 2,
        "depth": 2,
        "depth_single_blocks": 2,
        "axes_dim": [4, 4, 8],
        "theta": 10000,
        "patch_size": 2,
        "qkv_bias": True,
        "guidance_embed": bool(pipeline.transformer.config.guidance_embeds),
        "txt_ids_dims": [],
        "dtype": torch.float32,
    }
    dev = config["guidance_embed"]
    settings = (comfy.supported_models.Flux if dev else comfy.supported_models.FluxSchnell)(dict(config))
    settings.unet_config = config
    settings.set_inference_dtype(torch.float32, None)
    kind = comfy.model_base.ModelType.FLUX if dev else comfy.model_base.ModelType.FLOW
    model = comfy.model_base.Flux(settings, kind, device=CPU)
    return patched(model, comfy.utils.flux_to_diffusers(config), pipeline.transformer)


def native_sd3(transformer: Any) -> Any:
    """The MODEL of an SD3Transformer2DModel with heads of 64 channels, as many as layers: ComfyUI's proportion."""
    own = transformer.config
    config = {
        "in_channels": 16,
        "patch_size": own.patch_size,
        "depth": own.num_layers,
        "out_channels": 16,
        "adm_in_channels": own.pooled_projection_dim,
        "context_embedder_config": {
            "target": "torch.nn.Linear",
            "params": {"in_features": own.joint_attention_dim, "out_features": own.caption_projection_dim},
        },
        "input_size": None,
        "num_patches": own.pos_embed_max_size**2,
        "pos_embed_max_size": own.pos_embed_max_size,
        "pos_embed_scaling_factor": None,
        "dtype": torch.float32,
    }
    settings = comfy.supported_models.SD3(dict(config))
    settings.unet_config = config
    settings.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.SD3(settings, device=CPU)
    return patched(model, comfy.utils.mmdit_to_diffusers(config), transformer)


def native_qwen(module: Any = None) -> Any:
    """A MODEL of Qwen-Image, whose latents have an axis for frames; with a diffusers module's weights, or random."""
    config = {
        "image_model": "qwen_image",
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "axes_dims_rope": (4, 6, 6),
        "dtype": torch.float32,
    }
    if module is not None:
        config["joint_attention_dim"] = module.config.joint_attention_dim
        if module.config.zero_cond_t:
            config["default_ref_method"] = "index_timestep_zero"
    settings = comfy.supported_models.QwenImage(dict(config))
    settings.unet_config = config
    settings.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.QwenImage(settings, device=CPU)
    if module is not None:
        return patched(model, {key: key for key in module.state_dict()}, module)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.diffusion_model.parameters():
        parameter.data.normal_(0, 0.2, generator=generator)
    return comfy.model_patcher.ModelPatcher(model, CPU, CPU)


def patched(model: Any, names: dict[str, Any], module: Any) -> Any:
    """A MODEL whose network has the weights of a diffusers module, by ComfyUI's table of names."""
    state = {key: value.clone() for key, value in model.diffusion_model.state_dict().items()}
    for key, value in module.state_dict().items():
        name, place, change = (names[key], None, None) if isinstance(names[key], str) else (*names[key], None)[:3]
        value = change(value) if change else value
        (state[name].narrow(*place) if place else state[name]).copy_(value)
    model.diffusion_model.load_state_dict(state)
    return comfy.model_patcher.ModelPatcher(model, CPU, CPU)
