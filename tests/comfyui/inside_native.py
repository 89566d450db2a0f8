"""Runs under ComfyUI's own Python: the same tiny weights as diffusers modules and as ComfyUI's MODEL, CLIP and VAE.

Prints as one line of JSON how far the engine's pictures and latents are apart; test_native.py says how far they may be.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import inside
import torch
from inside import CPU, VRAM, fake_vram

inside.boot()
sys.path.insert(0, str(inside.ROOT / "tests"))

import comfy.model_management as mm  # noqa: E402
import comfy.model_sampling  # noqa: E402
from comfy.cli_args import args  # noqa: E402
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete  # noqa: E402

args.force_fp32 = args.fp32_text_enc = True

from comfyui_mend.engine.crop import CropPlan, around  # noqa: E402
from comfyui_mend.engine.host import LocalHost  # noqa: E402
from comfyui_mend.engine.inpaint import inpaint  # noqa: E402
from comfyui_mend.engine.models.protocol import Place, Posterior  # noqa: E402
from comfyui_mend.engine.schedulers import SCHEDULERS  # noqa: E402
from comfyui_mend.engine.types import (  # noqa: E402
    Box,
    Compat,
    Crop,
    InpaintRequest,
    InputError,
    MendError,
    Size,
)
from comfyui_mend.nodes import native as native_module  # noqa: E402
from comfyui_mend.nodes.conditioning import Controls, on_canvas  # noqa: E402
from comfyui_mend.nodes.native import NativeModel  # noqa: E402
from native_tiny import native_sd  # noqa: E402
from tiny import engine_model, photo_and_mask, relative, tiny_pipeline  # noqa: E402

HOST = LocalHost(CPU)
MEMORIES = {
    "full": (1000.0, "NORMAL_VRAM"),
    "40 %": (0.4, "NORMAL_VRAM"),
    "10 %": (0.1, "NORMAL_VRAM"),
    "no VRAM": (1000.0, "NO_VRAM"),
}


class Watched:
    """A model whose latents are kept, and whose VAE gives the mean only, as ComfyUI's does."""

    def __init__(self, model):
        self.model, self.latents = model, []

    def __getattr__(self, name):
        return getattr(self.model, name)

    def encode_image(self, pixels):
        mean = self.model.encode_image(pixels).mean
        return Posterior(mean, torch.zeros_like(mean))

    def decode(self, latents):
        self.latents.append(latents)
        return self.model.decode(latents)


def compare(reference, native, **options):
    """Relative difference of latents, and largest difference of pictures."""
    image, mask = photo_and_mask()
    common = {"prompt": "a cat", "negative_prompt": "blurry, (bad:1.3)", "seed": 5, "steps": 6}
    request = InpaintRequest(image=image, mask=mask, **{**common, **options})
    models = [Watched(reference), Watched(native)]
    pictures = [inpaint(request, model, HOST).images for model in models]
    latents = [torch.cat([part.flatten() for part in model.latents]) for model in models]
    return {"latents": relative(*latents), "pixels": float((pictures[0] - pictures[1]).abs().max())}


def both(pipeline) -> tuple[object, NativeModel]:
    tiny = native_sd(pipeline)
    return engine_model(pipeline), NativeModel(tiny.model, tiny.vae, tiny.clip, native_size=128)


OPTIONS = {
    "strength .6": {"strength": 0.6, "scheduler": "K_EULER"},
    "compat": {"compat": Compat.DIFFUSERS, "scheduler": "K_EULER", "negative_prompt": "blurry (bad:1.3)"},
    "compat strength .6": {"compat": Compat.DIFFUSERS, "strength": 0.6, "scheduler": "DDIM"},
    "count": {"count": 3, "scheduler": "K_EULER_ANCESTRAL"},
    "soft": {"soft": True},
    "whole": {"crop": Crop.OFF},
    "guidance 1": {"guidance_scale": 1.0},
}


def parity() -> dict:
    rows = {}
    for channels in (9, 4):
        reference, native = both(tiny_pipeline(in_channels=channels, groups=32))
        for scheduler in SCHEDULERS if channels == 9 else ("PNDM", "KDPM2", "DPM++SDE"):
            rows[f"{channels} {scheduler}"] = compare(reference, native, scheduler=scheduler, steps=4)
        for name, options in OPTIONS.items():
            rows[f"{channels} {name}"] = compare(reference, native, **options)
    models = both(tiny_pipeline(in_channels=9, groups=32, prediction_type="v_prediction"))
    rows["v"] = compare(*models)
    rows["v strength .6"] = compare(*models, strength=0.6, scheduler="PNDM")
    reference, native = models
    reference.facts = replace(
        reference.facts,
        scheduler_config={
            **reference.facts.scheduler_config,
            "rescale_betas_zero_snr": True,
            "timestep_spacing": "trailing",
            "_use_default_values": [],
        },
    )
    (rescaled,) = ModelSamplingDiscrete().patch(native.patcher, "v_prediction", True)
    native = NativeModel(rescaled, native.vae, native.clip, native_size=128)
    for scheduler in ("DDIM", "K_EULER", "DPMSolverMultistep"):
        rows[f"zero snr {scheduler}"] = compare(reference, native, scheduler=scheduler)
    return rows


def controls() -> dict:
    """Differences that the gate must see."""
    reference, native = both(tiny_pipeline(in_channels=9, groups=32))
    euler = {"scheduler": "K_EULER", "steps": 7}  # timesteps between the whole ones
    with mock.patch.object(native_module, "with_clock", lambda patcher: (patcher, None)):
        found = {"whole timesteps": compare(reference, native, **euler)}
    with mock.patch.object(NativeModel, "_with_surroundings", lambda self, cond, *_: cond):
        found["no surroundings"] = compare(reference, native, **euler)
    return {name: row["latents"] for name, row in found.items()}


def in_memory() -> dict:
    """Largest difference of the picture from plain modules' when ComfyUI has little memory for the model."""
    pipeline = tiny_pipeline(in_channels=9, groups=32)
    image, mask = photo_and_mask()
    request = InpaintRequest(image=image, mask=mask, prompt="a cat", steps=3)
    wanted = inpaint(request, engine_model(pipeline), HOST).images
    found = {}
    for memory, (share, state) in MEMORIES.items():
        tiny = native_sd(pipeline, VRAM)  # text encoder and VAE stay on the processor
        with fake_vram(share * mm.module_size(pipeline.unet), vram_state=state), torch.inference_mode():
            model = NativeModel(tiny.model, tiny.vae, tiny.clip, native_size=128)
            shares = []
            tiny.model.model.diffusion_model.register_forward_pre_hook(
                lambda *_, tiny=tiny, shares=shares: shares.append(tiny.model.loaded_size() / tiny.model.model_size())
            )
            picture = inpaint(request, model, HOST).images.to(CPU)
            found[memory] = {"difference": float((picture - wanted).abs().max()), "most loaded": max(shares)}
            mm.unload_all_models()
    tiny, other = native_sd(pipeline, VRAM), native_sd(pipeline, VRAM).model
    with fake_vram(1.2 * mm.module_size(pipeline.unet)), torch.inference_mode():
        model = NativeModel(tiny.model, tiny.vae, tiny.clip, native_size=128)
        inpaint(request, model, HOST)
        mm.load_models_gpu([other])
        left = tiny.model.loaded_size() / tiny.model.model_size()
        picture = inpaint(request, model, HOST).images.to(CPU)
        found["evicted"] = {"difference": float((picture - wanted).abs().max()), "most loaded": left}
        mm.unload_all_models()
    return found


def patches() -> dict:
    """How often each thing that other nodes put on a model was called in three steps, and whether it told."""
    _, native = both(tiny_pipeline(in_channels=9, groups=32))
    calls = {"wrapper": 0, "attention": 0, "guidance": 0}

    def wrapper(apply, arguments):
        calls["wrapper"] += 1
        return apply(arguments["input"], arguments["timestep"], **arguments["c"])

    def attention(q, k, v, options):
        calls["attention"] += 1
        return q, k * 0, v

    def guidance(arguments):
        calls["guidance"] += 1
        return arguments["denoised"]

    patched = native.patcher.clone()
    patched.set_model_unet_function_wrapper(wrapper)
    patched.set_model_attn2_patch(attention)
    patched.set_model_sampler_post_cfg_function(guidance)
    model = NativeModel(patched, native.vae, native.clip, native_size=128)
    return {**calls_after(model, calls), **compare(native, model, steps=3)}


def calls_after(model: NativeModel, calls: dict) -> dict:
    image, mask = photo_and_mask()
    inpaint(InpaintRequest(image=image, mask=mask, prompt="a cat", steps=3), model, HOST)
    return dict(calls)


def too_large_together() -> dict:
    """Three pictures where the network takes one at a time, with both branches of the guidance."""
    reference, native = both(tiny_pipeline(in_channels=9, groups=32))
    sizes = []

    def watch(_, inputs):
        sizes.append(len(inputs[0]))
        if len(inputs[0]) > 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    native.patcher.model.diffusion_model.register_forward_pre_hook(watch)
    row = compare(reference, native, count=3, scheduler="K_EULER_ANCESTRAL")
    return {**row, "sizes": sorted(set(sizes))}


# ------------------------------------------------------------------------------------- conditioning that knows places


class Hint:
    """As much of a ControlNet as is cut along with the picture."""

    def __init__(self, hint, previous=None):
        self.cond_hint_original, self.previous_controlnet, self.extra_concat_orig = hint, previous, []

    def copy(self):
        return Hint(self.cond_hint_original)

    def set_previous_controlnet(self, previous):
        self.previous_controlnet = previous


def moved_conditioning() -> dict:
    image, _ = photo_and_mask(200, 160)
    place = Place(Size(200, 160), CropPlan(Box(40, 24, 168, 152), Size(128, 128), Size(128, 128)))
    hint = torch.cat([image, image.flip(1)]).permute(0, 3, 1, 2) * 2 - 1
    options = {
        "control": Hint(hint, Hint(hint[:1, :, ::2, ::2])),
        "mask": image[..., 0],
        "area": (8, 10, 5, 7),  # cells: height, width, y, x
    }
    second = Place(place.picture, place.plan, source=1)
    controls = Controls([place, second])
    [[_, cut]] = on_canvas([[None, options]], controls)
    wanted = torch.stack([hint[0, :, 24:152, 40:168], hint[1, :, 24:152, 40:168]])
    small = cut["control"].previous_controlnet.cond_hint_original
    elsewhere = Place(Size(300, 300), around(Box(200, 200, 240, 240), Size(300, 300), 128, 8))
    refused = {}
    for name, values, places in (
        ("outside", {"area": ("percentage", 0.1, 0.1, 0.0, 0.0)}, [place]),
        ("gligen", {"gligen": ()}, [place]),
        ("different", {"area": (20, 20, 0, 0)}, [place, elsewhere]),
    ):
        try:
            on_canvas([[None, values]], Controls(places))
        except InputError as error:
            refused[name] = str(error)
    return {
        "hint": float((cut["control"].cond_hint_original - wanted).abs().max()),
        "chained": float((small[0] - wanted[0]).abs().mean()),
        "original kept": options["control"].cond_hint_original is hint,
        "mask": float((cut["mask"] - image[..., 0][:, 24:152, 40:168]).abs().max()),
        "area": [round(share * 128) for share in cut["area"][1:]],
        "refused": refused,
        "whole": on_canvas([[None, options]], Controls([]))[0][1] is options,
        "shared": on_canvas([[None, options]], controls)[0][1]["control"] is cut["control"],
    }


def refusals() -> dict:
    tiny = native_sd(tiny_pipeline(groups=32))
    found = {}

    class Unknown(comfy.model_sampling.ModelSamplingContinuousEDM, comfy.model_sampling.EDM):
        pass

    def attempt(name, sampling=None, vae=tiny.vae):
        patcher = tiny.model.clone()
        if sampling is not None:
            patcher.add_object_patch("model_sampling", sampling)
        try:
            NativeModel(patcher, vae, tiny.clip)
        except MendError as error:
            found[name] = str(error)

    attempt("edm", Unknown())
    attempt("vae", vae=SimpleNamespace(latent_channels=16))
    with mock.patch.object(tiny.model.model, "concat_keys", ("concat_image",)):
        attempt("other inputs")
    with mock.patch.object(tiny.model.model.latent_format, "latent_dimensions", 1):
        attempt("audio")
    attempt("nothing")
    return found


if __name__ == "__main__":
    with torch.no_grad():
        parts = (parity, controls, in_memory, patches, too_large_together, moved_conditioning, refusals)
        inside.answer({part.__name__: part() for part in parts})
