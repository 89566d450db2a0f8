"""mend outpaint: more picture on any side."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .common import (
    FILLS,
    NOTHING,
    Commands,
    Length,
    Report,
    add_output,
    clock,
    command,
    fill_network,
    length,
    show_files,
    which,
    write_mask,
    write_one,
)
from .paint import add_diffusion, paint

if TYPE_CHECKING:
    from ..engine.host import Host
    from ..engine.models.protocol import InpaintModel
    from ..engine.outpaint import Length as EngineLength
    from ..engine.outpaint import Room
    from ..engine.outpaint_steps import GrowthOptions
    from ..engine.types import InpaintRequest, InpaintResult

# The engine's choices, spelled out because importing them takes seconds; a test keeps the two equal.
ANCHORS = ("top-left", "top", "top-right", "left", "center", "right", "bottom-left", "bottom", "bottom-right")
FITTINGS = ("extend", "crop", "fit")
SIDES = ("left", "top", "right", "bottom")
SETTINGS = (*SIDES, "to", "anchor", "fitting", "multiple", "feather", "fill", "growth", "overlap", "window")
"""What makes this picture again, beside the request's own."""

EXAMPLES = """\
examples:
  mend outpaint photo.jpg --left 128 --right 20% -p "a wide beach" -o wide.png
  mend outpaint photo.jpg --to 16:9 --anchor left --feather 40 -p "a wide beach" -o wide.png
  mend outpaint photo.jpg --to 2048x2048 --growth 256 -p "a beach seen from far above" -o far.png
  mend outpaint photo.jpg --left=-10% --top 200 --pad-only --fill patchmatch -o taller.png   # no model needed
  mend outpaint photo.jpg --right 256 --pad-only -o padded.png --mask-out mask.png

A far target is painted in strips, side by side, in windows of the model's own size; --window 16384 paints it in one."""


def add(commands: Commands) -> None:
    parser = command(
        commands,
        "outpaint",
        "IMAGE --left PX ... -p PROMPT -o OUT",
        "enlarge a picture beyond its borders",
        EXAMPLES,
    )
    parser.set_defaults(command=run, show=show_files)
    parser.add_argument("image", metavar="IMAGE", type=Path, help="the picture")
    room = parser.add_argument_group("what to add")
    for side in SIDES:
        room.add_argument(
            f"--{side}",
            type=length,
            default=NOTHING,
            metavar="PX|%",
            help=f"at the {side}: 128, 20%%, or --{side}=-10%% to cut",
        )
    room.add_argument("--to", default="", metavar="TARGET", help="a size like 1024x768 or an aspect ratio like 16:9")
    room.add_argument(
        "--anchor", default="center", **which(ANCHORS, "where the picture stays, with --to (default: %(default)s)")
    )
    room.add_argument(
        "--fitting",
        default="extend",
        **which(FITTINGS, "add only, also cut, or scale first, with --to (default: %(default)s)"),
    )
    room.add_argument(
        "--multiple", type=int, default=1, metavar="N", help="1..1024: round the size up to multiples (default: 1)"
    )
    room.add_argument("--feather", type=int, default=0, metavar="PX", help="soft edge of the mask, into the picture")
    room.add_argument("--fill", default="edge", **which(FILLS, "what the new area starts from (default: %(default)s)"))
    room.add_argument("--fill-model", type=Path, metavar="FILE", help="the network of the fills lama and mat")
    room.add_argument("--pad-only", action="store_true", help="stop after the fill: no model, no prompt")
    room.add_argument("--mask-out", type=Path, metavar="FILE", help="write the mask of the new area too")
    walk = parser.add_argument_group("how to get there")
    walk.add_argument(
        "--growth",
        type=length,
        default=NOTHING,
        metavar="PX|%",
        help="most a step adds to a side: 256, 50%% (default: half a window)",
    )
    walk.add_argument(
        "--overlap", type=int, default=64, metavar="PX", help="of earlier steps painted again (default: %(default)s)"
    )
    walk.add_argument(
        "--window", type=int, default=0, metavar="PX", help="what the model is shown at once (default: its native size)"
    )
    add_output(parser, "where the picture goes")
    add_diffusion(parser, resizable=False)


def run(arguments: argparse.Namespace) -> Report:
    from ..engine.files import check_outputs, read_image
    from ..engine.fill import FillMethod
    from ..engine.outpaint import make_room
    from ..engine.outpaint_steps import outpaint

    inputs = [arguments.image]
    mask_files = [arguments.mask_out] if arguments.mask_out else []
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    if arguments.pad_only:
        check_outputs([arguments.out, *mask_files], inputs=inputs, force=arguments.force)
    room, options = _room(arguments), _growth(arguments)
    with clock("pad") as timings:
        image = read_image(arguments.image)
        # what is painted is filled step by step
        method = FillMethod(arguments.fill) if arguments.pad_only else FillMethod.EDGE
        padded = make_room(image, room, arguments.feather, method, network=options.network)

    def painter(request: InpaintRequest, model: InpaintModel, host: Host) -> InpaintResult:
        return outpaint(request, padded.box, model, host, options)

    if arguments.pad_only:
        report = write_one(arguments, padded.image, inputs, timings, settings)
        if padded.image.shape == image.shape and padded.mask.max() == 0:
            report["notices"] = ["No room was added: give --left, --top, --right or --bottom."]
    else:
        report = paint(
            arguments,
            padded.image,
            padded.mask,
            inputs,
            timings,
            painter=painter,
            settings=settings,
            others=mask_files,
        )
    report["notices"] = [*padded.notices, *report.get("notices", ())]
    for file in mask_files:
        write_mask(arguments, file, padded.mask)
    return report | {"masks": [str(file) for file in mask_files]}


def _room(arguments: argparse.Namespace) -> Room:
    from ..engine.outpaint import Anchor, Fitting, Room, parse_target

    return Room(
        **{side: _engines(getattr(arguments, side)) for side in SIDES},
        target=parse_target(arguments.to),
        anchor=Anchor(arguments.anchor),
        fitting=Fitting(arguments.fitting),
        multiple=arguments.multiple,
    )


def _growth(arguments: argparse.Namespace) -> GrowthOptions:
    from ..engine.fill import FillMethod
    from ..engine.outpaint_steps import GrowthOptions

    return GrowthOptions(
        growth=_engines(arguments.growth),
        overlap=arguments.overlap,
        window=arguments.window,
        fill=FillMethod(arguments.fill),
        network=fill_network(arguments, arguments.fill, "--fill-model"),
    )


def _engines(typed: Length) -> EngineLength:
    """A length of the engine, whose percentages are of the side it is added to."""
    from ..engine.outpaint import Length, Unit

    return Length(typed.value, Unit.PERCENT if typed.percent else Unit.PIXELS)
