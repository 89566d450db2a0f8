"""Prompts: the grammar by hand-made tables, the arithmetic against the formula, plain text against diffusers."""

import logging
import math

import pytest
import torch
from comfyui_mend.engine.models.protocol import PromptSyntax
from comfyui_mend.engine.prompts import (
    Segment,
    SpecialTokens,
    TextLayer,
    Token,
    encode_prompts,
    folder_embeddings,
    parse_emphasis,
    read_embedding,
    split_chunks,
    token_groups,
)
from comfyui_mend.engine.types import InputError, ModelFileError
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tiny import tiny_pipeline

CPU = torch.device("cpu")
SPECIAL = SpecialTokens(start=49406, end=49407, pad=49407)
WIDTH = 32


@pytest.fixture(scope="module")
def pipeline():
    return tiny_pipeline()


@pytest.fixture(scope="module")
def tokenizer(pipeline):
    return pipeline.tokenizer


@pytest.fixture(scope="module")
def text_encoder(pipeline):
    return pipeline.text_encoder


@pytest.fixture
def vectors():
    return torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(7))


def no_embedding(name):
    return None


def segments(prompt):
    return [(segment.text, round(segment.weight, 6)) for segment in parse_emphasis(prompt)]


def words(groups, tokenizer):
    return [[(tokenizer.convert_ids_to_tokens(token.id), token.weight) for token in group] for group in groups]


def encode(pipeline, prompts, syntax=PromptSyntax.COMFY, find=no_embedding):
    states = encode_prompts(prompts, pipeline.tokenizer, pipeline.text_encoder, CPU, syntax, find)
    return [state.tokens for state in states]


# --- emphasis ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", []),
        ("a cat", [("a cat", 1)]),
        ("a (cat:1.3) on a ((red)) mat", [("a ", 1), ("cat", 1.3), (" on a ", 1), ("red", 1.21), (" mat", 1)]),
        (r"a \(cat\) (x:0.5)", [("a (cat) ", 1), ("x", 0.5)]),
        # a number inside replaces, a bare pair multiplies
        ("(a (b:1.2) c:0.8) d", [("a ", 0.8), ("b", 1.2), (" c", 0.8), (" d", 1)]),
        ("((a) b:2)", [("a", 2.2), (" b", 2)]),
        ("(((cat)))", [("cat", 1.331)]),
        ("cat:1.5", [("cat:1.5", 1)]),
        ("(cat:-0.5)(dog:0)( bird: 1.5 )", [("cat", -0.5), ("dog", 0), (" bird", 1.5)]),
        ("(a:b:2)", [("a:b", 2)]),
        # no number, or nothing to weigh
        ("(:1.2) (cat:) (cat:abc)", [(":1.2", 1.1), (" ", 1), ("cat:", 1.1), (" ", 1), ("cat:abc", 1.1)]),
        ("a () b", [("a ", 1), (" b", 1)]),
        # unbalanced
        ("unbalanced (cat:1.4 and more", [("unbalanced ", 1), ("(cat:1.4 and more", 1)]),
        ("a) (b) c", [("a) (b) c", 1)]),
        ("((cat)", [("(cat", 1.1)]),
        # other people's syntax is text
        ("[cat] {a|b} cat AND dog BREAK", [("[cat] {a|b} cat AND dog BREAK", 1)]),
    ],
)
def test_emphasis(prompt, expected):
    assert segments(prompt) == expected


@pytest.mark.parametrize("prompt", ["(cat:nan)", "a (cat:inf)", "(cat:-1e999)", "(((cat)):1.7e308)"])
def test_a_weight_that_is_not_finite_is_refused(prompt):
    with pytest.raises(InputError, match="finite number"):
        parse_emphasis(prompt)


def test_deep_nesting_is_no_recursion():
    (segment,) = parse_emphasis("(" * 3000 + "cat:0.5" + ")" * 3000)
    assert segment == Segment("cat", 0.5)


@given(st.text(alphabet="()\\:.12a ,-", max_size=60))
def test_any_parentheses_are_read(prompt):
    found = parse_emphasis(prompt)
    assert all(segment.text and math.isfinite(segment.weight) for segment in found)


@given(st.text(alphabet="ab ,:)\\", max_size=30))
def test_without_an_opening_parenthesis_nothing_is_weighted(prompt):
    assert "".join(segment.text for segment in parse_emphasis(prompt)) == prompt.replace(r"\)", ")")
    assert all(segment.weight == 1 for segment in parse_emphasis(prompt))


@given(st.recursive(st.text("abc ", min_size=1), lambda inner: inner.map("({})".format), max_leaves=8))
def test_balanced_parentheses_never_reach_the_text(prompt):
    depth = prompt.count("(")
    (segment,) = parse_emphasis(prompt)
    assert segment.text == prompt.strip("()")
    assert segment.weight == pytest.approx(1.1**depth)


PIECES = st.sampled_from([*"()\\:1 ,<[é!\n\0", "embedding:", "x", "../", "cat"])


@settings(max_examples=60)
@given(prompt=st.lists(PIECES, max_size=40).map("".join))
def test_any_prompt_becomes_full_chunks(prompt, tokenizer):
    groups = token_groups(prompt, tokenizer, lambda name: torch.ones(3, WIDTH) if "x" in name else None)
    chunks = split_chunks(groups, SPECIAL)
    assert all(len(chunk) == 77 for chunk in chunks)
    kept = [token for chunk in chunks for token in chunk if token.id not in SPECIAL]
    assert [token.id for token in kept] == [token.id for group in groups for token in group]


# --- embeddings in the text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "looked_up", "text"),
    [
        ("embedding:pair, a cat", ["pair,", "pair"], ", a cat"),
        ("style embedding:pair cat", ["pair"], "style  cat"),
        ("embedding:pair<lora:x> b", ["pair"], "<lora:x> b"),
        ("embedding:pair[b]", ["pair"], "[b]"),
        ("embedding:sub/pair.safetensors", ["sub/pair.safetensors"], ""),
        ("xembedding:pair cat", [], "xembedding:pair cat"),
        ("embedding:", [""], ""),
    ],
)
def test_where_an_embedding_name_begins_and_ends(prompt, looked_up, text, tokenizer, vectors):
    asked = []

    def find(name):
        asked.append(name)
        return vectors if name.endswith(("pair", "pair.safetensors")) else None

    groups = token_groups(prompt, tokenizer, find)
    assert asked == looked_up
    found = [group for group in groups if group[0].vector is not None]
    assert [len(group) for group in found] == [2] * (looked_up != [] and looked_up != [""])
    rest = [token.id for group in groups for token in group if token.vector is None]
    assert rest == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_weights_apply_to_embeddings(tokenizer, vectors):
    _, group, _ = token_groups("a (embedding:pair:1.2) cat", tokenizer, lambda name: vectors)
    assert [token.weight for token in group] == [1.2, 1.2]
    assert torch.equal(torch.stack([token.vector for token in group]), vectors)


def test_a_missing_embedding_is_left_out_with_a_warning(tokenizer, caplog):
    groups = token_groups("embedding:nothere cat", tokenizer, no_embedding)
    assert words(groups, tokenizer) == [[("cat</w>", 1.0)]]
    assert "nothere" in caplog.text


# --- chunks ----------------------------------------------------------------------------------------------------------


def run(first, length):
    return [Token(first + n) for n in range(length)]


def ids(chunk):
    return [token.id for token in chunk]


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([], [0]),
        ([75], [75]),
        ([76], [75, 1]),
        ([150], [75, 75]),
        ([70, 5], [75]),
        # short groups stay whole, groups of 8 and more fill the chunk first
        ([70, 7], [70, 7]),
        ([70, 8], [75, 3]),
        ([75, 8], [75, 8]),
        ([70, 7, 3], [70, 10]),
        ([151], [75, 75, 1]),
    ],
)
def test_groups_are_kept_together_in_chunks(lengths, expected):
    groups = [run(1000 * n, length) for n, length in enumerate(lengths, start=1)]
    chunks = split_chunks(groups, SpecialTokens(1, 2, 3))
    assert [sum(token >= 1000 for token in ids(chunk)) for chunk in chunks] == expected
    for chunk, inside in zip(chunks, expected, strict=True):
        assert ids(chunk)[0] == 1
        assert ids(chunk)[inside + 1 :] == [2] + [3] * (75 - inside)


# --- hidden states ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected_states(pipeline):
    """Prompts of one chunk by the formula, one token at a time: z_empty + w (z - z_empty)."""

    def states(text, weights):
        def hidden(string):
            ids = pipeline.tokenizer(string, padding="max_length", max_length=77, return_tensors="pt").input_ids
            with torch.no_grad():
                return pipeline.text_encoder(ids)[0]

        z, z_empty = hidden(text), hidden("")
        for position, weight in weights.items():
            z[:, position] = z_empty[:, position] + weight * (z[:, position] - z_empty[:, position])
        return z

    return states


def test_weights_interpolate_from_the_empty_prompt(pipeline, expected_states):
    (states,) = encode(pipeline, ["a (red cat:1.5) and (dogs:-0.5)"])
    expected = expected_states("a red cat and dogs", {2: 1.5, 3: 1.5, 5: -0.5})
    assert torch.allclose(states, expected, rtol=0, atol=2e-6)
    assert (states - expected_states("a red cat and dogs", {})).abs().max() > 0.1


def test_weight_zero_is_the_empty_prompt(pipeline):
    states, empty = encode(pipeline, ["(cat:0)", ""])
    assert torch.allclose(states[:, 1], empty[:, 1], rtol=0, atol=1e-6)


def test_prompts_encoded_together_equal_prompts_encoded_alone(pipeline, vectors):
    prompts = ["a (cat:1.3)", "", "word " * 90, "embedding:pair dog"]

    def find(name):
        return vectors

    for prompt, states in zip(prompts, encode(pipeline, prompts, find=find), strict=True):
        (alone,) = encode(pipeline, [prompt], find=find)
        assert states.shape == alone.shape
        assert torch.allclose(states, alone, rtol=0, atol=1e-6)


def test_an_embedding_equals_a_word_with_that_vector(pipeline, vectors):
    table = pipeline.text_encoder.get_input_embeddings().weight
    cat = pipeline.tokenizer("cat", add_special_tokens=False)["input_ids"]
    (states,) = encode(pipeline, ["a embedding:feline dog"], find=lambda name: table[cat].detach())
    (expected,) = encode(pipeline, ["a cat dog"])
    assert torch.equal(states, expected)
    (changed,) = encode(pipeline, ["a embedding:feline dog"], find=lambda name: vectors)
    assert (changed - expected)[:, 2:].abs().max() > 0.1


def test_the_text_encoder_is_left_as_it_was(pipeline, vectors):
    before = encode(pipeline, ["a cat"])[0]
    encode(pipeline, ["embedding:pair cat"], find=lambda name: vectors)
    with pytest.raises(IndexError):
        encode_prompts(
            ["embedding:pair cat"],
            pipeline.tokenizer,
            _Failing(pipeline.text_encoder),
            CPU,
            PromptSyntax.COMFY,
            lambda name: vectors,
        )
    assert not pipeline.text_encoder.get_input_embeddings()._forward_hooks
    assert torch.equal(encode(pipeline, ["a cat"])[0], before)


class _Failing(torch.nn.Module):
    def __init__(self, text_encoder):
        super().__init__()
        self.text_encoder = text_encoder

    def get_input_embeddings(self):
        return self.text_encoder.get_input_embeddings()

    def forward(self, ids):
        return self.text_encoder(ids)[99]


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("from_end", [1, 2, 3])
def test_any_layer_is_read_with_or_without_the_last_norm(pipeline, from_end, normed):
    encoder = pipeline.text_encoder
    ids = pipeline.tokenizer("a cat", padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = encoder(ids, output_hidden_states=True).hidden_states[-from_end]
        if normed:
            expected = getattr(encoder, "text_model", encoder).final_layer_norm(expected)
        pooled = encoder(ids).pooler_output

    def hooks():
        return sum(len(module._forward_hooks) for module in encoder.modules())

    layer, before = TextLayer(from_end, normed), hooks()
    arguments = (pipeline.tokenizer, encoder, CPU, PromptSyntax.COMFY, no_embedding, layer)
    (states,) = encode_prompts(["a cat"], *arguments)
    assert torch.allclose(states.tokens, expected, rtol=0, atol=1e-6)
    # of the last layer whatever layer is read, and of the words whatever their weight
    assert torch.allclose(states.pooled, pooled, rtol=0, atol=1e-6)
    (weighted,) = encode_prompts(["a (cat:1.4)"], *arguments)
    assert torch.allclose(weighted.pooled, pooled, rtol=0, atol=1e-6)
    assert not torch.allclose(weighted.tokens, expected, atol=1e-3)
    assert hooks() == before


def test_half_precision_weights_give_float32_states(pipeline):
    half = tiny_pipeline().text_encoder.to(torch.bfloat16)
    (states,) = encode_prompts(["a (cat:1.2)"], pipeline.tokenizer, half, CPU, PromptSyntax.COMFY, no_embedding)
    assert states.tokens.dtype == states.pooled.dtype == torch.float32
    assert (states.tokens - encode(pipeline, ["a (cat:1.2)"])[0]).abs().max() < 0.1


def test_no_prompts_give_no_states(pipeline):
    assert encode(pipeline, []) == []


@pytest.mark.parametrize("prompt", ["a (cat:1.3) on a mat", "", "word " * 90, "embedding:pair"])
def test_plain_syntax_is_diffusers_encode_prompt(pipeline, prompt):
    expected, _ = pipeline.encode_prompt(prompt, CPU, 1, do_classifier_free_guidance=False)
    assert torch.equal(encode(pipeline, [prompt], PromptSyntax.PLAIN)[0], expected)


def test_plain_and_comfy_agree_where_there_is_no_syntax(pipeline):
    prompts = ["a cat on a mat", "", "\u00e9t\u00e9"]
    for comfy, plain in zip(encode(pipeline, prompts), encode(pipeline, prompts, PromptSyntax.PLAIN), strict=True):
        assert torch.allclose(comfy, plain, rtol=0, atol=1e-6)


def sd2_tokenizer():
    from tiny import TOKENIZER
    from transformers import CLIPTokenizer

    return CLIPTokenizer(
        str(TOKENIZER / "vocab.json"), str(TOKENIZER / "merges.txt"), model_max_length=77, pad_token="!"
    )


def test_padding_follows_the_tokenizer():
    tokenizer = sd2_tokenizer()
    (chunk,) = split_chunks(token_groups("cat", tokenizer, no_embedding), SpecialTokens.of(tokenizer))
    assert ids(chunk) == [49406, 2368, 49407] + [0] * 74


def test_exclamation_marks_are_not_padding_in_sd2():
    groups = token_groups("wow! no!!", sd2_tokenizer(), no_embedding)
    assert words(groups, sd2_tokenizer()) == [[("wow</w>", 1.0), ("!</w>", 1.0), ("no</w>", 1.0), ("!!</w>", 1.0)]]


# --- embedding files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pair", "pair.safetensors", "sub/pair", "other"])
def test_embeddings_are_found_by_name(tmp_path, vectors, name):
    (tmp_path / "sub").mkdir()
    save_file({"emb_params": vectors}, tmp_path / "pair.safetensors")
    save_file({"emb_params": vectors}, tmp_path / "sub" / "pair.safetensors")
    save_file({"emb_params": vectors}, tmp_path / "sub" / "other.safetensors")
    assert torch.equal(folder_embeddings([tmp_path / "missing", tmp_path], WIDTH)(name), vectors)


@pytest.mark.parametrize("name", ["nothing", "", ".", "../outside", "sub/../../outside", "a\0b", "x" * 5000])
def test_names_that_are_no_embedding_find_nothing(tmp_path, vectors, name):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    save_file({"emb_params": vectors}, tmp_path / "outside.safetensors")
    assert folder_embeddings([tmp_path / "in"], WIDTH)(name) is None
    assert folder_embeddings([tmp_path / "in"], WIDTH)(str(tmp_path / "outside")) is None


@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_pickles_are_never_opened(tmp_path, suffix):
    (tmp_path / f"old{suffix}").write_bytes(b"\x80\x04not a model")
    for name in ("old", f"old{suffix}"):
        with pytest.raises(ModelFileError, match=f"old{suffix} is a pickle file.*convert"):
            folder_embeddings([tmp_path], WIDTH)(name)


def test_safetensors_anywhere_win_over_a_pickle(tmp_path, vectors):
    (tmp_path / "old.pt").write_bytes(b"\x80\x04")
    (tmp_path / "sub").mkdir()
    save_file({"emb_params": vectors}, tmp_path / "sub" / "old.safetensors")
    assert torch.equal(folder_embeddings([tmp_path], WIDTH)("old"), vectors)


@pytest.mark.parametrize("content", [b"", b"\x10\0\0\0\0\0\0\0{", b"<html>not found</html>"])
def test_damaged_files_are_named(tmp_path, content):
    (tmp_path / "bad.safetensors").write_bytes(content)
    with pytest.raises(ModelFileError, match=r"bad\.safetensors"):
        folder_embeddings([tmp_path], WIDTH)("bad")


def test_empty_files_are_named(tmp_path):
    save_file({}, tmp_path / "none.safetensors")
    with pytest.raises(ModelFileError, match=r"none\.safetensors holds no tensors"):
        folder_embeddings([tmp_path], WIDTH)("none")


def test_vectors_of_another_model_are_left_out_with_a_warning(tmp_path, caplog, tokenizer):
    save_file({"emb_params": torch.zeros(2, 768)}, tmp_path / "sdxl.safetensors")
    with caplog.at_level(logging.WARNING):
        groups = token_groups("embedding:sdxl cat", tokenizer, folder_embeddings([tmp_path], WIDTH))
    assert words(groups, tokenizer) == [[("cat</w>", 1.0)]]
    assert "768" in caplog.text and "32" in caplog.text


@pytest.mark.parametrize(
    ("tensors", "key", "expected"),
    [
        ({"clip_l": 1, "clip_g": 2}, "clip_l", [1]),
        ({"clip_l": 1, "clip_g": 2}, "clip_g", [2]),
        ({"bundle_emb.a.string_to_param.*": 1, "bundle_emb.b.string_to_param.*": 2, "lora.up": 9}, "clip_l", [1, 2]),
        ({"bundle_emb.a.clip_l": 1, "bundle_emb.a.clip_g": 2, "lora.up": 9}, "clip_g", [2]),
        ({"emb_params": 3}, "clip_l", [3]),
    ],
)
def test_embedding_layouts(tmp_path, tensors, key, expected):
    save_file({name: torch.full((1, 4), float(value)) for name, value in tensors.items()}, tmp_path / "e.safetensors")
    assert read_embedding(tmp_path / "e.safetensors", key).tolist() == [[float(value)] * 4 for value in expected]


def test_a_single_vector_may_be_flat_and_of_any_precision(tmp_path):
    save_file({"emb_params": torch.ones(WIDTH, dtype=torch.float16)}, tmp_path / "e.safetensors")
    vectors = read_embedding(tmp_path / "e.safetensors")
    assert vectors.shape == (1, WIDTH) and vectors.dtype == torch.float32
