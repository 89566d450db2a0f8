"""mend mask: masks from pictures, percent, three masks, a preview and numbers."""

import json

import numpy as np
import pytest
import torch
from comfyui_mend import cli
from comfyui_mend.cli import mask as command
from comfyui_mend.engine.files import read_bits, read_image, read_mask, read_parameters
from comfyui_mend.engine.mask_sources import ColorDistance, Operation
from comfyui_mend.engine.masks import FeatherSide, MaskOptions, Shape, grow, prepare_masks
from PIL import Image, ImageDraw


@pytest.fixture(autouse=True)
def desk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before, after = Image.new("RGB", (400, 200), "seagreen"), Image.new("RGB", (400, 200), "seagreen")
    ImageDraw.Draw(after).rectangle((100, 50, 199, 149), fill="gold")
    before.save("before.png")
    after.save("after.png")
    mask = np.zeros((200, 400), np.uint8)
    mask[80:120, 60:150] = 255
    Image.fromarray(mask).save("mask.png")


@pytest.fixture
def mend(capsys):
    def run(*arguments):
        code = cli.main(["mask", *map(str, arguments)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_the_choices_are_the_engines():
    for spelled, real in [
        (command.DISTANCES, ColorDistance),
        (command.OPERATIONS, Operation),
        (command.FEATHER_SIDES, FeatherSide),
        (command.SHAPES, Shape),
    ]:
        assert spelled == tuple(choice.value for choice in real)


def test_percent_and_pixels_mix_and_are_written_as_they_were_typed(mend):
    assert mend("mask.png", "--grow", "2%", "--feather", "3px", "--min-island", "1%", "-o", "x.png")[0] == 0
    expected = prepare_masks(read_mask("mask.png"), MaskOptions(grow=8, feather=3)).stitch
    assert torch.allclose(read_mask("x.png"), expected, atol=0.5 / 255)
    parameters = read_parameters("x.png")
    assert (parameters["command"], parameters["grow"], parameters["feather"]) == ("mask", "2%", "3")
    assert mend("mask.png", "--grow=-2%", "-o", "y.png")[0] == 0
    assert torch.equal(read_mask("y.png"), grow(read_mask("mask.png"), -8))


def test_a_mask_of_16_bits_stays_one_and_the_preview_does_not(mend):
    levels = np.linspace(6000, 60000, 200 * 400).reshape(200, 400).astype(np.uint16)
    Image.fromarray(levels).save("deep.png")
    assert mend("deep.png", "-o", "x.png", "--preview", "look.png")[0] == 0
    assert torch.equal(read_mask("x.png"), read_mask("deep.png"))
    assert (read_bits("x.png"), read_bits("look.png")) == (16, 8)


def test_the_three_masks_are_written(mend):
    flags = ("--grow", 5, "--feather", 4, "--user-mask", "user.png", "--sampler-mask", "sampler.png")
    code, out, _ = mend("mask.png", *flags, "--downscale", 16, "-o", "stitch.png", "--json")
    assert code == 0 and json.loads(out)["files"] == ["stitch.png", "user.png", "sampler.png"]
    expected = prepare_masks(read_mask("mask.png"), MaskOptions(grow=5, feather=4), 16)
    for name, mask in expected._asdict().items():
        assert torch.allclose(read_mask(f"{name}.png"), mask, atol=0.5 / 255)


def test_a_colour_and_a_difference_find_the_box_and_cancel_out(mend):
    assert mend("after.png", "--from", "color", "--color", "gold", "-o", "gold.png")[0] == 0
    assert read_mask("gold.png").sum() == 100 * 100
    assert mend("before.png", "--from", "difference", "--after", "after.png", "--noise", 0, "-o", "new.png")[0] == 0
    code, out, err = mend("gold.png", "--combine", "new.png", "--operation", "xor", "-o", "none.png", "--report")
    assert code == 0 and "the mask is empty" in out and "The mask is empty" in err
    assert not read_mask("none.png").any()


def test_transparency_becomes_the_mask(mend):
    Image.merge("RGBA", (*Image.open("after.png").split(), Image.open("mask.png"))).save("cut.png")
    assert mend("cut.png", "--from", "alpha", "--invert", "-o", "x.png")[0] == 0
    assert torch.equal(read_mask("x.png"), read_mask("mask.png"))


def test_the_preview_is_drawn_on_the_picture_and_the_report_printed(mend):
    flags = ("--preview", "look.png", "--image", "before.png", "--report")
    code, out, _ = mend("mask.png", *flags, "-o", "x.png")
    assert code == 0 and "400x200, 4.5% masked, box 90x40 at 60,80" in out
    look = read_image("look.png")[0]
    assert look.shape[1] == 400 and look.shape[0] > 200
    assert torch.equal(look[:70], read_image("before.png")[0, :70])
    code, out, _ = mend("mask.png", "-o", "y.png", "--json")
    assert json.loads(out)["report"]["box"] == [60, 80, 150, 120]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("after.png", "--from", "color"), 2, "needs --color"),
        (("before.png", "--from", "difference"), 2, "needs --after"),
        (("mask.png", "--image", "before.png"), 2, "add --preview FILE"),
        (("mask.png", "--color", "red"), 2, "--color is for --from color"),
        (("before.png", "--from", "alpha", "--after", "after.png"), 2, "--after is for --from difference"),
        (("mask.png", "--operation", "xor"), 2, "give it with --combine FILE"),
        (("mask.png", "--grow", "wide"), 2, "'wide' is not a length; give pixels like 128 or a share like 20%"),
        (("mask.png", "--grow", "300%"), 1, "300 % of 400x200"),
        (("after.png", "--from", "color", "--color", "glod"), 1, "'glod' is no colour"),
        (("after.png", "--from", "alpha"), 1, "no alpha channel"),
        (("mask.png", "--user-mask", "mask.png"), 1, "also an input"),
        (("mask.png", "--preview", "x.png"), 1, "named twice"),
        (("mask.png", "--downscale", "0"), 1, "downscale is 0"),
    ],
)
def test_hurried_arguments_get_a_sentence(mend, arguments, code, said):
    came, _, err = mend(*arguments, "-o", "x.png")
    assert came == code and said in err and err.count("\n") == 1
