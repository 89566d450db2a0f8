"""The model that comes with the pack, in ComfyUI: found without any folder, painting what the engine paints."""

import io
import json

import numpy as np
import pytest
import torch
from comfyui_mend.engine.host import LocalHost
from comfyui_mend.engine.inpaint import inpaint
from comfyui_mend.engine.models.detect import SHIPPED
from comfyui_mend.engine.models.load import load_model
from comfyui_mend.engine.types import InpaintRequest
from comfyui_mend.training.evaluate import find_shape, load_pipeline
from comfyui_mend.training.pipeline import use_scheduler
from conftest import ROOT
from PIL import Image


def test_it_is_the_last_in_the_loaders_menu(client):
    options = client.object_info()["MendLoadModel"]["input"]["required"]["model"]
    names = options[0] if isinstance(options[0], list) else options[1]["options"]
    assert names[-1] == "mend-shapes"


def first_steps(client, side, box, **changes):
    """The template on a picture of another size: (what it saved in 0..1, its ground, its mask)."""
    workflow = json.loads((ROOT / "workflows" / "api" / "first-steps.json").read_text())
    for key in ("1", "2"):
        workflow[key]["inputs"] |= {"width": side, "height": side}
    left, extent = box
    workflow["3"]["inputs"] |= {"width": extent, "height": extent}
    workflow["4"]["inputs"] |= {"x": left, "y": left}
    workflow["6"]["inputs"] |= changes
    run = client.run(workflow)
    assert run.status == "success", run.error
    picture = np.asarray(Image.open(io.BytesIO(client.image(run.images[0])))) / np.float32(255)
    color = workflow["1"]["inputs"]["color"]
    ground = torch.tensor([color >> 16, color >> 8 & 255, color & 255]) / 255
    mask = torch.zeros(1, side, side)
    mask[:, left : left + extent, left : left + extent] = 1
    return picture, ground.expand(1, side, side, 3).contiguous(), mask


@pytest.mark.parametrize(("color", "shape"), [("yellow", "star"), ("purple", "square")])
def test_first_steps_paints_what_it_says_and_what_the_engine_paints(client, color, shape):
    picture, image, mask = first_steps(client, 128, (42, 44), prompt=f"a {color} {shape}", seed=3)
    host = LocalHost(torch.device("cpu"))
    request = InpaintRequest(image=image, mask=mask, prompt=f"a {color} {shape}", seed=3, guidance_scale=4.0)
    ours = inpaint(request, load_model(SHIPPED / "mend-shapes", host), host).images[0].numpy()
    assert np.abs(picture - ours).max() < 1.01 / 255  # SaveImage truncates
    kept = mask[0].numpy() == 0
    assert np.array_equal(picture[kept], image[0].numpy()[kept])
    found = find_shape(picture, image[0].numpy(), mask[0].numpy())
    assert (found.color, found.shape) == (color, shape)


def test_the_same_seed_gives_the_picture_of_plain_diffusers(client):
    settings = {"prompt": "a red heart", "seed": 9, "compat": "diffusers", "scheduler": "DDIM", "steps": 10}
    picture, image, mask = first_steps(client, 64, (14, 36), **settings)
    pipeline = load_pipeline(SHIPPED / "mend-shapes")
    use_scheduler(pipeline, "DDIMScheduler")
    theirs = pipeline(
        prompt="a red heart",
        image=image.permute(0, 3, 1, 2),
        mask_image=mask[:, None],
        num_inference_steps=10,
        guidance_scale=4.0,
        generator=torch.Generator("cpu").manual_seed(9),
        height=64,
        width=64,
        output_type="np",
    ).images[0]
    assert np.abs(picture - theirs).max() < 1.01 / 255
