"""Loads Stable Diffusion 1 and 2 from a diffusers folder or a single file, without network and without pickle."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..host import Host, Role
from ..prompts import folder_embeddings
from ..types import ModelFileError
from . import ldm
from .detect import (
    CONFIGS,
    PREDICTION_TYPES,
    SHIPPED,
    Checkpoint,
    TextLayout,
    check_folder,
    check_prediction_type,
    is_pipeline_folder,
    recognise,
    shipped_config,
)
from .diffusers_model import DiffusersModel, StableDiffusionModel
from .protocol import Conditioning, ModelFacts
from .weight_files import DTYPES, PICKLE_SUFFIXES, choose_weights, read_header, read_json

UNET_STEM = VAE_STEM = "diffusion_pytorch_model"
TEXT_ENCODER_STEM = "model"
CONFIG_SUFFIX = "-config"
"""``model.safetensors`` is read with the configs in ``model-config/`` beside it, where there is such a folder."""

# VAEs saved before diffusers 0.18 name their attention's projections so
_OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
# parts of CLIP's files that its text encoder does not read
_UNUSED_TEXT_KEYS = ("embeddings.position_ids", "logit_scale", "text_projection", "text_projection.weight")
_UNUSED_VAE_PREFIXES = ("loss.", "model_ema.")


@dataclass(frozen=True)
class Configs:
    """The settings of a model's parts, as their JSON files have them."""

    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    tokenizer: Path | None
    """A folder, or None for CLIP's own."""


@dataclass(frozen=True)
class Weights:
    """The state dicts of a model's parts under the names of diffusers and, without ``text_model.``, transformers."""

    unet: dict[str, Tensor]
    vae: dict[str, Tensor]
    text_encoder: dict[str, Tensor]


def load_model(
    path: Path, host: Host, *, config: Path | None = None, prediction_type: str | None = None
) -> DiffusersModel:
    """The model at ``path``: a diffusers folder, or one .safetensors file with UNet, VAE and text encoder.

    ``config`` is a diffusers folder whose configs and tokenizer replace the model's own; for a single file, a folder
    beside it with the same name and ``-config`` does the same, and else the shipped configs of its family are used.
    ``prediction_type`` ("epsilon", "v_prediction") overrides what the configs or the weights say. The host chooses
    the precision. Raises ModelFileError for everything that is not such a model, naming what it is.
    """
    check_prediction_type(prediction_type)
    if path.is_dir():
        check_folder(path)
        config = config or path
        weights = _folder_weights(path, host)
    elif path.exists():
        checkpoint = recognise(path)
        config = config or _config_beside(path) or shipped_config(checkpoint, prediction_type)
        weights = _checkpoint_weights(checkpoint, read_configs(config))
    else:
        raise ModelFileError(f"{path.name} is not there any more: choose another model, or refresh the menu.")
    return _assemble(path.name, read_configs(config), weights, host, prediction_type)


def find_models(host: Host) -> dict[str, Path]:
    """Everything that may be a model, sorted by its menu name: its place below the folder it was found in.

    diffusers folders in "diffusers", .safetensors files in "checkpoints"; nothing is opened. Where two folders hold
    the same name, the host's first wins.
    """
    found: dict[str, Path] = {}
    for root in host.model_folders("diffusers"):
        for folder in _pipelines_below(root):
            found.setdefault(folder.relative_to(root).as_posix(), folder)
    for root in host.model_folders("checkpoints"):
        for folder, _, names in walk(root):
            for name in names:
                if name.lower().endswith(".safetensors") and not name.startswith("."):
                    found.setdefault((folder / name).relative_to(root).as_posix(), folder / name)
    return dict(sorted(found.items(), key=lambda entry: entry[0].casefold()))


def available_models(host: Host) -> dict[str, Path]:
    """The host's models, and after them, where no model of the host has the name, those that come with the pack."""
    shipped = {folder.name: folder for folder in _pipelines_below(SHIPPED)}
    return (found := find_models(host)) | {name: path for name, path in shipped.items() if name not in found}


def read_configs(folder: Path) -> Configs:
    """The configs of a diffusers folder, with or without weights in it."""
    check_folder(folder)
    tokenizer = folder / "tokenizer"
    has_tokenizer = (tokenizer / "tokenizer.json").is_file() or (tokenizer / "vocab.json").is_file()
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if not scheduler.is_file():
        raise ModelFileError(f"{folder.name} has no scheduler/scheduler_config.json: download the whole folder.")
    return Configs(
        unet=read_json(folder / "unet" / "config.json"),
        vae=read_json(folder / "vae" / "config.json"),
        text_encoder=read_json(folder / "text_encoder" / "config.json"),
        scheduler=read_json(scheduler),
        tokenizer=tokenizer if has_tokenizer else None,
    )


def load_tokenizer(folder: Path | None, text_encoder: Mapping[str, Any]) -> Any:
    """The CLIPTokenizer for a text encoder's config, from ``folder`` or, when None, the shipped one."""
    from transformers import CLIPTokenizer

    length = text_encoder.get("max_position_embeddings", 77)
    if folder is not None:
        try:
            return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True, model_max_length=length)
        except (OSError, ValueError) as error:
            raise ModelFileError(
                f"{folder.parent.name} has a tokenizer that cannot be read ({error}): download it again."
            ) from error
    shipped = CONFIGS / "tokenizer"
    return CLIPTokenizer(
        str(shipped / "vocab.json"),
        str(shipped / "merges.txt"),
        model_max_length=length,
        # OpenCLIP's encoder (SD2), which is told by its activation, was trained on id 0 behind the end of the text
        pad_token="!" if text_encoder.get("hidden_act") == "gelu" else "<|endoftext|>",
    )


def build_unet(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import UNet2DConditionModel

    return _from_config(UNet2DConditionModel, config)


def build_vae(config: Mapping[str, Any]) -> nn.Module:
    from diffusers import AutoencoderKL

    return _from_config(AutoencoderKL, config)


def _from_config(model_class: Any, config: Mapping[str, Any]) -> nn.Module:
    module: nn.Module = model_class.from_config(dict(config))
    return module


def build_text_encoder(config: Mapping[str, Any]) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(CLIPTextConfig.from_dict(dict(config)))


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
    wrapper = "text_model." if any(key.startswith("text_model.") for key in expected) else ""
    state = {wrapper + key: tensor for key, tensor in weights.items()}
    # persistent in transformers before 4.31
    buffers = {name for name, _ in module.named_buffers()}
    _check_keys(expected.keys() - buffers, state.keys(), source)
    fitted = {key: _fit(tensor, expected[key].shape, dtype, key, source) for key, tensor in state.items()}
    module.load_state_dict(fitted, strict=False, assign=True)
    _make_position_ids(module)
    left = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    assert not left, f"without a value: {left}"
    return module.eval().requires_grad_(False)


def _check_keys(expected: set[str], found: Any, source: str) -> None:
    missing, unexpected = sorted(expected - set(found)), sorted(set(found) - expected)
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


def _assemble(name: str, configs: Configs, weights: Weights, host: Host, prediction_type: str | None) -> DiffusersModel:
    facts = _facts(name, configs, prediction_type)
    width = int(configs.text_encoder["hidden_size"])
    embedding_key = "clip_h" if width == 1024 else "clip_l"
    unet, vae, text_encoder = (
        host.manage(assemble(partial(build, config), state, host.dtype(role), f"{name} ({part})"), role)
        for part, build, config, state, role in (
            ("unet", build_unet, configs.unet, weights.unet, Role.DENOISER),
            ("vae", build_vae, configs.vae, weights.vae, Role.VAE),
            ("text encoder", build_text_encoder, configs.text_encoder, weights.text_encoder, Role.TEXT_ENCODER),
        )
    )
    return StableDiffusionModel(
        facts,
        tokenizer=load_tokenizer(configs.tokenizer, configs.text_encoder),
        text_encoder=text_encoder,
        denoiser=unet,
        vae=vae,
        find_embedding=folder_embeddings(host.model_folders("embeddings"), width, embedding_key),
        host=host,
    )


def _facts(name: str, configs: Configs, prediction_type: str | None) -> ModelFacts:
    scheduler = dict(configs.scheduler)
    if prediction_type is not None:
        scheduler["prediction_type"] = prediction_type
    if scheduler.get("prediction_type", "epsilon") not in PREDICTION_TYPES:
        raise ModelFileError(
            f"{name} predicts {scheduler['prediction_type']!r}, which cannot be used here; supported are"
            f" {', '.join(PREDICTION_TYPES)}."
        )
    downscale = 2 ** (len(configs.vae["block_out_channels"]) - 1)
    return ModelFacts(
        name=name,
        conditioning=Conditioning.CONCAT if configs.unet["in_channels"] == 9 else Conditioning.REPLACE,
        native_size=configs.unet["sample_size"] * downscale,
        scheduler_config=scheduler,
        latent_channels=configs.vae["latent_channels"],
        downscale=downscale,
    )


def _folder_weights(folder: Path, host: Host) -> Weights:
    vae = _read_component(folder / "vae", VAE_STEM, host.dtype(Role.VAE))
    text = _read_component(folder / "text_encoder", TEXT_ENCODER_STEM, host.dtype(Role.TEXT_ENCODER))
    return Weights(
        unet=_read_component(folder / "unet", UNET_STEM, host.dtype(Role.DENOISER)),
        vae={_modern_vae_key(key): tensor for key, tensor in vae.items()},
        text_encoder=_text_state(text),
    )


def _read_component(folder: Path, stem: str, dtype: torch.dtype) -> dict[str, Tensor]:
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


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, mapped into memory and not yet read."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    read_header(path)  # names a damaged file before anything else does
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelFileError(f"{path.name} cannot be read ({error}): download it again.") from error


def _checkpoint_weights(checkpoint: Checkpoint, configs: Configs) -> Weights:
    state = read_weights(checkpoint.header.path)
    unet = ldm.component(state, ldm.UNET_PREFIX)
    vae = ldm.component(state, ldm.VAE_PREFIX)
    vae = {key: tensor for key, tensor in vae.items() if not key.startswith(_UNUSED_VAE_PREFIXES)}
    if checkpoint.text_layout is TextLayout.OPEN_CLIP:
        text = ldm.convert_open_clip(ldm.component(state, ldm.OPEN_CLIP_PREFIX), configs.text_encoder)
    else:
        text = ldm.component(state, ldm.CLIP_PREFIX)
    return Weights(
        unet=ldm.convert(unet, ldm.unet_names(configs.unet)),
        vae=ldm.convert(vae, ldm.vae_names(configs.vae)),
        text_encoder=_text_state(text),
    )


def _text_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    plain = {key.removeprefix("text_model."): tensor for key, tensor in state.items()}
    return {key: tensor for key, tensor in plain.items() if key not in _UNUSED_TEXT_KEYS}


def _modern_vae_key(key: str) -> str:
    block, _, weight = key.rpartition(".")
    parent, _, layer = block.rpartition(".")
    if parent.endswith("attentions.0") and layer in _OLD_VAE_ATTENTION:
        return f"{parent}.{_OLD_VAE_ATTENTION[layer]}.{weight}"
    return key


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
