"""ComfyUI's own classes of every family in small sizes, with random weights, by the names of the files people have."""

from __future__ import annotations

from typing import Any
from unittest import mock

import comfy.cldm.cldm
import comfy.controlnet
import comfy.latent_formats
import comfy.ldm.wan.vae
import comfy.model_base
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.text_encoders.flux
import comfy.text_encoders.sd3_clip
import torch
import torch.nn.functional as F
from native_tiny import CPU, native_flux, native_qwen, native_sd, native_sd3, native_sdxl, sd_unet_config
from tiny import tiny_pipeline
from tiny_flow import tiny_flux, tiny_sd3
from tiny_qwen import tiny_transformer
from tiny_sdxl import tiny_sdxl
from torch import Tensor, nn

CLIP_L = {
    "num_hidden_layers": 3,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 37,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
}
T5 = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "num_layers": 2, "vocab_size": 32128}
QWEN = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
QWEN_EYES = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "num_layers": 1}
WAN_WIDTH = 8
SD3_CONTEXT = 4096
"""ComfyUI pads the two CLIPs' tokens to it."""
CELL = 8
MOVED, DARKENED, CHANGED = (3, 2), 0.95, (0.9, 0.1, 0.7)
"""What the edit model does: pixels to the right and down, a factor, and the colour of what it paints."""
CHANGED_PART = (0.4, 0.6)
"""Where it paints: from and to, in shares of both sides."""


def random_weights(module: nn.Module, seed: int = 0) -> nn.Module:
    """Activations of about unit size: norms 1, matrices by their width."""
    generator = torch.Generator().manual_seed(seed)
    for name, values in module.named_parameters():
        if values.ndim < 2:
            nn.init.constant_(values, float(name.endswith(("weight", "scale"))))
        else:
            values.data.copy_(torch.randn(values.shape, generator=generator) / values[0].numel() ** 0.5)
    return module


def clip(tokenizer: type, model: type, **configs: Any) -> Any:
    target = comfy.supported_models_base.ClipTarget(tokenizer, model)
    made = comfy.sd.CLIP(target=target, model_options=configs)
    random_weights(made.cond_stage_model)
    return made


def autoencoder(channels: int) -> Any:
    details = {
        "double_z": True,
        "z_channels": channels,
        "resolution": 256,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1, 1, 2, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [],
        "dropout": 0.0,
    }
    made = comfy.sd.VAE(sd={}, config={"params": {"ddconfig": details, "embed_dim": channels}})
    random_weights(made.first_stage_model)
    made.latent_channels = channels
    return made


def stable_diffusion(channels: int) -> tuple[Any, Any, Any]:
    native = native_sd(tiny_pipeline(in_channels=channels, groups=32))
    return native.model, native.clip, native.vae


def stable_diffusion_xl() -> tuple[Any, Any, Any]:
    clips = clip(
        comfy.sdxl_clip.SDXLTokenizer,
        comfy.sdxl_clip.SDXLClipModel,
        clip_l_model_config=CLIP_L,
        clip_g_model_config={**CLIP_L, "hidden_size": 48, "hidden_act": "gelu"},
    )
    return native_sdxl(tiny_sdxl()), clips, autoencoder(4)


def stable_diffusion_3() -> tuple[Any, Any, Any]:
    own = tiny_sd3(t5=False).transformer
    sizes = {
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "caption_projection_dim": 128,
        "joint_attention_dim": SD3_CONTEXT,
    }
    transformer = type(own).from_config({**own.config, **sizes}).eval()
    clips = clip(
        comfy.text_encoders.sd3_clip.SD3Tokenizer,
        comfy.text_encoders.sd3_clip.sd3_clip(t5=False),
        clip_l_model_config=CLIP_L,
        clip_g_model_config={**CLIP_L, "hidden_act": "gelu"},
    )
    return native_sd3(transformer), clips, autoencoder(16)


CHECKPOINTS = {
    "sd-v1-5-inpainting.safetensors": lambda: stable_diffusion(9),
    "v1-5-pruned-emaonly-fp16.safetensors": lambda: stable_diffusion(4),
    "sd_xl_base_1.0_inpainting_0.1.safetensors": stable_diffusion_xl,
    "sd3.5_medium_incl_clips_t5xxlfp8scaled.safetensors": stable_diffusion_3,
}


def checkpoint(name: str) -> tuple[Any, Any, Any]:
    return CHECKPOINTS[name]()


def control_net() -> Any:
    config = sd_unet_config(4)
    del config["out_channels"], config["transformer_depth_output"]
    network = comfy.cldm.cldm.ControlNet(**config, hint_channels=3, operations=comfy.ops.manual_cast)
    return comfy.controlnet.ControlNet(random_weights(network), load_device=CPU, manual_cast_dtype=torch.float32)


def flux_clip() -> Any:
    return clip(
        comfy.text_encoders.flux.FluxTokenizer,
        comfy.text_encoders.flux.flux_clip(dtype_t5=torch.float32),
        clip_l_model_config=CLIP_L,
        t5xxl_model_config=T5,
    )


def z_image() -> Any:
    config = {
        "image_model": "lumina2",
        "patch_size": 2,
        "in_channels": 16,
        "dim": 256,  # as wide as its timesteps are embedded
        "cap_feat_dim": QWEN["hidden_size"],
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 16,
        "n_kv_heads": 16,
        "qk_norm": True,
        "axes_dims": [4, 6, 6],
        "axes_lens": [1536, 512, 512],
        "rope_theta": 256.0,
        "ffn_dim_multiplier": 8.0 / 3.0,
        "z_image_modulation": True,
        "time_scale": 1000.0,
        "pad_tokens_multiple": 32,
        "dtype": torch.float32,
    }
    return patcher(comfy.supported_models.ZImage, config, comfy.model_base.Lumina2)


def z_image_clip() -> Any:
    from comfy.text_encoders import z_image

    return clip(z_image.ZImageTokenizer, z_image.te(), model_name="qwen3_4b", qwen3_4b_model_config=QWEN)


def qwen_clip() -> Any:
    from comfy.text_encoders import qwen_image, qwen_vl

    def eyes(**chosen: Any) -> nn.Module:
        return seeing(**{**chosen, **QWEN_EYES})

    seeing = qwen_vl.Qwen2VLVisionTransformer
    with mock.patch.object(qwen_vl, seeing.__name__, eyes):  # ComfyUI has them in one size only
        return clip(qwen_image.QwenImageTokenizer, qwen_image.te(), qwen25_7b_model_config=QWEN)


def qwen_edit() -> Any:
    """Of the kind of 2511, whose reference pictures have no noise level."""
    torch.manual_seed(0)
    return native_qwen(tiny_transformer(QWEN["hidden_size"], zero_cond_t=True))


def qwen_autoencoder() -> Any:
    """Of Wan, for videos: latents have an axis for frames."""
    network = comfy.ldm.wan.vae.WanVAE(WAN_WIDTH, 16, temperal_downsample=[False, True, True])
    return comfy.sd.VAE(sd=random_weights(network).state_dict())


def patcher(settings: type, config: dict[str, Any], kind: type) -> Any:
    known = settings(dict(config))
    known.unet_config = config
    known.set_inference_dtype(torch.float32, None)
    return comfy.model_patcher.ModelPatcher(random_weights(kind(known, device=CPU)), CPU, CPU)


# ------------------------------------------------------------------------------------------ a stand-in for edit models


class Pixels(comfy.latent_formats.LatentFormat):
    """Cells of pixels, as PixelAutoencoder makes them."""

    latent_channels = 3 * CELL**2


class PixelAutoencoder:
    """Loses nothing: its latents are the pixels of each cell."""

    latent_channels = Pixels.latent_channels

    def encode(self, pixels: Tensor) -> Tensor:
        return F.pixel_unshuffle(pixels[..., :3].movedim(-1, 1), CELL)

    def decode(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(latents, CELL).movedim(1, -1).clamp(0, 1)


class Edit(nn.Module):
    """A flow that ends at the reference picture, edited: moved as a whole, darker, and with a square painted in."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.dtype = torch.float32

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, ref_latents: Any = None, **options: Any) -> Tensor:
        if ref_latents is None:
            raise ValueError("an edit model needs a reference picture")
        reference = F.pixel_shuffle(ref_latents[0].to(x), CELL)
        size = (x.shape[-2] * CELL, x.shape[-1] * CELL)
        picture = F.interpolate(reference, size, mode="bilinear", antialias=True, align_corners=False)
        picture = picture.roll(MOVED[::-1], (-2, -1)) * DARKENED
        rows, columns = (slice(*(round(share * side) for share in CHANGED_PART)) for side in size)
        picture[..., rows, columns] = torch.tensor(CHANGED).to(x)[:, None, None]
        return (x - F.pixel_unshuffle(picture, CELL)) / timesteps.to(x).view(-1, 1, 1, 1)


class EditModel(comfy.model_base.QwenImage):
    """What a Qwen-Image-Edit is given, references and all, for another network."""

    def __init__(self, settings: Any, device: Any) -> None:
        settings.latent_format = Pixels()
        kind = comfy.model_base.ModelType.FLUX
        comfy.model_base.BaseModel.__init__(self, settings, kind, device=device, unet_model=Edit)
        self.memory_usage_factor_conds = ("ref_latents",)


def edit_model() -> Any:
    config = {"image_model": "qwen_image", "in_channels": Pixels.latent_channels, "dtype": torch.float32}
    return patcher(comfy.supported_models.QwenImage, config, EditModel)


MODELS = {
    "flux1-fill-dev.safetensors": lambda: native_flux(tiny_flux("fill")),
    "z_image_turbo_bf16.safetensors": z_image,
    "qwen_image_fp8_e4m3fn.safetensors": native_qwen,
    "qwen_image_edit_2509_fp8_e4m3fn.safetensors": edit_model,
    "qwen_image_edit_2511_fp8mixed.safetensors": qwen_edit,
}
CLIPS = {"flux": flux_clip, "lumina2": z_image_clip, "qwen_image": qwen_clip}
VAES = {
    "ae.safetensors": lambda: autoencoder(16),
    "qwen_image_vae.safetensors": qwen_autoencoder,
    "pixels": PixelAutoencoder,
}
"""``pixels`` is for the edit model, whose autoencoder has the name of Qwen-Image's."""
