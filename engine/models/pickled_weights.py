"""The tensors of a PyTorch file (.pt, .pth, .ckpt), read without running anything that is in it.

Such a file is a ZIP archive of raw numbers and one pickle that says which tensor is where. A pickle names functions for
Python to call; here only the few that describe tensors mean anything, and whatever else it names becomes an inert
object. A TorchScript archive is built the same way; its code is never opened. Nor can a small file ask for much memory:
all that is read or built is in proportion to what the file holds.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from ..types import InputError, ModelFileError

STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
MEMO_WRITERS = ("PUT", "BINPUT", "LONG_BINPUT")
MODULE_PARTS = ("_modules", "_parameters", "_buffers")
"""Where a pickled module keeps what its weights' names are made of."""
MAX_SHARED = 8
"""How many times the size of the file its tensors may have, each with memory of its own."""
METADATA = "__metadata__"
"""What safetensors keeps for itself among the names."""
WRAPPERS = ("state_dict", "model_state_dict", "params_ema", "params")
"""Under which checkpoints keep the weights beside other things."""


def convert_to_safetensors(source: Path, target: Path, *, force: bool = False) -> int:
    """Write the tensors of a PyTorch file as safetensors and return how many there are.

    Raises ModelFileError for a file that cannot be read so, and InputError for a target that exists (without
    ``force``) or has another suffix.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if source.suffix.lower() == ".safetensors":
        raise InputError(f"{source.name} is a .safetensors file already; there is nothing to convert.")
    if target.suffix.lower() != ".safetensors":
        raise InputError(f"{target.name} does not end in .safetensors; name the file that is to be written so.")
    if target.exists() and not force:
        raise InputError(f"{target.name} exists already; give another name, or --force to replace it.")
    tensors = read_pickled_weights(source)
    partial = target.with_name(f".{target.name}.part")
    try:
        save_file(tensors, partial)
        partial.replace(target)
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{target.name} cannot be written ({error}); check the folder.") from error
    finally:
        partial.unlink(missing_ok=True)
    return len(tensors)


def read_pickled_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a file that torch.save or torch.jit.save wrote, by their dotted names.

    Of a checkpoint only what is under one of WRAPPERS, where there is one. Raises ModelFileError for files in the
    format before PyTorch 1.6, for other kinds and for damaged ones.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root = _Unpickler(archive).load()
            if isinstance(root, dict):
                root = next((root[key] for key in WRAPPERS if isinstance(root.get(key), dict)), root)
            plans = {_checked(name): plan for name, plan in _tensors_in(root, set())}
            if sum(plan.bytes for plan in plans.values()) > MAX_SHARED * path.stat().st_size:
                raise ValueError("tensors of many times the size of the file")
            tensors = {name: plan.build(archive) for name, plan in plans.items()}
    except zipfile.BadZipFile as error:
        raise ModelFileError(
            f"{path.name} is not a PyTorch archive (those of before version 1.6 are not either): get the .safetensors"
            " version of this model."
        ) from error
    except OSError as error:
        raise ModelFileError(f"{path.name} cannot be read: {error.strerror or error}.") from error
    except _UNREADABLE as error:
        raise ModelFileError(f"{path.name} is damaged, or no PyTorch file: download it again.") from error
    if not tensors:
        raise ModelFileError(f"{path.name} holds no weights: choose a model's file.")
    return tensors


# what malformed pickles raise while they are read
_UNREADABLE = (
    pickle.UnpicklingError,
    EOFError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    OverflowError,
    ImportError,
    RuntimeError,
    MemoryError,
)


def _checked(name: str) -> str:
    name.encode()
    if name == METADATA:
        raise ValueError(f"a tensor named {METADATA}")
    return name


def _read(archive: zipfile.ZipFile, name: str) -> bytes:
    if archive.getinfo(name).compress_type != zipfile.ZIP_STORED:
        raise ValueError("compressed, which PyTorch does not do")
    return archive.read(name)


class _Sealed:
    """What a pickle can make but not alter."""

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a state for what has none")


@dataclass(frozen=True)
class _Storage(_Sealed):
    """A file of numbers in the archive."""

    name: str
    dtype: torch.dtype
    length: int


@dataclass(frozen=True)
class _TensorPlan(_Sealed):
    """What a pickle says about a tensor; nothing is read yet."""

    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.size) * self.storage.dtype.itemsize

    def build(self, archive: zipfile.ZipFile) -> Tensor:
        data = bytearray(_read(archive, self.storage.name))
        if len(data) != self.storage.length * self.storage.dtype.itemsize:
            raise ValueError("a storage of another length than the pickle says")
        raw = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        flat = raw.view(self.storage.dtype)
        # checks that the view stays inside; safetensors wants tensors that share nothing
        return torch.as_strided(flat, self.size, self.stride, self.offset).clone().contiguous()


class _Inert:
    """Stands in for anything else: takes any arguments, keeps the state it is given, and does nothing."""

    state: Any = None

    def __new__(cls, *arguments: Any, **options: Any) -> _Inert:
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Dict(dict):
    """An OrderedDict, without the notes that state dicts carry."""

    def __setstate__(self, state: Any) -> None:
        pass


class _PlanTensor(_Sealed):
    """Called like a function; those have attributes that a pickle could set."""

    def __new__(cls, storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Any:
        if not isinstance(storage, _Storage) or any(side < 0 for side in size):
            raise TypeError("no tensor")
        return _TensorPlan(storage, int(offset), tuple(map(int, size)), tuple(map(int, stride)))


class _PlanParameter(_Sealed):
    """Called like a function, too."""

    def __new__(cls, data: _TensorPlan, *_: Any) -> Any:
        return data


class _Unpickler(pickle.Unpickler):
    """Reads data.pkl with names that mean tensors, or nothing."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        name = next((n for n in archive.namelist() if PurePosixPath(n).name == "data.pkl"), None)
        if name is None:
            raise ValueError("no data.pkl")
        data = _read(archive, name)
        for opcode, argument, _ in pickletools.genops(data):
            # Python makes room for every number below
            if opcode.name in MEMO_WRITERS and isinstance(argument, int) and argument > len(data):
                raise ValueError("more to remember than there is")
        super().__init__(io.BytesIO(data))
        self._folder = PurePosixPath(name).parent

    def find_class(self, module: str, name: str) -> Any:
        known = {
            ("torch._utils", "_rebuild_tensor_v2"): _PlanTensor,
            ("torch._utils", "_rebuild_parameter"): _PlanParameter,
            ("collections", "OrderedDict"): _Dict,
        }
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        return known.get((module, name), _Inert)

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _, length = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype):
            raise ValueError("a reference to something other than numbers")
        return _Storage(str(self._folder / "data" / str(key)), dtype, int(length))


def _tensors_in(value: Any, seen: set[int], name: str = "") -> Iterator[tuple[str, _TensorPlan]]:
    """Tensors of nested dicts and objects under their dotted names."""
    if isinstance(value, _TensorPlan):
        yield name, value
        return
    inside = value.state if isinstance(value, _Inert) else value
    # a pickle may refer to what it is in
    if isinstance(inside, dict) and id(inside) not in seen:
        seen.add(id(inside))
        for key, part in inside.items():
            inner = name if key in MODULE_PARTS else f"{name}.{key}" if name else str(key)
            yield from _tensors_in(part, seen, inner)
