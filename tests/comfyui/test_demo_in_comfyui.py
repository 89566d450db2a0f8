"""The demo by way of a real ComfyUI makes the pictures that the engine makes alone."""

import torch
from comfyui_mend import demo
from comfyui_mend.engine.files import read_image
from comfyui_mend.engine.host import LocalHost


def test_comfyui_and_the_engine_make_the_same_pictures(workspace, tmp_path, monkeypatch):
    monkeypatch.setenv("COMFYUI_PATH", str(workspace.path))
    host = LocalHost(device=torch.device("cpu"))
    said = []
    in_comfyui = demo.run(tmp_path / "comfyui", host, say=said.append)
    alone = demo.run(tmp_path / "engine", host, say=said.append, engine_only=True)
    assert in_comfyui["runner"] == f"ComfyUI {workspace.version}" and alone["runner"] == "the engine alone"
    assert len(alone["change_outside"]) == 5 and set(alone["change_outside"].values()) == {0}
    assert in_comfyui["change_outside"] == alone["change_outside"]
    for picture in (
        "1-remove-after.png",
        "2-extend-after.png",
        "1-remove-mask.png",
        "3-edit-after.png",
        "4-replace-after.png",
    ):
        by_comfyui, by_engine = (read_image(tmp_path / name / picture) for name in ("comfyui", "engine"))
        # SaveImage rounds down where the engine rounds to nearest
        assert (by_comfyui - by_engine).abs().max() <= 1.01 / 255, picture
    assert abs(in_comfyui["scores"]["1-remove"] - alone["scores"]["1-remove"]) < 0.01
