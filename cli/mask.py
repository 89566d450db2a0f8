"""mend mask: masks made, combined, made ready, explained."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .common import (
    NOTHING,
    Commands,
    Length,
    Report,
    UsageError,
    add_mask_channel,
    add_output,
    clock,
    command,
    length,
    made_by,
    rounded,
    show_files,
    which,
)

if TYPE_CHECKING:
    from torch import Tensor

    from ..engine.masks import MaskOptions
    from ..engine.types import Size

# The engine's choices, spelled out because importing them takes seconds; a test keeps the two equal.
DISTANCES = ("lab", "rgb")
OPERATIONS = ("add", "subtract", "and", "or", "xor")
FEATHER_SIDES = ("outward", "inward", "centred")
SHAPES = ("round", "square")

INPUTS = ("mask", "after", "combine", "image")
OUTPUTS = ("out", "user_mask", "sampler_mask", "preview")
SOURCES = ("alpha", "color", "difference")
EXAMPLES = """\
examples:
  mend mask rough.png --grow 8 --feather 4 -o mask.png
  mend mask rough.png --grow 2% --preview look.png --image photo.jpg --report -o mask.png
  mend mask outline.png --threshold 0.5 --close 3 --fill-holes -o solid.png
  mend mask subject.png --invert -o background.png
  mend mask photo.png --from color --color "#00ff00" --tolerance 20 -o screen.png
  mend mask before.png --from difference --after after.png --grow 4 -o changed.png
  mend mask person.png --combine dog.png --operation subtract -o person-only.png

In this order: combine, floor, threshold, invert, close, fill holes, open, islands, grow, feather."""


def add(commands: Commands) -> None:
    parser = command(commands, "mask", "MASK -o OUT", "make, grow, feather, clean or explain a mask", EXAMPLES)
    parser.set_defaults(command=run, show=show)
    parser.add_argument("mask", metavar="MASK", type=Path, help="white = repaint; with --from: a picture")
    add_mask_channel(parser)
    add_output(parser, "where the mask goes")
    _add_sources(parser.add_argument_group("from a picture, or two masks"))
    _add_cleaning(parser.add_argument_group("what was painted"))
    _add_edge(parser.add_argument_group("its edge"))
    _add_explaining(parser.add_argument_group("other masks, explanations"))


def _add_sources(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--from", dest="source", **which(SOURCES, "what of the picture MASK becomes the mask"))
    group.add_argument("--color", metavar="COLOR", help="--from color: #rrggbb or a name")
    group.add_argument("--after", metavar="FILE", type=Path, help="--from difference: the picture after the edit")
    group.add_argument(
        "--tolerance",
        type=float,
        default=10,
        metavar="X",
        help="how far colours may be apart: 2 is just visible, black and white are 100 apart (default: %(default)s)",
    )
    group.add_argument("--softness", type=float, default=0, metavar="X", help="--from color: fade over so much more")
    group.add_argument(
        "--distance", default="lab", **which(DISTANCES, "--from color: as the eye sees, or as the numbers are")
    )
    group.add_argument(
        "--noise",
        type=float,
        default=2,
        metavar="PX",
        help="--from difference: JPEG and VAE noise to ignore, 0 for none (default: %(default)s)",
    )
    group.add_argument("--combine", metavar="FILE", type=Path, help="a second mask")
    group.add_argument("--operation", **which(OPERATIONS, "how it is combined with the first (default: add)"))


def _add_cleaning(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--floor", type=float, default=0, metavar="X", help="0..1: below it black, the rest stays grey")
    group.add_argument(
        "--threshold", type=float, default=0, metavar="X", help="0..1: from here up white, the rest black"
    )
    group.add_argument("--invert", action="store_true", help="swap white and black")
    group.add_argument("--close", type=length, default=NOTHING, metavar="PX|%", help="bridge gaps twice as wide")
    group.add_argument("--fill-holes", action="store_true", help="what an outline encloses becomes white")
    group.add_argument(
        "--open", type=length, default=NOTHING, metavar="PX|%", help="drop specks and hairs twice as wide"
    )
    group.add_argument(
        "--min-island",
        type=length,
        default=NOTHING,
        metavar="PX|%",
        help="drop islands of fewer pixels, or a smaller share of the picture",
    )
    group.add_argument("--keep-largest", action="store_true", help="drop all islands but the largest")


def _add_edge(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--grow",
        type=length,
        default=NOTHING,
        metavar="PX|%",
        help="widen by pixels or percent of the longer side; negative shrinks (--grow=-2%%)",
    )
    group.add_argument("--shape", default="round", **which(SHAPES, "of growth, closing and opening"))
    group.add_argument("--feather", type=length, default=NOTHING, metavar="PX|%", help="width of the soft edge")
    group.add_argument(
        "--feather-side", default="outward", **which(FEATHER_SIDES, "where it lies (default: %(default)s)")
    )
    group.add_argument("--keep-solid", action="store_true", help="what was painted stays white whatever the feather")


def _add_explaining(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--user-mask", metavar="FILE", type=Path, help="also write what was painted, cleaned up")
    group.add_argument("--sampler-mask", metavar="FILE", type=Path, help="also write the grown mask on latent cells")
    group.add_argument("--downscale", type=int, default=8, metavar="N", help="pixels of a latent cell (default: 8)")
    group.add_argument("--report", action="store_true", help="print the mask's numbers; always there with --json")
    group.add_argument("--preview", metavar="FILE", type=Path, help="draw the mask and its numbers")
    group.add_argument("--image", metavar="FILE", type=Path, help="the picture for --preview (default: MASK of --from)")


def run(arguments: argparse.Namespace) -> Report:
    from ..engine.files import check_outputs, read_bits, write_image
    from ..engine.images import size_of
    from ..engine.mask_report import mask_report, preview
    from ..engine.masks import prepare_masks

    _check(arguments)
    inputs, outputs = (
        [path for name in names if (path := getattr(arguments, name)) is not None] for names in (INPUTS, OUTPUTS)
    )
    check_outputs(outputs, inputs=inputs, force=arguments.force)
    with clock("read") as timings:
        mask = _read(arguments)
    with clock("mask", timings):
        prepared = prepare_masks(mask, _options(arguments, size_of(mask)), arguments.downscale)
        report = mask_report(prepared.stitch, arguments.downscale)
    masks = {
        arguments.out: prepared.stitch,
        arguments.user_mask: prepared.user,
        arguments.sampler_mask: prepared.sampler,
    }
    bits = read_bits(arguments.mask) if arguments.source is None else 8
    pictures = {path: (picture[..., None], bits) for path, picture in masks.items() if path is not None}
    if arguments.preview is not None:
        with clock("preview", timings):
            pictures[arguments.preview] = preview(_background(arguments), prepared.stitch, [report]), 8
    with clock("write", timings):
        for path, (picture, depth) in pictures.items():
            write_image(path, picture, _settings(arguments), force=arguments.force, bits=depth)
    notices = [] if report.box else ["The mask is empty: nothing would be repainted."]
    written = {"files": [str(path) for path in pictures], "report": report.as_dict(), "notices": notices}
    return written | ({"summary": str(report)} if arguments.report else {}) | {"timings": rounded(timings)}


def show(report: Report) -> str:
    return "\n".join([show_files(report), *([report["summary"]] if "summary" in report else [])])


def _check(arguments: argparse.Namespace) -> None:
    if arguments.source == "color" and arguments.color is None:
        raise UsageError('--from color needs --color, for example --color "#00ff00"')
    if arguments.source == "difference" and arguments.after is None:
        raise UsageError("--from difference needs --after, the picture after the edit")
    for flag, source in (("color", "color"), ("after", "difference")):
        if getattr(arguments, flag) is not None and arguments.source != source:
            raise UsageError(f"--{flag} is for --from {source}; add that, or leave --{flag} out")
    if arguments.operation is not None and arguments.combine is None:
        raise UsageError("--operation says how a second mask is combined; give it with --combine FILE")
    if arguments.image is not None and arguments.preview is None:
        raise UsageError("--image is the picture for a preview; add --preview FILE")


def _read(arguments: argparse.Namespace) -> Tensor:
    """[1, H, W], made or read, and combined."""
    from ..engine.files import MaskChannel, read_image, read_mask
    from ..engine.images import as_mask_batch
    from ..engine.mask_sources import ColorDistance, Operation, combine, from_alpha, from_color, from_difference

    channel = MaskChannel(arguments.mask_channel)
    if arguments.source is None:
        mask = as_mask_batch(read_mask(arguments.mask, channel))
    elif arguments.source == "alpha":
        mask = from_alpha(read_image(arguments.mask))
    elif arguments.source == "color":
        distance = ColorDistance(arguments.distance)
        picture = read_image(arguments.mask)
        mask = from_color(picture, arguments.color, arguments.tolerance, arguments.softness, distance)
    else:
        before, after = read_image(arguments.mask), read_image(arguments.after)
        mask = from_difference(before, after, arguments.tolerance, arguments.noise)
    if arguments.combine is None:
        return mask
    return combine(mask, read_mask(arguments.combine, channel), Operation(arguments.operation or "add"))


def _options(arguments: argparse.Namespace, size: Size) -> MaskOptions:
    """In pixels, since each length may have a unit of its own."""
    from ..engine.masks import FeatherSide, MaskOptions, Shape

    def pixels(name: str) -> float:
        typed: Length = getattr(arguments, name)
        return typed.pixels(name, size)

    island = arguments.min_island
    return MaskOptions(
        floor=arguments.floor,
        threshold=arguments.threshold,
        invert=arguments.invert,
        close=pixels("close"),
        fill_holes=arguments.fill_holes,
        open=pixels("open"),
        min_island=island.value * (size.width * size.height / 100 if island.percent else 1),
        keep_largest=arguments.keep_largest,
        grow=pixels("grow"),
        feather=pixels("feather"),
        feather_side=FeatherSide(arguments.feather_side),
        keep_solid=arguments.keep_solid,
        shape=Shape(arguments.shape),
    )


def _background(arguments: argparse.Namespace) -> Tensor | None:
    """What the preview shows the mask on."""
    from ..engine.files import read_image

    path = arguments.image or (arguments.mask if arguments.source else None)
    return None if path is None else read_image(path)


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the file says about how it was made: the flags that decide it, as they were typed."""
    left_out = {"name", "command", "show", "json", "quiet", "force", "report", "image", *OUTPUTS}
    return made_by(
        arguments,
        **{name: value for name, value in vars(arguments).items() if name not in left_out and value is not None},
    )
