"""T5, the text encoder that FLUX and Stable Diffusion 3 read beside CLIP: its weights, its tokenizer, its prompts.

The encoder gets no attention mask: the padding behind a prompt is read as part of it, and the networks were trained
with so many tokens of it. 256 tokens instead of FLUX's 512 move its latents by 3 percent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..host import ManagedModule, Role
from ..memory import MIB
from ..prompts import Token, token_groups
from ..types import ModelFileError
from .family import Components, Config, Part, State, brain_float
from .protocol import PromptSyntax

TOKENIZER_FOLDERS = "t5_tokenizer"
"""The kind of ``Host.model_folders`` that may hold a tokenizer.json of T5's, for files without folders of their own."""

ACTIVATION_BYTES = 400 * MIB
"""Of the largest T5 over 512 tokens, in float32."""


def build_t5(config: Config) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    module = T5EncoderModel(T5Config.from_dict(dict(config)))
    # one table, also in the versions of transformers that tie it only when a checkpoint is loaded their way
    module.set_input_embeddings(module.shared)
    return module


def read_t5(state: State, config: Config) -> dict[str, Tensor]:
    """From an encoder's file, or a whole T5's; ``shared`` and the encoder's own table of tokens are one."""
    table = state["shared.weight"] if "shared.weight" in state else state.get("encoder.embed_tokens.weight")
    unused = ("decoder.", "lm_head.", "logit_scale")
    result = {key: tensor for key, tensor in state.items() if not key.startswith(unused)}
    return result if table is None else result | dict.fromkeys(("shared.weight", "encoder.embed_tokens.weight"), table)


def t5_part(name: str) -> Part:
    """The part of a family whose T5 has that name, in the files of ComfyUI's one-file checkpoints as well."""
    return Part(
        name,
        Role.TEXT_ENCODER,
        "t5",
        build_t5,
        read_t5,
        ("text_encoders.t5xxl.transformer.",),
        precision=brain_float,
    )


def t5_tokenizer(components: Components, part: str) -> Any:
    """That of one text encoder, else one the host has; raises ModelFileError where there is none."""
    names = (part.replace("text_encoder", "tokenizer"),)
    return load_t5_tokenizer(components.find_tokenizer(names, TOKENIZER_FOLDERS, "T5"))


def load_t5_tokenizer(folder: Path) -> Any:
    """The tokenizer in ``folder``; raises ModelFileError where it cannot be read."""
    from transformers import T5TokenizerFast  # type: ignore[attr-defined]

    try:
        return T5TokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelFileError(
            f"{folder.parent.name} has a T5 tokenizer that cannot be read ({error}): download it again."
        ) from error


@dataclass(frozen=True)
class T5Reader:
    """A T5 and how it is read."""

    encoder: ManagedModule
    tokenizer: Any
    length: int
    """Tokens of a prompt, padding included, that the network was trained with."""

    def read(self, prompts: Sequence[str], syntax: PromptSyntax, length: int = 0) -> list[Tensor]:
        """The states of each prompt, [1, tokens, width] in float32 on the CPU; ``length`` in the place of its own."""
        device = self.encoder.load(ACTIVATION_BYTES)
        states = encode_t5(prompts, self.tokenizer, self.encoder.module, device, syntax, length or self.length)
        return [state.cpu() for state in states]


def encode_t5(
    prompts: Sequence[str],
    tokenizer: Any,
    text_encoder: nn.Module,
    device: torch.device,
    syntax: PromptSyntax,
    length: int,
) -> list[Tensor]:
    """The last hidden states of each prompt, [1, tokens, width] in float32 on ``device``.

    ``PromptSyntax.PLAIN`` pads and cuts to ``length`` tokens. ``COMFY`` pads to them and reads a longer prompt whole;
    emphasis moves a token's state along the line from the empty prompt's, as with CLIP, and an embedding's name counts
    for nothing, as embeddings are made for CLIP. Raises InputError for a weight that is not finite.
    """
    if syntax is PromptSyntax.PLAIN:
        options = {"padding": "max_length", "max_length": length, "truncation": True}
        ids = [list(tokenizer(prompt, **options)["input_ids"]) for prompt in prompts]
        return [_states(row, text_encoder, device) for row in ids]
    return [_weighted_states(_tokens(prompt, tokenizer, length), tokenizer, text_encoder, device) for prompt in prompts]


def _tokens(prompt: str, tokenizer: Any, length: int) -> list[Token]:
    tokens = [token for group in token_groups(prompt, tokenizer, _no_vectors) for token in group]
    tokens.append(Token(tokenizer.eos_token_id))
    return tokens + [Token(tokenizer.pad_token_id)] * (length - len(tokens))


def _no_vectors(name: str) -> Tensor:
    return torch.empty(0, 1)


def _weighted_states(tokens: Sequence[Token], tokenizer: Any, text_encoder: nn.Module, device: torch.device) -> Tensor:
    states = _states([token.id for token in tokens], text_encoder, device)
    weights = torch.tensor([[token.weight for token in tokens]])[..., None].to(device)
    if bool((weights == 1).all()):
        return states
    padding = [tokenizer.pad_token_id] * (len(tokens) - 1)
    empty = _states([tokenizer.eos_token_id, *padding], text_encoder, device)
    # not lerp: a weight of 1 must leave its token exactly as it is
    return torch.where(weights == 1, states, (states - empty) * weights + empty)


def _states(ids: Sequence[int], text_encoder: nn.Module, device: torch.device) -> Tensor:
    with torch.no_grad():
        states: Tensor = text_encoder(torch.tensor([ids]).to(device))[0]
    return states.float()
