"""A local server that speaks as the Hugging Face hub does; nothing leaves the machine."""

import hashlib
import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tiny import TOKENIZER

COMMIT = "0123456789abcdef0123456789abcdef01234567"
UNET = "unet/diffusion_pytorch_model.safetensors"
NEEDED = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/merges.txt",
    "tokenizer/vocab.json",
    "unet/config.json",
    UNET,
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}


def published_files(folder: Path) -> dict[str, bytes]:
    """A diffusers folder as repositories hold it: what runs, and what else lies about there."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    # as published: what a tokenizer is saved as depends on the version of transformers
    files = {name: content for name, content in files.items() if not name.startswith("tokenizer/")}
    files.update({f"tokenizer/{name}": (TOKENIZER / name).read_bytes() for name in ("vocab.json", "merges.txt")})
    assert files.keys() == NEEDED
    # what real repositories hold besides
    files["README.md"] = b"# tiny"
    files["tiny.ckpt"] = b"PK\x03\x04"
    files["unet/diffusion_pytorch_model.bin"] = b"PK\x03\x04"
    files["unet/diffusion_pytorch_model.non_ema.safetensors"] = b"x"
    files["safety_checker/config.json"] = b"{}"
    files["safety_checker/model.safetensors"] = b"checker"
    files["feature_extractor/preprocessor_config.json"] = b"{}"
    return files


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        # clients that stop early are part of these tests
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class FakeHub:
    """Model info, and resolve addresses that redirect large files to a second server, the CDN."""

    def __init__(self):
        self.files: dict[str, bytes] = {}
        self.repos = {"author/tiny"}
        self.errors: dict[str, tuple[int, str]] = {}
        self.cut_after: dict[str, list[int]] = {}
        """By file: the bytes after which each of the next answers breaks off."""
        self.holds: dict[str, tuple[int, threading.Event]] = {}
        """By file: the bytes after which the answer waits for the event."""
        self.corrupt: set[str] = set()
        self.ranges = True
        self.requests: list[tuple[str, str, str | None, str | None]] = []
        self.hub = self._serve("hub")
        self.cdn = self._serve("cdn")

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.hub.server_port}"

    def _serve(self, role):
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_GET(self):
                fake.requests.append((role, self.path, self.headers["Range"], self.headers["Authorization"]))
                getattr(fake, f"_{role}")(self)

        server = Server(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server

    def close(self):
        for server in (self.hub, self.cdn):
            server.shutdown()
            server.server_close()

    def served(self, role):
        return [request for request in self.requests if request[0] == role]

    def _hub(self, request):
        path = request.path.split("?")[0]
        for prefix, (status, code) in self.errors.items():
            if path.startswith(prefix):
                return self._answer(request, b"", status, {"X-Error-Code": code} if code else {})
        repo = "/".join(path.removeprefix("/api/models").split("/")[1:3])
        if repo not in self.repos:
            return self._answer(request, b'{"error":"Repository not found"}', 401, {"X-Error-Code": "RepoNotFound"})
        if path.startswith("/api/models/"):
            return self._answer(request, json.dumps(self._info(repo)).encode())
        name = path.removeprefix(f"/{repo}/resolve/{COMMIT}/")
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(self.files[name]).hexdigest()}"'}
        if name.endswith((".safetensors", ".bin")):
            headers["X-Linked-Size"] = str(len(self.files[name]))
            headers["Location"] = f"http://127.0.0.1:{self.cdn.server_port}/{name}?signature=1"
            return self._answer(request, b"", 302, headers)
        return self._content(request, name, headers)

    def _cdn(self, request):
        self._content(request, request.path.split("?")[0][1:], {})

    def _info(self, repo):
        return {"id": repo, "sha": COMMIT, "siblings": self._siblings()}

    def _siblings(self):
        entries = []
        for name, content in self.files.items():
            blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            entry = {"rfilename": name, "size": len(content), "blobId": blob}
            if name.endswith((".safetensors", ".bin")):
                sha256 = hashlib.sha256(content).hexdigest()
                entry["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 134}
            entries.append(entry)
        return entries

    def _content(self, request, name, headers):
        content = self.files[name]
        if name in self.corrupt:
            content = bytes(len(content))
        status = 200
        asked = request.headers["Range"]
        if asked and self.ranges:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            headers = {**headers, "Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            content, status = content[start:], 206
        cuts = self.cut_after.get(name)
        self._answer(request, content, status, headers, cuts.pop(0) if cuts else None, self.holds.get(name))

    def _answer(self, request, content, status=200, headers=None, cut=None, hold=None):
        request.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            request.send_header(key, value)
        request.end_headers()
        if hold is not None:
            start, go_on = hold
            request.wfile.write(content[:start])
            assert go_on.wait(60)
            content = content[start:]
        request.wfile.write(content[:cut])
        if cut is not None:
            request.close_connection = True
