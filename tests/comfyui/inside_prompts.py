"""Runs under ComfyUI's own Python: the same prompts through CLIPTextEncode and through the engine, on tiny weights.

Answers with what each prompt gave, for each text encoder.
"""

import logging
import tempfile
from pathlib import Path

import inside

TOKENIZER = inside.ROOT / "engine" / "models" / "configs" / "tokenizer"
WIDTH = 32
LAYERS = 4

PROMPTS = [
    "",
    "a cat",
    "a (cat:1.3) on a ((red)) mat",
    "a \\(cat\\) (x:0.5)",
    "(a (b:1.2) c:0.8) d",
    "(((cat)))",
    "cat:1.5",
    "(cat:-0.5) (dog:0) (bird: 1.5 )",
    "unbalanced (cat:1.4 and more",
    "more (unbalanced)) cats) (and) dogs",
    "((cat) dog",
    ")(cat)(",
    "(:1.2) (cat:) (cat:abc) ()",
    "[cat] {a|b} cat AND dog",
    "cat BREAK dog",
    "a cat! wow!!! (yes!:1.2)",
    "\u00e9t\u00e9 \U0001f600 cat",
    "  two\n\nlines\tand  spaces ",
    "embedding:pair, a cat",
    "a (embedding:pair:1.2) cat",
    "style embedding:a1111 cat",
    "embedding:pair,, (embedding:pair) ,embedding:pair",
    "embedding:pair<lora:x> embedding:a1111[b]",
    "embedding:sub/inner.safetensors",
    "embedding:bundle and embedding:bundle_key cat",
    "xembedding:pair cat",
    "embedding:missing cat",
    "embedding:../outside cat",
    "embedding:wide cat",
    " ".join(["word"] * 90),
    " ".join(f"w{i}" for i in range(60)),
    "a, " * 90,
    "supercalifragilisticexpialidocious " * 25,
    "(" + "long emphasis, " * 40 + ":1.2) and (short:0.7)",
    " ".join(["(word:1.1)"] * 80),
    " ".join(["(three word group:0.9)"] * 30),
    "cat " * 74 + "embedding:pair",
]


def random_text_encoder(activation):
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(
        bos_token_id=49406,
        eos_token_id=49407,
        pad_token_id=1,
        hidden_size=WIDTH,
        intermediate_size=37,
        num_attention_heads=4,
        num_hidden_layers=LAYERS,
        vocab_size=49408,
        projection_dim=WIDTH,
        hidden_act=activation,
    )
    return CLIPTextModel(config).eval()


def write_embeddings(folder):
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(7)
    vectors = torch.randn(3, WIDTH, generator=generator)
    (folder / "sub").mkdir(parents=True)
    save_file({"clip_l": vectors[:2], "clip_h": vectors[1:].clone()}, folder / "pair.safetensors")
    save_file({"emb_params": vectors[:1]}, folder / "a1111.safetensors")
    save_file({"emb_params": vectors}, folder / "sub" / "inner.safetensors")
    save_file({"emb_params": vectors}, folder.parent / "outside.safetensors")
    save_file({"emb_params": vectors.repeat(1, 2)}, folder / "wide.safetensors")
    save_file({"bundle_emb.x.string_to_param.*": vectors, "lora.weight": -vectors}, folder / "bundle.safetensors")
    save_file(
        {"bundle_emb.x.clip_l": vectors, "bundle_emb.x.clip_h": vectors[:2].clone(), "lora.weight": -vectors},
        folder / "bundle_key.safetensors",
    )


def comfy_clip(text_encoder, sd2, embeddings):
    """ComfyUI's CLIP object around the same weights. Its SD 2 encoder has one layer more, which is skipped."""
    import comfy.sd
    import comfy.sd1_clip
    from comfy.supported_models_base import ClipTarget
    from comfy.text_encoders import sd2_clip

    key = "clip_h" if sd2 else "clip_l"
    config = text_encoder.config
    options = {
        f"{key}_model_config": {
            "num_hidden_layers": LAYERS + sd2,
            "hidden_size": WIDTH,
            "num_attention_heads": config.num_attention_heads,
            "intermediate_size": config.intermediate_size,
            "hidden_act": config.hidden_act,
            "max_position_embeddings": 77,
            "eos_token_id": 49407,
        }
    }
    target = (
        ClipTarget(sd2_clip.SD2Tokenizer, sd2_clip.SD2ClipModel)
        if sd2
        else ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
    )
    clip = comfy.sd.CLIP(target=target, model_options=options, embedding_directory=[str(embeddings)])
    weights = {f"text_model.{name.removeprefix('text_model.')}": t for name, t in text_encoder.state_dict().items()}
    missing, unexpected = getattr(clip.cond_stage_model, key).load_sd(weights)
    # the skipped layer, and what only the pooled output needs
    assert all(f"layers.{LAYERS}." in name or "text_projection" in name for name in missing), missing
    assert not unexpected, unexpected
    return clip


def compare(sd2, embeddings):
    import torch
    from comfyui_mend.engine.models.protocol import PromptSyntax
    from comfyui_mend.engine.prompts import encode_prompts, folder_embeddings
    from transformers import CLIPTokenizer

    import nodes

    text_encoder = random_text_encoder("gelu" if sd2 else "quick_gelu")
    clip = comfy_clip(text_encoder, sd2, embeddings)
    tokenizer = CLIPTokenizer(
        str(TOKENIZER / "vocab.json"),
        str(TOKENIZER / "merges.txt"),
        model_max_length=77,
        pad_token="!" if sd2 else "<|endoftext|>",
    )
    find = folder_embeddings([embeddings], WIDTH, key="clip_h" if sd2 else "clip_l")

    def encode(prompts, syntax):
        states = encode_prompts(prompts, tokenizer, text_encoder, torch.device("cpu"), syntax, find)
        return [state.tokens for state in states]

    ours = encode(PROMPTS, PromptSyntax.COMFY)
    plain = encode(PROMPTS, PromptSyntax.PLAIN)
    rows = []
    for prompt, mine, literal in zip(PROMPTS, ours, plain, strict=True):
        theirs = nodes.CLIPTextEncode().encode(clip, prompt)[0][0][0]
        rows.append(
            {
                "prompt": prompt,
                "their_shape": list(theirs.shape),
                "our_shape": list(mine.shape),
                "difference": relative_difference(theirs, mine) if theirs.shape == mine.shape else None,
                "difference_of_plain": relative_difference(theirs[:, :77], literal),
            }
        )
    return rows


def relative_difference(expected, actual):
    return float((expected - actual).abs().max() / expected.abs().max())


def main():
    inside.boot()
    from comfy.cli_args import args

    args.fp32_text_enc = True
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        embeddings = Path(folder) / "embeddings"
        write_embeddings(embeddings)
        inside.answer({"sd1": compare(False, embeddings), "sd2": compare(True, embeddings)})


if __name__ == "__main__":
    main()
