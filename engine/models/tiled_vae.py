"""A VAE on pictures too large for its memory: tiled, with the result of the whole.

A convolutional autoencoder reaches a few pixels far, with two exceptions that look at the whole picture: the statistics
of its group norms (Wu & He, 2018), where it has them, and one attention among the latent cells. Tiles that run through
it one by one and are blended afterwards see neither: each has a tone of its own, and seams show. So here it is each
layer that runs tile by tile, in bands of rows, and the attention asks for a band of cells at a time among all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .bands import Bands, Layer, Plane


class TiledVae:
    """The two halves of a diffusers AutoencoderKL or AutoencoderKLQwenImage, in bands.

    Its weights stay where they are: the layers are called, in the module's own precision, with inputs on ``device``.
    ``band_bytes`` is what a band's activations may take there; ``check`` is called for each band and may raise.
    """

    def __init__(self, vae: nn.Module, device: torch.device, band_bytes: int, check: Callable[[], None]) -> None:
        network = _network(vae)
        assert network is not None
        bands = Bands(device, torch.device("cpu"), band_bytes, check, statistics=network.group_norms)
        self._network = network(vae, bands)

    @staticmethod
    def supports(vae: nn.Module) -> bool:
        """Whether ``vae`` is made of the layers that are known here."""
        return _network(vae) is not None

    def encode(self, pixels: Tensor) -> Any:
        """Pixels [B, 3, H, W] -> their posterior, a diffusers DiagonalGaussianDistribution over [B, C, h, w], on the
        CPU."""
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        return DiagonalGaussianDistribution(torch.cat([self._network.encode(one) for one in pixels.cpu().split(1)]))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> pixels [B, 3, H, W], on the CPU."""
        return torch.cat([self._network.decode(one) for one in latents.cpu().split(1)])


class Network(ABC):
    """The two halves of an autoencoder, layer by layer."""

    group_norms: ClassVar[bool]
    """Whether its norms ask for the statistics of a plane."""

    def __init__(self, vae: nn.Module, bands: Bands) -> None:
        self.vae: Any = vae
        self.bands = bands

    @staticmethod
    @abstractmethod
    def fits(vae: nn.Module) -> bool:
        """Whether ``vae`` is made of such layers."""

    @abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, H, W] -> means and logarithms of variances [B, 2 C, h, w]."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> pixels [B, 3, H, W]."""

    @abstractmethod
    def _resnet(self, block: Any, x: Plane) -> Plane: ...

    @abstractmethod
    def _attention(self, block: Any, x: Plane) -> Plane: ...

    def _middle(self, block: Any, x: Plane) -> Plane:
        x = self._resnet(block.resnets[0], x)
        for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
            if attention is not None:
                x = self._attention(attention, x)
            x = self._resnet(resnet, x)
        return x

    def _attend(self, x: Plane, heads: int, query: Layer, key: Layer, value: Layer, join: Layer) -> Plane:
        """Attention among all cells; ``join`` makes the output of what a band's cells found and of the band."""

        def of_heads(cells: Tensor) -> Tensor:
            return cells.flatten(2).unflatten(1, (heads, -1)).transpose(-1, -2)

        def of_all(layer: Layer) -> Tensor:
            return of_heads(self.bands.over(layer, x).values.to(self.bands.device))

        keys, values = of_all(key), of_all(value)

        def attend(band: Tensor) -> Tensor:
            found = F.scaled_dot_product_attention(of_heads(query(band)), keys, values).transpose(-1, -2)
            return join(found.flatten(1, 2).unflatten(-1, band.shape[-2:]), band)

        # where torch has no attention in one piece, each of a band's cells has a number for every cell
        return self.bands.over(attend, x, per_cell=heads * keys.shape[-2])


class KLNetwork(Network):
    """diffusers' AutoencoderKL; one picture at a time."""

    group_norms = True

    @staticmethod
    def fits(vae: nn.Module) -> bool:
        from diffusers.models.autoencoders.vae import Decoder, Encoder
        from diffusers.models.unets.unet_2d_blocks import DownEncoderBlock2D, UNetMidBlock2D, UpDecoderBlock2D

        encoder, decoder = getattr(vae, "encoder", None), getattr(vae, "decoder", None)
        return (
            isinstance(encoder, Encoder)
            and isinstance(decoder, Decoder)
            and all(isinstance(block, DownEncoderBlock2D) for block in encoder.down_blocks)
            and all(isinstance(block, UpDecoderBlock2D) for block in decoder.up_blocks)
            and all(isinstance(half.mid_block, UNetMidBlock2D) for half in (encoder, decoder))
            and isinstance(decoder.conv_norm_out, nn.GroupNorm)
        )

    def encode(self, pixels: Tensor) -> Tensor:
        encoder = self.vae.encoder
        x = self.bands.over(encoder.conv_in, self.bands.plane(pixels), reach=1)
        for block in encoder.down_blocks:
            for resnet in block.resnets:
                x = self._resnet(resnet, x)
            for downsampler in block.downsamplers or ():
                # an even number of rows around it, so that every band begins where a stride does
                x = self.bands.over(downsampler, x, reach=2, scale=0.5)
        x = self._head(encoder, self._middle(encoder.mid_block, x))
        return (x if self.vae.quant_conv is None else self.bands.over(self.vae.quant_conv, x)).values

    def decode(self, latents: Tensor) -> Tensor:
        decoder = self.vae.decoder
        x = self.bands.plane(latents)
        if self.vae.post_quant_conv is not None:
            x = self.bands.over(self.vae.post_quant_conv, x)
        x = self._middle(decoder.mid_block, self.bands.over(decoder.conv_in, x, reach=1))
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                x = self._resnet(resnet, x)
            for upsampler in block.upsamplers or ():
                x = self.bands.over(upsampler, x, reach=1, scale=2)
        return self._head(decoder, x).values

    def _head(self, half: Any, x: Plane) -> Plane:
        norm = x.normalised_by(half.conv_norm_out)
        return self.bands.over(lambda band: half.conv_out(half.conv_act(norm(band))), x, reach=1)

    def _resnet(self, block: Any, x: Plane) -> Plane:
        first = x.normalised_by(block.norm1)
        hidden = self.bands.over(lambda band: block.conv1(block.nonlinearity(first(band))), x, reach=1)
        second = hidden.normalised_by(block.norm2)

        def join(hidden: Tensor, x: Tensor) -> Tensor:
            shortcut = x if block.conv_shortcut is None else block.conv_shortcut(x)
            return (shortcut + block.conv2(block.nonlinearity(second(hidden)))) / block.output_scale_factor

        return self.bands.over(join, hidden, x, reach=1, in_place=True)

    def _attention(self, block: Any, x: Plane) -> Plane:
        norm = x.normalised_by(block.group_norm)

        def project(linear: nn.Module, cells: Tensor) -> Tensor:
            projected: Tensor = linear(cells.flatten(2).transpose(1, 2)).transpose(1, 2)
            return projected.unflatten(-1, cells.shape[-2:])

        def normalised(linear: nn.Module) -> Layer:
            return lambda band: project(linear, norm(band))

        def join(found: Tensor, band: Tensor) -> Tensor:
            return (project(block.to_out[0], found) + band) / block.rescale_output_factor

        query, key, value = (normalised(linear) for linear in (block.to_q, block.to_k, block.to_v))
        return self._attend(x, block.heads, query, key, value, join)


class WanNetwork(Network):
    """diffusers' AutoencoderKLQwenImage, the autoencoder of Wan 2.1 (arXiv 2503.20314), on pictures: videos of one
    frame.

    Its convolutions see the frames before theirs, and before the first there are zeros: of their weights, only those of
    the last frame count, and each is a two-dimensional one. Time is resampled from the second frame on.
    """

    group_norms = False

    @staticmethod
    def fits(vae: nn.Module) -> bool:
        from diffusers.models.autoencoders import autoencoder_kl_qwenimage as qwen

        encoder, decoder = getattr(vae, "encoder", None), getattr(vae, "decoder", None)
        layers = (qwen.QwenImageResidualBlock, qwen.QwenImageResample)
        return (
            isinstance(encoder, qwen.QwenImageEncoder3d)
            and isinstance(decoder, qwen.QwenImageDecoder3d)
            and all(isinstance(layer, layers) for layer in encoder.down_blocks)
            and all(isinstance(block, qwen.QwenImageUpBlock) for block in decoder.up_blocks)
            and all(isinstance(half.mid_block, qwen.QwenImageMidBlock) for half in (encoder, decoder))
        )

    def encode(self, pixels: Tensor) -> Tensor:
        encoder = self.vae.encoder
        x = self.bands.over(_of_one_frame(encoder.conv_in), self.bands.plane(pixels), reach=1)
        for layer in encoder.down_blocks:
            if hasattr(layer, "resample"):
                # an even number of rows around it, so that every band begins where a stride does
                x = self.bands.over(layer.resample, x, reach=2, scale=0.5)
            else:
                x = self._resnet(layer, x)
        x = self._head(encoder, self._middle(encoder.mid_block, x))
        return self.bands.over(_of_one_frame(self.vae.quant_conv), x).values

    def decode(self, latents: Tensor) -> Tensor:
        decoder = self.vae.decoder
        x = self.bands.over(_of_one_frame(self.vae.post_quant_conv), self.bands.plane(latents))
        x = self._middle(decoder.mid_block, self.bands.over(_of_one_frame(decoder.conv_in), x, reach=1))
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                x = self._resnet(resnet, x)
            for upsampler in block.upsamplers or ():
                x = self.bands.over(_doubled_by(upsampler.resample[1]), x, reach=1, scale=2)
        return self._head(decoder, x).values.clamp_(-1, 1)

    def _head(self, half: Any, x: Plane) -> Plane:
        norm, conv = _root_mean_square(half.norm_out), _of_one_frame(half.conv_out)
        return self.bands.over(lambda band: conv(half.nonlinearity(norm(band))), x, reach=1)

    def _resnet(self, block: Any, x: Plane) -> Plane:
        first, second = _root_mean_square(block.norm1), _root_mean_square(block.norm2)
        conv1, conv2 = _of_one_frame(block.conv1), _of_one_frame(block.conv2)
        shortcut = block.conv_shortcut
        if not isinstance(shortcut, nn.Identity):
            shortcut = _of_one_frame(shortcut)
        hidden = self.bands.over(lambda band: conv1(block.nonlinearity(first(band))), x, reach=1)

        def join(hidden: Tensor, x: Tensor) -> Tensor:
            return conv2(block.nonlinearity(second(hidden))).add_(shortcut(x))

        return self.bands.over(join, hidden, x, reach=1, in_place=True)

    def _attention(self, block: Any, x: Plane) -> Plane:
        norm = _root_mean_square(block.norm)

        def third(number: int) -> Layer:
            return lambda band: block.to_qkv(norm(band)).chunk(3, dim=1)[number]

        def join(found: Tensor, band: Tensor) -> Tensor:
            joined: Tensor = block.proj(found) + band
            return joined

        return self._attend(x, 1, third(0), third(1), third(2), join)


def _of_one_frame(conv: Any) -> Layer:
    """A causal convolution with nothing before its frame."""
    return lambda band: F.conv2d(band, conv.weight[:, :, -1], conv.bias, padding="same")


def _root_mean_square(norm: Any) -> Layer:
    """A norm of each cell's channels, in float32: the smallest length allowed is zero in float16."""
    weight = norm.scale * norm.gamma.float().reshape(-1, 1, 1)

    def layer(band: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(band, dim=1, keepdim=True, dtype=torch.float32).clamp_(min=1e-12)
        return (band / length).mul_(weight).to(band.dtype)

    return layer


def _doubled_by(conv: nn.Module) -> Layer:
    """An upsampler's convolution behind its nearest neighbours, which need no higher precision than they have."""
    return lambda band: conv(F.interpolate(band, scale_factor=2.0, mode="nearest"))


def _network(vae: nn.Module) -> type[Network] | None:
    """What ``vae`` is, where it is known."""
    kinds: tuple[type[Network], ...] = (KLNetwork, WanNetwork)
    return next((kind for kind in kinds if kind.fits(vae)), None)
