"""FLUX, Stable Diffusion 3 and Qwen-Image of diffusers' modules: in ComfyUI's memory management, and on the server."""

import io
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from comfyui_mend.comfy_workspace import find_workspace
from comfyui_mend.engine.host import LocalHost
from comfyui_mend.engine.inpaint import inpaint
from comfyui_mend.engine.models.families import FAMILIES
from comfyui_mend.engine.models.load import load_model
from comfyui_mend.engine.models.lora import Lora
from comfyui_mend.engine.types import Crop, InpaintRequest
from PIL import Image
from safetensors.torch import save_file
from test_adapter_nodes import picture
from tiny import photo_and_mask
from tiny_qwen import tiny_qwen_image, tiny_qwen_image_edit
from tiny_qwen_files import save_folder, save_split, with_published_vocabulary
from workspace import run_inside

NAMES = ("fill", "schnell", "sd3", "qwen", "qwen edit")
QWEN_MODULES = ("autoencoder", "autoencoder_in_bands", "language_model", "vision_language_model")
WIDTH, HEIGHT = 128, 96
STEPS, SEED = 4, 3


@pytest.fixture(scope="module")
def found(workspace):
    return run_inside(workspace, "inside_flow.py")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("memory", "least", "most"), [("full", 1.0, 1.0), ("40 %", 0.1, 0.45), ("no VRAM", 0.0, 0.1)])
def test_pictures_are_the_same_however_little_is_loaded(found, name, memory, least, most):
    row = found["pictures"][f"{name}, {memory}"]
    assert row["difference"] <= 1e-4
    assert row["outside the mask"] == 0 < row["inside the mask"]
    assert least <= row["most loaded"] <= most


def test_models_that_take_turns_on_a_card_for_one_paint_the_same(found):
    report = found["turns"]
    assert report["differences"] == [0, 0, 0, 0]
    assert min(report["loaded after the other"]) == 0


def test_a_network_kept_in_8_bits_paints_as_one_with_weights_rounded_so(found):
    report = found["eight_bits"]
    assert report["stored"] == ["torch.float32", "torch.float8_e4m3fn"]
    assert report["difference"] <= 1e-4 < 1e-3 < report["effect"]


@pytest.mark.parametrize("module", QWEN_MODULES)
@pytest.mark.parametrize("memory", ["full", "40 %", "10 %", "no VRAM"])
def test_modules_of_qwen_image_are_exact_however_little_is_loaded(found, module, memory):
    rows = found["modules"][f"{module}, {memory}"]
    for row in ("loaded", "partially unloaded", "loaded again", "shrunk"):
        assert rows[row]["equal"] and rows[row]["stranded"] == [], row
    assert rows["in VRAM after unloading"] == 0


@pytest.mark.parametrize("module", QWEN_MODULES)
def test_the_check_of_the_modules_of_qwen_image_can_fail(found, module):
    assert found["stranded"][module]["stranded"] > 0
    assert "expected all tensors on one device" in found["stranded"][module]["error"]


@pytest.mark.parametrize("module", QWEN_MODULES)
def test_dynamic_vram_leaves_nothing_of_qwen_image_behind(found, module):
    report = found["dynamic"][module]
    assert all(row["equal"] and row["stranded"] == [] for row in report["rows"])
    assert report["in VRAM after unloading"] == 0


def test_comfyui_lends_its_tokenizer_of_t5(found):
    assert found["tokenizer"] == [3, 9, 1712, 1, 0, 0]


# --- on the server


@pytest.fixture(scope="module")
def models(server, tmp_path_factory):
    """Folders of Qwen-Image and Qwen-Image-Edit, split files that have no tokenizer, and a LoRA."""
    tokenizers, folder = tmp_path_factory.mktemp("tokenizers"), server.base / "models"
    plain, edit = tiny_qwen_image(tokenizers / "plain"), tiny_qwen_image_edit(tokenizers / "edit")
    save_folder(plain, folder / "diffusers" / "qwen-plain", "QwenImagePipeline")
    save_folder(edit, folder / "diffusers" / "qwen-shown", "QwenImageEditPipeline")
    random = torch.Generator().manual_seed(1)
    lora = {}
    for name in ("attn.to_q", "attn.add_k_proj", "img_mlp.net.2"):
        weight = plain.transformer.state_dict()[f"transformer_blocks.1.{name}.weight"]
        key = f"transformer_blocks.1.{name}"
        lora[f"{key}.lora_down.weight"] = torch.randn(4, weight.shape[1], generator=random)
        lora[f"{key}.lora_up.weight"] = torch.randn(weight.shape[0], 4, generator=random)
        lora[f"{key}.alpha"] = torch.tensor(4.0)
    (folder / "loras").mkdir(exist_ok=True)
    save_file(lora, folder / "loras" / "qwen-fast.safetensors")
    split = save_split(with_published_vocabulary(plain), folder, "qwen_split")
    shown = save_split(with_published_vocabulary(edit), folder, "qwen_image_edit")
    return SimpleNamespace(folder=folder, split=split, shown=shown)


@pytest.fixture(scope="module")
def photo():
    return photo_and_mask(WIDTH, HEIGHT)


@pytest.fixture
def uploaded(client, models, photo):
    image, mask = photo
    pixels = (torch.cat([image, 1 - mask[..., None]], dim=-1)[0] * 255).round().to(torch.uint8).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    client.upload_image("qwen.png", buffer.getvalue())
    return client


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def graph(loaded, last="model", steps=STEPS, **more):
    return {
        "photo": node("LoadImage", image="qwen.png"),
        "model": node("MendLoadModel", **loaded),
        "paint": node(
            "MendInpaint", model=[last, 0], image=["photo", 0], mask=["photo", 1], prompt="a cat",
            negative_prompt="dog", scheduler="UniPC", steps=steps, guidance_scale=4.0, strength=0.9, seed=SEED,
            crop="off",
        ),
        "show": node("PreviewImage", images=["paint", 0]),
        **more,
    }  # fmt: skip


def by_the_engine(path, photo, **options):
    tokenizers = find_workspace().path / "comfy" / "text_encoders"
    host = LocalHost(torch.device("cpu"), folders={"qwen25_tokenizer": [tokenizers / "qwen25_tokenizer"]})
    image, mask = photo
    request = InpaintRequest(
        image=image, mask=mask, prompt="a cat", negative_prompt="dog", scheduler="UniPC", steps=STEPS,
        guidance_scale=4.0, strength=0.9, seed=SEED, crop=Crop.OFF,
    )  # fmt: skip
    return inpaint(request, load_model(path, host, **options), host).images[0].numpy()


def assert_painted(found, photo, expected):
    image, mask = photo
    before = (image[0] * 255).round().to(torch.uint8).numpy()
    kept = mask[0].numpy() == 0
    assert np.array_equal(found[kept], before[kept])
    assert np.abs(found[~kept].astype(int) - before[~kept]).max() > 8
    assert np.abs(found / 255 - expected).max() <= 1.5 / 255


@pytest.mark.parametrize("name", ["qwen-plain", "qwen-shown"])
def test_a_folder_paints_as_in_the_engine_with_previews(uploaded, models, photo, name):
    found, run = picture(uploaded, graph({"model": name}))
    assert_painted(found, photo, by_the_engine(models.folder / "diffusers" / name, photo))
    previews = [Image.open(io.BytesIO(preview)) for preview in run.previews]
    assert len(previews) >= STEPS - 1
    assert all(preview.width > preview.height for preview in previews)
    assert "model" not in run.outputs


def split_options(models, files):
    return {
        "vae": models.folder / "vae" / files["vae"],
        "text_encoders": [models.folder / "text_encoders" / files["text_encoder"]],
    }


def test_split_files_paint_as_in_the_engine_with_comfyuis_tokenizer(uploaded, models, photo):
    found, _ = picture(uploaded, graph(models.split))
    path = models.folder / "diffusion_models" / models.split["model"]
    assert_painted(found, photo, by_the_engine(path, photo, **split_options(models, models.split)))


def test_an_editing_model_of_split_files_is_named_or_said_not_to_see(uploaded, models, photo):
    path, options = models.folder / "diffusion_models" / models.shown["model"], split_options(models, models.shown)
    blind, run = picture(uploaded, graph(models.shown))
    (text,) = run.outputs["model"]["text"]
    assert "is used as Qwen-Image, which is not shown the picture" in text and "family to qwen-image-edit" in text
    assert_painted(blind, photo, by_the_engine(path, photo, **options))
    later = next(family for family in FAMILIES if family.startswith("qwen-image-edit-"))
    for family in ("qwen-image-edit", later):
        found, run = picture(uploaded, graph({**models.shown, "family": family}))
        assert "model" not in run.outputs
        assert_painted(found, photo, by_the_engine(path, photo, family=family, **options))
        assert np.abs(found.astype(int) - blind).max() > 8


def test_a_lora_for_qwen_image_changes_it_and_no_other(uploaded, models, photo):
    style = node("MendLoadLoRA", model=["model", 0], lora="qwen-fast.safetensors", strength=0.7, text_strength=1.0)
    plain, _ = picture(uploaded, graph({"model": "qwen-plain"}))
    found, run = picture(uploaded, graph({"model": "qwen-plain"}, "style", style=style))
    path = models.folder / "loras" / "qwen-fast.safetensors"
    expected = by_the_engine(models.folder / "diffusers" / "qwen-plain", photo, loras=[Lora(path, 0.7)])
    assert_painted(found, photo, expected)
    assert np.abs(found.astype(int) - plain).max() > 8
    assert "style" not in run.outputs
    run = uploaded.run(graph({"model": "mend-shapes"}, "style", style=style))
    assert run.status == "error"
    assert "does not fit mend-shapes" in run.error["exception_message"]
    assert "seems to be made for Qwen-Image" in run.error["exception_message"]


def test_an_interrupt_stops_it_within_a_step_and_the_next_run_paints(uploaded, models):
    seen = []

    def stop(event):
        if event.type == "progress":
            seen.append(event.data["value"])
            if len(seen) == 1:
                uploaded.interrupt()

    run = uploaded.wait(uploaded.queue(graph({"model": "qwen-shown"}, steps=50)), on_event=stop)
    assert run.status == "interrupted"
    assert seen[-1] < 50
    picture(uploaded, graph({"model": "qwen-shown"}, steps=2))
