"""MendLoadModel and MendDownloadModel."""

from __future__ import annotations

import logging
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from comfy_api.latest import io, ui

from ..engine.models.detect import PREDICTION_TYPES
from ..engine.models.download import DownloadBar, Variant, check_names, pull
from ..engine.models.load import CONFIG_SUFFIX, available_models, load_model
from ..engine.types import InputError, ModelFileError
from .comfy_host import ComfyHost, MendModel
from .convert import ModelType

log = logging.getLogger("mend")

AUTO = "auto"
PRECISIONS = {AUTO: None, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FOLDERS_HINT = (
    "put a diffusers folder into models/diffusers or a .safetensors checkpoint into models/checkpoints and reload the"
    " page, or use Download Model (Mend)"
)

# weak: a model that no output holds leaves memory, as ComfyUI's cache expects
_loaded: WeakValueDictionary[tuple[Path, str, str, str], MendModel] = WeakValueDictionary()


def load_shared(path: Path, prediction_type: str = AUTO, precision: str = AUTO) -> MendModel:
    """The model at ``path``; while an output holds it, the same options give the same object."""
    key = (path, file_stamp(path), prediction_type, precision)
    model = _loaded.get(key)
    if model is None:
        host = ComfyHost(PRECISIONS[precision])
        chosen = None if prediction_type == AUTO else prediction_type
        model = _loaded[key] = MendModel(load_model(path, host, prediction_type=chosen), host)
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
        return io.Schema(
            node_id="MendLoadModel",
            display_name="Load Model (Mend)",
            category="Mend",
            description=(
                "Loads Stable Diffusion 1.x or 2.x, an inpainting model or an ordinary one, from a diffusers folder or"
                " a single .safetensors file, without any network."
            ),
            search_aliases=["checkpoint", "diffusers", "stable diffusion", "inpainting model", "loader", "safetensors"],
            inputs=[
                io.Combo.Input(
                    "model",
                    options=list(available_models(ComfyHost())),
                    tooltip=(
                        "Folders in models/diffusers and .safetensors files in models/checkpoints. Models made for"
                        " inpainting (9 input channels) follow the surroundings best. mend-shapes comes with the pack"
                        " and paints coloured shapes only, for trying things out."
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
    def fingerprint_inputs(cls, model: str, **options: str) -> str:
        path = available_models(ComfyHost()).get(model)
        return "" if path is None else file_stamp(path)

    @classmethod
    def execute(cls, model: str, prediction_type: str = AUTO, precision: str = AUTO) -> io.NodeOutput:
        path = available_models(ComfyHost()).get(model)
        if path is None:
            raise ModelFileError(f"{model} is not there any more: choose another model, or {FOLDERS_HINT}.")
        return io.NodeOutput(load_shared(path, prediction_type, precision))


class MendDownloadModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendDownloadModel",
            display_name="Download Model (Mend)",
            category="Mend",
            description=(
                "Downloads a Stable Diffusion 1.x or 2.x repository from huggingface.co into models/diffusers and loads"
                " it: only the files that run, only safetensors, hashes checked, resumed after an interruption. Once"
                " it is there, nothing is asked of the network again."
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
        for notice in pulled.notices:
            log.warning("Mend: %s", notice)
        text = "\n".join((*pulled.notices, f"{pulled.path.name} is in {pulled.path.parent}."))
        return io.NodeOutput(load_shared(pulled.path), pulled.path.name, ui=ui.PreviewText(text))


NODES = [MendLoadModel, MendDownloadModel]
