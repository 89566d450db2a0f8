"""Tiny random models of the real architectures, made in seconds: they show arithmetic, never picture quality."""

from __future__ import annotations

from pathlib import Path

import torch

TOKENIZER = Path(__file__).resolve().parents[1] / "engine" / "models" / "configs" / "tokenizer"

# scheduler_config.json of the Stable Diffusion 1.5 inpainting checkpoint
SD15_SCHEDULER = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "clip_sample": False,
}


def tiny_pipeline(in_channels=9, prediction_type="epsilon", sample_size=16, seed=0, width=32, groups=8):
    """A random StableDiffusionInpaintPipeline: 8x downscale, native size 8 * sample_size pixels, 3-layer CLIP.

    ComfyUI's own networks have groups of 32 only.
    """
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionInpaintPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        sample_size=sample_size,
        in_channels=in_channels,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=4,
        norm_num_groups=groups,
    )
    vae = AutoencoderKL(
        block_out_channels=[max(16, groups), max(16, groups), 2 * max(16, groups), 2 * max(16, groups)],
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        norm_num_groups=groups,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        sample_size=8 * sample_size,
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            bos_token_id=49406,
            eos_token_id=49407,
            pad_token_id=1,
            hidden_size=width,
            intermediate_size=37,
            num_attention_heads=4,
            num_hidden_layers=3,
            vocab_size=49408,
            projection_dim=width,
        )
    )
    tokenizer = CLIPTokenizer(
        str(TOKENIZER / "vocab.json"), str(TOKENIZER / "merges.txt"), model_max_length=77, pad_token="<|endoftext|>"
    )
    pipeline = StableDiffusionInpaintPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=PNDMScheduler.from_config({**SD15_SCHEDULER, "prediction_type": prediction_type}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_tiny_model(folder: Path, **options) -> Path:
    """The same as a diffusers folder on disk, as a user would have it."""
    tiny_pipeline(**options).save_pretrained(folder, safe_serialization=True)
    return folder


def engine_model(pipeline, host=None, name="tiny"):
    """The pipeline's own modules behind the engine's InpaintModel protocol."""
    from comfyui_mend.engine.host import LocalHost, Role
    from comfyui_mend.engine.models.diffusers_model import StableDiffusionModel
    from comfyui_mend.engine.models.protocol import Conditioning, ModelFacts

    host = host or LocalHost(torch.device("cpu"))
    config = pipeline.unet.config
    return StableDiffusionModel(
        ModelFacts(
            name=name,
            conditioning=Conditioning.CONCAT if config.in_channels == 9 else Conditioning.REPLACE,
            native_size=config.sample_size * 8,
            scheduler_config=dict(pipeline.scheduler.config),
        ),
        tokenizer=pipeline.tokenizer,
        text_encoder=host.manage(pipeline.text_encoder, Role.TEXT_ENCODER),
        denoiser=host.manage(pipeline.unet, Role.DENOISER),
        vae=host.manage(pipeline.vae, Role.VAE),
        find_embedding=lambda name: None,
        host=host,
    )


def photo_and_mask(width=200, height=160, seed=0):
    """A noisy gradient [1, H, W, 3] of whole 8-bit values and an ellipse [1, H, W]."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    image = torch.stack([x, y, (x + y) / 2], dim=-1) + torch.randn(height, width, 3, generator=generator) * 0.05
    image = (image.clamp(0, 1) * 255).round() / 255
    mask = (((x - 0.45) / 0.15) ** 2 + ((y - 0.47) / 0.17) ** 2 <= 1).float()
    return image[None], mask[None]


def as_pil(image, mask):
    """The pictures of photo_and_mask as diffusers' pipelines take them."""
    from PIL import Image

    return tuple(Image.fromarray((planes[0] * 255).round().to(torch.uint8).numpy()) for planes in (image, mask))


def relative(expected, found):
    """The largest difference, of the largest value expected."""
    return float((expected - found).abs().max() / expected.abs().max())


def tiny_safety_checker(seed=3):
    """A random StableDiffusionSafetyChecker for 28x28 pixels, with random concepts whose thresholds are all 1."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig

    torch.manual_seed(seed)
    vision = {
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "image_size": 28,
        "patch_size": 7,
    }
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=16)).eval()
    checker.concept_embeds.copy_(torch.randn(17, 16))
    checker.special_care_embeds.copy_(torch.randn(3, 16))
    return checker
