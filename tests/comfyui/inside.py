"""For scripts that run under ComfyUI's own Python: the host's modules, the pack, and graphics memory to pretend with.

`boot()` comes before any other import of the host or the pack.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sys
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[2]
VRAM = torch.device("meta")
"""What a VramTensor says its device is: the only device type besides the CPU that every build of torch knows."""
CPU = torch.device("cpu")


def boot(base_directory: Path | None = None) -> ModuleType:
    """Import the ComfyUI in COMFYUI_PATH, on the CPU, and the pack as comfyui_mend, which is returned."""
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    from comfy.cli_args import args

    args.cpu = True
    torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other
    if base_directory is not None:
        args.base_directory = str(base_directory)
    import nodes  # noqa: F401  the host's, with all it imports, as when a pack is loaded

    spec = importlib.util.spec_from_file_location(
        "comfyui_mend", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec and spec.loader
    pack = importlib.util.module_from_spec(spec)
    sys.modules["comfyui_mend"] = pack
    spec.loader.exec_module(pack)
    return pack


def answer(value: object) -> None:
    """What run_inside returns."""
    sys.stdout.write(f"\n{json.dumps(value)}\n")


ALIVE: weakref.WeakValueDictionary[int, VramTensor] = weakref.WeakValueDictionary()
"""Every VramTensor."""


class VramTensor(torch.Tensor):
    """A tensor in pretended graphics memory: real data, another device, and errors where devices are mixed."""

    data_on_cpu: torch.Tensor

    @staticmethod
    def __new__(cls, data_on_cpu: torch.Tensor) -> VramTensor:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            data_on_cpu.shape,
            strides=data_on_cpu.stride(),
            storage_offset=data_on_cpu.storage_offset(),
            dtype=data_on_cpu.dtype,
            device=VRAM,
        )
        tensor.data_on_cpu = data_on_cpu
        ALIVE[id(tensor)] = tensor
        return tensor

    def __init__(self, data_on_cpu: torch.Tensor) -> None:
        pass

    def __repr__(self) -> str:
        return f"VramTensor({self.data_on_cpu})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run_on_pretended_device(function, args, kwargs or {})


MOVE = torch.ops.aten._to_copy.default
COPY_INTO = torch.ops.aten.copy_.default
SAME_KIND = torch.ops.aten._has_compatible_shallow_copy_type.default
"""Asked by Module.to: may the parameter object stay when its data changes?"""


def run_on_pretended_device(function, args, kwargs):
    """One torch operation, computed on the CPU; its result is in VRAM when its input is, or when it asks for that."""
    if function is SAME_KIND:
        return type(args[0]) is type(args[1])
    tensors = list(_tensors([*args, *kwargs.values()]))
    in_vram = [t for t in tensors if isinstance(t, VramTensor)]
    # in inference mode `to` arrives whole, its device by position
    device = kwargs.get("device", next((value for value in args if isinstance(value, torch.device)), None))
    to_vram = bool(in_vram) if device is None else torch.device(device) == VRAM
    if function is COPY_INTO:
        to_vram = isinstance(args[0], VramTensor)
    elif function is not MOVE and in_vram:
        # a number may come from anywhere, as on a real device
        stranger = next((t for t in tensors if not isinstance(t, VramTensor) and t.dim() > 0), None)
        if stranger is not None:
            raise RuntimeError(f"{function}: expected all tensors on one device, found {VRAM} and cpu {stranger.shape}")
    result = function(*map(_on_cpu, args), **{key: _on_cpu(value) for key, value in kwargs.items()})
    if not to_vram:
        return result
    # an operation in place gives back what it was given
    known = {id(t.data_on_cpu): t for t in in_vram}
    return _in_vram(result, known)


def _tensors(values: Iterable) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _on_cpu(value):
    if isinstance(value, VramTensor):
        return value.data_on_cpu
    if isinstance(value, torch.device):
        return CPU
    return [_on_cpu(v) for v in value] if isinstance(value, (list, tuple)) else value


def _in_vram(value, known):
    if isinstance(value, torch.Tensor):
        return known[id(value)] if id(value) in known else VramTensor(value)
    return tuple(_in_vram(v, known) for v in value) if isinstance(value, (list, tuple)) else value


class PretendedDevice(TorchDispatchMode):
    """Catches what is made on VRAM or moved there from the CPU."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run_on_pretended_device(function, args, kwargs or {})


@contextlib.contextmanager
def fake_vram(total: float, *, vram_state: str = "NORMAL_VRAM") -> Iterator[FakeVram]:
    """Graphics memory of ``total`` bytes; modules loaded into it hold VramTensors."""
    import comfy.model_management as mm

    memory = FakeVram(total)
    patches = {
        "get_torch_device": lambda: VRAM,
        "get_free_memory": memory.free,
        "get_total_memory": lambda *args, **kwargs: total,
        "minimum_inference_memory": lambda: 0,
        "extra_reserved_memory": lambda: 0,
        "is_device_cpu": lambda device: torch.device(device) == CPU,
        "should_use_fp16": lambda *args, **kwargs: True,
        "vram_state": mm.VRAMState[vram_state],
        "lowvram_available": True,
    }
    with mock.patch.multiple(mm, **patches), PretendedDevice():
        yield memory


class FakeVram:
    def __init__(self, total: float) -> None:
        self.total = total

    def free(self, device: torch.device | None = None, torch_free_too: bool = False) -> float | tuple[float, float]:
        """Stands in for model_management.get_free_memory: the total less what is alive."""
        storages = [t.data_on_cpu.untyped_storage() for t in list(ALIVE.values())]
        used = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
        free = 2.0**34 if device == CPU else self.total - used
        return (free, free) if torch_free_too else free
