"""The command line: files and flags -> one engine request -> files.

Only the standard library is imported up here, so that help and usage errors come at once.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from torch import Tensor

    from .engine.host import LocalHost
    from .engine.safety import SafetyChecker
    from .engine.types import InpaintRequest

Report = dict[str, Any]
"""What a command did: the object that --json prints, and what the lines for people are made from."""

# The engine's choices, spelled out because importing them takes seconds; a test keeps the two equal.
SCHEDULERS = (
    "DPMSolverMultistep",
    "DDIM",
    "K_EULER",
    "K_EULER_ANCESTRAL",
    "PNDM",
    "KLMS",
    "UniPC",
    "DEIS",
    "Heun",
    "KDPM2",
    "KDPM2_ANCESTRAL",
    "DPM++2M_KARRAS",
    "DPM++2M_SDE",
    "DPM++SDE",
    "LCM",
    "TCD",
)
SIGMAS = ("default", "karras", "exponential", "beta")
CROPS = ("auto", "off")
COMPATS = ("off", "diffusers")
FILLS = ("neutral", "edge", "blur", "telea", "navier-stokes", "patchmatch")
SAFETY_ACTIONS = ("black", "blur", "pass")
MASK_CHANNELS = ("luminance", "alpha")
DTYPES = ("float32", "float16", "bfloat16")

KINDS = ("checkpoints", "diffusers", "embeddings", "safety_checker")
"""Subfolders of a models folder, in ComfyUI's layout."""
MODELS_VARIABLE = "MEND_MODELS"
RANDOM_SEEDS = 2**32
"""A random seed is short enough to be typed again."""
EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


class UsageError(Exception):
    """The arguments do not parse; the message is argparse's."""


class CommandError(Exception):
    """A MendError, under a name that does not need the engine to be imported."""


class Parser(argparse.ArgumentParser):
    """Raises instead of exiting, so that --json can report usage errors too."""

    def __init__(self, **options: Any) -> None:
        # --js would ask for JSON after main has looked for --json
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 a MendError, 2 wrong usage, 130 Ctrl-C."""
    argv = sys.argv[1:] if argv is None else list(argv)
    as_json = "--json" in argv
    try:
        arguments = build_parser().parse_args(argv)
        report = _run(arguments)
    except UsageError as error:
        return _fail(str(error), as_json, EXIT_USAGE)
    except CommandError as error:
        return _fail(str(error), as_json, EXIT_ERROR)
    except KeyboardInterrupt:
        return _fail("interrupted", as_json, EXIT_INTERRUPTED)
    except Exception as error:
        if as_json:  # a bug: the caller still gets its object, and the traceback goes to stderr
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        raise
    _print(json.dumps(report) if as_json else arguments.show(report))
    return 0


def _run(arguments: argparse.Namespace) -> Report:
    # what the libraries log on import and load is not for the person at the terminal
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from .engine.types import MendError

    try:
        report: Report = arguments.command(arguments)
    except MendError as error:
        raise CommandError(str(error)) from error
    for notice in report.get("notices", ()):
        print(f"mend: note: {notice}", file=sys.stderr)
    return report


def _fail(message: str, as_json: bool, code: int) -> int:
    print(f"mend: {message}", file=sys.stderr)
    if as_json:
        _print(json.dumps({"error": message}))
    return code


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `mend models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# --- commands: arguments -> report


def inpaint_command(arguments: argparse.Namespace) -> Report:
    from .engine.files import MaskChannel, read_image, read_mask

    inputs = [arguments.image, arguments.mask]
    with _clock("read") as timings:
        image = read_image(arguments.image)
        mask = read_mask(arguments.mask, MaskChannel(arguments.mask_channel))
    return _paint(arguments, image, mask, inputs, timings)


def outpaint_command(arguments: argparse.Namespace) -> Report:
    from .engine.files import check_outputs, read_image
    from .engine.fill import FillMethod
    from .engine.outpaint import Padding, pad

    inputs = [arguments.image]
    outputs = [*([arguments.out] if arguments.pad_only else []), *([arguments.mask_out] if arguments.mask_out else [])]
    check_outputs(outputs, inputs=inputs, force=arguments.force)
    padding = Padding(arguments.left, arguments.top, arguments.right, arguments.bottom)
    with _clock("pad") as timings:
        image = read_image(arguments.image)
        padded = pad(image, padding, arguments.feather, FillMethod(arguments.fill))
    if arguments.pad_only:
        report = _write_one(arguments, padded.image, inputs, timings)
    else:
        report = _paint(arguments, padded.image, padded.mask, inputs, timings)
    if padding == Padding():
        nothing = "No room was added: give --left, --top, --right or --bottom."
        report["notices"] = [nothing, *report.get("notices", ())]
    if arguments.mask_out:
        _write(arguments, arguments.mask_out, padded.mask[..., None], {}, inputs)
        report["mask"] = str(arguments.mask_out)
    return report


def fill_command(arguments: argparse.Namespace) -> Report:
    from .engine.files import MaskChannel, check_outputs, read_image, read_mask
    from .engine.fill import FillMethod, fill
    from .engine.images import pair

    inputs = [arguments.image, arguments.mask]
    check_outputs([arguments.out], inputs=inputs, force=arguments.force)
    mask = read_mask(arguments.mask, MaskChannel(arguments.mask_channel))
    image, mask = pair(read_image(arguments.image), mask)
    with _clock("fill") as timings:
        filled = fill(image, mask, FillMethod(arguments.method))
    report = _write_one(arguments, filled, inputs, timings, {"method": arguments.method})
    empty = "The mask is empty: the picture is returned as it came; white marks what to fill."
    return report | {"notices": [] if mask.any() else [empty]}


def mask_command(arguments: argparse.Namespace) -> Report:
    from .engine.files import MaskChannel, check_outputs, read_mask
    from .engine.masks import MaskOptions, prepare

    settings = {name: getattr(arguments, name) for name in ("threshold", "invert", "fill_holes", "grow", "feather")}
    options = MaskOptions(**settings)
    check_outputs([arguments.out], inputs=[arguments.mask], force=arguments.force)
    mask = read_mask(arguments.mask, MaskChannel(arguments.mask_channel))
    with _clock("mask") as timings:
        prepared = prepare(mask, options)
    return _write_one(arguments, prepared[..., None], [arguments.mask], timings, settings)


def check_command(arguments: argparse.Namespace) -> Report:
    from .engine.files import read_image
    from .engine.safety import SafetyAction, check, load_safety_checker

    threshold = arguments.safety_threshold
    with _clock("read") as timings:
        pictures = [read_image(path) for path in arguments.images]
    with _clock("safety", timings):
        checker = load_safety_checker(arguments.safety_checker, _host(arguments))
        scores = [
            check(picture, checker, threshold=threshold, action=SafetyAction.PASS).scores[0] for picture in pictures
        ]
    return {
        "files": [str(path) for path in arguments.images],
        "scores": [score.score for score in scores],
        "flagged": [score.flagged for score in scores],
        "threshold": checker.default_threshold if threshold is None else threshold,
        "timings": _rounded(timings),
    }


def models_command(arguments: argparse.Namespace) -> Report:
    if arguments.action == "list":
        return _list_models(arguments)
    if not arguments.repo:
        raise UsageError(
            "name what to pull, for example: mend models pull stable-diffusion-v1-5/stable-diffusion-inpainting"
        )
    return _pull_model(arguments)


def _list_models(arguments: argparse.Namespace) -> Report:
    from .engine.models.load import find_models

    found = find_models(_host(arguments))
    return {
        "models": [{"name": name, "path": str(path)} for name, path in found.items()],
        "folders": [str(folder) for folder in model_roots(arguments)],
    }


def _pull_model(arguments: argparse.Namespace) -> Report:
    from .engine.models.download import DownloadBar, pull

    with _clock("download") as timings:
        pulled = pull(
            arguments.repo,
            arguments.to or _download_folder(arguments),
            progress=DownloadBar(_host(arguments)),
            revision=arguments.revision,
        )
    return {"path": str(pulled.path), "notices": list(pulled.notices), "timings": _rounded(timings)}


def demo_command(arguments: argparse.Namespace) -> Report:
    from . import demo

    host = _host(arguments)
    say = (lambda line: print(line, file=sys.stderr)) if arguments.json else print
    return demo.run(arguments.out, host, say=say, engine_only=arguments.engine_only)


# --- what the commands share


def _paint(
    arguments: argparse.Namespace, image: Tensor, mask: Tensor, inputs: list[Path], timings: dict[str, float]
) -> Report:
    """The diffusion path. Everything that can be refused is refused before the model is loaded."""
    from .engine.files import check_outputs, numbered
    from .engine.inpaint import inpaint, normalise
    from .engine.models.load import load_model

    request = _request(arguments, image, mask)
    outputs = numbered(arguments.out, request.count)
    check_outputs(outputs, inputs=inputs, force=arguments.force)
    normalise(request)
    _check_schedule(request)
    host = _host(arguments)
    path = find_model(arguments, host)
    notices: list[str] = []
    with _clock("load", timings):
        checker = _safety_checker(arguments, host, notices)
        model = load_model(path, host, config=arguments.config, prediction_type=arguments.prediction_type)
    result = inpaint(request, model, host)
    timings |= result.timings

    report = {
        "files": [str(output) for output in outputs],
        "seed": result.seeds[0],
        "seeds": list(result.seeds),
        "scores": None,
        "flagged": None,
        "model": str(path),
        "device": str(host.device),
        "notices": [*notices, *result.notices],
    }
    images = result.images
    if checker is not None:
        with _clock("safety", timings):
            images = _judge(arguments, images, checker, report)
    with _clock("write", timings):
        for picture, output, seed in zip(images, outputs, result.seeds, strict=True):
            _write(arguments, output, picture, _parameters(request, seed, path), inputs)
    return report | {"timings": _rounded(timings)}


def _request(arguments: argparse.Namespace, image: Tensor, mask: Tensor) -> InpaintRequest:
    """Flags that were not given leave the request's own defaults."""
    from .engine.types import Compat, Crop, InpaintRequest, Sigmas

    enums: dict[str, Callable[[str], Any]] = {"sigmas": Sigmas, "crop": Crop, "compat": Compat}
    names = InpaintRequest.__dataclass_fields__.keys() & vars(arguments).keys() - {"image", "mask"}
    given = {name: enums.get(name, lambda value: value)(getattr(arguments, name)) for name in names}
    return InpaintRequest(image=image, mask=mask, **{"seed": secrets.randbelow(RANDOM_SEEDS), **given})


def _check_schedule(request: InpaintRequest) -> None:
    """Refuse a scheduler, spacing or strength before the model is loaded; its config cannot make them right."""
    from .engine.schedulers import plan

    if request.strength > 0:
        plan(request.scheduler, {}, request.steps, request.strength, sigmas=request.sigmas, compat=request.compat)


def _parameters(request: InpaintRequest, seed: int, model: Path) -> dict[str, Any]:
    """What makes this one picture again."""
    return {
        "software": f"comfyui-mend {_version()}",
        "model": model.name,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "scheduler": request.scheduler,
        "sigmas": request.sigmas.value,
        "steps": request.steps,
        "guidance_scale": request.guidance_scale,
        "strength": request.strength,
        "seed": seed,
        "width": request.width,
        "height": request.height,
        "crop": request.crop.value,
        "compat": request.compat.value,
    }


def _safety_checker(arguments: argparse.Namespace, host: LocalHost, notices: list[str]) -> SafetyChecker | None:
    """A checker that is not installed stops only those who asked for a check."""
    from .engine.safety import load_safety_checker
    from .engine.types import MissingPackageError

    if arguments.safety is False:
        return None
    try:
        return load_safety_checker(arguments.safety_checker, host)
    except MissingPackageError as error:
        if arguments.safety:
            raise
        notices.append(f"The result is not checked for safety. {error}")
        return None


def _judge(arguments: argparse.Namespace, images: Tensor, checker: SafetyChecker, report: Report) -> Tensor:
    """The pictures after the safety check, whose scores go into ``report``."""
    from .engine.safety import SafetyAction, check

    action = SafetyAction(arguments.safety_action)
    result = check(images, checker, threshold=arguments.safety_threshold, action=action)
    report["scores"] = [score.score for score in result.scores]
    report["flagged"] = list(result.flags)
    if result.flagged and action is not SafetyAction.PASS:
        report["notices"].append(
            f"{sum(result.flags)} of {len(images)} pictures came out unsafe and were replaced ({action.value});"
            " --safety-action pass keeps such pictures."
        )
    return result.images


def _write_one(
    arguments: argparse.Namespace,
    picture: Tensor,
    inputs: list[Path],
    timings: dict[str, float],
    settings: dict[str, Any] | None = None,
) -> Report:
    parameters = {"software": f"comfyui-mend {_version()}", "command": arguments.name, **(settings or {})}
    with _clock("write", timings):
        _write(arguments, arguments.out, picture, parameters, inputs)
    return {"files": [str(arguments.out)], "timings": _rounded(timings)}


def _write(
    arguments: argparse.Namespace, path: Path, picture: Tensor, parameters: dict[str, Any], inputs: list[Path]
) -> None:
    from .engine.files import read_profile, write_image

    write_image(path, picture, parameters, force=arguments.force, profile=read_profile(inputs[0]))


def _host(arguments: argparse.Namespace) -> LocalHost:
    import torch

    from .engine.host import LocalHost, default_device

    roots = model_roots(arguments)
    return LocalHost(
        device=_device(arguments.device) if arguments.device else default_device(),
        weights_dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        folders={kind: [_subfolder(root, kind) for root in roots] for kind in KINDS},
        show_progress=sys.stderr.isatty() and not arguments.quiet,
    )


def _device(name: str) -> Any:
    import torch

    from .engine.types import InputError

    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(
            f'The device "{name}" cannot be used here with torch {torch.__version__}; leave --device out, or give cpu,'
            " cuda, cuda:1 or mps."
        ) from error
    return device


def model_roots(arguments: argparse.Namespace) -> list[Path]:
    """Folders of models, best first: --models-dir, MEND_MODELS, ComfyUI's, ./models; those that exist."""
    from .comfy_workspace import find_workspace
    from .engine.types import InputError

    for folder in arguments.models_dir:
        if not folder.is_dir():
            raise InputError(f"There is no folder {folder}; check --models-dir.")
    variable = [Path(part).expanduser() for part in os.environ.get(MODELS_VARIABLE, "").split(os.pathsep) if part]
    workspace = find_workspace()
    candidates = [*arguments.models_dir, *variable, *([workspace.path / "models"] if workspace else []), Path("models")]
    return list(dict.fromkeys(folder.resolve() for folder in candidates if folder.is_dir()))


def _subfolder(root: Path, kind: str) -> Path:
    """Where ``kind`` lives in ComfyUI's layout; a folder that is not laid out so is searched as a whole."""
    laid_out = any((root / name).is_dir() for name in ("checkpoints", "diffusers"))
    return root / kind if laid_out else root


def _download_folder(arguments: argparse.Namespace) -> Path:
    roots = model_roots(arguments)
    return _subfolder(roots[0], "diffusers") if roots else Path("models") / "diffusers"


def find_model(arguments: argparse.Namespace, host: LocalHost) -> Path:
    """The model that --model names, by path or by its name in `mend models`; without --model, the only one there is."""
    from .engine.models.load import find_models
    from .engine.types import ModelFileError

    wanted = arguments.model
    if wanted and Path(wanted).exists():
        return Path(wanted)
    found = find_models(host)
    if wanted:
        same = [path for name, path in found.items() if wanted in (name, name.removesuffix(".safetensors"), path.stem)]
        if same:
            return same[0]
    elif len(found) == 1:
        return next(iter(found.values()))
    names = ", ".join(list(found)[:5]) + (", ..." if len(found) > 5 else "")
    if wanted and found:
        raise ModelFileError(f'There is no model "{wanted}"; `mend models` lists what there is: {names}.')
    if wanted:
        raise ModelFileError(
            f'There is no model "{wanted}", neither as a path nor in a model folder (mend models --help).'
        )
    if found:
        raise ModelFileError(f"There are {len(found)} models; choose one with --model: {names}.")
    raise ModelFileError(
        "No model was found; give --model PATH, put one into ./models, or download one with `mend models pull REPO`."
    )


@contextlib.contextmanager
def _clock(phase: str, timings: dict[str, float] | None = None) -> Iterator[dict[str, float]]:
    """Add the seconds the block takes to ``timings``."""
    timings = {} if timings is None else timings
    started = time.perf_counter()
    yield timings
    timings[phase] = timings.get(phase, 0.0) + _seconds_since(started)


def _seconds_since(started: float) -> float:
    return round(time.perf_counter() - started, 3)


def _rounded(timings: dict[str, float]) -> dict[str, float]:
    return {phase: round(seconds, 3) for phase, seconds in timings.items()} | {"total": round(sum(timings.values()), 3)}


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("comfyui-mend")
    except PackageNotFoundError:  # a bare checkout
        return "(source)"


# --- reports -> lines for people


def show_files(report: Report) -> str:
    total = f"{report['timings']['total']:.1f} s"
    files = report["files"] + ([report["mask"]] if "mask" in report else [])
    notes: list[list[str]] = [[] for _ in files]
    for index, seed in enumerate(report.get("seeds", ())):
        notes[index].append(f"seed {seed}")
    for index, (score, flagged) in enumerate(zip(report.get("scores") or (), report.get("flagged") or (), strict=True)):
        notes[index].append(f"safety score {score:.3f}{' FLAGGED' if flagged else ''}")
    notes[-1].append(total)
    return "\n".join(f"{file}  ({', '.join(note)})" if note else file for file, note in zip(files, notes, strict=True))


def show_scores(report: Report) -> str:
    return "\n".join(
        f"{score:.3f}  {'FLAGGED' if flagged else 'ok     '}  {file}"
        for file, score, flagged in zip(report["files"], report["scores"], report["flagged"], strict=True)
    )


def show_models(report: Report) -> str:
    if "path" in report:
        return f"{report['path']}  ({report['timings']['total']:.1f} s)"
    if report["models"]:
        width = max(len(model["name"]) for model in report["models"])
        return "\n".join(f"{model['name']:{width}}  {model['path']}" for model in report["models"])
    searched = "\n".join(f"  {folder}" for folder in report["folders"]) or "  nothing: no model folder exists"
    return f"No models. Searched:\n{searched}\nDownload one with `mend models pull REPO`, or give --models-dir."


def show_demo(report: Report) -> str:
    return f"Look at {report['sheet']}"


# --- the arguments

EXAMPLES = """\
examples:
  mend inpaint room.jpg mask.png -p "a green armchair" -o chair.png
  mend fill photo.jpg mask.png -o clean.png                 # remove something; no model needed
  mend outpaint photo.jpg --left 128 --right 128 -p "a wide beach" -o wide.png
  mend models pull stable-diffusion-v1-5/stable-diffusion-inpainting

In a mask, white is what may change. Every pixel where it is black is kept bit for bit.
`mend COMMAND --help` explains one command."""

INPAINT_EXAMPLES = """\
examples:
  mend inpaint room.jpg mask.png -p "a green armchair" -o chair.png
  mend inpaint room.jpg mask.png -p "a window" --count 4 -o try.png       # try-1.png ... try-4.png
  mend inpaint cut.png cut.png --mask-channel alpha -p "a lake" -o lake.png
  mend inpaint room.jpg mask.png -p "a rug" -o rug.png --json | jq .seed

Image i of a run is made with seed + i, so each can be made again alone."""

OUTPAINT_EXAMPLES = """\
examples:
  mend outpaint photo.jpg --left 128 --right 128 -p "a wide beach" -o wide.png
  mend outpaint photo.jpg --top 200 --pad-only --fill patchmatch -o taller.png   # no model needed
  mend outpaint photo.jpg --right 256 --pad-only -o padded.png --mask-out mask.png"""

FILL_EXAMPLES = """\
examples:
  mend fill photo.jpg mask.png -o clean.png
  mend fill photo.jpg mask.png --method telea -o scratch-free.png

methods:
  patchmatch     copies fitting patches from the rest of the picture; textures, objects, landscapes
  telea          spreads colours inwards; scratches, wires, small spots
  navier-stokes  continues lines inwards; scratches, wires, small spots
  blur           a soft guess from the surroundings; a base for inpaint at a strength below 1
  edge           the nearest colour outside the mask
  neutral        grey"""

MASK_EXAMPLES = """\
examples:
  mend mask rough.png --grow 8 --feather 4 -o mask.png
  mend mask outline.png --threshold 0.5 --fill-holes -o solid.png
  mend mask subject.png --invert -o background.png

In this order: threshold, invert, fill holes, grow, feather."""

CHECK_EXAMPLES = """\
examples:
  mend check *.png
  mend check photo.jpg --json | jq '.scores[0]'"""

MODELS_EXAMPLES = """\
examples:
  mend models
  mend models pull stable-diffusion-v1-5/stable-diffusion-inpainting
  MEND_MODELS=/data/models mend models

Models are diffusers folders and single .safetensors files of Stable Diffusion 1 and 2. They are looked for in
--models-dir, in the folders of MEND_MODELS, in ComfyUI's models folder (COMFYUI_PATH, else comfy-cli's workspace), and
in ./models; in a folder that has checkpoints/ or diffusers/ inside, only there."""

DEMO_EXAMPLES = """\
Runs the main job on real photographs, in ComfyUI when one is found (COMFYUI_PATH, else comfy-cli's workspace) and by
the engine alone otherwise, and leaves before, mask and after pictures and one contact sheet. Needs scikit-image, whose
photographs it uses."""


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mend",
        description="Change what you masked in a picture, and nothing else.",
        epilog=EXAMPLES,
        formatter_class=_help_formatter,
    )
    parser.add_argument("--version", action="version", version=f"mend {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)

    inpaint = _command(
        commands,
        "inpaint",
        "IMAGE MASK -p PROMPT -o OUT",
        "repaint the masked part of a picture from a prompt",
        INPAINT_EXAMPLES,
    )
    inpaint.set_defaults(command=inpaint_command, show=show_files)
    _add_image_and_mask(inpaint)
    _add_output(inpaint, "where the picture goes: .png, .jpg or .webp; with --count N, OUT-1 ... OUT-N")
    _add_diffusion(inpaint)

    outpaint = _command(
        commands,
        "outpaint",
        "IMAGE --left PX ... -p PROMPT -o OUT",
        "enlarge a picture beyond its borders",
        OUTPAINT_EXAMPLES,
    )
    outpaint.set_defaults(command=outpaint_command, show=show_files)
    outpaint.add_argument("image", metavar="IMAGE", type=Path, help="the picture")
    sides = outpaint.add_argument_group("what to add")
    for side in ("left", "top", "right", "bottom"):
        sides.add_argument(f"--{side}", type=int, default=0, metavar="PX", help=f"pixels to add at the {side}")
    sides.add_argument("--feather", type=int, default=0, metavar="PX", help="soft edge of the mask, into the picture")
    sides.add_argument(
        "--fill", default="edge", **_which(FILLS, "what the new area starts from (default: %(default)s)")
    )
    sides.add_argument("--pad-only", action="store_true", help="stop after the fill: no model, no prompt")
    sides.add_argument("--mask-out", type=Path, metavar="FILE", help="write the mask of the new area too")
    _add_output(outpaint, "where the picture goes")
    _add_diffusion(outpaint)

    fill = _command(commands, "fill", "IMAGE MASK -o OUT", "remove something without a model", FILL_EXAMPLES)
    fill.set_defaults(command=fill_command, show=show_files)
    _add_image_and_mask(fill)
    fill.add_argument("--method", default="patchmatch", **_which(FILLS, "see below (default: %(default)s)"))
    _add_output(fill, "where the picture goes")

    mask = _command(commands, "mask", "MASK -o OUT", "grow, feather, invert or clean a mask", MASK_EXAMPLES)
    mask.set_defaults(command=mask_command, show=show_files)
    mask.add_argument("mask", metavar="MASK", type=Path, help="white = repaint")
    mask.add_argument(
        "--threshold", type=float, default=0, metavar="X", help="0..1: from here up white, the rest black"
    )
    mask.add_argument("--invert", action="store_true", help="swap white and black")
    mask.add_argument("--fill-holes", action="store_true", help="what an outline encloses becomes white")
    mask.add_argument("--grow", type=float, default=0, metavar="PX", help="widen by pixels; negative shrinks")
    mask.add_argument("--feather", type=float, default=0, metavar="PX", help="pixels of soft edge outside the mask")
    _add_mask_channel(mask)
    _add_output(mask, "where the mask goes")

    check = _command(commands, "check", "IMAGE ...", "score pictures for safety", CHECK_EXAMPLES)
    check.set_defaults(command=check_command, show=show_scores)
    check.add_argument("images", metavar="IMAGE", nargs="+", type=Path, help="pictures to score, 0 (safe) to 1")
    _add_checker(check.add_argument_group("safety"))
    _add_machine(check)

    models = _command(
        commands, "models", "[list | pull REPO]", "list the models at hand, or download one", MODELS_EXAMPLES
    )
    models.set_defaults(command=models_command, show=show_models, device=None, dtype=None)
    models.add_argument(
        "action", metavar="list | pull", nargs="?", choices=("list", "pull"), default="list", help="default: list"
    )
    models.add_argument("repo", metavar="REPO", nargs="?", help="what to pull from the hub, as OWNER/NAME")
    models.add_argument("--revision", metavar="NAME", help="a branch, tag or commit to pull")
    models.add_argument("--to", type=Path, metavar="DIR", help="where to put it (default: the first model folder)")
    _add_models_dir(models)

    demo = _command(commands, "demo", "", "show the main job on real photographs", DEMO_EXAMPLES)
    demo.set_defaults(command=demo_command, show=show_demo)
    demo.add_argument("--out", type=Path, default=Path("demo-output"), metavar="DIR", help="default: %(default)s")
    demo.add_argument("--engine-only", action="store_true", help="do not use ComfyUI even if there is one")
    _add_machine(demo)
    return parser


def _help_formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=100)


def _command(commands: Any, name: str, synopsis: str, summary: str, examples: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        usage=f"mend {name} {synopsis} [options]".replace("  ", " "),
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=examples,
        formatter_class=_help_formatter,
    )
    parser.set_defaults(name=name)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, also for errors")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar (there is none in a pipe anyway)")
    return parser


def _add_image_and_mask(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "image", metavar="IMAGE", type=Path, help="PNG, JPEG, WebP, ...; turned upright by its EXIF data"
    )
    parser.add_argument("mask", metavar="MASK", type=Path, help="white = repaint, black = keep")
    _add_mask_channel(parser)


def _add_mask_channel(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mask-channel",
        default="luminance",
        **_which(MASK_CHANNELS, "what marks the repainted part, white or transparent pixels (default: %(default)s)"),
    )


def _add_output(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("-o", "--out", metavar="OUT", type=Path, required=True, help=what)
    parser.add_argument("--force", action="store_true", help="replace an existing file; never the input")


def _add_diffusion(parser: argparse.ArgumentParser) -> None:
    prompts = parser.add_argument_group("prompt")
    _add_field(prompts, "-p", "--prompt", metavar="TEXT", help="what the masked area should show; (word:1.2) stresses")
    _add_field(prompts, "--negative-prompt", metavar="TEXT", help="what it should not show")

    sampling = parser.add_argument_group("sampling")
    _add_field(
        sampling, "--scheduler", metavar="NAME", help=f"one of {', '.join(SCHEDULERS)} (default: {SCHEDULERS[0]})"
    )
    _add_field(sampling, "--sigmas", **_which(SIGMAS, "spacing of the noise levels (default: default)"))
    _add_field(sampling, "--steps", type=int, metavar="N", help="1..500 (default: 25)")
    _add_field(sampling, "--guidance-scale", type=float, metavar="X", help="0..50: how strictly (default: 7.5)")
    _add_field(sampling, "--strength", type=float, metavar="X", help="0..1: 1 starts from noise (default: 1.0)")
    _add_field(sampling, "--seed", type=int, metavar="N", help="0..2^64-1 (default: random, and printed)")
    _add_field(sampling, "--count", type=int, metavar="N", help="1..64 pictures (default: 1)")
    _add_field(sampling, "--width", type=int, metavar="PX", help="of the result; 0: the image's own (default: 0)")
    _add_field(sampling, "--height", type=int, metavar="PX", help="of the result; 0: the image's own (default: 0)")
    _add_field(
        sampling, "--crop", **_which(CROPS, "what the model sees: the mask's surroundings, or all (default: auto)")
    )
    _add_field(sampling, "--compat", **_which(COMPATS, "follow diffusers' pipeline to rounding (default: off)"))

    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="MODEL", help="a path, or a name from `mend models` (default: the only one)")
    model.add_argument(
        "--config", type=Path, metavar="DIR", help="a diffusers folder whose configs replace the model's"
    )
    model.add_argument("--prediction-type", **_which(("epsilon", "v_prediction"), "what the model predicts"))

    safety = parser.add_argument_group("safety")
    safety.add_argument(
        "--safety",
        action=argparse.BooleanOptionalAction,
        help="score the finished picture (default: where the checker is installed)",
    )
    safety.add_argument(
        "--safety-action",
        default="black",
        **_which(SAFETY_ACTIONS, "what becomes of a flagged picture (default: %(default)s)"),
    )
    _add_checker(safety)
    _add_machine(parser)


def _add_field(group: Any, *flags: str, **options: Any) -> None:
    """A flag that is a field of InpaintRequest: absent from the namespace when it is not given."""
    group.add_argument(*flags, default=argparse.SUPPRESS, **options)


def _which(choices: Sequence[str], help_text: str) -> dict[str, Any]:
    """Options of a flag with choices; listed in the help text, they do not crowd the flags."""
    return {"choices": choices, "metavar": "WHICH", "help": f"{' | '.join(choices)}: {help_text}"}


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in 0..1")
    return value


def _add_checker(group: Any) -> None:
    group.add_argument(
        "--safety-checker",
        default="opennsfw",
        metavar="NAME",
        help="opennsfw, or a folder with diffusers' StableDiffusionSafetyChecker (default: %(default)s)",
    )
    group.add_argument(
        "--safety-threshold", type=_share, metavar="X", help="0..1: flag above it (default: the checker's)"
    )


def _add_machine(parser: argparse.ArgumentParser) -> None:
    machine = parser.add_argument_group("computer")
    machine.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 or mps (default: the fastest there is)")
    machine.add_argument(
        "--dtype", **_which(DTYPES, "precision of the weights (default: float32 on the CPU, else float16)")
    )
    _add_models_dir(machine)


def _add_models_dir(group: Any) -> None:
    group.add_argument(
        "--models-dir",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="search for models here first; repeatable",
    )


if __name__ == "__main__":
    sys.exit(main())
