"""Tiny random FLUX and Stable Diffusion 3 pipelines of the real architectures, made in seconds."""

from __future__ import annotations

import torch
from tiny import TOKENIZER

T5_PIECES = ("▁a", "▁the", "▁cat", "▁on", "▁mat", "▁red", "s", "ing", "ed")


def tiny_t5_tokenizer():
    """Unigram pieces of T5's kind: 0 pads, 1 ends, letters and a few words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = [chr(code) for code in range(33, 127)]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0), ("▁", -2.0)]
    pieces += [(letter, -6.0) for letter in letters] + [(piece, -3.0) for piece in T5_PIECES if len(piece) > 1]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


def tiny_t5(width=32):
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        d_model=width,
        d_ff=64,
        d_kv=8,
        num_heads=4,
        num_layers=2,
        vocab_size=128,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config).eval()


def tiny_clip(projected=False, activation="quick_gelu", width=32, layers=3):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=1,
        hidden_size=width,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=layers,
        vocab_size=49408,
        projection_dim=width,
        hidden_act=activation,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def tiny_clip_tokenizer(pad_token="<|endoftext|>"):
    from transformers import CLIPTokenizer

    return CLIPTokenizer(
        str(TOKENIZER / "vocab.json"), str(TOKENIZER / "merges.txt"), model_max_length=77, pad_token=pad_token
    )


def tiny_vae(scaling_factor, shift_factor):
    """16 channels, 8x, no quantisation convolutions."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=[16, 16, 32, 32],
        in_channels=3,
        out_channels=3,
        latent_channels=16,
        norm_num_groups=8,
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        sample_size=1024,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
    ).eval()


def tiny_flux(variant="fill", seed=0):
    """A random FluxFillPipeline ("fill") or FluxInpaintPipeline ("dev", "schnell")."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxFillPipeline, FluxInpaintPipeline, FluxTransformer2DModel

    torch.manual_seed(seed)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=384 if variant == "fill" else 64,
        out_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=variant != "schnell",
        axes_dims_rope=(4, 4, 8),
    )
    schnell = variant == "schnell"
    pipeline = (FluxFillPipeline if variant == "fill" else FluxInpaintPipeline)(
        vae=tiny_vae(0.3611, 0.1159),
        text_encoder=tiny_clip(),
        text_encoder_2=tiny_t5(),
        tokenizer=tiny_clip_tokenizer(),
        tokenizer_2=tiny_t5_tokenizer(),
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0 if schnell else 3.0, use_dynamic_shifting=not schnell),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_sd3(t5=True, dual=False, seed=0):
    """A random StableDiffusion3InpaintPipeline; ``dual`` attention as 3.5 Medium has it."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3InpaintPipeline

    torch.manual_seed(seed)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        joint_attention_dim=80,
        caption_projection_dim=64,
        pooled_projection_dim=64,
        out_channels=16,
        pos_embed_max_size=24,
        dual_attention_layers=(0,) if dual else (),
        qk_norm="rms_norm" if dual else None,
    )
    # the network as it is made hardly reads the noise level
    for name, parameter in transformer.named_parameters():
        if any(part in name for part in ("norm1", "norm_out", "time_text_embed")):
            parameter.data.mul_(2)
    pipeline = StableDiffusion3InpaintPipeline(
        vae=tiny_vae(1.5305, 0.0609),
        text_encoder=tiny_clip(projected=True),
        text_encoder_2=tiny_clip(projected=True, activation="gelu"),
        text_encoder_3=tiny_t5(80) if t5 else None,
        tokenizer=tiny_clip_tokenizer(),
        tokenizer_2=tiny_clip_tokenizer(pad_token="!"),
        tokenizer_3=tiny_t5_tokenizer() if t5 else None,
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def components(pipeline, name="tiny", host=None, options=None):
    """What the loader hands a family, of a pipeline in memory."""
    from pathlib import Path

    from comfyui_mend.engine.host import LocalHost, Role
    from comfyui_mend.engine.models.family import Components, LoadOptions

    host = host or LocalHost(torch.device("cpu"))
    roles = {"transformer": Role.DENOISER, "vae": Role.VAE}
    modules = {part: module for part, module in pipeline.components.items() if isinstance(module, torch.nn.Module)}
    return Components(
        name=name,
        modules={part: host.manage(module, roles.get(part, Role.TEXT_ENCODER)) for part, module in modules.items()},
        configs={part: _plain(module.config) for part, module in modules.items()},
        scheduler=dict(pipeline.scheduler.config),
        folder=Path("nowhere"),
        host=host,
        options=options or LoadOptions(),
    )


def _plain(config):
    return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def make_model(family, pipeline, host=None, **changes):
    """The pipeline's own modules behind the engine's InpaintModel protocol, made by a family's module."""
    from dataclasses import replace
    from unittest import mock

    parts = components(pipeline, host=host)
    number = {"flux": "_2", "sd3": "_3"}[family.__name__.rpartition(".")[2]]
    tokenizer = getattr(pipeline, f"tokenizer{number}")
    with mock.patch.object(family, "t5_tokenizer", lambda *_: tokenizer):
        model = family.make(replace(parts, **changes))
    return model


def latents_and_images(model, **options):
    """What the engine makes of photo_and_mask, as diffusers computes it; the latents as the sampling leaves them."""
    from unittest import mock

    from comfyui_mend.engine.host import LocalHost
    from comfyui_mend.engine.inpaint import inpaint
    from comfyui_mend.engine.types import Compat, InpaintRequest
    from tiny import photo_and_mask

    caught = []
    sample = model.sample
    image, mask = photo_and_mask()
    request = {"image": image, "mask": mask, "scheduler": "K_EULER", "compat": Compat.DIFFUSERS, **options}
    with mock.patch.object(model, "sample", lambda *arguments: caught.append(sample(*arguments)) or caught[-1]):
        result = inpaint(InpaintRequest(**request), model, LocalHost(torch.device("cpu")))
    return caught[0], result.images
