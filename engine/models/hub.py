"""The Hugging Face hub, by huggingface_hub (0.30 and later): what a repository holds, and the bytes of its files.

Of the library's two ways to a file this is http_get, which follows redirects, retries and takes up where a file ends.
hf_hub_download is the other: its newer versions (1.33 and 2.4, for example) delete what an interrupted call has
fetched.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from ..types import ModelFileError

LIBRARY = "comfyui-mend"
TIMEOUT = 30.0
"""Seconds to wait for the list of files."""

_NAME = re.compile(r"\w[\w.-]*", re.ASCII)


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


class GrowingFile(io.BufferedWriter):
    """A file that grows; ``on_size`` hears of its bytes when they are on disk, and may raise."""

    def __init__(self, path: Path, on_size: Callable[[int], None]) -> None:
        super().__init__(io.FileIO(path, "a"))
        self._on_size = on_size

    def write(self, content: Any, /) -> int:
        written = super().write(content)
        self.flush()
        self._on_size(self.tell())
        return written


class Hub:
    """The hub through huggingface_hub; errors come out as sentences."""

    def __init__(self, endpoint: str | None = None, token: str | None = None) -> None:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        self._api = HfApi(endpoint, token, library_name=LIBRARY)
        # a compressed answer could not be resumed
        self._headers = {**build_hf_headers(token=token, library_name=LIBRARY), "Accept-Encoding": "identity"}

    def repository(self, repo: str, revision: str | None) -> Repository:
        """The list of files with sizes and hashes."""
        with self._readable_errors(repo, revision):
            try:
                info = self._api.model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT)
                files = tuple(
                    RemoteFile(file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else None, file.blob_id)
                    for file in info.siblings or ()
                )
                return Repository(repo, str(info.sha), files)
            except (ValueError, KeyError, TypeError) as error:
                raise ModelFileError(
                    f"{self._api.endpoint} gave an answer that is not the hub's: check the network and HF_ENDPOINT."
                ) from error

    def append(self, repository: Repository, file: RemoteFile, part: GrowingFile) -> None:
        """Fetches what ``part`` lacks of ``file``."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.file_download import http_get

        url = hf_hub_url(repository.id, file.path, revision=repository.commit, endpoint=self._api.endpoint)
        with self._readable_errors(repository.id, repository.commit), _no_second_progress_bar():
            while (start := part.tell()) < file.size:
                try:
                    http_get(url, part, resume_size=start, headers=self._headers, expected_size=file.size)
                except _transport_errors():
                    # which breaks the library retries depends on its version
                    if part.tell() <= start:
                        raise

    @contextmanager
    def _readable_errors(self, repo: str, revision: str | None) -> Iterator[None]:
        from huggingface_hub.errors import OfflineModeIsEnabled

        try:
            yield
        except OfflineModeIsEnabled as error:
            raise ModelFileError(
                "HF_HUB_OFFLINE is set, which forbids downloads: unset it, or choose a model on disk."
            ) from error
        except _transport_errors() as error:
            if getattr(error, "response", None) is not None:
                raise self._refusal(error, repo, revision) from error
            if getattr(error, "errno", None) is not None and not isinstance(error, (ConnectionError, TimeoutError)):
                raise  # by the disk
            raise ModelFileError(
                f"No connection to {self._api.endpoint} ({_reason(error)}): check the network and run this again;"
                " what has arrived is kept."
            ) from error

    def _refusal(self, error: Any, repo: str, revision: str | None) -> ModelFileError:
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

        status = error.response.status_code
        if isinstance(error, RevisionNotFoundError):
            message = f"{repo} has no revision {revision}: leave it empty for the newest."
        elif isinstance(error, GatedRepoError) or status == HTTPStatus.FORBIDDEN:
            message = (
                f"{repo} is gated: accept its terms at {self._api.endpoint}/{repo}, then give your access token with"
                " `hf auth login` or in HF_TOKEN."
            )
        elif isinstance(error, RepositoryNotFoundError) or status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.NOT_FOUND):
            message = (
                f"{repo} is not on the hub, or is private: check its spelling, and give your access token with"
                " `hf auth login` or in HF_TOKEN if it is yours."
            )
        else:
            message = f"The hub answered {status} for {repo}: try again later."
        return ModelFileError(message)


def _transport_errors() -> tuple[type[Exception], ...]:
    """OSError, and the errors of the HTTP library below, which changes with the version: requests, httpx, httpx2."""
    from huggingface_hub.errors import HfHubHTTPError

    return (*(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)), OSError)


def _reason(error: BaseException) -> str:
    """What the lowest layer said: those above wrap it in their own names."""
    while error.__cause__ or error.__context__:
        error = error.__cause__ or error.__context__ or error
    return (str(error) or type(error).__name__).splitlines()[0]


@contextmanager
def _no_second_progress_bar() -> Iterator[None]:
    """Beside the caller's."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    group = "huggingface_hub.http_get"
    if are_progress_bars_disabled(group):
        yield
        return
    disable_progress_bars(group)
    try:
        yield
    finally:
        enable_progress_bars(group)
