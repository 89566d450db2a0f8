"""--lora and --controlnet of mend inpaint and mend outpaint."""

import json

import pytest
import torch
from comfyui_mend import cli
from comfyui_mend.cli.adapters import ControlFlags, LoraFlag, lora_flag
from comfyui_mend.engine.control import Control
from comfyui_mend.engine.files import read_image, read_mask, read_parameters, write_image
from comfyui_mend.engine.host import LocalHost
from comfyui_mend.engine.inpaint import inpaint
from comfyui_mend.engine.models.controlnet import load_controlnet
from comfyui_mend.engine.models.load import load_model
from comfyui_mend.engine.models.lora import Lora
from comfyui_mend.engine.types import InpaintRequest
from diffusers import ControlNetModel
from safetensors.torch import save_file
from tiny import photo_and_mask, tiny_pipeline

LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
CPU = LocalHost(torch.device("cpu"))
FAST = ("--steps", 2, "--seed", 7, "--scheduler", "K_EULER", "--no-safety")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A models folder in ComfyUI's layout: a model, a LoRA with a tensor too many, and a ControlNet."""
    folder = tmp_path_factory.mktemp("models")
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(folder / "diffusers" / "tiny")
    torch.manual_seed(0)
    weight = pipeline.unet.state_dict()[f"{LAYER}.weight"]
    down, up = torch.randn(4, weight.shape[1]), torch.randn(weight.shape[0], 4)
    (folder / "loras" / "styles").mkdir(parents=True)
    name = f"unet.{LAYER}"
    style = {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, "other": torch.ones(1)}
    save_file(style, folder / "loras" / "styles" / "oil.safetensors")
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
    network.save_pretrained(folder / "controlnet" / "canny")
    return folder


@pytest.fixture(autouse=True)
def desk(tmp_path, monkeypatch, models):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COMFYUI_PATH", "")
    monkeypatch.setenv("MEND_MODELS", str(models))
    monkeypatch.setenv("COLUMNS", "200")
    image, mask = photo_and_mask()
    write_image("photo.png", image)
    write_image("mask.png", mask[..., None])
    write_image("edges.png", image.flip(2))


@pytest.fixture
def mend(capsys):
    def run(*arguments):
        code = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def paint(mend, out, *flags, command=("inpaint", "photo.png", "mask.png")):
    code, _, err = mend(*command, "-p", "a cat", "-o", out, *FAST, *flags)
    assert code == 0, err
    return read_image(out), err


def by_the_engine(models, loras=(), controls=()):
    model = load_model(models / "diffusers" / "tiny", CPU, loras=loras)
    request = InpaintRequest(
        image=read_image("photo.png"), mask=read_mask("mask.png"), prompt="a cat", steps=2, seed=7,
        scheduler="K_EULER", controls=controls,
    )  # fmt: skip
    return inpaint(request, model, CPU).images


def distance(a, b):
    return float((a - b).abs().max())


def test_a_lora_by_name_or_path_with_its_strengths(mend, models):
    path = models / "loras" / "styles" / "oil.safetensors"
    plain, err = paint(mend, "plain.png")
    assert err == ""
    found, err = paint(mend, "oil.png", "--lora", "oil:0.7:0")
    assert "oil.safetensors: 1 of its 3 tensors have no place in tiny and were left out (other)." in err
    assert distance(found, by_the_engine(models, [Lora(path, 0.7, 0)])) <= 0.5 / 255 + 1e-6
    assert distance(found, plain) > 0.01
    again, _ = paint(mend, "again.png", "--lora", f"{path}:0.3", "--lora", "styles/oil.safetensors:0.4")
    assert distance(found, again) <= 1 / 255 + 1e-6
    assert read_parameters("oil.png")["loras"] == ["oil:0.7:0"]
    assert "loras" not in read_parameters("plain.png")


def test_controlnets_have_the_flags_that_follow_them(mend, models):
    flags = ("--controlnet", "canny", "--control-image", "edges.png", "--control-strength", 0.6, "--control-end", 0.9)
    flags += ("--controlnet", models / "controlnet" / "canny", "--control-image", "masked", "--control-start", 0.2)
    found, _ = paint(mend, "followed.png", *flags)
    network = load_controlnet(models / "controlnet" / "canny", CPU)
    controls = (
        Control(network=network, image=read_image("edges.png"), strength=0.6, end=0.9),
        Control(network=network, start=0.2),
    )
    assert distance(found, by_the_engine(models, controls=controls)) <= 0.5 / 255 + 1e-6
    assert distance(found, by_the_engine(models)) > 0.01
    first, second = read_parameters("followed.png")["controlnets"]
    assert first == {"file": "canny", "image": "edges.png", "strength": 0.6, "start": 0.0, "end": 0.9}
    assert (second["image"], second["start"]) == ("masked", 0.2)


def test_outpainting_takes_both(mend):
    command = ("outpaint", "photo.png", "--right", 40)
    plain, _ = paint(mend, "wide.png", command=command)
    found, _ = paint(
        mend, "oil.png", "--lora", "oil", "--controlnet", "canny", "--control-image", "masked", command=command
    )
    assert found.shape == plain.shape and distance(found, plain) > 0.01
    assert torch.equal(found[:, :, :200], read_image("photo.png"))


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--lora", "gone"), 'There is no LoRA "gone"; there are styles/oil.safetensors.'),
        (("--lora", "oil:30"), "strength is 30.0; give a value from -20.0 to 20.0"),
        (("--lora", "photo.png"), "photo.png is"),
        (("--controlnet", "gone", "--control-image", "masked"), 'There is no ControlNet "gone"; there are canny.'),
        (("--controlnet", "canny"), "canny has nothing to follow: give --control-image FILE, or"),
        (("--controlnet", "canny", "--control-image", "gone.png"), "gone.png"),
        (("--controlnet", "canny", "--control-image", "masked", "--control-strength", "11"), "strength is 11"),
        (("--control-image", "edges.png"), "--control-image belongs behind a --controlnet"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
def test_what_is_wrong_is_said_before_the_model_is_loaded(mend, monkeypatch, flags, words):
    from comfyui_mend.engine.models import load

    monkeypatch.setattr(load, "load_model", lambda *args, **options: pytest.fail("loaded"))
    code, _, err = mend("inpaint", "photo.png", "mask.png", "-o", "x.png", *FAST, *flags)
    assert code != 0 and words in err


def test_a_control_image_of_another_shape_or_as_the_output_is_refused(mend, monkeypatch):
    from comfyui_mend.engine.models import load

    monkeypatch.setattr(load, "load_model", lambda *args, **options: pytest.fail("loaded"))
    write_image("tall.png", torch.zeros(1, 90, 30, 3))
    flags = ("--controlnet", "canny", "--control-image", "tall.png")
    code, _, err = mend("inpaint", "photo.png", "mask.png", "-o", "x.png", *FAST, *flags)
    assert code != 0 and "image is 30x90 but the picture is 200x160" in err
    code, out, _ = mend("inpaint", "photo.png", "mask.png", "-o", "tall.png", "--force", "--json", *FAST, *flags)
    assert code != 0 and "tall.png" in json.loads(out)["error"]
    assert read_image("tall.png").shape == (1, 90, 30, 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a.safetensors", LoraFlag("a.safetensors", 1.0, None)),
        ("a:0.5", LoraFlag("a", 0.5, None)),
        ("a:-.5:2", LoraFlag("a", -0.5, 2.0)),
        (r"C:\loras\a.safetensors:1", LoraFlag(r"C:\loras\a.safetensors", 1.0, None)),
        (r"C:\loras\a.safetensors", LoraFlag(r"C:\loras\a.safetensors", 1.0, None)),
        ("a:b:0.25", LoraFlag("a:b", 0.25, None)),
        ("v1:5:0:0", LoraFlag("v1:5", 0.0, 0.0)),
    ],
)
def test_a_lora_flag_is_parted_from_the_right(text, expected):
    assert lora_flag(text) == expected
    assert lora_flag(str(expected)) == expected


def test_flags_have_the_engines_defaults():
    control = Control(network=None)
    flags = ControlFlags("x")
    assert (flags.strength, flags.start, flags.end) == (control.strength, control.start, control.end)
    assert lora_flag("x").strength == Lora("x").strength
