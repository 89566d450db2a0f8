"""mend color and mend compare as a person, or a script, uses them."""

import json

import numpy as np
import pytest
from comfyui_mend import cli
from comfyui_mend.cli import color as color_command
from comfyui_mend.engine.color import ApplyTo, ColorMatch
from comfyui_mend.engine.files import read_image
from PIL import Image
from skimage import data

PHOTO = data.coffee()[80:272, 150:406]
MASK = np.zeros((192, 256), np.uint8)
MASK[40:90, 60:150] = 255


@pytest.fixture(autouse=True)
def desk(tmp_path, monkeypatch):
    """The current folder: a photograph, its mask, an edit that was pasted back and one that was not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMFYUI_PATH", "")
    tinted = np.clip(PHOTO.astype(int) + np.array([9, 0, -9]), 0, 255).astype(np.uint8)
    Image.fromarray(PHOTO).save("photo.png")
    Image.fromarray(MASK).save("mask.png")
    Image.fromarray(tinted).save("tinted.png")
    Image.fromarray(np.where(MASK[..., None] > 0, tinted, PHOTO)).save("pasted.png")


@pytest.fixture
def mend(capsys):
    """Run one command; (exit code, stdout, stderr)."""

    def run(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_compare_passes_what_was_pasted_back_and_fails_what_was_not(mend):
    code, out, err = mend("compare", "photo.png", "pasted.png", "mask.png")
    assert (code, err) == (0, "") and out.endswith("passed\n") and "outside max 0/255, 0 px changed" in out
    code, out, err = mend("compare", "photo.png", "tinted.png", "mask.png")
    assert code == 1 and "pixels outside the mask" in out and out.endswith("FAILED\n")
    assert mend("compare", "photo.png", "tinted.png", "mask.png", "--max-outside", "0.04")[0] == 0
    assert mend("compare", "photo.png", "tinted.png", "mask.png", "--max-outside", "off")[0] == 0


def test_compare_reports_one_json_object(mend):
    code, out, _ = mend(
        "compare", "photo.png", "pasted.png", "mask.png", "--json", "--max-ring-delta-e", 0.1, "--max-seam", 50
    )
    report = json.loads(out)
    assert code == 1 and not report["passed"] and len(report["failures"]) == 1
    assert report["limits"] == {
        "outside": 0,
        "seam": 50,
        "ring": 0.1,
        "shift": None,
        "grain_low": None,
        "grain_high": None,
    }
    (figures,) = report["images"]
    assert figures["outside"]["changed"] == 0 and figures["ring"]["step"] > figures["ring"]["step_before"]
    assert figures["inside"]["max"] == pytest.approx(9 / 255)


def test_compare_writes_the_heat_map_also_when_it_fails(mend):
    code, out, _ = mend("compare", "photo.png", "tinted.png", "mask.png", "--heatmap", "map.png")
    assert code == 1 and out.endswith("map.png\n")
    assert Image.open("map.png").size[0] >= 480
    code, _, err = mend("compare", "photo.png", "pasted.png", "mask.png", "--heatmap", "map.png")
    assert code == 1 and "map.png" in err and "--force" in err
    assert mend("compare", "photo.png", "pasted.png", "mask.png", "--heatmap", "map.png", "--force")[0] == 0


def test_compare_places_an_outpainted_picture(mend):
    wide = np.pad(PHOTO, ((0, 0), (32, 0), (0, 0)))
    Image.fromarray(wide).save("wide.png")
    mask = np.zeros(wide.shape[:2], np.uint8)
    mask[:, :40] = 255
    Image.fromarray(mask).save("wide-mask.png")
    code, _, err = mend("compare", "photo.png", "wide.png", "wide-mask.png")
    assert code == 1 and "before is 256x192 and after is 288x192" in err
    assert mend("compare", "photo.png", "wide.png", "wide-mask.png", "--offset", "32,0")[0] == 0
    assert mend("compare", "photo.png", "wide.png", "wide-mask.png", "--offset", "31,0")[0] == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--max-outside", "none"), "none is neither a number nor off"),
        (("--offset", "3"), "3 is not two numbers of pixels"),
        (("--max-seem", "1"), "unrecognized arguments"),
    ],
)
def test_wrong_usage_is_told_apart_from_a_failed_check(mend, flags, message):
    code, _, err = mend("compare", "photo.png", "pasted.png", "mask.png", *flags)
    assert code == 2 and message in err


def test_compare_explains_what_cannot_be_compared(mend):
    code, _, err = mend("compare", "photo.png", "pasted.png", "photo.png")
    assert code == 1 and "not a mask" in err
    code, _, err = mend("compare", "photo.png", "nothing.png", "mask.png")
    assert code == 1 and "There is no file nothing.png" in err
    code, _, err = mend("compare", "photo.png", "pasted.png", "mask.png", "--max-outside", "-1")
    assert code == 1 and "The limit outside is -1.0; give a value from 0 to 1." in err


@pytest.mark.parametrize("method", color_command.METHODS)
def test_color_takes_the_tint_off(mend, method):
    code, out, err = mend("color", "tinted.png", "photo.png", "--mask", "mask.png", "-o", "out.png", "--method", method)
    assert (code, err) == (0, "") and out.startswith("out.png")
    matched, photo = read_image("out.png"), read_image("photo.png")
    assert (matched - photo).abs().mean() * 255 < 1.5 < (read_image("tinted.png") - photo).abs().mean() * 255


def test_color_applied_to_the_mask_leaves_the_rest(mend):
    assert mend("color", "tinted.png", "photo.png", "--mask", "mask.png", "--apply-to", "mask", "-o", "out.png")[0] == 0
    changed = (read_image("out.png") != read_image("tinted.png")).any(-1)[0].numpy()
    assert changed.any() and not changed[MASK == 0].any()
    code, _, err = mend("color", "tinted.png", "photo.png", "--apply-to", "mask", "-o", "other.png")
    assert code == 1 and "--apply-to mask needs a mask" in err


def test_the_choices_are_the_engines():
    assert set(color_command.METHODS) == {method.value for method in ColorMatch}
    assert set(color_command.AREAS) == {area.value for area in ApplyTo}
