"""mend crop and mend stitch."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_mend import cli
from comfyui_mend.cli import crop as crop_cli
from comfyui_mend.engine.crop import CanvasSize, CropOptions, Overflow
from comfyui_mend.engine.files import read_image, write_image
from comfyui_mend.engine.fill import NETWORKS, FillMethod
from comfyui_mend.engine.stitch import StitchOptions
from PIL import Image

PHOTO = np.random.default_rng(1).integers(0, 256, (120, 160, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def desk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(PHOTO).save("photo.png")
    mask = np.zeros((120, 160), np.uint8)
    mask[10:30, 10:40] = mask[90:110, 120:160] = 255
    Image.fromarray(mask).save("mask.png")
    return mask > 0


@pytest.fixture
def mend(capsys):
    """Run one command; (exit code, its JSON, stderr)."""

    def run(line):
        code = cli.main([*line.split(), "--json"])
        captured = capsys.readouterr()
        return code, json.loads(captured.out), captured.err

    return run


def picture(name):
    return np.asarray(Image.open(name))


@pytest.mark.parametrize("size", ["own", "sd15", "exact --width 256 --height 128", "megapixels --megapixels 0.1"])
def test_an_untouched_crop_comes_back_byte_for_byte(mend, size):
    code, report, _ = mend(f"crop photo.png mask.png -o crop.png --record crop.json --size {size}")
    assert code == 0 and report["files"] == ["crop.png"] and report["record"] == "crop.json"
    code, report, _ = mend("stitch crop.png crop.json --image photo.png -o back.png")
    assert code == 0 and "came back as it was cut" in report["report"][0]
    assert np.array_equal(picture("back.png"), PHOTO)


def test_painted_crops_of_several_places_come_into_one_picture(mend, desk):
    line = "crop photo.png mask.png -o crop.png --record rec --each --size own --min-size 0 --mask-out m.png"
    _, report, _ = mend(line)
    assert report["files"] == ["crop-1.png", "crop-2.png"] and report["masks"] == ["m-1.png", "m-2.png"]
    assert len(report["report"]) == 2
    for name in report["files"]:
        Image.fromarray(255 - picture(name)).save(name)
    code, _, _ = mend("stitch crop-1.png crop-2.png rec --image photo.png -o back.png --blend linear --color-match 0")
    assert code == 0
    assert np.array_equal(picture("back.png"), np.where(desk[..., None], 255 - PHOTO, PHOTO))


def test_nothing_is_overwritten_without_force(mend):
    line = "crop photo.png mask.png -o crop.png --record crop.json"
    assert mend(line)[0] == 0
    code, report, _ = mend(line)
    assert code == 1 and "crop.png exists already" in report["error"]
    code, report, _ = mend(line.replace("crop.png", "another.png"))
    assert code == 1 and "crop.json exists already" in report["error"] and not Path("another.png").exists()
    assert mend(f"{line} --force")[0] == 0
    assert mend("stitch crop.png crop.json --image photo.png -o photo.png --force")[0] == 1


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--record photo.png", "photo.png is a file, but no .json file"),
        ("--record mask.png/here", "cannot be written"),
        ("--record crop.json --mask-out crop.png", "crop.png is named twice"),
        ("--record crop.json --mask-out crop-mask.png --each", "crop-mask-1.png is named twice"),
        ("--record crop.json --stitch-mask crop-mask-1.png", "crop-mask-1.png is also an input"),
    ],
)
def test_force_replaces_no_input_and_no_other_result(mend, line, says):
    Image.open("mask.png").save("crop-mask-1.png")
    before = {path: path.read_bytes() for path in Path().iterdir()}
    code, report, _ = mend(f"crop photo.png mask.png -o crop.png --force {line}")
    assert code == 1 and says in report["error"]
    assert {path: path.read_bytes() for path in Path().iterdir()} == before


def test_the_records_masks_are_kept_without_force(mend):
    Image.open("mask.png").save("crop-mask-1.png")
    code, report, _ = mend("crop photo.png mask.png -o crop.png --record crop.json")
    assert code == 1 and "crop-mask-1.png exists already" in report["error"]
    assert not Path("crop.png").exists()


def test_16_bits_go_out_and_come_back(mend, desk):
    levels = np.random.default_rng(2).integers(0, 65536, (1, 120, 160, 3)).astype(np.float32)
    photo = torch.from_numpy(levels / np.float32(65535))
    write_image("deep.png", photo, bits=16)
    mend("crop deep.png mask.png -o crop.png --record crop.json --size own")
    mend("stitch crop.png crop.json --image deep.png -o back.png")
    assert torch.equal(read_image("back.png"), photo)
    # an edit of one level in 65536, which in 8 bits would pass for none
    crop = read_image("crop.png")
    write_image("crop.png", torch.where(crop > 0.5, crop - 1 / 65535, crop + 1 / 65535), bits=16, force=True)
    mend("stitch crop.png crop.json --image deep.png -o edited.png --color-match 0")
    changed = (read_image("edited.png") != photo).any(dim=-1)[0].numpy()
    assert np.array_equal(changed, desk)


def test_another_picture_is_noticed_and_another_size_refused(mend):
    mend("crop photo.png mask.png -o crop.png --record crop.json")
    Image.fromarray(255 - PHOTO).save("other.png")
    code, report, stderr = mend("stitch crop.png crop.json --image other.png -o back.png")
    assert code == 0 and "not what was cut" in report["notices"][0] and "not what was cut" in stderr
    Image.fromarray(PHOTO[:100]).save("smaller.png")
    code, report, _ = mend("stitch crop.png crop.json --image smaller.png -o again.png")
    assert code == 1 and "cut from a picture of 160x120, but the original is 160x100" in report["error"]


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        ("crop photo.png mask.png -o crop.png", 2, "--record"),
        ("stitch crop.png crop.json -o back.png", 2, "--image"),
        ("stitch photo.png none.json --image photo.png -o back.png", 1, "no crop record none.json"),
        ("stitch photo.png photo.png --image photo.png -o back.png", 1, "no crop record"),
        ("crop photo.png mask.png -o c.png --record c.json --size exact --width 500 --multiple 64", 1, "give 512"),
        ("crop photo.png mask.png -o c.png --record c.json --context-factor 0", 1, "context_factor is 0"),
        ("crop photo.png mask.png -o c.png --record c.json --megapixels 0 ", 1, "megapixels is 0"),
    ],
)
def test_mistakes_get_a_sentence(mend, line, code, says):
    got, report, _ = mend(line)
    assert got == code and says in report["error"]


def test_the_choices_spelled_out_are_the_engines():
    assert tuple(choice.value for choice in CanvasSize) == crop_cli.SIZES
    assert tuple(choice.value for choice in Overflow) == crop_cli.OVERFLOWS
    assert set(crop_cli.EXTENDING_FILLS) == {method.value for method in FillMethod if method not in NETWORKS}


def test_the_flags_are_the_fields_of_the_options(mend):
    names = set(vars(cli.build_parser().parse_args(WITH_ALL_FLAGS.split())))
    assert set(CropOptions.__dataclass_fields__) - {"target"} <= names
    names = set(vars(cli.build_parser().parse_args(STITCH_WITH_ALL_FLAGS.split())))
    assert set(StitchOptions.__dataclass_fields__) - {"max_shift"} <= names


WITH_ALL_FLAGS = (
    "crop a b -o c --record d --context-factor 2 --context-pixels 2 --min-size 2 --max-aspect 2 --overflow extend"
    " --fill blur --mask-outside --multiple 2 --keep-scale 0.2"
)
STITCH_WITH_ALL_FLAGS = "stitch a b --image c -o d --blend linear --color-match 1 --register --grain 1 --seed 2"
