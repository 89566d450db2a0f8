"""What lies on disk: safetensors headers, config files and the weight files of a diffusers folder.

Only headers and JSON are read here and weights are mapped into memory, so everything takes milliseconds whatever the
size of the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..types import ModelFileError

MAX_HEADER_BYTES = 100_000_000
"""The safetensors format's own limit."""
PICKLE_SUFFIXES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
"""Element types a weight may have; others (position ids, quantised formats) are never converted."""

SAFE_COPY = "get the .safetensors version of this model, or convert it with a tool you trust"

# what other things look like in their first bytes; pickles are told apart by these, never by opening them
_FOREIGN = (
    (b"PK\x03\x04", f"is a PyTorch pickle archive, which can run code when opened: {SAFE_COPY}"),
    (b"\x80", f"is a Python pickle, which can run code when opened: {SAFE_COPY}"),
    (b"version https://git-lfs", "is a Git LFS pointer, not the model itself: fetch it with `git lfs pull`"),
    (
        b"GGUF",
        "is a GGUF file: load it with a GGUF loader's node and connect its MODEL to Wrap Model (Mend), or get the"
        " .safetensors version of this model",
    ),
    (b"<", "is a web page, probably an error or a login page saved under this name: download the model again"),
    (b'{"error', "is an error message from a web server saved under this name: download the model again"),
)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as the header describes it; ``start`` and ``end`` are bytes from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True)
class Header:
    """The table of contents of one safetensors file."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]

    @cached_property
    def listing(self) -> str:
        """All keys, one a line: a search through it is a hundred times faster than through each."""
        return "\n".join(self.tensors)

    def shape(self, key: str) -> tuple[int, ...] | None:
        info = self.tensors.get(key)
        return None if info is None else info.shape

    def has_prefix(self, *prefixes: str) -> bool:
        return any(key.startswith(prefixes) for key in self.tensors)

    def read(self, key: str) -> Tensor:
        """One tensor alone, by its place in the file."""
        info = self.tensors[key]
        if info.dtype not in DTYPES:
            raise ModelFileError(
                f"{self.path.name} stores {key} as {info.dtype}; supported are {', '.join(sorted(DTYPES))}."
            )
        with self.path.open("rb") as file:
            file.seek(info.start)
            data = bytearray(file.read(info.end - info.start))
        return torch.frombuffer(data, dtype=DTYPES[info.dtype]).reshape(info.shape)


def read_header(path: Path) -> Header:
    """The header of a safetensors file, checked against the file's length; https://github.com/huggingface/safetensors.

    Raises ModelFileError for what is missing, empty, truncated or something else under this name.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(64)
            _refuse_foreign(path, start)
            length = int.from_bytes(start[:8], "little")
            if length > MAX_HEADER_BYTES or (size > 8 and start[8:9] != b"{"):
                raise ModelFileError(f"{path.name} is not a safetensors file: choose a model, or download it again.")
            if size < 8 + length:
                raise ModelFileError(_truncated(path, size, 8 + length))
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise ModelFileError(f"{path.name} cannot be read: {error.strerror or error}.") from error
    tensors, metadata = _parse_header(path, raw)
    end = max((info.end for info in tensors.values()), default=8 + length)
    if end > size:
        raise ModelFileError(_truncated(path, size, end))
    if end < size:
        raise ModelFileError(
            f"{path.name} is damaged: {size - end:,} bytes follow the last of its tensors; download it again."
        )
    return Header(path, tensors, metadata)


def _refuse_foreign(path: Path, start: bytes) -> None:
    if not start:
        raise ModelFileError(f"{path.name} is empty: download it again.")
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    for magic, complaint in _FOREIGN:
        # a header's length may begin with any of these bytes, but then its "{" stands at the ninth
        if text.startswith(magic) and start[8:9] != b"{":
            raise ModelFileError(f"{path.name} {complaint}.")
    if len(start) < 8:
        raise ModelFileError(_truncated(path, len(start), 8))


def _truncated(path: Path, size: int, expected: int) -> str:
    return f"{path.name} is incomplete: it has {size:,} bytes where at least {expected:,} belong; download it again."


def _parse_header(path: Path, raw: bytes) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    base = 8 + len(raw)
    try:
        table = json.loads(raw)
        metadata = table.pop("__metadata__", {})
        tensors = {key: _parse_tensor(entry, base) for key, entry in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFileError(f"{path.name} is damaged: its header cannot be read; download it again.") from error
    return tensors, metadata


def _parse_tensor(entry: Mapping[str, Any], base: int) -> TensorInfo:
    start, end = (int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(side) for side in entry["shape"])
    dtype = str(entry["dtype"])
    if not 0 <= start <= end or min(shape, default=0) < 0:
        raise ValueError("offsets out of order")
    if dtype in DTYPES and prod(shape) * DTYPES[dtype].itemsize != end - start:
        raise ValueError("offsets do not fit the shape")
    return TensorInfo(dtype, shape, base + start, base + end)


def read_json(path: Path) -> dict[str, Any]:
    """A config file; raises ModelFileError naming it by its last two parts."""
    name = f"{path.parent.name}/{path.name}"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelFileError(f"{name} cannot be read: {error.strerror or error}.") from error
    except ValueError as error:
        raise ModelFileError(f"{name} is not valid JSON: download the model again.") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"{name} holds no settings: download the model again.")
    return value


_SHARD = r"(?P<index>\d{5})-of-(?P<count>\d{5})"


def choose_weights(names: Iterable[str], stem: str, variants: Sequence[str]) -> list[str] | None:
    """The file, or all shards, that hold one component's weights, among the ``names`` of its folder.

    ``stem`` is "diffusion_pytorch_model" or "model"; ``variants`` are tried in order, "" being the plain file, then
    any other but "non_ema". Shards carry their number and count in their names, so no index is needed: both
    ``stem.fp16-00001-of-00002`` and ``stem-00001-of-00002.fp16`` are in use. None when there is no complete set.
    """
    pattern = re.compile(
        rf"{re.escape(stem)}(?:\.(?P<before>\w+))?(?:-{_SHARD})?(?:\.(?P<after>\w+))?\.safetensors", re.ASCII
    )
    found: dict[str, dict[str, list[str]]] = {}
    for name in sorted(names):
        match = pattern.fullmatch(name)
        if match:
            variant = match["before"] or match["after"] or ""
            found.setdefault(variant, {}).setdefault(match["count"] or "00001", []).append(name)
    complete = {
        variant: files
        for variant, sets in found.items()
        for count, files in sets.items()
        if len(files) == int(count) and variant != "non_ema"
    }
    for variant in (*variants, *sorted(complete)):
        if variant in complete:
            return complete[variant]
    return None


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, mapped into memory and not yet read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    read_header(path)  # names a damaged file before anything else does
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{path.name} cannot be read ({error}): download it again.") from error


def read_component(folder: Path, stem: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights of one folder of a diffusers pipeline, those closest to ``dtype`` where there is a choice."""
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    half = {torch.float16: "fp16", torch.bfloat16: "bf16"}.get(dtype)
    chosen = choose_weights(names, stem, [*([half] if half else []), "", "fp16", "bf16"])
    if chosen is None:
        raise ModelFileError(_no_weights(folder, stem, names))
    return {key: tensor for name in chosen for key, tensor in read_weights(folder / name).items()}


def _no_weights(folder: Path, stem: str, names: Sequence[str]) -> str:
    model, part = folder.parent.name, folder.name
    pickle = next((name for name in names if name.endswith(PICKLE_SUFFIXES)), None)
    if pickle is not None:
        return (
            f"{model} has only {part}/{pickle}, a pickle, which can run code when opened: download a version of the"
            " model with .safetensors files."
        )
    if any("-of-" in name and name.endswith(".safetensors") for name in names):
        return f"{model} lacks some of the numbered files of {part}/{stem}: download the whole folder."
    return f"{model} has no {part}/{stem}.safetensors: download the whole folder."
