"""Fill models: found and told apart without spandrel; what runs them is tested inside ComfyUI, which brings it."""

import builtins
import sys

import pytest
import torch
from comfyui_mend.engine.host import LocalHost
from comfyui_mend.engine.models.fill_model import find_fill_models, load_fill_model
from comfyui_mend.engine.types import MissingPackageError, ModelFileError
from safetensors.torch import save_file

MAT_KEY = "synthesis.first_stage.conv_first.conv.resample_filter"


@pytest.fixture
def host(tmp_path):
    return LocalHost(torch.device("cpu"), folders={"inpaint": [tmp_path / "first", tmp_path / "second"]})


def write(path, key="weight"):
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: torch.zeros(2)}, path)
    return path


def test_models_are_found_below_the_folders_by_their_place(host, tmp_path):
    write(tmp_path / "first" / "big-lama.safetensors")
    write(tmp_path / "second" / "big-lama.safetensors")
    write(tmp_path / "second" / "sub" / "MAT.SafeTensors")
    (tmp_path / "second" / "old.pt").write_bytes(b"PK")
    (tmp_path / "second" / "notes.txt").write_text("")
    (tmp_path / "second" / ".part.safetensors").write_bytes(b"")
    found = find_fill_models(host)
    assert list(found) == ["big-lama.safetensors", "old.pt", "sub/MAT.SafeTensors"]
    assert found["big-lama.safetensors"] == tmp_path / "first" / "big-lama.safetensors"


def test_no_folder_means_no_models():
    assert find_fill_models(LocalHost(torch.device("cpu"))) == {}


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".ckpt"])
def test_a_pickle_is_refused_with_the_way_out(host, tmp_path, suffix):
    path = tmp_path / f"big-lama{suffix}"
    path.write_bytes(b"PK\x03\x04")
    with pytest.raises(ModelFileError, match=r"is a pickle.*`mend models convert`"):
        load_fill_model(path, host)


def test_a_missing_and_a_damaged_file_are_named(host, tmp_path):
    with pytest.raises(ModelFileError, match=r"gone.safetensors is not there any more"):
        load_fill_model(tmp_path / "gone.safetensors", host)
    cut = write(tmp_path / "cut.safetensors")
    cut.write_bytes(cut.read_bytes()[:-3])
    with pytest.raises(ModelFileError, match=r"cut.safetensors is incomplete"):
        load_fill_model(cut, host)


def refuse(*packages):
    real = builtins.__import__

    def importing(name, *arguments, **options):
        if name.partition(".")[0] in packages:
            raise ImportError(name)
        return real(name, *arguments, **options)

    return importing


def test_without_spandrel_the_message_names_it(host, tmp_path, monkeypatch):
    path = write(tmp_path / "big-lama.safetensors", "model.model.1.bn_l.running_mean")
    monkeypatch.setattr(builtins, "__import__", refuse("spandrel"))
    with pytest.raises(MissingPackageError, match="need the package spandrel"):
        load_fill_model(path, host)


@pytest.mark.parametrize("prefix", ["", "model."])
def test_mat_leaves_its_package_and_licence_to_the_user(host, tmp_path, monkeypatch, prefix):
    pretended = type("spandrel", (), {"MAIN_REGISTRY": None})
    monkeypatch.setitem(sys.modules, "spandrel", pretended)
    path = write(tmp_path / "mat.safetensors", prefix + MAT_KEY)
    monkeypatch.setattr(builtins, "__import__", refuse("spandrel_extra_arches"))
    with pytest.raises(MissingPackageError, match=r"spandrel_extra_arches.*non-commercial.*your choice"):
        load_fill_model(path, host)
