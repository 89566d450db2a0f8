"""Shifts are made with Fourier's theorem, which the code under test does not use for fractions."""

import numpy as np
import pytest
import torch
from comfyui_mend.engine.registration import Shift, apply_shift, shift_between
from comfyui_mend.engine.types import InputError
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage


def photo(name):
    data = pytest.importorskip("skimage.data")
    pixels = getattr(data, name)()
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    return pixels[:300, :440, :3].astype(np.float32) / 255


def texture(seed=0, height=160, width=200):
    noise = np.random.default_rng(seed).random((height, width, 3))
    smooth = ndimage.gaussian_filter(noise, (2, 2, 0), mode="wrap")
    return (0.5 + (smooth - 0.5) * 4).clip(0, 1).astype(np.float32)


def displaced(pixels, dx, dy):
    padded = np.pad(pixels, ((32, 32), (32, 32), (0, 0)), mode="reflect")
    planes = [np.fft.ifft2(ndimage.fourier_shift(np.fft.fft2(padded[..., c]), (dy, dx))).real for c in range(3)]
    return np.stack(planes, axis=-1)[32:-32, 32:-32].astype(np.float32)


def hole(height, width):
    """A quarter of the picture is not comparable."""
    weight = torch.ones(height, width)
    weight[height // 4 : height * 3 // 4, width // 4 : width * 3 // 4] = 0
    return weight


def measured(reference, moved, weight=None):
    return shift_between(torch.from_numpy(reference), torch.from_numpy(moved), weight)


@pytest.mark.parametrize("name", ["coffee", "cat", "brick", "rocket", "grass"])
@pytest.mark.parametrize(("dx", "dy"), [(0, 0), (0.1, -0.2), (0.5, 0.5), (3.3, -2.7), (-7.9, 7.4), (8, 8)])
def test_photos_are_found_to_a_twentieth_of_a_pixel_around_a_hole_with_other_tone_and_noise(name, dx, dy):
    reference = photo(name)
    weight = hole(*reference.shape[:2])
    noise = np.random.default_rng(1).normal(0, 0.01, reference.shape)
    moved = (displaced(reference, dx, dy) * 0.95 + 0.02 + noise).clip(0, 1).astype(np.float32)
    moved[weight.numpy() == 0] = (0.9, 0.1, 0.2)
    shift = measured(reference, moved, weight)
    assert abs(shift.dx - dx) < 0.05
    assert abs(shift.dy - dy) < 0.05
    assert shift.confidence > 0.9


@settings(max_examples=25)
@given(st.floats(-6, 6), st.floats(-6, 6))
def test_swapping_the_pictures_turns_the_shift_round(dx, dy):
    reference = texture()
    moved = displaced(reference, dx, dy)
    there, back = measured(reference, moved), measured(moved, reference)
    assert abs(there.dx - dx) < 0.05
    assert abs(there.dy - dy) < 0.05
    assert abs(there.dx + back.dx) < 0.05
    assert abs(there.dy + back.dy) < 0.05


def test_a_large_picture_is_measured_as_well_as_a_small_one():
    small = torch.from_numpy(texture(3, 256, 300)).permute(2, 0, 1)[None]
    large = torch.nn.functional.interpolate(small, size=(1024, 1200), mode="bicubic")[0].permute(1, 2, 0).clamp(0, 1)
    shift = measured(large.numpy(), displaced(large.numpy(), 5.25, -11.5))
    assert abs(shift.dx - 5.25) < 0.05
    assert abs(shift.dy + 11.5) < 0.05


def test_what_the_weight_excludes_does_not_matter_at_all():
    reference = texture()
    moved, weight = displaced(reference, 2.4, -1.3), hole(160, 200)
    other_reference, other_moved = reference.copy(), moved.copy()
    other_reference[weight.numpy() == 0] = 1
    other_moved[weight.numpy() == 0] = 0
    assert measured(reference, moved, weight)[:2] == pytest.approx(
        measured(other_reference, other_moved, weight)[:2], abs=0.01
    )


def test_a_changed_object_outside_the_weight_does_not_pull():
    reference = texture()
    moved = displaced(reference, 1.5, 0.5)
    moved[20:60, 20:70] = displaced(texture(9), 0, 0)[20:60, 20:70]
    shift = measured(reference, moved)
    assert abs(shift.dx - 1.5) < 0.05
    assert abs(shift.dy - 0.5) < 0.05


@pytest.mark.parametrize(
    ("reference", "moved"),
    [
        (np.full((64, 64, 3), 0.5, np.float32), np.full((64, 64, 3), 0.5, np.float32)),
        (np.full((64, 64, 3), 0.5, np.float32), texture(0, 64, 64)),
        (np.zeros((1, 1, 3), np.float32), np.ones((1, 1, 3), np.float32)),
        (np.zeros((3, 200, 3), np.float32), np.ones((3, 200, 3), np.float32)),
    ],
)
def test_without_texture_there_is_no_shift_and_no_confidence(reference, moved):
    assert measured(reference, moved) == Shift(0, 0, 0)


def test_stripes_do_not_decide_how_far_they_moved_along_themselves():
    stripes = np.broadcast_to((np.sin(np.arange(96) / 3) / 3 + 0.5)[:, None, None], (96, 96, 3)).astype(np.float32)
    assert measured(stripes, np.roll(stripes, 2, axis=0)).confidence < 0.4


def test_unrelated_pictures_give_no_confidence():
    assert measured(texture(1), texture(2)).confidence < 0.4


def test_nothing_comparable_gives_no_confidence():
    assert measured(texture(), texture(), torch.zeros(160, 200)) == Shift(0, 0, 0)


@given(st.integers(-5, 5), st.integers(-5, 5))
def test_whole_pixels_move_bit_for_bit_and_the_edge_repeats(dx, dy):
    images = torch.rand(2, 7, 9, 4, generator=torch.Generator().manual_seed(1)) * 3 - 1
    rows = (torch.arange(7) - dy).clamp(0, 6)
    columns = (torch.arange(9) - dx).clamp(0, 8)
    assert torch.equal(apply_shift(images, Shift(dx, dy)), images[:, rows][:, :, columns])


@settings(max_examples=25)
@given(st.floats(-4, 4), st.floats(-4, 4))
def test_a_shift_and_its_opposite_give_the_picture_back(dx, dy):
    images = torch.from_numpy(texture())[None]
    shift = Shift(dx, dy)
    back = apply_shift(apply_shift(images, shift), -shift)
    assert (back - images)[:, 12:-12, 12:-12].abs().max() < 4 / 255


def test_moving_agrees_with_measuring():
    images = torch.from_numpy(texture())[None]
    shift = shift_between(images[0], apply_shift(images, Shift(1.25, -0.75))[0])
    assert shift.dx == pytest.approx(1.25, abs=0.02)
    assert shift.dy == pytest.approx(-0.75, abs=0.02)
    assert shift.distance == pytest.approx(2.125**0.5, abs=0.03)


def test_flat_colour_stays_itself_under_fractions():
    flat = torch.full((1, 20, 20, 3), 0.3)
    assert torch.allclose(apply_shift(flat, Shift(0.4, 7.7)), flat, atol=1e-6)


def test_other_sizes_are_refused_in_one_sentence():
    with pytest.raises(InputError, match=r"64x64x3 and 64x32x3.*resize"):
        shift_between(torch.zeros(64, 64, 3), torch.zeros(64, 32, 3))
    with pytest.raises(InputError, match="weight of 32x64"):
        shift_between(torch.zeros(64, 64, 3), torch.zeros(64, 64, 3), torch.zeros(32, 64))
