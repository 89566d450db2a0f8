"""PyTorch files give up their numbers without a line of them being run."""

import os
import pickle
import zipfile

import pytest
import torch
from comfyui_mend.engine.models.pickled_weights import convert_to_safetensors, read_pickled_weights
from comfyui_mend.engine.types import InputError, ModelFileError
from safetensors.torch import load_file
from torch import nn


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.table = nn.Parameter(torch.arange(6.0).reshape(2, 3).t().half())
        self.sizes = [1, 2]

    def forward(self, x):
        return self.model(x)


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = Inner()

    def forward(self, x):
        return self.model(x)


WRITERS = {
    "torchscript": lambda module, path: torch.jit.script(module).save(str(path)),
    "traced": lambda module, path: torch.jit.trace(module, torch.rand(1, 3, 8, 8)).save(str(path)),
    "state dict": lambda module, path: torch.save(module.state_dict(), path),
    "checkpoint": lambda module, path: torch.save({"epoch": 3, "state_dict": module.state_dict(), "how": Inner}, path),
    "module": torch.save,
}


@pytest.fixture
def module():
    return Outer().eval()


@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.filterwarnings("ignore")
def test_every_form_gives_the_modules_tensors(form, module, tmp_path):
    path = tmp_path / "model.pt"
    WRITERS[form](module, path)
    tensors = read_pickled_weights(path)
    expected = module.state_dict()
    if form == "traced":
        # a trace keeps only what it met
        expected = {key: value for key, value in expected.items() if key in tensors}
        assert len(expected) >= 6
    assert tensors.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(tensors[key], value)
        assert tensors[key].dtype == value.dtype


def test_the_converted_file_is_safetensors_with_the_same_tensors(module, tmp_path):
    torch.save(module.state_dict(), tmp_path / "model.pth")
    count = convert_to_safetensors(tmp_path / "model.pth", tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    assert count == len(loaded) == len(module.state_dict())
    assert all(torch.equal(loaded[key], value) for key, value in module.state_dict().items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pth", "model.safetensors"]


def test_tensors_that_share_memory_are_each_written(tmp_path):
    table = torch.rand(4, 4)
    torch.save({"encoder": table, "decoder": table[1:].t()}, tmp_path / "tied.pt")
    convert_to_safetensors(tmp_path / "tied.pt", tmp_path / "tied.safetensors")
    assert torch.equal(load_file(tmp_path / "tied.safetensors")["decoder"], table[1:].t())


class Malicious:
    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_what_a_pickle_wants_to_call_is_not_called(tmp_path):
    path = tmp_path / "evil.pt"
    torch.save({"weight": torch.ones(2), "payload": Malicious(tmp_path / "ran")}, path)
    assert read_pickled_weights(path).keys() == {"weight"}
    assert not (tmp_path / "ran").exists()
    # the same file does harm where pickle is let loose
    torch.load(path, weights_only=False)
    assert (tmp_path / "ran").exists()


def archive(path, data, **entries):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model/data.pkl", data)
        for name, content in entries.items():
            file.writestr(f"model/{name}", content)
    return path


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda p: p.write_bytes(pickle.dumps({"a": 1})), "not a PyTorch archive"),
        (lambda p: p.write_bytes(b""), "not a PyTorch archive"),
        (lambda p: archive(p, b"\x80\x02garbage"), "is damaged"),
        (lambda p: archive(p, b""), "is damaged"),
        (lambda p: archive(p, pickle.dumps({"a": 1})), "holds no weights"),
        (lambda p: zipfile.ZipFile(p, "w").close(), "is damaged"),
        (lambda p: None, "cannot be read"),
    ],
    ids=["bare pickle", "empty", "garbage", "empty pickle", "no tensors", "empty archive", "missing"],
)
def test_what_cannot_be_read_is_named(write, words, tmp_path):
    path = tmp_path / "model.pt"
    write(path)
    with pytest.raises(ModelFileError, match=f"model.pt .*{words}|model.pt {words}"):
        read_pickled_weights(path)


STORAGE = b"(X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\0\x30X\x03\0\0\0cpuK\x04tQ"
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\n"


def tensor(size=b"K\x04", stride=b"K\x01"):
    """The opcodes of a tensor of four numbers."""
    return REBUILD + b"(" + STORAGE + b"K\0(" + size + b"t(" + stride + b"t\x89}tR"


def pickled(name, value, after=b""):
    return b"\x80\x02}X" + len(name).to_bytes(4, "little") + name + value + b"s" + after + b"."


def numbers(path, data, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("model/data.pkl", data)
        file.writestr("model/data/0", torch.arange(4.0).numpy().tobytes())
    return path


def test_the_hand_written_pickle_is_a_tensor(tmp_path):
    tensors = read_pickled_weights(numbers(tmp_path / "model.pt", pickled(b"w", tensor())))
    assert torch.equal(tensors["w"], torch.arange(4.0))


@pytest.mark.parametrize(
    "data",
    [
        pickled(b"w", tensor(), REBUILD + b"}X\x01\0\0\0aK\x01sb0"),
        pickled(b"w", tensor(), REBUILD + b"N}X\x0c\0\0\0__defaults__)s\x86b0"),
        pickled(b"w", tensor() + b"}X\x04\0\0\0sizeK\x05sb"),
        pickled(b"w", b"cmodule\nname\nN}X\x01\0\0\0aK\x01s\x86b"),
        pickled(b"w", tensor(size=b"J\0\0\0\x20", stride=b"K\0")),
        pickled(b"w", tensor(size=b"\x8a\x0a" + bytes(9) + b"\x01", stride=b"K\0")),
        pickled(b"w", tensor(size=b"J\xfc\xff\xff\xff")),
        pickled(b"w", REBUILD + b"(NK\0(K\x04t(K\x01t\x89}tR"),
        pickled(b"w", tensor(), b"K\x01r\0\0\0\x080"),
        pickled(b"__metadata__", tensor()),
        pickled(b"\xed\xa0\x80", tensor()),
    ],
    ids=[
        "attribute of a function",
        "defaults of a function",
        "altered plan",
        "attribute of a class",
        "two gigabytes from four numbers",
        "too large for an integer",
        "negative size",
        "no storage",
        "a gigabyte of memory for notes",
        "reserved name",
        "a name that is no text",
    ],
)
def test_a_pickle_that_wants_more_than_its_tensors_is_refused(data, tmp_path):
    with pytest.raises(ModelFileError, match=r"model.pt is damaged"):
        read_pickled_weights(numbers(tmp_path / "model.pt", data))


def test_one_storage_under_many_names_does_not_fill_the_memory(tmp_path):
    table = torch.rand(1000)
    torch.save({f"copy {index}": table for index in range(1000)}, tmp_path / "many.pt")
    with pytest.raises(ModelFileError, match=r"many.pt is damaged"):
        read_pickled_weights(tmp_path / "many.pt")


def test_numbers_that_unfold_are_refused(tmp_path):
    data = pickled(b"w", tensor())
    with pytest.raises(ModelFileError, match=r"model.pt is damaged"):
        read_pickled_weights(numbers(tmp_path / "model.pt", data, zipfile.ZIP_DEFLATED))


def test_a_pickle_cannot_reach_beyond_its_numbers(tmp_path):
    torch.save({"weight": torch.ones(8)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "cut.pt", "w") as cut:
        for name in good.namelist():
            cut.writestr(name, good.read(name)[:8] if "/data/" in name else good.read(name))
    with pytest.raises(ModelFileError, match=r"cut.pt is damaged"):
        read_pickled_weights(tmp_path / "cut.pt")


def test_nothing_is_overwritten_unasked(module, tmp_path):
    source, target = tmp_path / "model.pt", tmp_path / "model.safetensors"
    torch.save(module.state_dict(), source)
    target.write_bytes(b"precious")
    with pytest.raises(InputError, match="exists already"):
        convert_to_safetensors(source, target)
    assert target.read_bytes() == b"precious"
    convert_to_safetensors(source, target, force=True)
    with pytest.raises(InputError, match="already; there is nothing to convert"):
        convert_to_safetensors(target, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=r"does not end in .safetensors"):
        convert_to_safetensors(source, tmp_path / "model.bin")


def test_a_folder_that_is_not_there_is_named(module, tmp_path):
    torch.save(module.state_dict(), tmp_path / "model.pt")
    with pytest.raises(ModelFileError, match=r"model.safetensors cannot be written"):
        convert_to_safetensors(tmp_path / "model.pt", tmp_path / "nowhere" / "model.safetensors")
