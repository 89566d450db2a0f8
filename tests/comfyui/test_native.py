"""ComfyUI's own MODEL, CLIP and VAE behind the engine, against diffusers' modules with the same weights."""

import pytest
from workspace import run_inside

GATE, PIXEL_GATE, FAMILY_GATE = 2e-5, 1e-4, 1e-5
ZERO_SNR_GATE = 3e-4
"""ComfyUI keeps a little signal (5e-8) at the last timestep, where diffusers has none."""


@pytest.fixture(scope="module")
def found(workspace):
    return run_inside(workspace, "inside_native.py")


def test_every_scheduler_and_option_agrees_with_diffusers_modules(found):
    assert len(found["parity"]) > 30
    last = {name: row["latents"] for name, row in found["parity"].items() if name.startswith("zero snr")}
    assert len(last) == 3 and max(last.values()) < ZERO_SNR_GATE
    rows = {name: row for name, row in found["parity"].items() if name not in last}
    assert {name: row for name, row in rows.items() if row["latents"] > GATE or row["pixels"] > PIXEL_GATE} == {}


def test_the_gate_sees_whole_timesteps_and_missing_surroundings(found):
    assert found["controls"]["whole timesteps"] > GATE
    assert found["controls"]["no surroundings"] > 1e-2


@pytest.fixture(scope="module")
def families(workspace):
    return run_inside(workspace, "inside_native_families.py")


def test_every_family_agrees_with_diffusers_modules(families):
    assert len(families["parity"]) == 24
    assert {name: difference for name, difference in families["parity"].items() if difference > FAMILY_GATE} == {}
    assert min(families["controls"].values()) > 100 * FAMILY_GATE


def test_latents_with_a_frame_axis_are_painted_as_comfyui_would(families):
    """Qwen-Image: for a flow ComfyUI's own euler with a noise mask is the same arithmetic."""
    row = families["qwen"]
    assert row["latents"] <= FAMILY_GATE and row["outside"] == 0 and row["painted"] > 0.05


def test_the_picture_is_the_same_however_little_is_loaded(found):
    for row in found["in_memory"].values():
        assert row["difference"] < PIXEL_GATE
    assert found["in_memory"]["full"]["most loaded"] == 1
    assert found["in_memory"]["40 %"]["most loaded"] < 0.5
    assert found["in_memory"]["evicted"]["most loaded"] < 0.5  # by another model, before it painted again


def test_what_other_nodes_put_on_a_model_acts(found):
    row = found["patches"]
    assert row["wrapper"] == row["guidance"] == 3 and row["attention"] >= 3
    assert row["latents"] > 1e-3  # the attention patch was heard


def test_pictures_that_do_not_fit_together_are_painted_apart(found):
    row = found["too_large_together"]
    assert max(row["sizes"]) == 6 and min(row["sizes"]) == 2
    assert row["latents"] <= GATE and row["pixels"] <= PIXEL_GATE


def test_conditioning_follows_the_crop(found):
    moved = found["moved_conditioning"]
    assert moved["hint"] == 0 and moved["mask"] == 0 and moved["original kept"] and moved["whole"]
    assert moved["shared"]  # by both branches of the guidance, which then run together
    assert moved["chained"] < 0.1  # enlarged from half the size
    # 64 x 80 pixels at x 56, y 40 of the picture, whose crop begins at x 40, y 24
    assert moved["area"] == [64, 80, 16, 16]


@pytest.mark.parametrize(
    ("case", "words"),
    [("outside", "add conditioning for the whole"), ("gligen", "set crop to off"), ("different", "one by one")],
)
def test_conditioning_that_cannot_follow_is_refused(found, case, words):
    assert words in found["moved_conditioning"]["refused"][case]


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("edm", "samples by ModelSamplingContinuousEDM"),
        ("vae", "connect the VAE that belongs to the model"),
        ("other inputs", "reads concat_image"),
        ("audio", "does not make pictures"),
    ],
)
def test_other_kinds_of_models_are_named(found, case, words):
    assert words in found["refusals"][case] and "nothing" not in found["refusals"]
