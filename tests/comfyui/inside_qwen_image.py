"""Runs under ComfyUI's own Python: Qwen-Image and Qwen-Image-Edit as ComfyUI's MODEL, CLIP and VAE, and as diffusers'
modules with the same weights.

Prints relative differences as one line of JSON; test_native_qwen_image.py says how far they may be.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import inside
import torch

inside.boot()
sys.path.insert(0, str(inside.ROOT / "tests"))

import comfy.ldm.wan.vae  # noqa: E402
import comfy.sd  # noqa: E402
from comfy.cli_args import args  # noqa: E402

args.force_fp32 = args.fp32_text_enc = args.fp32_vae = True

from comfy.supported_models_base import ClipTarget  # noqa: E402
from comfy.text_encoders import qwen_image as comfy_qwen  # noqa: E402
from comfy.text_encoders import qwen_vl  # noqa: E402
from comfyui_mend.engine.host import Role  # noqa: E402
from comfyui_mend.engine.inpaint import inpaint  # noqa: E402
from comfyui_mend.engine.models import qwen_image, qwen_text, wan_vae  # noqa: E402
from comfyui_mend.engine.models.modules import assemble  # noqa: E402
from comfyui_mend.engine.models.protocol import PromptSyntax  # noqa: E402
from comfyui_mend.engine.models.qwen_image import (  # noqa: E402
    LATER_EDIT_SIGHT,
    QWEN_IMAGE,
    QWEN_IMAGE_EDIT,
    Glance,
    QwenImageEditModel,
)
from comfyui_mend.engine.types import Crop, InpaintRequest, InputError  # noqa: E402
from comfyui_mend.nodes import native as native_module  # noqa: E402
from comfyui_mend.nodes.comfy_host import ComfyHost  # noqa: E402
from comfyui_mend.nodes.native import SIGHTS, NativeModel, Shown  # noqa: E402
from inside_native_families import FLOW_OPTIONS, HOST, Borrowed, run_both  # noqa: E402
from native_tiny import native_qwen  # noqa: E402
from tiny import photo_and_mask  # noqa: E402
from tiny_qwen import make_qwen_model, tiny_qwen_image, tiny_qwen_image_edit, tiny_transformer  # noqa: E402
from tiny_qwen_files import comfy_names, published_language_model  # noqa: E402

FOLDER = Path(tempfile.mkdtemp())
# all that ComfyUI's Qwen2.5-VL lets one choose: its heads are 128 wide
LANGUAGE = {
    "hidden_size": 256,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
EYES = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "num_layers": 8}
# the last of these layers looks at all of the picture, as there
SIGHT = {"depth": 8, "window_size": 112, "fullatt_block_indexes": [7]}
# whole tokens of the vision tower at both sizes, which ComfyUI resizes to with another filter, and an even number of
# the network's: ComfyUI puts an odd one's middle elsewhere
SIDE, SMALL_GLANCE = 224, Glance(448, enlarges=True)
PROMPTS = ["", " ", "a red cat\non the mat", "a (red:1.3) cat, [blue] {sky}", r"a \(red\) cat", "émigré 猫 🐈 " * 60]


def compare(family: Any, pipeline: Any, patch: Any = None, **options: Any) -> float:
    """ComfyUI's network, with its own schedule, and the engine's with the same."""
    reference, patcher = make_qwen_model(family, pipeline), native_qwen(pipeline.transformer)
    if patch is not None:
        patcher.set_model_sampler_cfg_function(patch)
    image, _ = photo_and_mask(128, 128)
    pictures = image.permute(0, 3, 1, 2) * 2 - 1
    negative, positive = reference.encode_prompt(["blurry", "a cat"], PromptSyntax.COMFY, pictures)
    extra = {}
    if family is QWEN_IMAGE_EDIT:
        latents = reference.encode_image(pictures).mean[:, :, None]
        extra = {"reference_latents": [patcher.model.process_latent_out(latents)]}
    conds = [[[embedding.tokens, dict(extra)]] for embedding in (positive, negative)]
    reference.facts = replace(reference.facts, native_size=128)
    native = Borrowed(patcher, reference, *conds)
    reference.facts = replace(reference.facts, scheduler_config=native.facts.scheduler_config)
    return run_both(reference, native, size=(128, 128), **options)


def packed_norm(given: dict[str, Any]) -> torch.Tensor:
    """diffusers' rule for guidance as a function on ComfyUI's MODEL: ``cond`` and ``uncond`` are noise predictions."""
    cond, uncond, scale = given["cond"], given["uncond"], given["cond_scale"]
    # of a flow these are sigma times what the network said: the lengths' ratio is the same
    guided = uncond + scale * (cond - uncond)
    length = [qwen_image.token_norms(planes[:, :, 0])[:, :, None] for planes in (cond, guided)]
    return guided * (length[0] / length[1])


def networks() -> dict[str, Any]:
    plain, edit = tiny_qwen_image(FOLDER), tiny_qwen_image_edit(FOLDER)
    still = tiny_qwen_image_edit(FOLDER, zero_cond_t=True)
    parity = {}
    for name, options in FLOW_OPTIONS.items():
        parity[f"plain {name}"] = compare(QWEN_IMAGE, plain, guidance_scale=1.0, **options)
        parity[f"guided {name}"] = compare(QWEN_IMAGE, plain, patch=packed_norm, guidance_scale=4.0, **options)
        parity[f"edit {name}"] = compare(QWEN_IMAGE_EDIT, edit, guidance_scale=1.0, **options)
    parity["2511"] = compare(QWEN_IMAGE_EDIT, still, guidance_scale=1.0, scheduler="K_EULER")
    with mock.patch.object(qwen_image.QwenImageEditModel, "_rows", lambda self, state, canvas: (state,)):
        unseen = compare(QWEN_IMAGE_EDIT, edit, guidance_scale=1.0, scheduler="K_EULER")
    return {
        "parity": parity,
        "controls": {
            "ComfyUI's plain guidance": compare(QWEN_IMAGE, plain, guidance_scale=4.0, scheduler="K_EULER"),
            "a picture that is not shown": unseen,
        },
    }


# --- prompts


def comfy_clip(text_encoder: Any) -> Any:
    def eyes(**chosen: Any) -> Any:
        return seeing(**{**chosen, **EYES})

    seeing = qwen_vl.Qwen2VLVisionTransformer
    with mock.patch.object(qwen_vl, seeing.__name__, eyes):  # ComfyUI has them in one size only
        target = ClipTarget(comfy_qwen.QwenImageTokenizer, comfy_qwen.te())
        clip = comfy.sd.CLIP(target=target, model_options={"qwen25_7b_model_config": LANGUAGE})
    missing, unexpected = clip.cond_stage_model.qwen25_7b.load_sd(comfy_names(text_encoder))
    assert not unexpected, unexpected
    assert not [key for key in missing if key not in ("logit_scale", "text_projection.weight")], missing
    return clip


def reader(text_encoder: Any, part: Any, chat: qwen_text.Chat) -> qwen_text.QwenReader:
    config = text_encoder.config.to_dict()
    state = part.read(text_encoder.state_dict(), config)
    module = assemble(lambda: part.build(config), state, torch.float32, "tiny")
    (folder,) = ComfyHost().model_folders(qwen_text.TOKENIZER_FOLDERS)
    return qwen_text.QwenReader(HOST.manage(module, Role.TEXT_ENCODER), qwen_text.load_qwen_tokenizer(folder), chat)


def language_model() -> Any:
    """With the vocabulary of the published one, whose head's 128 places are cut as its own."""
    torch.manual_seed(3)
    rope = {"type": "mrope", "rope_type": "default", "mrope_section": [16, 24, 24]}
    options = {"rope_theta": 1000000.0, "rope_scaling": rope, "rms_norm_eps": 1e-6}
    return published_language_model(**LANGUAGE, **options, width=256, vision=SIGHT)


def relative(expected: torch.Tensor, found: torch.Tensor) -> float:
    assert expected.shape == found.shape, (expected.shape, found.shape)
    return float((expected - found).abs().max() / expected.abs().max())


def prompts() -> dict[str, Any]:
    text_encoder = language_model()
    clip = comfy_clip(text_encoder)
    plain = reader(text_encoder, qwen_text.LANGUAGE_MODEL, qwen_text.Chat(qwen_text.DESCRIBE))
    rows = {}
    for prompt in PROMPTS:
        (theirs,) = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
        rows[prompt[:20]] = relative(theirs[0], plain.read(prompt, PromptSyntax.COMFY))
    chat = qwen_text.Chat(qwen_text.CHANGE, qwen_text.PICTURE)
    seeing = reader(text_encoder, qwen_text.VISION_LANGUAGE_MODEL, chat)
    image, _ = photo_and_mask(224, 112)
    picture = qwen_text.Picture.of(image[0].permute(2, 0, 1) * 2 - 1)
    seen = {}
    for prompt in PROMPTS[1:3]:
        (theirs,) = clip.encode_from_tokens_scheduled(clip.tokenize(prompt, images=[image]))
        seen[prompt[:20]] = relative(theirs[0], seeing.read_with(prompt, picture, PromptSyntax.COMFY))
    with mock.patch.object(qwen_text, "places", lambda length, *_: torch.arange(length).expand(3, 1, -1)):
        counted = relative(theirs[0], seeing.read_with(PROMPTS[2], picture, PromptSyntax.COMFY))
    heads = [len(one.tokenizer(one.chat.head)["input_ids"]) for one in (plain, seeing)]
    return {"prompts": rows, "pictures": seen, "counted through": counted, "heads": heads}


def wan() -> tuple[Any, Any]:
    """ComfyUI's network and diffusers' module with its weights."""
    torch.manual_seed(5)
    theirs = comfy.ldm.wan.vae.WanVAE(8, 16, temperal_downsample=[False, True, True]).eval()
    for name, parameter in theirs.named_parameters():
        parameter.data.normal_(float(name.endswith("gamma")), 0.1)
    config = {
        "base_dim": 8,
        "z_dim": 16,
        "dim_mult": [1, 2, 4, 4],
        "num_res_blocks": 2,
        "attn_scales": [],
        "temperal_downsample": [False, True, True],
    }
    state = wan_vae.read_wan_vae(theirs.state_dict(), config)
    return theirs, assemble(lambda: wan_vae.build_wan_vae(config), state, torch.float32, "tiny")


def autoencoder() -> dict[str, float]:
    theirs, ours = wan()
    image, _ = photo_and_mask(104, 88)
    pixels = image.permute(0, 3, 1, 2) * 2 - 1
    latents = torch.randn(1, 16, 11, 13)
    return {
        "encode": relative(theirs.encode(pixels[:, :, None])[:, :, 0], wan_vae.encode(ours, pixels).mean),
        "decode": relative(theirs.decode(latents[:, :, None])[:, :, 0].clamp(-1, 1), wan_vae.decode(ours, latents)),
    }


# --- all of an editing model


def edited() -> dict[str, Any]:
    """Edit Model (Mend) on ComfyUI's own MODEL, CLIP and VAE against the engine's editing models."""
    torch.manual_seed(4)
    transformer = tiny_transformer(width=LANGUAGE["hidden_size"])
    text_encoder, (theirs, ours) = language_model(), wan()
    clip, vae = comfy_clip(text_encoder), comfy.sd.VAE(sd=theirs.state_dict())
    wrapped = NativeModel(native_qwen(transformer), vae, clip, native_size=SIDE)
    image, mask = photo_and_mask(SIDE, SIDE)
    request = InpaintRequest(
        image=image,
        mask=mask,
        prompt="a red cat",
        scheduler="K_EULER",
        steps=3,
        guidance_scale=1.0,
        seed=5,
        crop=Crop.OFF,
        count=2,
    )
    plain, latents = (inpaint(request, model, HOST).images for model in (wrapped, wrapped.editing(Shown.LATENTS)))
    rows: dict[str, Any] = {"latents alone": relative(plain, latents)}
    small = {**SIGHTS, Shown.QWEN_IMAGE_EDIT_2509: replace(LATER_EDIT_SIGHT, glance=SMALL_GLANCE)}
    for shown, sight in small.items():
        native = wrapped.editing(shown)
        facts = replace(native.facts, name="engine")
        model = QwenImageEditModel(
            facts,
            reader=reader(text_encoder, qwen_text.VISION_LANGUAGE_MODEL, sight.chat),
            denoiser=HOST.manage(transformer, Role.DENOISER),
            vae=HOST.manage(ours, Role.VAE),
            host=HOST,
            glance=sight.glance,
        )
        with mock.patch.object(native_module, "SIGHTS", small):
            found = inpaint(request, native, HOST).images
        outside = mask[0] == 0
        rows[shown.value] = {
            "engine": relative(inpaint(request, model, HOST).images, found),
            "latents": relative(latents, found),
            "outside": float((found - image)[:, outside].abs().max()),
        }
    blind = SimpleNamespace(tokenizer=object(), cond_stage_model=clip.cond_stage_model)
    try:
        NativeModel(native_qwen(transformer), vae, blind).editing(Shown.QWEN_IMAGE_EDIT)
    except InputError as error:
        rows["refused"] = str(error)
    return rows


if __name__ == "__main__":
    with torch.no_grad():
        inside.answer({**networks(), **prompts(), "autoencoder": autoencoder(), "edited": edited()})
