"""The command line: files and flags -> one engine request -> files.

Only the standard library is imported up here, so that help and usage errors come at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from . import check, color, compare, crop, demo, fill, mask, models, outpaint, paint
from .common import CommandError, CommandParser, Parser, Report, UsageError, help_formatter, version

COMMANDS = (paint, outpaint, fill, mask, crop, color, compare, check, models, demo)
EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130

EXAMPLES = """\
examples:
  mend inpaint room.jpg mask.png -p "a green armchair" -o chair.png
  mend fill photo.jpg mask.png -o clean.png                 # remove something; no model needed
  mend outpaint photo.jpg --left 128 --right 128 -p "a wide beach" -o wide.png
  mend models pull stable-diffusion-v1-5/stable-diffusion-inpainting

In a mask, white is what may change. Every pixel where it is black is kept bit for bit.
`mend COMMAND --help` explains one command."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 a MendError or limit, 2 wrong usage, 130 Ctrl-C."""
    argv = sys.argv[1:] if argv is None else list(argv)
    as_json = "--json" in argv
    try:
        arguments = build_parser().parse_args(argv)
        report = _run(arguments)
    except UsageError as error:
        return _fail(str(error), as_json, EXIT_USAGE)
    except CommandError as error:
        return _fail(str(error), as_json, EXIT_ERROR)
    except KeyboardInterrupt:
        return _fail("interrupted", as_json, EXIT_INTERRUPTED)
    except Exception as error:
        if as_json:  # a bug: the caller still gets its object, and the traceback goes to stderr
            print(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        raise
    _print(json.dumps(report) if as_json else arguments.show(report))
    return 0 if report.get("passed", True) else EXIT_ERROR


def _run(arguments: argparse.Namespace) -> Report:
    # what the libraries log on import and load is not for the person at the terminal
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from ..engine.types import MendError

    try:
        report: Report = arguments.command(arguments)
    except MendError as error:
        raise CommandError(str(error)) from error
    for notice in report.get("notices", ()):
        print(f"mend: note: {notice}", file=sys.stderr)
    return report


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mend",
        description="Change what you masked in a picture, and nothing else.",
        epilog=EXAMPLES,
        formatter_class=help_formatter,
    )
    parser.add_argument("--version", action="version", version=f"mend {version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=CommandParser)
    for module in COMMANDS:
        module.add(commands)
    return parser


def _fail(message: str, as_json: bool, code: int) -> int:
    print(f"mend: {message}", file=sys.stderr)
    if as_json:
        _print(json.dumps({"error": message}))
    return code


def _print(text: str) -> None:
    try:
        print(text, flush=True)
    except BrokenPipeError:  # `mend models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
