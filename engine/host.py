"""Where the engine runs: memory, progress, interrupt and folders, as one small protocol.

ComfyUI is one host (nodes/), a plain process is another (LocalHost, below). The engine never moves weights itself: it
asks for a module to be ready just before using it and sends its tensors to the device it is told.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn


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

    def load(self, activation_bytes: int) -> torch.device:
        """Make the module usable with ``activation_bytes`` to spare and return the device its inputs belong on.

        Valid until another module is loaded.
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

    def progress(self, total: int, description: str, latent_format: str | None = None) -> Progress:
        """A new bar; ``latent_format`` is the ``ModelFacts.latent_format`` of the previews it will be given."""
        ...

    def check_interrupt(self) -> None:
        """Raise the host's own interrupt when the user asked to stop."""
        ...

    def model_folders(self, kind: str) -> Sequence[Path]:
        """Folders to search for "checkpoints", "diffusers", "embeddings", ..., best first."""
        ...


def default_device() -> torch.device:
    """The machine's accelerator when it has one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


@dataclass(frozen=True)
class LocalModule:
    """A module that sits on one device for good."""

    module: nn.Module
    dtype: torch.dtype
    device: torch.device

    def load(self, activation_bytes: int) -> torch.device:
        self.module.to(self.device)
        return self.device


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
    """None: float16 on an accelerator, float32 on the CPU."""
    folders: dict[str, list[Path]] = field(default_factory=dict)
    show_progress: bool = False
    name: str = "local"

    def dtype(self, role: Role) -> torch.dtype:
        if self.weights_dtype is not None:
            return self.weights_dtype
        return torch.float32 if self.device.type == "cpu" else torch.float16

    def manage(self, module: nn.Module, role: Role) -> LocalModule:
        dtype = next((p.dtype for p in module.parameters()), torch.float32)
        return LocalModule(module.eval(), dtype, self.device)

    def free_memory(self) -> int:
        if self.device.type == "cuda":
            # what torch keeps from earlier tensors is free for new ones
            kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
            return torch.cuda.mem_get_info(self.device)[0] + kept
        return 4 * 2**30

    def progress(self, total: int, description: str, latent_format: str | None = None) -> Progress:
        return TerminalProgress(total, description) if self.show_progress else SilentProgress()

    def check_interrupt(self) -> None:
        """Python raises KeyboardInterrupt by itself."""

    def model_folders(self, kind: str) -> Sequence[Path]:
        return self.folders.get(kind, [])
