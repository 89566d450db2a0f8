"""mend color: one picture in the colours of another."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import Commands, Report, add_mask_channel, add_output, clock, command, share, show_files, which, write_one

METHODS = ("mkl", "reinhard", "histogram")
AREAS = ("whole", "mask")
EXAMPLES = """\
examples:
  mend color edited.png original.png --mask mask.png -o matched.png   # take off an edit's colour shift
  mend color photo.jpg look.jpg --method reinhard --strength 0.7 -o graded.jpg

With --mask, what it marks as repainted is left out of the measurement."""


def add(commands: Commands) -> None:
    parser = command(commands, "color", "IMAGE REFERENCE -o OUT", "give a picture the colours of another", EXAMPLES)
    parser.set_defaults(command=run, show=show_files)
    parser.add_argument("image", metavar="IMAGE", type=Path, help="the picture to change")
    parser.add_argument("reference", metavar="REFERENCE", type=Path, help="the picture whose colours are wanted")
    parser.add_argument(
        "--mask",
        metavar="MASK",
        type=Path,
        help="white = repainted, so not measured (in REFERENCE too, if of one size)",
    )
    parser.add_argument(
        "--method",
        default="mkl",
        **which(
            METHODS, "mean and covariance, Lab mean and contrast, or each channel's histogram (default: %(default)s)"
        ),
    )
    parser.add_argument("--strength", type=share, default=1.0, metavar="X", help="0..1: how far (default: %(default)s)")
    parser.add_argument("--max-shift", type=share, metavar="X", help="0..1: the most a channel may change")
    parser.add_argument(
        "--apply-to", default="whole", **which(AREAS, "which pixels change; mask needs --mask (default: %(default)s)")
    )
    add_mask_channel(parser)
    add_output(parser, "where the picture goes")


def run(arguments: argparse.Namespace) -> Report:
    from ..engine.color import ApplyTo, ColorMatch, match_around
    from ..engine.files import MaskChannel, check_outputs, read_image, read_mask
    from ..engine.types import InputError

    if arguments.apply_to == "mask" and arguments.mask is None:
        raise InputError("--apply-to mask needs a mask; give it with --mask.")
    inputs = [path for path in (arguments.image, arguments.reference, arguments.mask) if path is not None]
    check_outputs([arguments.out], inputs=inputs, force=arguments.force)
    with clock("read") as timings:
        image, reference = read_image(arguments.image), read_image(arguments.reference)
        mask = read_mask(arguments.mask, MaskChannel(arguments.mask_channel)) if arguments.mask else None
    with clock("color", timings):
        matched = match_around(
            image,
            reference,
            mask,
            ColorMatch(arguments.method),
            apply_to=ApplyTo(arguments.apply_to),
            strength=arguments.strength,
            max_shift=arguments.max_shift,
        )
    settings = {name: getattr(arguments, name) for name in ("method", "strength", "max_shift", "apply_to")}
    return write_one(arguments, matched, inputs, timings, settings)
