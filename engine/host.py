"""Where the engine runs: memory, progress, interrupt and folders, as one small protocol.

ComfyUI is one host (nodes/), a plain process is another (LocalHost, below). The engine never moves weights itself: it
asks for a module to be ready just before using it and sends its tensors to the device it is told.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .memory import is_out_of_memory
from .types import MendError


class Role(str, Enum):
    """What a module is for; hosts choose device and precision by it."""

    TEXT_ENCODER = "text_encoder"
    DENOISER = "denoiser"
    VAE = "vae"
    SAFETY = "safety"
    FILL = "fill"
    """A network that fills holes in one pass; float32 everywhere."""


class ManagedModule(Protocol):
    """One torch module whose place in memory is the host's business."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def dtype(self) -> torch.dtype:
        """The precision its inputs should have."""
        ...

    def load(self, activation_bytes: int, beside: Sequence[Any] = ()) -> torch.device:
        """Make the module usable with ``activation_bytes`` to spare and return the device its inputs belong on.

        ``beside`` are modules of the same host and role that are used together with it, and made usable as well. Valid
        until another module is loaded.
        """
        ...


class Progress(Protocol):
    """A bar that counts to a known total."""

    def update(self, step: int, preview: Tensor | None = None) -> None:
        """``step`` of the total are done; ``preview`` is the present guess at the clean latents, [B, C, h, w].

        Raises the host's own interrupt when the user asked to stop.
        """
        ...


class Host(Protocol):
    """The place the engine runs in."""

    @property
    def name(self) -> str: ...

    def dtype(self, role: Role) -> torch.dtype:
        """The precision weights of this role should be loaded in."""
        ...

    def manage(self, module: nn.Module, role: Role) -> ManagedModule:
        """Take charge of the memory of ``module``, whose weights are in place, on the CPU."""
        ...

    def free_memory(self) -> int:
        """Bytes that activations may use on the device that samples."""
        ...

    def total_memory(self) -> int:
        """Bytes that activations might use there if nothing else did."""
        ...

    def progress(self, total: int, description: str, latent_format: str | None = None) -> Progress:
        """A new bar; ``latent_format`` is the ``ModelFacts.latent_format`` of the previews it will be given."""
        ...

    def check_interrupt(self) -> None:
        """Raise the host's own interrupt when the user asked to stop."""
        ...

    def model_folders(self, kind: str) -> Sequence[Path]:
        """Folders to search for "checkpoints", "diffusers", "embeddings", ..., best first."""
        ...


MEMORY_INFO = Path("/proc/meminfo")


def default_device() -> torch.device:
    """The machine's accelerator when it has one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


@dataclass(eq=False)
class LocalModule:
    """A module that sits on the host's device, or on the CPU while others need the room."""

    module: nn.Module
    dtype: torch.dtype
    host: LocalHost
    resident: bool = False

    def load(self, activation_bytes: int, beside: Sequence[LocalModule] = ()) -> torch.device:
        """See ManagedModule. Raises MendError where the weights alone do not fit."""
        together = (self, *beside)
        missing = sum(managed.weight_bytes() for managed in together if not managed.resident)
        self.host.make_room(together, missing + activation_bytes)
        for managed in together:
            managed.arrive()
        return self.host.device

    def arrive(self) -> None:
        """Go to the host's device."""
        if self.resident:
            return
        try:
            self.module.to(self.host.device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise MendError(
                f"The weights of a {type(self.module).__name__} do not fit into the memory of {self.host.device}:"
                " load the model in a smaller precision, or run it on the CPU."
            ) from error
        self.resident = True

    def leave(self) -> None:
        """Go to the CPU."""
        self.module.to("cpu")
        self.resident = False

    def weight_bytes(self) -> int:
        """Of parameters and buffers."""
        return sum(tensor.nbytes for tensor in (*self.module.parameters(), *self.module.buffers()))


def computes_in_bfloat16(device: torch.device) -> bool:
    """Whether ``device`` has arithmetic for it, and not only a number format."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def available_ram() -> int:
    """Bytes of main memory that are to be had without swapping; a modest guess where that cannot be known."""
    try:
        lines = MEMORY_INFO.read_text().splitlines()
    except OSError:
        return 4 * 2**30
    values = {name: value for name, _, value in (line.partition(":") for line in lines)}
    return int(values["MemAvailable"].split()[0]) * 1024


@dataclass
class TerminalProgress:
    """A tqdm bar on stderr."""

    total: int
    description: str

    def __post_init__(self) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=self.total, desc=self.description, file=sys.stderr, leave=False)

    def update(self, step: int, preview: Tensor | None = None) -> None:
        self._bar.update(step - self._bar.n)
        if step >= self.total:
            self._bar.close()


class SilentProgress:
    """Shows nothing."""

    def update(self, step: int, preview: Tensor | None = None) -> None:
        pass


@dataclass(frozen=True)
class LocalHost:
    """A plain process: every module on one device, folders given by the caller, Ctrl-C as the interrupt."""

    device: torch.device = field(default_factory=default_device)
    weights_dtype: torch.dtype | None = None
    """None: float32 on the CPU; on an accelerator float16, and for the VAE, which overflows in it, bfloat16 where the
    device computes in it and else float32."""
    folders: dict[str, list[Path]] = field(default_factory=dict)
    show_progress: bool = False
    name: str = "local"
    _managed: weakref.WeakSet[LocalModule] = field(default_factory=weakref.WeakSet, repr=False, compare=False)

    def dtype(self, role: Role) -> torch.dtype:
        if self.weights_dtype is not None:
            return self.weights_dtype
        if self.device.type == "cpu":
            return torch.float32
        if role is Role.VAE:
            return torch.bfloat16 if computes_in_bfloat16(self.device) else torch.float32
        return torch.float16

    def manage(self, module: nn.Module, role: Role) -> LocalModule:
        dtype = next((p.dtype for p in module.parameters()), torch.float32)
        managed = LocalModule(module.eval(), dtype, self)
        self._managed.add(managed)
        return managed

    def make_room(self, modules: Sequence[LocalModule], needed: int) -> None:
        """Send others than ``modules`` to the CPU, the largest first, until ``needed`` bytes are free."""
        if self.device.type == "cpu":
            return
        others = [other for other in self._managed if other.resident and other not in modules]
        for other in sorted(others, key=LocalModule.weight_bytes, reverse=True):
            if self.free_memory() >= needed:
                return
            other.leave()

    def free_memory(self) -> int:
        if self.device.type == "cuda":
            # what torch keeps from earlier tensors is free for new ones
            kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            return torch.cuda.mem_get_info(self.device)[0] + kept
        if self.device.type == "mps":
            return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
        return available_ram()

    def total_memory(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[1]
        return torch.mps.recommended_max_memory() if self.device.type == "mps" else available_ram()

    def progress(self, total: int, description: str, latent_format: str | None = None) -> Progress:
        return TerminalProgress(total, description) if self.show_progress else SilentProgress()

    def check_interrupt(self) -> None:
        """Python raises KeyboardInterrupt by itself."""

    def model_folders(self, kind: str) -> Sequence[Path]:
        return self.folders.get(kind, [])
