"""mend outpaint: more picture on any side."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import FILLS, Commands, Report, add_output, clock, command, show_files, which, write, write_one
from .paint import add_diffusion, paint

EXAMPLES = """\
examples:
  mend outpaint photo.jpg --left 128 --right 128 -p "a wide beach" -o wide.png
  mend outpaint photo.jpg --top 200 --pad-only --fill patchmatch -o taller.png   # no model needed
  mend outpaint photo.jpg --right 256 --pad-only -o padded.png --mask-out mask.png"""


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
    sides = parser.add_argument_group("what to add")
    for side in ("left", "top", "right", "bottom"):
        sides.add_argument(f"--{side}", type=int, default=0, metavar="PX", help=f"pixels to add at the {side}")
    sides.add_argument("--feather", type=int, default=0, metavar="PX", help="soft edge of the mask, into the picture")
    sides.add_argument("--fill", default="edge", **which(FILLS, "what the new area starts from (default: %(default)s)"))
    sides.add_argument("--pad-only", action="store_true", help="stop after the fill: no model, no prompt")
    sides.add_argument("--mask-out", type=Path, metavar="FILE", help="write the mask of the new area too")
    add_output(parser, "where the picture goes")
    add_diffusion(parser)


def run(arguments: argparse.Namespace) -> Report:
    from ..engine.files import check_outputs, read_image
    from ..engine.fill import FillMethod
    from ..engine.outpaint import Padding, pad

    inputs = [arguments.image]
    outputs = [*([arguments.out] if arguments.pad_only else []), *([arguments.mask_out] if arguments.mask_out else [])]
    check_outputs(outputs, inputs=inputs, force=arguments.force)
    padding = Padding(arguments.left, arguments.top, arguments.right, arguments.bottom)
    with clock("pad") as timings:
        image = read_image(arguments.image)
        padded = pad(image, padding, arguments.feather, FillMethod(arguments.fill))
    if arguments.pad_only:
        report = write_one(arguments, padded.image, inputs, timings)
    else:
        report = paint(arguments, padded.image, padded.mask, inputs, timings)
    if padding == Padding():
        nothing = "No room was added: give --left, --top, --right or --bottom."
        report["notices"] = [nothing, *report.get("notices", ())]
    if arguments.mask_out:
        write(arguments, arguments.mask_out, padded.mask[..., None], {}, inputs)
        report["mask"] = str(arguments.mask_out)
    return report
