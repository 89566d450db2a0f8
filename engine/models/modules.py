"""torch modules from configs and state dicts, without initialising or copying anything in vain."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set

import torch
from torch import Tensor, nn

from ..types import ModelFileError
from .weight_files import DTYPES

TOWER = "text_model."
"""What some versions of transformers put in front of the keys of CLIP's text tower."""


def assemble(
    build: Callable[[], nn.Module], weights: Mapping[str, Tensor], dtype: torch.dtype, source: str
) -> nn.Module:
    """The module that ``build`` makes, with ``weights`` as its parameters; nothing is initialised or copied in vain.

    Weights that have ``dtype`` already stay where they are, in the mapped file. Raises ModelFileError naming
    ``source`` unless keys and shapes fit exactly.
    """
    with torch.device("meta"):
        module = build()
    expected = module.state_dict()
    # transformers before 5.6 keeps CLIP's text tower in an inner module
    state = {TOWER + key if TOWER + key in expected else key: tensor for key, tensor in weights.items()}
    # persistent in transformers before 4.31
    buffers = {name for name, _ in module.named_buffers()}
    _check_keys(expected.keys() - buffers, expected.keys(), state.keys(), source)
    fitted = {key: _fit(tensor, expected[key].shape, dtype, key, source) for key, tensor in state.items()}
    module.load_state_dict(fitted, strict=False, assign=True)
    _make_position_ids(module)
    left = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    assert not left, f"without a value: {left}"
    return module.eval().requires_grad_(False)


def _check_keys(needed: Set[str], known: Set[str], found: Set[str], source: str) -> None:
    missing, unexpected = sorted(needed - found), sorted(found - known)
    if missing or unexpected:
        complaints = [
            f"{len(keys)} weights are {what} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
            for what, keys in (("missing", missing), ("unexpected", unexpected))
            if keys
        ]
        raise ModelFileError(
            f"{source} does not fit its configuration: {' and '.join(complaints)}; choose another model, or put the"
            " right configs beside it."
        )


def _fit(tensor: Tensor, shape: torch.Size, dtype: torch.dtype, key: str, source: str) -> Tensor:
    if tensor.dtype not in DTYPES.values():
        raise ModelFileError(f"{source} stores {key} as {tensor.dtype}, a quantised format that cannot be used here.")
    # linear layers used to be 1x1 convolutions: [C, C, 1, 1] for [C, C], and the other way round
    if tensor.shape != shape and _without_ones(tensor.shape) == _without_ones(shape):
        tensor = tensor.reshape(shape)
    if tensor.shape != shape:
        raise ModelFileError(
            f"{source} does not fit its configuration: {key} is {_text(tensor.shape)} where {_text(shape)} belongs;"
            " choose another model, or put the right configs beside it."
        )
    return tensor.to(dtype)


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [side for side in shape if side != 1]


def _text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _make_position_ids(module: nn.Module) -> None:
    """CLIP's only buffer, 0..76: files hold it sometimes, and then sometimes rounded to half precision."""
    for inner in module.modules():
        ids = inner._buffers.get("position_ids")
        if ids is not None:
            inner._buffers["position_ids"] = torch.arange(ids.shape[-1]).expand(1, -1)
