"""Every shipped workflow, and MendInpaint's promises, on a real ComfyUI over HTTP and websocket."""

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_mend.engine.fill import NETWORKS, FillMethod
from conftest import ROOT
from PIL import Image
from tiny import photo_and_mask, save_tiny_model

WORKFLOWS = sorted((ROOT / "workflows" / "api").glob("*.json"))
FAMILIES = [path for path in WORKFLOWS if '"models": [' in (ROOT / "workflows" / path.name).read_text()]
"""Those that name models to download: test_family_workflows.py runs them."""
MODEL = "stable-diffusion-inpainting"
PHOTO = "example.png"


@pytest.fixture(scope="module")
def prepared(server):
    """The tiny model under the name the workflows ask for, and a photo whose alpha is the mask."""
    save_tiny_model(Path(server.base) / "models" / "diffusers" / MODEL)
    with server.client() as client:
        client.upload_image(PHOTO, photo_with_hole())
    return server


@pytest.fixture
def client(prepared):
    with prepared.client() as connected:
        yield connected


def photo_with_hole(width=200, height=160):
    image, mask = photo_and_mask(width, height)
    rgba = torch.cat([image, 1 - mask[..., None]], dim=-1)
    buffer = io.BytesIO()
    Image.fromarray((rgba[0] * 255).round().to(torch.uint8).numpy()).save(buffer, "PNG")
    return buffer.getvalue()


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)))


def load(path, **changes):
    """A workflow in API format, quick to run: ``changes`` go into every node that has such an input."""
    workflow = json.loads(path.read_text())
    for node in workflow.values():
        for name, value in ({"steps": 3} | changes).items():
            if not isinstance(node["inputs"].get(name, []), list):  # lists are links
                node["inputs"][name] = value
    return workflow


def inpaint_workflow(**changes):
    return load(ROOT / "workflows" / "api" / "inpaint.json", **changes)


def finished(client, workflow):
    run = client.run(workflow)
    assert run.status == "success", run.error
    return run


def test_every_node_and_input_explains_itself(client):
    mend = {name: node for name, node in client.object_info().items() if name.startswith("Mend")}
    for name, node in mend.items():
        assert node["category"] == "Mend" and node["description"] and node["search_aliases"]
        inputs = node["input"].get("required", {}) | node["input"].get("optional", {})
        assert all(options[-1].get("tooltip") for options in inputs.values()), name
        assert all(node["output_tooltips"]), name
        assert (ROOT / "web" / "docs" / f"{name}.md").is_file()


HELP_IS_ELSEWHERE = {"MendOutpaint": ("MendInpaint", "MendOutpaintPad")}
OF_LOADING = {"MendLoadModel", "MendDownloadModel"}


def test_every_option_is_on_the_help_page(client):
    for name, node in client.object_info().items():
        if name.startswith("Mend") and name not in OF_LOADING:
            pages = [ROOT / "web" / "docs" / f"{page}.md" for page in (name, *HELP_IS_ELSEWHERE.get(name, ()))]
            words = set(re.findall(r"\w+", " ".join(page.read_text() for page in pages)))
            # a socket for the graph's own values has a tooltip, an option an explanation
            options = {
                option
                for section in ("required", "optional")
                for option, (kind, settings) in node["input"].get(section, {}).items()
                if settings.get("advanced")
            }
            assert options <= words, (name, options - words)


@pytest.mark.parametrize("path", [path for path in WORKFLOWS if path not in FAMILIES], ids=lambda path: path.stem)
def test_every_workflow_yields_its_picture(client, path):
    run = finished(client, load(path))
    saved = [image for image in run.images if image["type"] == "output"]
    assert len(saved) == 1
    picture = pixels(client.image(saved[0]))
    assert picture.ndim == 3 and picture.std() > 1


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_two_forms_of_a_workflow_say_the_same(client, path):
    graph = json.loads((ROOT / "workflows" / path.name).read_text())
    assert Image.open((ROOT / "workflows" / path.name).with_suffix(".jpg")).format == "JPEG"
    info = client.object_info()
    sources = links_of(graph)
    drawn = {str(node["id"]): node for node in graph["nodes"] if node["type"] != "MarkdownNote" and node["mode"] == 0}
    workflow = json.loads(path.read_text())
    assert drawn.keys() == workflow.keys()
    for key, node in workflow.items():
        assert drawn[key]["type"] == node["class_type"]
        links = {i["name"]: sources[i["link"]] for i in drawn[key]["inputs"] if i["link"] is not None}
        values = widget_values(drawn[key], info[node["class_type"]])
        assert links == {name: value for name, value in node["inputs"].items() if isinstance(value, list)}
        for name, value in node["inputs"].items():
            if name not in values and name in NEWER.get(node["class_type"], ()):
                continue
            assert isinstance(value, list) or values[name] == value, (key, name)


NEWER = {"CFGNorm": {"pre_cfg"}}
"""Inputs that the oldest ComfyUI does not have, and leaves unread."""
BYPASSED = 4


def links_of(graph):
    """[node, output] by link; a bypassed node hands on what it gets of the same type."""
    sources = {link[0]: [str(link[1]), link[2]] for link in graph["links"]}
    for node in (node for node in graph["nodes"] if node["mode"] == BYPASSED):
        given = [i for i in node["inputs"] if i["link"] is not None]
        for output in node["outputs"]:
            (came,) = (i["link"] for i in given if i["type"] == output["type"])
            sources |= dict.fromkeys(output["links"], sources[came])
    return sources


def widget_values(node, info):
    """Values by widget name; the frontend saves them as a list, with its own widgets after some."""
    values = iter(node.get("widgets_values", []))
    named = {}
    for section in ("required", "optional"):
        for name, (kind, *options) in info["input"].get(section, {}).items():
            if isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"):
                named[name] = next(values, None)
                if options and options[0].get("control_after_generate"):
                    next(values)
    return named


def test_the_node_gives_what_the_engine_gives(client, prepared):
    """Same model, photo, mask and seed through the server and through the engine in this process."""
    from comfyui_mend.engine.host import LocalHost
    from comfyui_mend.engine.inpaint import inpaint
    from comfyui_mend.engine.models.load import load_model
    from comfyui_mend.engine.types import InpaintRequest

    host = LocalHost(torch.device("cpu"))
    model = load_model(Path(prepared.base) / "models" / "diffusers" / MODEL, host)
    workflow = inpaint_workflow(grow=0, feather=0, fill_holes=False, prompt="a cat", negative_prompt="", seed=11)
    result = pixels(client.image(finished(client, workflow).images[0])).astype(int)
    image, mask = photo_and_mask()
    request = InpaintRequest(image=image, mask=mask, prompt="a cat", seed=11, steps=3)
    ours = inpaint(request, model, host).images[0]
    expected = (ours * 255).clamp(0, 255).to(torch.uint8).numpy().astype(int)  # SaveImage truncates
    assert abs(result - expected).max() <= 1


def test_count_and_seed_travel(client):
    workflow = inpaint_workflow(count=2, seed=2**64 - 1)
    workflow["9"] = {"class_type": "PreviewAny", "inputs": {"source": ["4", 2]}}
    run = finished(client, workflow)
    assert len([i for i in run.images if i["type"] == "output"]) == 2
    assert run.outputs["9"]["text"] == [str(2**64 - 1)]


@pytest.mark.parametrize("compat", ["off", "diffusers"])
@pytest.mark.parametrize("crop", ["auto", "off"])
def test_every_mode_runs(client, crop, compat):
    run = finished(client, inpaint_workflow(crop=crop, compat=compat, steps=2))
    size = Image.open(io.BytesIO(client.image(run.images[0]))).size
    assert size == ((128, 128) if compat == "diffusers" else (200, 160))


def test_an_unpainted_mask_is_refused_in_one_sentence(client):
    buffer = io.BytesIO()
    Image.new("RGB", (200, 160), "red").save(buffer, "PNG")
    name = client.upload_image("unpainted.png", buffer.getvalue())
    workflow = inpaint_workflow(image=name, fill_holes=False, grow=0, feather=0)
    run = client.run(workflow)
    assert run.status == "error"
    assert "No mask is painted" in run.error["exception_message"]
    assert run.error["exception_type"] == "mend.InputError"


def test_a_model_name_in_place_of_a_loaded_model_is_explained(client):
    workflow = inpaint_workflow()
    workflow["4"]["inputs"]["model"] = MODEL
    run = client.run(workflow)
    assert "connect Load Model (Mend)" in run.error["exception_message"]


def test_an_api_graph_may_leave_out_what_has_a_default(client):
    workflow = inpaint_workflow()
    for name in ("count", "width", "height", "crop", "compat", "sigmas"):
        workflow["4"]["inputs"].pop(name, None)
    finished(client, workflow)


@pytest.mark.parametrize("method", [method.value for method in FillMethod if method not in NETWORKS])
def test_every_fill_method_fills_the_hole_and_nothing_else(client, method):
    """ComfyUI does not bring OpenCV, which Telea and Navier-Stokes use where it is installed."""
    workflow = {
        "1": {"class_type": "LoadImage", "inputs": {"image": PHOTO}},
        "2": {"class_type": "MendFill", "inputs": {"image": ["1", 0], "mask": ["1", 1], "method": method}},
        "3": {"class_type": "SaveImage", "inputs": {"images": ["2", 0], "filename_prefix": "filled"}},
    }
    result = pixels(client.image(finished(client, workflow).images[0]))
    original = pixels(photo_with_hole())
    changed = (result[..., :3] != original[..., :3]).any(axis=-1)
    hole = original[..., 3] == 0
    assert not changed[~hole].any()
    assert changed[hole].mean() > 0.9


def test_bad_constants_are_refused_before_anything_runs(client):
    from workspace import PromptRejectedError

    for changes, words in (
        ({"width": 7}, "give 16 to 16384"),
        ({"width": 100, "compat": "diffusers"}, "multiple of 8"),
        ({"scheduler": "euler"}, "euler"),
        ({"steps": 0}, "steps"),
        ({"model": "no-such-model"}, "no-such-model"),
    ):
        with pytest.raises(PromptRejectedError) as refusal:
            client.queue(inpaint_workflow(**changes))
        assert words in json.dumps(refusal.value.answer)
