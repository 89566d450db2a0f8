"""Loads models from a diffusers folder, a single file or split files, without network and without pickle.

``detect`` says what lies on disk, a ``Family`` says what its networks are and where files keep them, and here one is
brought to the other. Weights stay mapped until a module that needs them in another precision copies them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from ..host import Host, Role
from ..types import InputError, ModelFileError
from . import ldm
from .detect import SHIPPED, WAN_VAE, Found, Keys, Kind, is_pipeline_folder, recognise, recognise_folder, vae_of
from .diffusers_model import DiffusersModel
from .families import FAMILIES, supported
from .family import Components, Config, Family, LoadOptions, Part, State, shipped
from .lora import Lora, LoraStack, Network
from .modules import assemble
from .weight_files import Header, read_component, read_json, read_weights

ARCHITECTURES = {"clip": "CLIP", "clip_text_model": "CLIP", "t5": "T5", "qwen2_5_vl": "Qwen2.5-VL"}
"""What text encoders are called in messages."""
CONFIG_SUFFIX = "-config"
"""``model.safetensors`` is read with the configs in ``model-config/`` beside it, where there is such a folder."""


class Source(Protocol):
    """Where the weights of a model's parts are."""

    def has(self, part: Part) -> bool: ...

    def read(self, part: Part, dtype: torch.dtype) -> State:
        """Its weights in any spelling, those closest to ``dtype`` where there is a choice."""
        ...


@dataclass(frozen=True)
class FolderSource:
    """A diffusers folder."""

    folder: Path

    def has(self, part: Part) -> bool:
        return (self.folder / part.name / "config.json").is_file()

    def read(self, part: Part, dtype: torch.dtype) -> State:
        return read_component(self.folder / part.name, part.stem, dtype)


class FileSource:
    """One file, with or without text encoders and VAE."""

    def __init__(self, header: Header, denoiser_prefix: str) -> None:
        self._header = header
        self._denoiser_prefix = denoiser_prefix
        self._state: State | None = None

    def has(self, part: Part) -> bool:
        return self._prefix(part) is not None

    def read(self, part: Part, dtype: torch.dtype) -> State:
        if self._state is None:
            self._state = read_weights(self._header.path)
        prefix = self._prefix(part)
        assert prefix is not None
        return ldm.component(self._state, prefix)

    def _prefix(self, part: Part) -> str | None:
        if part.role is Role.DENOISER:
            return self._denoiser_prefix
        return next((prefix for prefix in part.prefixes if self._header.has_prefix(prefix)), None)


@dataclass(frozen=True)
class PartFile:
    """One part's weights in a file or folder of its own, with the config that belongs to them."""

    name: str
    config: Config
    state: State


@dataclass(frozen=True)
class Model:
    """A model on disk."""

    name: str
    family: Family
    source: Source
    folder: Path
    """Of its configs and tokenizers."""
    scheduler: Mapping[str, Any]
    """What the file says of its schedule, over its configs."""

    @property
    def configs(self) -> dict[str, Config]:
        """By part; without the optional ones that are not there."""
        paths = {part.name: self.folder / part.name / "config.json" for part in self.family.parts}
        return {name: read_json(path) for name, path in paths.items() if path.is_file()}


def load_model(
    path: Path,
    host: Host,
    *,
    config: Path | None = None,
    family: str | None = None,
    prediction_type: str | None = None,
    vae: Path | None = None,
    text_encoders: Sequence[Path] = (),
    loras: Sequence[Lora] = (),
    options: LoadOptions | None = None,
) -> DiffusersModel:
    """The model at ``path``: a diffusers folder, a .safetensors checkpoint, or a file of the denoiser alone.

    ``config`` is a diffusers folder whose configs and tokenizers replace the model's own; for a single file, a folder
    beside it with the same name and ``-config`` does the same, and else the shipped configs of its family are used.
    ``family`` (a key of ``families.FAMILIES``) and ``prediction_type`` ("epsilon", "v_prediction") override what the
    configs or the weights say. ``vae`` takes the place of the model's: a .safetensors file of any layout, a checkpoint
    that holds one, or a diffusers folder. ``text_encoders`` are files for those that the model lacks or is to swap, in
    any order. ``loras`` are added to the weights, see LoraStack; what found no place is in the model's ``notices``. The
    host chooses the precision. Raises ModelFileError for everything that is not such a model, naming what it is, and
    InputError for options that do not exist.
    """
    if family is not None and family not in FAMILIES:
        raise InputError(f"family is {family!r}; choose from {', '.join(FAMILIES)}.")
    model = find_parts(path, config, family, prediction_type)
    configs = model.configs
    files = {part.name: file for part, file in _text_encoder_files(model, configs, text_encoders).items()}
    if vae is not None:
        files["vae"] = _vae_file(model, configs["vae"], vae, host)
    scheduler = {**_scheduler_config(model.folder), **model.scheduler}
    if prediction_type is not None:
        scheduler["prediction_type"] = prediction_type
    model.family.check_scheduler(model.name, scheduler)
    _check_complete(model, files)
    modules, stack = {}, LoraStack(loras, model.name)
    for part in model.family.parts:
        file = files.get(part.name)
        if file is not None:
            configs[part.name] = file.config
        elif not model.source.has(part):
            continue
        modules[part.name] = host.manage(_assemble(model, part, configs[part.name], file, stack, host), part.role)
    notices = stack.finish()
    made = model.family.make(
        Components(
            name=model.name,
            modules=modules,
            configs=configs,
            scheduler=scheduler,
            folder=model.folder,
            host=host,
            options=options or LoadOptions(),
        )
    )
    made.notices += notices
    return made


def find_parts(
    path: Path, config: Path | None = None, family: str | None = None, prediction_type: str | None = None
) -> Model:
    """What is at ``path``, without its weights; arguments and errors are those of load_model."""
    if path.is_dir():
        chosen = check_folder(path, family)
        chosen.check_prediction_type(prediction_type)
        if config is not None:
            check_folder(config, family)
        return Model(path.name, chosen, FolderSource(path), config or path, {})
    if not path.exists():
        raise ModelFileError(f"{path.name} is not there any more: choose another model, or refresh the menu.")
    found = recognise(path)
    if found.kind is not Kind.MODEL or found.quantised:
        raise _refusal(found)
    _check_choice(found, family)
    config = config or _config_beside(path)
    chosen = check_folder(config, family) if config else _family_of(found, family)
    chosen.check_prediction_type(prediction_type)
    folder = config or _shipped_config(found, chosen, prediction_type)
    assert found.header is not None
    return Model(path.name, chosen, FileSource(found.header, found.prefix), folder, found.scheduler)


def check_folder(folder: Path, family: str | None = None) -> Family:
    """The family of a diffusers folder, by its configs; raises ModelFileError unless it can be loaded."""
    found = recognise_folder(folder)
    _check_choice(found, family)
    chosen = FAMILIES.get(family or found.family)
    if chosen is None or chosen.choose_config(found, None) is None:
        raise _refusal(found)
    for part in chosen.parts:
        path = folder / part.name / "config.json"
        if not path.is_file():
            if part.optional:
                continue
            raise ModelFileError(f"{folder.name} has no {part.name}/config.json: download the whole folder.")
        kind = read_json(path).get(part.kind_key, part.kind)
        if kind != part.kind:
            raise ModelFileError(f"{folder.name} has a {part.name} of type {kind}; supported is {part.kind}.")
    _scheduler_config(folder)
    return chosen


def _check_choice(found: Found, family: str | None) -> None:
    """Raises ModelFileError for a user's choice of family whose networks are of another kind than the model's."""
    own = FAMILIES.get(found.family)
    if family is not None and own is not None and own.denoiser.kind != FAMILIES[family].denoiser.kind:
        raise ModelFileError(f"{found.name} is {found.what}, and its family is set to {family}: set that to auto.")


MODEL_KINDS = ("checkpoints", "diffusion_models")
"""Folders of single files that may be models."""


def find_models(host: Host) -> dict[str, Path]:
    """Everything that may be a model, sorted by its menu name: its place below the folder it was found in.

    diffusers folders in "diffusers", .safetensors files in "checkpoints" and "diffusion_models"; nothing is opened.
    Where two folders hold the same name, the first wins.
    """
    found: dict[str, Path] = {}
    for root in host.model_folders("diffusers"):
        for folder in _pipelines_below(root):
            found.setdefault(folder.relative_to(root).as_posix(), folder)
    for kind in MODEL_KINDS:
        for name, path in find_files(host, kind).items():
            found.setdefault(name, path)
    return _sorted(found)


def find_files(host: Host, kind: str) -> dict[str, Path]:
    """The .safetensors files in the host's folders of one kind ("vae", "text_encoders", ...), by their menu names."""
    found: dict[str, Path] = {}
    for root in host.model_folders(kind):
        for folder, _, names in walk(root):
            for name in names:
                if name.lower().endswith(".safetensors") and not name.startswith("."):
                    found.setdefault((folder / name).relative_to(root).as_posix(), folder / name)
    return _sorted(found)


def _sorted(found: Mapping[str, Path]) -> dict[str, Path]:
    return dict(sorted(found.items(), key=lambda entry: entry[0].casefold()))


def available_models(host: Host) -> dict[str, Path]:
    """The host's models, and after them, where no model of the host has the name, those that come with the pack."""
    shipped = {folder.name: folder for folder in _pipelines_below(SHIPPED)}
    return (found := find_models(host)) | {name: path for name, path in shipped.items() if name not in found}


def _family_of(found: Found, family: str | None) -> Family:
    """That of a file without configs of its own."""
    if family is not None:
        return FAMILIES[family]
    if not found.family and found.native and found.header is not None:
        raise ModelFileError(
            f"{found.name} has a UNet of an unusual size: put a folder with its diffusers configs beside it, named"
            f" {found.header.path.stem}{CONFIG_SUFFIX}, or set its family."
        )
    if found.family not in FAMILIES:
        raise _refusal(found)
    return FAMILIES[found.family]


def _shipped_config(found: Found, family: Family, prediction_type: str | None) -> Path:
    name = family.choose_config(found, prediction_type)
    if name is None:
        raise _refusal(found)
    return shipped(name)


def _refusal(found: Found) -> ModelFileError:
    """Names what was found, what is supported and, where there is one, the way to use it all the same."""
    what = f"{found.name} is {found.what}"
    if found.way_out:
        return ModelFileError(f"{what}: {found.way_out}.")
    if found.quantised:
        what += " with quantised weights"
    if not (found.native or found.quantised):
        connector = " and cannot be used here" if found.kind is Kind.MODEL else ""
        return ModelFileError(f"{what}{connector}; supported are {supported()}.")
    if found.header is None:
        own = "load its single-file version with ComfyUI's own nodes"
    elif found.header.has_prefix("first_stage_model.", "vae."):
        own = "load it with ComfyUI's Load Checkpoint"
    else:
        own = "load it with ComfyUI's Load Diffusion Model, Load CLIP and Load VAE"
    return ModelFileError(
        f"{what}, which is not loaded here (supported are {supported()}): {own} and connect that to Wrap Model (Mend)."
    )


def _scheduler_config(folder: Path) -> dict[str, Any]:
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        raise ModelFileError(f"{folder.name} has no scheduler/scheduler_config.json: download the whole folder.")
    return read_json(path)


def _check_complete(model: Model, files: Mapping[str, PartFile]) -> None:
    for part in model.family.parts:
        if part.optional or part.name in files or model.source.has(part):
            continue
        way_out = "choose a VAE file for it" if part.role is Role.VAE else "choose its file as a text encoder"
        raise ModelFileError(
            f"{model.name} holds a {model.family.denoiser.label} but no {part.label}: {way_out}, a full checkpoint, or"
            " its diffusers folder."
        )


def _text_encoder_files(model: Model, configs: Mapping[str, Config], paths: Sequence[Path]) -> dict[Part, PartFile]:
    """Each file for the text encoder of the model whose architecture, width and, between equals, depth it has."""
    taken: dict[Part, PartFile] = {}
    for path in paths:
        if path.is_dir():
            raise ModelFileError(f"{path.name} is a folder, where a text encoder's file belongs: name the file in it.")
        found = recognise(path)
        encoder = found.text_encoder
        if encoder is None:
            raise ModelFileError(
                f"{path.name} is {found.what}, where a text encoder in .safetensors belongs: choose one for"
                f" {model.family.title}."
            )
        if found.quantised:
            raise ModelFileError(
                f"{path.name} is a text encoder with quantised weights, which are not read here: choose it in bf16 or"
                " fp16, or load all with ComfyUI's own nodes and connect that to Wrap Model (Mend)."
            )
        fitting = [
            part
            for part in model.family.text_encoders
            if part not in taken
            and part.kind.startswith(encoder.architecture)
            and _width(configs[part.name]) == encoder.width
        ]
        fitting.sort(key=lambda part: _layers(configs[part.name]) != encoder.layers)
        if not fitting:
            wanted = ", ".join(
                f"{ARCHITECTURES.get(part.kind, part.kind)} of width {_width(configs[part.name])}"
                for part in model.family.text_encoders
                if part not in taken
            )
            raise ModelFileError(
                f"{path.name} is a {ARCHITECTURES[encoder.architecture]} text encoder of width {encoder.width}, which"
                f" {model.family.title} does not read; it reads {wanted or 'no more than the others that were given'}."
            )
        taken[fitting[0]] = PartFile(path.name, configs[fitting[0].name], read_weights(path))
    return taken


def _width(text_encoder: Config) -> int:
    return _of_text(text_encoder, "hidden_size") or _of_text(text_encoder, "d_model")


def _layers(text_encoder: Config) -> int:
    return _of_text(text_encoder, "num_hidden_layers") or _of_text(text_encoder, "num_layers")


def _of_text(text_encoder: Config, key: str) -> int:
    """A number in a config, or in that of a vision-language model's text half; 0 where there is none."""
    return int(text_encoder.get(key) or text_encoder.get("text_config", {}).get(key, 0))


def _vae_file(model: Model, config: Config, path: Path, host: Host) -> PartFile:
    part = next(part for part in model.family.parts if part.role is Role.VAE)
    if path.is_dir():
        folder = path / "vae" if (path / "vae").is_dir() else path
        own = read_json(folder / "config.json")
        if own.get("_class_name", part.kind) != part.kind:
            raise ModelFileError(
                f"{path.name} is a VAE of type {own['_class_name']} where {model.family.title} has {part.kind}: choose"
                f" one that belongs to {model.name}."
            )
        for key in ("latent_channels", "scaling_factor", "z_dim"):
            if own.get(key, config.get(key)) != config.get(key):
                raise ModelFileError(
                    f"{path.name} is the VAE of another family ({key} is {own[key]} where {model.family.title} has"
                    f" {config.get(key)}): choose one that belongs to {model.name}."
                )
        return PartFile(path.name, {**config, **own}, read_component(folder, part.stem, host.dtype(Role.VAE)))
    found = recognise(path)
    assert found.header is not None
    # a checkpoint's will do too
    prefixes = (found.prefix,) if found.kind is Kind.VAE else part.prefixes
    prefix = next((prefix for prefix in prefixes if found.header.has_prefix(f"{prefix}decoder.")), None)
    if prefix is None:
        raise ModelFileError(f"{path.name} is {found.what}, where a VAE belongs: choose one for {model.family.title}.")
    vae_class, channels = vae_of(Keys(found.header, prefix))
    wanted = config.get("latent_channels") or config["z_dim"]
    if (vae_class, channels) != (part.kind, wanted):
        raise ModelFileError(
            f"{path.name} is {_vae_title(vae_class, channels)} where {model.family.title} has"
            f" {_vae_title(part.kind, wanted)}: choose one that belongs to {model.name}."
        )
    return PartFile(path.name, config, ldm.component(read_weights(path), prefix))


def _vae_title(vae_class: str, channels: int) -> str:
    return f"{'a VAE of films' if vae_class == WAN_VAE else 'a VAE'} of {channels} channels"


def _assemble(
    model: Model, part: Part, config: Config, file: PartFile | None, stack: LoraStack, host: Host
) -> nn.Module:
    dtype = part.precision(config, host.dtype(part.role))
    state = model.source.read(part, dtype) if file is None else file.state
    name = model.name if file is None else file.name
    weights = stack.fuse(Network(part.name, part.read(state, config), config, dtype))
    return assemble(partial(part.build, config), weights, dtype, f"{name} ({part.name})")


def _config_beside(path: Path) -> Path | None:
    beside = path.with_name(path.stem + CONFIG_SUFFIX)
    return beside if beside.is_dir() else None


def _pipelines_below(root: Path) -> Iterator[Path]:
    for folder, inside, _ in walk(root):
        if folder != root and is_pipeline_folder(folder):
            inside.clear()
            yield folder


def walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """os.walk that follows links, each folder once, and leaves out hidden folders, where downloads grow."""
    seen: set[Path] = set()
    for folder, inside, names in os.walk(root, followlinks=True):
        real = Path(folder).resolve()
        if real in seen:
            inside.clear()
            continue
        seen.add(real)
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        yield Path(folder), inside, sorted(names)
