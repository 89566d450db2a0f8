"""What a file is, told by its header alone: fixtures are keys and shapes, at the published sizes where they count."""

import json
import struct

import pytest
import torch
from comfyui_mend.engine.host import LocalHost
from comfyui_mend.engine.models import detect
from comfyui_mend.engine.models.detect import CONFIGS, Kind, TextEncoder, recognise, recognise_folder
from comfyui_mend.engine.models.families import FAMILIES
from comfyui_mend.engine.models.load import find_parts, load_model
from comfyui_mend.engine.models.weight_files import read_header
from comfyui_mend.engine.types import InputError, ModelFileError
from headers import write_header

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")


def ldm_unet(context, channels=4, **more):
    """The telling part of a UNet in the original layout."""
    return {
        "input_blocks.0.0.weight": (320, channels, 3, 3),
        "middle_block.1.transformer_blocks.0.attn2.to_k.weight": (1280, context),
        "out.2.weight": (4, 320, 3, 3),
        **more,
    }


def diffusers_unet(context, channels=4, **more):
    return {
        "conv_in.weight": (320, channels, 3, 3),
        "down_blocks.0.resnets.0.conv1.weight": (320, 320, 3, 3),
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": (1280, context),
        **more,
    }


SDXL_LABELS = {"label_emb.0.0.weight": (1280, 2816)}
SDXL_ADDED = {"add_embedding.linear_1.weight": (1280, 2816)}


def flux(width, guided=True, norm="scale", **more):
    """BFL's layout."""
    guidance = {"guidance_in.in_layer.weight": (3072, 256)} if guided else {}
    return {
        "img_in.weight": (3072, width),
        "double_blocks.0.img_attn.qkv.weight": (9216, 3072),
        f"double_blocks.0.img_attn.norm.key_norm.{norm}": (128,),
        "single_blocks.0.linear1.weight": (21504, 3072),
        **guidance,
        **more,
    }


def diffusers_flux(width, guided=True):
    guidance = {"time_text_embed.guidance_embedder.linear_1.weight": (3072, 256)} if guided else {}
    return {
        "x_embedder.weight": (3072, width),
        "transformer_blocks.0.attn.to_q.weight": (3072, 3072),
        "single_transformer_blocks.0.attn.to_q.weight": (3072, 3072),
        **guidance,
    }


def sd3(depth, channels=16, **more):
    return {
        "x_embedder.proj.weight": (64 * depth, channels, 2, 2),
        "joint_blocks.0.context_block.attn.qkv.weight": (3 * 64 * depth, 64 * depth),
        **more,
    }


DUAL = {"joint_blocks.0.x_block.attn2.qkv.weight": (4608, 1536)}
NORMED = {"joint_blocks.0.context_block.attn.ln_q.weight": (64,)}
QWEN = {
    "img_in.weight": (3072, 64),
    "txt_norm.weight": (3584,),
    "transformer_blocks.0.attn.add_q_proj.weight": (3072, 3072),
}


def lumina(width):
    return {
        "x_embedder.weight": (width, 64),
        "cap_embedder.1.weight": (width, 2560),
        "noise_refiner.0.attention.qkv.weight": (3 * width, width),
    }


MODELS = [
    (ldm_unet(768), "sd1", "", "a Stable Diffusion 1.x model"),
    (ldm_unet(768, 9), "sd1", "inpaint", "a Stable Diffusion 1.x inpainting model"),
    (ldm_unet(768, 8), "sd1", "ip2p", "an InstructPix2Pix model"),
    (ldm_unet(1024), "sd2", "", "a Stable Diffusion 2.x model"),
    (ldm_unet(1024, 9), "sd2", "inpaint", "a Stable Diffusion 2.x inpainting model"),
    (ldm_unet(1024, 5), "sd2", "depth", "a depth-guided model"),
    (ldm_unet(1024, 7), "sd2", "upscaler", "an upscaler"),
    (ldm_unet(1024, **{"label_emb.0.0.weight": (1280, 2048)}), "sd2", "unclip", "an unCLIP model"),
    (ldm_unet(2048, **SDXL_LABELS), "sdxl", "", "an SDXL model"),
    (ldm_unet(2048, 9, **SDXL_LABELS), "sdxl", "inpaint", "an SDXL inpainting model"),
    (ldm_unet(2048, 8, **SDXL_LABELS), "sdxl", "ip2p", "an InstructPix2Pix model"),
    (ldm_unet(1280, **{"label_emb.0.0.weight": (1536, 2560)}), "sdxl-refiner", "", "the SDXL refiner"),
    (ldm_unet(2048, **{"label_emb.0.0.weight": (1280, 5632)}), "kolors", "", "a Kolors model"),
    (
        {
            "input_blocks.0.0.weight": (320, 4, 3, 3),
            "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": (640, 2048),
            **SDXL_LABELS,
        },
        "sdxl",
        "pruned",
        "an SDXL model with parts left out",
    ),
    (diffusers_unet(768), "sd1", "", "a Stable Diffusion 1.x model"),
    (diffusers_unet(1024, 9), "sd2", "inpaint", "a Stable Diffusion 2.x inpainting model"),
    (diffusers_unet(2048, **SDXL_ADDED), "sdxl", "", "an SDXL model"),
    (diffusers_unet(2048, 9, **SDXL_ADDED), "sdxl", "inpaint", "an SDXL inpainting model"),
    (diffusers_unet(1280, **{"add_embedding.linear_1.weight": (1536, 2560)}), "sdxl-refiner", "", "the SDXL refiner"),
    (flux(64), "flux", "dev", "a FLUX model"),
    (flux(64, norm="weight"), "flux", "dev", "a FLUX model"),
    (flux(64, guided=False), "flux", "schnell", "a FLUX schnell model"),
    (flux(384), "flux", "fill", "a FLUX Fill model"),
    (flux(128), "flux", "control", "a FLUX canny or depth model"),
    (flux(64, False, **{"distilled_guidance_layer.in_proj.weight": (5120, 64)}), "chroma", "", "a Chroma model"),
    (diffusers_flux(64), "flux", "dev", "a FLUX model"),
    (diffusers_flux(64, guided=False), "flux", "schnell", "a FLUX schnell model"),
    (diffusers_flux(384), "flux", "fill", "a FLUX Fill model"),
    (
        {
            "img_in.weight": (6144, 128),
            "txt_in.weight": (6144, 15360),
            "double_blocks.0.img_attn.qkv.weight": (18432, 6144),
            "single_stream_modulation.lin.weight": (18432, 6144),
        },
        "flux2",
        "",
        "a FLUX.2 model",
    ),
    (sd3(24), "sd3", "3-medium", "a Stable Diffusion 3 model"),
    (sd3(24, **DUAL, **NORMED), "sd3", "3.5-medium", "a Stable Diffusion 3.5 Medium model"),
    (sd3(38, **NORMED), "sd3", "3.5-large", "a Stable Diffusion 3.5 Large model"),
    (sd3(24, 33), "sd3", "other", "a Stable Diffusion 3 model with 33 input channels"),
    (QWEN, "qwen-image", "", "a Qwen-Image model"),
    ({**QWEN, "__index_timestep_zero__": (0,)}, "qwen-image-edit-2511", "still", "a Qwen-Image-Edit model"),
    (
        {**QWEN, "time_text_embed.addition_t_embedding.weight": (2, 3072)},
        "qwen-image",
        "layered",
        "a Qwen-Image-Layered model",
    ),
    ({**QWEN, "img_in.weight": (3072, 128)}, "mage-flow", "", "a Mage-Flow model"),
    (lumina(3840), "z-image", "", "a Z-Image model"),
    (lumina(2304), "lumina2", "", "a Lumina 2 model"),
]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize(("shapes", "family", "variant", "what"), MODELS, ids=lambda value: str(value)[:40])
def test_a_denoiser_is_told_with_and_without_a_prefix(tmp_path, prefix, shapes, family, variant, what):
    """diffusers takes SDXL and SD 2 inpainting UNets without a prefix for SD 1, and SDXL inpainting with one too."""
    path = write_header(tmp_path / "m.safetensors", {prefix + key: shape for key, shape in shapes.items()})
    found = recognise(path)
    assert (found.kind, found.family, found.variant, found.prefix) == (Kind.MODEL, family, variant, prefix)
    assert found.what.startswith(what)


def test_what_is_in_a_checkpoint_beside_the_denoiser_changes_nothing(tmp_path):
    """The VAE of a checkpoint has a decoder.conv_in, its text encoder the keys of one."""
    beside = {
        "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768),
        "conditioner.embedders.1.model.transformer.resblocks.0.mlp.c_fc.weight": (5120, 1280),
    }
    unet = {f"model.diffusion_model.{key}": shape for key, shape in ldm_unet(2048, 9, **SDXL_LABELS).items()}
    for shapes in ({**beside, **unet}, {**unet, **beside}):
        found = recognise(write_header(tmp_path / "m.safetensors", shapes))
        assert (found.family, found.variant) == ("sdxl", "inpaint")


@pytest.mark.parametrize(
    ("markers", "scheduler", "variant"),
    [
        ((), {}, ""),
        (("v_pred",), {"prediction_type": "v_prediction"}, ""),
        (
            ("v_pred", "ztsnr"),
            {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
            "",
        ),
        (("ztsnr",), {}, ""),
        (("edm_mean", "edm_std"), {}, "edm"),
        (("edm_vpred.sigma_max", "v_pred"), {"prediction_type": "v_prediction"}, "edm"),
    ],
)
def test_sdxl_says_what_it_was_trained_on(tmp_path, markers, scheduler, variant):
    shapes = {**ldm_unet(2048, **SDXL_LABELS), **dict.fromkeys(markers, (1,))}
    found = recognise(write_header(tmp_path / "m.safetensors", shapes))
    assert (found.variant, dict(found.scheduler)) == (variant, scheduler)


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32", "F8_E4M3"])
@pytest.mark.parametrize(("spread", "variant"), [(0.05, ""), (0.15, "v")])
def test_sd2_is_told_by_the_spread_of_one_bias(tmp_path, layout, dtype, spread, variant):
    """Its two kinds have the same shapes."""
    block = "transformer_blocks.0.norm1.bias"
    if layout == "original":
        shapes = {f"output_blocks.11.1.{block}": (320,), **ldm_unet(1024)}
    else:
        shapes = {f"up_blocks.3.attentions.2.{block}": (320,), **diffusers_unet(1024)}
    bias = torch.tensor([spread, -spread]).repeat(160).to(detect.DTYPES[dtype])
    path = write_header(tmp_path / "m.safetensors", shapes, dtype, bias.view(torch.uint8).numpy().tobytes())
    assert recognise(path).variant == variant


@pytest.mark.parametrize(
    ("shapes", "encoder"),
    [
        ({"text_model.encoder.layers.{}.mlp.fc1.weight": (3072, 768)}, TextEncoder("clip", 768, 12)),
        ({"encoder.layers.{}.mlp.fc1.weight": (5120, 1280)}, TextEncoder("clip", 1280, 12)),
        ({"transformer.resblocks.{}.mlp.c_fc.weight": (4096, 1024)}, TextEncoder("clip", 1024, 12)),
        ({"encoder.block.{}.layer.0.SelfAttention.q.weight": (4096, 4096)}, TextEncoder("t5", 4096, 12)),
    ],
)
def test_text_encoders_are_told_by_architecture_width_and_depth(tmp_path, shapes, encoder):
    shapes = {key.format(layer): shape for key, shape in shapes.items() for layer in range(12)}
    found = recognise(write_header(tmp_path / "m.safetensors", shapes))
    assert (found.kind, found.text_encoder) == (Kind.TEXT_ENCODER, encoder)


@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model."])
@pytest.mark.parametrize("channels", [4, 16, 32])
def test_vaes_are_told_by_their_channels(tmp_path, prefix, channels):
    shapes = {
        f"{prefix}decoder.conv_in.weight": (512, channels, 3, 3),
        f"{prefix}encoder.conv_in.weight": (128, 3, 3, 3),
    }
    found = recognise(write_header(tmp_path / "m.safetensors", shapes))
    assert (found.kind, found.latent_channels, found.prefix) == (Kind.VAE, channels, prefix)


WAN_FILE = {"decoder.conv1.weight": (384, 16, 3, 3, 3), "decoder.middle.0.residual.0.gamma": (384, 1, 1, 1)}
WAN_FOLDER = {"decoder.conv_in.weight": (384, 16, 3, 3, 3)}


@pytest.mark.parametrize("prefix", ["first_stage_model.", "vae.", ""])
@pytest.mark.parametrize("shapes", [WAN_FILE, WAN_FOLDER], ids=["Wan's names", "diffusers' names"])
def test_vaes_of_films_are_told_from_those_of_pictures(tmp_path, prefix, shapes):
    named = {prefix + key: shape for key, shape in shapes.items()}
    found = recognise(write_header(tmp_path / "m.safetensors", named))
    assert (found.kind, found.vae_class, found.latent_channels) == (Kind.VAE, "AutoencoderKLQwenImage", 16)
    assert found.what == "a VAE of Wan or Qwen-Image"


def language_model(layer, *more, layers=3):
    shapes = {f"{layer.format(number)}mlp.gate_proj.weight": (18944, 3584) for number in range(layers)}
    return shapes | dict.fromkeys(more, (512,))


@pytest.mark.parametrize("layer", ["model.layers.{}.", "model.language_model.layers.{}.", "language_model.layers.{}."])
def test_qwens_language_model_is_told_from_others(tmp_path, layer):
    bias, eyes = f"{layer.format(0)}self_attn.k_proj.bias", "visual.blocks.0.mlp.gate_proj.weight"
    eyes = f"model.{eyes}" if layer.startswith("model.language") else eyes
    found = recognise(write_header(tmp_path / "m.safetensors", language_model(layer, bias, eyes)))
    assert found.text_encoder == TextEncoder("qwen2_5_vl", 3584, 3)
    for part in (bias, eyes):
        other = recognise(write_header(tmp_path / "m.safetensors", language_model(layer, part)))
        assert other.text_encoder is None
        assert other.kind is not Kind.TEXT_ENCODER


@pytest.fixture
def host():
    return LocalHost(device=torch.device("cpu"))


def refusal(path, host, **options):
    with pytest.raises(ModelFileError) as caught:
        load_model(path, host, **options)
    message = str(caught.value)
    assert message.startswith(path.name) and message.endswith(".") and "\n" not in message
    return message


USABLE = ("", "inpaint", "still", "dev", "schnell", "fill", "3-medium", "3.5-medium", "3.5-large")
UNSUPPORTED = [row for row in MODELS if row[1] not in FAMILIES or row[2] not in USABLE]


@pytest.mark.parametrize(("shapes", "family", "variant", "what"), UNSUPPORTED, ids=lambda value: str(value)[:40])
def test_what_cannot_be_loaded_is_named_with_what_can(tmp_path, host, shapes, family, variant, what):
    message = refusal(write_header(tmp_path / "other.safetensors", shapes), host)
    assert what in message
    if family == "sdxl-refiner":
        assert "choose an SDXL base or inpainting model" in message
    else:
        assert "supported are Stable Diffusion 1.x, Stable Diffusion 2.x, SDXL" in message


LAYERED, FLUX_2 = (row[0] for row in MODELS if row[3] in ("a Qwen-Image-Layered model", "a FLUX.2 model"))


@pytest.mark.parametrize("shapes", [lumina(3840), LAYERED, FLUX_2], ids=["Z-Image", "Qwen-Image-Layered", "FLUX.2"])
def test_comfyuis_own_loader_is_pointed_to_where_it_helps(tmp_path, host, shapes):
    message = refusal(write_header(tmp_path / "bare.safetensors", shapes), host)
    assert message.endswith(
        "load it with ComfyUI's Load Diffusion Model, Load CLIP and Load VAE and connect that to Wrap Model (Mend)."
    )
    whole = {f"model.diffusion_model.{key}": shape for key, shape in shapes.items()}
    whole["vae.decoder.conv_in.weight"] = (512, 16, 3, 3)
    message = refusal(write_header(tmp_path / "whole.safetensors", whole), host)
    assert message.endswith("load it with ComfyUI's Load Checkpoint and connect that to Wrap Model (Mend).")
    video = write_header(
        tmp_path / "video.safetensors", {"patch_embedding.weight": (5120, 16), "head.modulation": (1, 2)}
    )
    assert "a Wan video model and cannot be used here" in refusal(video, host)


@pytest.mark.parametrize(
    "mark",
    [
        "scaled_fp8",
        "middle_block.1.proj_in.scale_weight",
        "middle_block.1.proj_in.weight_scale",
        "middle_block.1.proj_in.comfy_quant",
        "middle_block.1.proj_in.weight.absmax",
        "middle_block.1.proj_in.weight.quant_state.bitsandbytes__nf4",
        "middle_block.1.proj_in.qweight",
    ],
)
def test_quantised_weights_are_left_to_comfyui(tmp_path, host, mark):
    plain = ldm_unet(2048, **SDXL_LABELS)
    assert not recognise(write_header(tmp_path / "m.safetensors", plain)).quantised
    message = refusal(write_header(tmp_path / "m.safetensors", {**plain, mark: (1,)}), host)
    assert "an SDXL model with quantised weights" in message and "Wrap Model (Mend)" in message


def test_gguf_is_pointed_to_its_own_loader(tmp_path, host):
    path = tmp_path / "flux.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00" + bytes(100))
    assert "load it with a GGUF loader's node and connect its MODEL to Wrap Model (Mend)" in refusal(path, host)


def test_a_header_of_too_many_bytes_is_not_read(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", 100_000_001) + b"{" + bytes(100))
    with pytest.raises(ModelFileError, match=r"m.safetensors is not a safetensors file"):
        read_header(path)


# --- the user's own choice


def test_a_family_can_be_chosen(tmp_path):
    """A network of unusual width, such as a pruned one, has no family of its own."""
    path = write_header(tmp_path / "m.safetensors", ldm_unet(512))
    with pytest.raises(ModelFileError, match=r"m.safetensors has a UNet of an unusual size.*or set its family"):
        find_parts(path)
    for family, folder in (("sd1", "sd15"), ("sd2", "sd2-base"), ("sdxl", "sdxl")):
        model = find_parts(path, family=family)
        assert (model.family.name, model.folder) == (family, CONFIGS / folder)
    assert find_parts(path, family="sd2", prediction_type="v_prediction").folder == CONFIGS / "sd2-v"


def test_a_family_that_does_not_exist_is_an_error(tmp_path, host):
    path = write_header(tmp_path / "m.safetensors", ldm_unet(768))
    with pytest.raises(InputError, match="family is 'sd4'; choose from sd1, sd2, sdxl"):
        load_model(path, host, family="sd4")


# --- diffusers folders


@pytest.mark.parametrize(
    ("part", "config", "family", "variant"),
    [
        ("unet", {"cross_attention_dim": 768}, "sd1", ""),
        ("unet", {"cross_attention_dim": 1024, "in_channels": 9}, "sd2", "inpaint"),
        ("unet", {"cross_attention_dim": 2048, "addition_embed_type": "text_time"}, "sdxl", ""),
        (
            "unet",
            {"cross_attention_dim": 2048, "addition_embed_type": "text_time", "in_channels": 9},
            "sdxl",
            "inpaint",
        ),
        ("unet", {"cross_attention_dim": 1280, "addition_embed_type": "text_time"}, "sdxl-refiner", ""),
        ("unet", {"addition_embed_type": "text_time", "encoder_hid_dim_type": "text_proj"}, "", ""),
        ("transformer", {"_class_name": "FluxTransformer2DModel", "guidance_embeds": True}, "flux", "dev"),
        ("transformer", {"_class_name": "FluxTransformer2DModel"}, "flux", "schnell"),
        ("transformer", {"_class_name": "FluxTransformer2DModel", "in_channels": 384}, "flux", "fill"),
        ("transformer", {"_class_name": "FluxTransformer2DModel", "in_channels": 128}, "flux", "control"),
        ("transformer", {"_class_name": "SD3Transformer2DModel"}, "sd3", "3-medium"),
        ("transformer", {"_class_name": "SD3Transformer2DModel", "qk_norm": "rms_norm"}, "sd3", "3.5-large"),
        ("transformer", {"_class_name": "SD3Transformer2DModel", "dual_attention_layers": [0]}, "sd3", "3.5-medium"),
        ("transformer", {"_class_name": "SD3Transformer2DModel", "in_channels": 33}, "sd3", "other"),
        ("transformer", {"_class_name": "QwenImageTransformer2DModel"}, "qwen-image", ""),
        ("transformer", {"_class_name": "SomethingNew"}, "", ""),
    ],
)
def test_a_folder_is_told_by_its_denoisers_config(tmp_path, part, config, family, variant):
    (tmp_path / part).mkdir()
    (tmp_path / part / "config.json").write_text(json.dumps(config))
    found = recognise_folder(tmp_path)
    assert (found.family, found.variant) == (family, variant)


def test_an_edm_schedule_is_told_by_the_scheduler(tmp_path, host):
    for part, config in (
        ("unet/config.json", {"cross_attention_dim": 2048, "addition_embed_type": "text_time"}),
        ("scheduler/scheduler_config.json", {"_class_name": "EDMDPMSolverMultistepScheduler"}),
    ):
        (tmp_path / part).parent.mkdir()
        (tmp_path / part).write_text(json.dumps(config))
    assert recognise_folder(tmp_path).variant == "edm"
    assert "an SDXL model with an EDM schedule" in refusal(tmp_path, host)


def test_shipped_configs_are_recognised_as_what_they_are_for():
    for name, expected in (
        ("sd15", ("sd1", "")),
        ("sd15-inpaint", ("sd1", "inpaint")),
        ("sd2-base", ("sd2", "")),
        ("sd2-v", ("sd2", "")),
        ("sd2-inpaint", ("sd2", "inpaint")),
        ("sdxl", ("sdxl", "")),
        ("sdxl-inpaint", ("sdxl", "inpaint")),
    ):
        found = recognise_folder(CONFIGS / name)
        assert (found.family, found.variant) == expected
