"""comfy-cli's view of the pack: the registry's checks, the zip it publishes, workflows run from its command line."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT
from test_workflows import FAMILIES, MODEL, PHOTO, WORKFLOWS, load, photo_with_hole
from workspace import PACK_FOLDER, Server, documented_nodes

COMFY = Path(sys.executable).with_name("comfy")


@pytest.fixture(scope="module")
def comfy(tmp_path_factory):
    """Runs comfy-cli with a home of its own; needs no ComfyUI."""
    home = tmp_path_factory.mktemp("home")
    environment = {
        **os.environ,
        "HOME": str(home),
        "USERPROFILE": str(home),
        "PATH": f"{COMFY.parent}{os.pathsep}{os.environ['PATH']}",
    }

    def run(*arguments, cwd=ROOT, check=True):
        done = subprocess.run(
            [COMFY, "--skip-prompt", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    run("tracking", "disable")
    return run


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """What git would give a user: the tracked files of the working tree, in a repository of their own."""
    folder = tmp_path_factory.mktemp("checkout") / PACK_FOLDER
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    subprocess.run(["git", "add", "-A"], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def packed(comfy, checkout):
    comfy("node", "pack", cwd=checkout)
    return checkout / "node.zip"


def test_node_validate_is_clean(comfy, checkout):
    output = comfy("node", "validate", cwd=checkout)
    assert "passed" in output
    assert "warning" not in output.lower() and "error" not in output.lower(), output


def test_the_zip_holds_what_runs_and_nothing_else(packed):
    names = set(zipfile.ZipFile(packed).namelist())
    for needed in (
        "__init__.py",
        "pyproject.toml",
        "requirements.txt",
        "LICENSE",
        "engine/models/configs/tokenizer/vocab.json",
        "workflows/inpaint.json",
        "workflows/inpaint.jpg",
    ):
        assert needed in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", ".ci/"))]


@pytest.fixture(scope="module")
def published(workspace, packed, tmp_path_factory):
    """A ComfyUI that has nothing but the unzipped node.zip."""
    base = tmp_path_factory.mktemp("published")
    with zipfile.ZipFile(packed) as archive:
        archive.extractall(base / "custom_nodes" / PACK_FOLDER)
    with Server(workspace, base, link=False) as server:
        yield server


def test_the_zip_loads_in_a_fresh_comfyui(published):
    with published.client() as client:
        mend = [name for name in client.object_info() if name.startswith("Mend")]
    assert sorted(mend) == documented_nodes()
    assert "IMPORT FAILED" not in published.log


def test_comfyui_offers_the_workflows_as_templates(published):
    with published.client() as client:
        offered = client.get("/workflow_templates")[PACK_FOLDER]
    shipped = {path.stem for path in (ROOT / "workflows").glob("*.json")}
    assert set(offered) == shipped and shipped


@pytest.mark.parametrize("name", [path.stem for path in WORKFLOWS if path not in FAMILIES])
@pytest.mark.parametrize("form", ["api", "ui"])
def test_comfy_run_produces_the_picture(comfy, published, name, form, tmp_path):
    from tiny import save_tiny_model

    model = Path(published.base) / "models" / "diffusers" / MODEL
    if not model.exists():
        save_tiny_model(model)
        with published.client() as client:
            client.upload_image(PHOTO, photo_with_hole())
    if form == "api":
        workflow = tmp_path / f"{name}.json"
        workflow.write_text(json.dumps(load(ROOT / "workflows" / "api" / f"{name}.json")))
    else:
        workflow = ROOT / "workflows" / f"{name}.json"
    output = Path(published.base) / "output"
    before = set(output.rglob("*.png"))
    comfy("run", "--workflow", str(workflow), "--host", "127.0.0.1", "--port", str(published.port), "--wait",
          "--timeout", "120")  # fmt: skip
    assert len(set(output.rglob("*.png")) - before) == 1
