"""What the commands share: reports, choices, flags, files, folders of models."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:
    from torch import Tensor

    from ..engine.fill import FillNetwork
    from ..engine.host import LocalHost
    from ..engine.types import Size

Commands = Any
"""What argparse's add_subparsers returns; its class is private."""
Report = dict[str, Any]
"""What a command did: the object that --json prints, and what the lines for people are made from."""

# The engine's choices, spelled out because importing them takes seconds; a test keeps the two equal.
NETWORK_FILLS = ("lama", "mat")
FILLS = ("neutral", "edge", "mirror", "blur", "noise", "telea", "navier-stokes", "patchmatch", *NETWORK_FILLS)
MASK_CHANNELS = ("luminance", "alpha")
DTYPES = ("float32", "float16", "bfloat16")

KINDS = (
    "checkpoints",
    "controlnet",
    "diffusers",
    "diffusion_models",
    "embeddings",
    "loras",
    "safety_checker",
    "text_encoders",
    "vae",
)
"""Subfolders of a models folder, in ComfyUI's layout."""
TOKENIZERS = ("t5_tokenizer", "qwen25_tokenizer")
"""What ComfyUI has beside its models, for files that cannot hold their tokenizer."""
MODELS_VARIABLE = "MEND_MODELS"


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


class CommandParser(Parser):
    """Of one command, which answers for its own unknown flags instead of leaving them to the program's parser."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        known, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return known, []


class Length(NamedTuple):
    """A length as it was typed: 8, 8px or 2%."""

    value: float
    percent: bool

    def __str__(self) -> str:
        return f"{self.value:g}{'%' if self.percent else ''}"

    def pixels(self, name: str, size: Size) -> float:
        """A percentage is of the picture's longer side; ``name`` is for the InputError of one that is too long."""
        from ..engine.masks import Unit, to_pixels

        return to_pixels(name, self.value, Unit.PERCENT if self.percent else Unit.PIXELS, size)


NOTHING = Length(0, percent=False)


# --- flags


def help_formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=100)


def command(commands: Any, name: str, synopsis: str, summary: str, examples: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        usage=f"mend {name} {synopsis} [options]".replace("  ", " "),
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=examples,
        formatter_class=help_formatter,
    )
    parser.set_defaults(name=name)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, also for errors")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar (there is none in a pipe anyway)")
    return parser


def add_image_and_mask(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "image", metavar="IMAGE", type=Path, help="PNG, JPEG, WebP, ...; turned upright by its EXIF data"
    )
    parser.add_argument("mask", metavar="MASK", type=Path, help="white = repaint, black = keep")
    add_mask_channel(parser)


def add_mask_channel(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--mask-channel",
        default="luminance",
        **which(MASK_CHANNELS, "what marks the repainted part, white or transparent pixels (default: %(default)s)"),
    )


def add_output(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("-o", "--out", metavar="OUT", type=Path, required=True, help=what)
    parser.add_argument("--force", action="store_true", help="replace an existing file; never the input")


def add_checker(group: Any) -> None:
    group.add_argument(
        "--safety-checker",
        default="opennsfw",
        metavar="NAME",
        help="opennsfw, or a folder with diffusers' StableDiffusionSafetyChecker (default: %(default)s)",
    )
    group.add_argument(
        "--safety-threshold", type=share, metavar="X", help="0..1: flag above it (default: the checker's)"
    )


def add_machine(parser: argparse.ArgumentParser) -> None:
    machine = parser.add_argument_group("computer")
    machine.add_argument("--device", metavar="NAME", help="cpu, cuda, cuda:1 or mps (default: the fastest there is)")
    machine.add_argument(
        "--dtype",
        **which(DTYPES, "precision of the weights (default: float32 on the CPU, else float16 and a VAE that holds it)"),
    )
    add_models_dir(machine)


def add_models_dir(group: Any) -> None:
    group.add_argument(
        "--models-dir",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="search for models here first; repeatable",
    )


def which(choices: Sequence[str], help_text: str) -> dict[str, Any]:
    """Options of a flag with choices; listed in the help text, they do not crowd the flags."""
    return {"choices": choices, "metavar": "WHICH", "help": f"{' | '.join(choices)}: {help_text}"}


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in 0..1")
    return value


def length(text: str) -> Length:
    found = re.fullmatch(r"\s*([+-]?(?:\d{1,6}(?:\.\d*)?|\.\d+))\s*(%|px)?\s*", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a length; give pixels like 128 or a share like 20%")
    return Length(float(found[1]), found[2] == "%")


def add_field(group: Any, *flags: str, **options: Any) -> None:
    """A flag that is a field of the engine's request or options: absent from the namespace when it is not given."""
    group.add_argument(*flags, default=argparse.SUPPRESS, **options)


def given(arguments: argparse.Namespace, options: type) -> dict[str, Any]:
    """The fields of an engine's class of options that were given as flags."""
    return {name: value for name, value in vars(arguments).items() if name in options.__dataclass_fields__}


# --- files, models, time


def made_by(arguments: argparse.Namespace, **settings: Any) -> dict[str, Any]:
    """What a file says about how it was made; lengths and paths as they were typed."""
    typed = {name: str(value) if isinstance(value, Length | Path) else value for name, value in settings.items()}
    return {"software": f"comfyui-mend {version()}", "command": arguments.name, **typed}


def write_one(
    arguments: argparse.Namespace,
    picture: Tensor,
    inputs: list[Path],
    timings: dict[str, float],
    settings: dict[str, Any] | None = None,
) -> Report:
    with clock("write", timings):
        write(arguments, arguments.out, picture, made_by(arguments, **(settings or {})), inputs)
    return {"files": [str(arguments.out)], "timings": rounded(timings)}


def write(
    arguments: argparse.Namespace, path: Path, picture: Tensor, parameters: dict[str, Any], inputs: list[Path]
) -> None:
    """With the colour profile and, in a PNG, the depth of the first input, so that what was kept is kept to the bit."""
    from ..engine.files import read_bits, read_profile, write_image

    profile, bits = read_profile(inputs[0]), read_bits(inputs[0])
    write_image(path, picture, parameters, force=arguments.force, profile=profile, bits=bits)


def write_mask(arguments: argparse.Namespace, path: Path, mask: Tensor, bits: int = 8) -> None:
    """[1, H, W]; in 8 bits, which every program reads, unless ``bits`` asks for 16."""
    from ..engine.files import write_image

    write_image(path, mask[..., None], made_by(arguments), force=arguments.force, bits=bits)


def fill_network(arguments: argparse.Namespace, method: str, flag: str) -> FillNetwork | None:
    """What the fills lama and mat compute with: the file that ``flag`` names."""
    file = getattr(arguments, flag.removeprefix("--").replace("-", "_"))
    if method not in NETWORK_FILLS:
        if file is not None:
            raise UsageError(f"{flag} is the network of the fills {' and '.join(NETWORK_FILLS)}, not of {method}")
        return None
    if file is None:
        raise UsageError(f'the fill "{method}" needs its network; give it with {flag} FILE')
    from ..engine.models.fill_model import load_fill_model

    return load_fill_model(file, local_host(arguments))


def local_host(arguments: argparse.Namespace) -> LocalHost:
    import torch

    from ..comfy_workspace import find_workspace
    from ..engine.host import LocalHost, default_device

    roots = model_roots(arguments)
    workspace = find_workspace()
    tokenizers = workspace.path / "comfy" / "text_encoders" if workspace else None
    return LocalHost(
        device=_device(arguments.device) if arguments.device else default_device(),
        weights_dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        folders={
            **{kind: [subfolder(root, kind) for root in roots] for kind in KINDS},
            **{kind: [tokenizers / kind] for kind in TOKENIZERS if tokenizers},
        },
        show_progress=sys.stderr.isatty() and not arguments.quiet,
    )


def _device(name: str) -> Any:
    import torch

    from ..engine.types import InputError

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
    from ..comfy_workspace import find_workspace
    from ..engine.types import InputError

    for folder in arguments.models_dir:
        if not folder.is_dir():
            raise InputError(f"There is no folder {folder}; check --models-dir.")
    variable = [Path(part).expanduser() for part in os.environ.get(MODELS_VARIABLE, "").split(os.pathsep) if part]
    workspace = find_workspace()
    candidates = [*arguments.models_dir, *variable, *([workspace.path / "models"] if workspace else []), Path("models")]
    return list(dict.fromkeys(folder.resolve() for folder in candidates if folder.is_dir()))


def subfolder(root: Path, kind: str) -> Path:
    """Where ``kind`` lives in ComfyUI's layout; a folder that is not laid out so is searched as a whole."""
    laid_out = any((root / name).is_dir() for name in ("checkpoints", "diffusers"))
    return root / kind if laid_out else root


@contextlib.contextmanager
def clock(phase: str, timings: dict[str, float] | None = None) -> Iterator[dict[str, float]]:
    """Add the seconds the block takes to ``timings``."""
    timings = {} if timings is None else timings
    started = time.perf_counter()
    yield timings
    timings[phase] = timings.get(phase, 0.0) + _seconds_since(started)


def _seconds_since(started: float) -> float:
    return round(time.perf_counter() - started, 3)


def rounded(timings: dict[str, float]) -> dict[str, float]:
    return {phase: round(seconds, 3) for phase, seconds in timings.items()} | {"total": round(sum(timings.values()), 3)}


def version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("comfyui-mend")
    except PackageNotFoundError:  # a bare checkout
        return "(source)"


def show_files(report: Report) -> str:
    total = f"{report['timings']['total']:.1f} s"
    record = [report["record"]] if "record" in report else []
    files = [*report["files"], *report.get("masks", ()), *record]
    notes: list[list[str]] = [[] for _ in files]
    for index, seed in enumerate(report.get("seeds", ())):
        notes[index].append(f"seed {seed}")
    for index, (score, flagged) in enumerate(zip(report.get("scores") or (), report.get("flagged") or (), strict=True)):
        notes[index].append(f"safety score {score:.3f}{' FLAGGED' if flagged else ''}")
    notes[-1].append(total)
    return "\n".join(f"{file}  ({', '.join(note)})" if note else file for file, note in zip(files, notes, strict=True))
