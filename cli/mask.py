"""mend mask: masks made ready."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import Commands, Report, add_mask_channel, add_output, clock, command, show_files, write_one

EXAMPLES = """\
examples:
  mend mask rough.png --grow 8 --feather 4 -o mask.png
  mend mask outline.png --threshold 0.5 --fill-holes -o solid.png
  mend mask subject.png --invert -o background.png

In this order: threshold, invert, fill holes, grow, feather."""


def add(commands: Commands) -> None:
    parser = command(commands, "mask", "MASK -o OUT", "grow, feather, invert or clean a mask", EXAMPLES)
    parser.set_defaults(command=run, show=show_files)
    parser.add_argument("mask", metavar="MASK", type=Path, help="white = repaint")
    parser.add_argument(
        "--threshold", type=float, default=0, metavar="X", help="0..1: from here up white, the rest black"
    )
    parser.add_argument("--invert", action="store_true", help="swap white and black")
    parser.add_argument("--fill-holes", action="store_true", help="what an outline encloses becomes white")
    parser.add_argument("--grow", type=float, default=0, metavar="PX", help="widen by pixels; negative shrinks")
    parser.add_argument("--feather", type=float, default=0, metavar="PX", help="pixels of soft edge outside the mask")
    add_mask_channel(parser)
    add_output(parser, "where the mask goes")


def run(arguments: argparse.Namespace) -> Report:
    from ..engine.files import MaskChannel, check_outputs, read_mask
    from ..engine.masks import MaskOptions, prepare

    settings = {name: getattr(arguments, name) for name in ("threshold", "invert", "fill_holes", "grow", "feather")}
    options = MaskOptions(**settings)
    check_outputs([arguments.out], inputs=[arguments.mask], force=arguments.force)
    mask = read_mask(arguments.mask, MaskChannel(arguments.mask_channel))
    with clock("mask") as timings:
        prepared = prepare(mask, options)
    return write_one(arguments, prepared[..., None], [arguments.mask], timings, settings)
