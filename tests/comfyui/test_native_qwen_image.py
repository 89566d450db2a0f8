"""Qwen-Image three ways: ComfyUI's own networks against the engine's, which tests/engine holds against diffusers'
pipelines."""

import pytest
from workspace import run_inside

GATE = 1e-5
TEXT_GATE = 3e-5
"""The tiny language model's weights are large, so that each token looks at the others."""


@pytest.fixture(scope="module")
def found(workspace):
    return run_inside(workspace, "inside_qwen_image.py")


def skip_where_the_tower_loses_order(workspace):
    if tuple(map(int, workspace.version.split(".")[:2])) < (0, 28):
        pytest.skip("early releases leave the tokens of a picture in the order of the vision tower's windows")


def test_the_networks_agree(found):
    """Guided ones where the MODEL has Qwen-Image's rule of guidance, which keeps the length of each token."""
    assert len(found["parity"]) == 13
    assert {name: difference for name, difference in found["parity"].items() if difference > GATE} == {}
    assert min(found["controls"].values()) > 0.1


def test_prompts_are_read_as_comfyuis_encoder_reads_them(found):
    assert len(found["prompts"]) == 6
    assert {name: difference for name, difference in found["prompts"].items() if difference > TEXT_GATE} == {}


def test_a_picture_has_the_places_that_comfyui_gives_it(found, workspace):
    """Those of the pipelines of diffusers with transformers 5 are others."""
    skip_where_the_tower_loses_order(workspace)
    assert max(found["pictures"].values()) <= TEXT_GATE
    assert found["counted through"] > 0.1


def test_the_heads_that_are_dropped_are_the_published_ones(found):
    assert found["heads"] == [34, 64]


def test_the_autoencoder_agrees(found):
    assert max(found["autoencoder"].values()) <= GATE


@pytest.mark.parametrize("shown", ["qwen-image-edit", "qwen-image-edit-2509"])
def test_edit_model_paints_as_the_engines_editing_models(found, workspace, shown):
    """All of it: text encoder, autoencoder, network and both ways of looking."""
    skip_where_the_tower_loses_order(workspace)
    row = found["edited"][shown]
    assert row["engine"] <= TEXT_GATE
    assert row["outside"] == 0
    assert row["latents"] > 0.1  # what the text encoder sees counts
    assert found["edited"]["latents alone"] > 0.1  # and what the network is shown


def test_a_text_encoder_without_eyes_is_told(found):
    assert "cannot see: load Qwen2.5-VL with Load CLIP of type qwen_image" in found["edited"]["refused"]
