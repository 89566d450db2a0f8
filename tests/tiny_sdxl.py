"""A tiny random SDXL, as a pipeline, a diffusers folder, one file and split files."""

from __future__ import annotations

from pathlib import Path

import torch
from comfyui_mend.engine.models import ldm
from safetensors.torch import save_file
from tiny import TOKENIZER
from tiny_single_file import open_clip_state, original_unet, original_vae, save_configs

# scheduler_config.json of SDXL base
SDXL_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "clip_sample": False,
}
CLIP = {
    "bos_token_id": 49406,
    "eos_token_id": 49407,
    "pad_token_id": 1,
    "intermediate_size": 37,
    "num_attention_heads": 4,
    "vocab_size": 49408,
}


def tiny_sdxl(in_channels=9, prediction_type="epsilon", sample_size=16, seed=0):
    """A random StableDiffusionXLInpaintPipeline: 8x downscale, native size 8 * sample_size pixels."""
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLInpaintPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=2,
        sample_size=sample_size,
        in_channels=in_channels,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=[1, 2],
        use_linear_projection=True,
        cross_attention_dim=32 + 48,
        attention_head_dim=(2, 4),
        norm_num_groups=32,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=6 * 256 + 48,
    )
    vae = AutoencoderKL(
        block_out_channels=[32, 32, 64, 64],
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        sample_size=8 * sample_size,
        scaling_factor=0.13025,
        force_upcast=True,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(**CLIP, hidden_size=32, projection_dim=32, num_hidden_layers=4, hidden_act="quick_gelu")
    )
    text_encoder_2 = CLIPTextModelWithProjection(
        CLIPTextConfig(**CLIP, hidden_size=48, projection_dim=48, num_hidden_layers=5, hidden_act="gelu")
    )
    tokenizers = [
        CLIPTokenizer(
            str(TOKENIZER / "vocab.json"), str(TOKENIZER / "merges.txt"), model_max_length=77, pad_token=padding
        )
        for padding in ("<|endoftext|>", "!")
    ]
    pipeline = StableDiffusionXLInpaintPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        text_encoder_2=text_encoder_2.eval(),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler.from_config({**SDXL_SCHEDULER, "prediction_type": prediction_type}),
        add_watermarker=False,
        force_zeros_for_empty_prompt=True,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_tiny_sdxl(folder: Path, pipeline=None, **options) -> Path:
    """A diffusers folder on disk, as a user would have it."""
    (pipeline or tiny_sdxl(**options)).save_pretrained(folder, safe_serialization=True)
    return folder


def original_sdxl(pipeline):
    """The pipeline's weights under the names of the published single files."""
    return {
        **original_unet(pipeline.unet),
        **original_vae(pipeline.vae),
        **{f"{ldm.SDXL_CLIP_PREFIX}text_model.{key}": value for key, value in clip_state(pipeline).items()},
        **{ldm.SDXL_OPEN_CLIP_PREFIX + key: value for key, value in open_clip_state(pipeline.text_encoder_2).items()},
    }


def clip_state(pipeline):
    state = pipeline.text_encoder.state_dict()
    return {key.removeprefix("text_model."): value for key, value in state.items()}


def save_sdxl_file(path: Path, pipeline, extra=None) -> Path:
    """Writes ``path`` and, beside it, the folder of configs that a network of unusual size needs."""
    state = {**original_sdxl(pipeline), **(extra or {})}
    save_file({key: value.contiguous().clone() for key, value in state.items()}, path)
    save_sdxl_configs(path, pipeline)
    return path


def save_sdxl_configs(path: Path, pipeline) -> Path:
    parts = ("unet", "vae", "text_encoder", "text_encoder_2")
    return save_configs(path.with_name(path.stem + "-config"), pipeline, parts)


def sdxl_engine_model(pipeline, host=None, **options):
    """The pipeline's own modules behind the engine's InpaintModel protocol."""
    from comfyui_mend.engine.host import LocalHost, Role
    from comfyui_mend.engine.models.protocol import Conditioning, ModelFacts
    from comfyui_mend.engine.models.sdxl import SDXLModel, TextReader

    host = host or LocalHost(torch.device("cpu"))
    config = pipeline.unet.config
    return SDXLModel(
        ModelFacts(
            name="tiny-sdxl",
            conditioning=Conditioning.CONCAT if config.in_channels == 9 else Conditioning.REPLACE,
            native_size=config.sample_size * 8,
            scheduler_config=dict(pipeline.scheduler.config),
        ),
        readers=tuple(
            TextReader(host.manage(encoder, Role.TEXT_ENCODER), tokenizer, lambda name: None)
            for encoder, tokenizer in (
                (pipeline.text_encoder, pipeline.tokenizer),
                (pipeline.text_encoder_2, pipeline.tokenizer_2),
            )
        ),
        denoiser=host.manage(pipeline.unet, Role.DENOISER),
        vae=host.manage(pipeline.vae, Role.VAE),
        host=host,
        **options,
    )
