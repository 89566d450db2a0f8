"""mend compare: what an edit changed, as figures and as an exit code."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from .common import Commands, Report, add_mask_channel, clock, command, rounded

UNCHECKED = "off"
EXAMPLES = """\
examples:
  mend compare before.png after.png mask.png                            # is all outside the mask untouched?
  mend compare before.png after.png mask.png --json --max-seam 1.5 --max-ring-delta-e 4
  mend compare before.jpg after.jpg mask.png --max-outside 0.05 --heatmap diff.png
  mend compare photo.png wide.png padded-mask.png --offset 128,0        # outpainted: 128 pixels were added at the left

Exit code: 0 all within the limits, 1 a limit is exceeded or the files cannot be compared, 2 wrong usage."""


def add(commands: Commands) -> None:
    parser = command(commands, "compare", "BEFORE AFTER MASK", "measure what an edit did to a picture", EXAMPLES)
    parser.set_defaults(command=run, show=show_figures)
    parser.add_argument("before", metavar="BEFORE", type=Path, help="the picture before the edit")
    parser.add_argument("after", metavar="AFTER", type=Path, help="the result")
    parser.add_argument("mask", metavar="MASK", type=Path, help="white = repainted, black = to be kept")
    add_mask_channel(parser)
    parser.add_argument(
        "--offset", type=_offset, metavar="X,Y", help="where BEFORE lies in a larger, outpainted AFTER, in pixels"
    )
    parser.add_argument("--heatmap", metavar="FILE", type=Path, help="write a picture of the differences")
    parser.add_argument("--force", action="store_true", help="replace an existing heat-map")
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-outside",
        type=_limit,
        default=0.0,
        metavar="X",
        help="0..1: largest change of a channel outside the mask, or off (default: 0, not one bit; 0.004 is one level)",
    )
    for flag, what in (
        ("--max-seam", "contrast on the mask's contour over that beside it; 1 is invisible"),
        ("--max-ring-delta-e", "colour step across the contour, CIEDE2000; 1 can just be seen"),
        ("--max-shift", "pixels by which what is outside the mask moved"),
        ("--min-grain", "grain inside the mask over that around it, at least"),
        ("--max-grain", "the same, at most"),
    ):
        limits.add_argument(flag, type=_limit, metavar="X", help=what)


def run(arguments: argparse.Namespace) -> Report:
    from ..engine.compare import Limits, Offset, compare
    from ..engine.files import MaskChannel, check_outputs, read_image, read_mask, write_image
    from ..engine.heatmap import heatmaps

    limits = Limits(
        outside=arguments.max_outside,
        seam=arguments.max_seam,
        ring=arguments.max_ring_delta_e,
        shift=arguments.max_shift,
        grain_low=arguments.min_grain,
        grain_high=arguments.max_grain,
    )
    inputs = [arguments.before, arguments.after, arguments.mask]
    if arguments.heatmap:
        check_outputs([arguments.heatmap], inputs=inputs, force=arguments.force)
    with clock("read") as timings:
        before, after = read_image(arguments.before), read_image(arguments.after)
        mask = read_mask(arguments.mask, MaskChannel(arguments.mask_channel))
    offset = Offset(*arguments.offset) if arguments.offset else None
    with clock("compare", timings):
        comparison = compare(before, after, mask, limits, offset=offset)
    report = {**comparison.report(), "summary": str(comparison)}
    if arguments.heatmap:
        with clock("heatmap", timings):
            picture = heatmaps(before, after, mask, comparison, offset=offset)
            write_image(arguments.heatmap, picture, force=arguments.force)
        report["heatmap"] = str(arguments.heatmap)
    return {**report, "timings": rounded(timings)}


def show_figures(report: Report) -> str:
    lines = [report["summary"], "passed" if report["passed"] else "FAILED"]
    return "\n".join([*lines, *([report["heatmap"]] if "heatmap" in report else [])])


def _limit(text: str) -> float | None:
    if text == UNCHECKED:
        return None
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is neither a number nor {UNCHECKED}") from None


def _offset(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+),(\d+)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text} is not two numbers of pixels such as 128,0")
    return int(found[1]), int(found[2])
