"""A real ComfyUI for the tests: find one, give it the pack's requirements, start it, talk to it."""

from __future__ import annotations

import configparser
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib import error, parse, request

import coverage_inside
from conftest import ROOT

HERE = Path(__file__).resolve().parent
PACK_FOLDER = "comfyui-mend"
HOW_TO_GET_ONE = "install one with `comfy install`, or set COMFYUI_PATH to its folder"
START_SECONDS = 180
STOP_SECONDS = 30


@dataclass(frozen=True)
class Workspace:
    """A ComfyUI folder and the interpreter it runs with."""

    path: Path
    python: Path
    version: str


def find_workspace() -> Workspace | None:
    """COMFYUI_PATH, else comfy-cli's workspace, else where comfy-cli would install one."""
    named = os.environ.get("COMFYUI_PATH")
    if named:
        if not _is_comfyui(Path(named).expanduser()):
            raise FileNotFoundError(
                f"COMFYUI_PATH is {named}, which has no main.py and comfyui_version.py of a ComfyUI."
            )
        return _workspace(Path(named).expanduser())
    found = next((path for path in _comfy_cli_workspaces() if _is_comfyui(path)), None)
    return _workspace(found) if found else None


def _comfy_cli_workspaces() -> Iterator[Path]:
    home = Path.home()
    if sys.platform == "win32":
        settings, usual = home / "AppData" / "Local" / "comfy-cli", home / "Documents" / "comfy" / "ComfyUI"
    elif sys.platform == "darwin":
        settings = home / "Library" / "Application Support" / "comfy-cli"
        usual = home / "Documents" / "comfy" / "ComfyUI"
    else:
        settings, usual = home / ".config" / "comfy-cli", home / "comfy" / "ComfyUI"
    config = configparser.ConfigParser(interpolation=None)
    config.read(settings / "config.ini")
    for key in ("default_workspace", "recent_workspace"):
        value = config.defaults().get(key)
        if value:
            yield Path(value)
    yield usual
    yield home / "comfy" / "ComfyUI"


def _is_comfyui(path: Path) -> bool:
    return (path / "main.py").is_file() and (path / "comfyui_version.py").is_file()


def _workspace(path: Path) -> Workspace:
    interpreters = [path / venv / part for venv in (".venv", "venv") for part in ("bin/python", "Scripts/python.exe")]
    python = next((p for p in interpreters if p.exists()), Path(sys.executable))
    version = re.search(r'__version__ = "(.+)"', (path / "comfyui_version.py").read_text())
    return Workspace(path.absolute(), python, version.group(1) if version else "unknown")


def ensure_requirements(workspace: Workspace) -> None:
    """Install requirements.txt as ComfyUI Manager does, with the workspace's own pip; its torch stays."""
    from filelock import FileLock

    requirements = ROOT / "requirements.txt"
    lock = Path(tempfile.gettempdir()) / f"mend-requirements-{uuid.uuid5(uuid.NAMESPACE_URL, str(workspace.path))}.lock"
    with FileLock(lock):
        if _inside(workspace, MISSING_REQUIREMENTS, str(requirements)):
            with tempfile.TemporaryDirectory() as folder:
                constraints = Path(folder) / "constraints.txt"
                constraints.write_text(_inside(workspace, "import torch; print('torch==' + torch.__version__)"))
                subprocess.run(
                    [workspace.python, "-m", "pip", "install", "-q", "-r", requirements, "-c", constraints], check=True
                )


MISSING_REQUIREMENTS = """
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
    command = [workspace.python, "-c", code, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def run_inside(workspace: Workspace, script: str | Path, *arguments: object, timeout: float = 300) -> object:
    """Run a script of this folder with the workspace's Python; its last line on stdout is its answer, in JSON.

    The script calls inside.boot() first.
    """
    environment = {**os.environ, **coverage_inside.environment(), "COMFYUI_PATH": str(workspace.path)}
    script = HERE / script
    done = subprocess.run(
        [workspace.python, script, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if done.returncode != 0:
        raise AssertionError(f"{script.name} {arguments} in ComfyUI {workspace.version} failed:\n{done.stderr[-6000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def install_pack(custom_nodes: Path) -> Path:
    """The pack in a custom_nodes folder: a link, or on a system without links a copy."""
    target = custom_nodes / PACK_FOLDER
    try:
        target.symlink_to(ROOT, target_is_directory=True)
    except OSError:
        shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(".*", "tests", "demo-output", "__pycache__"))
    return target


class Server:
    """A ComfyUI server on a free port with the pack and nothing else, its folders under ``base``.

    >>> with Server(workspace, base) as server, server.client() as client:
    ...     run = client.run(prompt)
    """

    def __init__(self, workspace: Workspace, base: Path, arguments: tuple[str, ...] = (), *, link: bool = True) -> None:
        self.workspace = workspace
        self.base = base
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_file = base / "server.log"
        for folder in ("models", "custom_nodes", "input", "output", "user", "temp"):
            (base / folder).mkdir(parents=True, exist_ok=True)
        if link:
            install_pack(base / "custom_nodes")
        # every flag is known to ComfyUI 0.16 and later
        self._command = [
            workspace.python, "main.py", "--cpu", "--port", str(self.port), "--base-directory", base,
            "--disable-all-custom-nodes", "--whitelist-custom-nodes", PACK_FOLDER, "--disable-api-nodes",
            "--database-url", f"sqlite:///{base / 'user' / 'comfyui.db'}",
            "--disable-auto-launch", "--preview-method", "latent2rgb", *arguments,
        ]  # fmt: skip

    @property
    def log(self) -> str:
        return self.log_file.read_text(errors="replace")

    def client(self) -> Client:
        return Client(self.url)

    def __enter__(self) -> Server:
        group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if sys.platform == "win32" else {}
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=self.workspace.path,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **coverage_inside.environment(), "PYTHONUNBUFFERED": "1"},
                **group,
            )
        try:
            self._wait_until_ready()
        except BaseException:
            self._process.kill()
            self._process.wait()
            raise
        return self

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise AssertionError(f"ComfyUI ended with {self._process.returncode} at start:\n{self.log[-6000:]}")
            try:
                _fetch(f"{self.url}/object_info", timeout=30)
            except (error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.25)
            else:
                return
        raise AssertionError(f"ComfyUI did not answer within {START_SECONDS} s:\n{self.log[-6000:]}")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        code = self.stop()
        if kind is None:
            assert code == 0, f"ComfyUI ended with {code}:\n{self.log[-6000:]}"

    def stop(self) -> int:
        """Ctrl-C, as a person would; the exit code. A server that does not listen is killed."""
        if self._process.poll() is None:
            self._process.send_signal(signal.CTRL_BREAK_EVENT if sys.platform == "win32" else signal.SIGINT)
        try:
            return self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _fetch(url: str, data: bytes | None = None, headers: dict[str, str] | None = None, timeout: float = 60) -> bytes:
    with request.urlopen(request.Request(url, data, headers or {}), timeout=timeout) as answer:
        return answer.read()


class PromptRejectedError(Exception):
    """POST /prompt said no; ``answer`` is its JSON."""

    def __init__(self, answer: dict) -> None:
        super().__init__(json.dumps(answer))
        self.answer = answer


@dataclass(frozen=True)
class Event:
    """One websocket message; ``data`` is JSON, or the bytes of a preview image."""

    type: str
    data: dict | bytes


@dataclass
class Run:
    """What one prompt left behind."""

    prompt_id: str
    events: list[Event] = field(default_factory=list)
    outputs: dict[str, dict] = field(default_factory=dict)
    """By node id, from /history: {"images": [{"filename", "subfolder", "type"}], "text": [...]}."""
    status: str = "running"
    """"success", "error" or "interrupted"."""

    @property
    def progress(self) -> list[tuple[int, int]]:
        """(value, max) of the progress events."""
        return [(e.data["value"], e.data["max"]) for e in self.events if e.type == "progress"]

    @property
    def previews(self) -> list[bytes]:
        """Encoded images, JPEG here."""
        return [e.data for e in self.events if e.type == "preview"]

    @property
    def error(self) -> dict | None:
        """The execution_error event: exception_message, exception_type, node_id, traceback."""
        return next((e.data for e in self.events if e.type == "execution_error"), None)

    @property
    def images(self) -> list[dict]:
        return [image for output in self.outputs.values() for image in output.get("images", [])]


class Client:
    """ComfyUI's HTTP and websocket interface, as a browser uses it."""

    def __init__(self, url: str) -> None:
        from websocket import create_connection

        self.url = url
        self.id = str(uuid.uuid4())
        self._socket = create_connection(f"{url.replace('http', 'ws', 1)}/ws?clientId={self.id}")
        self._socket.send(json.dumps({"type": "feature_flags", "data": {"supports_preview_metadata": True}}))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def get(self, path: str) -> object:
        return json.loads(_fetch(self.url + path))

    def post(self, path: str, body: dict) -> object:
        """The JSON that came back, or None for an empty answer."""
        answer = _fetch(self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        return json.loads(answer) if answer else None

    def object_info(self) -> dict:
        return self.get("/object_info")

    def queue(self, prompt: dict) -> str:
        """Queue a prompt in API format and return its id; PromptRejectedError when validation fails."""
        try:
            return self.post("/prompt", {"prompt": prompt, "client_id": self.id})["prompt_id"]
        except error.HTTPError as refusal:
            raise PromptRejectedError(json.loads(refusal.read())) from refusal

    def wait(self, prompt_id: str, on_event: Callable[[Event], None] | None = None, timeout: float = 120) -> Run:
        """Collect events until the prompt ends; ``on_event`` sees each as it comes, to interrupt for example."""
        run = Run(prompt_id)
        endings = {
            "execution_success": "success",
            "execution_error": "error",
            "execution_interrupted": "interrupted",
        }
        deadline = time.monotonic() + timeout
        while run.status == "running":
            event = self._receive(deadline)
            if isinstance(event.data, dict) and event.data.get("prompt_id", prompt_id) != prompt_id:
                continue
            run.events.append(event)
            if on_event:
                on_event(event)
            run.status = endings.get(event.type, run.status)
        # history is written just after the last event
        while not (history := self.get(f"/history/{prompt_id}")):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{prompt_id} ended but is not in /history")
            time.sleep(0.05)
        run.outputs = history[prompt_id]["outputs"]
        return run

    def run(self, prompt: dict, timeout: float = 120) -> Run:
        return self.wait(self.queue(prompt), timeout=timeout)

    def _receive(self, deadline: float) -> Event:
        self._socket.settimeout(max(0.1, deadline - time.monotonic()))
        message = self._socket.recv()
        if isinstance(message, str):
            content = json.loads(message)
            return Event(content["type"], content["data"])
        kind, second = struct.unpack(">II", message[:8])
        # 1: an image after its format; 4: metadata of the length given, then the image
        start = {1: 8, 4: 8 + second}.get(kind)
        return Event("binary" if start is None else "preview", message[start or 0 :])

    def interrupt(self, prompt_id: str | None = None) -> None:
        self.post("/interrupt", {"prompt_id": prompt_id} if prompt_id else {})

    def free(self) -> None:
        """Unload all models and drop the cache of results; happens in the worker soon after."""
        self.post("/free", {"unload_models": True, "free_memory": True})

    def upload_image(self, name: str, content: bytes) -> str:
        """Into the input folder, replacing what is there; the name LoadImage knows it by."""
        boundary = uuid.uuid4().hex
        lines = [
            f"--{boundary}",
            f'Content-Disposition: form-data; name="image"; filename="{name}"',
            "Content-Type: application/octet-stream",
            "",
            "",
        ]
        overwrite = (
            f'\r\n--{boundary}\r\nContent-Disposition: form-data; name="overwrite"\r\n\r\ntrue\r\n--{boundary}--\r\n'
        )
        body = "\r\n".join(lines).encode() + content + overwrite.encode()
        headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
        return json.loads(_fetch(f"{self.url}/upload/image", body, headers))["name"]

    def image(self, reference: dict) -> bytes:
        """The file behind {"filename", "subfolder", "type"}."""
        return _fetch(f"{self.url}/view?{parse.urlencode(reference)}")
