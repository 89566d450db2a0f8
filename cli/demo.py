"""mend demo: the main job on real photographs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .common import Commands, Report, add_machine, command, local_host

EXAMPLES = """\
Runs the main job on real photographs, in ComfyUI when one is found (COMFYUI_PATH, else comfy-cli's workspace) and by
the engine alone otherwise, and leaves before, mask and after pictures and one contact sheet. Needs scikit-image, whose
photographs it uses."""


def add(commands: Commands) -> None:
    parser = command(commands, "demo", "", "show the main job on real photographs", EXAMPLES)
    parser.set_defaults(command=run, show=show_demo)
    parser.add_argument("--out", type=Path, default=Path("demo-output"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--engine-only", action="store_true", help="do not use ComfyUI even if there is one")
    add_machine(parser)


def run(arguments: argparse.Namespace) -> Report:
    from .. import demo

    host = local_host(arguments)
    say = (lambda line: print(line, file=sys.stderr)) if arguments.json else print
    return demo.run(arguments.out, host, say=say, engine_only=arguments.engine_only)


def show_demo(report: Report) -> str:
    return f"Look at {report['sheet']}"
