"""Values where links belong, as graphs written by hand have them: the host checks links only."""

import io

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def picture(client):
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(3).integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
    return client.upload_image("wrong-links.png", buffer.getvalue())


IMAGE, MASK, CROP = ["picture", 0], ["mask", 0], ["crop", 2]
CUT = {"image": IMAGE, "mask": MASK, "context_factor": 1.5, "size": "own", "megapixels": 1, "width": 64, "height": 64}
PREPARE = {"mask": MASK, "grow": 0, "feather": 0, "invert": False, "fill_holes": True, "threshold": 0.0}
DIFFERENCE = {"image": IMAGE, "changed_image": IMAGE, "source": "difference", "color": "red", "tolerance": 5.0}
PAD = {"image": IMAGE, "left": 8, "top": 0, "right": 0, "bottom": 0, "feather": 4}
MATCH = {"image": IMAGE, "reference": IMAGE, "mask": MASK, "method": "mkl", "strength": 1.0}
COMPARE = {"before": IMAGE, "after": IMAGE, "mask": MASK, "max_outside": 0.0, "on_failure": "stop"}

LATENTS = {"positive": "x", "negative": "x", "vae": "x", "image": IMAGE, "mask": MASK, "noise_mask": True}
SAMPLER = {"model": "x", "scheduler": "DDIM", "steps": 3, "strength": 1.0}


@pytest.mark.parametrize(
    ("node", "inputs", "wires"),
    [
        ("MendWrapModel", {"model": "x", "vae": "x"}, ("model",)),
        ("MendEditModel", {"model": "x", "shown": "latents"}, ("model",)),
        ("MendSampler", SAMPLER, ("model",)),
        ("MendInpaintConditioning", LATENTS, ("positive",)),
        ("MendControlHint", {"image": IMAGE, "mask": MASK}, ("image", "mask")),
        ("MendPrepareMask", PREPARE, ("mask", "image")),
        ("MendMaskFromImage", DIFFERENCE, ("image", "changed_image")),
        ("MendCombineMasks", {"a": MASK, "b": MASK, "operation": "and"}, ("a", "b")),
        ("MendCropToMask", CUT, ("image", "mask", "stitch_mask", "context_mask")),
        ("MendStitch", {"image": IMAGE, "crop": CROP}, ("image", "crop", "original", "mask")),
        ("MendSaveCrop", {"crop": CROP, "filename_prefix": "crop"}, ("crop",)),
        ("MendFill", {"image": IMAGE, "mask": MASK, "method": "edge"}, ("image", "mask", "fill_model")),
        ("MendOutpaintPad", PAD, ("image", "fill_model")),
        ("MendColorMatch", MATCH, ("image", "reference", "mask")),
        ("MendCompare", COMPARE, ("before", "after", "mask")),
    ],
)
def test_a_value_in_place_of_a_link_is_told_in_a_sentence(client, picture, node, inputs, wires):
    for name in wires:
        graph = {
            "picture": {"class_type": "LoadImage", "inputs": {"image": picture}},
            "mask": {"class_type": "SolidMask", "inputs": {"value": 1.0, "width": 64, "height": 48}},
            "crop": {"class_type": "MendCropToMask", "inputs": CUT},
            "node": {"class_type": node, "inputs": {**inputs, name: "photo.png"}},
            "output": {"class_type": "PreviewAny", "inputs": {"source": ["node", 0]}},
        }
        if node == "MendSaveCrop":
            del graph["output"]
        run = client.run(graph)
        assert run.status == "error", name
        assert "is 'photo.png'; connect" in run.error["exception_message"], (name, run.error["exception_message"])
        assert run.error["exception_type"] == "mend.InputError"


def test_colours_for_the_mask_alone_need_a_mask(client, picture):
    inputs = {name: value for name, value in MATCH.items() if name != "mask"}
    graph = {
        "picture": {"class_type": "LoadImage", "inputs": {"image": picture}},
        "match": {"class_type": "MendColorMatch", "inputs": {**inputs, "apply_to": "mask"}},
        "output": {"class_type": "PreviewImage", "inputs": {"images": ["match", 0]}},
    }
    assert "no mask is connected" in client.run(graph).error["exception_message"]
