"""What a model family is to the loader: its networks, where files keep them, and what they make together.

To add one, write a module with a ``Family`` and list it in ``families.FAMILIES``; recognition is in ``detect``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..host import Host, ManagedModule, Role
from ..types import InputError, ModelFileError
from .detect import CONFIGS, Found
from .diffusers_model import DiffusersModel

Config = Mapping[str, Any]
"""A part's config.json."""
State = Mapping[str, Tensor]

DIFFUSERS_STEM = "diffusion_pytorch_model"
TRANSFORMERS_STEM = "model"
"""What the names of a part's weight files begin with."""


MAX_CLIP_SKIP = 24
"""Deeper than any text encoder is read."""


class SizeConditioning(str, Enum):
    """What an SDXL network is told of the size and place of what it paints."""

    CANVAS = "canvas"
    """A picture of the canvas's size, shown whole: what diffusers and ComfyUI's plain text nodes say."""
    PICTURE = "picture"
    """The size of the picture the canvas was cut from, and where."""


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How a model is used, as far as that is settled when it is loaded; raises InputError for what is out of range."""

    clip_skip: int = 0
    """Which of the CLIP text encoder's layers is read, counted from its last as 1; 0 for the family's own. Pooled
    prompts are always the last one's, so that FLUX, which reads nothing else of CLIP, is not changed."""
    size_conditioning: SizeConditioning = SizeConditioning.CANVAS

    def __post_init__(self) -> None:
        if not 0 <= self.clip_skip <= MAX_CLIP_SKIP:
            raise InputError(
                f"clip_skip is {self.clip_skip}; give a value from 1 to {MAX_CLIP_SKIP}, or 0 for the model's own."
            )


def brain_float(config: Config, dtype: torch.dtype) -> torch.dtype:
    """For networks that were trained in bfloat16 and some of whose activations pass 65504, which float16 has not."""
    return torch.bfloat16 if dtype == torch.float16 else dtype


@dataclass(frozen=True)
class Part:
    """One network of a family."""

    name: str
    """Its folder in a diffusers pipeline: "unet", "text_encoder_2", ..."""
    role: Role
    kind: str
    """Its config's _class_name (diffusers) or model_type (transformers)."""
    build: Callable[[Config], nn.Module]
    """A module of that config; called on the meta device."""
    read: Callable[[State, Config], dict[str, Tensor]]
    """The module's state dict from any spelling of it that is in use; keys of transformers modules come without the
    ``text_model.`` that depends on its version."""
    prefixes: tuple[str, ...] = ()
    """What its keys begin with in a single file, of which the first that occurs counts. A denoiser's prefix is told by
    ``Found``."""
    optional: bool = False
    """Whether the model is usable without it."""
    precision: Callable[[Config, torch.dtype], torch.dtype] = lambda _, dtype: dtype
    """(config, what the host asks for) -> what the network bears."""

    @property
    def stem(self) -> str:
        return TRANSFORMERS_STEM if self.role is Role.TEXT_ENCODER else DIFFUSERS_STEM

    @property
    def kind_key(self) -> str:
        return "model_type" if self.role is Role.TEXT_ENCODER else "_class_name"

    @property
    def label(self) -> str:
        """For messages: "text encoder 2"."""
        return {"unet": "UNet", "vae": "VAE"}.get(self.name, self.name.replace("_", " "))


@dataclass(frozen=True)
class Components:
    """All that a family's ``make`` gets: a model's networks, in their place and precision, and its settings."""

    name: str
    """The file's or folder's."""
    modules: Mapping[str, ManagedModule]
    """By part; an optional part may be missing."""
    configs: Mapping[str, Config]
    """By part."""
    scheduler: Mapping[str, Any]
    """scheduler_config.json, with what the file and the user say otherwise."""
    folder: Path
    """A diffusers folder, for its tokenizers."""
    host: Host
    options: LoadOptions

    def tokenizer_folder(self, name: str) -> Path | None:
        """The model's own tokenizer, "tokenizer" or "tokenizer_2"; None where only shipped ones can stand in."""
        folder = self.folder / name
        return folder if _holds_tokenizer(folder) else None

    def find_tokenizer(self, names: Sequence[str], kind: str, title: str) -> Path:
        """The model's own tokenizer in one of its folders, else one in the host's folders of a ``kind``; raises
        ModelFileError where there is none, for the network that ``title`` says."""
        own = (self.tokenizer_folder(name) for name in names)
        hosts = (folder for folder in self.host.model_folders(kind) if _holds_tokenizer(folder))
        found = next((folder for folder in (*own, *hosts) if folder is not None), None)
        if found is None:
            raise ModelFileError(
                f"{self.name} has no tokenizer for {title}, which its file cannot hold: load it from its diffusers"
                f" folder, or put that folder without its weights beside the file, named"
                f" {Path(self.name).stem}-config."
            )
        return found

    @property
    def downscale(self) -> int:
        """Pixels per latent cell."""
        return int(2 ** (len(self.configs["vae"]["block_out_channels"]) - 1))


def _holds_tokenizer(folder: Path) -> bool:
    return any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json"))


@dataclass(frozen=True)
class Family:
    """Models of one architecture."""

    name: str
    """As in ``Found.family`` and the user's own choice: "sdxl"."""
    title: str
    """For messages: "Stable Diffusion XL"."""
    parts: tuple[Part, ...]
    choose_config: Callable[[Found, str | None], str | None]
    """(a file, the user's prediction type) -> the shipped folder of configs that belongs to it, None for a variant that
    cannot be used."""
    make: Callable[[Components], DiffusersModel]
    prediction_types: Sequence[str] = field(default=("epsilon", "v_prediction"))
    """What the network may predict; the first is what a scheduler config that says nothing means."""

    @property
    def denoiser(self) -> Part:
        return next(part for part in self.parts if part.role is Role.DENOISER)

    @property
    def text_encoders(self) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.role is Role.TEXT_ENCODER)

    def check_prediction_type(self, prediction_type: str | None) -> None:
        """Raises InputError for a user's choice that this family does not have."""
        if prediction_type is not None and prediction_type not in self.prediction_types:
            raise InputError(f"prediction_type is {prediction_type!r}; choose from {', '.join(self.prediction_types)}.")

    def check_scheduler(self, name: str, scheduler: Mapping[str, Any]) -> None:
        """Raises ModelFileError for the config of a model, ``name``, that predicts something else."""
        predicts = scheduler.get("prediction_type", self.prediction_types[0])
        if predicts not in self.prediction_types:
            raise ModelFileError(
                f"{name} predicts {predicts!r}, which cannot be used here; supported are"
                f" {', '.join(self.prediction_types)}."
            )


def by_variant(configs: Mapping[str, str]) -> Callable[[Found, str | None], str | None]:
    """A ``choose_config`` that knows a folder for each variant."""
    return lambda found, _: configs.get(found.variant)


def shipped(config: str) -> Path:
    return CONFIGS / config
