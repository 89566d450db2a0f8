"""MendOutpaintPad and MendOutpaint in the running server."""

import io
import json

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from tiny import save_tiny_model
from workspace import PromptRejectedError

MODEL = "tiny-outpaint"


@pytest.fixture(scope="module")
def model(server):
    save_tiny_model(server.base / "models" / "diffusers" / MODEL)
    return MODEL


@pytest.fixture
def photo(client):
    pixels = np.random.default_rng(0).integers(0, 256, (96, 150, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return client.upload_image("outpaint.png", buffer.getvalue()), pixels


def graph(photo, node, outputs, **inputs):
    """The node, its pictures and mask as pictures, and its numbers."""
    nodes = {
        "photo": {"class_type": "LoadImage", "inputs": {"image": photo[0]}},
        "node": {"class_type": node, "inputs": {"image": ["photo", 0], **inputs}},
        "images": {"class_type": "PreviewImage", "inputs": {"images": ["node", 0]}},
        "white": {"class_type": "MaskToImage", "inputs": {"mask": ["node", 1]}},
        "mask": {"class_type": "PreviewImage", "inputs": {"images": ["white", 0]}},
    }
    for name, slot in outputs.items():
        nodes[name] = {"class_type": "PreviewAny", "inputs": {"source": ["node", slot]}}
    return nodes


def pad(photo, **inputs):
    sides = {"left": 0, "top": 0, "right": 0, "bottom": 0, "feather": 8}
    return graph(photo, "MendOutpaintPad", {"x": 2, "y": 3}, **{**sides, **inputs})


def outpaint(photo, **inputs):
    settings = json.loads((ROOT / "workflows" / "api" / "outpaint.json").read_text())["4"]["inputs"]
    names = ("prompt", "negative_prompt", "scheduler", "guidance_scale", "strength", "seed")
    kept = {name: settings[name] for name in names}
    nodes = pad(photo, **{**kept, "model": ["model", 0], "steps": 1, **inputs})
    nodes["node"]["class_type"] = "MendOutpaint"
    nodes["x"]["inputs"]["source"], nodes["y"]["inputs"]["source"] = ["node", 3], ["node", 4]
    return {**nodes, "model": {"class_type": "MendLoadModel", "inputs": {"model": MODEL}}}


def result(client, prompt):
    """The first picture and its mask as bytes, x and y, and what the node shows."""
    run = client.run(prompt)
    assert run.status == "success", run.error
    picture, mask = (
        np.asarray(Image.open(io.BytesIO(client.image(run.outputs[name]["images"][0]))).convert("RGB"))
        for name in ("images", "mask")
    )
    x, y = (int(run.outputs[name]["text"][0]) for name in ("x", "y"))
    return picture, mask[..., 0], x, y, run.outputs.get("node", {}).get("text", [])


def test_a_graph_of_before_still_pads(client, photo):
    picture, mask, x, y, shown = result(client, pad(photo, left=10, bottom=20))
    assert picture.shape == (116, 160, 3) and (x, y) == (10, 0)
    assert np.array_equal(picture[:96, 10:], photo[1])
    assert (mask[96:] == 255).all() and (mask[:, :10] == 255).all() and not mask[:80, 30:].any()
    assert not shown


@pytest.mark.parametrize(
    ("inputs", "size", "corner"),
    [
        ({"left": 20, "top": 50, "unit": "percent"}, (180, 144), (30, 48)),
        ({"target": "200x120", "anchor": "bottom-right"}, (200, 120), (50, 24)),
        ({"target": "16:9", "anchor": "left"}, (171, 96), (0, 0)),
        ({"target": "100x100", "fitting": "crop"}, (100, 100), (0, 2)),
        ({"target": "300x300", "fitting": "fit"}, (300, 300), (0, 54)),
        ({"left": -50, "right": 20, "multiple": 64}, (128, 128), (0, 16)),
    ],
    ids=str,
)
def test_room_by_percent_size_aspect_and_multiple(client, photo, inputs, size, corner):
    picture, mask, x, y, _ = result(client, pad(photo, **inputs))
    assert picture.shape == (size[1], size[0], 3) and mask.shape == size[::-1]
    assert (x, y) == corner


def test_a_feather_that_does_not_fit_is_said_on_the_node(client, photo):
    *_, shown = result(client, pad(photo, top=10, bottom=10, feather=100))
    assert shown == [
        "The feather is 100 pixels, but the picture is only 96 high and grows on both sides: 48 were used."
    ]


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"target": "wide"}, "give a size like 1024x768 or an aspect ratio like 16:9"),
        ({"anchor": "middle"}, "There is no anchor 'middle'; choose one of top-left"),
        ({"fill": "magic"}, "There is no fill 'magic'"),
        ({"unit": "inch"}, "There is no unit 'inch'; choose one of pixels, percent"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_runs(client, photo, inputs, sentence):
    with pytest.raises(PromptRejectedError) as refusal:
        client.run(pad(photo, **inputs))
    assert sentence in json.dumps(refusal.value.answer, ensure_ascii=False)


def test_a_side_and_a_target_together_are_refused_in_one_sentence(client, photo):
    run = client.run(pad(photo, left=5, target="16:9"))
    assert run.status == "error"
    assert "left is 5 pixels and the target is 16:9" in run.error["exception_message"]


def test_a_fill_without_its_network_says_what_to_connect(client, photo):
    for fill_model, sentence in [
        ({}, 'The fill method "lama" needs its network'),
        ({"fill_model": "x"}, "fill_model is 'x'"),
    ]:
        run = client.run(pad(photo, left=5, fill="lama", **fill_model))
        assert run.status == "error" and sentence in run.error["exception_message"]


def test_outpaint_walks_to_its_target_and_returns_the_original(client, photo, model):
    target = {"target": "400x120", "anchor": "left", "overlap": 16}
    picture, mask, x, y, shown = result(client, outpaint(photo, **target))
    assert picture.shape == (120, 400, 3) and (x, y) == (0, 12)
    inside = picture[12:108, :150]
    assert np.array_equal(inside[mask[12:108, :150] == 0], photo[1][mask[12:108, :150] == 0])
    assert not mask[30:90, :130].any() and (mask[:, 150:] == 255).all()
    assert not shown
    other, *_ = result(client, outpaint(photo, **target, seed=1))
    assert np.array_equal(other[mask == 0], picture[mask == 0])
    assert (other != picture)[mask == 255].mean() > 0.5


def test_outpaint_moves_one_bar_over_all_its_windows(client, photo, model):
    run = client.run(outpaint(photo, right=190, seed=3, overlap=8))
    assert run.status == "success", run.error
    values = [value for value, _ in run.progress]
    (total,) = {total for _, total in run.progress}
    assert values == sorted(values) and values[-1] == total >= 3


def test_outpaint_without_room_returns_the_picture_with_a_notice(client, photo, model):
    picture, *_, shown = result(client, outpaint(photo))
    assert np.array_equal(picture, photo[1])
    assert shown == ["No room was added, so nothing was painted."]
