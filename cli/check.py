"""mend check: pictures scored for safety."""

from __future__ import annotations

import argparse
from pathlib import Path

from .common import Commands, Report, add_checker, add_machine, clock, command, local_host, rounded

EXAMPLES = """\
examples:
  mend check *.png
  mend check photo.jpg --json | jq '.scores[0]'"""


def add(commands: Commands) -> None:
    parser = command(commands, "check", "IMAGE ...", "score pictures for safety", EXAMPLES)
    parser.set_defaults(command=run, show=show_scores)
    parser.add_argument("images", metavar="IMAGE", nargs="+", type=Path, help="pictures to score, 0 (safe) to 1")
    add_checker(parser.add_argument_group("safety"))
    add_machine(parser)


def run(arguments: argparse.Namespace) -> Report:
    from ..engine.files import read_image
    from ..engine.safety import SafetyAction, check, load_safety_checker

    threshold = arguments.safety_threshold
    with clock("read") as timings:
        pictures = [read_image(path) for path in arguments.images]
    with clock("safety", timings):
        checker = load_safety_checker(arguments.safety_checker, local_host(arguments))
        scores = [
            check(picture, checker, threshold=threshold, action=SafetyAction.PASS).scores[0] for picture in pictures
        ]
    return {
        "files": [str(path) for path in arguments.images],
        "scores": [score.score for score in scores],
        "flagged": [score.flagged for score in scores],
        "threshold": checker.default_threshold if threshold is None else threshold,
        "timings": rounded(timings),
    }


def show_scores(report: Report) -> str:
    return "\n".join(
        f"{score:.3f}  {'FLAGGED' if flagged else 'ok     '}  {file}"
        for file, score, flagged in zip(report["files"], report["scores"], report["flagged"], strict=True)
    )
