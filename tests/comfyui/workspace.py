"""A real ComfyUI for the tests: give it the pack's requirements, start it, talk to it as a browser does."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from urllib import error, parse, request

import coverage_inside
from comfyui_mend import comfy_workspace
from comfyui_mend.comfy_workspace import PACK_FOLDER, Workspace, find_workspace

__all__ = ["PACK_FOLDER", "Client", "Event", "Run", "Server", "Workspace", "find_workspace", "run_inside"]

HERE = Path(__file__).resolve().parent
HOW_TO_GET_ONE = "install one with `comfy install`, or set COMFYUI_PATH to its folder"


def documented_nodes() -> list[str]:
    """Every node has a help page, and every help page a node."""
    return sorted(page.stem for page in (comfy_workspace.ROOT / "web" / "docs").glob("Mend*.md"))


def ensure_requirements(workspace: Workspace) -> None:
    """What ComfyUI Manager does when it installs the pack, once."""
    from filelock import FileLock

    lock = Path(tempfile.gettempdir()) / f"mend-requirements-{uuid.uuid5(uuid.NAMESPACE_URL, str(workspace.path))}.lock"
    with FileLock(lock):
        if comfy_workspace.missing_requirements(workspace):
            comfy_workspace.install_requirements(workspace)


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


class Server(comfy_workspace.Server):
    """A server on the CPU, with previews; its coverage counts, and it must end as cleanly as it started.

    >>> with Server(workspace, base) as server, server.client() as client:
    ...     run = client.run(prompt)
    """

    def __init__(self, workspace: Workspace, base: Path, arguments: tuple[str, ...] = (), **options: object) -> None:
        options["environment"] = {**coverage_inside.environment(), **options.get("environment", {})}
        super().__init__(workspace, base, ("--cpu", "--preview-method", "latent2rgb", *arguments), **options)

    def client(self) -> Client:
        return Client(self.url)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        code = self.stop()
        if kind is None:
            assert code == 0, f"ComfyUI ended with {code}:\n{self.log[-6000:]}"


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
