"""Trains UNet and text encoder on a trained VAE's latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import scenes
from .latents import FIRST, LatentStore
from .models import SCHEDULER, TEXT_WIDTH, best_device, build_unet
from .pipeline import assemble, build_text, load_vae, paint, tokenize, use_scheduler
from .runs import Means, Run, save_sheet
from .tokenizer import build_tokenizer

SEED = 2
SHEET_SEED = 1002
STEPS = 11200
BATCH = 32
RATE = 1e-3
DECAY = 0.4
"""The last part of the run, over which the rate falls to zero."""
FRESH = 48
"""Steps between two new shards of pictures."""
EVERY = 500
"""Steps between two sample sheets."""
DROPPED = 0.25
DROPPED_BELOW = 400
"""Captions are dropped where the picture is decided already: in pure noise no words mean that the background goes on,
and in a picture that shows a shape they say nothing against it. 25 % below this time step are 10 % of all."""
SNR_LIMIT = 5.0
OUTSIDE = 0.2
"""Weight of latent cells outside the hole, which the masked image all but gives away."""
LESSONS = 300
"""Steps in which the text encoder learns to tell colour and shape, before it is trained with the UNet."""


class Noise:
    """The forward process: diffusers' scaled_linear betas."""

    def __init__(self, device: torch.device) -> None:
        start, end, count = (SCHEDULER[key] for key in ("beta_start", "beta_end", "num_train_timesteps"))
        betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2
        self.count = count
        self.alphas = torch.cumprod(1 - betas, 0).float().to(device)

    def timesteps(self, size: int) -> Tensor:
        """One from each of ``size`` equal parts of the schedule, in random order: less variance than ``size`` draws."""
        strata = (torch.randperm(size) + torch.rand(size)) / size
        return (strata * self.count).long().clamp(max=self.count - 1).to(self.alphas.device)

    def mix(self, clean: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The noisy latents and v, what the UNet is to predict (Salimans & Ho, 2022)."""
        signal, sigma = (x[:, None, None, None] for x in (self.alphas[t].sqrt(), (1 - self.alphas[t]).sqrt()))
        return signal * clean + sigma * noise, signal * noise - sigma * clean

    def weights(self, t: Tensor) -> Tensor:
        """Min-SNR weights for v (Hang et al., 2023), moved by one so that pure noise keeps its full weight."""
        snr = self.alphas[t] / (1 - self.alphas[t])
        return ((SNR_LIMIT + 1) / (snr + 1)).clamp(max=1)


def teach_words(text_encoder: nn.Module, ids: Tensor) -> float:
    """Teaches every position behind the words to say colour and shape; returns the last loss.

    CLIP's encoder comes trained to a latent diffusion model as well. Without it the UNet ignores the prompt for the
    first thousands of steps, because nothing about the caption can be read off its embeddings.
    """
    colors, shapes = list(scenes.COLORS), list(scenes.SHAPES)
    answers = torch.tensor([(0, 0), *((i + 1, j + 1) for i in range(len(colors)) for j in range(len(shapes)))])
    answers = answers.to(ids.device)
    heads = nn.ModuleList([nn.Linear(TEXT_WIDTH, len(colors) + 1), nn.Linear(TEXT_WIDTH, len(shapes) + 1)])
    heads.to(ids.device)
    optimizer = torch.optim.AdamW([*text_encoder.parameters(), *heads.parameters()], lr=2e-3)
    behind = ids.cumsum(1).gt(0) & (ids == ids[0, 1])  # the end of the text and the padding, which are one token
    for _ in range(LESSONS):
        states = text_encoder(ids).last_hidden_state
        losses = [
            F.cross_entropy(head(states)[behind], answers[:, k, None].expand_as(ids)[behind])
            for k, head in enumerate(heads)
        ]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def train(folder: Path, vae_run: Path, steps: int = STEPS) -> bool:
    """Trains in ``folder``, from the checkpoint there if there is one; False when it was stopped before the end."""
    torch.manual_seed(SEED)
    device = best_device()
    vae = load_vae(vae_run, device)
    tokenizer = build_tokenizer()
    ids = tokenize(tokenizer, scenes.captions()).to(device)
    unet, text_encoder = build_unet().to(device), build_text(tokenizer).to(device)
    run = Run(folder, {"unet": unet, "text_encoder": text_encoder}, RATE, DECAY)
    if not run.resume():
        run.log(lesson=teach_words(text_encoder, ids))
        run.average = [parameter.detach().clone() for parameter in run.parameters]
    noise, store, means = Noise(device), LatentStore(folder / "latents", vae, SEED), Means()
    for step in run.steps(steps):
        torch.manual_seed(SEED + step)
        rng = np.random.default_rng((SEED, step))
        latents = store.batch(FIRST + step // FRESH, BATCH, rng).to(device)
        t = noise.timesteps(BATCH)
        dropped = (t < DROPPED_BELOW) & (torch.rand(BATCH).to(device) < DROPPED)
        noisy, wanted = noise.mix(latents.image, torch.randn(latents.image.shape).to(device), t)
        with torch.autocast(device.type, torch.bfloat16):
            prompts = text_encoder(ids).last_hidden_state[latents.caption.masked_fill(dropped, 0)]
            channels = torch.cat([noisy, latents.mask, latents.masked], dim=1)
            predicted = unet(channels, t, prompts).sample
        errors = (predicted.float() - wanted).square().mean(dim=1, keepdim=True)
        hole = latents.mask + (1 - latents.mask) * OUTSIDE
        per_picture = (errors * hole).sum(dim=(1, 2, 3)) / hole.sum(dim=(1, 2, 3))
        run.update((per_picture * noise.weights(t)).mean())
        means.add(loss=per_picture, early=per_picture[t >= DROPPED_BELOW], late=per_picture[t < DROPPED_BELOW])
        if (step + 1) % 100 == 0:
            run.log(**means.take())
        if (step + 1) % EVERY == 0:
            with run.averaged():
                paint_sheet(folder / "sheet.png", assemble(vae, unet, text_encoder, tokenizer))
    return run.step >= steps


def paint_sheet(path: Path, pipeline: Any, columns: int = 12) -> None:
    """Held-out scenes with their holes, what is painted for their captions, and for none."""
    use_scheduler(pipeline, "DPMSolverMultistepScheduler")
    samples = [scenes.sample(SHEET_SEED, i, kind=scenes.Kind.PAINT, held_out=True) for i in range(columns)]
    pixels = torch.stack([torch.from_numpy(s.image) for s in samples]).permute(0, 3, 1, 2) * 2 - 1
    masks = torch.stack([torch.from_numpy(s.mask)[None] for s in samples])
    rows = [paint(pipeline, samples, prompts, steps=20, guidance=scale) for prompts, scale in (
        ([s.caption for s in samples], 1.0), ([s.caption for s in samples], 4.0), ([""] * columns, 1.0)
    )]  # fmt: skip
    save_sheet(path, [pixels, pixels * (1 - masks), *rows])
