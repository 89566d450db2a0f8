"""SDXL's two text encoders against the real CLIPTextEncode, on the same random weights."""

import pytest
from test_prompts_match import BRACKETS
from workspace import run_inside


@pytest.fixture(scope="module")
def result(workspace):
    found = run_inside(workspace, "inside_sdxl_prompts.py")
    if tuple(map(int, workspace.version.split(".")[:2])) < (0, 28):
        found["0"] = [row for row in found["0"] if row["prompt"] != BRACKETS]
    return found


@pytest.mark.parametrize("layer", ["0", "2", "3"])
def test_every_prompt_gives_what_clip_text_encode_gives(result, layer):
    for row in result[layer]:
        assert row["our_shape"] == row["their_shape"], row
        assert row["difference"] <= 2e-6 and row["pooled"] <= 2e-6, row


def test_long_prompts_and_syntax_were_among_them(result):
    assert {row["our_shape"][1] for row in result["0"]} >= {77, 154, 231}
    weighted = next(row for row in result["0"] if row["prompt"] == "a (cat:1.3) on a ((red)) mat")
    assert weighted["difference_of_plain"] > 0.01


def test_reading_another_layer_would_show(result):
    assert result["between_layers"] > 0.01


def test_no_prompt_is_what_conditioning_zero_out_makes(result):
    assert result["zeros"]
