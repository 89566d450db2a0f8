"""Line coverage of what the pack does in ComfyUI's own processes, when pytest measures coverage here.

ComfyUI's Python need not have the coverage package: it borrows this one's, by a folder on PYTHONPATH whose
sitecustomize starts it. Each process leaves a data file beside pytest-cov's own, which combines them at the end.
"""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path

from conftest import ROOT

SETTINGS = f"""
[run]
source =
    {ROOT / "engine"}
    {ROOT / "nodes"}
data_file = {ROOT / ".coverage"}
parallel = true
"""


def environment() -> dict[str, str]:
    """What a child process needs in its environment; nothing where coverage is not being measured."""
    try:
        import coverage
    except ImportError:
        return {}
    if coverage.Coverage.current() is None:
        return {}
    folder = _borrowed(Path(coverage.__file__).parent)
    inherited = os.environ.get("PYTHONPATH")
    path = f"{folder}{os.pathsep}{inherited}" if inherited else str(folder)
    return {"PYTHONPATH": path, "COVERAGE_PROCESS_START": str(folder / "coveragerc")}


@cache
def _borrowed(package: Path) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="mend-coverage-"))
    (folder / "coverage").symlink_to(package, target_is_directory=True)
    (folder / "coveragerc").write_text(SETTINGS)
    (folder / "sitecustomize.py").write_text("import coverage\n\ncoverage.process_startup()\n")
    return folder
