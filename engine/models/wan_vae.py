"""The autoencoder of Qwen-Image: that of Wan 2.1 (Wan: Open and Advanced Large-Scale Video Generative Models, arXiv
2503.20314) with a decoder trained further, here for pictures, which are videos of one frame.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..host import Role
from ..types import ModelFileError
from . import ldm
from .bands import Bands
from .family import Config, Part, State
from .parts import VAE_PREFIXES
from .tiled_vae import WanNetwork

WAN_MARK = "encoder.downsamples.0.residual.0.gamma"
"""A key that Wan's own files have and diffusers' folders do not."""

_RESNET = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}


def build_wan_vae(config: Config) -> nn.Module:
    """Raises ModelFileError for what cannot be run."""
    from diffusers import AutoencoderKLQwenImage

    if config.get("attn_scales"):
        raise ModelFileError("The VAE has attention between its levels, which no published one has: choose another.")
    module: nn.Module = AutoencoderKLQwenImage.from_config(dict(config))
    return module


def read_wan_vae(state: State, config: Config) -> dict[str, Tensor]:
    """From Wan's own layout or diffusers'."""
    return ldm.convert(state, wan_names(config)) if WAN_MARK in state else dict(state)


def wan_names(config: Config) -> dict[str, str]:
    """Layer names of Wan's own files -> diffusers', for an AutoencoderKLQwenImage config."""
    levels, resnets = len(config["dim_mult"]), config["num_res_blocks"]
    names = {"conv1": "quant_conv", "conv2": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        names[f"{half}.conv1"] = f"{half}.conv_in"
        names.update(_resnet(f"{half}.middle.0", f"{half}.mid_block.resnets.0"))
        names[f"{half}.middle.1"] = f"{half}.mid_block.attentions.0"
        names.update(_resnet(f"{half}.middle.2", f"{half}.mid_block.resnets.1"))
        names[f"{half}.head.0"] = f"{half}.norm_out"
        names[f"{half}.head.2"] = f"{half}.conv_out"

    # both number the encoder's layers in one row; the decoder's, one resnet more in each level, diffusers by level
    for index in range(levels * (resnets + 1) - 1):
        names.update(_resnet(f"encoder.downsamples.{index}", f"encoder.down_blocks.{index}"))
    for level in range(levels):
        first = level * (resnets + 2)
        for layer in range(resnets + 1):
            names.update(
                _resnet(f"decoder.upsamples.{first + layer}", f"decoder.up_blocks.{level}.resnets.{layer}"),
            )
        names[f"decoder.upsamples.{first + resnets + 1}"] = f"decoder.up_blocks.{level}.upsamplers.0"
    return names


def _resnet(old: str, new: str) -> dict[str, str]:
    """A resnet's layers, and the name itself for what else may have its number in the row."""
    return {old: new, **{f"{old}.{inner}": f"{new}.{name}" for inner, name in _RESNET.items()}}


# in whatever precision is asked for: ComfyUI runs it in bfloat16, and in float16 on cards without; what does not bear
# float16 are the norms of older diffusers, which WanNetwork does not call
WAN_VAE = Part("vae", Role.VAE, "AutoencoderKLQwenImage", build_wan_vae, read_wan_vae, VAE_PREFIXES)


def widths(config: Config) -> list[int]:
    """Channels of each level from the picture down, as AutoencoderKL's ``block_out_channels``."""
    return [config["base_dim"] * factor for factor in config["dim_mult"]]


def encode(vae: nn.Module, pixels: Tensor) -> Any:
    """Pixels [B, 3, H, W] in -1..1 -> their posterior, a diffusers DiagonalGaussianDistribution over [B, C, h, w].

    Here and in ``decode`` the numbers are those of the module's own call on a video of one frame, which would multiply
    two frames of zeros before it and keep what every convolution read: 2.7 times the time, up to 3.8 times the memory.
    """
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    return DiagonalGaussianDistribution(_whole(vae, pixels).encode(pixels))


def decode(vae: nn.Module, latents: Tensor) -> Tensor:
    """Latents [B, C, h, w], as the encoder makes them -> pixels [B, 3, H, W] in -1..1."""
    return _whole(vae, latents).decode(latents)


def _whole(vae: nn.Module, inputs: Tensor) -> WanNetwork:
    return WanNetwork(vae, Bands(inputs.device, inputs.device))
