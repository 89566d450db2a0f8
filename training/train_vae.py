"""Trains the AutoencoderKL."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import scenes
from .models import best_device, build_vae
from .runs import Means, Run, save_sheet

PART = "vae"
SEED = 1
HELD_OUT_SEED = 1001
HELD_OUT = 128
"""Pictures the PSNR is measured on while training."""
STEPS = 20000
BATCH = 16
RATE = 2e-4
CROP = 32
"""Side of the squares that are trained on: many parts of pictures teach more, in the same time, than few whole ones."""
EVERY = 200
"""Steps between two lines of the log."""
KL = 1e-3
MSE = 5.0
EDGES = 0.5


def pictures(seed: int, start: int, count: int, held_out: bool = False) -> Tensor:
    """[count, 3, SIZE, SIZE] in -1..1."""
    images = [torch.from_numpy(scenes.sample(seed, start + i, held_out=held_out).image) for i in range(count)]
    return torch.stack(images).permute(0, 3, 1, 2) * 2 - 1


def cut(images: Tensor) -> Tensor:
    """A random square of each picture."""
    corners = torch.randint(scenes.SIZE - CROP + 1, (len(images), 2)).tolist()
    return torch.stack([image[:, y : y + CROP, x : x + CROP] for image, (y, x) in zip(images, corners, strict=True)])


def vae_loss(restored: Tensor, wanted: Tensor, kl: Tensor) -> Tensor:
    """L1, L2 and L1 of the differences of neighbours, so that edges stay; a little KL keeps latents near unit scale."""
    error = restored - wanted
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + MSE * error.square().mean() + EDGES * edges + KL * kl.mean()


def psnr(restored: Tensor, wanted: Tensor) -> float:
    """dB of the mean squared error over all pixels, for values in -1..1."""
    return -10 * math.log10((restored.clamp(-1, 1) - wanted).square().mean().item() / 4)


@torch.no_grad()
def check(vae: Any, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The latents' means and what becomes of the pictures."""
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in wanted.split(32)])
    return latents, torch.cat([vae.decode(part).sample for part in latents.split(32)])


def train(folder: Path, steps: int = STEPS) -> bool:
    """Trains in ``folder``, from the checkpoint there if there is one; False when it was stopped before the end."""
    torch.manual_seed(SEED)
    device = best_device()
    vae = build_vae().to(device)
    run = Run(folder, {PART: vae}, RATE)
    run.resume()
    held_out = pictures(HELD_OUT_SEED, 0, HELD_OUT, held_out=True).to(device)
    means = Means()
    for step in run.steps(steps):
        torch.manual_seed(SEED + step)
        wanted = cut(pictures(SEED, step * BATCH, BATCH)).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            posterior = vae.encode(wanted).latent_dist
            restored = vae.decode(posterior.sample()).sample
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar)
        loss = vae_loss(restored.float(), wanted, kl.float())
        run.update(loss)
        means.add(loss=loss, mse=F.mse_loss(restored.float(), wanted), kl=kl.float().mean())
        if (step + 1) % EVERY == 0:
            with run.averaged():
                latents, restored = check(vae, held_out)
            run.log(**means.take(), psnr=psnr(restored, held_out), latent_std=latents.std().item())
            save_sheet(folder / "sheet.png", [held_out[:16], restored[:16], held_out[16:32], restored[16:32]])
    return run.step >= steps
