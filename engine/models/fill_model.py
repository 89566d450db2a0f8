"""Networks that fill a hole in one pass, LaMa and MAT, as the optional package spandrel builds them.

R. Suvorov et al., Resolution-robust Large Mask Inpainting with Fourier Convolutions (2022).
W. Li et al., MAT: Mask-Aware Transformer for Large Hole Image Inpainting (2022).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..host import Host, ManagedModule, Role
from ..masks import FloatArray
from ..pull_push import Hole
from ..tiles import Window
from ..types import MissingPackageError, ModelFileError
from .load import walk
from .weight_files import PICKLE_SUFFIXES, Header, read_header

FOLDER = "inpaint"
"""Where ComfyUI's packs look for these: models/inpaint."""
SUPPORTED = "LaMa and MAT"
CONVERT = "`mend models convert`"

LAMA_AREA = 1536 * 1024
"""LaMa's result loses texture in holes of more than some 500 pixels, about half the side of this."""
MAT_SIDE = 512
"""MAT's networks are made for squares of this size."""
BYTES_PER_PIXEL = {"LaMa": 1000, "MAT": 6000}
"""Activations at float32: 1.5 times the most that is alive at once."""

# each names one layer that only this architecture has
_LAMA_KEYS = ("model.model.1.bn_l.running_mean", "generator.model.1.bn_l.running_mean")
_MAT_KEYS = ("synthesis.first_stage.conv_first.conv.resample_filter",)


@dataclass(frozen=True, eq=False)
class FillModel:
    """A network that fills holes; see ``fill.FillNetwork``."""

    name: str
    """Its file's."""
    architecture: str
    """"LaMa" or "MAT"."""
    window: Window
    host: Host
    _descriptor: Any
    """spandrel's MaskedImageModelDescriptor."""
    _managed: ManagedModule

    @torch.inference_mode()
    def fill(self, pixels: FloatArray, hole: Hole, seed: int) -> FloatArray:
        """The picture [H, W, 3] in 0..1, of a size the window takes, with the hole [H, W] filled.

        ``seed`` decides what MAT paints; LaMa has no choice to make. Computed in float32.
        """
        height, width = hole.shape
        device = self._managed.load(BYTES_PER_PIXEL[self.architecture] * height * width)
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None].to(device)
        mask = torch.from_numpy(hole).float()[None, None].to(device)
        with _seeded(seed, device):
            if self.architecture == "MAT":
                self._choose_style(seed, device)
            filled: Tensor = self._descriptor(image, mask)
        array: FloatArray = filled[0].float().permute(1, 2, 0).contiguous().cpu().numpy()
        return array

    def _choose_style(self, seed: int, device: torch.device) -> None:
        """MAT draws its style once, when it is built, and leaves it where that was."""
        module = self._descriptor.model
        style = np.random.default_rng(seed).standard_normal(tuple(module.z.shape), dtype=np.float32)
        module.z, module.label = torch.from_numpy(style).to(device), module.label.to(device)


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch's own generators at ``seed`` (MAT drops out features also when it fills), and back as they were."""
    with torch.random.fork_rng(range(torch.cuda.device_count()) if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def find_fill_models(host: Host) -> dict[str, Path]:
    """Files of the host's folders "inpaint" that may be such a model, by their place below them; nothing is opened.

    Pickles are listed too: choosing one tells how to convert it.
    """
    found: dict[str, Path] = {}
    for root in host.model_folders(FOLDER):
        for folder, _, names in walk(root):
            for name in names:
                if name.lower().endswith((".safetensors", *PICKLE_SUFFIXES)) and not name.startswith("."):
                    found.setdefault((folder / name).relative_to(root).as_posix(), folder / name)
    return dict(sorted(found.items(), key=lambda entry: entry[0].casefold()))


def load_fill_model(path: Path, host: Host) -> FillModel:
    """The LaMa or MAT network of a .safetensors file.

    Raises ModelFileError for files that are damaged or hold something else, naming what it is, and
    MissingPackageError for spandrel and, for MAT, spandrel_extra_arches.
    """
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise ModelFileError(
            f"{path.name} is a pickle, which can run code when opened: turn it into a .safetensors file with"
            f" {CONVERT}, which only reads its numbers, or download the model as .safetensors."
        )
    if not path.exists():
        raise ModelFileError(f"{path.name} is not there any more: choose another model, or refresh the menu.")
    descriptor = _build(read_header(path))
    architecture = descriptor.architecture.id
    window = Window(LAMA_AREA, 8) if architecture == "LaMa" else Window(MAT_SIDE**2, MAT_SIDE, square=MAT_SIDE)
    module = descriptor.model.float()
    return FillModel(path.name, architecture, window, host, descriptor, host.manage(module, Role.FILL))


def _build(header: Header) -> Any:
    """spandrel's descriptor of the model in this file, on the CPU."""
    spandrel = _require_spandrel()
    name = header.path.name
    registry = spandrel.MAIN_REGISTRY
    if header.has_prefix(*_MAT_KEYS, *(f"model.{key}" for key in _MAT_KEYS)):
        registry = _require_extra_architectures(name)
    try:
        with _numpy_untouched():
            descriptor = spandrel.ModelLoader("cpu", registry).load_from_file(header.path)
    except spandrel.UnsupportedModelError as error:
        raise ModelFileError(
            f"{name} is not a model that fills holes; supported are {SUPPORTED}: choose one of these."
        ) from error
    except (RuntimeError, KeyError, ValueError) as error:
        raise ModelFileError(
            f"{name} looks like a fill model but its weights do not fit together ({_shortened(error)}); download it"
            " again."
        ) from error
    if not isinstance(descriptor, spandrel.MaskedImageModelDescriptor):
        raise ModelFileError(
            f"{name} is a model of the kind {descriptor.architecture.name} ({descriptor.purpose}), which cannot fill"
            f" holes; supported are {SUPPORTED}: choose one of these."
        )
    return descriptor


def _shortened(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def _require_spandrel() -> Any:
    try:
        import spandrel
    except ImportError as error:
        raise MissingPackageError(
            'The fill methods "lama" and "mat" need the package spandrel, which ComfyUI brings; run "pip install'
            ' spandrel" in its Python, or choose another method.'
        ) from error
    return spandrel


def _require_extra_architectures(name: str) -> Any:
    try:
        import spandrel_extra_arches
    except ImportError as error:
        raise MissingPackageError(
            f"{name} is a MAT model, which needs the package spandrel_extra_arches: its code for MAT is licensed for"
            " non-commercial use only (CC BY-NC 4.0), so whether to run"
            ' "pip install spandrel_extra_arches" in ComfyUI\'s Python is your choice; LaMa needs none.'
        ) from error
    return spandrel_extra_arches.EXTRA_REGISTRY


@contextlib.contextmanager
def _numpy_untouched() -> Iterator[None]:
    """MAT draws from NumPy's global generator as it is built."""
    state = np.random.get_state()
    try:
        yield
    finally:
        np.random.set_state(state)
