"""MendLoadModel and MendDownloadModel in a running server; the hub is a local one."""

import io
import json
import threading

import numpy as np
import pytest
import torch
from conftest import ROOT
from fake_hub import FakeHub, published_files
from PIL import Image
from safetensors.torch import save_file
from tiny import save_tiny_model, tiny_pipeline
from tiny_single_file import original_unet, original_vae, save_configs, save_single_file
from workspace import PromptRejectedError, Server

FOLDER = "tiny-folder"
FILE = "tiny-file.safetensors"
ENCODER = "text_encoder/model.safetensors"
MIB = 2**20
PIECE = 10 * MIB
"""What huggingface_hub reads at once."""


@pytest.fixture(scope="module")
def models(server):
    """The session's models folder, with the same tiny model as a folder and as one file."""
    models = server.base / "models"
    (models / "checkpoints").mkdir(exist_ok=True)
    pipeline = tiny_pipeline(seed=5)
    pipeline.save_pretrained(models / "diffusers" / FOLDER, safe_serialization=True)
    save_single_file(models / "checkpoints" / FILE, pipeline)
    return models


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """One repository whose text encoder (50 MB) arrives in several pieces."""
    fake = FakeHub()
    fake.files = published_files(save_tiny_model(tmp_path_factory.mktemp("hub") / "tiny", width=256))
    assert len(fake.files[ENCODER]) > 4 * PIECE
    yield fake
    fake.close()


@pytest.fixture(scope="module")
def online(workspace, hub, tmp_path_factory):
    """A server that may reach the hub and has a second models folder."""
    second = tmp_path_factory.mktemp("second")
    save_tiny_model(second / "folders" / "elsewhere")
    config = second / "extra_model_paths.yaml"
    paths = {"second": {"base_path": str(second), "diffusers": "folders", "checkpoints": "files"}}
    config.write_text(json.dumps(paths))  # which is YAML too
    environment = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(second / "home"),
        "NO_PROXY": "127.0.0.1",
    }
    arguments = ("--extra-model-paths-config", str(config))
    with Server(workspace, tmp_path_factory.mktemp("online"), arguments, environment=environment) as running:
        yield running


@pytest.fixture
def online_client(online):
    with online.client() as connected:
        yield connected


def load(model):
    return {"class_type": "MendLoadModel", "inputs": {"model": model}}


def download(**inputs):
    return {"class_type": "MendDownloadModel", "inputs": {"repo": "author/tiny", "variant": "full", **inputs}}


def graph(client, source):
    """The model that ``source`` yields paints a hole in a picture."""
    photo = Image.new("RGBA", (128, 128), "seagreen")
    photo.paste((0, 0, 0, 0), (40, 40, 90, 90))
    buffer = io.BytesIO()
    photo.save(buffer, "PNG")
    settings = json.loads((ROOT / "workflows" / "api" / "inpaint.json").read_text())["4"]["inputs"]
    return {
        "photo": {"class_type": "LoadImage", "inputs": {"image": client.upload_image("hole.png", buffer.getvalue())}},
        "model": source,
        "paint": {
            "class_type": "MendInpaint",
            "inputs": {**settings, "model": ["model", 0], "image": ["photo", 0], "mask": ["photo", 1], "steps": 2},
        },
        "show": {"class_type": "PreviewImage", "inputs": {"images": ["paint", 0]}},
    }


def picture(client, source):
    run = client.run(graph(client, source))
    assert run.status == "success", run.error
    (reference,) = run.outputs["show"]["images"]
    return np.asarray(Image.open(io.BytesIO(client.image(reference))).convert("RGB"))


def offered(client):
    inputs = client.object_info()["MendLoadModel"]["input"]["required"]["model"]
    return inputs[1].get("options", inputs[0])


def refusal(client, model):
    run = client.run(graph(client, load(model)))
    assert run.status == "error"
    return run.error["exception_message"].strip()


def test_a_folder_and_a_file_give_the_same_picture(client, models):
    assert {FOLDER, FILE} <= set(offered(client))
    from_folder = picture(client, load(FOLDER))
    assert from_folder.std() > 1
    assert np.array_equal(from_folder, picture(client, load(FILE)))


def test_split_files_give_the_same_picture_too(client, models):
    """As ComfyUI keeps them: diffusion_models, text_encoders and vae."""
    pipeline = tiny_pipeline(seed=5)
    parts = {
        "diffusion_models/tiny-unet.safetensors": original_unet(pipeline.unet, ""),
        "text_encoders/tiny-clip.safetensors": pipeline.text_encoder.state_dict(),
        "vae/tiny-vae.safetensors": original_vae(pipeline.vae, ""),
    }
    for name, state in parts.items():
        (models / name).parent.mkdir(exist_ok=True)
        save_file({key: value.contiguous().clone() for key, value in state.items()}, models / name)
    save_configs(models / "diffusion_models" / "tiny-unet-config", pipeline)
    split = {"model": "tiny-unet.safetensors", "text_encoder_2": "tiny-clip.safetensors", "vae": "tiny-vae.safetensors"}
    source = {"class_type": "MendLoadModel", "inputs": split}
    assert np.array_equal(picture(client, source), picture(client, load(FOLDER)))
    assert "holds a UNet but no VAE: choose a VAE file" in refusal(client, "tiny-unet.safetensors")


def test_what_is_no_model_is_refused_by_name(client, models):
    checkpoints = models / "checkpoints"
    torch.save({"state_dict": {}}, checkpoints / "pickled.safetensors")
    whole = (checkpoints / FILE).read_bytes()
    (checkpoints / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    save_file({"lora_unet.alpha": torch.ones(1)}, checkpoints / "lora.safetensors")
    (checkpoints / "notes.safetensors").write_text("eggs, milk, bread")
    reasons = {
        "pickled": "pickle",
        "truncated": "incomplete",
        "lora": "is a LoRA",
        "notes": "is not a safetensors file",
    }
    for name, reason in reasons.items():
        message = refusal(client, f"{name}.safetensors")
        assert f"{name}.safetensors" in message and reason in message, message
        assert "\n" not in message and message.count(". ") == 0, message


def test_a_model_that_is_not_there_is_named_before_anything_runs(client, models):
    (models / "checkpoints" / "old.ckpt").write_bytes(b"PK\x03\x04")
    for name in ("old.ckpt", "../checkpoints/old.ckpt", "missing"):
        with pytest.raises(PromptRejectedError) as rejected:
            client.run(graph(client, load(name)))
        assert name in json.dumps(rejected.value.answer)


def test_extra_model_paths_are_searched(online_client):
    assert "elsewhere" in offered(online_client)
    assert picture(online_client, load("elsewhere")).std() > 1


def test_a_download_is_stopped_goes_on_and_paints(online, online_client, hub):
    diffusers = online.base / "models" / "diffusers"
    before_encoder = sum(len(hub.files[name]) for name in hub.files if name.startswith(("unet/d", "vae/d")))
    go_on = threading.Event()
    hub.holds[ENCODER] = (2 * PIECE + PIECE // 2, go_on)

    def stop(event):
        if event.type == "progress" and event.data["value"] > (before_encoder + PIECE) // MIB:
            online_client.interrupt()
            go_on.set()

    stopped = online_client.wait(online_client.queue(graph(online_client, download())), on_event=stop)
    assert stopped.status == "interrupted"
    assert not (diffusers / "tiny").exists() and "tiny" not in offered(online_client)
    (part,) = diffusers.rglob("*.part")
    arrived = part.stat().st_size
    assert 2 * PIECE <= arrived < len(hub.files[ENCODER])

    del hub.holds[ENCODER]
    hub.requests.clear()
    run = online_client.run(graph(online_client, download()))
    assert run.status == "success", run.error
    assert [asked for _, path, asked, _ in hub.served("cdn") if ENCODER in path] == [f"bytes={arrived}-"]
    assert (diffusers / "tiny" / ENCODER).read_bytes() == hub.files[ENCODER]
    total = max(maximum for _, maximum in run.progress)
    shown = [value for value, maximum in run.progress if maximum == total]
    assert shown == sorted(shown) and len(shown) > 2 and shown[-1] == total
    assert "tiny is in" in run.outputs["model"]["text"][0]
    assert len(run.outputs["show"]["images"]) == 1


def test_a_download_that_is_there_asks_nobody_and_loads_by_its_name(online_client, hub):
    downloaded = picture(online_client, download())
    hub.requests.clear()
    assert np.array_equal(downloaded, picture(online_client, load("tiny")))
    run = online_client.run({"model": download()})  # alone: another graph, and so not from the cache
    assert run.status == "success" and hub.requests == []


def test_what_the_hub_refuses_reaches_the_user_as_a_sentence(online_client):
    run = online_client.run({"model": download(repo="author/other")})
    assert run.error["exception_message"].strip().startswith("author/other is not on the hub, or is private")
    with pytest.raises(PromptRejectedError, match="is not a repository on the hub: write author/name"):
        online_client.run({"model": download(repo="other")})


def test_offline_a_download_is_refused_as_a_sentence(client):
    run = client.run({"model": download(repo="author/another")})
    assert run.error["exception_message"].strip().startswith("HF_HUB_OFFLINE is set, which forbids downloads")
