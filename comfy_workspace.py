"""A ComfyUI on this machine: where it is, a private server of it with this pack inside, and a client for its API.

Only the standard library, so that the command line can look for a workspace's models at once. The server gets a folder
of its own for custom nodes, inputs, outputs and settings; all that may change in the workspace is that its Python gets
the pack's requirements.
"""

from __future__ import annotations

import configparser
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

ROOT = Path(__file__).resolve().parent
PACK_FOLDER = "comfyui-mend"
MARKERS = ("main.py", "nodes.py", "comfy", "comfy_extras")
START_SECONDS = 180
STOP_SECONDS = 30
# Windows can only signal a group of processes
_NEW_GROUP: int = getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0)
_STOP_SIGNAL: int = getattr(signal, "CTRL_BREAK_EVENT", signal.SIGINT)


class ServerError(Exception):
    """The server did not start, refused a workflow or failed at running it; the message says which and why."""


@dataclass(frozen=True)
class Workspace:
    """A ComfyUI folder and the interpreter it runs with."""

    path: Path
    python: Path
    version: str


def find_workspace() -> Workspace | None:
    """The ComfyUI of COMFYUI_PATH, else comfy-cli's default or most recent workspace, else where it installs.

    A COMFYUI_PATH that is set is final: empty, or naming no ComfyUI, means there is none.
    """
    if "COMFYUI_PATH" in os.environ:
        named = os.environ["COMFYUI_PATH"]
        return _as_workspace(Path(named).expanduser()) if named else None
    candidates = [*_configured_workspaces(), Path.home() / "comfy" / "ComfyUI"]
    if sys.platform in ("win32", "darwin"):
        candidates.append(Path.home() / "Documents" / "comfy" / "ComfyUI")
    return next(filter(None, map(_as_workspace, candidates)), None)


def _as_workspace(folder: Path) -> Workspace | None:
    if not all((folder / marker).exists() for marker in MARKERS):
        return None
    folder = folder.resolve()
    return Workspace(folder, _python_of(folder), _version_of(folder))


def _configured_workspaces() -> list[Path]:
    """comfy-cli's own settings, in its order of preference."""
    home = Path.home()
    folder = {
        "win32": home / "AppData" / "Local" / "comfy-cli",
        "darwin": home / "Library" / "Application Support" / "comfy-cli",
    }.get(sys.platform, home / ".config" / "comfy-cli")
    settings = configparser.ConfigParser()
    with contextlib.suppress(configparser.Error, UnicodeDecodeError):
        settings.read(folder / "config.ini", encoding="utf-8")
    values = (settings["DEFAULT"].get(key, "") for key in ("default_workspace", "recent_workspace"))
    return [Path(value) for value in values if value]


def _version_of(folder: Path) -> str:
    """As in comfyui_version.py."""
    try:
        text = (folder / "comfyui_version.py").read_text()
    except OSError:
        return "of unknown version"
    found = re.search(r'__version__ = "(.+)"', text)
    return found.group(1) if found else "of unknown version"


def _python_of(folder: Path) -> Path:
    """The interpreter that has ComfyUI's requirements: its own environment's, else this one."""
    for environment in (".venv", "venv"):
        for name in ("bin/python", "Scripts/python.exe"):
            if (folder / environment / name).exists():
                return folder / environment / name
    return Path(sys.executable)


def missing_requirements(workspace: Workspace) -> list[str]:
    """The lines of the pack's requirements.txt that ComfyUI's Python does not meet."""
    return _inside(workspace, _MISSING, str(ROOT / "requirements.txt")).splitlines()


def install_requirements(workspace: Workspace) -> None:
    """Install requirements.txt with ComfyUI's own pip, as ComfyUI Manager does; its torch stays what it is."""
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text(_inside(workspace, "import torch; print('torch==' + torch.__version__)"))
        install: list[str | Path] = [workspace.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        done = subprocess.run(
            [*install, "--requirement", ROOT / "requirements.txt", "--constraint", constraints],
            capture_output=True,
            text=True,
        )
    if done.returncode != 0:
        raise ServerError(f"The requirements could not be installed into {workspace.path}:\n{done.stderr[-2000:]}")


_MISSING = """
import sys
from importlib import metadata
from packaging.requirements import Requirement

for line in open(sys.argv[1]):
    requirement = Requirement(line.strip())
    if requirement.marker and not requirement.marker.evaluate():
        continue
    try:
        if metadata.version(requirement.name) in requirement.specifier:
            continue
    except metadata.PackageNotFoundError:
        pass
    print(requirement)
"""


def _inside(workspace: Workspace, code: str, *arguments: str) -> str:
    command: list[str | Path] = [workspace.python, "-c", code, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout.strip()


@dataclass
class Server:
    """A ComfyUI server with this pack as its only custom node, for as long as the ``with`` block lasts.

    ``base`` becomes its base directory (custom_nodes, input, output, models, temp, user).
    """

    workspace: Workspace
    base: Path
    arguments: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    """Added to this process's."""
    link: bool = True
    """Put this checkout into custom_nodes; else whatever lies there already is the pack."""
    port: int = field(default_factory=lambda: _free_port())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.base / "server.log").read_text(errors="replace")

    def __enter__(self) -> Self:
        for name in ("custom_nodes", "input", "output", "models", "temp", "user"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        if self.link:
            _install_pack(self.base / "custom_nodes")
        with (self.base / "server.log").open("wb") as log:
            self._process = subprocess.Popen(
                self._command(),
                cwd=self.workspace.path,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **self.environment},
                creationflags=_NEW_GROUP,
                preexec_fn=_heed_interrupts if os.name == "posix" else None,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _command(self) -> list[str | Path]:
        # every flag is known to ComfyUI 0.16 and later; threads of the oldest do not share a database in memory
        return [
            *(self.workspace.python, self.workspace.path / "main.py"),
            *("--listen", "127.0.0.1", "--port", str(self.port)),
            *("--base-directory", self.base, "--database-url", f"sqlite:///{self.base / 'comfyui.db'}"),
            *("--disable-all-custom-nodes", "--whitelist-custom-nodes", PACK_FOLDER),
            *("--disable-api-nodes", "--disable-auto-launch"),
            *([] if _has_accelerator(self.workspace) else ["--cpu"]),
            *self.arguments,
        ]

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ServerError(f"ComfyUI stopped while starting:\n{self.log[-6000:]}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/object_info", timeout=30):
                return
            time.sleep(0.2)
        raise ServerError(f"ComfyUI did not answer within {START_SECONDS} s:\n{self.log[-6000:]}")

    def stop(self) -> int:
        """Ctrl-C, as a person would; the exit code. A server that does not listen is killed."""
        if self._process.poll() is None:
            self._process.send_signal(_STOP_SIGNAL)
        try:
            return self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def _heed_interrupts() -> None:
    """The background jobs of a script ignore Ctrl-C, and so would a server they start, which is stopped by it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _install_pack(custom_nodes: Path) -> None:
    """The pack in a custom_nodes folder: a link, or on a system without links a copy."""
    target = custom_nodes / PACK_FOLDER
    try:
        target.symlink_to(ROOT, target_is_directory=True)
    except OSError:
        left_out = shutil.ignore_patterns(".*", "tests", "demo-output", "sheet-output", "__pycache__")
        shutil.copytree(ROOT, target, ignore=left_out)


@dataclass(frozen=True)
class Client:
    """ComfyUI's HTTP API, as far as queueing a workflow and fetching its pictures needs it."""

    url: str

    def run(self, workflow: Mapping[str, Any], timeout: float = 600.0) -> dict[str, Any]:
        """Queue ``workflow`` (API format), wait for it, and return its outputs by node id."""
        prompt_id = str(uuid.uuid4())
        self.post("/prompt", {"prompt": workflow, "prompt_id": prompt_id})
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            if entry is not None:
                return _outputs(entry)
            time.sleep(0.1)
        raise ServerError(f"The workflow did not finish within {timeout:.0f} s.")

    def picture(self, reference: Mapping[str, str]) -> bytes:
        """The file behind one entry of an output's ``images``."""
        with urllib.request.urlopen(f"{self.url}/view?{urllib.parse.urlencode(reference)}", timeout=60) as reply:
            return reply.read()

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=60) as reply:
            return json.load(reply)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.loads(reply.read() or b"null")
        except urllib.error.HTTPError as error:
            raise ServerError(f"ComfyUI refused {path}: {error.read().decode(errors='replace')}") from error


def _outputs(entry: Mapping[str, Any]) -> dict[str, Any]:
    status = entry.get("status", {})
    if status.get("status_str") != "success":
        errors = [data for kind, data in status.get("messages", []) if kind == "execution_error"]
        said = "; ".join(f"{e.get('node_type')}: {e.get('exception_message', '').strip()}" for e in errors)
        raise ServerError(f"The workflow failed: {said or status}")
    return dict(entry["outputs"])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _has_accelerator(workspace: Workspace) -> bool:
    probe = "import torch as t; print(t.cuda.is_available() or t.backends.mps.is_available() or t.xpu.is_available())"
    return _inside(workspace, probe) == "True"
