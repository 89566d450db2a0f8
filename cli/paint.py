"""mend inpaint, and the diffusion run it shares with mend outpaint."""

from __future__ import annotations

import argparse
import secrets
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .adapters import EXAMPLES as ADAPTER_EXAMPLES
from .adapters import add_adapters, as_controls, as_loras, made_with
from .common import (
    Commands,
    Report,
    add_checker,
    add_field,
    add_image_and_mask,
    add_machine,
    add_output,
    clock,
    command,
    given,
    local_host,
    made_by,
    rounded,
    show_files,
    which,
    write,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..engine.host import Host, LocalHost
    from ..engine.models.family import LoadOptions
    from ..engine.models.protocol import InpaintModel
    from ..engine.safety import SafetyChecker
    from ..engine.types import InpaintRequest, InpaintResult

    Painter = Callable[[InpaintRequest, InpaintModel, Host], InpaintResult]

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
CROPS = ("auto", "off", "each")
BLENDS = ("auto", "linear", "multiband", "poisson")
COMPATS = ("off", "diffusers")
SIZE_CONDITIONINGS = ("canvas", "picture")
SAFETY_ACTIONS = ("black", "blur", "pass")

RANDOM_SEEDS = 2**32
"""A random seed is short enough to be typed again."""

EXAMPLES = f"""\
examples:
  mend inpaint room.jpg mask.png -p "a green armchair" -o chair.png
  mend inpaint room.jpg mask.png -p "a window" --count 4 -o try.png       # try-1.png ... try-4.png
  mend inpaint cut.png cut.png --mask-channel alpha -p "a lake" -o lake.png
  mend inpaint room.jpg mask.png -p "a rug" -o rug.png --json | jq .seed
{ADAPTER_EXAMPLES}

Image i of a run is made with seed + i, so each can be made again alone."""


def add(commands: Commands) -> None:
    parser = command(
        commands,
        "inpaint",
        "IMAGE MASK -p PROMPT -o OUT",
        "repaint the masked part of a picture from a prompt",
        EXAMPLES,
    )
    parser.set_defaults(command=run, show=show_files)
    add_image_and_mask(parser)
    parser.add_argument(
        "--sampler-mask", metavar="FILE", type=Path, help="where the model paints, if not all that MASK touches"
    )
    add_output(parser, "where the picture goes: .png, .jpg or .webp; with --count N, OUT-1 ... OUT-N")
    add_diffusion(parser)


def run(arguments: argparse.Namespace) -> Report:
    from ..engine.files import MaskChannel, read_image, read_mask

    inputs = [path for path in (arguments.image, arguments.mask, arguments.sampler_mask) if path]
    with clock("read") as timings:
        image = read_image(arguments.image)
        channel = MaskChannel(arguments.mask_channel)
        mask = read_mask(arguments.mask, channel)
        sampler_mask = read_mask(arguments.sampler_mask, channel) if arguments.sampler_mask else None
    return paint(arguments, image, mask, inputs, timings, sampler_mask)


def paint(
    arguments: argparse.Namespace,
    image: Tensor,
    mask: Tensor,
    inputs: list[Path],
    timings: dict[str, float],
    sampler_mask: Tensor | None = None,
    painter: Painter | None = None,
    settings: dict[str, Any] | None = None,
    others: Sequence[Path] = (),
) -> Report:
    """The diffusion path: ``engine.inpaint`` unless another ``painter`` is given, whose ``settings`` are written into
    the file too; the caller writes ``others``. Everything that can be refused is refused before the model is loaded."""
    from ..engine.files import check_outputs, numbered
    from ..engine.inpaint import inpaint, normalise
    from ..engine.models.load import load_model

    request = _request(arguments, image, mask, sampler_mask)
    outputs = numbered(arguments.out, request.count)
    read = [*inputs, *(flag.path for flag in arguments.controlnets if flag.path)]
    check_outputs([*outputs, *others], inputs=read, force=arguments.force)
    normalise(request)
    _check_schedule(request)
    host = local_host(arguments)
    path = find_model(arguments, host)
    loras = as_loras(arguments.loras, host)
    notices: list[str] = []
    with clock("load", timings):
        request = replace(request, controls=as_controls(arguments.controlnets, host))
        normalise(request)
        checker = _safety_checker(arguments, host, notices)
        model = load_model(
            path,
            host,
            config=arguments.config,
            family=arguments.family,
            prediction_type=arguments.prediction_type,
            vae=arguments.vae,
            text_encoders=arguments.text_encoder,
            loras=loras,
            options=_load_options(arguments),
        )
    notices += model.notices
    result = (painter or inpaint)(request, model, host)
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
        with clock("safety", timings):
            images = _judge(arguments, images, checker, report)
    with clock("write", timings):
        for picture, output, seed in zip(images, outputs, result.seeds, strict=True):
            made = made_by(
                arguments, **_parameters(request, seed, path), **_model_settings(arguments), **(settings or {})
            )
            write(arguments, output, picture, made, inputs)
    return report | {"timings": rounded(timings)}


def _request(arguments: argparse.Namespace, image: Tensor, mask: Tensor, sampler_mask: Tensor | None) -> InpaintRequest:
    """Flags that were not given leave the request's own defaults."""
    from ..engine.types import Blend, Compat, Crop, InpaintRequest, Sigmas

    enums: dict[str, Callable[[str], Any]] = {"sigmas": Sigmas, "crop": Crop, "compat": Compat, "blend": Blend}
    flags = {
        name: enums.get(name, lambda value: value)(value) for name, value in given(arguments, InpaintRequest).items()
    }
    pictures = {"image": image, "mask": mask, "sampler_mask": sampler_mask}  # in place of their paths
    return InpaintRequest(**{"seed": secrets.randbelow(RANDOM_SEEDS), **flags, **pictures})


def _model_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The flags that change what a model file means, where they were given."""
    flags = {name: getattr(arguments, name, None) for name in ("family", "prediction_type", "clip_skip", "vae")}
    flags["size_conditioning"] = getattr(arguments, "size_conditioning", None)
    flags["text_encoders"] = [str(path) for path in arguments.text_encoder] or None
    return {**{name: value for name, value in flags.items() if value is not None}, **made_with(arguments)}


def _load_options(arguments: argparse.Namespace) -> LoadOptions:
    from ..engine.models.family import LoadOptions, SizeConditioning

    flags = given(arguments, LoadOptions)
    if "size_conditioning" in flags:
        flags["size_conditioning"] = SizeConditioning(flags["size_conditioning"])
    return LoadOptions(**flags)


def _check_schedule(request: InpaintRequest) -> None:
    """Refuse a scheduler, spacing or strength before the model is loaded; its config cannot make them right."""
    from ..engine.schedulers import plan

    if request.strength > 0:
        plan(request.scheduler, {}, request.steps, request.strength, sigmas=request.sigmas, compat=request.compat)


def _parameters(request: InpaintRequest, seed: int, model: Path) -> dict[str, Any]:
    """What makes this one picture again."""
    return {
        "model": model.name,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "zero_negative": request.zero_negative,
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
        "soft": request.soft,
        "blend": request.blend.value,
        "color_match": request.color_match,
        "grain": request.grain,
    }


def find_model(arguments: argparse.Namespace, host: LocalHost) -> Path:
    """The model that --model names, by path or by its name in `mend models`; without --model, the only one there is
    beside those that come with the pack, which nobody wants by accident."""
    from ..engine.models.load import available_models, find_models
    from ..engine.types import ModelFileError

    wanted = arguments.model
    if wanted:
        if Path(wanted).exists():
            return Path(wanted)
        models = available_models(host)
        for name, path in models.items():
            if wanted in (name, name.removesuffix(".safetensors"), path.stem):
                return path
        raise ModelFileError(f'There is no model "{wanted}"; `mend models` lists what there is: {_some(models)}.')
    models = find_models(host)
    if len(models) == 1:
        return next(iter(models.values()))
    if models:
        raise ModelFileError(f"There are {len(models)} models; choose one with --model: {_some(models)}.")
    raise ModelFileError(
        "No model was found; give --model PATH, put one into ./models, download one with `mend models pull REPO`, or"
        " try --model mend-shapes, which comes along and paints coloured shapes."
    )


def _some(models: Collection[str]) -> str:
    return ", ".join(list(models)[:5]) + (", ..." if len(models) > 5 else "")


def _safety_checker(arguments: argparse.Namespace, host: LocalHost, notices: list[str]) -> SafetyChecker | None:
    """A checker that is not installed stops only those who asked for a check."""
    from ..engine.safety import load_safety_checker
    from ..engine.types import MissingPackageError

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
    from ..engine.safety import SafetyAction, check

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


def add_diffusion(parser: argparse.ArgumentParser, resizable: bool = True) -> None:
    """The request's flags; ``resizable``: also those that may give the picture another size."""
    prompts = parser.add_argument_group("prompt")
    add_field(prompts, "-p", "--prompt", metavar="TEXT", help="what the masked area should show; (word:1.2) stresses")
    add_field(prompts, "--negative-prompt", metavar="TEXT", help="what it should not show")
    add_field(
        prompts,
        "--zero-negative",
        action="store_true",
        help="an empty negative prompt is zeros, as diffusers has it for SDXL",
    )

    sampling = parser.add_argument_group("sampling")
    add_field(
        sampling, "--scheduler", metavar="NAME", help=f"one of {', '.join(SCHEDULERS)} (default: {SCHEDULERS[0]})"
    )
    add_field(sampling, "--sigmas", **which(SIGMAS, "spacing of the noise levels (default: default)"))
    add_field(sampling, "--steps", type=int, metavar="N", help="1..500 (default: 25)")
    add_field(sampling, "--guidance-scale", type=float, metavar="X", help="0..50: how strictly (default: 7.5)")
    add_field(sampling, "--strength", type=float, metavar="X", help="0..1: 1 starts from noise (default: 1.0)")
    add_field(sampling, "--seed", type=int, metavar="N", help="0..2^64-1 (default: random, and printed)")
    add_field(sampling, "--count", type=int, metavar="N", help="1..64 pictures (default: 1)")
    if resizable:
        add_field(sampling, "--compat", **which(COMPATS, "follow diffusers' pipeline to rounding (default: off)"))
        add_field(sampling, "--width", type=int, metavar="PX", help="of the result; 0: the image's own (default: 0)")
        add_field(sampling, "--height", type=int, metavar="PX", help="of the result; 0: the image's own (default: 0)")
    add_field(
        sampling,
        "--crop",
        **which(CROPS, "the model sees the mask's surroundings, all, or each part's (default: auto)"),
    )
    add_field(sampling, "--soft", action="store_true", help="grey parts of the mask are repainted less")

    joining = parser.add_argument_group("joining")
    add_field(joining, "--blend", **which(BLENDS, "how the painted part is joined (default: auto)"))
    add_field(joining, "--color-match", type=float, metavar="X", help="0..1 of the tone around it (default: 1.0)")
    add_field(joining, "--grain", type=float, metavar="X", help="0..1 of the surroundings' grain (default: 0.0)")

    model = parser.add_argument_group("model")
    model.add_argument("--model", metavar="MODEL", help="a path, or a name from `mend models` (default: the only one)")
    model.add_argument(
        "--config", type=Path, metavar="DIR", help="a diffusers folder whose configs replace the model's"
    )
    model.add_argument("--prediction-type", **which(("epsilon", "v_prediction"), "what the model predicts"))
    model.add_argument(
        "--family",
        metavar="NAME",
        help="what the model is, where its file misleads: sd1, sdxl, qwen-image-edit, ...",
    )
    model.add_argument("--vae", type=Path, metavar="PATH", help="a file or folder in place of the model's VAE")
    model.add_argument(
        "--text-encoder",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="one that the model lacks, or in place of its own; can be repeated",
    )
    add_field(model, "--clip-skip", type=int, metavar="N", help="text encoder layer, 1 the last (default: its own)")
    add_field(model, "--size-conditioning", **which(SIZE_CONDITIONINGS, "what SDXL is told of (default: canvas)"))
    add_adapters(parser)

    safety = parser.add_argument_group("safety")
    safety.add_argument(
        "--safety",
        action=argparse.BooleanOptionalAction,
        help="score the finished picture (default: where the checker is installed)",
    )
    safety.add_argument(
        "--safety-action",
        default="black",
        **which(SAFETY_ACTIONS, "what becomes of a flagged picture (default: %(default)s)"),
    )
    add_checker(safety)
    add_machine(parser)
