"""A VAE on pictures too large for its memory: tiled, with the result of the whole.

A convolutional autoencoder reaches a few pixels far, with two exceptions that look at the whole picture: the statistics
of its group norms (Wu & He, 2018), and one attention among the latent cells. Tiles that run through it one by one and
are blended afterwards see neither: each has a tone of its own, and seams show. So here it is each layer that runs tile
by tile: over bands of rows, with as many rows around them as the layer reaches. What lies between two layers waits in
main memory, its statistics are gathered as it is made, and the attention asks for a band of cells at a time among all.
The order of sums is all that differs from the untiled network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

COPIES = 4
"""Float32 tensors as large as a layer's larger side that are alive while it runs: in, normalised, out, workspace."""

Layer = Callable[..., Tensor]
"""A function of bands [1, C, rows, W]: the same rows of one plane or more."""


class Statistics:
    """Mean and variance of each channel over bands that come one after the other (Chan, Golub & LeVeque, 1979)."""

    def __init__(self) -> None:
        self._count = 0
        self._mean = self._squares = torch.zeros(1, dtype=torch.float64)

    def add(self, band: Tensor) -> None:
        """``band`` [1, C, rows, W]."""
        count = band.shape[-2] * band.shape[-1]
        variance, mean = (x.cpu().double() for x in torch.var_mean(band.float(), dim=(0, 2, 3), correction=0))
        total, away = self._count + count, mean - self._mean
        self._squares = self._squares + variance * count + away**2 * (self._count * count / total)
        self._mean = self._mean + away * (count / total)
        self._count = total

    def of_groups(self, groups: int) -> tuple[Tensor, Tensor]:
        """Mean and variance [groups] of as many neighbouring channels each."""
        means, variances = self._mean.reshape(groups, -1), (self._squares / self._count).reshape(groups, -1)
        return means.mean(1), variances.mean(1) + means.var(1, correction=0)


@dataclass(eq=False)
class Plane:
    """What lies between two layers: values [1, C, H, W] in main memory, and their statistics."""

    values: Tensor
    statistics: Statistics

    def normalised_by(self, norm: Any) -> Layer:
        """A group norm's function of a band of this plane, with the statistics of the whole plane."""
        mean, variance = (x.repeat_interleave(norm.num_channels // norm.num_groups) for x in self._groups(norm))
        scale = norm.weight.detach().cpu().double() * torch.rsqrt(variance + norm.eps)
        shift = norm.bias.detach().cpu().double() - mean * scale
        scale, shift = (x.float()[None, :, None, None] for x in (scale, shift))
        # in float32 as torch's own, whatever the precision of the band
        return lambda band: (band.float() * scale.to(band.device) + shift.to(band.device)).to(band.dtype)

    def _groups(self, norm: Any) -> tuple[Tensor, Tensor]:
        return self.statistics.of_groups(norm.num_groups)


class TiledVae:
    """The two halves of a diffusers AutoencoderKL, in bands.

    Its weights stay where they are: the layers are called, in the module's own precision, with inputs on ``device``.
    ``band_bytes`` is what a band's activations may take there; ``check`` is called for each band and may raise.
    """

    def __init__(self, vae: nn.Module, device: torch.device, band_bytes: int, check: Callable[[], None]) -> None:
        self.vae: Any = vae
        self.device = device
        self.band_bytes = band_bytes
        self.check = check

    @staticmethod
    def supports(vae: nn.Module) -> bool:
        """Whether ``vae`` is made of the layers that are known here."""
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

    def encode(self, pixels: Tensor) -> Any:
        """Pixels [B, 3, H, W] -> their posterior, a diffusers DiagonalGaussianDistribution over [B, C, h, w], on the
        CPU."""
        from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

        return DiagonalGaussianDistribution(torch.cat([self._encode(picture) for picture in pixels.cpu().split(1)]))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> pixels [B, 3, H, W], on the CPU."""
        return torch.cat([self._decode(picture) for picture in latents.cpu().split(1)])

    def _encode(self, pixels: Tensor) -> Tensor:
        encoder = self.vae.encoder
        x = self._over(encoder.conv_in, self._plane(pixels), reach=1)
        for block in encoder.down_blocks:
            for resnet in block.resnets:
                x = self._resnet(resnet, x)
            for downsampler in block.downsamplers or ():
                # an even number of rows around it, so that every band begins where a stride does
                x = self._over(downsampler, x, reach=2, scale=0.5)
        x = self._head(encoder, self._middle(encoder.mid_block, x))
        return (x if self.vae.quant_conv is None else self._over(self.vae.quant_conv, x)).values

    def _decode(self, latents: Tensor) -> Tensor:
        decoder = self.vae.decoder
        x = self._plane(latents)
        if self.vae.post_quant_conv is not None:
            x = self._over(self.vae.post_quant_conv, x)
        x = self._middle(decoder.mid_block, self._over(decoder.conv_in, x, reach=1))
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                x = self._resnet(resnet, x)
            for upsampler in block.upsamplers or ():
                x = self._over(upsampler, x, reach=1, scale=2)
        return self._head(decoder, x).values

    def _middle(self, block: Any, x: Plane) -> Plane:
        x = self._resnet(block.resnets[0], x)
        for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
            if attention is not None:
                x = self._attention(attention, x)
            x = self._resnet(resnet, x)
        return x

    def _head(self, half: Any, x: Plane) -> Plane:
        norm = x.normalised_by(half.conv_norm_out)
        return self._over(lambda band: half.conv_out(half.conv_act(norm(band))), x, reach=1)

    def _resnet(self, block: Any, x: Plane) -> Plane:
        first = x.normalised_by(block.norm1)
        hidden = self._over(lambda band: block.conv1(block.nonlinearity(first(band))), x, reach=1)
        second = hidden.normalised_by(block.norm2)

        def join(hidden: Tensor, x: Tensor) -> Tensor:
            shortcut = x if block.conv_shortcut is None else block.conv_shortcut(x)
            return (shortcut + block.conv2(block.nonlinearity(second(hidden)))) / block.output_scale_factor

        return self._over(join, hidden, x, reach=1, in_place=True)

    def _attention(self, attention: Any, x: Plane) -> Plane:
        norm = x.normalised_by(attention.group_norm)

        def project(linear: nn.Module, cells: Tensor) -> Tensor:
            projected: Tensor = linear(cells.flatten(2).transpose(1, 2)).transpose(1, 2)
            return projected.unflatten(-1, cells.shape[-2:])

        def heads(cells: Tensor) -> Tensor:
            return cells.flatten(2).unflatten(1, (attention.heads, -1)).transpose(-1, -2)

        def of_all(linear: nn.Module) -> Tensor:
            return heads(self._over(lambda band: project(linear, norm(band)), x).values.to(self.device))

        keys, values = of_all(attention.to_k), of_all(attention.to_v)

        def attend(band: Tensor) -> Tensor:
            queries = heads(project(attention.to_q, norm(band)))
            found = F.scaled_dot_product_attention(queries, keys, values).transpose(-1, -2)
            mixed = project(attention.to_out[0], found.flatten(1, 2).unflatten(-1, band.shape[-2:]))
            return (mixed + band) / attention.rescale_output_factor

        # where torch has no attention in one piece, each of a band's cells has a number for every cell
        return self._over(attend, x, per_cell=attention.heads * keys.shape[-2])

    def _plane(self, values: Tensor) -> Plane:
        statistics = Statistics()
        statistics.add(values)
        return Plane(values, statistics)

    def _over(
        self, layer: Layer, *planes: Plane, reach: int = 0, scale: float = 1, per_cell: int = 0, in_place: bool = False
    ) -> Plane:
        """``layer`` over bands of ``planes``, with ``reach`` rows around each where there are any.

        Its output has ``scale`` times the rows; it needs ``per_cell`` numbers for each cell beside its channels, and
        takes the first plane's place with ``in_place``.
        """
        height = planes[0].values.shape[-2]
        rows = self._rows(planes, scale, per_cell)
        result = planes[0].values if in_place else None
        statistics = Statistics()
        waiting: tuple[slice, Tensor] | None = None
        for top in range(0, height, rows):
            self.check()
            bottom = min(top + rows, height)
            above, below = min(reach, top), min(reach, height - bottom)
            bands = [plane.values[..., top - above : bottom + below, :].to(self.device) for plane in planes]
            made = layer(*bands)
            made = made[..., int(above * scale) : made.shape[-2] - int(below * scale), :]
            statistics.add(made)
            if result is None:
                result = torch.empty((*made.shape[:2], int(height * scale), made.shape[-1]), dtype=made.dtype)
            if waiting is not None:
                _write(result, *waiting)
            # in place, the next band is still to read the last of these rows
            waiting = (slice(int(top * scale), int(bottom * scale)), made)
        assert result is not None and waiting is not None
        _write(result, *waiting)
        return Plane(result, statistics)

    def _rows(self, planes: tuple[Plane, ...], scale: float, per_cell: int) -> int:
        """Of a band; even, as halving asks."""
        channels = max(plane.values.shape[1] for plane in planes)
        row = planes[0].values.shape[-1] * (COPIES * channels * max(scale, 1) ** 2 + per_cell) * 4
        return max(2, int(self.band_bytes / row) // 2 * 2)


def _write(result: Tensor, rows: slice, band: Tensor) -> None:
    result[..., rows, :] = band.to(result.device)
