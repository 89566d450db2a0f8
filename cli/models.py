"""mend models: what is there, and what can be had."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import (
    Commands,
    Report,
    UsageError,
    add_models_dir,
    clock,
    command,
    local_host,
    model_roots,
    rounded,
    subfolder,
)

EXAMPLES = """\
examples:
  mend models
  mend models pull stable-diffusion-v1-5/stable-diffusion-inpainting
  MEND_MODELS=/data/models mend models

Models are diffusers folders and single .safetensors files of Stable Diffusion 1 and 2. They are looked for in
--models-dir, in the folders of MEND_MODELS, in ComfyUI's models folder (COMFYUI_PATH, else comfy-cli's workspace), and
in ./models; in a folder that has checkpoints/ or diffusers/ inside, only there."""


def add(commands: Commands) -> None:
    parser = command(commands, "models", "[list | pull REPO]", "list the models at hand, or download one", EXAMPLES)
    parser.set_defaults(command=run, show=show_models, device=None, dtype=None)
    parser.add_argument(
        "action", metavar="list | pull", nargs="?", choices=("list", "pull"), default="list", help="default: list"
    )
    parser.add_argument("repo", metavar="REPO", nargs="?", help="what to pull from the hub, as OWNER/NAME")
    parser.add_argument("--revision", metavar="NAME", help="a branch, tag or commit to pull")
    parser.add_argument("--to", type=Path, metavar="DIR", help="where to put it (default: the first model folder)")
    add_models_dir(parser)


def run(arguments: argparse.Namespace) -> Report:
    if arguments.action == "list":
        return _list_models(arguments)
    if not arguments.repo:
        raise UsageError(
            "name what to pull, for example: mend models pull stable-diffusion-v1-5/stable-diffusion-inpainting"
        )
    return _pull_model(arguments)


def _list_models(arguments: argparse.Namespace) -> Report:
    from ..engine.models.load import find_models

    found = find_models(local_host(arguments))
    return {
        "models": [{"name": name, "path": str(path)} for name, path in found.items()],
        "folders": [str(folder) for folder in model_roots(arguments)],
    }


def _pull_model(arguments: argparse.Namespace) -> Report:
    from ..engine.models.download import DownloadBar, pull

    with clock("download") as timings:
        pulled = pull(
            arguments.repo,
            arguments.to or _download_folder(arguments),
            progress=DownloadBar(local_host(arguments)),
            revision=arguments.revision,
        )
    return {"path": str(pulled.path), "notices": list(pulled.notices), "timings": rounded(timings)}


def _download_folder(arguments: argparse.Namespace) -> Path:
    roots = model_roots(arguments)
    return subfolder(roots[0], "diffusers") if roots else Path("models") / "diffusers"


def show_models(report: Report) -> str:
    if "path" in report:
        return f"{report['path']}  ({report['timings']['total']:.1f} s)"
    if report["models"]:
        width = max(len(model["name"]) for model in report["models"])
        return "\n".join(f"{model['name']:{width}}  {model['path']}" for model in report["models"])
    searched = "\n".join(f"  {folder}" for folder in report["folders"]) or "  nothing: no model folder exists"
    return f"No models. Searched:\n{searched}\nDownload one with `mend models pull REPO`, or give --models-dir."
