"""Crop records on disk: another process stitches the same bits, and nothing in a file is trusted."""

import contextlib
import json
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_mend.engine.crop import Area, CropOptions, Sizes
from comfyui_mend.engine.crop_record import FILE_NAME, load, save
from comfyui_mend.engine.crop_stitch import Separate, crop_to_mask, stitch_crops
from comfyui_mend.engine.images import NEARLY
from comfyui_mend.engine.masks import feather
from comfyui_mend.engine.types import InputError, Size
from conftest import ROOT
from PIL import Image

TESTS = ROOT / "tests"


def scene(batch=2, channels=3):
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(batch, 90, 120, channels, generator=generator)
    mask = torch.zeros(batch, 90, 120)
    mask[:, 30:55, 4:20] = 0.7
    mask[:, 5:15, 100:112] = 1
    return image, feather(mask, 3)


@pytest.fixture(params=["own size", "scaled", "each", "extended"])
def cropped(request):
    options = {
        "own size": CropOptions(target=None),
        "scaled": CropOptions(target=Area(128 * 128)),
        "each": CropOptions(target=Area(64 * 64), min_size=0),
        "extended": CropOptions(target=Sizes((Size(160, 160),)), overflow="extend", fill="blur", mask_outside=True),
    }[request.param]
    separate = Separate.EACH if request.param == "each" else Separate.TOGETHER
    return crop_to_mask(*scene(), options, separate=separate)


def inverted(crops):
    return [1 - crop for crop in crops]


def test_a_record_survives_the_disk(cropped, tmp_path):
    file = save(cropped.record, tmp_path / "new" / "folder")
    assert file == tmp_path / "new" / "folder" / FILE_NAME
    loaded = load(file.parent)
    assert (loaded.size, loaded.count, loaded.batches) == (
        cropped.record.size,
        cropped.record.count,
        cropped.record.batches,
    )
    for one, other in zip(loaded.patches, cropped.record.patches, strict=True):
        assert (one.picture, one.plan) == (other.picture, other.plan)
        assert np.array_equal(one.mask, other.mask) and np.array_equal(one.repainted, other.repainted)
    expected = stitch_crops(cropped.record, inverted(cropped.crops)).images
    back = stitch_crops(loaded, inverted(cropped.crops), scene()[0])
    assert torch.equal(back.images, expected)
    assert not any("not what was cut" in line for line in back.reports)
    untouched = stitch_crops(loaded, cropped.crops, scene()[0]).images
    assert torch.equal(untouched, scene()[0])


def test_another_process_stitches_the_same_bits(tmp_path):
    image, mask = scene()
    cropped = crop_to_mask(image, mask, CropOptions(target=Area(128 * 128)))
    save(cropped.record, tmp_path / "crop.json")
    torch.save({"image": image, "painted": inverted(cropped.crops)}, tmp_path / "pictures.pt")
    code = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import conftest, torch
from comfyui_mend.engine.crop_record import load
from comfyui_mend.engine.crop_stitch import stitch_crops
folder = Path(sys.argv[2])
pictures = torch.load(folder / "pictures.pt", weights_only=True)
torch.save(stitch_crops(load(folder / "crop.json"), pictures["painted"], pictures["image"]).images, folder / "back.pt")
"""
    subprocess.run([sys.executable, "-c", code, str(TESTS), str(tmp_path)], check=True, cwd=TESTS.anchor)
    here = stitch_crops(cropped.record, inverted(cropped.crops)).images
    assert torch.equal(torch.load(tmp_path / "back.pt", weights_only=True), here)


def test_no_picture_is_written(tmp_path):
    image, mask = scene()
    cropped = crop_to_mask(image, mask, CropOptions(target=None))
    save(cropped.record, tmp_path / "crop.json")
    assert sorted(file.name.rsplit("-", 1)[0] for file in tmp_path.iterdir()) == [
        "crop-mask",
        "crop-mask",
        "crop-repainted",
        "crop-repainted",
        "crop.json",
    ]
    with Image.open(tmp_path / "crop-mask-1.png") as mask_file:
        assert mask_file.mode == "I;16"
    with pytest.raises(InputError, match="connect the original image"):
        stitch_crops(load(tmp_path / "crop.json"), cropped.crops)


def test_another_picture_is_noticed(tmp_path):
    image, mask = scene()
    cropped = crop_to_mask(image, mask)
    record = load(save(cropped.record, tmp_path))
    changed = image.clone()
    changed[1, 80, 60] = 1 - changed[1, 80, 60].round()
    notice = stitch_crops(record, cropped.crops, changed).reports[0]
    assert notice.startswith("1 of the 2 originals are not what was cut")
    # what lies under the mask does not count
    under = torch.where(mask[..., None] > NEARLY, torch.zeros(()), image)
    assert "not what was cut" not in stitch_crops(record, cropped.crops, under).reports[0]


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_same_picture_is_not_noticed(tmp_path, channels):
    image, mask = scene(channels=channels)
    cropped = crop_to_mask(image, mask)
    record = load(save(cropped.record, tmp_path))
    assert "not what was cut" not in stitch_crops(record, cropped.crops, image).reports[0]


def test_nothing_is_overwritten_and_nothing_half_is_left(tmp_path):
    record = crop_to_mask(*scene()).record
    save(record, tmp_path / "crop.json")
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(InputError, match=r"crop\.json or one of its masks exists already"):
        save(record, tmp_path / "crop.json")
    (tmp_path / "other-repainted-2.png").write_bytes(b"mine")
    with pytest.raises(InputError, match="exists already"):
        save(record, tmp_path / "other.json")
    after = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert after == before | {tmp_path / "other-repainted-2.png": b"mine"}


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        save(crop_to_mask(*scene()).record, tmp_path / "file" / "below")


# --- files from elsewhere


@pytest.fixture
def saved(tmp_path):
    return save(crop_to_mask(*scene(), CropOptions(target=None)).record, tmp_path / "crop.json")


def edit(file: Path, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(version=2), "version 2"),
        (lambda c: c.update(format="png"), "no crop record"),
        (lambda c: c.pop("patches"), "lacks 'patches'"),
        (lambda c: c.update(patches=[]), "no list of crops"),
        (lambda c: c.update(size=[120]), "2 numbers"),
        (lambda c: c.update(size=[120, 10**9]), "whole number from 1 to 16384"),
        (lambda c: c.update(count=True), "whole number"),
        (lambda c: c.update(batches=[1]), "batches"),
        (lambda c: c.update(digests=["x"]), "digests"),
        (lambda c: c["patches"][0].update(picture=7), "whole number from 0 to 1"),
        (lambda c: c["patches"][0].update(box=[0, 0, 500, 90]), "not inside"),
        (lambda c: c["patches"][0].update(box=[50, 0, 20, 90]), "not inside"),
        (lambda c: c["patches"][0].update(scaled=[4000, 20]), "does not lie on a canvas"),
        (lambda c: c["patches"][0].update(mask="../secret.png"), "no mask file beside"),
        (lambda c: c["patches"][0].update(mask="..\\secret.png"), "no mask file beside"),
        (lambda c: c["patches"][0].update(mask="/etc/passwd"), "no mask file beside"),
        (lambda c: c["patches"][0].update(mask=5), "no mask file beside"),
        (lambda c: c["patches"][0].update(mask="gone.png"), "gone.png"),
        (lambda c: c["patches"][0].update(mask=c["patches"][0]["repainted"]), "right depth"),
        (lambda c: c["patches"][0].update(outside={"padding": [1, 1, 1, -1]}), "whole number"),
        (lambda c: c["patches"][0].update(outside={"padding": [1] * 4, "fill": "eval", "masked": True}), "eval"),
        (
            lambda c: c["patches"][0].update(outside={"padding": [16384] * 4, "fill": "edge", "masked": True}),
            "megapixels",
        ),
        (lambda c: c["patches"].__setitem__(0, 3), "damaged"),
    ],
)
def test_damaged_records_are_refused_in_a_sentence(saved, change, says):
    edit(saved, change)
    with pytest.raises(InputError, match=says) as refused:
        load(saved)
    assert "crop.json" in str(refused.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"[1]", b"\x89PNG\xff\xfe", b"[" * 100_000, b'{"format": "mend-crop"}', b'{"count": ' + b"9" * 5000 + b"}"],
    ids=["empty", "list", "png", "nested", "format alone", "digits"],
)
def test_files_that_are_no_record_are_refused(saved, content):
    saved.write_bytes(content)
    with pytest.raises(InputError):
        load(saved)


def test_a_mask_of_another_size_or_kind_is_refused(saved):
    mask = saved.with_name("crop-mask-1.png")
    Image.new("I;16", (3, 3)).save(mask)
    with pytest.raises(InputError, match="is 3x3 instead of"):
        load(saved)
    mask.write_bytes(b"GIF89a")
    with pytest.raises(InputError, match="damaged"):
        load(saved)


def test_a_mask_file_that_claims_to_be_enormous_is_refused(saved):
    mask = saved.with_name("crop-mask-1.png")
    content = bytearray(mask.read_bytes())
    content[16:24] = struct.pack(">II", 100_000, 100_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    mask.write_bytes(content)
    with pytest.raises(InputError, match="json is damaged"):
        load(saved)


@pytest.mark.parametrize("seed", range(40))
def test_any_damage_is_an_input_error_or_harmless(saved, seed):
    chance = random.Random(seed)
    file = chance.choice(sorted(saved.parent.iterdir()))
    content = bytearray(file.read_bytes())
    place = chance.randrange(len(content))
    content[place : place + chance.randrange(20)] = chance.randbytes(chance.randrange(20))
    file.write_bytes(content)
    with contextlib.suppress(InputError):
        load(saved)


def test_a_record_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="There is no crop record"):
        load(tmp_path / "none")
