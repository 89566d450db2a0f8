"""MendLoadModel and MendDownloadModel."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from comfy_api.latest import io, ui

from ..engine.models.detect import PREDICTION_TYPES
from ..engine.models.download import DownloadBar, Variant, check_names, pull
from ..engine.models.families import FAMILIES, supported
from ..engine.models.family import MAX_CLIP_SKIP, LoadOptions, SizeConditioning
from ..engine.models.load import CONFIG_SUFFIX, available_models, find_files, load_model
from ..engine.models.lora import Lora
from ..engine.types import InputError, ModelFileError
from .comfy_host import ComfyHost, MendModel
from .convert import ModelType
from .text import show

log = logging.getLogger("mend")

AUTO = "auto"
PRECISIONS = {AUTO: None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FOLDERS_HINT = (
    "put a diffusers folder into models/diffusers or a .safetensors checkpoint into models/checkpoints and reload the"
    " page, or use Download Model (Mend)"
)

TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
"""Inputs for files of their own, in any order."""


@dataclass(frozen=True)
class Choices:
    """What a user may settle about a model, beside which it is."""

    prediction_type: str | None = None
    precision: str = AUTO
    family: str | None = None
    vae: Path | None = None
    text_encoders: tuple[Path, ...] = ()
    loras: tuple[Lora, ...] = ()
    options: LoadOptions = field(default_factory=LoadOptions)

    @classmethod
    def of(cls, inputs: dict[str, Any]) -> Choices:
        """From the node's optional inputs; raises ModelFileError for a file that is gone."""

        def chosen(name: str) -> str | None:
            value = inputs.get(name, AUTO)
            return None if value == AUTO else value

        files = (_file("text_encoders", chosen(name)) for name in TEXT_ENCODERS)
        return cls(
            prediction_type=chosen("prediction_type"),
            precision=inputs.get("precision", AUTO),
            family=chosen("family"),
            vae=_file("vae", chosen("vae")),
            text_encoders=tuple(file for file in files if file is not None),
            options=LoadOptions(
                clip_skip=inputs.get("clip_skip", 0),
                size_conditioning=SizeConditioning(inputs.get("size_conditioning", SizeConditioning.CANVAS.value)),
            ),
        )

    @property
    def files(self) -> tuple[Path, ...]:
        return (*((self.vae,) if self.vae else ()), *self.text_encoders, *(lora.path for lora in self.loras))


def _file(kind: str, name: str | None) -> Path | None:
    if name is None:
        return None
    path = find_files(ComfyHost(), kind).get(name)
    if path is None:
        raise ModelFileError(f"{name} is not in models/{kind} any more: choose another file, or auto.")
    return path


@dataclass(frozen=True, eq=False)
class LoadedModel(MendModel):
    """A model and what it was loaded from, so that it can be loaded again with more."""

    path: Path
    choices: Choices
    notices: tuple[str, ...] = ()


# weak: a model that no output holds leaves memory, as ComfyUI's cache expects
_loaded: WeakValueDictionary[tuple[Path, Choices, tuple[str, ...]], LoadedModel] = WeakValueDictionary()


def load_shared(path: Path, choices: Choices = Choices()) -> LoadedModel:
    """The model at ``path``; while an output holds it, the same choices give the same object."""
    key = (path, choices, tuple(file_stamp(file) for file in (path, *choices.files)))
    model = _loaded.get(key)
    if model is None:
        host = ComfyHost(PRECISIONS[choices.precision])
        loaded = load_model(
            path,
            host,
            family=choices.family,
            prediction_type=choices.prediction_type,
            vae=choices.vae,
            text_encoders=choices.text_encoders,
            loras=choices.loras,
            options=choices.options,
        )
        model = _loaded[key] = LoadedModel(loaded, host, path, choices, loaded.notices)
    return model


def file_stamp(path: Path) -> str:
    """Changes whenever a file of the model does; empty for a model that is gone."""
    roots = (path, path.with_name(path.stem + CONFIG_SUFFIX))
    files = [file for root in roots for file in (root, *root.rglob("*")) if file.is_file()]
    stats = [file.stat() for file in files]
    return "" if not files else f"{max(s.st_mtime_ns for s in stats)}:{sum(s.st_size for s in stats)}:{len(stats)}"


class MendLoadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        host = ComfyHost()
        return io.Schema(
            node_id="MendLoadModel",
            display_name="Load Model (Mend)",
            category="Mend",
            description=(
                f"Loads {supported()}, an inpainting model or an ordinary one, from a diffusers folder, a single"
                " .safetensors file or split files, without any network. Models of other families, and quantised ones:"
                " ComfyUI's own loaders and Wrap Model (Mend)."
            ),
            search_aliases=[
                "checkpoint",
                "diffusers",
                "stable diffusion",
                "sdxl",
                "sd3",
                "flux",
                "qwen image",
                "inpainting model",
                "loader",
                "safetensors",
            ],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=list(available_models(host)),
                    tooltip=(
                        "Folders in models/diffusers and .safetensors files in models/checkpoints and"
                        " models/diffusion_models; a file of the latter needs its text encoders and VAE below. Models"
                        " made for inpainting (9 input channels) follow the surroundings best. mend-shapes comes with"
                        " the pack and paints coloured shapes only, for trying things out."
                    ),
                ),
                io.Combo.Input(
                    "prediction_type",
                    options=[AUTO, *PREDICTION_TYPES],
                    default=AUTO,
                    tooltip=(
                        "What the network was trained to predict. auto reads it from the model; set it where the"
                        " result is noise or washed out."
                    ),
                    optional=True,
                    advanced=True,
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default=AUTO,
                    tooltip="Number format of the weights. auto is what ComfyUI would choose for this machine.",
                    optional=True,
                    advanced=True,
                ),
                io.Combo.Input(
                    "vae",
                    options=[AUTO, *find_files(host, "vae")],
                    default=AUTO,
                    tooltip="A file in models/vae in place of the model's own VAE.",
                    optional=True,
                    advanced=True,
                ),
                *(
                    io.Combo.Input(
                        name,
                        options=[AUTO, *find_files(host, "text_encoders")],
                        default=AUTO,
                        tooltip=(
                            "A file in models/text_encoders for a model that comes without, or to swap one. The order"
                            " does not matter: each goes where it fits."
                        ),
                        optional=True,
                        advanced=True,
                    )
                    for name in TEXT_ENCODERS
                ),
                io.Int.Input(
                    "clip_skip",
                    default=0,
                    min=0,
                    max=MAX_CLIP_SKIP,
                    tooltip=(
                        "Which layer of the CLIP text encoder is read, counted from its last as 1. 0 is the family's"
                        " own: 1 for Stable Diffusion, 2 for SDXL."
                    ),
                    optional=True,
                    advanced=True,
                ),
                io.Combo.Input(
                    "size_conditioning",
                    options=[conditioning.value for conditioning in SizeConditioning],
                    default=SizeConditioning.CANVAS.value,
                    tooltip=(
                        "What SDXL is told of the size of the picture. canvas: that of what it paints. picture: that"
                        " of the whole picture, and where in it the painted part lies."
                    ),
                    optional=True,
                    advanced=True,
                ),
                io.Combo.Input(
                    "family",
                    options=[AUTO, *FAMILIES],
                    default=AUTO,
                    tooltip=(
                        "What the model is. auto reads it from the file; set it where that fails. A file of"
                        " Qwen-Image-Edit looks like one of Qwen-Image, which does not see the picture with the prompt:"
                        " choose it by its number, that without one for the first. Folders, and ComfyUI's files of 2511"
                        " and later, say so themselves."
                    ),
                    optional=True,
                    advanced=True,
                ),
            ],
            outputs=[ModelType.Output("model", tooltip="For Inpaint (Mend).")],
        )

    @classmethod
    def validate_inputs(cls, model: str | None) -> bool | str:
        found = available_models(ComfyHost())
        if model is None or model in found:
            return True
        return (
            f"{model} is not among the models found ({', '.join(list(found)[:5])}): choose another, or {FOLDERS_HINT}."
        )

    @classmethod
    def fingerprint_inputs(cls, model: str, **inputs: Any) -> str:
        path = available_models(ComfyHost()).get(model)
        try:
            files = (path, *Choices.of(inputs).files)
        except ModelFileError:
            return ""
        return " ".join("" if file is None else file_stamp(file) for file in files)

    @classmethod
    def execute(cls, model: str, **inputs: Any) -> io.NodeOutput:
        path = available_models(ComfyHost()).get(model)
        if path is None:
            raise ModelFileError(f"{model} is not there any more: choose another model, or {FOLDERS_HINT}.")
        loaded = load_shared(path, Choices.of(inputs))
        return io.NodeOutput(loaded, ui=show(loaded.notices))


class MendDownloadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendDownloadModel",
            display_name="Download Model (Mend)",
            category="Mend",
            description=(
                f"Downloads a repository of {supported()} from huggingface.co into models/diffusers and loads it: only"
                " the files that run, only safetensors, hashes checked, resumed after an interruption. Once it is"
                " there, nothing is asked of the network again."
            ),
            search_aliases=["huggingface", "hugging face", "hub", "pull", "fetch model", "download checkpoint"],
            inputs=[
                io.String.Input(
                    "repo",
                    default="stable-diffusion-v1-5/stable-diffusion-inpainting",
                    tooltip="The repository as author/name. For gated ones set HF_TOKEN or run `hf auth login` before.",
                ),
                io.Combo.Input(
                    "variant",
                    options=[variant.value for variant in Variant],
                    default=Variant.FP16.value,
                    tooltip=(
                        "fp16: half the download, what a graphics card computes with anyway. full: single precision,"
                        " for the processor. Where a repository has only one of them, that one."
                    ),
                ),
                io.String.Input(
                    "revision",
                    default="",
                    tooltip="A branch, a tag or a commit; empty for the newest.",
                    optional=True,
                    advanced=True,
                ),
                io.String.Input(
                    "folder",
                    default="",
                    tooltip="Name of the new folder in models/diffusers; empty for the repository's name.",
                    optional=True,
                    advanced=True,
                ),
                io.Boolean.Input(
                    "safety_checker",
                    default=False,
                    tooltip="Fetch the repository's safety checker too (0.6 to 1.2 GB), where it has one.",
                    optional=True,
                    advanced=True,
                ),
            ],
            outputs=[
                ModelType.Output("model", tooltip="For Inpaint (Mend)."),
                io.String.Output("name", tooltip="The model's name in the menu of Load Model (Mend)."),
            ],
            # so that it can be run alone
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, repo: str | None) -> bool | str:
        # ComfyUI repeats a complaint for every input named here; revision and folder are checked first thing in pull
        try:
            if repo is not None:
                check_names(repo.strip())
        except InputError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, repo: str, variant: str, revision: str = "", folder: str = "", safety_checker: bool = False
    ) -> io.NodeOutput:
        host = ComfyHost()
        folders = host.model_folders("diffusers")
        if not folders:
            raise ModelFileError("ComfyUI has no diffusers folder: add one to extra_model_paths.yaml.")
        pulled = pull(
            repo.strip(),
            folders[0],
            DownloadBar(host),
            revision.strip() or None,
            variant=Variant(variant),
            folder=folder.strip() or None,
            safety_checker=safety_checker,
        )
        loaded = load_shared(pulled.path)
        notices = (*pulled.notices, *loaded.notices)
        for notice in notices:
            log.warning("Mend: %s", notice)
        text = "\n".join((*notices, f"{pulled.path.name} is in {pulled.path.parent}."))
        return io.NodeOutput(loaded, pulled.path.name, ui=ui.PreviewText(text))


NODES = [MendLoadModel, MendDownloadModel]
