"""mend fill: a hole filled without a model."""

from __future__ import annotations

import argparse

from .common import (
    FILLS,
    Commands,
    Report,
    add_image_and_mask,
    add_output,
    clock,
    command,
    show_files,
    which,
    write_one,
)

EXAMPLES = """\
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


def add(commands: Commands) -> None:
    parser = command(commands, "fill", "IMAGE MASK -o OUT", "remove something without a model", EXAMPLES)
    parser.set_defaults(command=run, show=show_files)
    add_image_and_mask(parser)
    parser.add_argument("--method", default="patchmatch", **which(FILLS, "see below (default: %(default)s)"))
    add_output(parser, "where the picture goes")


def run(arguments: argparse.Namespace) -> Report:
    from ..engine.files import MaskChannel, check_outputs, read_image, read_mask
    from ..engine.fill import FillMethod, fill
    from ..engine.images import pair

    inputs = [arguments.image, arguments.mask]
    check_outputs([arguments.out], inputs=inputs, force=arguments.force)
    mask = read_mask(arguments.mask, MaskChannel(arguments.mask_channel))
    image, mask = pair(read_image(arguments.image), mask)
    with clock("fill") as timings:
        filled = fill(image, mask, FillMethod(arguments.method))
    report = write_one(arguments, filled, inputs, timings, {"method": arguments.method})
    empty = "The mask is empty: the picture is returned as it came; white marks what to fill."
    return report | {"notices": [] if mask.any() else [empty]}
