"""ControlNets against diffusers' own pipelines on the same random weights; their files, windows and refusals."""

import json
import re
from dataclasses import replace
from inspect import signature

import numpy as np
import pytest
import torch
from comfyui_mend.engine import control, inpaint, outpaint_steps
from comfyui_mend.engine.control import HIDDEN, Control, Influence, controlled
from comfyui_mend.engine.host import LocalHost, Role
from comfyui_mend.engine.models import controlnet, ldm
from comfyui_mend.engine.models.controlnet import (
    ControlNet,
    find_controlnets,
    infer_config,
    load_controlnet,
    read_state,
)
from comfyui_mend.engine.models.detect import CONFIGS
from comfyui_mend.engine.models.weight_files import read_json
from comfyui_mend.engine.outpaint import Padding, pad
from comfyui_mend.engine.types import Box, Compat, Crop, InpaintRequest, InputError, ModelFileError
from PIL import Image
from safetensors.torch import save_file
from tiny import as_pil, engine_model, photo_and_mask, relative, tiny_pipeline
from tiny_sdxl import tiny_sdxl

STEPS, SCALE, SEED, SIDE = 12, 7.5, 7, 128
GATE = 1e-5
CPU = LocalHost(torch.device("cpu"))


@pytest.fixture(scope="module", params=[9, 4], ids=["9-channel", "4-channel"])
def pipeline(request):
    return tiny_pipeline(in_channels=request.param)


@pytest.fixture(scope="module")
def nine():
    return tiny_pipeline(in_channels=9)


def tiny_controlnet(unet, seed=1):
    """A random ControlNetModel for a UNet; the convolutions that start as zeros are random too."""
    from diffusers import ControlNetModel

    torch.manual_seed(seed)
    net = ControlNetModel.from_config({**_shared(unet), "conditioning_embedding_out_channels": (8, 8, 16, 16)}).eval()
    return fill_zeros(net)


def fill_zeros(net):
    with torch.no_grad():
        for layer in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
            layer.weight.normal_(0, 0.1)
            layer.bias.normal_(0, 0.1)
        # seven layers of torch's own initialisation would leave next to nothing of a hint
        for layer in (net.controlnet_cond_embedding.conv_in, *net.controlnet_cond_embedding.blocks):
            layer.weight.mul_(3)
    return net


def _shared(unet):
    """What a UNet's config and a ControlNet's have in common."""
    from diffusers import ControlNetModel

    return {
        **{key: value for key, value in unet.config.items() if key in signature(ControlNetModel).parameters},
        "in_channels": 4,
    }


def as_loaded(net, name="tiny-control", width=32):
    return ControlNet(name, CPU.manage(net, Role.DENOISER), width)


def edges(width=200, height=160):
    """A picture [1, H, W, 3] of 8-bit stripes, as an edge detector might draw."""
    x = torch.arange(width)[None, :, None] + torch.arange(height)[:, None, None]
    return ((x // 9) % 2).float().expand(height, width, 3)[None].clone()


def reference(pipeline, nets, hints, **window):
    """Latents of StableDiffusionControlNetInpaintPipeline."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionControlNetInpaintPipeline

    theirs = StableDiffusionControlNetInpaintPipeline(
        **{key: value for key, value in pipeline.components.items() if key not in ("scheduler", "image_encoder")},
        scheduler=EulerDiscreteScheduler.from_config(pipeline.scheduler.config, **window.pop("scheduler", {})),
        controlnet=nets,
        requires_safety_checker=False,
    )
    theirs.set_progress_bar_config(disable=True)
    image, mask = as_pil(*photo_and_mask())
    return theirs(
        prompt="a cat",
        image=image,
        mask_image=mask,
        control_image=hints,
        height=SIDE,
        width=SIDE,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        generator=torch.Generator().manual_seed(SEED),
        output_type="latent",
        **{"strength": 1.0, "controlnet_conditioning_scale": 1.0, **window},
    ).images


def caught(model):
    """The latents that the model is given to decode."""
    latents, decode = [], model.decode
    model.decode = lambda clean: (latents.append(clean), decode(clean))[1]
    return latents


def ours(pipeline, *controls, **options):
    model = engine_model(pipeline)
    latents = caught(model)
    image, mask = photo_and_mask()
    request = InpaintRequest(
        image=image,
        mask=mask,
        prompt="a cat",
        scheduler="K_EULER",
        steps=STEPS,
        guidance_scale=SCALE,
        seed=SEED,
        width=SIDE,
        height=SIDE,
        compat=Compat.DIFFUSERS,
        controls=controls,
    )
    inpaint.inpaint(replace(request, **options), model, CPU)
    return latents[0]


def pil_edges():
    return Image.fromarray((edges()[0] * 255).to(torch.uint8).numpy())


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_compat_reproduces_the_pipeline(pipeline, strength):
    net = tiny_controlnet(pipeline.unet)
    theirs = reference(pipeline, net, pil_edges(), controlnet_conditioning_scale=0.8, strength=strength)
    mine = ours(pipeline, Control(network=as_loaded(net), image=edges(), strength=0.8), strength=strength)
    assert relative(theirs, mine) <= GATE
    assert relative(theirs, ours(pipeline, strength=strength)) > 50 * GATE  # the network has something to say
    wrong = ours(pipeline, Control(network=as_loaded(net), image=edges(), strength=0.7), strength=strength)
    assert relative(theirs, wrong) > 50 * GATE


@pytest.mark.parametrize("window", [(0.2, 0.8), (0.0, 0.5), (0.34, 1.0)])
def test_compat_counts_steps_for_the_window(nine, window):
    net = tiny_controlnet(nine.unet)
    start, end = window
    theirs = reference(nine, net, pil_edges(), control_guidance_start=start, control_guidance_end=end)
    mine = ours(nine, Control(network=as_loaded(net), image=edges(), start=start, end=end))
    assert relative(theirs, mine) <= GATE
    # one step more is seen
    later = ours(nine, Control(network=as_loaded(net), image=edges(), start=start, end=min(end + 1 / STEPS, 1)))
    if end < 1:
        assert relative(theirs, later) > 50 * GATE


def test_compat_adds_several_controlnets_up(nine):
    from diffusers import MultiControlNetModel

    nets = [tiny_controlnet(nine.unet, seed) for seed in (1, 2)]
    hints = [pil_edges(), pil_edges().transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    theirs = reference(nine, MultiControlNetModel(nets), hints, controlnet_conditioning_scale=[0.8, 0.4])
    images = [edges(), edges().flip(2)]
    controls = [
        Control(network=as_loaded(net), image=image, strength=strength)
        for net, image, strength in zip(nets, images, (0.8, 0.4), strict=True)
    ]
    assert relative(theirs, ours(nine, *controls)) <= GATE
    assert relative(theirs, ours(nine, controls[0])) > 50 * GATE


def test_the_inpainting_hint_is_the_picture_with_minus_one_in_the_hole(nine):
    net = tiny_controlnet(nine.unet)
    image, mask = as_pil(*photo_and_mask())
    pixels = np.array(image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), np.float32) / 255
    hole = np.array(mask.resize((SIDE, SIDE), Image.Resampling.LANCZOS), np.float32) / 255
    pixels[hole > 0.5] = HIDDEN
    hint = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    mine = ours(nine, Control(network=as_loaded(net)))
    assert relative(reference(nine, net, hint), mine) <= GATE
    # zeros in the hole are what other inpainting ControlNets are shown
    assert relative(reference(nine, net, hint.clamp(min=0)), mine) > 50 * GATE


def test_sdxl_is_reproduced():
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLControlNetInpaintPipeline
    from tiny_sdxl import sdxl_engine_model

    pipeline = tiny_sdxl(in_channels=4)
    net = tiny_controlnet(pipeline.unet)
    parts = {k: v for k, v in pipeline.components.items() if k not in ("scheduler", "image_encoder")}
    theirs = StableDiffusionXLControlNetInpaintPipeline(
        **parts, scheduler=EulerDiscreteScheduler.from_config(pipeline.scheduler.config), controlnet=net,
        add_watermarker=False,
    )  # fmt: skip
    theirs.set_progress_bar_config(disable=True)
    image, mask = as_pil(*photo_and_mask())
    latents = theirs(
        prompt="a cat", negative_prompt="", image=image, mask_image=mask, control_image=pil_edges(), height=SIDE,
        width=SIDE, num_inference_steps=STEPS, guidance_scale=SCALE, strength=0.75, output_type="latent",
        generator=torch.Generator().manual_seed(SEED), controlnet_conditioning_scale=0.8,
    ).images  # fmt: skip
    model = sdxl_engine_model(pipeline)
    mine = caught(model)
    photo, hole = photo_and_mask()
    request = InpaintRequest(
        image=photo, mask=hole, prompt="a cat", scheduler="K_EULER", steps=STEPS, guidance_scale=SCALE, seed=SEED,
        width=SIDE, height=SIDE, strength=0.75, compat=Compat.DIFFUSERS,
        controls=(Control(network=as_loaded(net, width=80), image=edges(), strength=0.8),),
    )  # fmt: skip
    inpaint.inpaint(request, model, CPU)
    assert relative(latents, mine[0]) <= GATE


# --- in a run of our own


def run(pipeline, *controls, **options):
    image, mask = photo_and_mask()
    request = InpaintRequest(
        image=image, mask=mask, prompt="a cat", steps=3, scheduler="K_EULER", controls=controls, **options
    )
    return inpaint.inpaint(request, engine_model(pipeline), CPU).images


def test_a_control_changes_the_hole_and_nothing_else(nine):
    net = as_loaded(tiny_controlnet(nine.unet))
    image, mask = photo_and_mask()
    plain, followed = run(nine), run(nine, Control(network=net, image=edges()))
    assert torch.equal(followed[mask == 0], image[mask == 0])
    assert (plain - followed).abs().max() > 1e-3
    assert torch.equal(plain, run(nine, Control(network=net, image=edges(), strength=0)))


def test_the_hint_is_cut_along_with_the_crop(nine, monkeypatch):
    """A coloured gradient of the whole picture arrives as the very pixels that the crop shows."""
    seen, original = [], control._run

    def spy(influence, inputs, sample):
        seen.append(influence.pixels)
        return original(influence, inputs, sample)

    monkeypatch.setattr(control, "_run", spy)
    net = as_loaded(tiny_controlnet(nine.unet))
    image, mask = photo_and_mask(400, 300)
    request = InpaintRequest(
        image=image, mask=mask, steps=1, count=2, controls=(Control(network=net, image=image), Control(network=net))
    )
    model = engine_model(nine)
    inpaint.inpaint(request, model, CPU)
    (part,) = inpaint.parts_of(inpaint.normalise(request), model, 0)
    expected = part.plan.cut(image).permute(0, 3, 1, 2)
    assert part.plan.box.size != (400, 300)
    assert seen[0].shape[0] == 2 and torch.equal(seen[0][:1], expected) and torch.equal(seen[0][1:], expected)
    hole = part.plan.cut_hole(mask)[0] > 0
    assert (seen[1][0][:, hole] == HIDDEN).all() and torch.equal(seen[1][0][:, ~hole], expected[0][:, ~hole])


def windows(scheduler="K_EULER", start=0.0, end=1.0, strength=1.0, sigmas="default", compat=Compat.OFF):
    """The share of the way of each evaluation in which the control counts."""
    from comfyui_mend.engine.models.protocol import Conditioning, ModelFacts
    from comfyui_mend.engine.schedulers import plan
    from comfyui_mend.engine.types import Sigmas

    facts = ModelFacts(name="x", conditioning=Conditioning.CONCAT, native_size=512, scheduler_config={})
    schedule = plan(scheduler, {"beta_schedule": "scaled_linear"}, 20, strength, sigmas=Sigmas(sigmas))
    scales = Control(network=None, start=start, end=end).scales(schedule, facts, compat)
    assert len(scales) == schedule.evaluations
    return [1 - float(t) / 999 for t, scale in zip(schedule.timesteps, scales, strict=True) if scale]


@pytest.mark.parametrize("options", [{}, {"sigmas": "karras"}, {"strength": 0.5}, {"scheduler": "Heun"}], ids=str)
def test_a_window_means_the_same_noise_whatever_the_schedule(options):
    everything, inside = windows(**options), windows(start=0.2, end=0.8, **options)
    assert inside == [share for share in everything if 0.2 <= share <= 0.8]
    assert 0 < len(inside) < len(everything)


def test_compats_window_is_another_one():
    """Of 20 Karras steps diffusers takes 12 for 0.2 to 0.8; by noise they are 8, as families.md measured."""
    karras = {"sigmas": "karras", "start": 0.2, "end": 0.8}
    assert (len(windows(**karras, compat=Compat.DIFFUSERS)), len(windows(**karras))) == (12, 8)


def test_outpainting_cuts_the_image_for_every_window(nine, monkeypatch):
    shown = []
    original = control.show

    def spy(canvas, request, *rest):
        shown.append((request.controls[0].image, request.image))
        return original(canvas, request, *rest)

    monkeypatch.setattr(control, "show", spy)
    net = as_loaded(tiny_controlnet(nine.unet))
    image, _ = photo_and_mask(96, 96)
    padded = pad(image, Padding(right=160), 8)
    x = torch.linspace(0, 1, padded.image.shape[2]).expand(1, 96, -1)[..., None].expand(-1, -1, -1, 3)
    request = InpaintRequest(
        image=padded.image, mask=padded.mask, steps=1, count=2, controls=(Control(network=net, image=x),)
    )
    outpaint_steps.outpaint(request, padded.box, engine_model(nine), CPU)
    assert len(shown) > 1
    starts = set()
    for part, picture in shown:
        assert part.shape[:3] == picture.shape[:3] and len(part) == 2
        starts.add(float(part[0, 0, 0, 0]))
    assert len(starts) > 1


# --- values


def test_what_cannot_be_followed_is_refused(nine):
    net = as_loaded(tiny_controlnet(nine.unet))
    for options, words in (
        ({"strength": 11}, "strength is 11"),
        ({"start": -0.1}, "start is -0.1"),
        ({"start": 0.6, "end": 0.4}, "before that"),
    ):
        with pytest.raises(InputError, match=words):
            Control(network=net, **options)
    with pytest.raises(InputError, match="200x120 but the picture is 200x160"):
        run(nine, Control(network=net, image=edges(200, 120)))
    with pytest.raises(InputError, match="1 pictures and 2 images"):
        run(nine, Control(network=net, image=edges().expand(2, -1, -1, -1)))
    wrong = as_loaded(tiny_controlnet(nine.unet), "sdxl-canny", 2048)
    with pytest.raises(InputError, match="sdxl-canny is made for Stable Diffusion XL, and tiny is"):
        run(nine, Control(network=wrong, image=edges()))


def test_a_model_that_has_no_unet_follows_none(nine):
    model = engine_model(nine)
    model.facts = replace(model.facts, control_width=None)
    image, mask = photo_and_mask()
    net = as_loaded(tiny_controlnet(nine.unet))
    with pytest.raises(InputError, match="tiny cannot follow the ControlNet tiny-control"):
        inpaint.inpaint(InpaintRequest(image=image, mask=mask, controls=(Control(network=net),)), model, CPU)


def test_an_image_is_brought_to_the_pictures_size_and_number():
    pictures = torch.rand(2, 80, 100, 4)
    fitted = Control(network=None, image=edges()[..., :1]).fit(pictures)
    assert fitted.image.shape == (2, 80, 100, 3)
    part = fitted.part(Box(10, 20, 40, 60), 3)
    assert part.image.shape == (6, 40, 30, 3) and torch.equal(part.image[2], fitted.image[0, 20:60, 10:40])


def test_the_unet_is_as_it_was_after_an_error(nine):
    net = as_loaded(tiny_controlnet(nine.unet))
    with pytest.raises(RuntimeError), controlled(nine.unet, [Influence(net, torch.zeros(1, 3, 9, 9), 1.0)]):
        nine.unet(torch.zeros(1, 9, 16, 16), torch.tensor(5.0), torch.zeros(1, 77, 32))
    assert not nine.unet._forward_pre_hooks


# --- files


def original_names(state, config):
    """The state dict as the original code names it."""
    names = ldm.unet_names({**config, "up_block_types": ()}) | controlnet._ORIGINAL_NAMES
    names |= {f"zero_convs.{n}.0": f"controlnet_down_blocks.{n}" for n in range(20)}
    return {ldm.rename(key, {new: old for old, new in names.items()}): value for key, value in state.items()}


def plain_sizes(family):
    """A ControlNet as large as the families' own in all that its file does not say: groups, heads, hint widths."""
    from diffusers import ControlNetModel

    torch.manual_seed(0)
    common = {"layers_per_block": 2, "norm_num_groups": 32}
    configs = {
        "sd1": {"block_out_channels": (32, 64, 64), "cross_attention_dim": 768,
                "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")},
        "sd2": {"block_out_channels": (64, 128), "cross_attention_dim": 1024, "attention_head_dim": (1, 2),
                "use_linear_projection": True, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")},
        "sdxl": {"block_out_channels": (64, 128), "cross_attention_dim": 2048, "attention_head_dim": (1, 2),
                 "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "transformer_layers_per_block": (1, 2),
                 "use_linear_projection": True, "addition_embed_type": "text_time", "addition_time_embed_dim": 256,
                 "projection_class_embeddings_input_dim": 2816},
    }  # fmt: skip
    return fill_zeros(ControlNetModel(**common, **configs[family]).eval())


def call(net):
    generator = torch.Generator().manual_seed(1)
    added = {"text_embeds": torch.randn(1, 1280, generator=generator), "time_ids": torch.arange(6.0)[None]}
    with torch.no_grad():
        down, middle = net(
            torch.randn(1, 4, 8, 8, generator=generator),
            torch.tensor(500.0),
            torch.randn(1, 77, net.config.cross_attention_dim, generator=generator),
            torch.rand(1, 3, 64, 64, generator=generator),
            added_cond_kwargs=added if net.config.addition_embed_type else None,
            return_dict=False,
        )
    return [*down, middle]


@pytest.mark.parametrize("layout", ["folder", "diffusers", "original", "inside a checkpoint"])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_every_layout_loads_as_what_it_is(tmp_path, family, layout):
    net = plain_sizes(family)
    state = {key: value.contiguous() for key, value in net.state_dict().items()}
    path = tmp_path / "net.safetensors"
    if layout == "folder":
        path = tmp_path / "net"
        net.save_pretrained(path)
    elif layout == "diffusers":
        save_file(state, path)
    else:
        state = original_names(state, net.config)
        prefix = "control_model." if layout == "inside a checkpoint" else ""
        more = {"model.diffusion_model.input_blocks.0.0.bias": torch.zeros(4)} if prefix else {}
        save_file({prefix + key: value for key, value in state.items()} | more, path)
    loaded = load_controlnet(path, CPU)
    assert loaded.name == path.name and loaded.context_width == net.config.cross_attention_dim
    for mine, theirs in zip(call(loaded.managed.module), call(net), strict=True):
        assert (mine - theirs).abs().max() <= 1e-5


def test_a_config_beside_a_file_says_what_the_file_does_not(tmp_path, nine):
    net = tiny_controlnet(nine.unet)
    net.save_pretrained(tmp_path / "net-config")
    (tmp_path / "net-config" / "diffusion_pytorch_model.safetensors").rename(tmp_path / "net.safetensors")
    loaded = load_controlnet(tmp_path / "net.safetensors", CPU)
    assert loaded.managed.module.config.norm_num_groups == 8


def test_a_size_is_read_from_the_weights():
    net = plain_sizes("sdxl")
    config = infer_config(net.state_dict(), "net")
    said = ("block_out_channels", "layers_per_block", "down_block_types", "transformer_layers_per_block")
    for key in (*said, "cross_attention_dim", "attention_head_dim", "projection_class_embeddings_input_dim"):
        theirs = net.config[key]
        assert config[key] == (list(theirs) if isinstance(theirs, tuple) else theirs), key
    assert set(read_state(original_names(net.state_dict(), net.config))) == set(net.state_dict())


@pytest.mark.parametrize("family", ["sd15", "sd2-base", "sdxl"])
def test_the_published_sizes_are_read_from_the_weights(family):
    """Networks of full size, without any data."""
    from diffusers import ControlNetModel

    unet = read_json(CONFIGS / family / "unet" / "config.json")
    sizes = ("block_out_channels", "layers_per_block", "down_block_types", "cross_attention_dim", "attention_head_dim")
    more = ("use_linear_projection", "addition_embed_type", "addition_time_embed_dim", "transformer_layers_per_block")
    known = {key: unet[key] for key in (*sizes, *more, "projection_class_embeddings_input_dim") if key in unet}
    with torch.device("meta"):
        net = ControlNetModel(**known)
        again = ControlNetModel(**infer_config(net.state_dict(), family))
    shapes = [{key: tensor.shape for key, tensor in one.state_dict().items()} for one in (net, again)]
    assert shapes[0] == shapes[1] and len(shapes[0]) > 300
    assert infer_config(net.state_dict(), family)["attention_head_dim"] == unet["attention_head_dim"]
    assert set(read_state(original_names(net.state_dict(), net.config))) == set(shapes[0])


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["lora_controlnet", "input_blocks.0.0.up"], "a control-LoRA"),
        (["controlnet_cond_embedding.conv_in.weight", "control_add_embedding.linear_1.weight"], "ControlNet Union"),
        (["controlnet_blocks.0.weight", "transformer_blocks.0.x"], "of a transformer"),
        (["lllite_unet_x.down.0.weight"], "LLLite"),
        (["body.0.block1.weight"], "T2I-Adapter"),
        (["lora_unet_x.lora_up.weight"], "a LoRA"),
        (["model.diffusion_model.x"], "not a ControlNet (its first tensor is model.diffusion_model.x)"),
        (["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.x"], "unknown build"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_files_are_refused_by_name(tmp_path, keys, words):
    save_file({key: torch.zeros(1, 1) for key in keys}, tmp_path / "other.safetensors")
    with pytest.raises(ModelFileError, match=re.escape(words)) as error:
        load_controlnet(tmp_path / "other.safetensors", CPU)
    assert "other.safetensors is" in str(error.value)


def test_pickles_missing_files_and_other_folders_are_refused(tmp_path):
    (tmp_path / "old.pth").write_bytes(b"PK\x03\x04")
    with pytest.raises(ModelFileError, match=r"old\.pth is a pickle"):
        load_controlnet(tmp_path / "old.pth", CPU)
    with pytest.raises(ModelFileError, match="not there any more"):
        load_controlnet(tmp_path / "gone.safetensors", CPU)
    (tmp_path / "flux").mkdir()
    (tmp_path / "flux" / "config.json").write_text(json.dumps({"_class_name": "FluxControlNetModel"}))
    with pytest.raises(ModelFileError, match="flux is a FluxControlNetModel"):
        load_controlnet(tmp_path / "flux", CPU)


def test_the_menu_lists_files_and_folders(tmp_path):
    for name in ("canny.safetensors", "sd15/depth.pth", "pose/config.json", "pose/diffusion_pytorch_model.safetensors",
                 "canny-config/config.json", "notes.txt", ".hidden.safetensors"):  # fmt: skip
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    host = LocalHost(torch.device("cpu"), folders={"controlnet": [tmp_path]})
    assert list(find_controlnets(host)) == ["canny.safetensors", "pose", "sd15/depth.pth"]


def test_the_other_half_precision_is_cast(nine):
    """A ControlNet may be stored in another precision than the UNet."""
    net = tiny_controlnet(nine.unet)
    half = as_loaded(tiny_controlnet(nine.unet).to(torch.bfloat16))
    exact = run(nine, Control(network=as_loaded(net), image=edges()), crop=Crop.AUTO)
    rough = run(nine, Control(network=half, image=edges()), crop=Crop.AUTO)
    assert rough.dtype == torch.float32 and 0 < (exact - rough).abs().max() < 0.1
