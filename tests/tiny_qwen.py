"""Tiny random Qwen-Image pipelines of the real architectures, made in seconds."""

from __future__ import annotations

import json
from unittest import mock

import torch

MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
VOCABULARY = 256 + len(MARKS)
SCHEDULER = {
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
    "time_shift_type": "exponential",
}


def write_qwen_tokenizer(folder):
    """Bytes as tokens, and the marks of Qwen2.5's chats."""
    from tokenizers.pre_tokenizers import ByteLevel

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    marks = {str(256 + number): {"content": mark, "special": True} for number, mark in enumerate(MARKS)}
    vocabulary |= {mark["content"]: int(number) for number, mark in marks.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    config = {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": marks, "pad_token": MARKS[0]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def tiny_qwen_tokenizer(folder):
    from transformers import Qwen2Tokenizer

    return Qwen2Tokenizer.from_pretrained(str(write_qwen_tokenizer(folder)))


def tiny_language_model(width=32, vision=None, **text):
    """A Qwen2.5-VL with 2 layers of language and 2 of vision; ``vision`` and ``text`` are options of its configs."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    half = width // 4 // 2
    options = {
        "hidden_size": width,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [half - 2, 1, 1]},
    }
    config = Qwen2_5_VLConfig(
        text_config=options | text,
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": width,
            "fullatt_block_indexes": [1],
            "window_size": 56,
            **(vision or {}),
        },
        image_token_id=256 + MARKS.index("<|image_pad|>"),
        vision_start_token_id=256 + MARKS.index("<|vision_start|>"),
        vision_end_token_id=256 + MARKS.index("<|vision_end|>"),
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    # as it is made each token hardly looks at the others
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("attn.", "mlp.", "merger.", "embed")) and parameter.ndim > 1:
            parameter.data.mul_(8)
    return model


def tiny_wan_vae():
    from diffusers import AutoencoderKLQwenImage

    return AutoencoderKLQwenImage(base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1).eval()


def tiny_transformer(width=32, **options):
    from diffusers import QwenImageTransformer2DModel

    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=width,
        axes_dims_rope=(4, 6, 6),
        **options,
    )
    # the network as it is made hardly reads its noise level and its prompt
    for name, parameter in transformer.named_parameters():
        if any(part in name for part in ("_mod.", "time_text_embed", "attn.", "_mlp.", "norm_out", "proj_out")):
            parameter.data.mul_(2)
    return transformer.eval()


class ImageAndText:
    """What Qwen2VLProcessor does with one picture, without what it needs for films."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.image_processor = _image_processor()

    def __call__(self, text, images, padding, return_tensors):
        from transformers import BatchFeature

        seen = self.image_processor(images, return_tensors="pt")
        count = int(seen["image_grid_thw"].prod()) // 4
        texts = [prompt.replace("<|image_pad|>", "<|image_pad|>" * count) for prompt in text]
        tokens = self.tokenizer(texts, padding=padding, return_tensors=return_tensors)
        return BatchFeature({**tokens, **seen})


def _image_processor():
    import transformers

    # the name of the one without torchvision depends on the version
    processor = getattr(transformers, "Qwen2VLImageProcessorPil", None) or transformers.Qwen2VLImageProcessor
    return processor(min_pixels=56 * 56, max_pixels=12845056)


def tiny_qwen_image(folder, seed=0):
    """A random QwenImageInpaintPipeline; ``folder`` is for its tokenizer."""
    from diffusers import QwenImageInpaintPipeline

    torch.manual_seed(seed)
    return _pipeline(QwenImageInpaintPipeline, folder)


def tiny_qwen_image_edit(folder, seed=0, **options):
    """A random QwenImageEditInpaintPipeline; ``options`` are the transformer's."""
    from diffusers import QwenImageEditInpaintPipeline

    torch.manual_seed(seed)
    return _pipeline(QwenImageEditInpaintPipeline, folder, options)


def _pipeline(pipeline_class, folder, options=None):
    from comfyui_mend.engine.models import qwen_text
    from diffusers import FlowMatchEulerDiscreteScheduler

    parts = {
        "vae": tiny_wan_vae(),
        "text_encoder": tiny_language_model(),
        "tokenizer": tiny_qwen_tokenizer(folder / "tokenizer"),
        "transformer": tiny_transformer(**(options or {})),
        "scheduler": FlowMatchEulerDiscreteScheduler(**SCHEDULER),
    }
    edits = "Edit" in pipeline_class.__name__
    # diffusers wants a Qwen2VLProcessor by its type, which needs torchvision
    pipeline = pipeline_class(**parts, **({"processor": None} if edits else {}))
    if edits:
        pipeline.processor = pipeline.vl_processor = ImageAndText(parts["tokenizer"])
    # a head of so many tokens in this vocabulary
    head = qwen_text.Chat(qwen_text.CHANGE if edits else qwen_text.DESCRIBE).head
    pipeline.prompt_template_encode_start_idx = len(parts["tokenizer"](head)["input_ids"])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_qwen_model(family, pipeline, host=None, **changes):
    """The pipeline's own modules behind the engine's InpaintModel protocol; ``family`` is one of qwen_image's."""
    from dataclasses import replace

    from comfyui_mend.engine.host import Role
    from comfyui_mend.engine.models import qwen_image
    from comfyui_mend.engine.models.modules import assemble
    from tiny_flow import components

    parts = components(pipeline, host=host)
    text, config = family.text_encoders[0], parts.configs["text_encoder"]
    state = text.read(pipeline.text_encoder.state_dict(), config)
    encoder = assemble(lambda: text.build(config), state, torch.float32, "tiny")
    modules = {**parts.modules, "text_encoder": parts.host.manage(encoder, Role.TEXT_ENCODER)}
    with mock.patch.object(qwen_image, "qwen_tokenizer", lambda *_: pipeline.tokenizer):
        return family.make(replace(parts, modules=modules, **changes))
