"""Files in and out: what a person has on disk reads as it looks, and what is written never costs what was there."""

import io
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_mend.engine import files
from comfyui_mend.engine.files import (
    MaskChannel,
    check_outputs,
    numbered,
    read_bits,
    read_image,
    read_mask,
    read_parameters,
    read_profile,
    write_image,
)
from comfyui_mend.engine.types import InputError
from PIL import Image, ImageCms, PngImagePlugin


def gradient(height=24, width=32, channels=3):
    """Every channel different, no symmetry: a transposed or flipped picture cannot pass for it."""
    y, x = np.mgrid[:height, :width]
    planes = [x * 8 % 256, y * 10 % 256, (x * 3 + y * 7) % 256, 128 + x][:channels]
    return np.stack(planes, -1).astype(np.uint8)


def saved(folder, name, picture, **options):
    path = folder / name
    (picture if isinstance(picture, Image.Image) else Image.fromarray(picture)).save(path, **options)
    return path


def png(colour_type, samples, *chunks):
    """A PNG of 16 bits per sample, which Pillow can read but not write."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = samples.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    body = b"".join(chunk(kind, data) for kind, data in chunks)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )


# --- reading


@pytest.mark.parametrize(
    ("name", "options", "tolerance"),
    [
        ("a.png", {}, 0),
        ("a.webp", {"lossless": True}, 0),
        ("a.bmp", {}, 0),
        ("a.jpg", {"quality": 100, "subsampling": 0}, 4 / 255),
    ],
)
def test_each_format_reads_as_the_pixels_that_were_saved(tmp_path, name, options, tolerance):
    pixels = np.kron(gradient(3, 4), np.ones((8, 8, 1), np.uint8))  # blocks of 8: JPEG keeps them
    image = read_image(saved(tmp_path, name, pixels, **options))
    assert image.shape == (1, 24, 32, 3) and image.dtype == torch.float32
    assert np.abs(image[0].numpy() * 255 - pixels).max() <= tolerance * 255


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA"])
def test_every_png_mode_reads_as_it_looks(tmp_path, mode):
    picture = Image.fromarray(gradient(channels=4 if "A" in mode else 3)).convert(mode)
    image = read_image(saved(tmp_path, "a.png", picture))
    expected = np.asarray(picture.convert("RGBA"))
    assert image.shape[-1] == (4 if "A" in mode else 3)
    assert np.array_equal((image[0].numpy() * 255).round(), expected[..., : image.shape[-1]])


def test_a_palette_with_a_transparent_colour_has_an_alpha_channel(tmp_path):
    picture = Image.fromarray(np.repeat(np.arange(4, dtype=np.uint8)[None], 4, 0), "L").convert("P")
    image = read_image(saved(tmp_path, "a.png", picture, transparency=2))
    assert torch.equal(image[0, 0, :, 3], torch.tensor([1.0, 1.0, 0.0, 1.0]))


def test_grey_of_16_bits_keeps_its_precision(tmp_path):
    levels = np.array([[0, 1, 257, 32768, 65534, 65535]], np.uint16)
    image = read_image(saved(tmp_path, "a.png", levels))
    assert np.allclose(image[0, :, :, 0].numpy(), levels / 65535, atol=1e-7)


def test_the_transparent_level_of_16_bit_grey_becomes_alpha(tmp_path):
    (tmp_path / "a.png").write_bytes(png(0, np.array([[500, 40000]]), (b"tRNS", struct.pack(">H", 500))))
    assert read_image(tmp_path / "a.png")[0, 0, :, 3].tolist() == [0, 1]


@pytest.mark.parametrize(("colour_type", "channels"), [(2, 3), (6, 4)])
def test_colour_of_16_bits_keeps_its_precision(tmp_path, colour_type, channels):
    samples = np.random.default_rng(0).integers(0, 65536, (5, 7, channels))
    (tmp_path / "a.png").write_bytes(png(colour_type, samples))
    assert np.array_equal(read_image(tmp_path / "a.png")[0].numpy(), samples.astype(np.float32) / np.float32(65535))


def test_the_transparent_colour_of_16_bits_becomes_alpha(tmp_path):
    samples = np.array([[[500, 40000, 65535], [1, 2, 3]]])
    (tmp_path / "a.png").write_bytes(png(2, samples, (b"tRNS", struct.pack(">HHH", 500, 40000, 65535))))
    image = read_image(tmp_path / "a.png")[0, 0].numpy()
    assert np.allclose(image[:, :3], samples[0] / 65535, atol=1e-7)
    assert image.shape == (2, 4) and image[1, 3] == 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_phone_photo_is_read_upright(tmp_path, orientation):
    upright = gradient()
    # what the sensor stored, so that the orientation tag turns it back
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path, "a.png", np.ascontiguousarray(stored), exif=exif)
    assert np.array_equal((read_image(path)[0].numpy() * 255).round(), upright)


def test_cmyk_jpeg_is_read_as_rgb(tmp_path):
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    image = read_image(saved(tmp_path, "a.jpg", red, quality=95))
    assert image.shape == (1, 16, 16, 3)
    assert image[0, 8, 8, 0] > 0.95 and image[0, 8, 8, 1] < 0.05


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for name in ("a.gif", "a.webp", "a.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], lossless=True)
        assert read_image(tmp_path / name)[0, 4, 4].tolist() == [1, 0, 0]


def test_a_missing_file_a_folder_and_a_renamed_text_file_are_each_named(tmp_path):
    (tmp_path / "notes.png").write_text("buy milk")
    (tmp_path / "empty.png").write_bytes(b"")
    cases = {
        "nothing.png": "There is no file",
        "": "is a folder",
        "notes.png": "not a picture",
        "empty.png": "not a pic",
    }
    for name, said in cases.items():
        with pytest.raises(InputError, match=said) as caught:
            read_image(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_a_file_cut_short_is_refused_at_any_length(tmp_path, name):
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    whole = saved(tmp_path, name, noise).read_bytes()
    for share in (0.02, 0.2, 0.5, 0.9):
        (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(InputError, match=r"damaged|not a picture"):
            read_image(tmp_path / name)


def test_a_picture_beyond_the_limits_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = saved(tmp_path, "wide.png", Image.new("1", (files.MAX_SIDE + 1, 1)))
    with pytest.raises(InputError, match="16385x1"):
        read_image(path)
    monkeypatch.setattr(files, "MAX_PIXELS", 100)
    with pytest.raises(InputError, match="scale it down"):
        read_image(saved(tmp_path, "big.png", gradient()))


# --- masks


def test_a_grey_mask_is_its_own_value_in_every_spelling(tmp_path):
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = torch.from_numpy(levels)[None].float() / 255
    opaque = np.dstack([levels] * 3 + [np.full_like(levels, 255)])
    for name, picture in {"l.png": levels, "rgb.png": opaque[..., :3].copy(), "rgba.png": opaque}.items():
        assert torch.equal(read_mask(saved(tmp_path, name, picture)), expected), name


def test_strokes_on_a_transparent_layer_repaint_only_where_painted(tmp_path):
    layer = np.zeros((4, 4, 4), np.uint8)
    layer[..., :3] = 255  # editors leave white under full transparency
    layer[1, 1, 3] = 255
    layer[2, 2, 3] = 51
    mask = read_mask(saved(tmp_path, "layer.png", layer))
    assert mask[0, 1, 1] == 1 and mask[0, 2, 2] == pytest.approx(0.2) and mask.sum() == pytest.approx(1.2)


def test_an_erased_hole_is_the_mask_when_asked_for_alpha(tmp_path):
    photo = gradient(channels=4)
    photo[..., 3] = 255
    with pytest.raises(InputError, match="no transparent pixels"):
        read_mask(saved(tmp_path, "whole.png", photo), MaskChannel.ALPHA)
    photo[5:9, 6:12, 3] = 0
    mask = read_mask(saved(tmp_path, "hole.png", photo), MaskChannel.ALPHA)
    assert mask.sum() == 4 * 6 and mask[0, 5, 6] == 1


def test_a_photograph_in_the_place_of_the_mask_is_refused(tmp_path):
    with pytest.raises(InputError, match="image comes first, then the mask"):
        read_mask(saved(tmp_path, "photo.png", gradient()))


def test_a_jpeg_mask_with_chroma_noise_is_still_a_mask(tmp_path):
    mask = np.zeros((64, 64, 3), np.uint8)
    mask[20:40, 20:40] = 255
    assert read_mask(saved(tmp_path, "m.jpg", mask, quality=60))[0, 30, 30] > 0.95


# --- writing


@pytest.mark.parametrize("name", ["a.png", "a.webp"])
@pytest.mark.parametrize("channels", [3, 4])
def test_what_is_written_reads_back_bit_for_bit(tmp_path, name, channels):
    pixels = gradient(channels=channels)
    if channels == 4:
        pixels[:4, :4, 3] = 0  # colours under full transparency must survive
    image = torch.from_numpy(pixels)[None].float() / 255
    assert torch.equal(read_image(write_image(tmp_path / name, image)), image)


@pytest.mark.parametrize(("channels", "mode"), [(1, "I;16"), (3, "RGB"), (4, "RGBA")])
def test_16_bits_go_through_a_png_without_a_change(tmp_path, channels, mode):
    levels = np.random.default_rng(0).integers(0, 65536, (1, 9, 7, channels)).astype(np.float32)
    image = torch.from_numpy(levels / np.float32(65535))
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    path = write_image(tmp_path / "a.png", image, PARAMETERS, profile=profile, bits=16)
    assert torch.equal(read_image(path), image.expand(-1, -1, -1, max(channels, 3)))
    assert read_bits(path) == 16 and read_parameters(path) == PARAMETERS
    with Image.open(path) as picture:
        picture.verify()
        assert picture.mode.startswith(mode) and picture.info.get("icc_profile") == (profile if channels > 1 else None)


def test_16_bits_are_for_png_alone(tmp_path):
    for name in ("a.jpg", "a.webp"):
        assert read_bits(write_image(tmp_path / name, torch.rand(1, 8, 8, 3), bits=16)) == 8


def test_8_bits_are_rounded_to_the_nearest_level(tmp_path):
    values = torch.tensor([0.0, 0.49, 0.51, 1.49, 254.4, 254.6, 300.0, -7.0]) / 255
    path = write_image(tmp_path / "a.png", values.reshape(1, -1, 1).expand(1, -1, 3))
    assert np.asarray(Image.open(path))[0, :, 0].tolist() == [0, 0, 1, 1, 254, 255, 255, 0]


def test_one_channel_is_written_as_grey(tmp_path):
    path = write_image(tmp_path / "m.png", torch.ones(1, 4, 4, 1))
    assert Image.open(path).mode == "L"


PARAMETERS = {
    "prompt": 'a "red" café, 桜\n(soft:1.2)',
    "seed": 2**64 - 1,
    "strength": 0.6,
    "model": None,
    "seeds": [1, 2],
}


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.JPEG", "a.webp"])
def test_parameters_survive_the_round_trip(tmp_path, name):
    path = write_image(tmp_path / name, torch.rand(1, 16, 16, 3), PARAMETERS)
    assert read_parameters(path) == PARAMETERS


def test_the_png_chunk_is_plain_json_that_other_programs_can_show(tmp_path):
    path = write_image(tmp_path / "a.png", torch.rand(1, 8, 8, 3), PARAMETERS)
    assert json.loads(Image.open(path).text["parameters"]) == PARAMETERS


def test_another_programs_parameters_are_not_ours(tmp_path):
    chunks = PngImagePlugin.PngInfo()
    chunks.add_text("parameters", "a cat\nSteps: 20, Sampler: Euler a")
    assert read_parameters(saved(tmp_path, "a1111.png", gradient(), pnginfo=chunks)) == {}
    assert read_parameters(saved(tmp_path, "plain.jpg", gradient())) == {}


def test_a_prompt_too_long_for_jpeg_does_not_cost_the_picture(tmp_path):
    parameters = {"prompt": "long " * 20000}
    assert read_parameters(write_image(tmp_path / "a.jpg", torch.rand(1, 8, 8, 3), parameters)) == {}
    assert read_parameters(write_image(tmp_path / "a.png", torch.rand(1, 8, 8, 3), parameters)) == parameters


def test_a_colour_profile_travels_with_the_picture(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    source = saved(tmp_path, "a.jpg", gradient(), icc_profile=profile)
    for name in ("b.png", "b.jpg", "b.webp"):
        path = write_image(tmp_path / name, read_image(source), profile=read_profile(source))
        assert Image.open(path).info["icc_profile"] == profile
    assert read_profile(saved(tmp_path, "plain.png", gradient())) is None


def test_files_that_are_no_pictures_are_kept_just_as_well(tmp_path):
    record = tmp_path / "record.json"
    record.write_text("{}")
    picture = tmp_path / "a.png"
    check_outputs([picture], others=[tmp_path / "new.json"])
    with pytest.raises(InputError, match="exists already"):
        check_outputs([picture], others=[record])
    check_outputs([picture], others=[record], force=True)
    with pytest.raises(InputError, match="also an input"):
        check_outputs([picture], others=[record], inputs=[record], force=True)
    with pytest.raises(InputError, match="named twice"):
        check_outputs([picture], others=[picture], force=True)


def test_an_existing_file_is_kept_unless_forced(tmp_path):
    path = write_image(tmp_path / "a.png", torch.zeros(1, 8, 8, 3))
    before = path.read_bytes()
    with pytest.raises(InputError, match="exists already"):
        write_image(path, torch.ones(1, 8, 8, 3))
    assert path.read_bytes() == before
    write_image(path, torch.ones(1, 8, 8, 3), force=True)
    assert read_image(path).min() == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def test_an_existing_file_is_kept_on_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def no_links(source, target):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    path = write_image(tmp_path / "a.png", torch.zeros(1, 8, 8, 3))
    with pytest.raises(InputError, match="exists already"):
        write_image(path, torch.ones(1, 8, 8, 3))
    assert read_image(path).max() == 0


def test_a_disk_that_fills_up_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    path = write_image(tmp_path / "a.png", torch.zeros(1, 8, 8, 3))
    real = Path.write_bytes

    def full(self, data):
        real(self, data[:20])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(InputError, match=r"a\.png cannot be written: No space left on device"):
        write_image(path, torch.ones(1, 8, 8, 3), force=True)
    monkeypatch.undo()
    assert read_image(path).max() == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.png"]


def test_unusual_targets_are_refused_in_a_sentence(tmp_path):
    picture = torch.rand(1, 8, 8, 3)
    transparent = torch.zeros(1, 8, 8, 4)
    (tmp_path / "file").write_text("in the way")
    for path, image, said in [
        (tmp_path / "a.tiff", picture, r"ending \.tiff"),
        (tmp_path / "a", picture, r"ending \(none\)"),
        (tmp_path / "a.jpg", transparent, "cannot hold transparency"),
        (tmp_path / "a.png", torch.full((1, 8, 8, 3), torch.nan), "NaN"),
        (tmp_path / "a.png", torch.rand(2, 8, 8, 3), "shape"),
        (tmp_path / "file" / "a.png", picture, "cannot be written"),
    ]:
        with pytest.raises(InputError, match=said):
            write_image(path, image)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_missing_folders_are_made_when_the_picture_is_there(tmp_path):
    assert write_image(tmp_path / "new" / "deep" / "a.png", torch.rand(1, 8, 8, 3)).exists()


def test_a_fully_opaque_rgba_picture_goes_into_a_jpeg(tmp_path):
    path = write_image(tmp_path / "a.jpg", torch.ones(1, 8, 8, 4))
    assert Image.open(io.BytesIO(path.read_bytes())).mode == "RGB"


def test_several_pictures_are_numbered_and_one_is_not():
    assert numbered("x/out.png", 1) == [Path("x/out.png")]
    assert numbered("x/out.png", 3) == [Path("x/out-1.png"), Path("x/out-2.png"), Path("x/out-3.png")]


def test_outputs_are_checked_before_the_work(tmp_path):
    there = saved(tmp_path, "there.png", gradient())
    (tmp_path / "file").write_text("in the way")
    check_outputs([tmp_path / "new.png", tmp_path / "sub" / "new.png"])
    check_outputs([there], force=True)
    for path, options, said in [
        (there, {}, "exists already"),
        (there, {"inputs": [there], "force": True}, "also an input"),
        (tmp_path / "sub.png" / ".." / "there.png", {"inputs": [there], "force": True}, "also an input"),
        (tmp_path / "new.xyz", {}, "ending"),
        (tmp_path / "file" / "new.png", {}, "no folder"),
    ]:
        with pytest.raises(InputError, match=said):
            check_outputs([path], **options)
