"""Jobs on the real server, over HTTP and websocket, with a tiny model: pictures, progress, interruption, /free."""

import io

import numpy as np
import pytest
from PIL import Image
from tiny import save_tiny_model

MODEL = "tiny-9-channel"
STEPS = 6


@pytest.fixture(scope="module")
def photo(server):
    save_tiny_model(server.base / "models" / "diffusers" / MODEL)
    pixels = np.random.default_rng(0).integers(0, 256, (96, 80, 4), dtype=np.uint8)
    pixels[..., 3] = 255
    pixels[30:60, 20:50, 3] = 0  # LoadImage's mask is where the picture is transparent
    return pixels


@pytest.fixture
def job(client, photo):
    """API prompts that inpaint the photo; other inputs of MendInpaint by name."""
    png = io.BytesIO()
    Image.fromarray(photo).save(png, "PNG")
    name = client.upload_image("photo.png", png.getvalue())
    loader = client.object_info()["MendLoadModel"]["input"]["required"]["model"]
    options = loader[0] if isinstance(loader[0], list) else loader[1]["options"]
    model = next(option for option in options if MODEL in option)

    def prompt(**inputs):
        defaults = {
            "model": ["1", 0],
            "image": ["2", 0],
            "mask": ["2", 1],
            "prompt": "a cat",
            "negative_prompt": "",
            "scheduler": "DDIM",
            "steps": STEPS,
            "guidance_scale": 2.0,
            "strength": 1.0,
            "seed": 1,
            "count": 1,
            "width": 0,
            "height": 0,
            "crop": "off",
            "compat": "off",
        }
        return {
            "1": {
                "class_type": "MendLoadModel",
                "inputs": {"model": model, "prediction_type": "auto", "precision": "auto"},
            },
            "2": {"class_type": "LoadImage", "inputs": {"image": name}},
            "3": {"class_type": "MendInpaint", "inputs": {**defaults, **inputs}},
            "4": {"class_type": "SaveImage", "inputs": {"images": ["3", 0], "filename_prefix": "mend"}},
        }

    return prompt


def picture(client, run):
    assert run.status == "success", run.error
    (reference,) = run.images
    return np.asarray(Image.open(io.BytesIO(client.image(reference))).convert("RGB"))


def test_a_job_paints_the_hole_and_nothing_else(client, job, photo):
    result = picture(client, client.run(job()))
    changed = (result != photo[..., :3]).any(axis=-1)
    hole = photo[..., 3] == 0
    assert not changed[~hole].any()
    assert changed[hole].mean() > 0.9


def test_a_job_reports_each_step_with_a_preview(client, job):
    run = client.run(job(seed=2))
    assert run.status == "success", run.error
    assert max(value for value, _ in run.progress) == run.progress[-1][1] >= STEPS
    assert len(run.previews) >= STEPS
    assert Image.open(io.BytesIO(run.previews[0])).size[0] > 0


def test_an_interrupt_stops_within_a_step_and_the_next_job_runs(client, job):
    asked = []

    def stop(event):
        if event.type == "progress" and not asked:
            asked.append(event.data["value"])
            client.interrupt()

    run = client.wait(client.queue(job(seed=3, steps=500)), on_event=stop)
    assert run.status == "interrupted"
    # what was on its way when the request arrived may still come, and one more step
    assert max(value for value, _ in run.progress) < 100
    picture(client, client.run(job(seed=3)))


def test_freeing_memory_unloads_the_models_and_the_same_job_gives_the_same_picture(server, client, job):
    before = picture(client, client.run(job(seed=4)))
    seen = len(server.log)
    client.free()
    after = picture(client, client.run(job(seed=4)))
    assert "Requested to load UNet2DConditionModel" in server.log[seen:]
    assert np.array_equal(before, after)


def test_the_log_has_no_trace_of_leaks_or_errors(server, client, job):
    seen = len(server.log)
    client.run(job(seed=5))
    assert "memory leak" not in server.log
    assert "Traceback" not in server.log[seen:]
