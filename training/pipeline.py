"""From the runs' weights to diffusers' StableDiffusionInpaintPipeline and back to pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import scenes, train_vae
from .models import SCHEDULER, build_text_encoder, build_unet, build_vae
from .runs import load_average
from .tokenizer import build_tokenizer

SCALE_PICTURES = 256


def load_vae(run: Path, device: torch.device | None = None) -> Any:
    """A run's VAE with the scaling factor that gives its latents unit scale."""
    vae: Any = load_average(run, train_vae.PART, build_vae()).to(device or "cpu")
    vae.register_to_config(scaling_factor=latent_scale(vae))
    return vae


@torch.no_grad()
def latent_scale(vae: Any) -> float:
    """One over the root mean square of the latents of the first training pictures."""
    device = next(vae.parameters()).device
    pictures = train_vae.pictures(train_vae.SEED, 0, SCALE_PICTURES).to(device)
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in pictures.split(32)])
    return round(1 / latents.square().mean().sqrt().item(), 4)


def build_text(tokenizer: Any) -> nn.Module:
    """The untrained text encoder for a tokenizer."""
    return build_text_encoder(len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)


def tokenize(tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Token ids [N, 77] as diffusers' pipelines pad them."""
    ids: Tensor = tokenizer(list(texts), padding="max_length", truncation=True, return_tensors="pt").input_ids
    return ids


def assemble(vae: nn.Module, unet: nn.Module, text_encoder: nn.Module, tokenizer: Any) -> Any:
    """The ordinary pipeline, without a safety checker and silent."""
    from diffusers import PNDMScheduler, StableDiffusionInpaintPipeline

    pipeline: Any = StableDiffusionInpaintPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler.from_config(SCHEDULER),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_runs(vae_run: Path, unet_run: Path) -> Any:
    """The pipeline of two runs' averaged weights."""
    tokenizer = build_tokenizer()
    return assemble(
        load_vae(vae_run),
        load_average(unet_run, "unet", build_unet()),
        load_average(unet_run, "text_encoder", build_text(tokenizer)),
        tokenizer,
    )


def use_scheduler(pipeline: Any, name: str, **options: Any) -> None:
    """Replaces the pipeline's scheduler by another class of diffusers with the settings the exported model has."""
    import diffusers

    exported = diffusers.PNDMScheduler.from_config(SCHEDULER).config
    pipeline.scheduler = getattr(diffusers, name).from_config(exported, **options)


def paint(
    pipeline: Any,
    samples: Sequence[scenes.Sample],
    prompts: Sequence[str],
    *,
    steps: int = 25,
    guidance: float = 3.0,
    seed: int = 0,
    batch: int = 32,
    **options: Any,
) -> Tensor:
    """The samples with their holes repainted, [N, 3, H, W] in -1..1; picture i has the seed ``seed + i``."""
    painted = []
    for start in range(0, len(samples), batch):
        group = samples[start : start + batch]
        device = pipeline.device
        result = pipeline(
            prompt=list(prompts[start : start + batch]),
            image=torch.stack([_planes(s.image) for s in group]) * 2 - 1,
            mask_image=torch.stack([torch.from_numpy(s.mask)[None] for s in group]),
            height=scenes.SIZE,
            width=scenes.SIZE,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator("cpu").manual_seed(seed + start + i) for i in range(len(group))],
            output_type="pt",
            **options,
        ).images
        painted.append(result.to(device).float().cpu() * 2 - 1)
    return torch.cat(painted)


def _planes(image: Any) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)
