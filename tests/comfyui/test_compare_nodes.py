"""MendColorMatch and MendCompare in the running server, in graphs that are otherwise ComfyUI's own."""

import io
import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from tiny import save_tiny_model
from workspace import PromptRejectedError

MODEL = "tiny-compare"


def upload(client, name, picture):
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return client.upload_image(name, buffer.getvalue())


def texture():
    rng = np.random.default_rng(0)
    ramp = np.linspace(60, 180, 200)[None, :, None] + np.zeros((140, 200, 3))
    return Image.fromarray(np.uint8(ramp + rng.normal(0, 6, ramp.shape)))


@pytest.fixture
def picture(client):
    return upload(client, "compare.png", texture())


@pytest.fixture
def mask(client):
    drawn = Image.new("L", (200, 140), 0)
    ImageDraw.Draw(drawn).rectangle((60, 40, 139, 99), fill=255)
    return upload(client, "compare-mask.png", drawn)


@pytest.fixture(scope="module")
def vae(server):
    """The small autoencoder that ComfyUI's VAELoader lists, with random weights."""
    torch.manual_seed(0)
    model = AutoencoderTiny()
    folder = server.base / "models" / "vae_approx"
    folder.mkdir(exist_ok=True)
    # ComfyUI's decoder counts the clamp at its start as a layer
    for part, first in (("encoder", 0), ("decoder", 1)):
        names = {f"{int(layer) + first}.{rest}": tensor for layer, rest, tensor in _layers(model, part)}
        save_file(names, folder / f"taesd_{part}.safetensors")
    return "taesd"


def _layers(model, part):
    for name, tensor in getattr(model, part).layers.state_dict().items():
        layer, rest = name.split(".", 1)
        yield layer, rest, tensor


def graph(picture, mask, pasted, **inputs):
    """A picture that ComfyUI blurs as a whole, as a VAE does, pasted back by the mask or not, and compared."""
    return {
        "load": {"class_type": "LoadImage", "inputs": {"image": picture}},
        "mask": {"class_type": "LoadImageMask", "inputs": {"image": mask, "channel": "red"}},
        "edit": {
            "class_type": "ImageBlur",
            "inputs": {"image": ["load", 0], "blur_radius": 2, "sigma": 1.0},
        },
        "paste": {
            "class_type": "ImageCompositeMasked",
            "inputs": {
                "destination": ["load", 0],
                "source": ["edit", 0],
                "mask": ["mask", 0],
                "x": 0,
                "y": 0,
                "resize_source": False,
            },
        },
        "compare": {
            "class_type": "MendCompare",
            "inputs": {
                "before": ["load", 0],
                "after": ["paste" if pasted else "edit", 0],
                "mask": ["mask", 0],
                "max_outside": 0.0,
                "on_failure": "stop",
                **inputs,
            },
        },
    }


def shown(workflow):
    workflow["report"] = {"class_type": "PreviewAny", "inputs": {"source": ["compare", 2]}}
    workflow["passed"] = {"class_type": "PreviewAny", "inputs": {"source": ["compare", 1]}}
    workflow["images"] = {"class_type": "PreviewImage", "inputs": {"images": ["compare", 0]}}
    workflow["heatmap"] = {"class_type": "PreviewImage", "inputs": {"images": ["compare", 3]}}
    return workflow


def image_of(client, run, node):
    return np.asarray(Image.open(io.BytesIO(client.image(run.outputs[node]["images"][0]))).convert("RGB"))


def test_a_picture_that_was_not_pasted_back_stops_the_run_with_the_figures(client, picture, mask):
    run = client.run(graph(picture, mask, pasted=False))
    assert run.status == "error" and run.error["node_id"] == "compare"
    message = run.error["exception_message"]
    assert "pixels outside the mask" in message and "/255" in message
    assert "paste the result back" in message and run.error["exception_type"] == "mend.LimitExceededError"


def test_a_pasted_picture_passes_and_goes_through(client, picture, mask):
    run = client.run(shown(graph(picture, mask, pasted=True)))
    assert run.status == "success", run.error
    report = json.loads(run.outputs["report"]["text"][0])
    assert report["passed"] and run.outputs["passed"]["text"] == ["True"]
    (figures,) = report["images"]
    assert figures["outside"] == {"max": 0, "mean": 0, "changed": 0, "share": 0}
    assert figures["size"] == {"width": 200, "height": 140} and figures["coverage"] == pytest.approx(80 * 60 / 28000)
    assert figures["grain"]["ratio"] < 0.5 < figures["grain"]["before"]
    original, saved = np.asarray(texture()), image_of(client, run, "images")
    assert np.array_equal(saved[:40], original[:40]) and not np.array_equal(saved[40:100], original[40:100])
    heatmap = image_of(client, run, "heatmap").astype(int)
    assert heatmap.shape[0] > 140 and heatmap.shape[1] >= 480
    assert "outside max 0/255" in run.outputs["compare"]["text"][0]


def test_a_vae_round_trip_fails_until_it_is_pasted_back_and_mends_result_passes(server, client, picture, mask, vae):
    def through(after):
        nodes = graph(picture, mask, pasted=True, after=after)
        nodes["vae"] = {"class_type": "VAELoader", "inputs": {"vae_name": vae}}
        nodes["encode"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["load", 0], "vae": ["vae", 0]}}
        nodes["decode"] = {"class_type": "VAEDecode", "inputs": {"samples": ["encode", 0], "vae": ["vae", 0]}}
        # a latent has whole cells of 8 pixels
        nodes["edit"] = {
            "class_type": "ImageScale",
            "inputs": {
                "image": ["decode", 0],
                "upscale_method": "bicubic",
                "width": 200,
                "height": 140,
                "crop": "disabled",
            },
        }
        return client.run(nodes)

    run = through(["edit", 0])
    assert run.status == "error" and "(100.0%) changed" in run.error["exception_message"]
    assert through(["paste", 0]).status == "success"

    save_tiny_model(server.base / "models" / "diffusers" / MODEL)
    nodes = graph(picture, mask, pasted=True, after=["inpaint", 0])
    nodes["model"] = {"class_type": "MendLoadModel", "inputs": {"model": MODEL}}
    nodes["inpaint"] = {
        "class_type": "MendInpaint",
        "inputs": {
            "model": ["model", 0],
            "image": ["load", 0],
            "mask": ["mask", 0],
            "prompt": "",
            "negative_prompt": "",
            "scheduler": "DDIM",
            "steps": 2,
            "guidance_scale": 1.0,
            "strength": 1.0,
            "seed": 0,
        },
    }
    run = client.run(nodes)
    assert run.status == "success", run.error


def test_it_ends_a_graph_by_itself_and_a_warning_lets_the_run_go_on(client, picture, mask):
    run = client.run(graph(picture, mask, pasted=True, on_failure="warn", min_grain=0.9, max_ring_delta_e=50))
    assert run.status == "success", run.error
    assert "add grain" in run.outputs["compare"]["text"][0]
    stopped = client.run(graph(picture, mask, pasted=True, min_grain=0.9))
    assert "add grain" in stopped.error["exception_message"]
    unchecked = client.run(graph(picture, mask, pasted=False, max_outside=-1.0))
    assert unchecked.status == "success", unchecked.error


def test_hurried_inputs_are_explained(client, picture, mask):
    with pytest.raises(PromptRejectedError, match="choose one of stop, warn"):
        client.run(graph(picture, mask, pasted=True, on_failure="explode"))
    with pytest.raises(PromptRejectedError, match=r"max_outside is -0\.5; give a value from 0 to 1"):
        client.run(graph(picture, mask, pasted=True, max_outside=-0.5))
    larger = graph(picture, mask, pasted=True, after=["scale", 0])
    larger["scale"] = {
        "class_type": "ImageScaleBy",
        "inputs": {"image": ["load", 0], "upscale_method": "bilinear", "scale_by": 2.0},
    }
    message = client.run(larger).error["exception_message"]
    assert "before is 200x140 and after is 400x280; compare pictures of one size" in message


def matched(picture, mask, **inputs):
    """A tinted picture whose middle is red, in the colours of the picture as it was."""
    nodes = graph(picture, mask, pasted=False)
    return {
        "load": nodes["load"],
        "mask": nodes["mask"],
        "tinted": {"class_type": "LoadImage", "inputs": {"image": "compare-tinted.png"}},
        "match": {
            "class_type": "MendColorMatch",
            "inputs": {
                "image": ["tinted", 0],
                "reference": ["load", 0],
                "mask": ["mask", 0],
                "method": "mkl",
                "strength": 1.0,
                **inputs,
            },
        },
        "images": {"class_type": "PreviewImage", "inputs": {"images": ["match", 0]}},
    }


@pytest.mark.parametrize("method", ["reinhard", "mkl", "histogram"])
def test_an_edit_takes_the_originals_colours_whatever_was_painted(client, picture, mask, method):
    original = np.asarray(texture()).astype(int)
    tinted = np.clip(original + np.array([18, 0, -18]), 0, 255)
    tinted[40:100, 60:140] = [250, 20, 20]
    upload(client, "compare-tinted.png", Image.fromarray(np.uint8(tinted)))
    run = client.run(matched(picture, mask, method=method))
    assert run.status == "success", run.error
    result = image_of(client, run, "images").astype(int)
    assert abs(result[:40] - original[:40]).mean() < 2
    run = client.run(matched(picture, mask, method=method, apply_to="mask", max_shift=0.04))
    result = image_of(client, run, "images").astype(int)
    assert np.array_equal(result[:40], tinted[:40])
    assert 0 < abs(result[40:100, 60:140] - tinted[40:100, 60:140]).max() <= 11
    with pytest.raises(PromptRejectedError, match="There is no colour match 'magic'"):
        client.run(matched(picture, mask, method="magic"))


def test_every_socket_and_widget_is_explained(client):
    info = client.object_info()
    for name in ("MendColorMatch", "MendCompare"):
        node = info[name]
        assert node["category"] == "Mend" and node["description"]
        inputs = {**node["input"].get("required", {}), **node["input"].get("optional", {})}
        assert all(spec[1]["tooltip"] for spec in inputs.values())
        assert all(node["output_tooltips"])
    assert info["MendCompare"]["output_node"]
