"""Runs under ComfyUI's own Python: the same prompts through CLIPTextEncode and through the engine's SDXL.

Answers with what each prompt gave, for each layer that may be read.
"""

import logging
import sys
import tempfile
from pathlib import Path

import inside

inside.boot()
sys.path.insert(0, str(inside.ROOT / "tests"))

import torch  # noqa: E402
from comfy.cli_args import args  # noqa: E402

args.fp32_text_enc = True

import comfy.sd  # noqa: E402
import comfy.sdxl_clip  # noqa: E402
from comfy.supported_models_base import ClipTarget  # noqa: E402
from comfyui_mend.engine.host import LocalHost  # noqa: E402
from comfyui_mend.engine.models.family import LoadOptions  # noqa: E402
from comfyui_mend.engine.models.load import load_model  # noqa: E402
from comfyui_mend.engine.models.protocol import PromptSyntax  # noqa: E402
from comfyui_mend.nodes.native import NativeModel  # noqa: E402
from inside_prompts import PROMPTS, relative_difference  # noqa: E402
from native_tiny import clip_config  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tiny_sdxl import save_tiny_sdxl, tiny_sdxl  # noqa: E402

import nodes  # noqa: E402


def write_embeddings(folder):
    generator = torch.Generator().manual_seed(7)
    first, second = torch.randn(2, 32, generator=generator), torch.randn(2, 48, generator=generator)
    save_file({"clip_l": first, "clip_g": second}, folder / "pair.safetensors")
    save_file({"emb_params": first[:1].clone()}, folder / "a1111.safetensors")


def comfy_clip(pipeline, embeddings):
    encoders = {"clip_l": pipeline.text_encoder, "clip_g": pipeline.text_encoder_2}
    clip = comfy.sd.CLIP(
        target=ClipTarget(comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel),
        model_options={f"{name}_model_config": clip_config(encoder.config) for name, encoder in encoders.items()},
        embedding_directory=[str(embeddings)],
    )
    for name, encoder in encoders.items():
        state = {
            key if key.startswith(("text_model.", "text_projection")) else f"text_model.{key}": value
            for key, value in encoder.state_dict().items()
        }
        missing, unexpected = getattr(clip.cond_stage_model, name).load_sd(state)
        assert not unexpected and all("text_projection" in key or "logit" in key for key in missing), missing
    return clip


def compare(clip, model, prompts):
    ours = model.encode_prompt(prompts, PromptSyntax.COMFY)
    plain = model.encode_prompt(prompts, PromptSyntax.PLAIN)
    rows = []
    for prompt, mine, literal in zip(prompts, ours, plain, strict=True):
        ((tokens, more),) = nodes.CLIPTextEncode().encode(clip, prompt)[0]
        same_shape = tokens.shape == mine.tokens.shape
        rows.append(
            {
                "prompt": prompt,
                "their_shape": list(tokens.shape),
                "our_shape": list(mine.tokens.shape),
                "difference": relative_difference(tokens, mine.tokens) if same_shape else None,
                "pooled": relative_difference(more["pooled_output"], mine.pooled),
                "difference_of_plain": relative_difference(tokens[:, :77], literal.tokens),
            }
        )
    return rows


def zeros(clip):
    """What stands for no prompt, as ConditioningZeroOut makes it."""
    native = NativeModel.__new__(NativeModel)
    native.clip, native._positive, native._negative, native._shown = clip, None, None, None
    (found, _) = native.encode_prompt([None, "a cat"], PromptSyntax.COMFY)
    (expected,) = nodes.ConditioningZeroOut().zero_out(nodes.CLIPTextEncode().encode(clip, "")[0])
    (mine, more), (theirs, other) = found[0], expected[0]
    return (
        mine.shape == theirs.shape
        and torch.equal(mine, theirs)
        and torch.equal(more["pooled_output"], other["pooled_output"])
        and not theirs.any()
    )


def main():
    logging.disable(logging.WARNING)
    pipeline = tiny_sdxl()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_embeddings(folder)
        clip = comfy_clip(pipeline, folder)
        host = LocalHost(torch.device("cpu"), folders={"embeddings": [folder]})
        path = save_tiny_sdxl(folder / "tiny", pipeline)
        answer = {"0": compare(clip, load_model(path, host), PROMPTS), "zeros": zeros(clip)}
        states = []
        for skip in (2, 3):
            (skipped,) = nodes.CLIPSetLastLayer().set_last_layer(clip, -skip)
            model = load_model(path, host, options=LoadOptions(clip_skip=skip))
            answer[str(skip)] = compare(skipped, model, ["a cat", "a (cat:1.3) on a ((red)) mat"])
            states += model.encode_prompt(["a cat"], PromptSyntax.COMFY)
        answer["between_layers"] = relative_difference(states[0].tokens, states[1].tokens)
    inside.answer(answer)


if __name__ == "__main__":
    main()
