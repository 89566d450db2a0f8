"""The shipped workflows of every model family on a real ComfyUI: as they are, and with tiny models in the loaders.

As they are: the server accepts them, and what stops them is that the files hold nothing. Painted: the loaders are
swapped for those of tiny_nodes, every other node is the real one.
"""

import io
import json
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import save_file
from scipy import ndimage
from skimage import data
from tiny import photo_and_mask
from workspace import PACK_FOLDER, Server

TINY = "mend-tiny-nodes"
LOADERS = {
    "CheckpointLoaderSimple",
    "UNETLoader",
    "CLIPLoader",
    "DualCLIPLoader",
    "VAELoader",
    "ControlNetLoader",
    "LoraLoader",
    "LoraLoaderModelOnly",
}
FOLDERS = {"checkpoints", "diffusion_models", "text_encoders", "vae", "loras", "controlnet"}
PHOTO = "example.png"
SIZE = (200, 160)
QUICK = {"steps": 2, "native_size": 128, "megapixels": 0.05, "min_size": 0}


def graph_of(name):
    return json.loads((ROOT / "workflows" / f"{name}.json").read_text())


def models_of(name):
    """What the graph says of each loader: {node: [{"name", "url", "directory"}]}."""
    return {
        node["id"]: node["properties"]["models"] for node in graph_of(name)["nodes"] if node["properties"].get("models")
    }


NAMES = sorted(path.stem for path in (ROOT / "workflows" / "api").glob("*.json") if models_of(path.stem))
EDITS = [name for name in NAMES if name.startswith("edit-model")]
PAINTERS = [name for name in NAMES if name not in EDITS]


@pytest.fixture(scope="module")
def client(workspace, tmp_path_factory):
    """A server that knows the tiny loaders, with a file of every name that a workflow asks for."""
    base = tmp_path_factory.mktemp("families")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / TINY).symlink_to(ROOT / "tests" / "comfyui" / "tiny_nodes", target_is_directory=True)
    for name in NAMES:
        for model in (model for models in models_of(name).values() for model in models):
            path = base / "models" / model["directory"] / model["name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tiny_lora() if model["directory"] == "loras" else {"nothing": torch.zeros(1)}, path)
    with Server(workspace, base, ("--whitelist-custom-nodes", PACK_FOLDER, TINY)) as server, server.client() as client:
        yield client


def tiny_lora():
    """For the tiny Stable Diffusion; the others have nothing of these names."""
    key, generator = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", torch.Generator()
    up, down = torch.randn(64, 4, generator=generator), torch.randn(4, 64, generator=generator)
    return {f"{key}.lora_up.weight": up, f"{key}.lora_down.weight": down, f"{key}.alpha": torch.tensor(4.0)}


def upload(client, pixels, mask=None):
    image = Image.fromarray(pixels)
    if mask is not None:
        image.putalpha(Image.fromarray(np.where(mask > 0, 0, 255).astype(np.uint8)))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    client.upload_image(PHOTO, buffer.getvalue())


def painted_photo(client):
    """A small photo with a hole: its pixels and the hole."""
    image, mask = photo_and_mask(*SIZE)
    pixels = (image[0] * 255).round().to(torch.uint8).numpy()
    upload(client, pixels, mask[0].numpy())
    return pixels, mask[0].numpy()


def workflow_of(client, name):
    """In API format, or a skip that names what this ComfyUI lacks."""
    workflow = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text())
    missing = {node["class_type"] for node in workflow.values()} - client.object_info().keys()
    if missing:
        pytest.skip(f"this ComfyUI has no {', '.join(sorted(missing))}")
    return workflow


def with_tiny_models(workflow, **changes):
    tiny = {}
    for key, node in workflow.items():
        kind, inputs = node["class_type"], dict(node["inputs"])
        inputs |= {name: value for name, value in (QUICK | changes).items() if name in inputs}
        if kind in ("CLIPLoader", "DualCLIPLoader"):
            inputs.setdefault("device", "default")
        tiny[key] = {"class_type": f"Tiny{kind}" if kind in LOADERS and "Lora" not in kind else kind, "inputs": inputs}
    return tiny


def node_of(workflow, kind):
    (key,) = (key for key, node in workflow.items() if node["class_type"] == kind)
    return key


def picture(client, workflow):
    run = client.run(workflow)
    assert run.status == "success", (run.error or {}).get("exception_message")
    (saved,) = (image for image in run.images if image["type"] == "output")
    return np.asarray(Image.open(io.BytesIO(client.image(saved))).convert("RGB")), run


# ------------------------------------------------------------------------------------------------------- as they are


@pytest.mark.parametrize("name", NAMES)
def test_every_loader_names_its_models_and_where_they_are(name):
    graph, models = graph_of(name), models_of(name)
    loaders = {node["id"]: node for node in graph["nodes"] if node["type"] in LOADERS}
    assert models.keys() == loaders.keys()
    for key, node in loaders.items():
        chosen = {value for value in node["widgets_values"] if str(value).endswith(".safetensors")}
        assert {model["name"] for model in models[key]} == chosen
        for model in models[key]:
            assert model.keys() == {"name", "url", "directory"} and model["directory"] in FOLDERS
            place = r"https://huggingface\.co/[\w.-]+/[\w.-]+/resolve/main/([\w.-]+/)*"
            assert re.fullmatch(place + re.escape(model["name"]), model["url"])
    (note,) = (node for node in graph["nodes"] if node["type"] == "MarkdownNote")
    assert len(note["widgets_values"][0]) > 100


@pytest.mark.parametrize("name", NAMES)
def test_only_the_weights_are_missing(client, name):
    painted_photo(client)
    run = client.run(workflow_of(client, name))
    assert run.status == "error" and run.error["node_type"] in LOADERS, run.error


# ----------------------------------------------------------------------------------------------------------- painted


@pytest.mark.parametrize("name", PAINTERS)
def test_what_is_masked_is_painted_and_nothing_else_changes(client, name):
    pixels, hole = painted_photo(client)
    workflow = with_tiny_models(workflow_of(client, name), grow=4, feather=4)
    result, run = picture(client, workflow)
    assert run.progress
    if "outpaint" in name:
        result = result[:, 256:-256]
        hole = np.zeros_like(hole)
    else:
        assert (result != pixels).any(axis=-1)[hole > 0].mean() > 0.9
    assert result.shape == pixels.shape
    # 4 pixels of growth, 4 of feathering, and 40 on the seam of new room
    beyond = ndimage.binary_dilation(hole > 0, iterations=12)
    if "outpaint" in name:
        beyond[:, :41] = beyond[:, -41:] = True
    assert np.array_equal(result[~beyond], pixels[~beyond]) and (~beyond).mean() > 0.4


def test_the_lora_that_is_switched_off_changes_the_picture_when_it_is_on(client):
    painted_photo(client)
    workflow = workflow_of(client, "native-sd15")
    off, _ = picture(client, with_tiny_models(workflow))
    graph = graph_of("native-sd15")
    (lora,) = (node for node in graph["nodes"] if node["type"] == "LoraLoader")
    file, *strengths = lora["widgets_values"][:3]
    wrapped, checkpoint = node_of(workflow, "MendWrapModel"), node_of(workflow, "CheckpointLoaderSimple")
    workflow["lora"] = {
        "class_type": "LoraLoader",
        "inputs": {
            "model": [checkpoint, 0],
            "clip": [checkpoint, 1],
            "lora_name": file,
            "strength_model": strengths[0],
            "strength_clip": strengths[1],
        },
    }
    workflow[wrapped]["inputs"] |= {"model": ["lora", 0], "clip": ["lora", 1]}
    on, _ = picture(client, with_tiny_models(workflow))
    assert lora["mode"] == 4 and (on != off).any()


@pytest.mark.parametrize(
    ("name", "kind", "change"),
    [
        ("qwen-image", "MendInpaint", {"prompt": "a lighthouse"}),
        ("qwen-image", "MendInpaint", {"guidance_scale": 1.0}),
        ("qwen-image", "ModelSamplingAuraFlow", {"shift": 1.0}),
        ("qwen-image", "CFGNorm", {"strength": 0.0}),
        ("edit-under-mask", "MendInpaint", {"prompt": "replace the cup with a vase"}),
        ("edit-under-mask", "MendInpaint", {"guidance_scale": 4.0}),
        ("edit-under-mask", "ModelSamplingAuraFlow", {"shift": 1.0}),
        ("edit-under-mask", "MendEditModel", {"shown": "latents"}),
        ("edit-under-mask", "MendEditModel", {"shown": "qwen-image-edit"}),
    ],
)
def test_every_setting_of_qwen_image_reaches_the_picture(client, name, kind, change):
    painted_photo(client)
    workflow = with_tiny_models(workflow_of(client, name))
    before, _ = picture(client, workflow)
    workflow[node_of(workflow, kind)]["inputs"] |= change
    after, _ = picture(client, workflow)
    assert (before != after).any()


def test_an_editing_model_sees_what_is_under_the_mask(client):
    """Without Edit Model nearly nothing of it is left at full strength: what the edges of the mask let through."""
    pixels, hole = painted_photo(client)
    under = ndimage.binary_erosion(hole > 0, iterations=10)
    recoloured = np.where(under[..., None], np.array([10, 200, 30], np.uint8), pixels)
    shown = with_tiny_models(workflow_of(client, "edit-under-mask"), grow=4, feather=4)
    unseen = {key: {**node, "inputs": dict(node["inputs"])} for key, node in shown.items()}
    edit = unseen.pop(node_of(unseen, "MendEditModel"))
    unseen[node_of(unseen, "MendInpaint")]["inputs"]["model"] = edit["inputs"]["model"]
    change = []
    for workflow in (shown, unseen):
        painted = []
        for photo in (pixels, recoloured):
            upload(client, photo, hole)
            painted.append(picture(client, workflow)[0].astype(int))
        change.append(np.abs(painted[1] - painted[0])[under].mean())
    assert change[0] > 1 and change[0] > 5 * change[1]


# ------------------------------------------------------------------------------------------------------- edit models


PHOTOGRAPH = data.coffee()[:384]
MOVED = (3, 2)
"""By the stand-in, in pixels of what it sees."""
WHOLE = {"megapixels": 0.25, "vae_name": "pixels"}


def photograph(client, hole=None):
    upload(client, PHOTOGRAPH, hole)


def is_painted(pixels):
    """Where the stand-in's colour is, whatever its tone was matched to."""
    red, green, blue = (pixels[..., channel].astype(int) for channel in range(3))
    return (red > green + 100) & (blue > green + 60)


def test_an_edit_returns_inside_the_painted_mask_only(client):
    hole = np.zeros(PHOTOGRAPH.shape[:2], bool)
    hole[100:240, 200:400] = True
    photograph(client, hole)
    workflow = with_tiny_models(workflow_of(client, "edit-model"), **WHOLE, grow=4, feather=4)
    result, _ = picture(client, workflow)
    beyond = ndimage.binary_dilation(hole, iterations=12)
    assert np.array_equal(result[~beyond], PHOTOGRAPH[~beyond])
    assert is_painted(result)[160:180, 280:320].all() and is_painted(result).sum() < hole.sum() / 3
    # what the model only moved and darkened is the photograph again
    same = hole & ~ndimage.binary_dilation(is_painted(result), iterations=8)
    assert off(result, same) < 4
    workflow[node_of(workflow, "MendStitch")]["inputs"] |= {"register": False}
    assert off(picture(client, workflow)[0], same) > 2 * off(result, same)


def test_without_a_mask_what_was_edited_returns_and_nothing_else(client):
    photograph(client)
    workflow = with_tiny_models(workflow_of(client, "edit-model-no-mask"), **WHOLE, grow=4, feather=4)
    stitch = node_of(workflow, "MendStitch")
    workflow["report"] = {"class_type": "PreviewAny", "inputs": {"source": [stitch, 1]}}
    result, run = picture(client, workflow)
    height, width = PHOTOGRAPH.shape[:2]
    moved = re.search(r"moved back by -([\d.]+), -([\d.]+) px", run.outputs["report"]["text"][0])
    scale = (height * width / (WHOLE["megapixels"] * 1024**2)) ** 0.5
    assert np.allclose([float(pixels) for pixels in moved.groups()], np.multiply(MOVED, scale), atol=0.1)
    part = np.zeros((height, width), bool)
    part[round(0.4 * height) : round(0.6 * height), round(0.4 * width) : round(0.6 * width)] = True
    beyond = ndimage.binary_dilation(part, iterations=24)
    assert np.array_equal(result[~beyond], PHOTOGRAPH[~beyond])
    assert is_painted(result)[ndimage.binary_erosion(part, iterations=8)].all()
    assert not is_painted(result)[~ndimage.binary_dilation(part, iterations=8)].any()
    # found without registering, the mask takes in half the picture
    workflow[node_of(workflow, "MendMaskFromImage")]["inputs"] |= {"register": False, "tolerance": 10.0}
    found, _ = picture(client, workflow)
    assert (found != PHOTOGRAPH).any(axis=-1).mean() > 3 * (result != PHOTOGRAPH).any(axis=-1).mean()


def off(result, where):
    """Levels of 255."""
    return np.abs(result.astype(int) - PHOTOGRAPH)[where].mean()
