"""Prompt text to CLIP embeddings: emphasis, textual inversion and prompts of any length.

``PromptSyntax.COMFY`` is the grammar and arithmetic of ComfyUI's CLIPTextEncode::

    text -> segments of one weight -> token groups -> chunks of 77 -> hidden states -> weighted hidden states

``(word)`` weighs 1.1 times its surroundings, ``(word:1.3)`` weighs 1.3 whatever surrounds it, ``\\(`` and ``\\)`` are
plain parentheses, ``embedding:name`` stands for the vectors of a textual-inversion file. A weight w moves the hidden
state z of its token along the line from the empty prompt's state at the same place: z' = z_empty + w (z - z_empty).

``PromptSyntax.PLAIN`` is diffusers: the text as it is, cut or padded to 77 tokens.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from .models.protocol import PromptSyntax
from .types import InputError, ModelFileError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

WINDOW = 77
"""Tokens CLIP's text encoder reads at once: start, up to 75 of the prompt, end, padding."""
EMPHASIS = 1.1
"""What a pair of parentheses without a number multiplies the weight by."""
LONG_GROUP = 8
"""Token groups of this length or more may be split between two chunks."""
EMBEDDING_MARK = "embedding:"

# Unicode noncharacters, never part of a text: they stand for escaped parentheses while the others are counted
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


class EmbeddingFinder(Protocol):
    """Looks a textual-inversion embedding up by the name used in the prompt."""

    def __call__(self, name: str) -> Tensor | None:
        """The vectors [n, width], or None when there is no embedding of that name."""
        ...


class Tokenizer(Protocol):
    """What is used of a transformers CLIPTokenizer."""

    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None

    def __call__(self, text: str | list[str], **options: Any) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class Segment:
    """A stretch of the prompt with one weight."""

    text: str
    weight: float


@dataclass(frozen=True, eq=False)
class Token:
    """One place in the encoder's input; where there is a ``vector`` [width], it replaces the id's own embedding."""

    id: int
    weight: float = 1.0
    vector: Tensor | None = None


class SpecialTokens(NamedTuple):
    """The ids that frame a chunk."""

    start: int
    end: int
    pad: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> SpecialTokens:
        start, end, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        if start is None or end is None:
            raise ModelFileError(
                "The model's tokenizer has no start or end token, which CLIP needs; use the tokenizer folder that "
                "belongs to the model."
            )
        return cls(start, end, end if pad is None else pad)


class TextLayer(NamedTuple):
    """Which of a text encoder's layers is read."""

    from_end: int = 1
    """1 for the last."""
    normed: bool = True
    """Whether the final layer norm follows."""


LAST_LAYER = TextLayer()


class PromptStates(NamedTuple):
    """What a text encoder makes of prompts, float32."""

    tokens: Tensor
    """[1, 77 * chunks, width] of one prompt; [chunks, 77, width] before the chunks are joined."""
    pooled: Tensor
    """[1, width]: the first chunk's last layer at the end token, after the norm and, where the encoder has one, the
    projection; unweighted."""


def encode_prompts(
    prompts: Sequence[str],
    tokenizer: Tokenizer,
    text_encoder: nn.Module,
    device: torch.device,
    syntax: PromptSyntax,
    find_embedding: EmbeddingFinder,
    layer: TextLayer = LAST_LAYER,
) -> list[PromptStates]:
    """The states of each prompt, on ``device``.

    ``text_encoder`` is a transformers CLIPTextModel, with projection or without, that is ready on ``device``; it runs
    once, on all chunks of all prompts together. Raises InputError for a weight that is not finite, and what
    ``find_embedding`` raises.
    """
    if not prompts:
        return []
    special = SpecialTokens.of(tokenizer)
    if syntax is PromptSyntax.PLAIN:
        chunks = [[plain_chunk(prompt, tokenizer)] for prompt in prompts]
    else:
        chunks = [split_chunks(token_groups(prompt, tokenizer, find_embedding), special) for prompt in prompts]
    states = encode_chunks([chunk for of_prompt in chunks for chunk in of_prompt], text_encoder, device, special, layer)
    lengths = [len(of_prompt) for of_prompt in chunks]
    # the chunks of a prompt follow each other along the token axis
    return [
        PromptStates(tokens.flatten(0, 1)[None], pooled[:1])
        for tokens, pooled in zip(states.tokens.split(lengths), states.pooled.split(lengths), strict=True)
    ]


def parse_emphasis(prompt: str) -> list[Segment]:
    """The prompt cut into segments at its parentheses; unbalanced ones stay text.

    Raises InputError for ``(word:nan)``, ``(word:inf)`` and a nesting so deep that the weight overflows.
    """
    escaped = prompt.replace("\\)", _CLOSE).replace("\\(", _OPEN)
    segments = []
    # a stack instead of recursion: thousands of nested parentheses are silly, not fatal
    todo = [Segment(part, 1.0) for part in reversed(_split_parentheses(escaped))]
    while todo:
        segment = todo.pop()
        if segment.text[0] == "(" and segment.text[-1] == ")" and len(segment.text) > 1:
            inner = _emphasised(segment)
            todo += [Segment(part, inner.weight) for part in reversed(_split_parentheses(inner.text))]
        else:
            segments.append(Segment(_unescape(segment.text), segment.weight))
    return segments


def _unescape(text: str) -> str:
    return text.replace(_CLOSE, ")").replace(_OPEN, "(")


def _split_parentheses(text: str) -> list[str]:
    """``a (b (c)) d`` -> ``a ``, ``(b (c))``, `` d``: only outermost pairs, nothing empty, nothing lost."""
    parts = []
    start = depth = 0
    for position, character in enumerate(text):
        if character == "(":
            if depth == 0:
                parts.append(text[start:position])
                start = position
            depth += 1
        elif character == ")":
            depth -= 1
            if depth == 0:
                parts.append(text[start : position + 1])
                start = position + 1
    parts.append(text[start:])
    return [part for part in parts if part]


def _emphasised(segment: Segment) -> Segment:
    """``(text)`` or ``(text:weight)`` without its parentheses, with the weight they give."""
    text, colon, number = segment.text[1:-1].rpartition(":")
    weight = segment.weight * EMPHASIS
    if text and (explicit := _number(number)) is not None:
        weight = explicit
    else:
        text = text + colon + number
    if not math.isfinite(weight):
        raise InputError(
            f"The prompt's weight in '{_unescape(segment.text)[:60]}' is {weight}; write a finite number such as "
            "(word:1.2), or fewer parentheses."
        )
    return Segment(text, weight)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def token_groups(prompt: str, tokenizer: Tokenizer, find_embedding: EmbeddingFinder) -> list[list[Token]]:
    """The prompt's tokens in groups that chunks keep together: one for each segment and for each embedding."""
    groups = []
    for segment in parse_emphasis(prompt):
        for piece in re.split(rf"(?<=\s)(?={EMBEDDING_MARK})", segment.text):
            text = piece
            if piece.startswith(EMBEDDING_MARK):
                vectors, text = _take_embedding(piece.removeprefix(EMBEDDING_MARK), find_embedding)
                # the id is only a place holder, and any will do
                groups.append([Token(0, segment.weight, vector) for vector in vectors])
            groups.append([Token(token, segment.weight) for token in _token_ids(text, tokenizer)])
    return [group for group in groups if group]


def _take_embedding(text: str, find_embedding: EmbeddingFinder) -> tuple[Sequence[Tensor], str]:
    """The vectors of the embedding whose name opens ``text``, and the text after the name.

    The name ends at white space, ``<`` or ``[``; a name that is not found is tried again without the commas at its
    ends. An embedding that cannot be found leaves no vectors.
    """
    name, _, rest = " ".join(text.split()).partition(" ")
    if bracket := re.search(r"[<\[]", name):
        name, rest = name[: bracket.start()], f"{name[bracket.start() :]} {rest}".rstrip()
    vectors = find_embedding(name)
    bare = name.strip(",")
    if vectors is None and bare != name:
        # what follows is as many characters as the name lost, so a comma in front comes out behind
        vectors, rest = find_embedding(bare), f"{name[len(bare) :]} {rest}"
    if vectors is None:
        log.warning("The embedding '%s' is left out of the prompt: no usable file of that name.", name)
        return [], rest
    return list(vectors.reshape(-1, vectors.shape[-1])), rest


def _token_ids(text: str, tokenizer: Tokenizer) -> list[int]:
    # The tokenizers of SD 2 pad with "!" and would read every "!" of a prompt as padding, which it was not in
    # training; splitting special tokens makes it a character again.
    pads_with_text = tokenizer.pad_token_id != tokenizer.eos_token_id
    encoded = tokenizer(text, add_special_tokens=False, verbose=False, split_special_tokens=pads_with_text)
    return list(encoded["input_ids"])


def split_chunks(groups: Sequence[Sequence[Token]], special: SpecialTokens) -> list[list[Token]]:
    """Chunks of exactly 77 tokens, at least one; a group that does not fit moves to the next, a long one is split."""
    chunks = [[Token(special.start)]]
    for group in groups:
        rest = list(group)
        while rest:
            room = WINDOW - 1 - len(chunks[-1])
            if len(rest) <= room or len(rest) >= LONG_GROUP:
                chunks[-1] += rest[:room]
                rest = rest[room:]
            if rest:
                chunks.append([Token(special.start)])
    return [_close_chunk(chunk, special) for chunk in chunks]


def _close_chunk(chunk: list[Token], special: SpecialTokens) -> list[Token]:
    return [*chunk, Token(special.end), *[Token(special.pad)] * (WINDOW - 1 - len(chunk))]


def plain_chunk(prompt: str, tokenizer: Tokenizer) -> list[Token]:
    """The prompt's first 75 tokens, framed and padded by the tokenizer itself."""
    encoded = tokenizer(prompt, padding="max_length", max_length=WINDOW, truncation=True)
    return [Token(token) for token in encoded["input_ids"]]


def encode_chunks(
    chunks: Sequence[Sequence[Token]],
    text_encoder: nn.Module,
    device: torch.device,
    special: SpecialTokens,
    layer: TextLayer = LAST_LAYER,
) -> PromptStates:
    """The states of the chunks, each token's weighted against the empty prompt's."""
    weights = torch.tensor([[token.weight for token in chunk] for chunk in chunks])[..., None]
    if bool((weights == 1).all()):
        return hidden_states(chunks, text_encoder, device, layer)
    weights = weights.to(device)
    empty = _close_chunk([Token(special.start)], special)
    states = hidden_states([*chunks, empty], text_encoder, device, layer)
    z, z_empty = states.tokens[:-1], states.tokens[-1]
    # not lerp: a weight of 1 must leave its token exactly as it is
    return PromptStates(torch.where(weights == 1, z, (z - z_empty) * weights + z_empty), states.pooled[:-1])


def hidden_states(
    chunks: Sequence[Sequence[Token]], text_encoder: nn.Module, device: torch.device, layer: TextLayer = LAST_LAYER
) -> PromptStates:
    """The states of the chunks, unweighted."""
    ids = torch.tensor([[token.id for token in chunk] for chunk in chunks]).to(device)
    vectors = [
        (row, column, token.vector)
        for row, chunk in enumerate(chunks)
        for column, token in enumerate(chunk)
        if token.vector is not None
    ]
    caught: list[Tensor] = []

    def put_vectors(module: nn.Module, arguments: object, embedded: Tensor) -> Tensor:
        embedded = embedded.clone()
        for row, column, vector in vectors:
            embedded[row, column] = vector.to(embedded)
        return embedded

    def catch(module: nn.Module, arguments: object, output: Any) -> None:
        # a tuple in transformers before 5
        caught.append(output if isinstance(output, Tensor) else output[0])

    hooks = []
    tower: Any = getattr(text_encoder, "text_model", text_encoder)
    try:
        if vectors:
            # the one public place, the same in every transformers, where an id becomes a vector
            table = cast("PreTrainedModel", text_encoder).get_input_embeddings()
            hooks.append(table.register_forward_hook(put_vectors))
        if layer != LAST_LAYER:
            # output_hidden_states would mean the normed state or the bare one by the last, depending on the version
            hooks.append(tower.encoder.layers[-layer.from_end].register_forward_hook(catch))
        with torch.no_grad():
            output = text_encoder(ids)
            (tokens,) = caught or [output.last_hidden_state]
            if caught and layer.normed:
                tokens = tower.final_layer_norm(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    projected = getattr(output, "text_embeds", None)
    return PromptStates(tokens.float(), (output.pooler_output if projected is None else projected).float())


def folder_embeddings(folders: Sequence[Path], width: int, key: str = "clip_l") -> EmbeddingFinder:
    """Finds textual-inversion files, ``name.safetensors``, in ``folders`` and the folders inside them, best first.

    The extension may be left out of the name and sub-folders may be part of it, ``../`` may not. Vectors of another
    width than the text encoder's belong to another model: they count as not found, with a warning. ``key`` picks the
    encoder in files made for several ("clip_l", "clip_g", "clip_h"). Raises ModelFileError for a name that exists only
    as a pickle (.pt, .bin) and for a damaged file.
    """

    def find(name: str) -> Tensor | None:
        path = _find_embedding_file(name, folders)
        if path is None:
            return None
        vectors = read_embedding(path, key)
        if vectors.shape[-1] != width:
            log.warning(
                "The embedding %s has vectors of %d numbers and this model's text encoder takes %d: it was made for "
                "another kind of model.",
                path.name,
                vectors.shape[-1],
                width,
            )
            return None
        return vectors

    return find


def read_embedding(path: Path, key: str = "clip_l") -> Tensor:
    """The vectors [n, width] in float32 of a textual-inversion .safetensors file.

    Layouts: one tensor for each text encoder (``clip_l``, ``clip_g``), the bundles of LoRA files
    (``bundle_emb.*.string_to_param.*``, ``bundle_emb.*.clip_l``), else the file's first tensor (``emb_params``).
    Raises ModelFileError for a damaged or empty file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelFileError(
            f"The embedding {path.name} cannot be read as safetensors ({error}); download or convert it again."
        ) from error
    if not tensors:
        raise ModelFileError(f"The embedding {path.name} holds no tensors; download or convert it again.")
    found = (
        [tensors[key]]
        if key in tensors
        else _bundled(tensors, ".string_to_param.*") or _bundled(tensors, f".{key}") or list(tensors.values())[:1]
    )
    return torch.cat([torch.atleast_2d(tensor).flatten(0, -2) for tensor in found]).float()


def _bundled(tensors: Mapping[str, Tensor], suffix: str) -> list[Tensor]:
    return [tensor for name, tensor in tensors.items() if name.startswith("bundle_emb.") and name.endswith(suffix)]


def _find_embedding_file(name: str, folders: Sequence[Path]) -> Path | None:
    pickle = None
    for folder in (inner for outer in folders for inner in _with_subfolders(outer)):
        # os.path instead of Path: a name too long or with a null byte is a file that does not exist, not an error
        stem = os.path.abspath(os.path.join(folder, name))  # noqa: PTH100, PTH118
        if not stem.startswith(os.path.join(os.path.abspath(folder), "")):  # noqa: PTH100, PTH118
            continue
        for path in (stem, f"{stem}.safetensors"):
            if path.lower().endswith(".safetensors") and os.path.isfile(path):  # noqa: PTH113
                return Path(path)
        for path in (stem, f"{stem}.pt", f"{stem}.bin"):
            if path.lower().endswith((".pt", ".bin")) and os.path.isfile(path):  # noqa: PTH113
                pickle = pickle or path
    if pickle is not None:
        raise ModelFileError(
            f"The embedding {Path(pickle).name} is a pickle file, which can run code when it is opened; convert it to "
            ".safetensors and keep its name."
        )
    return None


def _with_subfolders(folder: Path) -> Iterator[str]:
    for path, children, _ in os.walk(folder, followlinks=True):
        children.sort()
        yield path
