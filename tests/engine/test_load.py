"""Recognising and loading models: what is read is what diffusers reads, and what cannot be used is named."""

import json
import shutil
import socket
import struct

import pytest
import torch
from comfyui_mend.engine.host import LocalHost
from comfyui_mend.engine.models import ldm, modules, parts, weight_files
from comfyui_mend.engine.models.detect import CONFIGS, recognise
from comfyui_mend.engine.models.families import supported
from comfyui_mend.engine.models.family import LoadOptions
from comfyui_mend.engine.models.load import find_files, find_models, find_parts, load_model
from comfyui_mend.engine.models.parts import load_tokenizer
from comfyui_mend.engine.models.protocol import Conditioning, PromptSyntax
from comfyui_mend.engine.models.weight_files import DTYPES, choose_weights, read_header, read_json
from comfyui_mend.engine.sampling import encode_guidance
from comfyui_mend.engine.types import InpaintRequest, InputError, ModelFileError
from headers import checkpoint_shapes, write_header
from safetensors.torch import load_file, save_file
from tiny import save_tiny_model, tiny_pipeline
from tiny_single_file import (
    original_state,
    original_state_of,
    original_unet,
    original_vae,
    save_configs,
    save_single_file,
)


def part_config(name, part):
    """Of a shipped folder."""
    return read_json(CONFIGS / name / part / "config.json")


SHIPPED = ("sd15", "sd15-inpaint", "sd2-base", "sd2-v", "sd2-inpaint")


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Loading may not even look a name up."""

    def refuse(*args, **kwargs):
        raise AssertionError(f"network used: {args}")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("saved") / "tiny")


@pytest.fixture
def folder(saved, tmp_path):
    """A diffusers folder that a test may change."""
    return shutil.copytree(saved, tmp_path / "tiny-model")


@pytest.fixture
def host():
    return LocalHost(device=torch.device("cpu"))


def assert_same_weights(model, pipeline, tolerance=0.0):
    for managed, reference in (
        (model.denoiser, pipeline.unet),
        (model.vae, pipeline.vae),
        (model.text_encoder, pipeline.text_encoder),
    ):
        expected, found = reference.state_dict(), managed.module.state_dict()
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(found[key].to(value.dtype), value, rtol=tolerance, atol=tolerance)


def position_ids(model):
    return next(b for name, b in model.text_encoder.module.named_buffers() if name.endswith("position_ids"))


def rewrite(path, change):
    """The tensors of a file, keys and values changed by ``change(state) -> state``."""
    state = {key: value.clone() for key, value in load_file(path).items()}
    save_file(change(state), path)


# --- diffusers folders


def test_a_folder_loads_with_the_weights_diffusers_saved(folder, pipeline, host):
    model = load_model(folder, host)
    assert_same_weights(model, pipeline)
    assert model.facts.name == "tiny-model"
    assert model.facts.conditioning is Conditioning.CONCAT
    assert model.facts.native_size == 128
    assert model.facts.prediction_type == "epsilon"
    assert model.facts.scheduler_config["steps_offset"] == 1


def test_a_loaded_model_paints_what_the_pipelines_modules_paint(folder, pipeline, host):
    model = load_model(folder, host)
    ids = pipeline.tokenizer("a red fox", padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        expected = pipeline.text_encoder(ids)[0]
        found = model.encode_prompt(["a red fox"], PromptSyntax.PLAIN)[0].tokens
        latents = torch.randn(1, 9, 16, 16, generator=torch.Generator().manual_seed(0))
        noise = pipeline.unet(latents, 500, expected).sample
        torch.testing.assert_close(model.denoiser.module(latents, 500, found).sample, noise, rtol=0, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_a_four_channel_folder_is_used_by_replacement(tmp_path, host):
    model = load_model(save_tiny_model(tmp_path / "base", in_channels=4, prediction_type="v_prediction"), host)
    assert model.facts.conditioning is Conditioning.REPLACE
    assert model.facts.prediction_type == "v_prediction"


def test_prediction_type_can_be_overridden(folder, host):
    assert load_model(folder, host, prediction_type="v_prediction").facts.prediction_type == "v_prediction"
    with pytest.raises(InputError, match="'flow'; choose from epsilon, v_prediction"):
        load_model(folder, host, prediction_type="flow")


def test_a_scheduler_that_predicts_something_else_is_refused(folder, host):
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "prediction_type": "sample"}))
    with pytest.raises(ModelFileError, match=r"'sample'.*supported are epsilon, v_prediction"):
        load_model(folder, host)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_weights_take_the_precision_the_host_asks_for(folder, dtype):
    model = load_model(folder, LocalHost(device=torch.device("cpu"), weights_dtype=dtype))
    for managed in (model.denoiser, model.vae, model.text_encoder):
        assert {parameter.dtype for parameter in managed.module.parameters()} == {dtype}
        assert managed.dtype == dtype
    assert torch.equal(position_ids(model), torch.arange(77)[None])


def test_weights_that_fit_are_mapped_and_not_copied(folder, host, monkeypatch):
    read = []
    original = weight_files.read_weights

    def remember(path):
        read.append(original(path))
        return read[-1]

    monkeypatch.setattr(weight_files, "read_weights", remember)
    model = load_model(folder, host)
    addresses = {tensor.data_ptr() for state in read for tensor in state.values()}
    for managed in (model.denoiser, model.vae, model.text_encoder):
        assert all(parameter.data_ptr() in addresses for parameter in managed.module.parameters())


def test_building_draws_no_random_numbers(folder, host):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    load_model(folder, host)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("prefixed", [True, False])
@pytest.mark.parametrize("ids_dtype", [None, torch.int64, torch.float16])
def test_both_spellings_of_clip_keys_load(folder, pipeline, host, prefixed, ids_dtype):
    def respell(state):
        state = {("text_model." if prefixed else "") + key.removeprefix("text_model."): v for key, v in state.items()}
        if ids_dtype is not None:
            key = ("text_model." if prefixed else "") + "embeddings.position_ids"
            state[key] = torch.arange(77)[None].to(ids_dtype)
        return state

    rewrite(folder / "text_encoder" / "model.safetensors", respell)
    model = load_model(folder, host)
    assert_same_weights(model, pipeline)
    assert torch.equal(position_ids(model), torch.arange(77)[None])


def test_a_text_tower_in_an_inner_module_is_filled_too():
    """As transformers before 5.6 builds CLIPTextModel."""

    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.text_model = torch.nn.ModuleDict({"final_layer_norm": torch.nn.LayerNorm(4)})
            self.text_model.register_buffer("position_ids", torch.arange(5)[None], persistent=True)

    weights = {"final_layer_norm.weight": torch.full((4,), 2.0), "final_layer_norm.bias": torch.zeros(4)}
    module = modules.assemble(Wrapped, weights, torch.float32, "old")
    assert torch.equal(module.text_model["final_layer_norm"].weight, weights["final_layer_norm.weight"])
    assert torch.equal(module.text_model.position_ids, torch.arange(5)[None])


def test_vae_attention_of_old_checkpoints_loads(folder, pipeline, host):
    """The published SD 1.5 folders name it query, key, value and proj_attn, some as 1x1 convolutions."""
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}

    def age(state):
        aged = {}
        for key, value in state.items():
            for new, name in old.items():
                if f"attentions.0.{new}." in key:
                    key = key.replace(f"attentions.0.{new}.", f"attentions.0.{name}.")
                    value = value[:, :, None, None] if value.ndim == 2 else value
            aged[key] = value
        assert aged.keys() != state.keys()
        return aged

    rewrite(folder / "vae" / "diffusion_pytorch_model.safetensors", age)
    assert_same_weights(load_model(folder, host), pipeline)


def test_shards_load_as_one(folder, pipeline, host):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    keys = list(state)
    names = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name, part in zip(names, (keys[:100], keys[100:]), strict=True):
        save_file({key: state[key].clone() for key in part}, path.with_name(name))
    weight_map = {key: names[int(index >= 100)] for index, key in enumerate(keys)}
    path.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    path.unlink()
    assert_same_weights(load_model(folder, host), pipeline)

    path.with_name(names[1]).unlink()
    with pytest.raises(ModelFileError, match="tiny-model lacks some of the numbered files of unet/"):
        load_model(folder, host)


@pytest.mark.parametrize(
    ("names", "variants", "expected"),
    [
        (["m.safetensors", "m.fp16.safetensors"], ["", "fp16"], ["m.safetensors"]),
        (["m.safetensors", "m.fp16.safetensors"], ["fp16", ""], ["m.fp16.safetensors"]),
        (["m.fp16.safetensors"], [""], ["m.fp16.safetensors"]),
        (["m.non_ema.safetensors"], [""], None),
        (["m.bin", "m.safetensors.index.json", "mm.safetensors"], [""], None),
        (["m-00001-of-00002.safetensors"], [""], None),
        (
            ["m.fp16-00002-of-00002.safetensors", "m.fp16-00001-of-00002.safetensors", "m.safetensors"],
            ["fp16"],
            ["m.fp16-00001-of-00002.safetensors", "m.fp16-00002-of-00002.safetensors"],
        ),
        (
            ["m-00001-of-00002.fp16.safetensors", "m-00002-of-00002.fp16.safetensors"],
            [""],
            ["m-00001-of-00002.fp16.safetensors", "m-00002-of-00002.fp16.safetensors"],
        ),
    ],
)
def test_weight_files_are_chosen_by_variant(names, variants, expected):
    assert choose_weights(names, "m", variants) == expected


def test_the_variant_that_fits_the_precision_is_preferred(folder):
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    marked = {key: torch.full_like(value, 0.5, dtype=torch.float16) for key, value in load_file(path).items()}
    save_file(marked, path.with_name("diffusion_pytorch_model.fp16.safetensors"))
    half = load_model(folder, LocalHost(device=torch.device("cpu"), weights_dtype=torch.float16))
    full = load_model(folder, LocalHost(device=torch.device("cpu"), weights_dtype=torch.float32))
    assert half.denoiser.module.conv_in.weight.unique().tolist() == [0.5]
    assert full.denoiser.module.conv_in.weight.unique().numel() > 1


def test_the_shipped_tokenizer_stands_in_for_a_missing_one(folder, pipeline, host):
    shutil.rmtree(folder / "tokenizer")
    tokenizer = load_model(folder, host).tokenizer
    text = "A photograph of an astronaut riding a horse, (naïve) — 4k!!"
    assert tokenizer.model_max_length == 77
    assert tokenizer.pad_token == "<|endoftext|>"
    options = {"padding": "max_length", "truncation": True}
    assert tokenizer(text, **options).input_ids == pipeline.tokenizer(text, **options).input_ids


def test_sd2_pads_with_id_zero():
    tokenizer = load_tokenizer(None, part_config("sd2-v", "text_encoder"))
    assert tokenizer("a cat", padding="max_length").input_ids[:6] == [49406, 320, 2368, 49407, 0, 0]
    tokenizer = load_tokenizer(None, part_config("sd15", "text_encoder"))
    assert tokenizer("a cat", padding="max_length").input_ids[:6] == [49406, 320, 2368, 49407, 49407, 49407]


def test_a_broken_tokenizer_is_named(folder, host):
    for file in (folder / "tokenizer").iterdir():
        file.write_text("{")
    with pytest.raises(ModelFileError, match="tiny-model has a tokenizer that cannot be read"):
        load_model(folder, host)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if k != "conv_in.bias"}, r"1 weights are missing \(conv_in.bias\)"),
        (lambda s: {**s, "a.b": torch.ones(1), "c": torch.ones(1)}, r"2 weights are unexpected \(a.b, c\)"),
        (lambda s: {**s, "conv_in.weight": torch.ones(32, 4, 3, 3)}, "conv_in.weight is 32x4x3x3 where 32x9x3x3"),
        (lambda s: {**s, "conv_in.bias": torch.ones(32, dtype=torch.int8)}, "conv_in.bias as torch.int8, a quantised"),
    ],
)
def test_weights_that_do_not_fit_are_named(folder, host, change, message):
    rewrite(folder / "unet" / "diffusion_pytorch_model.safetensors", change)
    with pytest.raises(ModelFileError, match=rf"tiny-model \(unet\).*{message}"):
        load_model(folder, host)


def test_a_folder_with_pickles_only_is_refused_unopened(folder, host):
    for part, stem in (("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model")):
        (folder / part / f"{stem}.safetensors").rename(folder / part / f"{stem}.bin")
    with pytest.raises(ModelFileError, match=r"tiny-model has only unet/diffusion_pytorch_model.bin, a pickle"):
        load_model(folder, host)


def test_a_folder_without_unet_is_refused(folder, host):
    shutil.rmtree(folder / "unet")
    with pytest.raises(ModelFileError, match=r"tiny-model is a folder without unet/config.json"):
        load_model(folder, host)
    (folder / "transformer").mkdir()
    with pytest.raises(ModelFileError, match="tiny-model is a StableDiffusionInpaintPipeline with a transformer"):
        load_model(folder, host)


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("unet", {"addition_embed_type": "text_image"}, "is a model with extra embeddings"),
        ("unet", {"class_embed_type": "projection"}, "is an unCLIP model"),
        ("unet", {"in_channels": 8}, "is an InstructPix2Pix model .* with 8 input channels"),
        ("unet", {"in_channels": 5}, "is a depth-guided model .* with 5 input channels"),
        ("unet", {"_class_name": "UNet3DConditionModel"}, "is a model with a UNet3DConditionModel"),
        ("vae", {"_class_name": "AutoencoderTiny"}, "a vae of type AutoencoderTiny; supported is AutoencoderKL"),
        ("text_encoder", {"model_type": "t5"}, "a text_encoder of type t5; supported is clip_text_model"),
    ],
)
def test_folders_of_other_families_are_named(folder, host, part, change, message):
    path = folder / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ModelFileError, match=f"tiny-model.*{message}"):
        load_model(folder, host)


@pytest.mark.parametrize("missing", ["vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"])
def test_a_folder_that_lacks_a_config_says_which(folder, host, missing):
    (folder / missing).unlink()
    with pytest.raises(ModelFileError, match=f"tiny-model has no {missing}"):
        load_model(folder, host)


def test_a_config_that_is_not_json_is_named(folder, host):
    (folder / "unet" / "config.json").write_text("<html>")
    with pytest.raises(ModelFileError, match=r"unet/config.json is not valid JSON"):
        load_model(folder, host)


# --- single files


@pytest.mark.parametrize("text_layout", ["clip", "bare_clip", "open_clip"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_single_file_loads_whatever_its_spelling(tmp_path, pipeline, host, text_layout, dtype):
    extra = {
        "model_ema.diffusion_modelinput_blocks00weight": torch.ones(2),
        "first_stage_model.loss.logvar": torch.ones(1),
        "alphas_cumprod": torch.ones(1000),
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
    }
    if text_layout != "clip":
        del extra["cond_stage_model.transformer.text_model.embeddings.position_ids"]
    path = save_single_file(tmp_path / "t.safetensors", pipeline, dtype=dtype, text_layout=text_layout, extra=extra)
    model = load_model(path, host)
    assert_same_weights(model, pipeline, tolerance=0.0 if dtype == torch.float32 else 1e-3)
    assert model.facts.name == "t.safetensors"
    assert model.facts.native_size == 128


def test_a_single_file_equals_what_diffusers_reads_from_it(tmp_path, pipeline, host):
    from diffusers import AutoencoderKL, UNet2DConditionModel

    path = save_single_file(tmp_path / "tiny.safetensors", pipeline)
    config = str(tmp_path / "tiny-config")
    model = load_model(path, host)
    for managed, model_class, part in (
        (model.denoiser, UNet2DConditionModel, "unet"),
        (model.vae, AutoencoderKL, "vae"),
    ):
        reference = model_class.from_single_file(str(path), config=config, subfolder=part, local_files_only=True)
        found = managed.module.state_dict()
        assert found.keys() == reference.state_dict().keys()
        assert all(torch.equal(found[key], value) for key, value in reference.state_dict().items())


def test_open_clip_equals_what_diffusers_converts(pipeline, monkeypatch):
    from diffusers.loaders import single_file_utils

    state = original_state(pipeline, "open_clip")
    config = pipeline.text_encoder.config.to_dict()
    ours = ldm.convert_open_clip(ldm.component(state, ldm.OPEN_CLIP_PREFIX), config)
    # its list of what to leave out is written for 24 layers
    dropped = [key for key in state if "resblocks.3." in key]
    monkeypatch.setattr(single_file_utils, "SD_2_TEXT_ENCODER_KEYS_TO_IGNORE", dropped)
    theirs = single_file_utils.convert_open_clip_checkpoint(pipeline.text_encoder, state)
    theirs = {key.removeprefix("text_model."): value for key, value in theirs.items()}
    assert theirs.keys() == ours.keys() - {"logit_scale", "text_projection"} | {"text_projection.weight"}
    for key, value in ours.items():
        if key in theirs:
            assert torch.equal(value, theirs[key]), key


@pytest.mark.parametrize("name", SHIPPED)
def test_key_names_cover_the_full_size_networks(name):
    """Forth by our map and back by diffusers' converter, on weights without storage."""
    from diffusers.loaders import single_file_utils

    unet_config, vae_config = part_config(name, "unet"), part_config(name, "vae")
    with torch.device("meta"):
        unet, vae = parts.build_unet(unet_config), parts.build_vae(vae_config)
    for module, names, prefix, convert in (
        (unet, ldm.unet_names(unet_config), ldm.UNET_PREFIX, single_file_utils.convert_ldm_unet_checkpoint),
        (vae, ldm.vae_names(vae_config), ldm.VAE_PREFIX, single_file_utils.convert_ldm_vae_checkpoint),
    ):
        inverse = {new: old for old, new in names.items()}
        original = {prefix + ldm.rename(key, inverse): value for key, value in module.state_dict().items()}
        assert {ldm.rename(key[len(prefix) :], names) for key in original} == set(module.state_dict())
        theirs = convert(original, dict(module.config))
        assert {key: value.shape for key, value in theirs.items()} == {
            key: value.shape for key, value in module.state_dict().items()
        }


def test_a_config_folder_can_be_given(tmp_path, pipeline, host):
    path = save_single_file(tmp_path / "tiny.safetensors", pipeline)
    (tmp_path / "tiny-config").rename(tmp_path / "elsewhere")
    with pytest.raises(ModelFileError, match=r"unusual size.*tiny-config"):
        load_model(path, host)
    assert_same_weights(load_model(path, host, config=tmp_path / "elsewhere"), pipeline)


def test_a_file_that_does_not_fit_its_config_is_named(tmp_path, pipeline, host):
    path = save_single_file(tmp_path / "tiny.safetensors", pipeline)
    save_configs(tmp_path / "tiny-config", tiny_pipeline(in_channels=4))
    with pytest.raises(ModelFileError, match=r"tiny.safetensors \(unet\).*conv_in.weight is 32x9x3x3 where 32x4x3x3"):
        load_model(path, host)


@pytest.mark.parametrize(("prefix", "part"), [("first_stage_model.", "VAE"), ("cond_stage_model.", "text encoder")])
def test_a_file_without_a_part_says_which(tmp_path, pipeline, host, prefix, part):
    path = save_single_file(tmp_path / "tiny.safetensors", pipeline)
    rewrite(path, lambda state: {key: value for key, value in state.items() if not key.startswith(prefix)})
    with pytest.raises(ModelFileError, match=f"tiny.safetensors holds a UNet but no {part}: choose .* full checkpoint"):
        load_model(path, host)


# --- parts of one's own


@pytest.fixture(scope="module")
def other():
    """Another VAE for the same model, which shows which of the two is in use."""
    return tiny_pipeline(seed=9).vae


def save_state(path, state):
    save_file({key: value.contiguous().clone() for key, value in state.items()}, path)
    return path


def assert_same_vae(model, expected):
    found, expected = model.vae.module.state_dict(), expected.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize(
    "spelling", ["original", "original, prefixed", "diffusers", "folder", "pipeline", "checkpoint"]
)
@pytest.mark.parametrize("base", ["folder", "file"])
def test_a_vae_is_replaced_from_any_layout(tmp_path, folder, pipeline, other, host, spelling, base):
    path = tmp_path / "other.safetensors"
    if spelling.startswith("original"):
        save_state(path, original_vae(other, "first_stage_model." if "prefixed" in spelling else ""))
    elif spelling == "diffusers":
        save_state(path, other.state_dict())
    elif spelling == "folder":
        other.save_pretrained(path := tmp_path / "other")
    else:
        whole = tiny_pipeline(seed=3)
        whole.vae = other
        path = tmp_path / "whole" if spelling == "pipeline" else tmp_path / "whole.safetensors"
        whole.save_pretrained(path) if spelling == "pipeline" else save_single_file(path, whole)
    model_path = folder if base == "folder" else save_single_file(tmp_path / "tiny.safetensors", pipeline)
    model = load_model(model_path, host, vae=path)
    assert_same_vae(model, other)
    with pytest.raises(AssertionError):
        assert_same_vae(model, pipeline.vae)
    unet = model.denoiser.module.state_dict()
    assert all(torch.equal(unet[key], value) for key, value in pipeline.unet.state_dict().items())


def test_what_is_no_vae_of_this_family_is_refused(tmp_path, folder, other, host):
    unet = write_header(tmp_path / "unet.safetensors", {"input_blocks.0.0.weight": (4, 4, 3, 3)})
    with pytest.raises(ModelFileError, match=r"unet.safetensors is a diffusion model .*, where a VAE belongs"):
        load_model(folder, host, vae=unet)
    flux = write_header(tmp_path / "ae.safetensors", {"decoder.conv_in.weight": (512, 16, 3, 3)})
    with pytest.raises(
        ModelFileError, match=r"ae.safetensors is a VAE of 16 channels where .* 1.x has a VAE of 4 channels"
    ):
        load_model(folder, host, vae=flux)
    other.save_pretrained(tmp_path / "sdxl-vae")
    path = tmp_path / "sdxl-vae" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "scaling_factor": 0.13025}))
    with pytest.raises(
        ModelFileError, match=r"sdxl-vae is the VAE of another family \(scaling_factor is 0.13025 where"
    ):
        load_model(folder, host, vae=tmp_path / "sdxl-vae")
    path.write_text(json.dumps({"_class_name": "AutoencoderTiny"}))
    with pytest.raises(
        ModelFileError, match=r"sdxl-vae is a VAE of type AutoencoderTiny where .* has AutoencoderKL: choose one"
    ):
        load_model(folder, host, vae=tmp_path / "sdxl-vae")


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_split_files_of_stable_diffusion_load(tmp_path, pipeline, host, prefix):
    unet = save_state(tmp_path / "unet.safetensors", original_unet(pipeline.unet, prefix))
    vae = save_state(tmp_path / "vae.safetensors", original_vae(pipeline.vae, ""))
    clip = save_state(tmp_path / "clip.safetensors", pipeline.text_encoder.state_dict())
    save_configs(tmp_path / "unet-config", pipeline)
    assert_same_weights(load_model(unet, host, vae=vae, text_encoders=[clip]), pipeline)


def test_a_text_encoder_is_swapped(tmp_path, folder, pipeline, host):
    swapped = tiny_pipeline(seed=4).text_encoder
    clip = save_state(tmp_path / "clip.safetensors", swapped.state_dict())
    found = load_model(folder, host, text_encoders=[clip]).text_encoder.module.state_dict()
    assert all(torch.equal(found[key], value) for key, value in swapped.state_dict().items())


@pytest.mark.parametrize("skip", [1, 2, 3])
def test_clip_skip_counts_layers_from_the_last_as_one(folder, pipeline, host, skip):
    model = load_model(folder, host, options=LoadOptions(clip_skip=skip))
    ids = pipeline.tokenizer("a red fox", padding="max_length", return_tensors="pt").input_ids
    encoder = pipeline.text_encoder
    with torch.no_grad():
        hidden = encoder(ids, output_hidden_states=True).hidden_states[-skip]
        expected = getattr(encoder, "text_model", encoder).final_layer_norm(hidden)
    (found,) = model.encode_prompt(["a red fox"], PromptSyntax.PLAIN)
    torch.testing.assert_close(found.tokens, expected, rtol=0, atol=1e-6)
    (plain,) = load_model(folder, host).encode_prompt(["a red fox"], PromptSyntax.PLAIN)
    assert torch.equal(plain.tokens, found.tokens) == (skip == 1)


def test_a_negative_of_zeros_is_asked_for(folder, host):
    """Only where there is nothing to encode."""
    model = load_model(folder, host)
    image = torch.zeros(1, 64, 64, 3)

    def negative(**options):
        request = InpaintRequest(image=image, mask=image[..., 0], **options)
        return encode_guidance(request, model, PromptSyntax.COMFY).negative.tokens

    assert not negative(zero_negative=True).any()
    assert negative().any()
    assert torch.equal(negative(zero_negative=True, negative_prompt="fog"), negative(negative_prompt="fog"))


# --- recognition


@pytest.mark.parametrize(
    ("context", "channels", "spread", "override", "expected"),
    [
        (768, 4, 0.5, None, "sd15"),
        (768, 9, 0.5, None, "sd15-inpaint"),
        (1024, 4, 0.05, None, "sd2-base"),
        (1024, 4, 0.15, None, "sd2-v"),
        (1024, 4, 0.15, "epsilon", "sd2-base"),
        (1024, 4, 0.05, "v_prediction", "sd2-v"),
        (1024, 9, 0.15, None, "sd2-inpaint"),
    ],
)
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_the_header_tells_the_family(tmp_path, context, channels, spread, override, expected, dtype):
    bias = torch.tensor([spread, -spread]).repeat(160).to(DTYPES[dtype])
    data = bias.view(torch.uint8).numpy().tobytes()
    path = write_header(tmp_path / "m.safetensors", checkpoint_shapes(context, channels), dtype, data)
    assert (recognise(path).variant == "inpaint") == (channels == 9)
    assert find_parts(path, prediction_type=override).folder == CONFIGS / expected


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (checkpoint_shapes(1280), "is the SDXL refiner: choose an SDXL base or inpainting model"),
        (checkpoint_shapes(1024) | {f"{ldm.UNET_PREFIX}label_emb.0.0.weight": (4, 4)}, "is an unCLIP model"),
        (checkpoint_shapes(768, 8), "is an InstructPix2Pix model .* with 8 input channels"),
        (checkpoint_shapes(1024, 5), "is a depth-guided model .* with 5 input channels"),
        ({f"{ldm.UNET_PREFIX}input_blocks.0.0.weight": (4, 4, 3, 3)}, "a diffusion model that reads no prompt"),
        ({"lora_unet_down_blocks_0.lora_down.weight": (4, 4)}, "is a LoRA: choose the model it was made for"),
        ({"unet.down_blocks.0.attentions.0.to_q.lora_A.weight": (4, 4)}, "is a LoRA"),
        ({"control_model.input_hint_block.0.weight": (4, 4)}, "is a ControlNet"),
        ({"controlnet_cond_embedding.conv_in.weight": (4, 4), "down_blocks.0.a": (4,)}, "is a ControlNet"),
        ({"image_proj.proj.weight": (4, 4)}, "is an IP-Adapter"),
        ({"emb_params": (2, 768)}, "is a textual inversion embedding: put it in models/embeddings"),
        ({"decoder.conv_in.weight": (512, 4, 3, 3)}, "is a VAE alone"),
        ({"text_model.encoder.layers.0.mlp.fc1.weight": (4, 4)}, "is a text encoder alone"),
        ({"concept_embeds": (17, 768), "vision_model.a": (4,)}, "is a safety checker"),
        ({"body.0.rdb1.conv1.weight": (4, 4)}, r"no known model \(its first tensor is body.0.rdb1.conv1.weight\)"),
        ({}, "holds no tensors"),
    ],
)
def test_other_models_are_named(tmp_path, host, shapes, message):
    path = write_header(tmp_path / "other.safetensors", shapes)
    with pytest.raises(ModelFileError, match=f"^other.safetensors .*{message}") as caught:
        load_model(path, host)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"PK\x03\x04" + bytes(100), "is a PyTorch pickle archive.*get the .safetensors version"),
        (b"\x80\x02}q\x00." + bytes(100), "is a Python pickle"),
        (b"<!DOCTYPE html><html>" + b" " * 100, "is a web page"),
        (b"\n<html><body>Sign in</body></html>", "is a web page"),
        (b'{"error":"Repository not found"}', "is an error message from a web server"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "is a Git LFS pointer.*git lfs pull"),
        (b"GGUF\x03\x00\x00\x00" + bytes(100), "is a GGUF file"),
        (b"\x00" * 4096, "is not a safetensors file"),
        (b"\xff" * 4096, "is not a safetensors file"),
        (b"abc", "is incomplete"),
        (struct.pack("<Q", 500) + b'{"a":', "is incomplete: it has 13 bytes where at least 508 belong"),
        (struct.pack("<Q", 7) + b'{"a": 1', "is damaged: its header"),
        (struct.pack("<Q", 8) + b'{"a": 1}', "is damaged: its header"),
    ],
)
def test_files_that_are_no_models_are_named(tmp_path, host, content, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=f"^model.safetensors {message}") as caught:
        load_model(path, host)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0.999, 0.5, 0.01, 0.0001])
def test_truncated_files_are_named(tmp_path, pipeline, host, keep):
    path = save_single_file(tmp_path / "tiny.safetensors", pipeline)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    with pytest.raises(ModelFileError, match=r"tiny.safetensors is incomplete: it has [\d,]+ bytes where"):
        load_model(path, host)
    path.write_bytes(content + b"more")
    with pytest.raises(ModelFileError, match=r"tiny.safetensors is damaged: 4 bytes follow"):
        load_model(path, host)


def test_a_truncated_file_in_a_folder_is_named(folder, host):
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ModelFileError, match=r"diffusion_pytorch_model.safetensors is incomplete"):
        load_model(folder, host)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": "2", "data_offsets": None},
        [],
    ],
)
def test_a_header_that_contradicts_itself_is_damaged(tmp_path, entry):
    raw = json.dumps({"a": entry}).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(8))
    with pytest.raises(ModelFileError, match="is damaged: its header cannot be read"):
        read_header(path)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin"])
def test_pickles_are_refused_by_name_and_never_opened(tmp_path, host, suffix):
    class Trap:
        def __reduce__(self):
            return (tmp_path.joinpath("opened").write_text, ("yes",))

    path = tmp_path / f"model{suffix}"
    torch.save({"state_dict": Trap()}, path)
    for name in (path.name, "renamed.safetensors"):
        path = path.rename(tmp_path / name)
        with pytest.raises(ModelFileError, match=f"{name} is a .*pickle.*get the .safetensors version"):
            load_model(path, host)
    assert not (tmp_path / "opened").exists()


def test_a_model_that_is_gone_is_named(tmp_path, host):
    with pytest.raises(ModelFileError, match=r"gone.safetensors is not there any more"):
        load_model(tmp_path / "gone.safetensors", host)


def test_only_the_header_and_one_bias_are_read(tmp_path):
    """A sparse file of 3 GiB would take seconds to read and its mapping shows in the process's size."""
    shapes = checkpoint_shapes(1024) | {f"{ldm.UNET_PREFIX}big.{i}": (2**28,) for i in range(6)}
    path = write_header(tmp_path / "big.safetensors", shapes)
    assert path.stat().st_size > 3 * 2**30
    read = []
    original = type(path).open

    class Counted:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def seek(self, place):
            self.file.seek(place)

        def read(self, size):
            read.append(size)
            return self.file.read(size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(path), "open", lambda self, mode: Counted(original(self, mode)))
        assert find_parts(path).folder.name == "sd2-base"
    assert sum(read) < 10_000


# --- shipped configs


@pytest.mark.parametrize(
    ("name", "channels", "native", "prediction"),
    [
        ("sd15", 4, 512, "epsilon"),
        ("sd15-inpaint", 9, 512, "epsilon"),
        ("sd2-base", 4, 512, "epsilon"),
        ("sd2-v", 4, 768, "v_prediction"),
        ("sd2-inpaint", 9, 512, "epsilon"),
    ],
)
def test_shipped_configs_have_the_published_sizes(name, channels, native, prediction):
    with torch.device("meta"):
        unet = parts.build_unet(part_config(name, "unet"))
        vae = parts.build_vae(part_config(name, "vae"))
        text_encoder = parts.build_clip(part_config(name, "text_encoder"))
    millions = {part: sum(p.numel() for p in module.parameters()) / 1e6 for part, module in
                (("unet", unet), ("vae", vae), ("text", text_encoder))}  # fmt: skip
    sd2 = name.startswith("sd2")
    # the first convolution of a 9-channel UNet has 5 * 320 * 9 weights more
    base = (865.911 if sd2 else 859.521) + (channels - 4) * 320 * 9 / 1e6
    assert millions["unet"] == pytest.approx(base, abs=0.0006)
    assert millions["vae"] == pytest.approx(83.6539, abs=0.0001)
    assert millions["text"] == pytest.approx(340.3878 if sd2 else 123.0604, abs=0.0001)
    assert unet.conv_in.in_channels == channels
    scheduler = read_json(CONFIGS / name / "scheduler" / "scheduler_config.json")
    assert scheduler["prediction_type"] == prediction and scheduler["clip_sample"] is False
    assert part_config(name, "vae")["scaling_factor"] == 0.18215
    assert part_config(name, "vae")["latent_channels"] == 4
    assert part_config(name, "unet")["sample_size"] * 8 == native


def test_sd2_has_the_heads_of_its_paper():
    with torch.device("meta"):
        unet = parts.build_unet(part_config("sd2-base", "unet"))
        text_encoder = parts.build_clip(part_config("sd2-base", "text_encoder"))
    heads = [block.attentions[0].transformer_blocks[0].attn1.heads for block in unet.down_blocks[:3]]
    assert heads == [5, 10, 20]  # 64 channels each
    assert isinstance(unet.mid_block.attentions[0].proj_in, torch.nn.Linear)
    assert text_encoder.config.num_hidden_layers == 23
    assert text_encoder.config.hidden_act == "gelu"


@pytest.mark.parametrize("name", ["sd15-inpaint", "sd2-v"])
def test_a_single_file_of_full_size_loads_with_the_shipped_config(tmp_path, name):
    """A sparse file of zeros under the published names: 2 GiB that take no room and are never read."""
    with torch.device("meta"):
        published_modules = (
            parts.build_unet(part_config(name, "unet")),
            parts.build_vae(part_config(name, "vae")),
            parts.build_clip(part_config(name, "text_encoder")),
        )
    original = original_state_of(*published_modules, open_clip="sd2" in name)
    shapes = {key: tuple(value.shape) for key, value in original.items()}
    path = write_header(tmp_path / f"{name}.safetensors", shapes)
    prediction_type = "v_prediction" if name == "sd2-v" else None
    host = LocalHost(device=torch.device("cpu"), weights_dtype=torch.float16)
    model = load_model(path, host, prediction_type=prediction_type)
    loaded = (model.denoiser.module, model.vae.module, model.text_encoder.module)
    for module, published in zip(loaded, published_modules, strict=True):
        assert {key: value.shape for key, value in module.state_dict().items()} == {
            key: value.shape for key, value in published.state_dict().items()
        }
    assert model.facts.native_size == (768 if name == "sd2-v" else 512)
    assert model.tokenizer.pad_token == ("!" if "sd2" in name else "<|endoftext|>")


# --- the menu


def test_models_are_found_below_their_folders(tmp_path):
    first, second, files = tmp_path / "diffusers", tmp_path / "more", tmp_path / "checkpoints"
    for folder in (first / "Zebra", first / "author" / "model", second / "Zebra", first / ".growing" / "half"):
        (folder / "unet").mkdir(parents=True)
        (folder / "unet" / "config.json").write_text("{}")
    (first / "indexed").mkdir()
    (first / "indexed" / "model_index.json").write_text("{}")
    (first / "empty").mkdir()
    (files / "SD 1.5" / "sub").mkdir(parents=True)
    for name in ("a.safetensors", "SD 1.5/sub/B.SAFETENSORS", "old.ckpt", "notes.txt", ".hidden.safetensors"):
        (files / name).write_bytes(b"")
    (files / "a-config" / "unet").mkdir(parents=True)
    (files / "a-config" / "unet" / "config.json").write_text("{}")
    (files / "loop").symlink_to(files, target_is_directory=True)
    host = LocalHost(
        device=torch.device("cpu"),
        folders={"diffusers": [first, second, tmp_path / "missing"], "checkpoints": [files]},
    )
    found = find_models(host)
    assert list(found) == ["a.safetensors", "author/model", "indexed", "SD 1.5/sub/B.SAFETENSORS", "Zebra"]
    assert found["Zebra"] == first / "Zebra"
    assert found["author/model"] == first / "author" / "model"


def test_split_networks_are_models_and_their_parts_are_not(tmp_path):
    for name in (
        "checkpoints/one",
        "diffusion_models/SDXL/unet",
        "diffusion_models/one",
        "vae/sdxl",
        "text_encoders/g",
    ):
        path = tmp_path / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    kinds = ("checkpoints", "diffusion_models", "vae", "text_encoders")
    host = LocalHost(device=torch.device("cpu"), folders={kind: [tmp_path / kind] for kind in kinds})
    assert list(find_models(host)) == ["one.safetensors", "SDXL/unet.safetensors"]
    assert find_models(host)["one.safetensors"].parent.name == "checkpoints"
    assert find_files(host, "vae") == {"sdxl.safetensors": tmp_path / "vae" / "sdxl.safetensors"}


def test_a_pipeline_is_not_searched_for_more(tmp_path, folder):
    shutil.copytree(folder, folder / "inner")
    host = LocalHost(device=torch.device("cpu"), folders={"diffusers": [tmp_path]})
    assert list(find_models(host)) == ["tiny-model"]


def test_supported_families_are_listed_in_refusals():
    assert supported().startswith("Stable Diffusion 1.x, Stable Diffusion 2.x")
