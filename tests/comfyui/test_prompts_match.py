"""Our prompt encoder against the real CLIPTextEncode, on the same random weights."""

import pytest
from workspace import run_inside

BRACKETS = "embedding:pair<lora:x> embedding:a1111[b]"
"""That an embedding's name ends at a bracket came between ComfyUI 0.16 and 0.28."""


@pytest.fixture(scope="module")
def rows(workspace):
    result = run_inside(workspace, "inside_prompts.py")
    found = {(kind, row["prompt"]): row for kind in ("sd1", "sd2") for row in result[kind]}
    if tuple(map(int, workspace.version.split(".")[:2])) < (0, 28):
        del found["sd1", BRACKETS], found["sd2", BRACKETS]
    return found


def test_every_prompt_gives_what_clip_text_encode_gives(rows):
    for key, row in rows.items():
        assert row["our_shape"] == row["their_shape"], key
        assert row["difference"] <= 1e-6, key


def test_long_prompts_were_among_them(rows):
    assert {row["our_shape"][1] for row in rows.values()} == {77, 154, 231}


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
@pytest.mark.parametrize(
    "prompt", ["a (cat:1.3) on a ((red)) mat", "a (embedding:pair:1.2) cat", "a cat! wow!!! (yes!:1.2)"]
)
def test_the_comparison_notices_syntax_that_is_ignored(rows, kind, prompt):
    assert rows[kind, prompt]["difference_of_plain"] > 0.05


def test_without_syntax_both_readings_agree(rows):
    assert rows["sd1", "a cat"]["difference_of_plain"] <= 1e-6
