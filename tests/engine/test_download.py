"""Downloads against a local server that speaks as the hub does; nothing leaves the machine."""

import errno
import hashlib
import json
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from comfyui_mend.engine.host import LocalHost
from comfyui_mend.engine.models import download
from comfyui_mend.engine.models.download import SUCCESSORS, Downloaded, Variant, pull
from comfyui_mend.engine.models.load import find_models, load_model
from comfyui_mend.engine.types import InputError, ModelFileError
from tiny import TOKENIZER, save_tiny_model

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
            return self._answer(request, json.dumps({"sha": COMMIT, "siblings": self._siblings()}).encode())
        name = path.removeprefix(f"/{repo}/resolve/{COMMIT}/")
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(self.files[name]).hexdigest()}"'}
        if name.endswith((".safetensors", ".bin")):
            headers["X-Linked-Size"] = str(len(self.files[name]))
            headers["Location"] = f"http://127.0.0.1:{self.cdn.server_port}/{name}?signature=1"
            return self._answer(request, b"", 302, headers)
        return self._content(request, name, headers)

    def _cdn(self, request):
        self._content(request, request.path.split("?")[0][1:], {})

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
        self._answer(request, content, status, headers, cuts.pop(0) if cuts else None)

    def _answer(self, request, content, status=200, headers=None, cut=None):
        request.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            request.send_header(key, value)
        request.end_headers()
        request.wfile.write(content[:cut])
        if cut is not None:
            request.close_connection = True


@pytest.fixture(scope="module")
def tiny_files(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("hub") / "tiny")
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


@pytest.fixture
def hub(tiny_files, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(download, "PAUSE", 0.0)
    fake = FakeHub()
    fake.files = dict(tiny_files)
    yield fake
    fake.close()


def files_in(folder: Path):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def raise_in_the_middle_of(name, error):
    """A progress callback that raises when a part of the file has arrived."""
    starts: list[int] = []

    def progress(report):
        if report.file == name:
            starts.append(report.bytes_done)
            if report.bytes_done > starts[0]:
                raise error

    return progress


def test_only_what_runs_is_fetched_and_it_loads(hub, tmp_path):
    reports: list[Downloaded] = []
    pulled = pull("author/tiny", tmp_path, reports.append, endpoint=hub.endpoint, variant=Variant.FULL)
    assert pulled.path == tmp_path / "tiny"
    assert pulled.notices == ()
    assert files_in(pulled.path) == NEEDED | {".mend.json"}
    assert all((pulled.path / name).read_bytes() == hub.files[name] for name in NEEDED)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]

    total = sum(len(hub.files[name]) for name in NEEDED)
    done = [report.bytes_done for report in reports]
    assert done == sorted(done) and done[-1] == total and done[0] == 0
    assert {report.bytes_total for report in reports} == {total}
    assert {report.file for report in reports} == NEEDED

    host = LocalHost(device=torch.device("cpu"), folders={"diffusers": [tmp_path]})
    assert load_model(find_models(host)["tiny"], host).facts.native_size == 128


def test_the_index_comes_last_and_configs_first(hub, tmp_path):
    pull("author/tiny", tmp_path, endpoint=hub.endpoint)
    order = [path.split("?")[0].split(f"{COMMIT}/")[1] for role, path, *_ in hub.requests if "/resolve/" in path]
    assert order[-1] == "model_index.json"
    weights = [index for index, name in enumerate(order) if name.endswith(".safetensors")]
    configs = [index for index, name in enumerate(order[:-1]) if not name.endswith(".safetensors")]
    assert max(configs) < min(weights)


def test_a_cut_connection_is_taken_up_where_it_broke(hub, tmp_path):
    hub.cut_after[UNET] = [1000, 0, 500_000]
    pulled = pull("author/tiny", tmp_path, endpoint=hub.endpoint)
    assert (pulled.path / UNET).read_bytes() == hub.files[UNET]
    ranges = [asked for _, path, asked, _ in hub.served("cdn") if UNET in path]
    assert ranges == [None, "bytes=1000-", "bytes=1000-", "bytes=501000-"]


def test_a_server_that_cannot_skip_is_read_from_the_start(hub, tmp_path):
    hub.ranges = False
    hub.cut_after[UNET] = [1000]
    pulled = pull("author/tiny", tmp_path, endpoint=hub.endpoint)
    assert (pulled.path / UNET).read_bytes() == hub.files[UNET]


def test_a_stopped_download_is_invisible_and_goes_on_later(hub, tmp_path):
    class StopError(BaseException):
        """As ComfyUI's interrupt, which is no Exception."""

    stop = raise_in_the_middle_of(UNET, StopError())

    with pytest.raises(StopError):
        pull("author/tiny", tmp_path, stop, endpoint=hub.endpoint)
    host = LocalHost(device=torch.device("cpu"), folders={"diffusers": [tmp_path]})
    assert find_models(host) == {}
    assert not list(tmp_path.rglob("model_index.json"))
    (part,) = tmp_path.rglob("*.part")
    kept = part.stat().st_size
    assert 0 < kept < len(hub.files[UNET])

    hub.requests.clear()
    reports: list[Downloaded] = []
    pulled = pull("author/tiny", tmp_path, reports.append, endpoint=hub.endpoint)
    assert (pulled.path / UNET).read_bytes() == hub.files[UNET]
    assert [asked for _, path, asked, _ in hub.served("cdn") if UNET in path] == [f"bytes={kept}-"]
    assert not any("unet/config.json" in path for _, path, *_ in hub.requests)
    assert list(find_models(host)) == ["tiny"]


def test_parts_of_another_revision_are_not_mixed_in(hub, tmp_path):
    staging = tmp_path / ".tiny.download" / "unet"
    staging.mkdir(parents=True)
    (staging / "diffusion_pytorch_model.safetensors.000000000000.part").write_bytes(b"old" * 100)
    (staging / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"old")
    pulled = pull("author/tiny", tmp_path, endpoint=hub.endpoint)
    assert files_in(pulled.path) == NEEDED | {".mend.json"}
    assert (pulled.path / UNET).read_bytes() == hub.files[UNET]


@pytest.mark.parametrize("name", [UNET, "vae/config.json"])
def test_damaged_content_is_refused_and_fetched_anew(hub, tmp_path, name):
    hub.corrupt.add(name)
    with pytest.raises(ModelFileError, match=f"{name} of author/tiny arrived damaged"):
        pull("author/tiny", tmp_path, endpoint=hub.endpoint)
    assert not (tmp_path / "tiny").exists()
    hub.corrupt.clear()
    assert (pull("author/tiny", tmp_path, endpoint=hub.endpoint).path / name).read_bytes() == hub.files[name]


def test_a_file_damaged_on_disk_meanwhile_is_noticed(hub, tmp_path):
    hub.corrupt.add("text_encoder/model.safetensors")
    with pytest.raises(ModelFileError, match=r"text_encoder/model.safetensors of author/tiny arrived damaged"):
        pull("author/tiny", tmp_path, endpoint=hub.endpoint)
    finished = tmp_path / ".tiny.download" / UNET
    finished.write_bytes(bytes(finished.stat().st_size))
    with pytest.raises(ModelFileError, match=f"{UNET} of author/tiny arrived damaged"):
        pull("author/tiny", tmp_path, endpoint=hub.endpoint)


def test_the_token_goes_to_the_hub_and_not_to_where_it_redirects(hub, tmp_path):
    pull("author/tiny", tmp_path, token="hf_secret", endpoint=hub.endpoint)
    assert {request[3] for request in hub.served("hub")} == {"Bearer hf_secret"}
    assert {request[3] for request in hub.served("cdn")} == {None}


def test_without_a_token_none_is_sent(hub, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    pull("author/tiny", tmp_path, endpoint=hub.endpoint)
    assert {request[3] for request in hub.requests} == {None}


def test_the_same_download_again_asks_nobody(hub, tmp_path):
    first = pull("author/tiny", tmp_path, endpoint=hub.endpoint)
    hub.requests.clear()
    assert pull("author/tiny", tmp_path, endpoint=hub.endpoint) == first
    assert pull("author/tiny", tmp_path, revision=COMMIT, endpoint=hub.endpoint) == first
    assert hub.requests == []


@pytest.mark.parametrize("change", ["other revision", "other variant", "safety checker", "foreign"])
def test_an_existing_folder_is_never_overwritten(hub, tmp_path, change):
    options = {
        "other revision": {"revision": "fp16"},
        "other variant": {"variant": Variant.FULL},
        "safety checker": {"safety_checker": True},
        "foreign": {},
    }[change]
    if change == "foreign":
        (tmp_path / "tiny").mkdir()
        (tmp_path / "tiny" / "mine.txt").write_text("keep")
    else:
        pull("author/tiny", tmp_path, endpoint=hub.endpoint)
    before = {name: (tmp_path / "tiny" / name).read_bytes() for name in files_in(tmp_path / "tiny")}
    with pytest.raises(
        ModelFileError, match=r"tiny exists already in .*: give another folder name, or remove it first"
    ):
        pull("author/tiny", tmp_path, endpoint=hub.endpoint, **options)
    assert before == {name: (tmp_path / "tiny" / name).read_bytes() for name in files_in(tmp_path / "tiny")}
    assert pull("author/tiny", tmp_path, endpoint=hub.endpoint, folder="tiny 2", **options).path == tmp_path / "tiny 2"


def test_the_variant_decides_the_files(hub, tmp_path):
    half = "unet/diffusion_pytorch_model.fp16.safetensors"
    hub.files[half] = hub.files[UNET]
    fp16 = pull("author/tiny", tmp_path, endpoint=hub.endpoint, variant=Variant.FP16, folder="half").path
    full = pull("author/tiny", tmp_path, endpoint=hub.endpoint, variant=Variant.FULL, folder="full").path
    # the other parts have full weights only
    assert files_in(fp16) - {".mend.json"} == NEEDED - {UNET} | {half}
    assert files_in(full) - {".mend.json"} == NEEDED


def test_shards_are_fetched_together(hub, tmp_path):
    content = hub.files.pop(UNET)
    shards = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name in shards:
        hub.files[name] = content
    assert set(shards) <= files_in(pull("author/tiny", tmp_path, endpoint=hub.endpoint).path)


def test_the_safety_checker_comes_when_asked_for(hub, tmp_path):
    pulled = pull("author/tiny", tmp_path, endpoint=hub.endpoint, safety_checker=True)
    extra = {"safety_checker/config.json", "safety_checker/model.safetensors"}
    assert extra | {"feature_extractor/preprocessor_config.json"} <= files_in(pulled.path)
    for name in extra:
        del hub.files[name]
    pulled = pull("author/tiny", tmp_path, endpoint=hub.endpoint, safety_checker=True, folder="other")
    assert pulled.notices == ("author/tiny has no safety checker.",)


@pytest.mark.parametrize("gone", sorted(SUCCESSORS))
def test_repositories_that_left_the_hub_go_to_their_successors(hub, tmp_path, gone):
    successor = SUCCESSORS[gone]
    hub.repos = {successor}
    pulled = pull(gone, tmp_path, endpoint=hub.endpoint)
    assert pulled.notices == (f"{gone} has left the hub: its copy {successor} is used instead.",)
    assert pulled.path == tmp_path / successor.split("/")[1]
    assert pull(gone, tmp_path, endpoint=hub.endpoint) == pulled


@pytest.mark.parametrize(
    "repo",
    [
        "",
        "tiny",
        "a/b/c",
        "../../etc",
        "a/..",
        "/etc/passwd",
        "a/b--c",
        "a/.git",
        "https://example.org/a",
        "a\\b/c",
        "ä/b",
    ],
)
def test_names_that_are_no_repositories_are_refused(hub, tmp_path, repo):
    with pytest.raises(InputError, match="is not a repository on the hub: write author/name"):
        pull(repo, tmp_path, endpoint=hub.endpoint)
    assert hub.requests == [] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", ["", "..", "a/b", "/tmp/x", ".hidden", "a\\b", "a:b"])
def test_folder_names_stay_in_the_destination(hub, tmp_path, folder):
    with pytest.raises(InputError, match="is not a folder name"):
        pull("author/tiny", tmp_path, endpoint=hub.endpoint, folder=folder)
    assert hub.requests == []


def test_revisions_are_checked(hub, tmp_path):
    with pytest.raises(InputError, match="is not a revision"):
        pull("author/tiny", tmp_path, revision="../main", endpoint=hub.endpoint)
    pull("author/tiny", tmp_path, revision="refs/pr/1", endpoint=hub.endpoint)
    assert hub.requests[0][1] == "/api/models/author/tiny/revision/refs%2Fpr%2F1?blobs=true"


def test_files_outside_the_known_folders_are_never_written(hub, tmp_path):
    for name in ("../evil.safetensors", "unet/../../evil.json", "tokenizer/../evil.json", "/evil.json"):
        hub.files[name] = b"{}"
    hub.files["tokenizer/..%2fevil.json"] = b"{}"
    pulled = pull("author/tiny", tmp_path / "models", endpoint=hub.endpoint)
    assert files_in(pulled.path) == NEEDED | {".mend.json"}
    assert files_in(tmp_path) == {f"models/tiny/{name}" for name in NEEDED | {".mend.json"}}


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (401, "RepoNotFound", "author/tiny is not on the hub, or is private"),
        (404, "", "author/tiny is not on the hub, or is private"),
        (401, "GatedRepo", "author/tiny is gated: accept its terms at .*/author/tiny, then give your access token"),
        (403, "GatedRepo", "author/tiny is gated"),
        (404, "RevisionNotFound", "author/tiny has no revision v9: leave it empty"),
        (500, "", "The hub answered 500 Internal Server Error for author/tiny: try again later"),
    ],
)
def test_what_the_hub_refuses_is_said_plainly(hub, tmp_path, status, code, message):
    hub.errors["/api/models/author/tiny"] = (status, code)
    with pytest.raises(ModelFileError, match=f"^{message}") as caught:
        pull("author/tiny", tmp_path, revision="v9", endpoint=hub.endpoint)
    assert "\n" not in str(caught.value)


def test_a_gate_before_the_files_is_noticed(hub, tmp_path):
    """Lists of gated repositories are public, their files are not."""
    hub.errors["/author/tiny/resolve/"] = (403, "GatedRepo")
    with pytest.raises(ModelFileError, match="author/tiny is gated"):
        pull("author/tiny", tmp_path, endpoint=hub.endpoint)


def test_a_server_in_trouble_is_asked_a_few_times(hub, tmp_path):
    hub.errors["/author/tiny/resolve/"] = (503, "")
    with pytest.raises(ModelFileError, match=r"No connection to .*: check the network and run this again"):
        pull("author/tiny", tmp_path, endpoint=hub.endpoint)
    assert len([path for _, path, *_ in hub.requests if "/resolve/" in path]) == download.ATTEMPTS


def test_no_network_is_said_plainly(hub, tmp_path):
    endpoint = hub.endpoint
    hub.close()
    with pytest.raises(ModelFileError, match=rf"No connection to {endpoint} \(.*refused.*\): check the network"):
        pull("author/tiny", tmp_path, endpoint=endpoint)


def test_something_that_is_not_the_hub_is_noticed(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_hub", lambda request: hub._answer(request, b"<html>Sign in to the network</html>"))
    with pytest.raises(ModelFileError, match="gave an answer that is not the hub's"):
        pull("author/tiny", tmp_path, endpoint=hub.endpoint)


def test_the_offline_switch_is_honoured(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelFileError, match="HF_HUB_OFFLINE is set, which forbids downloads"):
        pull("author/tiny", tmp_path, endpoint=hub.endpoint)
    assert hub.requests == []


def test_a_repository_of_pickles_is_refused(hub, tmp_path):
    del hub.files[UNET]
    message = "author/tiny has unet only as diffusion_pytorch_model.bin, a pickle"
    with pytest.raises(ModelFileError, match=message):
        pull("author/tiny", tmp_path, endpoint=hub.endpoint)
    assert not any("/resolve/" in path for _, path, *_ in hub.requests)


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("unet/config.json", "author/tiny has no unet/config.json; supported are repositories in diffusers' layout"),
        ("vae/diffusion_pytorch_model.safetensors", "has no vae/diffusion_pytorch_model.safetensors"),
        ("scheduler/scheduler_config.json", "has no scheduler/scheduler_config.json: choose a complete repository"),
    ],
)
def test_incomplete_repositories_are_refused(hub, tmp_path, gone, message):
    del hub.files[gone]
    with pytest.raises(ModelFileError, match=message):
        pull("author/tiny", tmp_path, endpoint=hub.endpoint)


def test_another_family_is_refused_before_its_weights_arrive(hub, tmp_path):
    config = json.loads(hub.files["unet/config.json"])
    hub.files["unet/config.json"] = json.dumps({**config, "addition_embed_type": "text_time"}).encode()
    with pytest.raises(ModelFileError, match=r"^author/tiny is an SDXL model"):
        pull("author/tiny", tmp_path, endpoint=hub.endpoint)
    assert hub.served("cdn") == []


def test_too_little_room_is_said_before_anything_is_fetched(hub, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ModelFileError, match=r"The disk is too full: [\d.]+ GiB more are needed"):
        pull("author/tiny", tmp_path, endpoint=hub.endpoint)
    assert not any("/resolve/" in path for _, path, *_ in hub.requests)


def test_a_disk_that_fills_up_is_said_plainly(hub, tmp_path):
    fill_up = raise_in_the_middle_of(UNET, OSError(errno.ENOSPC, "No space left on device"))
    with pytest.raises(ModelFileError, match=r"The disk is full: make room in .*; what has arrived is kept"):
        pull("author/tiny", tmp_path, fill_up, endpoint=hub.endpoint)
    assert list(tmp_path.rglob("*.part"))


def test_a_destination_that_is_a_file_is_not_replaced(hub, tmp_path):
    (tmp_path / "tiny").write_text("mine")
    with pytest.raises(ModelFileError, match="tiny exists already"):
        pull("author/tiny", tmp_path, endpoint=hub.endpoint)
    assert (tmp_path / "tiny").read_text() == "mine"
