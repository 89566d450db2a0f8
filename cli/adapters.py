"""--lora and --controlnet: what mend inpaint and mend outpaint add to a model."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..engine.control import Control
    from ..engine.host import LocalHost
    from ..engine.models.lora import Lora

MASKED = "masked"
"""In place of a file: the picture with the hole in it."""

EXAMPLES = """\
  mend inpaint room.jpg mask.png -p "a rug" --lora style.safetensors:0.8 --lora film:0.5:0 -o rug.png
  mend inpaint room.jpg mask.png -p "a rug" --controlnet control_v11p_sd15_inpaint --control-image masked -o rug.png"""


@dataclass(frozen=True)
class LoraFlag:
    """--lora FILE[:STRENGTH[:TEXT]]"""

    file: str
    strength: float
    text_strength: float | None

    def __str__(self) -> str:
        text = "" if self.text_strength is None else f":{self.text_strength:g}"
        return f"{self.file}:{self.strength:g}{text}"


@dataclass(frozen=True)
class ControlFlags:
    """--controlnet and the --control-... flags that follow it."""

    file: str
    image: str | None = None
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0

    @property
    def path(self) -> Path | None:
        """Of the image."""
        return None if self.image in (None, MASKED) else Path(str(self.image))


_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)"


def lora_flag(text: str) -> LoraFlag:
    # a Windows path has a colon of its own
    found = re.fullmatch(rf"(?P<file>.+?)(?::(?P<strength>{_NUMBER}))?(?::(?P<text>{_NUMBER}))?", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a LoRA; give FILE, FILE:0.8 or FILE:0.8:0.5")
    strength, text_strength = found["strength"], found["text"]
    return LoraFlag(found["file"], float(strength or 1), None if text_strength is None else float(text_strength))


class _AddControl(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        namespace.controlnets = [*namespace.controlnets, ControlFlags(values)]


class _SetControl(argparse.Action):
    """Of the --controlnet before it."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        if not namespace.controlnets:
            parser.error(f"{option_string} belongs behind a --controlnet")
        *others, last = namespace.controlnets
        namespace.controlnets = [*others, replace(last, **{self.dest.removeprefix("control_"): values})]


def add_adapters(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("added to the model")
    group.add_argument(
        "--lora",
        dest="loras",
        type=lora_flag,
        action="append",
        default=[],
        metavar="FILE[:X[:TEXT]]",
        help="a LoRA by path or name in models/loras, its strength -20..20 (default: 1) and that of its text encoder"
        " changes (default: the same); can be repeated",
    )
    group.add_argument(
        "--controlnet",
        dest="controlnets",
        action=_AddControl,
        default=[],
        metavar="FILE",
        help="a ControlNet by path or name in models/controlnet; can be repeated, each with flags of its own after it:",
    )
    for name, kind, metavar, text in (
        ("image", str, "FILE", f"edges, depth, ... of the whole picture, or {MASKED}: the picture with its hole"),
        ("strength", float, "X", "0..10 (default: 1)"),
        ("start", float, "X", "0..1 of the way from noise to picture (default: 0)"),
        ("end", float, "X", "0..1 (default: 1)"),
    ):
        group.add_argument(
            f"--control-{name}", type=kind, action=_SetControl, default=argparse.SUPPRESS, metavar=metavar, help=text
        )


def as_loras(flags: Sequence[LoraFlag], host: LocalHost) -> list[Lora]:
    """Raises MendError for a file that is not there or no LoRA, and for a strength out of range."""
    from ..engine.models.load import find_files
    from ..engine.models.lora import Lora
    from ..engine.models.lora_file import read_lora

    if not flags:
        return []
    files = find_files(host, "loras")
    loras = [Lora(_find("LoRA", flag.file, files), flag.strength, flag.text_strength) for flag in flags]
    for lora in loras:
        read_lora(lora.path)
    return loras


def as_controls(flags: Sequence[ControlFlags], host: LocalHost) -> tuple[Control, ...]:
    """With their networks loaded. Raises MendError for files that are not there or something else, and for numbers out
    of range."""
    from ..engine.control import Control
    from ..engine.files import read_image
    from ..engine.models.controlnet import find_controlnets, load_controlnet
    from ..engine.types import InputError

    if not flags:
        return ()
    files = find_controlnets(host)
    controls = []
    for flag in flags:
        path = _find("ControlNet", flag.file, files)
        if flag.image is None:
            raise InputError(
                f"The ControlNet {path.name} has nothing to follow: give --control-image FILE, or --control-image"
                f" {MASKED} for one made for inpainting."
            )
        image = read_image(flag.path) if flag.path else None
        numbers = {"strength": flag.strength, "start": flag.start, "end": flag.end}
        controls.append(Control(network=load_controlnet(path, host), image=image, **numbers))
    return tuple(controls)


def made_with(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a file says of them, where there are any."""
    settings: dict[str, Any] = {}
    if arguments.loras:
        settings["loras"] = [str(flag) for flag in arguments.loras]
    if arguments.controlnets:
        settings["controlnets"] = [vars(flag) for flag in arguments.controlnets]
    return settings


def _find(kind: str, wanted: str, files: Mapping[str, Path]) -> Path:
    """A file or folder by its path, or by its name below the models folders, with or without its ending."""
    from ..engine.types import ModelFileError

    if Path(wanted).exists():
        return Path(wanted)
    for name, path in files.items():
        if wanted in (name, name.removesuffix(".safetensors"), path.name, path.stem):
            return path
    known = ", ".join(list(files)[:5]) + (", ..." if len(files) > 5 else "")
    raise ModelFileError(f'There is no {kind} "{wanted}"; ' + (f"there are {known}." if files else "give its path."))
