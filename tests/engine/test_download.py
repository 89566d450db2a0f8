"""Downloads against a local server that speaks as the hub does; nothing leaves the machine."""

import errno
import json
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from comfyui_mend import cli
from comfyui_mend.engine.host import LocalHost
from comfyui_mend.engine.models import download
from comfyui_mend.engine.models.download import SUCCESSORS, DownloadBar, Downloaded, Variant, pull
from comfyui_mend.engine.models.hub import GrowingFile
from comfyui_mend.engine.models.load import find_models, load_model
from comfyui_mend.engine.types import InputError, ModelFileError
from fake_hub import COMMIT, NEEDED, UNET, FakeHub, published_files
from huggingface_hub import constants, file_download, utils
from tiny import save_tiny_model
from tiny_sdxl import save_tiny_sdxl

CHUNK = 2**14


@pytest.fixture(scope="module")
def tiny_files(tmp_path_factory):
    return published_files(save_tiny_model(tmp_path_factory.mktemp("hub") / "tiny"))


def forget_connections():
    """huggingface_hub's, which remember proxies and, before version 1, the offline switch."""
    getattr(utils, "close_session", getattr(utils, "reset_sessions", None))()


def set_default_endpoint(monkeypatch, url):
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", url)


@pytest.fixture
def fake_hub(tiny_files):
    fake = FakeHub()
    fake.files = dict(tiny_files)
    yield fake
    fake.close()


@pytest.fixture
def hub(fake_hub, monkeypatch, tmp_path_factory):
    """A hub that may be reached, by a client without a token, in small pieces and without pauses."""
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    # read from the environment when huggingface_hub was imported
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path_factory.mktemp("home") / "token"))
    set_default_endpoint(monkeypatch, fake_hub.endpoint)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", CHUNK)
    impatient = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    monkeypatch.setattr(file_download, "time", impatient)
    forget_connections()
    yield fake_hub
    forget_connections()


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
    pulled = pull("author/tiny", tmp_path, reports.append, variant=Variant.FULL)
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


def test_a_family_of_two_text_encoders_comes_with_both(hub, tmp_path):
    folder = save_tiny_sdxl(tmp_path / "published")
    hub.files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    hub.files["text_encoder_2/model.bin"] = b"PK\x03\x04"
    pulled = pull("author/tiny", tmp_path, variant=Variant.FULL).path
    assert files_in(pulled) == hub.files.keys() - {"text_encoder_2/model.bin"} | {".mend.json"}
    model = load_model(pulled, LocalHost(device=torch.device("cpu")))
    assert len(model.readers) == 2 and model.facts.latent_format == "SDXL"

    del hub.files["text_encoder_2/model.safetensors"]
    with pytest.raises(ModelFileError, match=r"author/tiny has text_encoder_2 only as model.bin, a pickle"):
        pull("author/tiny", tmp_path, variant=Variant.FULL, folder="again")


def test_an_endpoint_may_be_given(hub, tmp_path, monkeypatch):
    set_default_endpoint(monkeypatch, "http://127.0.0.1:9")
    assert files_in(pull("author/tiny", tmp_path, endpoint=hub.endpoint).path) == NEEDED | {".mend.json"}


def test_the_index_comes_last_and_configs_first(hub, tmp_path):
    pull("author/tiny", tmp_path)
    order = [path.split("?")[0].split(f"{COMMIT}/")[1] for role, path, *_ in hub.requests if "/resolve/" in path]
    assert order[-1] == "model_index.json"
    weights = [index for index, name in enumerate(order) if name.endswith(".safetensors")]
    configs = [index for index, name in enumerate(order[:-1]) if not name.endswith(".safetensors")]
    assert max(configs) < min(weights)


def test_a_cut_connection_is_taken_up_where_it_broke(hub, tmp_path):
    hub.cut_after[UNET] = [CHUNK, 3 * CHUNK]
    pulled = pull("author/tiny", tmp_path)
    assert (pulled.path / UNET).read_bytes() == hub.files[UNET]
    ranges = [asked for _, path, asked, _ in hub.served("cdn") if UNET in path]
    assert ranges == [None, f"bytes={CHUNK}-", f"bytes={4 * CHUNK}-"]


def test_a_server_that_cannot_skip_is_read_from_the_start(hub, tmp_path):
    hub.ranges = False
    hub.cut_after[UNET] = [CHUNK]
    pulled = pull("author/tiny", tmp_path)
    assert (pulled.path / UNET).read_bytes() == hub.files[UNET]


class StopError(BaseException):
    """As ComfyUI's interrupt, which is no Exception."""


def test_a_stopped_download_is_invisible_and_goes_on_later(hub, tmp_path):
    with pytest.raises(StopError):
        pull("author/tiny", tmp_path, raise_in_the_middle_of(UNET, StopError()))
    host = LocalHost(device=torch.device("cpu"), folders={"diffusers": [tmp_path]})
    assert find_models(host) == {}
    assert not list(tmp_path.rglob("model_index.json"))
    (part,) = tmp_path.rglob("*.part")
    assert part.stat().st_size == CHUNK < len(hub.files[UNET])

    hub.requests.clear()
    reports: list[Downloaded] = []
    pulled = pull("author/tiny", tmp_path, reports.append)
    assert (pulled.path / UNET).read_bytes() == hub.files[UNET]
    assert [asked for _, path, asked, _ in hub.served("cdn") if UNET in path] == [f"bytes={CHUNK}-"]
    assert not any("unet/config.json" in path for _, path, *_ in hub.requests)
    assert [report.bytes_done for report in reports] == sorted(report.bytes_done for report in reports)
    assert list(find_models(host)) == ["tiny"]


@pytest.mark.parametrize(
    "error",
    [StopError(), KeyboardInterrupt(), TimeoutError("mine"), OSError(errno.ENOSPC, "mine"), ConnectionError("mine")],
    ids=lambda error: type(error).__name__,
)
def test_what_the_callback_raises_arrives_unchanged(hub, tmp_path, error):
    error.__cause__ = cause = ValueError("why")
    with pytest.raises(type(error)) as caught:
        pull("author/tiny", tmp_path, raise_in_the_middle_of(UNET, error))
    assert caught.value is error and error.__cause__ is cause
    assert len([path for _, path, *_ in hub.served("cdn") if UNET in path]) == 1


def test_a_part_that_is_too_long_is_started_anew(hub, tmp_path):
    with pytest.raises(StopError):
        pull("author/tiny", tmp_path, raise_in_the_middle_of(UNET, StopError()))
    (part,) = tmp_path.rglob("*.part")
    part.write_bytes(bytes(len(hub.files[UNET]) + 1))
    assert (pull("author/tiny", tmp_path).path / UNET).read_bytes() == hub.files[UNET]


def test_huggingface_hub_draws_no_bar_of_its_own(hub, tmp_path, capsys):
    utils.enable_progress_bars()  # whatever else in this process has turned them off
    pull("author/tiny", tmp_path)
    assert capsys.readouterr().err == ""
    assert not utils.are_progress_bars_disabled("huggingface_hub.http_get")


def test_the_hosts_bar_counts_mebibytes_and_its_interrupt_stops(hub, tmp_path):
    class Host(LocalHost):
        def progress(self, total, description):
            counts.append(total)
            return SimpleNamespace(update=counts.append)

        def check_interrupt(self):
            if interrupted:
                raise StopError

    counts, interrupted = [], False
    pull("author/tiny", tmp_path, DownloadBar(Host(torch.device("cpu"))))
    total, *shown = counts
    assert shown == list(range(total + 1)) and total > 2
    interrupted = True
    with pytest.raises(StopError):
        pull("author/tiny", tmp_path, DownloadBar(Host(torch.device("cpu"))), folder="other")


def test_the_command_line_pulls(hub, tmp_path, capsys):
    gone, successor = next(iter(SUCCESSORS.items()))
    hub.repos = {successor}
    assert cli.main(["models", "pull", gone, "--to", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["path"] == str(tmp_path / successor.split("/")[1])
    assert (tmp_path / successor.split("/")[1] / UNET).read_bytes() == hub.files[UNET]
    assert report["notices"] == [f"{gone} has left the hub: its copy {successor} is used instead."]


def test_parts_of_another_revision_are_not_mixed_in(hub, tmp_path):
    staging = tmp_path / ".tiny.download" / "unet"
    staging.mkdir(parents=True)
    (staging / "diffusion_pytorch_model.safetensors.000000000000.part").write_bytes(b"old" * 100)
    (staging / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"old")
    pulled = pull("author/tiny", tmp_path)
    assert files_in(pulled.path) == NEEDED | {".mend.json"}
    assert (pulled.path / UNET).read_bytes() == hub.files[UNET]


@pytest.mark.parametrize("name", [UNET, "vae/config.json"])
def test_damaged_content_is_refused_and_fetched_anew(hub, tmp_path, name):
    hub.corrupt.add(name)
    with pytest.raises(ModelFileError, match=f"{name} of author/tiny arrived damaged"):
        pull("author/tiny", tmp_path)
    assert not (tmp_path / "tiny").exists()
    hub.corrupt.clear()
    assert (pull("author/tiny", tmp_path).path / name).read_bytes() == hub.files[name]


def test_a_file_damaged_on_disk_meanwhile_is_noticed(hub, tmp_path):
    hub.corrupt.add("text_encoder/model.safetensors")
    with pytest.raises(ModelFileError, match=r"text_encoder/model.safetensors of author/tiny arrived damaged"):
        pull("author/tiny", tmp_path)
    finished = tmp_path / ".tiny.download" / UNET
    finished.write_bytes(bytes(finished.stat().st_size))
    with pytest.raises(ModelFileError, match=f"{UNET} of author/tiny arrived damaged"):
        pull("author/tiny", tmp_path)


def test_the_token_goes_to_the_hub_and_not_to_where_it_redirects(hub, tmp_path):
    pull("author/tiny", tmp_path, token="hf_secret")
    assert {request[3] for request in hub.served("hub")} == {"Bearer hf_secret"}
    assert {request[3] for request in hub.served("cdn")} == {None}


def test_without_a_token_none_is_sent(hub, tmp_path):
    pull("author/tiny", tmp_path)
    assert {request[3] for request in hub.requests} == {None}


def test_the_same_download_again_asks_nobody(hub, tmp_path):
    first = pull("author/tiny", tmp_path)
    hub.requests.clear()
    assert pull("author/tiny", tmp_path) == first
    assert pull("author/tiny", tmp_path, revision=COMMIT) == first
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
        pull("author/tiny", tmp_path)
    before = {name: (tmp_path / "tiny" / name).read_bytes() for name in files_in(tmp_path / "tiny")}
    with pytest.raises(
        ModelFileError, match=r"tiny exists already in .*: give another folder name, or remove it first"
    ):
        pull("author/tiny", tmp_path, **options)
    assert before == {name: (tmp_path / "tiny" / name).read_bytes() for name in files_in(tmp_path / "tiny")}
    assert pull("author/tiny", tmp_path, folder="tiny 2", **options).path == tmp_path / "tiny 2"


def test_the_variant_decides_the_files(hub, tmp_path):
    half = "unet/diffusion_pytorch_model.fp16.safetensors"
    hub.files[half] = hub.files[UNET]
    fp16 = pull("author/tiny", tmp_path, variant=Variant.FP16, folder="half").path
    full = pull("author/tiny", tmp_path, variant=Variant.FULL, folder="full").path
    # the other parts have full weights only
    assert files_in(fp16) - {".mend.json"} == NEEDED - {UNET} | {half}
    assert files_in(full) - {".mend.json"} == NEEDED


def test_shards_are_fetched_together(hub, tmp_path):
    content = hub.files.pop(UNET)
    shards = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    for name in shards:
        hub.files[name] = content
    assert set(shards) <= files_in(pull("author/tiny", tmp_path).path)


def test_the_safety_checker_comes_when_asked_for(hub, tmp_path):
    pulled = pull("author/tiny", tmp_path, safety_checker=True)
    extra = {"safety_checker/config.json", "safety_checker/model.safetensors"}
    assert extra | {"feature_extractor/preprocessor_config.json"} <= files_in(pulled.path)
    for name in extra:
        del hub.files[name]
    pulled = pull("author/tiny", tmp_path, safety_checker=True, folder="other")
    assert pulled.notices == ("author/tiny has no safety checker.",)


@pytest.mark.parametrize("gone", sorted(SUCCESSORS))
def test_repositories_that_left_the_hub_go_to_their_successors(hub, tmp_path, gone):
    successor = SUCCESSORS[gone]
    hub.repos = {successor}
    pulled = pull(gone, tmp_path)
    assert pulled.notices == (f"{gone} has left the hub: its copy {successor} is used instead.",)
    assert pulled.path == tmp_path / successor.split("/")[1]
    assert pull(gone, tmp_path) == pulled


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
        "a/b.git",
        "a/b-",
        "https://example.org/a",
        "a\\b/c",
        "ä/b",
    ],
)
def test_names_that_are_no_repositories_are_refused(hub, tmp_path, repo):
    with pytest.raises(InputError, match="is not a repository on the hub: write author/name"):
        pull(repo, tmp_path)
    assert hub.requests == [] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", ["", "..", "a/b", "/tmp/x", ".hidden", "a\\b", "a:b"])
def test_folder_names_stay_in_the_destination(hub, tmp_path, folder):
    with pytest.raises(InputError, match="is not a folder name"):
        pull("author/tiny", tmp_path, folder=folder)
    assert hub.requests == []


def test_revisions_are_checked(hub, tmp_path):
    with pytest.raises(InputError, match="is not a revision"):
        pull("author/tiny", tmp_path, revision="../main")
    pull("author/tiny", tmp_path, revision="refs/pr/1")
    assert hub.requests[0][1].startswith("/api/models/author/tiny/revision/refs%2Fpr%2F1?blobs=")


def test_files_outside_the_known_folders_are_never_written(hub, tmp_path):
    for name in ("../evil.safetensors", "unet/../../evil.json", "tokenizer/../evil.json", "/evil.json"):
        hub.files[name] = b"{}"
    hub.files["tokenizer/..%2fevil.json"] = b"{}"
    pulled = pull("author/tiny", tmp_path / "models")
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
        (500, "", "The hub answered 500 for author/tiny: try again later"),
    ],
)
def test_what_the_hub_refuses_is_said_plainly(hub, tmp_path, status, code, message):
    hub.errors["/api/models/author/tiny"] = (status, code)
    with pytest.raises(ModelFileError, match=f"^{message}") as caught:
        pull("author/tiny", tmp_path, revision="v9")
    assert "\n" not in str(caught.value)


def test_a_gate_before_the_files_is_noticed(hub, tmp_path):
    """Lists of gated repositories are public, their files are not."""
    hub.errors["/author/tiny/resolve/"] = (403, "GatedRepo")
    with pytest.raises(ModelFileError, match="author/tiny is gated"):
        pull("author/tiny", tmp_path)


def test_a_server_in_trouble_is_said_plainly(hub, tmp_path):
    hub.errors["/author/tiny/resolve/"] = (503, "")
    with pytest.raises(ModelFileError, match=r"^The hub answered 503 for author/tiny: try again later"):
        pull("author/tiny", tmp_path)


def test_a_connection_that_keeps_breaking_is_given_up_and_what_arrived_is_kept(hub, tmp_path):
    hub.cut_after[UNET] = [CHUNK] + [0] * 20
    with pytest.raises(ModelFileError, match=r"^No connection to .*: check the network and run this again") as caught:
        pull("author/tiny", tmp_path)
    assert "\n" not in str(caught.value)
    (part,) = tmp_path.rglob("*.part")
    assert part.stat().st_size == CHUNK


def test_no_network_is_said_plainly(hub, tmp_path):
    endpoint = hub.endpoint
    hub.close()
    with pytest.raises(ModelFileError, match=rf"No connection to {endpoint} \(.*refused.*\): check the network"):
        pull("author/tiny", tmp_path, endpoint=endpoint)


def test_something_that_is_not_the_hub_is_noticed(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "_hub", lambda request: hub._answer(request, b"<html>Sign in to the network</html>"))
    with pytest.raises(ModelFileError, match="gave an answer that is not the hub's"):
        pull("author/tiny", tmp_path)


def test_the_offline_switch_is_honoured(fake_hub, tmp_path):
    """tests/conftest.py has set it."""
    with pytest.raises(ModelFileError, match=r"^HF_HUB_OFFLINE is set, which forbids downloads"):
        pull("author/tiny", tmp_path, endpoint=fake_hub.endpoint)
    assert fake_hub.requests == []


def test_a_repository_of_pickles_is_refused(hub, tmp_path):
    del hub.files[UNET]
    message = "author/tiny has unet only as diffusion_pytorch_model.bin, a pickle"
    with pytest.raises(ModelFileError, match=message):
        pull("author/tiny", tmp_path)
    assert not any("/resolve/" in path for _, path, *_ in hub.requests)


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("unet/config.json", "author/tiny has no unet/config.json and no transformer/config.json; supported are"),
        ("vae/diffusion_pytorch_model.safetensors", "has no vae/diffusion_pytorch_model.safetensors"),
        ("scheduler/scheduler_config.json", "has no scheduler/scheduler_config.json: choose a complete repository"),
    ],
)
def test_incomplete_repositories_are_refused(hub, tmp_path, gone, message):
    del hub.files[gone]
    with pytest.raises(ModelFileError, match=message):
        pull("author/tiny", tmp_path)


def test_another_family_is_refused_before_its_weights_arrive(hub, tmp_path):
    config = json.loads(hub.files["unet/config.json"])
    hub.files["unet/config.json"] = json.dumps({**config, "class_embed_type": "projection"}).encode()
    with pytest.raises(ModelFileError, match=r"^author/tiny is an unCLIP model"):
        pull("author/tiny", tmp_path)
    assert hub.served("cdn") == []


def test_too_little_room_is_said_before_anything_is_fetched(hub, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ModelFileError, match=r"The disk is too full: [\d.]+ GiB more are needed"):
        pull("author/tiny", tmp_path)
    assert not any("/resolve/" in path for _, path, *_ in hub.requests)


def test_a_disk_that_fills_up_is_said_plainly(hub, tmp_path, monkeypatch):
    def write(part, content):
        if part.tell() >= 2 * CHUNK:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(part, content)

    original = GrowingFile.write
    monkeypatch.setattr(GrowingFile, "write", write)
    with pytest.raises(ModelFileError, match=r"^The disk is full: make room in .*; what has arrived is kept"):
        pull("author/tiny", tmp_path)
    assert [part.stat().st_size for part in tmp_path.rglob("*.part")] == [2 * CHUNK]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_said_plainly(hub, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ModelFileError, match="cannot be written to: choose another folder"):
        pull("author/tiny", tmp_path)
    tmp_path.chmod(0o700)


def test_a_destination_that_is_a_file_is_not_replaced(hub, tmp_path):
    (tmp_path / "tiny").write_text("mine")
    with pytest.raises(ModelFileError, match="tiny exists already"):
        pull("author/tiny", tmp_path)
    assert (tmp_path / "tiny").read_text() == "mine"
