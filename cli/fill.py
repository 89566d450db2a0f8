"""mend fill: a hole filled without a diffusion model."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import (
    FILLS,
    NOTHING,
    Commands,
    Report,
    add_image_and_mask,
    add_machine,
    add_output,
    clock,
    command,
    fill_network,
    length,
    local_host,
    show_files,
    which,
    write_one,
)

PROGRESS_STEPS = 100

EXAMPLES = """\
examples:
  mend fill photo.jpg mask.png -o clean.png
  mend fill photo.jpg mask.png --method telea -o scratch-free.png
  mend fill photo.jpg mask.png --method lama --model big-lama.safetensors --grow 6 -o clean.png

methods:
  patchmatch     copies fitting patches from the rest of the picture; textures, objects, landscapes
  lama, mat      a network made for it; needs --model, a .safetensors file (see mend models convert)
  telea          spreads colours inwards; scratches, wires, small spots
  navier-stokes  continues lines inwards; scratches, wires, small spots
  blur           a soft guess from the surroundings; a base for inpaint at a strength below 1
  noise          the same with the grain of the surroundings
  edge           the nearest colour outside the mask
  mirror         the surroundings reflected at the mask's edge
  neutral        grey"""


def add(commands: Commands) -> None:
    parser = command(commands, "fill", "IMAGE MASK -o OUT", "remove something without a model", EXAMPLES)
    parser.set_defaults(command=run, show=show_files)
    add_image_and_mask(parser)
    parser.add_argument("--method", default="patchmatch", **which(FILLS, "see below (default: %(default)s)"))
    parser.add_argument("--model", type=Path, metavar="FILE", help="the network for lama and mat")
    parser.add_argument(
        "--radius",
        type=int,
        default=0,
        metavar="N",
        help="patchmatch: half the side of a patch; telea, navier-stokes: how far to look (default: the method's)",
    )
    parser.add_argument(
        "--grow",
        type=length,
        default=NOTHING,
        metavar="PX|%",
        help="grow the mask first, when an outline remains; percent of the longer side (default: 0)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of patchmatch, noise and mat (default: %(default)s)"
    )
    add_output(parser, "where the picture goes")
    add_machine(parser)


def run(arguments: argparse.Namespace) -> Report:
    from ..engine.files import MaskChannel, check_outputs, read_image, read_mask
    from ..engine.fill import FillMethod, fill
    from ..engine.images import pair, size_of
    from ..engine.masks import grow

    inputs = [arguments.image, arguments.mask]
    check_outputs([arguments.out], inputs=inputs, force=arguments.force)
    network = fill_network(arguments, arguments.method, "--model")
    mask = read_mask(arguments.mask, MaskChannel(arguments.mask_channel))
    image, mask = pair(read_image(arguments.image), mask)
    progress = local_host(arguments).progress(PROGRESS_STEPS, "fill")
    with clock("fill") as timings:
        filled = fill(
            image,
            grow(mask, arguments.grow.pixels("grow", size_of(image))),
            FillMethod(arguments.method),
            radius=arguments.radius or None,
            seed=arguments.seed,
            network=network,
            on_progress=lambda done, total: progress.update(round(done * PROGRESS_STEPS / total)),
        )
    settings = {key: getattr(arguments, key) for key in ("method", "radius", "grow", "seed")}
    if network is not None:
        settings["model"] = network.name
    report = write_one(arguments, filled, inputs, timings, settings)
    empty = "The mask is empty: the picture is returned as it came; white marks what to fill."
    return report | {"notices": [] if mask.any() else [empty]}
