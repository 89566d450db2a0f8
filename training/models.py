"""The networks: diffusers' and transformers' own classes, small."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .scenes import SIZE

DOWNSCALE = 4
LATENT = SIZE // DOWNSCALE
LATENT_CHANNELS = 4
LOG_VARIANCE = -5.0
TEXT_WIDTH = 64
TOKENS = 77

# scaled_linear betas as Stable Diffusion's; predicting v gets the colour of whole areas right where the noise is
# strongest, where the noise itself says nothing about it
SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}

VAE_WIDTHS = (16, 32, 64)
UNET_WIDTHS = (64, 96, 128)


def build_vae() -> Any:
    """An AutoencoderKL with 4 latent channels at a quarter of the size.

    Few groups in its norms: with two or three channels in each, what colour a plain picture has would not get through.
    """
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL(
        block_out_channels=list(VAE_WIDTHS),
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=["DownEncoderBlock2D"] * len(VAE_WIDTHS),
        up_block_types=["UpDecoderBlock2D"] * len(VAE_WIDTHS),
        sample_size=SIZE,
    )
    _begin_as_identity(vae, ".conv2")
    # the posterior begins narrow: at a variance of 1 the decoder would first learn to ignore the latents
    nn.init.zeros_(vae.quant_conv.weight.data[LATENT_CHANNELS:])
    nn.init.constant_(vae.quant_conv.bias.data[LATENT_CHANNELS:], LOG_VARIANCE)
    return vae


def build_unet() -> Any:
    """A UNet2DConditionModel of noisy latents, mask and masked image: 4 + 1 + 4 channels."""
    from diffusers import UNet2DConditionModel

    unet: Any = UNet2DConditionModel(
        sample_size=LATENT,
        in_channels=2 * LATENT_CHANNELS + 1,
        out_channels=LATENT_CHANNELS,
        block_out_channels=UNET_WIDTHS,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    _begin_as_identity(unet, ".conv2", ".proj_out", "conv_out")
    return unet


def _begin_as_identity(network: nn.Module, *last_layers: str) -> None:
    """Zeroes the last layers of the residual blocks: a network that begins nearly linear learns far sooner."""
    for name, module in network.named_modules():
        if name.endswith(last_layers):
            for parameter in module.parameters():
                nn.init.zeros_(parameter)


def build_text_encoder(vocabulary: int, bos: int, eos: int) -> nn.Module:
    """A CLIPTextModel of two layers."""
    from transformers import CLIPTextConfig, CLIPTextModel

    text_encoder: nn.Module = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=bos,
            eos_token_id=eos,
            pad_token_id=eos,
        )
    )
    return text_encoder


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
