"""FLUX and Stable Diffusion 3 of diffusers' modules in ComfyUI's memory management."""

import pytest
from workspace import run_inside


@pytest.fixture(scope="module")
def found(workspace):
    return run_inside(workspace, "inside_flow.py")


@pytest.mark.parametrize("name", ["fill", "schnell", "sd3"])
@pytest.mark.parametrize(("memory", "least", "most"), [("full", 1.0, 1.0), ("40 %", 0.1, 0.45), ("no VRAM", 0.0, 0.1)])
def test_pictures_are_the_same_however_little_is_loaded(found, name, memory, least, most):
    row = found["pictures"][f"{name}, {memory}"]
    assert row["difference"] <= 1e-4
    assert least <= row["most loaded"] <= most


def test_comfyui_lends_its_tokenizer_of_t5(found):
    assert found["tokenizer"] == [3, 9, 1712, 1, 0, 0]
