"""Padding: the picture keeps its pixels, and the mask leads into it without a step."""

import pytest
import torch
from comfyui_mend.engine.fill import FillMethod, fill
from comfyui_mend.engine.outpaint import Padding, pad
from comfyui_mend.engine.types import InputError
from hypothesis import given, settings
from hypothesis import strategies as st


def picture(height=40, width=60, batch=1, channels=3, seed=0):
    return torch.rand(batch, height, width, channels, generator=torch.Generator().manual_seed(seed))


sides = st.builds(Padding, *[st.sampled_from([0, 1, 7, 30])] * 4)


@settings(max_examples=60)
@given(st.integers(1, 30), st.integers(1, 30), sides, st.integers(0, 50), st.sampled_from([3, 4]))
def test_the_original_lies_in_the_canvas_bit_for_bit_under_a_mask_that_covers_the_rest(
    height, width, padding, feather, channels
):
    image = picture(height, width, batch=2, channels=channels) * 3 - 1
    padded = pad(image, padding, feather)
    inside = (slice(None), slice(padding.top, padding.top + height), slice(padding.left, padding.left + width))
    assert padded.image.shape == (
        2,
        height + padding.top + padding.bottom,
        width + padding.left + padding.right,
        channels,
    )
    assert padded.mask.shape == padded.image.shape[:3]
    assert torch.equal(padded.image[inside], image)
    new = torch.ones_like(padded.mask, dtype=torch.bool)
    new[inside] = False
    assert (padded.mask[new] == 1).all()
    assert (padded.mask[~new] < 1).all()
    assert padded.mask.min() >= 0


@settings(max_examples=40)
@given(st.integers(1, 20), st.integers(1, 20), sides, st.integers(0, 30))
def test_padding_commutes_with_flips(height, width, padding, feather):
    image = picture(height, width)
    mirrored = Padding(padding.right, padding.top, padding.left, padding.bottom)
    straight, flipped = pad(image, padding, feather), pad(image.flip(2), mirrored, feather)
    assert torch.equal(flipped.image.flip(2), straight.image)
    assert torch.equal(flipped.mask.flip(2), straight.mask)


def test_feather_falls_from_the_seam_over_that_many_pixels():
    mask = pad(picture(64, 200), Padding(right=128), feather=40).mask[0]
    row = mask[32]
    assert (row[200:] == 1).all()
    ramp = row[160:200]
    assert (ramp > 0).all()
    assert (ramp < 1).all()
    assert (ramp[1:] > ramp[:-1]).all()
    assert not row[:160].any()
    assert (mask == row).all()
    # half-way in, half of the original is kept
    assert 0.5 * (ramp[19] + ramp[20]) == pytest.approx(0.5, abs=0.02)


def test_feather_only_reaches_in_from_padded_sides():
    mask = pad(picture(100, 100), Padding(left=10, bottom=20), feather=15).mask[0]
    original = mask[:100, 10:]
    assert not original[:80, 20:].any()
    assert (original[:50, 0] > 0).all()
    assert (original[-1, 50:] > 0).all()
    assert not original[0, 20:].any()
    assert not original[:80, -1].any()


@pytest.mark.parametrize(("height", "width"), [(64, 512), (16, 512), (1, 512)])
def test_feather_does_not_vanish_when_the_picture_is_low(height, width):
    row = pad(picture(height, width), Padding(right=128), feather=40).mask[0, 0]
    assert (row[width - 40 : width] > 0).all()
    assert not row[: width - 40].any()


@pytest.mark.parametrize("feather", [10, 40, 400])
def test_feather_gets_what_fits_of_a_small_picture(feather):
    one_side = pad(picture(20, 20), Padding(right=8), feather).mask[0, 0, :20]
    assert one_side[-1] > 0.5
    assert (one_side[1:] >= one_side[:-1]).all()
    assert (one_side > 0).sum() == min(feather, 20)
    both = pad(picture(20, 20), Padding(left=8, right=8), feather).mask[0, 0, 8:28]
    assert both[0] == both[-1] > 0.5
    assert (both > 0).sum() == min(2 * feather, 20)
    assert both[9] < 0.1
    assert both[10] < 0.1


def test_feather_is_smooth_around_corners():
    mask = pad(picture(120, 120), Padding(30, 30, 30, 30), feather=40).mask[0]
    steepest = 1.5 / 41
    assert (mask[1:] - mask[:-1]).abs().max() <= steepest + 1e-6
    assert (mask[:, 1:] - mask[:, :-1]).abs().max() <= steepest + 1e-6


def test_no_feather_gives_a_hard_mask():
    mask = pad(picture(), Padding(left=5, bottom=3)).mask
    assert set(mask.unique().tolist()) == {0.0, 1.0}
    assert mask.sum() == 5 * 43 + 3 * 60


def test_no_padding_gives_the_picture_back_under_an_empty_mask():
    image = picture()
    padded = pad(image, Padding(), feather=40)
    assert torch.equal(padded.image, image)
    assert not padded.mask.any()


@pytest.mark.parametrize("method", list(FillMethod))
def test_any_fill_can_make_the_new_area_and_leaves_the_old(method):
    image = 0.4 + 0.2 * picture(batch=2)
    padded = pad(image, Padding(12, 0, 9, 5), feather=8, method=method)
    assert torch.equal(padded.image[:, :40, 12:72], image)
    new = torch.ones(45, 81, dtype=torch.bool)
    new[:40, 12:72] = False
    # PatchMatch may overshoot a little on noise
    assert padded.image[:, new].min() >= 0.3
    assert padded.image[:, new].max() <= 0.7
    assert torch.equal(padded.mask, pad(image, Padding(12, 0, 9, 5), feather=8).mask)


def test_the_edge_fill_of_a_canvas_is_the_edge_fill_of_a_hole():

    image = picture()
    padded = pad(image, Padding(4, 6, 3, 5))
    hole = torch.ones_like(padded.mask)
    hole[:, 6:46, 4:64] = 0
    assert torch.equal(
        fill(
            torch.rand_like(padded.image) * hole[..., None] + padded.image * (1 - hole[..., None]),
            hole,
            FillMethod.EDGE,
        ),
        padded.image,
    )


def test_alpha_is_repeated_at_the_edges():
    image = picture(channels=4)
    padded = pad(image, Padding(right=10))
    assert torch.equal(padded.image[:, :, 60:], image[:, :, -1:].expand(-1, -1, 10, -1))


@pytest.mark.parametrize("side", ["left", "top", "right", "bottom"])
def test_negative_padding_is_refused_with_the_name_of_the_side(side):
    with pytest.raises(InputError, match=f"{side} is -8"):
        Padding(**{side: -8})


def test_a_negative_feather_is_refused():
    with pytest.raises(InputError, match="feather is -1"):
        pad(picture(), Padding(left=4), feather=-1)


def test_a_canvas_that_would_take_the_machine_down_is_refused():
    with pytest.raises(InputError, match="The result would be 32776x16392"):
        pad(torch.zeros(1, 8, 8, 3), Padding(16384, 16384, 16384, 0))
    with pytest.raises(InputError, match=r"16008x16008.*134 megapixels"):
        pad(torch.zeros(1, 8, 8, 3), Padding(left=16000, top=16000))
