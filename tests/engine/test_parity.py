"""``compat="diffusers"`` against diffusers' own pipeline on the same random weights, and what must not pass for it.

Random networks give latents of any size, so differences are relative to the largest latent. The gates are far above
the arithmetic's noise floor (about 1e-6) and far below what any change of method does (1e-3 and more).
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from comfyui_mend.engine import compat, inpaint, sampling, schedulers
from comfyui_mend.engine.host import LocalHost
from comfyui_mend.engine.models.protocol import Canvas, Posterior
from comfyui_mend.engine.types import Compat, InpaintRequest
from PIL import Image
from tiny import as_pil, engine_model, photo_and_mask, relative, tiny_pipeline

HOSTED = {
    "DDIM": "DDIMScheduler",
    "K_EULER": "EulerDiscreteScheduler",
    "DPMSolverMultistep": "DPMSolverMultistepScheduler",
    "K_EULER_ANCESTRAL": "EulerAncestralDiscreteScheduler",
    "PNDM": "PNDMScheduler",
    "KLMS": "LMSDiscreteScheduler",
}
STEPS, SCALE, SEED, SIDE = 25, 7.5, 7, 128
LATENT_GATE, IMAGE_GATE = 1e-5, 5e-5


@pytest.fixture(scope="module", params=[9, 4], ids=["9-channel", "4-channel"])
def pipeline(request):
    return tiny_pipeline(in_channels=request.param)


@pytest.fixture(scope="module")
def nine():
    return tiny_pipeline(in_channels=9)


@pytest.fixture(scope="module")
def four():
    return tiny_pipeline(in_channels=4)


def reference(pipeline, scheduler, strength=1.0, count=1, guidance_scale=SCALE):
    """(latents, images) of StableDiffusionInpaintPipeline."""
    import diffusers

    pipeline.scheduler = getattr(diffusers, HOSTED[scheduler]).from_config(pipeline.scheduler.config)
    image, mask = as_pil(*photo_and_mask())
    latents = pipeline(
        prompt="a cat",
        image=image,
        mask_image=mask,
        height=SIDE,
        width=SIDE,
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        strength=strength,
        num_images_per_prompt=count,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
    ).images
    with torch.no_grad():
        decoded = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample
    return latents, (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def ours(pipeline, scheduler, strength=1.0, count=1, guidance_scale=SCALE):
    """(latents, images) of the engine; the latents are caught where they are decoded."""
    model = engine_model(pipeline)
    caught = []
    decode = model.decode
    model.decode = lambda latents: (caught.append(latents), decode(latents))[1]
    image, mask = photo_and_mask()
    result = inpaint.inpaint(
        InpaintRequest(
            image=image,
            mask=mask,
            prompt="a cat",
            scheduler=scheduler,
            steps=STEPS,
            guidance_scale=guidance_scale,
            strength=strength,
            seed=SEED,
            count=count,
            width=SIDE,
            height=SIDE,
            compat=Compat.DIFFUSERS,
        ),
        model,
        LocalHost(torch.device("cpu")),
    )
    return caught[0], result.images


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("scheduler", HOSTED)
def test_compat_reproduces_the_pipeline(pipeline, scheduler, strength):
    theirs, mine = reference(pipeline, scheduler, strength), ours(pipeline, scheduler, strength)
    assert relative(theirs[0], mine[0]) <= LATENT_GATE
    assert float((theirs[1] - mine[1]).abs().max()) <= IMAGE_GATE


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_compat_reproduces_a_batch(nine, guidance_scale):
    theirs = reference(nine, "K_EULER_ANCESTRAL", count=3, guidance_scale=guidance_scale)
    mine = ours(nine, "K_EULER_ANCESTRAL", count=3, guidance_scale=guidance_scale)
    assert mine[0].shape[0] == 3
    assert relative(theirs[0], mine[0]) <= LATENT_GATE


def test_default_size_is_the_models(nine):
    image, mask = photo_and_mask()
    request = InpaintRequest(image=image, mask=mask, steps=1, compat=Compat.DIFFUSERS)
    result = inpaint.inpaint(request, engine_model(nine), LocalHost(torch.device("cpu")))
    assert result.images.shape == (1, SIDE, SIDE, 3)


def test_v_prediction_is_reproduced():
    pipeline = tiny_pipeline(in_channels=9, prediction_type="v_prediction")
    for scheduler in ("DDIM", "DPMSolverMultistep", "K_EULER"):
        assert relative(reference(pipeline, scheduler)[0], ours(pipeline, scheduler)[0]) <= LATENT_GATE


# Negative controls: each is a plausible way to get it wrong, and the gate must see it by a wide margin.


def rejected(theirs, mine):
    return relative(theirs[0], mine[0]) > 50 * LATENT_GATE


def test_gate_rejects_another_seed(nine, monkeypatch):
    theirs = reference(nine, "K_EULER")
    monkeypatch.setitem(globals(), "SEED", SEED + 1)
    assert rejected(theirs, ours(nine, "K_EULER"))


def test_gate_rejects_the_posterior_mean(nine, monkeypatch):
    def mean(self, generator):
        torch.randn(self.mean.shape, generator=generator)
        return self.mean

    monkeypatch.setattr(Posterior, "sample", mean)
    assert rejected(reference(nine, "K_EULER"), ours(nine, "K_EULER"))


@pytest.mark.parametrize(
    "to_cells",
    [
        lambda hole, size: F.interpolate(hole, size=size, mode="bilinear").round(),
        lambda hole, size: F.adaptive_max_pool2d(hole, size),
    ],
    ids=["bilinear", "max pool"],
)
def test_gate_rejects_another_latent_mask(nine, monkeypatch, to_cells):
    theirs = reference(nine, "K_EULER")
    original = compat.prepare_canvas

    def other_mask(model, schedule, pixels, hole, count, generator):
        canvas = original(model, schedule, pixels, hole, count, generator)
        return replace(canvas, mask=to_cells(hole, canvas.mask.shape[-2:]))

    monkeypatch.setattr(compat, "prepare_canvas", other_mask)
    assert rejected(theirs, ours(nine, "K_EULER"))


def test_gate_rejects_another_order_of_draws(nine, monkeypatch):
    theirs = reference(nine, "K_EULER")

    def posterior_first(model, schedule, pixels, hole, count, generator):
        masked_image = model.encode_image(pixels * (hole < 0.5)).sample(generator)
        noise = torch.randn(count, 4, SIDE // 8, SIDE // 8, generator=generator)
        mask = F.interpolate(hole, size=(SIDE // 8, SIDE // 8))
        return Canvas(noise=noise, mask=mask, hole=hole, image=None, masked_image=masked_image)

    monkeypatch.setattr(compat, "prepare_canvas", posterior_first)
    assert rejected(theirs, ours(nine, "K_EULER"))


def test_gate_rejects_another_resampling_filter(nine, monkeypatch):
    theirs = reference(nine, "K_EULER")
    original = Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, size, resample=None, *rest: original(self, size, Image.Resampling.BICUBIC)
    )
    assert rejected(theirs, ours(nine, "K_EULER"))


def test_gate_rejects_whole_timesteps(nine, monkeypatch):
    theirs = reference(nine, "K_EULER")
    model_class = type(engine_model(nine))
    original = model_class._predict
    monkeypatch.setattr(
        model_class, "_predict", lambda self, rows, timestep, *rest: original(self, rows, timestep.round(), *rest)
    )
    assert rejected(theirs, ours(nine, "K_EULER"))


def test_gate_rejects_another_start(nine, monkeypatch):
    theirs = reference(nine, "K_EULER")
    original = schedulers.Schedule.start

    def start(self, noise, image_latents):
        largest = 14.6146  # sigma_max: the pipeline starts at it, not at sqrt(sigma_max**2 + 1)
        return original(self, noise, image_latents) * (1 + largest**2) ** 0.5 / largest

    monkeypatch.setattr(schedulers.Schedule, "start", start)
    assert rejected(theirs, ours(nine, "K_EULER"))


@pytest.mark.parametrize("scheduler", ["KLMS", "PNDM"])
def test_gate_rejects_the_corrected_warm_up(nine, monkeypatch, scheduler):
    theirs = reference(nine, scheduler, strength=0.6)

    def corrected(request, model, canvas):
        return schedulers.plan(request.scheduler, model.facts.scheduler_config, request.steps, request.strength)

    monkeypatch.setattr(compat, "make_schedule", corrected)
    assert rejected(theirs, ours(nine, scheduler, strength=0.6))


def test_gate_rejects_a_warm_up_that_is_not_masked_again(four, monkeypatch):
    theirs = reference(four, "PNDM")
    original = sampling.denoise

    def skip_first_two(model, schedule, canvas, *rest):
        renoise = schedule.renoise
        state = {}
        step = schedule.step

        def remember(output, index, latents, generators):
            state["latents"] = step(output, index, latents, generators)
            return state["latents"]

        schedule.step = remember
        schedule.renoise = lambda clean, noise, index: state["latents"] if index < 2 else renoise(clean, noise, index)
        return original(model, schedule, canvas, *rest)

    monkeypatch.setattr(compat, "denoise", skip_first_two)
    assert rejected(theirs, ours(four, "PNDM"))
