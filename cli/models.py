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
  mend models convert big-lama.pt      # writes big-lama.safetensors beside it; runs nothing that is in the file

Models are diffusers folders and .safetensors files of Stable Diffusion 1, 2, XL and 3, FLUX and Qwen-Image. They are
looked for in --models-dir, in the folders of MEND_MODELS, in ComfyUI's models folder (COMFYUI_PATH, else comfy-cli's
workspace), and in ./models; in a folder that has checkpoints/ or diffusers/ inside, only there."""


def add(commands: Commands) -> None:
    parser = command(
        commands,
        "models",
        "[list | pull REPO | convert FILE]",
        "list the models at hand, download or convert one",
        EXAMPLES,
    )
    parser.set_defaults(command=run, show=show_models, device=None, dtype=None)
    parser.add_argument(
        "action",
        metavar="list | pull | convert",
        nargs="?",
        choices=("list", "pull", "convert"),
        default="list",
        help="default: list",
    )
    parser.add_argument(
        "repo",
        metavar="REPO | FILE",
        nargs="?",
        help="what to pull from the hub, as OWNER/NAME; a .pt, .pth or .ckpt file to convert to .safetensors",
    )
    parser.add_argument("--revision", metavar="NAME", help="a branch, tag or commit to pull")
    parser.add_argument(
        "--to", type=Path, metavar="PATH", help="where to put it (default: the first model folder; beside FILE)"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing file when converting")
    add_models_dir(parser)


def run(arguments: argparse.Namespace) -> Report:
    if arguments.action == "list":
        if arguments.repo:
            raise UsageError(f"list takes no name; did you mean: mend models pull {arguments.repo}")
        return _list_models(arguments)
    if not arguments.repo and arguments.action == "convert":
        raise UsageError("name what to convert, for example: mend models convert big-lama.pt")
    if not arguments.repo:
        raise UsageError(
            "name what to pull, for example: mend models pull stable-diffusion-v1-5/stable-diffusion-inpainting"
        )
    return _pull_model(arguments) if arguments.action == "pull" else _convert_model(arguments)


def _list_models(arguments: argparse.Namespace) -> Report:
    from ..engine.models.detect import SHIPPED
    from ..engine.models.load import available_models

    found = available_models(local_host(arguments))
    return {
        "models": [
            {"name": name, "path": str(path), "shipped": SHIPPED in path.parents} for name, path in found.items()
        ],
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


def _convert_model(arguments: argparse.Namespace) -> Report:
    from ..engine.models.pickled_weights import convert_to_safetensors

    source = Path(arguments.repo)
    target = arguments.to or source.with_suffix(".safetensors")
    if target.is_dir():
        target = target / source.with_suffix(".safetensors").name
    with clock("convert") as timings:
        count = convert_to_safetensors(source, target, force=arguments.force)
    return {"path": str(target), "tensors": count, "timings": rounded(timings)}


def _download_folder(arguments: argparse.Namespace) -> Path:
    roots = model_roots(arguments)
    return subfolder(roots[0], "diffusers") if roots else Path("models") / "diffusers"


def show_models(report: Report) -> str:
    if "path" in report:
        return f"{report['path']}  ({report['timings']['total']:.1f} s)"
    models = report["models"]
    width = max((len(model["name"]) for model in models), default=0)
    lines = [f"{model['name']:{width}}  {'comes along' if model['shipped'] else model['path']}" for model in models]
    if all(model["shipped"] for model in models):
        searched = [f"  {folder}" for folder in report["folders"]] or ["  nothing: no model folder exists"]
        lines += ["No models of yours. Searched:", *searched]
        lines.append("Download one with `mend models pull REPO`, or give --models-dir.")
    return "\n".join(lines)
