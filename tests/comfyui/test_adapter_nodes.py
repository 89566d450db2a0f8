"""Load LoRA, Load ControlNet and Apply ControlNet (Mend) in a running server, and the memory of UNet and ControlNet."""

import io
import json

import numpy as np
import pytest
import torch
from comfyui_mend.engine.control import Control
from comfyui_mend.engine.host import LocalHost
from comfyui_mend.engine.inpaint import inpaint
from comfyui_mend.engine.models.controlnet import load_controlnet
from comfyui_mend.engine.models.load import load_model
from comfyui_mend.engine.models.lora import Lora
from comfyui_mend.engine.types import InpaintRequest
from diffusers import ControlNetModel
from PIL import Image
from safetensors.torch import save_file
from tiny import photo_and_mask, tiny_pipeline
from workspace import PromptRejectedError, run_inside

MODEL, LORA, CONTROLNET = "adapted", "adapters/style.safetensors", "edges"
SIZE = (200, 160)
STEPS, SEED = 2, 7
CPU = LocalHost(torch.device("cpu"))
LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.fixture(scope="module")
def models(server):
    """A tiny model, a LoRA with a tensor too many, one of another family, and a ControlNet, in ComfyUI's folders."""
    models = server.base / "models"
    pipeline = tiny_pipeline(seed=11)
    pipeline.save_pretrained(models / "diffusers" / MODEL)
    (models / "loras" / "adapters").mkdir(parents=True, exist_ok=True)
    torch.manual_seed(3)
    weight = pipeline.unet.state_dict()[f"{LAYER}.weight"]
    name = "lora_unet_" + LAYER.replace(".", "_")
    down, up = torch.randn(4, weight.shape[1]), torch.randn(weight.shape[0], 4)
    style = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, "bundle_emb.cat": torch.ones(1)}
    save_file(style, models / "loras" / LORA)
    save_file({"lora_unet_double_blocks_0_img_mod_lin.lora_up.weight": up}, models / "loras" / "flux.safetensors")
    network = ControlNetModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
        conditioning_embedding_out_channels=(8, 8, 16, 16),
    )
    for parameter in network.parameters():
        parameter.data.normal_(0, 0.1)
    network.save_pretrained(models / "controlnet" / CONTROLNET)
    return models


@pytest.fixture(scope="module")
def photo():
    return photo_and_mask(*SIZE)


@pytest.fixture
def uploaded(client, models, photo):
    """The client, with the photo and its mask as an alpha, and edges, on the server."""
    image, mask = photo
    send(client, "adapters.png", torch.cat([image, 1 - mask[..., None]], dim=-1))
    send(client, "adapters-edges.png", edges())
    return client


def send(client, name, picture):
    buffer = io.BytesIO()
    Image.fromarray((picture[0] * 255).round().to(torch.uint8).numpy()).save(buffer, "PNG")
    client.upload_image(name, buffer.getvalue())


def edges():
    x = torch.arange(SIZE[0])[None, :, None] + torch.arange(SIZE[1])[:, None, None]
    return ((x // 9) % 2).float().expand(SIZE[1], SIZE[0], 3)[None].clone()


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def request(photo, **changes):
    image, mask = photo
    settings = {"prompt": "a cat", "scheduler": "K_EULER", "steps": STEPS, "seed": SEED}
    return InpaintRequest(image=image, mask=mask, **settings, **changes)


def graph(model=("model", 0), control=None, **more):
    settings = {"prompt": "a cat", "negative_prompt": "", "scheduler": "K_EULER", "steps": STEPS, "seed": SEED}
    link = {"control": [control, 0]} if control else {}
    return {
        "photo": node("LoadImage", image="adapters.png"),
        "model": node("MendLoadModel", model=MODEL),
        "paint": node(
            "MendInpaint", model=list(model), image=["photo", 0], mask=["photo", 1], guidance_scale=7.5, strength=1.0,
            **settings, **link,
        ),
        "show": node("PreviewImage", images=["paint", 0]),
        **more,
    }  # fmt: skip


def picture(client, prompt):
    run = client.run(prompt)
    assert run.status == "success", run.error
    (reference,) = run.outputs["show"]["images"]
    return np.asarray(Image.open(io.BytesIO(client.image(reference))).convert("RGB")), run


def assert_kept(found, photo):
    image, mask = photo
    before = (image[0] * 255).round().to(torch.uint8).numpy()
    assert np.array_equal(found[mask[0].numpy() == 0], before[mask[0].numpy() == 0])


def assert_same(found, result):
    assert np.abs(found / 255 - result.images[0].numpy()).max() <= 1.5 / 255


def message(client, prompt):
    run = client.run(prompt)
    assert run.status == "error"
    text = run.error["exception_message"].strip()
    assert "\n" not in text and text.count(". ") == 0, text
    return text


def lora(name=LORA, strength=1.0, text_strength=1.0, model="model"):
    return node("MendLoadLoRA", model=[model, 0], lora=name, strength=strength, text_strength=text_strength)


def test_a_lora_paints_as_in_the_engine_and_says_what_it_left_out(uploaded, models, photo):
    plain, _ = picture(uploaded, graph())
    found, run = picture(uploaded, graph(("style", 0), style=lora(strength=0.7)))
    assert_kept(found, photo)
    assert np.abs(found.astype(int) - plain).max() > 8
    (text,) = run.outputs["style"]["text"]
    assert text == "style.safetensors: 1 of its 3 tensors have no place in adapted and were left out (bundle_emb.cat)."
    model = load_model(models / "diffusers" / MODEL, CPU, loras=[Lora(models / "loras" / LORA, 0.7)])
    assert_same(found, inpaint(request(photo), model, CPU))


def test_loras_in_a_row_add_up_and_strength_0_is_the_model(uploaded):
    once, _ = picture(uploaded, graph(("style", 0), style=lora(strength=0.6)))
    twice, run = picture(
        uploaded, graph(("more", 0), style=lora(strength=0.25), more=lora(strength=0.35, model="style"))
    )
    assert np.abs(once.astype(int) - twice).max() <= 1
    # what the first has said, the second does not repeat
    assert "style" in run.outputs and "more" not in run.outputs
    plain, _ = picture(uploaded, graph())
    nothing, _ = picture(uploaded, graph(("none", 0), none=lora(strength=0, text_strength=0)))
    assert np.array_equal(plain, nothing)


def test_a_lora_of_another_family_or_for_a_wrapped_model_is_refused(uploaded, workspace, server):
    text = message(uploaded, graph(("style", 0), style=lora("flux.safetensors")))
    assert text.startswith("flux.safetensors does not fit adapted") and "made for FLUX" in text
    with pytest.raises(PromptRejectedError) as rejected:
        uploaded.run(graph(("style", 0), style=lora("gone.safetensors")))
    assert "gone.safetensors is not among the files found" in json.dumps(rejected.value.answer)
    run_inside(workspace, "make_native_files.py", server.base / "models")
    wrapped = graph(
        ("style", 0),
        checkpoint=node("CheckpointLoaderSimple", ckpt_name="small-sd15.safetensors"),
        wrapped=node("MendWrapModel", model=["checkpoint", 0], clip=["checkpoint", 1], vae=["checkpoint", 2]),
        style=lora(model="wrapped"),
    )
    del wrapped["model"]
    assert "put ComfyUI's own Load LoRA before Wrap Model" in message(uploaded, wrapped)
    followed = graph(
        ("wrapped", 0), "follow", wrapped=wrapped["wrapped"], checkpoint=wrapped["checkpoint"], **control()
    )
    del followed["model"]
    assert "connect its Apply ControlNet to positive and negative" in message(uploaded, followed)


def control(shown="image", strength=0.8, start=0.0, end=1.0, **more):
    links = {"image": ["edges", 0]} if shown == "image" else {}
    return {
        "edges": node("LoadImage", image="adapters-edges.png"),
        "network": node("MendLoadControlNet", controlnet=CONTROLNET),
        "follow": node(
            "MendApplyControlNet", controlnet=["network", 0], shown=shown, strength=strength, start=start, end=end,
            **{**links, **more},
        ),
    }  # fmt: skip


def test_a_controlnet_paints_as_in_the_engine(uploaded, models, photo):
    plain, _ = picture(uploaded, graph())
    found, _ = picture(uploaded, graph(control="follow", **control()))
    assert_kept(found, photo)
    assert np.abs(found.astype(int) - plain).max() > 8
    network = load_controlnet(models / "controlnet" / CONTROLNET, CPU)
    model = load_model(models / "diffusers" / MODEL, CPU)
    follow = Control(network=network, image=edges(), strength=0.8)
    assert_same(found, inpaint(request(photo, controls=(follow,)), model, CPU))


def test_controlnets_in_a_row_add_up_and_the_masked_picture_is_made_here(uploaded, models, photo):
    second = node(
        "MendApplyControlNet", controlnet=["network", 0], shown="masked picture", strength=0.5, start=0.0, end=0.6,
        control=["follow", 0],
    )  # fmt: skip
    found, _ = picture(uploaded, graph(control="second", second=second, **control()))
    assert_kept(found, photo)
    network = load_controlnet(models / "controlnet" / CONTROLNET, CPU)
    model = load_model(models / "diffusers" / MODEL, CPU)
    controls = (
        Control(network=network, image=edges(), strength=0.8),
        Control(network=network, strength=0.5, end=0.6),
    )
    assert_same(found, inpaint(request(photo, controls=controls), model, CPU))


def test_outpainting_follows_too(uploaded):
    def outpaint(**link):
        return {
            "photo": node("LoadImage", image="adapters.png"),
            "model": node("MendLoadModel", model=MODEL),
            "paint": node(
                "MendOutpaint", model=["model", 0], image=["photo", 0], prompt="a cat", negative_prompt="", left=0,
                top=0, right=40, bottom=0, feather=0, scheduler="K_EULER", steps=STEPS, guidance_scale=7.5,
                strength=1.0, seed=SEED, **link,
            ),
            "show": node("PreviewImage", images=["paint", 0]),
        }  # fmt: skip

    plain, _ = picture(uploaded, outpaint())
    followed, _ = picture(uploaded, {**outpaint(control=["follow", 0]), **control("masked picture")})
    assert plain.shape == followed.shape and np.array_equal(plain[:, :200], followed[:, :200])
    assert np.abs(plain.astype(int) - followed).max() > 8


def test_what_a_controlnet_is_shown_must_be_said(uploaded):
    without = control()
    del without["follow"]["inputs"]["image"]
    assert "edges has no image to follow" in message(uploaded, graph(control="follow", **without))
    useless = control("masked picture", image=["edges", 0])
    assert "take the image away" in message(uploaded, graph(control="follow", **useless))
    backwards = control(start=0.6, end=0.4)
    assert "before that" in message(uploaded, graph(control="follow", **backwards))


def test_unet_and_controlnet_share_the_card(workspace):
    rows = run_inside(workspace, "inside_adapters.py")
    for label, most in (("full", 1.0), ("60 %", 0.6), ("10 %", 0.1)):
        row = rows[label]
        assert row["equal"] and row["effect"] > 0.01, label
        assert row["loaded"] <= most
        # the first time, not again, when one was moved away, and not again
        assert row["asked"] == [1, 0, 1, 0]
    assert rows["full"]["loaded"] == 1
