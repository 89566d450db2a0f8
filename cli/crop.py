"""mend crop, mend stitch: the mask's surroundings for any other program, and back."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .common import (
    FILLS,
    NETWORK_FILLS,
    Commands,
    Report,
    add_field,
    add_image_and_mask,
    add_output,
    clock,
    command,
    given,
    made_by,
    rounded,
    share,
    show_files,
    which,
    write,
    write_mask,
)
from .paint import BLENDS

if TYPE_CHECKING:
    from ..engine.crop import CropOptions

# The engine's choices, spelled out because importing them takes seconds; a test keeps the two equal.
SIZES = ("own", "exact", "megapixels", "sdxl", "sd15", "sd2")
OVERFLOWS = ("inside", "extend")
EXTENDING_FILLS = tuple(method for method in FILLS if method not in NETWORK_FILLS)

CROP_EXAMPLES = """\
examples:
  mend crop photo.jpg mask.png -o crop.png --record crop.json
  mend crop photo.jpg mask.png -o crop.png --record crop.json --size sdxl --mask-out crop-mask.png
  mend crop photo.jpg spots.png -o spot.png --record spots.json --each    # spot-1.png, spot-2.png, ...

Paint the crop with whatever you like, enlarge it if you like, then `mend stitch` puts it back."""

STITCH_EXAMPLES = """\
examples:
  mend stitch crop.png crop.json --image photo.jpg -o result.png
  mend stitch spot-1.png spot-2.png spots.json --image photo.jpg -o result.png --blend poisson

Every pixel outside the mask stays as it is in the original."""


def add(commands: Commands) -> None:
    _add_crop(commands)
    _add_stitch(commands)


def _add_crop(commands: Commands) -> None:
    parser = command(
        commands,
        "crop",
        "IMAGE MASK -o CROP --record FILE",
        "cut out the mask's surroundings for another program",
        CROP_EXAMPLES,
    )
    parser.set_defaults(command=crop, show=_show)
    add_image_and_mask(parser)
    parser.add_argument(
        "--record", metavar="FILE", type=Path, required=True, help="a .json file or a folder: how the crop goes back"
    )
    parser.add_argument("--mask-out", metavar="FILE", type=Path, help="write the crop's mask too")
    parser.add_argument("--each", action="store_true", help="a crop for each separate place; numbered names")
    parser.add_argument("--stitch-mask", metavar="FILE", type=Path, help="what comes back, if not what MASK marks")
    parser.add_argument("--context-mask", metavar="FILE", type=Path, help="what must be seen too")

    context = parser.add_argument_group("what is shown")
    add_field(
        context,
        "--context-factor",
        type=float,
        metavar="X",
        help="1..20: the crop's width over the mask's; 1.5 shows a quarter of it on each side (default: 1.5)",
    )
    add_field(context, "--context-pixels", type=int, metavar="PX", help="on each side at least (default: 32)")
    add_field(context, "--min-size", type=int, metavar="PX", help="each way at least, given room (default: 512)")
    add_field(context, "--max-aspect", type=float, metavar="X", help="a longer crop takes in more (default: 2.0)")
    add_field(context, "--overflow", **which(OVERFLOWS, "where the picture has too little room (default: inside)"))
    add_field(context, "--fill", **which(EXTENDING_FILLS, "what extend shows (default: edge)"))
    add_field(context, "--mask-outside", action="store_true", help="what extend adds is masked")

    size = parser.add_argument_group("size of the crop")
    size.add_argument(
        "--size",
        default="megapixels",
        **which(SIZES, "unscaled, one size, an area, or a model's sizes (default: %(default)s)"),
    )
    size.add_argument("--megapixels", type=float, default=1.0, metavar="X", help="1 is 1024x1024 (default: 1.0)")
    size.add_argument("--width", type=int, default=1024, metavar="PX", help="for --size exact (default: 1024)")
    size.add_argument("--height", type=int, default=1024, metavar="PX", help="for --size exact (default: 1024)")
    add_field(size, "--multiple", type=int, metavar="N", help="width and height are multiples of N (default: 8)")
    add_field(size, "--keep-scale", type=float, metavar="X", help="0..0.9: not scaled when that close (default: 0.25)")
    add_output(parser, "where the crop goes; several: numbered")


def _add_stitch(commands: Commands) -> None:
    parser = command(
        commands, "stitch", "CROP... RECORD --image ORIGINAL -o OUT", "put painted crops back", STITCH_EXAMPLES
    )
    parser.set_defaults(command=stitch, show=_show)
    parser.add_argument("crops", metavar="CROP", type=Path, nargs="+", help="the painted crops, in their order")
    parser.add_argument("record", metavar="RECORD", type=Path, help="what `mend crop --record` wrote")
    parser.add_argument(
        "--image", metavar="ORIGINAL", type=Path, required=True, help="the picture the crop was cut from"
    )
    joining = parser.add_argument_group("joining")
    add_field(joining, "--blend", **which(BLENDS, "auto measures the seam and picks (default: auto)"))
    add_field(joining, "--color-match", type=share, metavar="X", help="0..1: of the tone difference (default: 1.0)")
    add_field(joining, "--register", action="store_true", help="measure whether the picture moved, and move it back")
    add_field(joining, "--grain", type=share, metavar="X", help="0..1: of the surroundings' grain (default: 0.0)")
    add_field(joining, "--seed", type=int, metavar="N", help="decides the grain (default: 0)")
    add_output(parser, "where the picture goes")


def crop(arguments: argparse.Namespace) -> Report:
    from ..engine.crop_record import files_of, record_file, save
    from ..engine.crop_stitch import Separate, crop_to_mask
    from ..engine.files import MaskChannel, check_outputs, numbered, read_image, read_mask
    from ..engine.types import InputError

    options = _crop_options(arguments)
    masks = (arguments.mask, arguments.stitch_mask, arguments.context_mask)
    inputs = [arguments.image, *(file for file in masks if file)]
    record = record_file(arguments.record)
    if record.suffix.lower() != ".json":
        raise InputError(f"{record} is a file, but no .json file; name one, or a folder, for the record.")
    image = read_image(arguments.image)
    channel = MaskChannel(arguments.mask_channel)
    mask, stitch_mask, context_mask = (read_mask(file, channel) if file else None for file in masks)
    assert mask is not None
    with clock("crop") as timings:
        cropped = crop_to_mask(
            image,
            mask,
            options,
            stitch_mask=stitch_mask,
            context_mask=context_mask,
            separate=Separate.EACH if arguments.each else Separate.TOGETHER,
        )
    files = numbered(arguments.out, len(cropped.crops))
    mask_files = numbered(arguments.mask_out, len(cropped.crops)) if arguments.mask_out else []
    records = files_of(cropped.record, record)
    check_outputs([*files, *mask_files], others=records, inputs=inputs, force=arguments.force)
    with clock("write", timings):
        for file, picture in zip(files, cropped.crops, strict=True):
            write(arguments, file, picture, made_by(arguments), inputs)
        for file, picture in zip(mask_files, cropped.masks, strict=False):
            write_mask(arguments, file, picture)
        save(cropped.record, record, force=arguments.force)
    return {
        "files": [str(file) for file in files],
        "masks": [str(file) for file in mask_files],
        "record": str(record),
        "report": list(cropped.reports),
        "notices": [] if mask.any() else ["The mask is empty: the whole picture is the crop, and nothing comes back."],
        "timings": rounded(timings),
    }


def _crop_options(arguments: argparse.Namespace) -> CropOptions:
    from ..engine.crop import CanvasSize, CropOptions, target_of
    from ..engine.types import Size

    exact = Size(arguments.width, arguments.height)
    target = target_of(CanvasSize(arguments.size), exact, arguments.megapixels)
    return CropOptions(target=target, **given(arguments, CropOptions))


def stitch(arguments: argparse.Namespace) -> Report:
    from ..engine.crop import UNCHANGED
    from ..engine.crop_record import load
    from ..engine.crop_stitch import stitch_crops
    from ..engine.files import check_outputs, read_bits, read_image
    from ..engine.stitch import StitchOptions

    options = StitchOptions(**given(arguments, StitchOptions))
    inputs = [arguments.image, *arguments.crops]
    check_outputs([arguments.out], inputs=inputs, force=arguments.force)
    record = load(arguments.record)
    image, crops = read_image(arguments.image), [read_image(file) for file in arguments.crops]
    rounding = 0.5 / (2 ** min(map(read_bits, arguments.crops)) - 1)  # of the crops in their files
    with clock("stitch") as timings:
        stitched = stitch_crops(record, crops, image, options, unchanged=rounding + UNCHANGED)
    with clock("write", timings):
        write(arguments, arguments.out, stitched.images, made_by(arguments), inputs)
    return {
        "files": [str(arguments.out)],
        "report": list(stitched.reports),
        "notices": list(record.notices(image)),
        "timings": rounded(timings),
    }


def _show(report: Report) -> str:
    return "\n".join([show_files(report), *report["report"]])
