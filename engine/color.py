"""Colour: between sRGB and CIE Lab, how far two colours are apart, and one picture in the colours of another.

sRGB values are gamma-encoded, 0..1; linear light and XYZ are relative to a white of Y = 1 (D65); Lab has L in 0..100.
The last axis is the channels. The conversions keep dtype and device; ``match_color`` measures and computes on the CPU,
so a picture comes out the same whatever device it was on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .blend import paste
from .images import as_images, as_masks, pair, size_of
from .masks import OnImage
from .types import InputError, check_range

WHITE = (0.95047, 1.0, 1.08883)
"""XYZ of D65, CIE 1931 2 degree observer (ASTM E308)."""
PRIMARIES = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
"""xy chromaticities of red, green and blue (ITU-R BT.709, which IEC 61966-2-1 uses)."""
_CUT = 6 / 29
"""Where CIE Lab's cube root becomes a straight line (CIE 15)."""

FLAT = 0.5 / 255
"""A standard deviation below this (sRGB) is no spread to match: rounding to 8 bits alone makes 0.29/255."""
FLAT_LAB = 0.2
"""The same in Lab."""
MAX_GAIN = 10.0
"""The most that a spread is stretched; beyond it noise becomes the picture."""
BINS = 2**16
"""Of a histogram, from its least to its largest value: 8-bit levels and most floats have one each. Between their means
straight lines leave no bands."""
STRIP = 2**20
"""Pixels that are converted at once."""

FloatArray = npt.NDArray[np.float64]
Transfer = Callable[[Tensor], Tensor]
"""sRGB [N, 3] -> sRGB [N, 3]."""


class ColorMatch(str, Enum):
    """What of the reference's colours a picture takes."""

    REINHARD = "reinhard"
    """Mean and standard deviation of each Lab channel (after Reinhard et al., Color transfer between images, 2001)."""
    MKL = "mkl"
    """Mean and covariance of RGB, by the linear map that moves colours least (Pitie and Kokaram, The linear
    Monge-Kantorovitch linear colour mapping for example-based colour transfer, 2007). On gamma-encoded values: on
    photographs with changed exposure, gamma, white balance, saturation, contrast or tint that left less than half the
    error of the same map in linear light or Lab."""
    HISTOGRAM = "histogram"
    """The whole distribution of each RGB channel."""


class ApplyTo(str, Enum):
    """Which pixels ``match_around`` changes."""

    WHOLE = "whole"
    MASK = "mask"
    """Only where the mask is above 0, in proportion; the rest stays bit-identical."""


# --- colour spaces


def srgb_to_linear(srgb: Tensor) -> Tensor:
    """Gamma-encoded sRGB -> linear light (IEC 61966-2-1)."""
    return torch.where(srgb <= 0.04045, srgb / 12.92, ((srgb.clamp(min=0) + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(linear: Tensor) -> Tensor:
    """Linear light -> gamma-encoded sRGB; below 0 the straight part goes on."""
    return torch.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clamp(min=0) ** (1 / 2.4) - 0.055)


def linear_to_xyz(linear: Tensor) -> Tensor:
    """Linear sRGB -> CIE XYZ; white becomes WHITE exactly."""
    return linear @ _RGB_TO_XYZ.T.to(linear)


def xyz_to_linear(xyz: Tensor) -> Tensor:
    """CIE XYZ -> linear sRGB."""
    return xyz @ _RGB_TO_XYZ.inverse().T.to(xyz)


def xyz_to_lab(xyz: Tensor) -> Tensor:
    """CIE XYZ -> CIE Lab relative to WHITE (CIE 15)."""
    ratio = xyz / xyz.new_tensor(WHITE)
    root = torch.where(ratio > _CUT**3, ratio.clamp(min=0) ** (1 / 3), ratio / (3 * _CUT**2) + 4 / 29)
    x, y, z = root.unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=-1)


def lab_to_xyz(lab: Tensor) -> Tensor:
    """CIE Lab -> CIE XYZ."""
    lightness, a, b = lab.unbind(-1)
    y = (lightness + 16) / 116
    root = torch.stack([y + a / 500, y, y - b / 200], dim=-1)
    return torch.where(root > _CUT, root**3, 3 * _CUT**2 * (root - 4 / 29)) * lab.new_tensor(WHITE)


def srgb_to_lab(srgb: Tensor) -> Tensor:
    """sRGB [..., 3] -> CIE Lab [..., 3]; grey has a = b = 0."""
    return xyz_to_lab(linear_to_xyz(srgb_to_linear(srgb)))


def lab_to_srgb(lab: Tensor) -> Tensor:
    """CIE Lab [..., 3] -> sRGB [..., 3]; colours that sRGB cannot show lie outside 0..1."""
    return linear_to_srgb(xyz_to_linear(lab_to_xyz(lab)))


def _rgb_to_xyz() -> Tensor:
    """The matrix for which the primaries add up to white."""
    columns = torch.tensor([(x / y, 1, (1 - x - y) / y) for x, y in PRIMARIES], dtype=torch.float64).T
    return columns * torch.linalg.solve(columns, torch.tensor(WHITE, dtype=torch.float64))


_RGB_TO_XYZ = _rgb_to_xyz()


def delta_e_2000(first: Tensor, second: Tensor) -> Tensor:
    """The CIEDE2000 difference of Lab colours [..., 3] -> [...]; about 1 can just be seen side by side, 100 is most.

    Sharma, Wu and Dalal, The CIEDE2000 color-difference formula: implementation notes, supplementary test data, and
    mathematical observations (2005); k_L = k_C = k_H = 1. Where the hues are opposite the formula itself jumps.
    """
    (l1, a1, b1), (l2, a2, b2) = first.unbind(-1), second.unbind(-1)
    mean_c7 = ((torch.hypot(a1, b1) + torch.hypot(a2, b2)) / 2) ** 7
    stretch = 1.5 - 0.5 * torch.sqrt(mean_c7 / (mean_c7 + 25**7))  # 1 + G
    c1, c2 = torch.hypot(stretch * a1, b1), torch.hypot(stretch * a2, b2)
    h1, h2 = torch.atan2(b1, stretch * a1), torch.atan2(b2, stretch * a2)
    h1, h2 = h1.remainder(2 * math.pi), h2.remainder(2 * math.pi)

    # hue is an angle: its difference the short way round, its mean on the same side; a grey has none of its own
    turn = h2 - h1
    wraps = turn.abs() > math.pi
    grey = c1 * c2 == 0
    delta_hue = torch.where(grey, 0.0, torch.where(wraps, turn - 2 * math.pi * turn.sign(), turn))
    half_turn = torch.where(h1 + h2 < 2 * math.pi, math.pi, -math.pi)
    hue = torch.where(grey, h1 + h2, (h1 + h2) / 2 + torch.where(wraps, half_turn, 0.0))

    delta_l, delta_c, delta_h = l2 - l1, c2 - c1, 2 * torch.sqrt(c1 * c2) * torch.sin(delta_hue / 2)
    lightness, chroma = (l1 + l2) / 2, (c1 + c2) / 2
    t = (
        1
        - 0.17 * torch.cos(hue - math.radians(30))
        + 0.24 * torch.cos(2 * hue)
        + 0.32 * torch.cos(3 * hue + math.radians(6))
        - 0.20 * torch.cos(4 * hue - math.radians(63))
    )
    off_grey = (lightness - 50) ** 2
    scale_l = 1 + 0.015 * off_grey / torch.sqrt(20 + off_grey)
    scale_c = 1 + 0.045 * chroma
    scale_h = 1 + 0.015 * chroma * t
    blue = 2 * math.radians(30) * torch.exp(-(((torch.rad2deg(hue) - 275) / 25) ** 2))
    c7 = chroma**7
    rotation = -2 * torch.sqrt(c7 / (c7 + 25**7)) * torch.sin(blue)
    l_term, c_term, h_term = delta_l / scale_l, delta_c / scale_c, delta_h / scale_h
    squared = l_term**2 + c_term**2 + h_term**2 + rotation * c_term * h_term
    return torch.sqrt(squared.clamp(min=0))


# --- one picture in the colours of another


class _Sample(NamedTuple):
    """The pixels that count, and how much."""

    colors: Tensor
    """[N, 3], sRGB or Lab."""
    weights: Tensor
    """[N], above 0."""


class _Moments(NamedTuple):
    mean: Tensor
    """[3], float64."""
    covariance: Tensor
    """[3, 3], float64."""

    @property
    def spread(self) -> Tensor:
        """The standard deviation of each channel."""
        return self.covariance.diagonal().clamp(min=0).sqrt()


def match_around(
    images: Tensor,
    reference: Tensor,
    mask: Tensor | None = None,
    method: ColorMatch = ColorMatch.MKL,
    *,
    apply_to: ApplyTo = ApplyTo.WHOLE,
    strength: float = 1.0,
    max_shift: float | None = None,
    on_image: OnImage | None = None,
) -> Tensor:
    """``match_color`` for an inpainted picture: what the mask [B, H, W] marks as repainted does not count.

    The mask is left out of the statistics of both pictures where they have the same size, because what was painted
    there is meant to differ; a reference of another size is another picture, and all of it counts. ``apply_to`` says
    which pixels change. A mask that covers everything leaves nothing to measure: the picture comes back as it is.
    """
    apply_to = ApplyTo(apply_to)
    images, reference = _pair_batches(as_images(images), as_images(reference))
    images, masks = pair(images, images.new_zeros(images.shape[:3]) if mask is None else mask)
    kept = 1 - masks
    same_place = size_of(reference) == size_of(images)
    matched = match_color(
        images,
        reference,
        method,
        weight=kept,
        reference_weight=kept if same_place else None,
        strength=strength,
        max_shift=max_shift,
        on_image=on_image,
    )
    if apply_to is ApplyTo.WHOLE:
        return matched
    return torch.cat([paste(images[..., :3], matched[..., :3], masks), images[..., 3:]], dim=-1)


def match_color(
    images: Tensor,
    reference: Tensor,
    method: ColorMatch = ColorMatch.MKL,
    *,
    weight: Tensor | None = None,
    reference_weight: Tensor | None = None,
    strength: float = 1.0,
    max_shift: float | None = None,
    on_image: OnImage | None = None,
) -> Tensor:
    """Images [B, H, W, 3 or 4] in 0..1 with the colours of ``reference`` [1 or B, h, w, 3 or 4], by ``method``.

    The statistics count each pixel by ``weight`` [1 or B, H, W] and ``reference_weight`` (of the reference's size),
    0..1, and by its alpha; a pixel of weight 0 has no influence whatever it holds. Then all pixels are mapped.
    ``strength`` (0..1) is how far they go, ``max_shift`` (0..1) how far a channel may at most. An alpha channel stays.

    Where either picture is flat (a channel, or a direction of colour for MKL) only the mean is matched; without any
    pixel that counts the picture comes back as it is. Raises InputError.
    """
    method, images, reference = ColorMatch(method), as_images(images), as_images(reference)
    check_range("strength", strength, 0, 1)
    if max_shift is not None:
        check_range("max_shift", max_shift, 0, 1)
    images, reference = _pair_batches(images, reference)
    weights = _weights(images, weight)
    reference_weights = _weights(reference, reference_weight)
    result = images.clone()
    for index in range(len(images)):
        source = _sample(images[index], weights[index])
        target = _sample(reference[index], reference_weights[index])
        if strength > 0 and len(source.colors) and len(target.colors):
            transfer = _FITS[method](source, target)
            result[index, ..., :3] = _apply(transfer, images[index], strength, max_shift).to(result)
        if on_image is not None:
            on_image(index + 1, len(images))
    return result


def _pair_batches(images: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """A single picture on either side serves all of the other."""
    count = max(len(images), len(reference))
    if not {len(images), len(reference)} <= {1, count}:
        raise InputError(
            f"There are {len(images)} images and {len(reference)} references; give one reference, or one for each"
            " image."
        )
    shape = (count, -1, -1, -1)
    return (
        images if len(images) == count else images.expand(shape),
        reference if len(reference) == count else reference.expand(shape),
    )


def _weights(images: Tensor, weight: Tensor | None) -> Tensor:
    """[B, H, W]: what is asked for, times alpha."""
    weights = images.new_ones(images.shape[:3]) if weight is None else as_masks(weight, images)
    return weights * images[..., 3] if images.shape[-1] == 4 else weights


def _sample(image: Tensor, weights: Tensor) -> _Sample:
    counted = weights > 0
    return _Sample(image[counted][:, :3].detach().cpu(), weights[counted].cpu())


def _apply(transfer: Transfer, image: Tensor, strength: float, max_shift: float | None) -> Tensor:
    """The transfer on [H, W, 3 or 4], in strips so that memory stays bounded -> [H, W, 3]."""
    colors = image[..., :3].detach().cpu().reshape(-1, 3)
    result = torch.empty_like(colors)
    for part, target in zip(colors.split(STRIP), result.split(STRIP), strict=True):
        shift = (transfer(part) - part) * strength
        if max_shift is not None:
            shift = shift.clamp(-max_shift, max_shift)
        target.copy_((part + shift).clamp(0, 1))
    return result.reshape(*image.shape[:2], 3)


def _fit_reinhard(source: _Sample, target: _Sample) -> Transfer:
    before, after = _moments(_in_lab(source)), _moments(_in_lab(target))
    gain = _gain(before.spread, after.spread, FLAT_LAB)

    def transfer(colors: Tensor) -> Tensor:
        lab = srgb_to_lab(colors)
        return lab_to_srgb((lab - before.mean.to(lab)) * gain.to(lab) + after.mean.to(lab))

    return transfer


def _in_lab(sample: _Sample) -> _Sample:
    return sample._replace(colors=torch.cat([srgb_to_lab(part) for part in sample.colors.split(STRIP)]))


def _fit_mkl(source: _Sample, target: _Sample) -> Transfer:
    """T = A^-1/2 (A^1/2 B A^1/2)^1/2 A^-1/2 for the covariances A and B: symmetric, so its eigenvectors are the
    directions of colour that are stretched, each by its eigenvalue."""
    before, after = _moments(source), _moments(target)
    root = _power(before.covariance, 0.5)
    inverse_root = _power(before.covariance, -0.5)
    stretch, directions = torch.linalg.eigh(inverse_root @ _power(root @ after.covariance @ root, 0.5) @ inverse_root)
    spread, wanted = (_spread_along(moments.covariance, directions) for moments in (before, after))
    stretch = torch.where((spread < FLAT) | (wanted < FLAT), 1.0, stretch.clamp(max=MAX_GAIN))
    matrix = directions @ torch.diag(stretch) @ directions.T

    def transfer(colors: Tensor) -> Tensor:
        return (colors - before.mean.to(colors)) @ matrix.to(colors) + after.mean.to(colors)

    return transfer


def _fit_histogram(source: _Sample, target: _Sample) -> Transfer:
    before, after = _moments(source), _moments(target)
    flat = (before.spread < FLAT) | (after.spread < FLAT)
    shift = after.mean - before.mean
    curves = [None if flat[channel] else _quantile_curve(source, target, channel) for channel in range(3)]

    def transfer(colors: Tensor) -> Tensor:
        channels = [
            values + shift[index].to(values) if curve is None else curve(values)
            for index, (values, curve) in enumerate(zip(colors.unbind(-1), curves, strict=True))
        ]
        return torch.stack(channels, dim=-1)

    return transfer


def _quantile_curve(source: _Sample, target: _Sample, channel: int) -> Transfer:
    """The increasing curve that gives ``source`` the distribution of ``target``, by straight lines between the bins,
    and on beyond the outermost ones with slope 1."""
    values, ranks = _ranks(source.colors[:, channel], source.weights)
    wanted_values, wanted_ranks = _ranks(target.colors[:, channel], target.weights)
    shifts = np.interp(ranks, wanted_ranks, wanted_values) - values

    def curve(colors: Tensor) -> Tensor:
        levels = colors.double().numpy()
        # np.interp holds the outermost shifts
        return torch.from_numpy(levels + np.interp(levels, values, shifts)).to(colors)

    return curve


def _ranks(channel: Tensor, weights: Tensor) -> tuple[FloatArray, FloatArray]:
    """The mean value of each bin that holds any, in order, and the share of the weight below its middle."""
    values, counts = channel.double().numpy(), weights.double().numpy()
    low = values.min()
    bins = ((values - low) * ((BINS - 1) / (values.max() - low))).astype(np.int32)
    mass = np.bincount(bins, counts)
    held = mass > 0
    mass, means = mass[held], np.bincount(bins, counts * values)[held] / mass[held]
    return means, (np.cumsum(mass) - mass / 2) / mass.sum()


def _moments(sample: _Sample) -> _Moments:
    """Weighted mean and covariance in float64."""
    parts = list(zip(sample.colors.split(STRIP), sample.weights.split(STRIP), strict=True))
    total = sum(weights.double().sum() for _, weights in parts)
    mean = sum(weights.double() @ colors.double() for colors, weights in parts) / total
    covariance = sum(_scatter(colors.double() - mean, weights.double()) for colors, weights in parts) / total
    return _Moments(mean, covariance)


def _scatter(centred: Tensor, weights: Tensor) -> Tensor:
    return (centred * weights[:, None]).T @ centred


def _gain(spread: Tensor, wanted: Tensor, flat: float) -> Tensor:
    """What each channel is stretched by."""
    gain = (wanted / spread.clamp(min=flat)).clamp(max=MAX_GAIN)
    return torch.where((spread < flat) | (wanted < flat), 1.0, gain)


def _power(covariance: Tensor, exponent: float) -> Tensor:
    """Of a symmetric matrix that is positive semi-definite; the floor keeps roots of flat directions finite."""
    values, vectors = torch.linalg.eigh(covariance)
    return vectors @ torch.diag(values.clamp(min=1e-12) ** exponent) @ vectors.T


def _spread_along(covariance: Tensor, directions: Tensor) -> Tensor:
    """The standard deviation along each column of ``directions``."""
    return (directions * (covariance @ directions)).sum(0).clamp(min=0).sqrt()


_FITS: dict[ColorMatch, Callable[[_Sample, _Sample], Transfer]] = {
    ColorMatch.REINHARD: _fit_reinhard,
    ColorMatch.MKL: _fit_mkl,
    ColorMatch.HISTOGRAM: _fit_histogram,
}
