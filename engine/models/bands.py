"""Convolutional layers in bands of rows, with the result of the whole picture.

A layer reads a few rows around those that it makes, so it can run band by band over what lies between two layers, a
plane, which waits elsewhere. What needs all of a plane at once are its statistics, which are gathered as it is made.
The order of sums is all that differs from the whole.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

COPIES = 4
"""Float32 tensors as large as a layer's larger side that are alive while it runs: in, normalised, out, workspace."""

Layer = Callable[..., Tensor]
"""A function of bands [B, C, rows, W]: the same rows of one plane or more."""


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
    """What lies between two layers: values [B, C, H, W] where they wait, and their statistics if those are gathered."""

    values: Tensor
    statistics: Statistics | None = None

    def normalised_by(self, norm: Any) -> Layer:
        """A group norm's function of a band of this plane, with the statistics of the whole plane."""
        mean, variance = (x.repeat_interleave(norm.num_channels // norm.num_groups) for x in self._groups(norm))
        scale = norm.weight.detach().cpu().double() * torch.rsqrt(variance + norm.eps)
        shift = norm.bias.detach().cpu().double() - mean * scale
        scale, shift = (x.float()[None, :, None, None] for x in (scale, shift))
        # in float32 as torch's own, whatever the precision of the band
        return lambda band: (band.float() * scale.to(band.device) + shift.to(band.device)).to(band.dtype)

    def _groups(self, norm: Any) -> tuple[Tensor, Tensor]:
        assert self.statistics is not None
        return self.statistics.of_groups(norm.num_groups)


@dataclass(frozen=True)
class Bands:
    """Runs layers over planes, a band at a time; with the defaults, over the whole of them."""

    device: torch.device
    """Where the layers run."""
    rest: torch.device
    """Where planes wait."""
    band_bytes: int = sys.maxsize
    """What the activations of a band may take."""
    check: Callable[[], None] = lambda: None
    """Called for each band; may raise."""
    statistics: bool = False
    """Whether they are gathered, of planes [1, C, H, W]."""

    def plane(self, values: Tensor) -> Plane:
        return Plane(values.to(self.rest), self._measure(values))

    def over(
        self, layer: Layer, *planes: Plane, reach: int = 0, scale: float = 1, per_cell: int = 0, in_place: bool = False
    ) -> Plane:
        """``layer`` over ``planes``, in bands with ``reach`` rows around each where there are any.

        Its output has ``scale`` times the rows; it needs ``per_cell`` numbers for each cell beside its channels, and
        may take the first plane's place with ``in_place``.
        """
        height = planes[0].values.shape[-2]
        rows = self._rows(planes, scale, per_cell)
        if rows >= height:
            self.check()
            return self.plane(layer(*(plane.values.to(self.device) for plane in planes)))
        result = planes[0].values if in_place else None
        statistics = self._measure()
        waiting: tuple[slice, Tensor] | None = None
        for top in range(0, height, rows):
            self.check()
            bottom = min(top + rows, height)
            above, below = min(reach, top), min(reach, height - bottom)
            bands = [plane.values[..., top - above : bottom + below, :].to(self.device) for plane in planes]
            made = layer(*bands)
            made = made[..., int(above * scale) : made.shape[-2] - int(below * scale), :]
            if statistics is not None:
                statistics.add(made)
            if result is None:
                shape = (*made.shape[:2], int(height * scale), made.shape[-1])
                result = torch.empty(shape, dtype=made.dtype, device=self.rest)
            if waiting is not None:
                _write(result, *waiting)
            # in place, the next band is still to read the last of these rows
            waiting = (slice(int(top * scale), int(bottom * scale)), made)
        assert result is not None and waiting is not None
        _write(result, *waiting)
        return Plane(result, statistics)

    def _measure(self, *values: Tensor) -> Statistics | None:
        if not self.statistics:
            return None
        statistics = Statistics()
        for plane in values:
            statistics.add(plane)
        return statistics

    def _rows(self, planes: tuple[Plane, ...], scale: float, per_cell: int) -> int:
        """Of a band; even, as halving asks."""
        channels = max(plane.values.shape[1] for plane in planes)
        row = planes[0].values.shape[-1] * (COPIES * channels * max(scale, 1) ** 2 + per_cell) * 4
        return max(2, int(self.band_bytes / row) // 2 * 2)


def _write(result: Tensor, rows: slice, band: Tensor) -> None:
    result[..., rows, :] = band.to(result.device)
