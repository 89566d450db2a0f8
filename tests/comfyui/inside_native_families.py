"""Runs under ComfyUI's own Python: SDXL, FLUX and Stable Diffusion 3 as ComfyUI's MODEL and as diffusers' modules.

Both are given the same embeddings and autoencoder. Prints relative differences of the latents as one line of JSON;
test_native.py says how far they may be.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import inside
import torch

inside.boot()
sys.path.insert(0, str(inside.ROOT / "tests"))

import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
from comfy.cli_args import args  # noqa: E402

args.force_fp32 = True

from comfyui_mend.engine.host import LocalHost  # noqa: E402
from comfyui_mend.engine.inpaint import inpaint  # noqa: E402
from comfyui_mend.engine.masks import to_latent_grid  # noqa: E402
from comfyui_mend.engine.models import flux, sd3  # noqa: E402
from comfyui_mend.engine.models.protocol import PromptSyntax  # noqa: E402
from comfyui_mend.engine.sampling import make_schedule  # noqa: E402
from comfyui_mend.engine.types import Crop, InpaintRequest, Size  # noqa: E402
from comfyui_mend.nodes import native as native_module  # noqa: E402
from comfyui_mend.nodes.native import NativeModel  # noqa: E402
from native_tiny import native_flux, native_qwen, native_sd3, native_sdxl  # noqa: E402
from tiny import photo_and_mask  # noqa: E402
from tiny_flow import make_model, tiny_flux, tiny_sd3  # noqa: E402
from tiny_sdxl import sdxl_engine_model, tiny_sdxl  # noqa: E402

HOST = LocalHost(torch.device("cpu"))


class Borrowed(NativeModel):
    """ComfyUI's network with the reference's autoencoder, in that one's scale."""

    def __init__(self, patcher, reference, positive, negative):
        vae = SimpleNamespace(latent_channels=reference.facts.latent_channels, spacial_compression_encode=lambda: 8)
        super().__init__(patcher, vae, native_size=reference.facts.native_size, positive=positive, negative=negative)
        self.reference = reference

    def encode_image(self, pixels):
        return self.reference.encode_image(pixels)

    def decode(self, latents):
        self.latents = latents
        return self.reference.decode(latents)


def cond(embedding):
    return [[embedding.tokens, {"pooled_output": embedding.pooled}]]


def compare(reference, patcher, **options):
    reference.facts = replace(reference.facts, native_size=128)
    negative, positive = reference.encode_prompt(["blurry", "a cat"], PromptSyntax.COMFY)
    return run_both(reference, Borrowed(patcher, reference, cond(positive), cond(negative)), **options)


def run_both(reference, native, size=(200, 160), **options):
    """The largest difference of their latents, of the largest one."""
    image, mask = photo_and_mask(*size)
    request = InpaintRequest(
        image=image, mask=mask, prompt="a cat", negative_prompt="blurry", seed=5, **{"steps": 6, **options}
    )
    caught = []
    decode = reference.decode
    with mock.patch.object(reference, "decode", lambda latents: (caught.append(latents), decode(latents))[1]):
        inpaint(request, reference, HOST)
    inpaint(request, native, HOST)
    return float((caught[0] - native.latents).abs().max() / caught[0].abs().max())


def sdxl():
    rows = {}
    for channels in (9, 4):
        pipeline = tiny_sdxl(in_channels=channels)
        reference, patcher = sdxl_engine_model(pipeline), native_sdxl(pipeline)
        for scheduler in ("K_EULER", "DPMSolverMultistep"):
            # the tiny network's prompt is narrower than the family's, by which its timesteps are known
            with mock.patch.object(native_module, "SDXL_CONTEXT", pipeline.unet.config.cross_attention_dim):
                rows[f"sdxl {channels} {scheduler}"] = compare(reference, patcher, scheduler=scheduler)
                rows[f"sdxl {channels} {scheduler} .6"] = compare(reference, patcher, scheduler=scheduler, strength=0.6)
    return rows


def flows():
    rows = {}
    for variant in ("fill", "dev", "schnell"):
        pipeline = tiny_flux(variant)
        reference, patcher = make_model(flux, pipeline), native_flux(pipeline)
        scale = {"guidance_scale": 1.0 if variant == "schnell" else 30.0}
        for name, options in FLOW_OPTIONS.items():
            rows[f"flux {variant} {name}"] = compare(reference, patcher, **scale, **options)
    pipeline = tiny_sd3()
    torch.manual_seed(1)
    own = pipeline.transformer.config
    sizes = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 64, "caption_projection_dim": 128}
    pipeline.register_modules(transformer=type(pipeline.transformer).from_config({**own, **sizes}).eval())
    reference, patcher = make_model(sd3, pipeline), native_sd3(pipeline.transformer)
    for name, options in FLOW_OPTIONS.items():
        rows[f"sd3 {name}"] = compare(reference, patcher, guidance_scale=5.0, **options)
    return rows


FLOW_OPTIONS = {
    "euler": {"scheduler": "K_EULER"},
    "euler .6": {"scheduler": "K_EULER", "strength": 0.6},
    "dpm": {"scheduler": "DPMSolverMultistep"},
    "soft": {"scheduler": "K_EULER", "soft": True},
}


class Frames:
    """An autoencoder with an axis for frames, as Qwen-Image's: each cell the mean of its pixels, in every channel."""

    latent_channels = 16

    def spacial_compression_encode(self):
        return 8

    def encode(self, pictures):
        assert len(pictures) == 1, "a batch would be frames"
        cells = torch.nn.functional.avg_pool2d(pictures.permute(0, 3, 1, 2), 8).mean(dim=1, keepdim=True)
        return cells.repeat(1, self.latent_channels, 1, 1)[:, :, None]

    def decode(self, latents):
        self.latents = latents
        return latents[:, :3].permute(0, 2, 3, 4, 1).repeat_interleave(8, 2).repeat_interleave(8, 3).clamp(0, 1)


def qwen():
    """The engine's loop against ComfyUI's own euler sampler, which agrees for flows, on latents with a frame axis."""
    patcher, vae = native_qwen(), Frames()
    generator = torch.Generator().manual_seed(1)
    positive, negative = ([[torch.randn(1, 12, 32, generator=generator), {}]] for _ in range(2))
    model = NativeModel(patcher, vae, native_size=128, positive=positive, negative=negative)
    image, mask = photo_and_mask(128, 128)
    request = InpaintRequest(
        image=image, mask=mask, scheduler="K_EULER", steps=4, guidance_scale=3.0, seed=5, crop=Crop.OFF, count=2
    )
    pictures = inpaint(request, model, HOST).images
    sigmas = native_module.sigmas_of(make_schedule(request, model, Size(128, 128)).levels, True)
    expected = []
    for seed in (5, 6):
        noise = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(seed))[:, :, None]
        clean = vae.encode(image)
        expected.append(
            comfy.sample.sample_custom(
                patcher,
                noise,
                3.0,
                comfy.samplers.ksampler("euler"),
                sigmas,
                positive,
                negative,
                clean,
                noise_mask=to_latent_grid(mask, 8),
                disable_pbar=True,
            )
        )
    wanted = torch.cat(expected)
    outside = mask[0] == 0
    return {
        "latents": float((vae.latents - wanted).abs().max() / wanted.abs().max()),
        "outside": float((pictures - image)[:, outside].abs().max()),
        "painted": float((pictures - image)[:, ~outside].abs().mean()),
    }


def controls():
    """Differences that the gate must see."""
    pipeline = tiny_flux("fill")
    reference, patcher = make_model(flux, pipeline), native_flux(pipeline)
    rows = {}
    with mock.patch.object(native_module, "_reads_guidance", lambda model: False):
        rows["guidance as classifier-free"] = compare(reference, patcher, scheduler="K_EULER", guidance_scale=30.0)
    shifted = {**native_module.FLUX_SHIFT, "max_shift": 3.0}
    with mock.patch.object(native_module, "FLUX_SHIFT", shifted):
        rows["another shift"] = compare(reference, patcher, scheduler="K_EULER", guidance_scale=30.0)
    return rows


if __name__ == "__main__":
    with torch.no_grad():
        inside.answer({"parity": {**sdxl(), **flows()}, "controls": controls(), "qwen": qwen()})
