"""The small CLIPTokenizer: every word of the captions is one token, and bytes spell whatever else is asked for."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

from . import scenes
from .models import TOKENS

END_OF_WORD = "</w>"
BOS, EOS = "<|startoftext|>", "<|endoftext|>"

Symbols = tuple[str, ...]
Pair = tuple[str, str]


def words() -> list[str]:
    """The words that captions are made of."""
    return sorted({word for caption in scenes.captions() for word in caption.split()})


def byte_symbols() -> list[str]:
    """GPT-2's 256 printable stand-ins for bytes, as CLIP's vocabulary begins with them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [*map(chr, printable), *(chr(256 + i) for i in range(len(others)))]


def learn_merges(vocabulary: Iterable[str]) -> list[Pair]:
    """Byte pair encoding of a word list, until every word is one symbol (Sennrich et al., 2016)."""
    spelled: list[Symbols] = [(*word[:-1], word[-1] + END_OF_WORD) for word in vocabulary]
    merges: list[Pair] = []
    while any(len(symbols) > 1 for symbols in spelled):
        pairs = Counter(pair for symbols in spelled for pair in pairwise(symbols))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = [_merge(symbols, best) for symbols in spelled]
    return merges


def _merge(symbols: Symbols, pair: Pair) -> Symbols:
    merged: list[str] = []
    for symbol in symbols:
        # what was just joined is longer than the pair's first half, so it cannot be joined twice
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return tuple(merged)


def write_vocabulary(folder: Path) -> tuple[Path, Path]:
    """vocab.json and merges.txt, which every version of transformers reads."""
    letters, merges = byte_symbols(), learn_merges(words())
    tokens = [*letters, *(letter + END_OF_WORD for letter in letters)]
    tokens += [token for token in dict.fromkeys(a + b for a, b in merges) if token not in tokens]
    tokens += [BOS, EOS]
    vocab, rules = folder / "vocab.json", folder / "merges.txt"
    vocab.write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    rules.write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges), ""]), encoding="utf-8")
    return vocab, rules


def build_tokenizer() -> Any:
    """transformers' CLIPTokenizer over the captions' words."""
    from transformers import CLIPTokenizer

    with tempfile.TemporaryDirectory() as folder:
        vocab, rules = write_vocabulary(Path(folder))
        return CLIPTokenizer(str(vocab), str(rules), model_max_length=TOKENS, pad_token=EOS)
