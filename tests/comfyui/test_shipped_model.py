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
from comfyui_mend.training.evaluate import judge_color, judge_shape, painted_area
from conftest import ROOT
from PIL import Image


def test_it_is_the_last_in_the_loaders_menu(client):
    options = client.object_info()["MendLoadModel"]["input"]["required"]["model"]
    names = options[0] if isinstance(options[0], list) else options[1]["options"]
    assert names[-1] == "mend-shapes"


@pytest.mark.parametrize(("color", "shape"), [("yellow", "star"), ("purple", "square")])
def test_first_steps_paints_what_it_says_and_what_the_engine_paints(client, color, shape):
    workflow = json.loads((ROOT / "workflows" / "api" / "first-steps.json").read_text())
    workflow["6"]["inputs"] |= {"prompt": f"a {color} {shape}", "seed": 3}
    run = client.run(workflow)
    assert run.status == "success", run.error
    picture = np.asarray(Image.open(io.BytesIO(client.image(run.images[0])))) / np.float32(255)

    ground = np.array([int(picture[0, 0, c] * 255 + 0.5) for c in range(3)], np.float32) / 255
    image = torch.from_numpy(ground).expand(1, 128, 128, 3).contiguous()
    mask = torch.zeros(1, 128, 128)
    mask[:, 42:86, 42:86] = 1
    host = LocalHost(torch.device("cpu"))
    request = InpaintRequest(image=image, mask=mask, prompt=f"a {color} {shape}", seed=3, guidance_scale=4.0)
    ours = inpaint(request, load_model(SHIPPED / "mend-shapes", host), host).images[0].numpy()
    assert np.abs(picture - ours).max() < 1.01 / 255  # SaveImage truncates

    assert (picture[mask[0].numpy() == 0] == ground).all()
    area = painted_area(picture, image[0].numpy(), mask[0].numpy())
    assert judge_color(picture, area) == color and judge_shape(area) == shape
