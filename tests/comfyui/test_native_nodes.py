"""ComfyUI's own loaders, LoRA and ControlNet nodes and samplers around this pack's nodes, on a real server."""

import io
import json

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from tiny import photo_and_mask
from workspace import run_inside

SIZE = (200, 160)


@pytest.fixture(scope="module")
def client(server, workspace):
    """Checkpoints, a ControlNet and a LoRA that ComfyUI recognises by itself, and a photo with a hole."""
    run_inside(workspace, "make_native_files.py", server.base / "models")
    image, mask = photo_and_mask(*SIZE)
    rgba = torch.cat([image, 1 - mask[..., None]], dim=-1)
    buffer = io.BytesIO()
    Image.fromarray((rgba[0] * 255).round().to(torch.uint8).numpy()).save(buffer, "PNG")
    with server.client() as connected:
        connected.upload_image("native.png", buffer.getvalue())
        yield connected


def node(class_type, **inputs):
    return {"class_type": class_type, "inputs": inputs}


def settings(**changes):
    """Widget values of MendInpaint, quick to run."""
    workflow = json.loads((ROOT / "workflows" / "api" / "inpaint.json").read_text())
    inputs = next(n["inputs"] for n in workflow.values() if n["class_type"] == "MendInpaint")
    plain = {name: value for name, value in inputs.items() if not isinstance(value, list)}
    return {**plain, "steps": 3, "seed": 7, "guidance_scale": 4.0, **changes}


def loaded(checkpoint="small-sd15", strength=1.0):
    """A checkpoint with a LoRA on it, wrapped."""
    return {
        "photo": node("LoadImage", image="native.png"),
        "checkpoint": node("CheckpointLoaderSimple", ckpt_name=f"{checkpoint}.safetensors"),
        "lora": node(
            "LoraLoader",
            model=["checkpoint", 0],
            clip=["checkpoint", 1],
            lora_name="small-lora.safetensors",
            strength_model=strength,
            strength_clip=strength,
        ),
        "wrapped": node("MendWrapModel", model=["lora", 0], clip=["lora", 1], vae=["checkpoint", 2], native_size=128),
    }


def conditioned(control=1.0):
    """Prompts as conditioning, with an inpainting ControlNet."""
    return {
        "positive": node("CLIPTextEncode", clip=["lora", 1], text="a cat"),
        "negative": node("CLIPTextEncode", clip=["lora", 1], text="blurry"),
        "hint": node("MendControlHint", image=["photo", 0], mask=["photo", 1]),
        "control": node("ControlNetLoader", control_net_name="small-control.safetensors"),
        "controlled": node(
            "ControlNetApplyAdvanced",
            positive=["positive", 0],
            negative=["negative", 0],
            control_net=["control", 0],
            image=["hint", 0],
            strength=control,
            start_percent=0.0,
            end_percent=1.0,
        ),
    }


def painted(**inputs):
    return {
        "paint": node("MendInpaint", model=["wrapped", 0], image=["photo", 0], mask=["photo", 1], **settings(**inputs)),
        "save": node("SaveImage", images=["paint", 0], filename_prefix="native"),
    }


def picture(client, graph):
    run = client.run(graph)
    assert run.status == "success", run.error
    (reference,) = run.outputs["save"]["images"]
    return np.asarray(Image.open(io.BytesIO(client.image(reference))).convert("RGB")), run


def assert_only_the_hole_changed(result):
    image, mask = photo_and_mask(*SIZE)
    original = (image[0] * 255).round().to(torch.uint8).numpy()
    changed = (result != original).any(axis=-1)
    hole = mask[0].numpy() > 0
    assert result.shape == original.shape and not changed[~hole].any() and changed[hole].mean() > 0.9


LINKS = {"positive": ["controlled", 0], "negative": ["controlled", 1]}


def test_checkpoint_lora_and_controlnet_paint_the_hole_only(client):
    whole, run = picture(client, {**loaded(), **conditioned(), **painted(**LINKS)})
    assert_only_the_hole_changed(whole)
    assert run.previews and run.progress[-1] == (3, 3)
    without_lora, _ = picture(client, {**loaded(strength=0.0), **conditioned(), **painted(**LINKS)})
    without_control, _ = picture(client, {**loaded(), **conditioned(control=0.0), **painted(**LINKS)})
    prompts_only, _ = picture(client, {**loaded(), **painted(prompt="a cat", negative_prompt="blurry")})
    assert (whole != without_lora).any() and (whole != without_control).any()
    # without its ControlNet the conditioning says what the prompts say
    assert np.abs(without_control.astype(int) - prompts_only).max() <= 1


def test_an_inpainting_checkpoint_is_shown_the_surroundings(client):
    result, _ = picture(client, {**loaded("small-sd15-inpainting"), **painted(prompt="a cat")})
    assert_only_the_hole_changed(result)


def test_a_ready_made_sampler_gives_what_inpaint_gives(client):
    """Sampler and Inpaint Conditioning in ComfyUI's own sampling graph, against Inpaint on the same crop."""
    graph = {
        **loaded("small-sd15-inpainting"),
        "positive": node("CLIPTextEncode", clip=["lora", 1], text="a cat"),
        "negative": node("CLIPTextEncode", clip=["lora", 1], text="blurry"),
        "sampler": node("MendSampler", model=["lora", 0], scheduler="DDIM", steps=3, strength=1.0),
        "prepared": node(
            "MendInpaintConditioning",
            positive=["positive", 0],
            negative=["negative", 0],
            vae=["checkpoint", 2],
            image=["photo", 0],
            mask=["photo", 1],
            noise_mask=False,
        ),
        "guider": node("CFGGuider", model=["lora", 0], positive=["prepared", 0], negative=["prepared", 1], cfg=4.0),
        "noise": node("RandomNoise", noise_seed=7),
        "sampled": node(
            "SamplerCustomAdvanced",
            noise=["noise", 0],
            guider=["guider", 0],
            sampler=["sampler", 0],
            sigmas=["sampler", 1],
            latent_image=["prepared", 2],
        ),
        "decoded": node("VAEDecode", samples=["sampled", 0], vae=["checkpoint", 2]),
        "save": node("SaveImage", images=["decoded", 0], filename_prefix="sampled"),
    }
    sampled, run = picture(client, graph)
    assert run.progress[-1] == (3, 3) and run.previews
    inpainted, _ = picture(
        client,
        {
            **loaded("small-sd15-inpainting"),
            **painted(
                prompt="a cat", negative_prompt="blurry", scheduler="DDIM", crop="off", color_match=0.0, blend="linear"
            ),
        },
    )
    _, mask = photo_and_mask(*SIZE)
    inside = mask[0].numpy() == 1
    assert np.abs(sampled.astype(int) - inpainted)[inside].max() <= 1
    broken = {**graph, "split": node("SplitSigmas", sigmas=["sampler", 1], step=1)}
    broken["sampled"] = node("SamplerCustomAdvanced", **{**graph["sampled"]["inputs"], "sigmas": ["split", 1]})
    run = client.run(broken)
    assert "connect its second output" in run.error["exception_message"]


def test_hooks_on_the_conditioning_act(client):
    """A LoRA that only the prompt's branch has."""
    graph = {
        **loaded(strength=0.0),
        **conditioned(),
        "hook": node("CreateHookLora", lora_name="small-lora.safetensors", strength_model=2.0, strength_clip=0.0),
        "hooked": node(
            "ConditioningSetProperties",
            cond_NEW=["positive", 0],
            strength=1.0,
            set_cond_area="default",
            hooks=["hook", 0],
        ),
    }
    plain, _ = picture(client, {**graph, **painted(positive=["positive", 0], negative=["negative", 0])})
    hooked, _ = picture(client, {**graph, **painted(positive=["hooked", 0], negative=["negative", 0])})
    assert_only_the_hole_changed(hooked)
    assert (plain != hooked).any()
    again, _ = picture(client, {**graph, **painted(positive=["positive", 0], negative=["negative", 0])})
    assert np.array_equal(plain, again)  # and leave the weights as they were


def test_differential_diffusion_on_the_model_is_followed(client):
    graph = {**loaded(), "differential": node("DifferentialDiffusion", model=["lora", 0])}
    graph["feathered"] = node("FeatherMask", mask=["photo", 1], left=60, top=60, right=60, bottom=60)
    graph |= painted(prompt="a cat")
    plain, _ = picture(client, graph)
    graph["wrapped"]["inputs"]["model"] = ["differential", 0]
    followed, _ = picture(client, graph)
    assert (plain != followed).any()


def test_an_interrupt_stops_a_wrapped_model(client):
    graph = {**loaded(), **painted(prompt="a cat", steps=200)}
    prompt_id = client.queue(graph)
    run = client.wait(prompt_id, lambda event: event.type == "progress" and client.interrupt(prompt_id))
    assert run.status == "interrupted" and run.progress[-1][0] < 100
    assert client.run({**loaded(), **painted(prompt="a cat")}).status == "success"


def test_a_prompt_without_a_clip_is_refused(client):
    graph = {**loaded(), **painted(prompt="a cat")}
    del graph["wrapped"]["inputs"]["clip"]
    run = client.run(graph)
    assert "connect one to Wrap Model" in run.error["exception_message"]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (["wrapped", 0], "SD15 does not edit pictures it is shown"),
        (["shapes", 0], "Edit Model (Mend) is for models of Wrap Model (Mend)"),
    ],
)
def test_a_model_that_edits_nothing_is_refused(client, model, words):
    graph = {**loaded(), **painted(), "shapes": node("MendLoadModel", model="mend-shapes")}
    graph["edit"] = node("MendEditModel", model=model, shown="latents")
    graph["paint"]["inputs"]["model"] = ["edit", 0]
    run = client.run(graph)
    assert run.status == "error"
    assert words in run.error["exception_message"]


def test_conditioning_is_refused_by_a_model_that_cannot_follow_it(client):
    graph = {
        **loaded(),
        "positive": node("CLIPTextEncode", clip=["lora", 1], text="a cat"),
        **painted(positive=["positive", 0]),
    }
    graph["wrapped"] = node("MendLoadModel", model="mend-shapes")
    run = client.run(graph)
    assert "write prompts instead" in run.error["exception_message"]
