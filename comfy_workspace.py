"""A ComfyUI on this machine: where it is, a private server of it with this pack inside, and a client for its API.

Only the standard library, so that the command line can look for a workspace's models at once. Nothing in the
workspace is written to: the server gets a folder of its own for custom nodes, inputs, outputs and settings.
"""

from __future__ import annotations

import configparser
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parent
PACK_FOLDER = "comfyui-mend"
MARKERS = ("main.py", "nodes.py", "comfy", "comfy_extras")


class ServerError(Exception):
    """The server did not start, refused a workflow or failed at running it; the message says which and why."""


def find_workspace() -> Path | None:
    """The ComfyUI folder: COMFYUI_PATH, else comfy-cli's default or most recent workspace, else where it installs.

    A COMFYUI_PATH that is set is final: empty, or naming no ComfyUI, means there is none.
    """
    if "COMFYUI_PATH" in os.environ:
        named = os.environ["COMFYUI_PATH"]
        return _as_workspace(Path(named).expanduser()) if named else None
    candidates = [*_configured_workspaces(), Path.home() / "comfy" / "ComfyUI"]
    if sys.platform in ("win32", "darwin"):
        candidates.append(Path.home() / "Documents" / "comfy" / "ComfyUI")
    return next(filter(None, map(_as_workspace, candidates)), None)


def _as_workspace(folder: Path) -> Path | None:
    return folder.resolve() if all((folder / marker).exists() for marker in MARKERS) else None


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


def version_of(workspace: Path) -> str:
    """As in comfyui_version.py."""
    try:
        text = (workspace / "comfyui_version.py").read_text()
    except OSError:
        return "of unknown version"
    found = re.search(r'__version__ = "(.+)"', text)
    return found.group(1) if found else "of unknown version"


def python_of(workspace: Path) -> Path:
    """The interpreter that has ComfyUI's requirements: its own environment's, else this one."""
    for folder in (".venv", "venv"):
        for name in ("bin/python", "Scripts/python.exe"):
            if (workspace / folder / name).exists():
                return workspace / folder / name
    return Path(sys.executable)


def missing_packages(workspace: Path, modules: Sequence[str]) -> list[str]:
    """Those of ``modules`` that ComfyUI's interpreter cannot find."""
    probe = "import sys; from importlib.util import find_spec; print(*[m for m in sys.argv[1:] if not find_spec(m)])"
    found = subprocess.run(
        [python_of(workspace), "-c", probe, *modules], capture_output=True, text=True, check=True, timeout=60
    )
    return found.stdout.split()


@dataclass
class Server:
    """A ComfyUI server with this pack as its only custom node, for as long as the ``with`` block lasts.

    ``folder`` becomes its base directory (custom_nodes, input, output, models, temp, user).
    """

    workspace: Path
    folder: Path
    model_folders: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    """Where models are, by ComfyUI's names for their kinds, "checkpoints" for example."""
    arguments: Sequence[str] = ()
    start_timeout: float = 180.0
    port: int = field(default=0, init=False)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return (self.folder / "server.log").read_text(errors="replace")

    def __enter__(self) -> Server:
        for name in ("custom_nodes", "input", "output", "models", "temp", "user"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "custom_nodes" / PACK_FOLDER).symlink_to(ROOT, target_is_directory=True)
        # JSON is YAML
        paths = {kind: "\n".join(map(str, folders)) for kind, folders in self.model_folders.items()}
        models = self.folder / "models.yaml"
        models.write_text(json.dumps({"mend": {"base_path": str(self.folder), **paths}}))
        self.port = _free_port()
        with (self.folder / "server.log").open("wb") as log:
            self._process = subprocess.Popen(
                [
                    *(python_of(self.workspace), self.workspace / "main.py"),
                    *("--listen", "127.0.0.1", "--port", str(self.port)),
                    *("--base-directory", self.folder, "--database-url", "sqlite:///:memory:"),
                    *("--disable-all-custom-nodes", "--whitelist-custom-nodes", PACK_FOLDER),
                    *("--extra-model-paths-config", models),
                    *("--disable-api-nodes", "--disable-auto-launch"),
                    *([] if _has_accelerator(self.workspace) else ["--cpu"]),
                    *self.arguments,
                ],
                cwd=self.workspace,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stop()

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self.start_timeout
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ServerError(f"ComfyUI stopped while starting:\n{self.log[-2000:]}")
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://{self.address}/system_stats", timeout=5):
                return
            time.sleep(0.2)
        raise ServerError(f"ComfyUI did not answer within {self.start_timeout:.0f} s:\n{self.log[-2000:]}")

    def _stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@dataclass(frozen=True)
class Client:
    """ComfyUI's HTTP API, as far as queueing a workflow and fetching its pictures needs it."""

    address: str

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
        with urllib.request.urlopen(self._url(f"/view?{urllib.parse.urlencode(reference)}"), timeout=60) as reply:
            return reply.read()

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self._url(path), timeout=60) as reply:
            return json.load(reply)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        request = urllib.request.Request(
            self._url(path), json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                return json.loads(reply.read() or b"null")
        except urllib.error.HTTPError as error:
            raise ServerError(f"ComfyUI refused {path}: {error.read().decode(errors='replace')}") from error

    def _url(self, path: str) -> str:
        return f"http://{self.address}{path}"


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


def _has_accelerator(workspace: Path) -> bool:
    probe = "import torch as t; print(t.cuda.is_available() or t.backends.mps.is_available() or t.xpu.is_available())"
    found = subprocess.run([python_of(workspace), "-c", probe], capture_output=True, text=True, timeout=120)
    return found.stdout.strip() == "True"
