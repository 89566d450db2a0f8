"""MendPrepareMask, MendMaskFromImage and MendCombineMasks in the running server."""

import io
import json

import numpy as np
import pytest
from PIL import Image, ImageDraw
from workspace import PromptRejectedError


def upload(client, name, picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return client.upload_image(name, buffer.getvalue())


@pytest.fixture
def picture(client):
    drawn = Image.new("RGB", (203, 141), "seagreen")
    ImageDraw.Draw(drawn).rectangle((60, 40, 139, 99), fill="gold")
    return upload(client, "mask-nodes.png", drawn)


@pytest.fixture
def painted(client):
    """A box, and a stroke of 2 pixels that runs between the middles of the latent cells."""
    drawn = Image.new("L", (203, 141), 0)
    pen = ImageDraw.Draw(drawn)
    pen.rectangle((60, 40, 139, 99), fill=255)
    pen.rectangle((8, 120, 90, 121), fill=255)
    return upload(client, "mask-nodes-mask.png", drawn)


def prepare(picture, painted, **inputs):
    essential = {"grow": 0, "feather": 0, "invert": False, "fill_holes": True, "threshold": 0.0}
    graph = {
        "load": {"class_type": "LoadImage", "inputs": {"image": picture}},
        "mask": {"class_type": "LoadImageMask", "inputs": {"image": painted, "channel": "red"}},
        "prepare": {"class_type": "MendPrepareMask", "inputs": {"mask": ["mask", 0], **essential, **inputs}},
        "preview": {"class_type": "PreviewImage", "inputs": {"images": ["prepare", 3]}},
        "report": {"class_type": "PreviewAny", "inputs": {"source": ["prepare", 4]}},
    }
    for index, name in enumerate(("stitch", "sampler", "user")):
        graph[f"{name} image"] = {"class_type": "MaskToImage", "inputs": {"mask": ["prepare", index]}}
        graph[name] = {"class_type": "PreviewImage", "inputs": {"images": [f"{name} image", 0]}}
    return graph


def shown(client, run, node):
    (reference,) = run.outputs[node]["images"]
    return np.asarray(Image.open(io.BytesIO(client.image(reference))).convert("RGB"))


def test_three_masks_a_preview_and_a_report_leave_the_preparation(client, picture, painted):
    run = client.run(prepare(picture, painted, image=["load", 0], unit="percent", grow=2, feather=2))
    assert run.status == "success", run.error
    user, sampler, stitch = (shown(client, run, name)[..., 0] for name in ("user", "sampler", "stitch"))
    assert (user == np.asarray(Image.open(io.BytesIO(client.image(painted_reference(painted)))))).all()
    assert (stitch[user == 255] == 255).all() and 0 < (stitch > 0).mean() < 1
    assert set(np.unique(sampler)) == {0, 255}
    assert (sampler[:136, :200].reshape(17, 8, 25, 8).max(axis=(1, 3)) == sampler[:136:8, :200:8]).all()
    assert (sampler >= user).all() and len(np.unique(stitch)) > 4
    assert shown(client, run, "preview").shape[1] == 406
    (report,) = json.loads(run.outputs["report"]["text"][0])["masks"]
    assert report["size"] == [203, 141] and report["islands"] == 2
    assert "2 islands" in run.outputs["prepare"]["text"][0]


def painted_reference(name):
    return {"filename": name, "subfolder": "", "type": "input"}


def test_a_graph_from_before_the_options_still_runs_and_a_lost_stroke_is_told(client, picture, painted):
    run = client.run(prepare(picture, painted))
    assert run.status == "success", run.error
    (report,) = json.loads(run.outputs["report"]["text"][0])["masks"]
    assert report["lost_bilinear"] == {"islands": 1, "cells": 11}
    assert "bilinear resampling would lose 1 island (11 cells)" in run.outputs["prepare"]["text"][0]
    assert shown(client, run, "sampler")[120:128, 8:88].all()


@pytest.mark.parametrize(("operation", "pixels"), [("and", 60 * 70), ("subtract", 10 * 60), ("xor", 10 * 60 + 10 * 60)])
def test_masks_from_a_colour_and_a_difference_are_combined(client, picture, operation, pixels):
    """The gold box, and where it lies after it moved 10 pixels to the right."""
    graph = {
        "load": {"class_type": "LoadImage", "inputs": {"image": picture}},
        "moved": {"class_type": "LoadImage", "inputs": {"image": upload(client, "mask-moved.png", moved_box())}},
        "gold": source(["load", 0], source="color", color="gold"),
        "moved gold": source(["moved", 0], source="color", color="#ffd700"),
        "changed": source(["load", 0], source="difference", changed_image=["moved", 0], noise=0.0),
        "mask": {
            "class_type": "MendCombineMasks",
            "inputs": {"a": ["gold", 0], "b": ["moved gold", 0], "operation": operation},
        },
        "image": {"class_type": "MaskToImage", "inputs": {"mask": ["mask", 0]}},
        "combined": {"class_type": "PreviewImage", "inputs": {"images": ["image", 0]}},
        "changed image": {"class_type": "MaskToImage", "inputs": {"mask": ["changed", 0]}},
        "difference": {"class_type": "PreviewImage", "inputs": {"images": ["changed image", 0]}},
    }
    run = client.run(graph)
    assert run.status == "success", run.error
    combined, difference = shown(client, run, "combined")[..., 0] > 0, shown(client, run, "difference")[..., 0] > 0
    assert combined.sum() == pixels
    assert (combined == difference).all() == (operation == "xor")


def source(image, **inputs):
    return {"class_type": "MendMaskFromImage", "inputs": {"image": image, "color": "gold", "tolerance": 5.0, **inputs}}


def moved_box():
    drawn = Image.new("RGB", (203, 141), "seagreen")
    ImageDraw.Draw(drawn).rectangle((70, 40, 149, 99), fill="gold")
    return drawn


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"source": "magic"}, "There is no source 'magic'; choose one of color, alpha, difference."),
        ({"source": "difference"}, "connect changed_image"),
        ({"source": "alpha"}, "no alpha channel"),
        ({"source": "color", "color": "gren"}, "'gren' is no colour"),
    ],
)
def test_what_cannot_become_a_mask_is_told_in_a_sentence(client, picture, inputs, said):
    graph = {
        "load": {"class_type": "LoadImage", "inputs": {"image": picture}},
        "source": source(["load", 0], **inputs),
        "show": {"class_type": "MaskPreview", "inputs": {"mask": ["source", 0]}},
    }
    if inputs["source"] == "magic":
        with pytest.raises(PromptRejectedError, match="There is no source"):
            client.run(graph)
    else:
        assert said in client.run(graph).error["exception_message"]
