"""Little memory: the same picture in smaller steps, one line that says so, and a sentence where nothing helps."""

import copy
import logging
import weakref
from dataclasses import dataclass

import pytest
import torch
from comfyui_mend.engine.host import LocalHost
from comfyui_mend.engine.inpaint import inpaint
from comfyui_mend.engine.memory import MIB, Form, Forms, halved, is_out_of_memory, slice_attention
from comfyui_mend.engine.models import diffusers_model
from comfyui_mend.engine.models.diffusers_model import RESERVE, latent_format
from comfyui_mend.engine.types import InpaintRequest, MendError
from tiny import engine_model, photo_and_mask, tiny_pipeline

CPU = torch.device("cpu")
SAME = 2e-4
"""Batches of another size add in another order; a picture has 256 levels."""


@dataclass(frozen=True)
class Little(LocalHost):
    """Has ``free`` bytes for activations."""

    free: int = 0

    def free_memory(self):
        return self.free

    total_memory = free_memory


def out_of_memory(*_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def limit_rows(module, most):
    """Let ``module`` fail on more rows, as a card does; returns the rows of all its runs."""
    seen = []

    def check(_, inputs):
        seen.append(len(inputs[0]))
        if seen[-1] > most:
            out_of_memory()

    module.register_forward_pre_hook(check)
    return seen


def limit_numbers(module, most):
    """Let each convolution in ``module`` fail on inputs of more numbers."""

    def check(_, inputs):
        if inputs[0].numel() > most:
            out_of_memory()

    for layer in module.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_pre_hook(check)


def model_on(free=2**40, channels=9):
    return engine_model(tiny_pipeline(in_channels=channels), Little(CPU, free=free))


def paint(model, count=1, **options):
    image, mask = photo_and_mask()
    request = InpaintRequest(image=image, mask=mask, prompt="a cat", steps=2, count=count, **options)
    return inpaint(request, model, model._host).images


@pytest.fixture(scope="module")
def four():
    """Four pictures painted at once."""
    return paint(model_on(), count=4)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)"),
        MemoryError(),
    ],
    ids=lambda error: str(error)[:12],
)
def test_devices_say_it_in_their_own_ways(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), ValueError("out of memory"), KeyboardInterrupt()]
)
def test_other_errors_are_something_else(error):
    assert not is_out_of_memory(error)


def test_forms_that_failed_are_not_tried_again():
    forms, tried = Forms(halved(7), "paint"), []

    def attempt(form):
        tried.append(form.rows)
        return form.rows if form.rows < 3 else out_of_memory()

    assert forms.run(attempt) == forms.run(attempt) == 1
    assert tried == [7, 3, 1, 1]
    assert forms.failed == 2
    assert [form.rows for form in halved(1)] == [1]


def test_what_is_not_about_memory_passes():
    with pytest.raises(RuntimeError, match="shapes"):
        Forms(halved(2), "paint").run(lambda form: (_ for _ in ()).throw(RuntimeError("shapes differ")))


def test_the_tensors_of_a_failed_attempt_are_gone_before_the_next():
    alive = []

    def attempt(form):
        assert all(reference() is None for reference in alive)
        tensor = torch.zeros(8)
        alive.append(weakref.ref(tensor))
        return out_of_memory() if form.rows > 1 else len(alive)

    assert Forms(halved(4), "paint").run(attempt) == 3


@pytest.mark.parametrize(
    ("most", "runs"),
    [(4, [8, 4, 4, 4, 4]), (2, [8, 4, *[2] * 8]), (1, [8, 4, 2, *[1] * 16])],
    ids=["two pictures", "one picture", "one prompt"],
)
def test_a_batch_that_does_not_fit_is_painted_in_smaller_ones(four, most, runs, caplog):
    model = model_on()
    seen = limit_rows(model.denoiser.module, most)
    with caplog.at_level(logging.WARNING, logger="mend"):
        pictures = paint(model, count=4)
    assert seen == runs  # both prompts of each picture, in two evaluations
    assert float((pictures - four).abs().max()) < SAME
    assert len(caplog.messages) == sum(rows > most for rows in runs)
    assert caplog.messages[0] == (
        "Not enough memory to paint 128x128, 4 pictures at a time; trying again, 2 pictures at a time."
    )


def test_what_one_run_learnt_the_next_one_does_not_know():
    """Another program may have closed meanwhile."""
    model = model_on()
    seen = limit_rows(model.denoiser.module, 2)
    paint(model, count=2)
    paint(model, count=2)
    assert seen == [4, 2, 2, 2, 2] * 2


@pytest.mark.parametrize(("samples", "rows"), [(8, [8]), (7, [6, 2]), (2, [2] * 4), (1, [1] * 8), (0, [1] * 8)])
def test_the_estimate_splits_before_anything_fails(four, samples, rows, caplog):
    per_sample = model_on()._sample_bytes(diffusers_model.Size(128, 128))
    model = model_on(free=samples * per_sample + RESERVE)
    seen = limit_rows(model.denoiser.module, 8)
    assert float((paint(model, count=4) - four).abs().max()) < SAME
    assert seen == rows * 2
    assert caplog.messages == []


def test_without_guidance_one_picture_is_one_row():
    per_sample = model_on()._sample_bytes(diffusers_model.Size(128, 128))
    model = model_on(free=2 * per_sample + RESERVE)
    seen = limit_rows(model.denoiser.module, 8)
    paint(model, count=3, guidance_scale=1.0)
    assert seen == [2, 1] * 2


def test_where_nothing_fits_a_sentence_says_what_to_lower(caplog):
    model = model_on()
    limit_rows(model.denoiser.module, 0)
    with pytest.raises(
        MendError, match=r"paint 128x128, even one picture and one prompt at a time: make the canvas"
    ) as e:
        paint(model)
    assert isinstance(e.value.__cause__, torch.OutOfMemoryError)


@pytest.mark.parametrize("channels", [9, 4])
def test_a_vae_that_runs_out_of_memory_goes_on_in_bands(channels, monkeypatch, caplog):
    """The largest input of a convolution in the whole VAE has 16 x 128 x 128 numbers."""
    whole = paint(model_on(channels=channels), strength=0.8)
    model = model_on(channels=channels)
    limit_numbers(model.vae.module, 16 * 128 * 128 - 1)
    monkeypatch.setattr(diffusers_model, "BAND_BYTES", (MIB,))
    with caplog.at_level(logging.WARNING, logger="mend"):
        banded = paint(model, strength=0.8)
    assert float((banded - whole).abs().max()) < SAME
    assert "decode 128x128, one picture at a time; trying again, in bands of 1 MiB." in caplog.text


def test_a_vae_that_would_not_fit_runs_in_bands_at_once(monkeypatch, caplog):
    whole = paint(model_on())
    model = model_on(free=RESERVE + MIB)
    limit_numbers(model.vae.module, 16 * 128 * 128 - 1)
    monkeypatch.setattr(diffusers_model, "BAND_BYTES", (2**40, 2**19, 1))
    assert float((paint(model) - whole).abs().max()) < SAME
    assert caplog.messages == []


def test_what_can_never_fit_is_not_asked_for(monkeypatch):
    """A host that makes room would drive everything else out of memory for nothing."""
    asked = []
    for total in (2**40, RESERVE + MIB):
        model = model_on(free=total)
        monkeypatch.setattr(type(model.vae), "load", lambda self, needed, beside=(): asked.append(needed) or CPU)
        model.decode(torch.zeros(1, 4, 128, 128))
    per_picture = 2178 * 1024 * 1024 * 4 * 32 // diffusers_model.VAE_CHANNELS
    assert asked[0] == per_picture + RESERVE
    assert max(asked[2:]) == 2 * diffusers_model.BAND_BYTES[0] + RESERVE


def test_a_vae_that_cannot_be_taken_apart_says_what_to_lower(monkeypatch):
    monkeypatch.setattr(diffusers_model.TiledVae, "supports", lambda vae: False)
    model = model_on()
    limit_numbers(model.vae.module, 0)
    with pytest.raises(MendError, match="encode 128x128, even one picture at a time"):
        model.encode_image(torch.zeros(2, 3, 128, 128))


def test_estimates_follow_size_and_precision():
    model = model_on()
    small, large = (model._sample_bytes(diffusers_model.Size(side, side)) for side in (512, 1024))
    assert large == 4 * small
    assert small == pytest.approx(2 * 1.5 * 65 * MIB)  # float32
    assert model._sample_bytes(diffusers_model.Size(512, 512), controls=2) == pytest.approx(2 * small)


def test_attention_is_sliced_only_where_torch_makes_whole_matrices():
    unet = tiny_pipeline().unet
    before = {type(processor) for processor in unet.attn_processors.values()}
    inputs = torch.randn(1, 9, 16, 16), torch.tensor(7), torch.randn(1, 5, 32)
    plain = unet(*inputs, return_dict=False)[0]
    slice_attention(unet, torch.device("cuda"))
    assert {type(processor) for processor in unet.attn_processors.values()} == before
    sliced = copy.deepcopy(unet)
    slice_attention(sliced, torch.device("mps"))
    assert {type(processor).__name__ for processor in sliced.attn_processors.values()} == {"SlicedAttnProcessor"}
    assert torch.allclose(sliced(*inputs, return_dict=False)[0], plain, atol=1e-5)
    slice_attention(torch.nn.Linear(1, 1), torch.device("mps"))  # networks without the switch stay as they are


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"latent_channels": 4, "scaling_factor": 0.18215}, "SD15"),
        ({"latent_channels": 4, "scaling_factor": 0.13025}, "SDXL"),
        ({"latent_channels": 16, "scaling_factor": 1.5305}, "SD3"),
        ({"latent_channels": 16, "scaling_factor": 0.3611}, "Flux"),
        ({"latent_channels": 4, "scaling_factor": 1.0405}, None),
        ({"latent_channels": 4, "scaling_factor": 0.18215, "latents_mean": [0, 0, 0, 0]}, None),
    ],
)
def test_previews_are_drawn_by_the_latents_own_format(config, name):
    assert latent_format(config) == name


def test_a_form_is_told_in_words():
    assert str(Form(3)) == "3 pictures at a time"
    assert str(Form(1, apart=True)) == "one picture and one prompt at a time"
    assert str(Form(1, band_bytes=64 * MIB)) == "in bands of 64 MiB"
