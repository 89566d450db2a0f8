"""Mend's pixels beside those of every peer that is installed: exact figures and speeds, measured in one run.

python benchmarks/pixels.py [--custom-nodes DIR]... [--only T8,T9] [--quick] [--json FILE]

The peers are ComfyUI's own nodes and the packs that benchmarks/peers/ has adapters for, taken from the custom_nodes of
the ComfyUI that is found (COMFYUI_PATH, else comfy-cli's workspace) and from the folders named. All run in one process
of ComfyUI's Python, on one thread, their timings (in CPU seconds) interleaved. OpenCV is lent to it where it has none
of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from comfyui_mend.benchmarks.table import Row, draw
from comfyui_mend.comfy_workspace import Workspace, find_workspace

HERE = Path(__file__).resolve().parent
PHOTOS = ("coffee", "cat", "rocket", "brick")
"""CC0 photographs of scikit-image."""
CASES = tuple(f"T{number}" for number in range(1, 17))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--custom-nodes", action="append", default=[], type=Path, metavar="DIR", help="more packs")
    parser.add_argument("--only", default=",".join(CASES), help="cases, for example T8,T9")
    parser.add_argument("--quick", action="store_true", help="pictures a quarter as wide and high")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    options = parser.parse_args(arguments)
    only = [case.strip().upper() for case in options.only.split(",")]
    if unknown := [case for case in only if case not in CASES]:
        parser.error(f"no case is called {', '.join(unknown)}; there are {CASES[0]} to {CASES[-1]}")
    workspace = find_workspace()
    with tempfile.TemporaryDirectory(prefix="mend-pixels-") as folder:
        answer = measure(workspace, Path(folder), only, options.custom_nodes, quick=options.quick)
    rows = [
        Row(**{key: value for key, value in row.items() if key not in ("best_peer", "verdict")})
        for row in answer["rows"]
    ]
    where = f"ComfyUI {workspace.version}" if workspace else "no ComfyUI found: Mend alone (set COMFYUI_PATH)"
    print(f"{where}; on the CPU, one thread\n")
    print(draw(rows, answer["contestants"]))
    for name in answer["not_found"]:
        print(f"\n{name}: not found")
    missed = [row for row in rows if not row.good]
    print(f"\n{len(rows) - len(missed)} of {len(rows)} figures reach their goal and are no worse than the best peer's.")
    for row in missed:
        print(f"  {row.case} {row.what}: {row.verdict}")
    if options.json:
        options.json.write_text(json.dumps(answer, indent=1))
    return 0


def measure(workspace: Workspace | None, folder: Path, only: list[str], packs: list[Path], *, quick: bool) -> dict:
    """What pixels_inside.py answers."""
    folders = [*packs, *([workspace.path / "custom_nodes"] if workspace else [])]
    order = {
        "only": only,
        "quick": quick,
        "folders": [str(path.resolve()) for path in folders],
        "photos": _save_photos(folder / "photos.npz"),
        "out": str(folder / "rows.json"),
    }
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    environment.pop("COMFYUI_PATH", None)
    python = Path(sys.executable)
    if workspace is not None:
        environment["COMFYUI_PATH"] = str(workspace.path)
        python = workspace.python
        lent = _lend_opencv(folder / "lent", python)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [lent, os.environ.get("PYTHONPATH")]))
    done = subprocess.run([python, HERE / "pixels_inside.py", json.dumps(order)], env=environment, stdout=sys.stderr)
    if done.returncode != 0:
        sys.exit(f"The cases stopped with exit code {done.returncode}; what happened is above.")
    return json.loads(Path(order["out"]).read_text())


def _save_photos(path: Path) -> str | None:
    try:
        import numpy as np
        from skimage import data
    except ImportError:
        return None
    photos = {name: getattr(data, name)() for name in PHOTOS}
    np.savez(path, **{name: p if p.ndim == 3 else np.repeat(p[..., None], 3, axis=-1) for name, p in photos.items()})
    return str(path)


def _lend_opencv(folder: Path, python: Path) -> str | None:
    """A folder with this Python's OpenCV for one of the same version that has none."""
    try:
        import cv2
    except ImportError:
        return None
    probe = "import sys, importlib.util as u; print(sys.version_info[:2], u.find_spec('cv2') is None)"
    told = subprocess.run([python, "-c", probe], check=True, capture_output=True, text=True).stdout.strip()
    if told != f"{sys.version_info[:2]} True":
        return None
    package = Path(cv2.__file__).resolve().parent
    folder.mkdir()
    for entry in [package, *package.parent.glob("opencv*.libs")]:
        (folder / entry.name).symlink_to(entry, target_is_directory=True)
    return str(folder)


if __name__ == "__main__":
    sys.exit(main())
