"""Fixtures of the tests that need a real ComfyUI; without one they are skipped, loudly."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
if str(HERE) not in sys.path:
    # for `from workspace import ...`; the repository's root must never be there: its nodes/ would hide ComfyUI's
    sys.path.append(str(HERE))

from workspace import HOW_TO_GET_ONE, Server, Workspace, ensure_requirements, find_workspace  # noqa: E402

FOUND = pytest.StashKey[Workspace]()


def pytest_collection_modifyitems(items):
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.comfyui)


@pytest.fixture(scope="session")
def workspace(pytestconfig) -> Workspace:
    found = find_workspace()
    if found is None:
        pytest.skip(f"no ComfyUI found; {HOW_TO_GET_ONE}")
    ensure_requirements(found)
    pytestconfig.stash[FOUND] = found
    return found


@pytest.fixture(scope="session")
def server(workspace, tmp_path_factory):
    with Server(workspace, tmp_path_factory.mktemp("comfyui")) as running:
        yield running


@pytest.fixture
def client(server):
    with server.client() as connected:
        yield connected


def pytest_terminal_summary(terminalreporter, config):
    def count(outcome):
        reports = terminalreporter.stats.get(outcome, [])
        return sum("comfyui" in report.keywords and report.when != "teardown" for report in reports)

    ran, skipped = count("passed") + count("failed"), count("skipped")
    found = config.stash.get(FOUND, None)
    if found:
        terminalreporter.write_line(
            f"ComfyUI tests: {ran} ran against ComfyUI {found.version} at {found.path}", green=True
        )
    elif skipped:
        terminalreporter.write_line(
            f"ComfyUI tests: {skipped} SKIPPED, NO COMFYUI FOUND; {HOW_TO_GET_ONE}.", red=True, bold=True
        )
