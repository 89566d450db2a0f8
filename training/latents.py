"""Training pictures as latents, encoded once, kept in shards on disk and drawn many times with new noise."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import scenes
from .models import DOWNSCALE

SHARD = 512
FIRST = 4
"""Shards a run begins with."""
KEPT = 128
"""Shards that are drawn from: the newest."""


@dataclass(frozen=True, eq=False)
class Latents:
    """A batch of what the UNet is trained on."""

    image: Tensor
    """[N, 4, h, w], unit scale."""
    masked: Tensor
    """[N, 4, h, w]: the picture with its hole grey."""
    mask: Tensor
    """[N, 1, h, w], 1 = repaint."""
    caption: Tensor
    """[N]: number in ``scenes.captions()``."""

    def to(self, device: torch.device) -> Latents:
        return Latents(*(getattr(self, field.name).to(device) for field in fields(self)))


class LatentStore:
    """Shards of SHARD encoded pictures; shard k of a seed is always the same, so a lost one is made again."""

    def __init__(self, folder: Path, vae: Any, seed: int) -> None:
        self.folder, self.vae, self.seed = folder, vae, seed
        self._shards: OrderedDict[int, Latents] = OrderedDict()
        folder.mkdir(parents=True, exist_ok=True)

    def batch(self, shards: int, size: int, rng: np.random.Generator) -> Latents:
        """``size`` pictures from the newest KEPT of the first ``shards`` shards."""
        numbers = range(max(0, shards - KEPT), shards)
        for number in numbers:
            if number not in self._shards:
                self._shards[number] = self._load(number)
        while len(self._shards) > KEPT:
            self._shards.popitem(last=False)
        picks = [(self._shards[int(rng.choice(numbers))], int(rng.integers(SHARD))) for _ in range(size)]
        return Latents(
            *(torch.stack([getattr(shard, field.name)[i] for shard, i in picks]) for field in fields(Latents))
        )

    def _load(self, number: int) -> Latents:
        path = self.folder / f"{number:05d}.safetensors"
        if not path.exists():
            partial = path.with_suffix(".partial")
            shard = encode(self.vae, self.seed, number * SHARD, SHARD)
            save_file({field.name: getattr(shard, field.name) for field in fields(Latents)}, partial)
            partial.replace(path)
        tensors = load_file(path)
        return Latents(**{name: t.float() if t.is_floating_point() else t for name, t in tensors.items()})


@torch.no_grad()
def encode(vae: Any, seed: int, start: int, count: int, at_once: int = 64) -> Latents:
    """Pictures ``start`` to ``start + count`` as the pipelines see them, in half precision."""
    numbers = {caption: i for i, caption in enumerate(scenes.captions())}
    samples = [scenes.sample(seed, start + i) for i in range(count)]
    image = torch.stack([torch.from_numpy(s.image) for s in samples]).permute(0, 3, 1, 2) * 2 - 1
    mask = torch.stack([torch.from_numpy(s.mask)[None] for s in samples])
    device = next(vae.parameters()).device

    def to_latents(pixels: Tensor) -> Tensor:
        means = [vae.encode(part.to(device)).latent_dist.mean.cpu() for part in pixels.split(at_once)]
        return (torch.cat(means) * vae.config.scaling_factor).half().contiguous()

    return Latents(
        image=to_latents(image),
        masked=to_latents(image * (1 - mask)),
        mask=latent_mask(mask).half(),
        caption=torch.tensor([numbers[s.caption] for s in samples]),
    )


def latent_mask(mask: Tensor) -> Tensor:
    """The mask on the latent grid: for every second picture the nearest pixel, as diffusers has it; for the others 1
    wherever the hole touches a cell, as Mend has it, so that the model serves both."""
    nearest = F.interpolate(mask, scale_factor=1 / DOWNSCALE)
    touched = F.max_pool2d(mask, DOWNSCALE)
    second = torch.arange(len(mask))[:, None, None, None] % 2 == 1
    return torch.where(second, touched, nearest)
