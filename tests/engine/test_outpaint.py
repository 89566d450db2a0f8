"""Padding: the picture keeps its pixels, and the mask leads into it without a step."""

import numpy as np
import pytest
import torch
from comfyui_mend.engine.fill import NETWORKS, FillMethod, fill
from comfyui_mend.engine.outpaint import (
    Anchor,
    Aspect,
    Fitting,
    Length,
    Padding,
    Room,
    Unit,
    aspect_size,
    make_room,
    pad,
    parse_target,
    to_multiple,
    to_size,
)
from comfyui_mend.engine.tiles import Window
from comfyui_mend.engine.types import Box, InputError, Size
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


@pytest.mark.parametrize("method", [method for method in FillMethod if method not in NETWORKS])
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


class Painter:
    """A network that paints green."""

    name, architecture, window = "green.safetensors", "LaMa", Window(1536 * 1024, 8)

    def fill(self, pixels, hole, seed):
        return np.broadcast_to(np.float32([0, 1, 0]), pixels.shape).copy()


def test_a_network_fills_the_new_area_and_is_asked_for_where_it_is_missing():
    padded = pad(picture(), Padding(left=10), method=FillMethod.LAMA, network=Painter())
    assert torch.allclose(padded.image[:, :, :10], torch.tensor([0.0, 1.0, 0.0]), atol=1e-5)
    assert torch.equal(padded.image[:, :, 10:], picture())
    with pytest.raises(InputError, match='The fill method "lama" needs its network'):
        pad(picture(), Padding(left=10), method=FillMethod.LAMA)


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


mixed = st.builds(Padding, *[st.sampled_from([-9, -1, 0, 1, 7, 20])] * 4)


@settings(max_examples=60)
@given(st.integers(20, 40), st.integers(20, 40), mixed, st.integers(0, 30))
def test_sides_that_are_negative_cut_and_the_others_add(height, width, padding, feather):
    image = picture(height, width, batch=2)
    padded = pad(image, padding, feather)
    cut = image[
        :,
        max(-padding.top, 0) : height - max(-padding.bottom, 0),
        max(-padding.left, 0) : width - max(-padding.right, 0),
    ]
    assert padded.image.shape[1:3] == (height + padding.top + padding.bottom, width + padding.left + padding.right)
    assert torch.equal(padded.image[:, padded.box.rows, padded.box.columns], cut)
    # it is the cut picture, padded
    alone = pad(cut, padding.added, feather)
    assert torch.equal(padded.image, alone.image) and torch.equal(padded.mask, alone.mask)


def test_a_cut_side_has_no_feather():
    padded = pad(picture(), Padding(left=-10, right=20), feather=8)
    assert padded.image.shape == (1, 40, 70, 3)
    assert padded.box == Box(0, 0, 50, 40)
    row = padded.mask[0, 0]
    assert not row[:42].any() and (row[42:50] > 0).all() and (row[50:] == 1).all()


@pytest.mark.parametrize("padding", [Padding(left=-60), Padding(left=-30, right=-30), Padding(top=-39, bottom=-1)])
def test_cutting_the_whole_picture_is_refused(padding):
    with pytest.raises(InputError, match="leaves nothing of it; cut less"):
        pad(picture(), padding)


@settings(max_examples=40)
@given(st.integers(10, 20), st.integers(10, 20), st.builds(Padding, *[st.integers(-3, 20)] * 4), st.integers(0, 30))
def test_padding_commutes_with_transposition(height, width, padding, feather):
    image = picture(height, width)
    turned = Padding(padding.top, padding.left, padding.bottom, padding.right)
    straight, transposed = pad(image, padding, feather), pad(image.transpose(1, 2), turned, feather)
    assert torch.equal(transposed.image.transpose(1, 2), straight.image)
    assert torch.equal(transposed.mask.transpose(1, 2), straight.mask)


def test_a_batch_is_padded_as_each_picture_alone():
    image = picture(batch=3)
    together = pad(image, Padding(5, -3, 8, 2), 12)
    for index in range(3):
        alone = pad(image[index : index + 1], Padding(5, -3, 8, 2), 12)
        assert torch.equal(together.image[index], alone.image[0]) and torch.equal(together.mask[index], alone.mask[0])


@pytest.mark.parametrize(
    ("size", "padding", "feather", "notices"),
    [
        ((512, 64), Padding(right=128), 40, []),
        ((20, 64), Padding(right=128), 40, ["40 pixels, but the picture is only 20 wide: 20 were used"]),
        ((60, 64), Padding(8, 0, 8, 0), 40, ["only 60 wide and grows on both sides: 30 were used"]),
        ((20, 30), Padding(8, 8, 8, 0), 40, ["only 20 wide and grows on both sides: 10", "only 30 high: 30"]),
        ((60, 20), Padding(left=8), 40, []),
        ((20, 20), Padding(), 40, []),
        ((50, 20), Padding(left=-30, right=8), 40, ["only 20 wide: 20"]),
    ],
)
def test_a_feather_that_had_to_shrink_is_said(size, padding, feather, notices):
    found = pad(picture(size[1], size[0]), padding, feather).notices
    assert len(found) == len(notices)
    assert all(part in notice for part, notice in zip(notices, found, strict=True))


def test_percent_are_of_the_side_they_lie_on_and_round_alike_on_both():
    room = Room(
        left=Length(50, Unit.PERCENT), top=Length(20, Unit.PERCENT), bottom=Length(-20, Unit.PERCENT), right=Length(3)
    )
    assert room.place(Size(201, 96)).padding == Padding(101, 19, 3, -19)
    assert Length(-50, Unit.PERCENT).pixels(201) == -101
    with pytest.raises(InputError, match="A length is nan"):
        Length(float("nan"), Unit.PERCENT).pixels(10)


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("1024x768", Size(1024, 768)),
        (" 1024 × 768", Size(1024, 768)),
        ("640X480", Size(640, 480)),
        ("16:9", Aspect(16, 9)),
        ("2.39:1", Aspect(2.39, 1)),
        ("3/2", Aspect(3, 2)),
        ("  ", None),
    ],
)
def test_a_target_is_a_size_or_an_aspect_ratio(text, target):
    found = parse_target(text)
    assert found == target and type(found) is type(target)


@pytest.mark.parametrize("text", ["1024", "16:0", "0x768", "wide", "10.5x20", "-4:3", "16:9:1", "9" * 400 + ":1"])
def test_another_target_is_refused(text):
    with pytest.raises(InputError, match="give a size like 1024x768 or an aspect ratio like 16:9"):
        parse_target(text)


@pytest.mark.parametrize(
    ("anchor", "padding"),
    [
        (Anchor.TOP_LEFT, Padding(right=41, bottom=21)),
        (Anchor.TOP, Padding(left=20, right=21, bottom=21)),
        (Anchor.TOP_RIGHT, Padding(left=41, bottom=21)),
        (Anchor.LEFT, Padding(top=10, right=41, bottom=11)),
        (Anchor.CENTER, Padding(20, 10, 21, 11)),
        (Anchor.RIGHT, Padding(left=41, top=10, bottom=11)),
        (Anchor.BOTTOM_LEFT, Padding(top=21, right=41)),
        (Anchor.BOTTOM, Padding(left=20, top=21, right=21)),
        (Anchor.BOTTOM_RIGHT, Padding(left=41, top=21)),
    ],
)
def test_the_picture_stays_at_its_anchor_and_right_and_bottom_take_the_odd_pixel(anchor, padding):
    assert to_size(Size(60, 40), Size(101, 61), anchor) == padding
    room = Room(target=Size(101, 61), anchor=anchor)
    assert make_room(picture(), room).image.shape == (1, 61, 101, 3)


@settings(max_examples=60)
@given(
    st.builds(Size, st.integers(1, 300), st.integers(1, 300)),
    st.builds(Size, st.integers(1, 400), st.integers(1, 400)),
    st.sampled_from(Anchor),
)
def test_a_target_size_is_met_exactly(size, target, anchor):
    fitted = Room(target=target, anchor=anchor, fitting=Fitting.FIT).place(size).padding
    assert fitted == fitted.added
    for fitting in Fitting:
        if fitting is Fitting.EXTEND and (size.width > target.width or size.height > target.height):
            with pytest.raises(InputError, match=f"The picture is {size}, which does not fit into {target}"):
                Room(target=target, anchor=anchor).place(size)
            continue
        scaled, padding = Room(target=target, anchor=anchor, fitting=fitting).place(size)
        assert padding.canvas(scaled) == target


@settings(max_examples=60)
@given(st.builds(Size, st.integers(8, 300), st.integers(8, 300)), st.integers(1, 21), st.integers(1, 21))
def test_an_aspect_ratio_is_met_to_the_pixel(size, width, height):
    aspect = Aspect(width, height)
    extended = aspect_size(size, aspect)
    assert extended.width >= size.width and extended.height >= size.height
    # one side stays, and the other is the nearest to the ratio
    assert extended.width == size.width or extended.height == size.height
    assert abs(extended.width - extended.height * aspect.ratio) <= 0.5 * max(1, aspect.ratio)
    cropped = aspect_size(size, aspect, Fitting.CROP)
    assert cropped.width == max(round((size.width * size.height * aspect.ratio) ** 0.5), 1)
    assert cropped.height == max(round((size.width * size.height / aspect.ratio) ** 0.5), 1)


def test_an_aspect_ratio_with_cropping_keeps_the_area():
    assert Room(target=Aspect(16, 9), fitting=Fitting.CROP).place(Size(1000, 1000)).padding == Padding(
        166, -125, 167, -125
    )
    assert Room(target=Aspect(16, 9)).place(Size(1000, 1000)).padding == Padding(389, 0, 389, 0)
    assert Room(target=Aspect(1, 1), anchor=Anchor.BOTTOM).place(Size(160, 90)).padding == Padding(top=70)


def test_fitting_scales_the_picture_first():
    image = picture(40, 60)
    padded = make_room(image, Room(target=Size(120, 120), fitting=Fitting.FIT), feather=4)
    assert padded.box == Box(0, 20, 120, 100)
    assert padded.image.shape == (1, 120, 120, 3)
    assert padded.image[0, 20:100].mean() == pytest.approx(float(image.mean()), abs=0.01)
    tiny = Room(target=Size(4, 300), fitting=Fitting.FIT).place(Size(600, 2))
    assert tiny.scaled == Size(4, 1)


@pytest.mark.parametrize(
    ("padding", "expected"),
    [
        (Padding(), Padding(1, 3, 2, 3)),
        (Padding(left=10), Padding(11, 3, 0, 3)),
        (Padding(right=2), Padding(0, 3, 3, 3)),
        (Padding(left=10, right=2, top=6), Padding(13, 6, 6, 0)),
        (Padding(left=-4), Padding(-1, 3, 4, 3)),
    ],
)
def test_a_multiple_is_reached_on_the_sides_that_grow(padding, expected):
    found = to_multiple(Size(61, 42), padding, 8)
    canvas = found.canvas(Size(61, 42))
    assert canvas.width % 8 == 0 and canvas.height % 8 == 0
    assert found == expected


@settings(max_examples=60)
@given(st.builds(Size, st.integers(30, 99), st.integers(30, 99)), mixed, st.integers(1, 64), st.sampled_from(Anchor))
def test_a_multiple_takes_less_than_itself(size, padding, multiple, anchor):
    found = to_multiple(size, padding, multiple, anchor)
    more = found - padding
    assert min(more.sides) >= 0
    assert more.left + more.right < multiple and more.top + more.bottom < multiple
    canvas = found.canvas(size)
    assert canvas.width % multiple == 0 and canvas.height % multiple == 0


def test_both_a_side_and_a_target_are_refused():
    with pytest.raises(InputError, match=r"left is 20% and the target is 16:9; set the sides to 0"):
        Room(left=Length(20, Unit.PERCENT), target=Aspect(16, 9))
    with pytest.raises(InputError, match="multiple is 0"):
        Room(multiple=0)


def test_a_target_no_machine_holds_is_refused():
    with pytest.raises(InputError, match="The result would be 999999x999999"):
        Room(target=Size(999999, 999999)).place(Size(100, 100))
    with pytest.raises(InputError, match="at most 16384 pixels a side"):
        Room(target=Aspect(999999, 1)).place(Size(100, 100))
    with pytest.raises(InputError, match="left is"):
        Room(left=Length(999999)).place(Size(100, 100))


def test_a_negative_feather_is_refused():
    with pytest.raises(InputError, match="feather is -1"):
        pad(picture(), Padding(left=4), feather=-1)


def test_a_canvas_that_would_take_the_machine_down_is_refused():
    with pytest.raises(InputError, match="The result would be 32776x16392"):
        pad(torch.zeros(1, 8, 8, 3), Padding(16384, 16384, 16384, 0))
    with pytest.raises(InputError, match=r"16008x16008.*134 megapixels"):
        pad(torch.zeros(1, 8, 8, 3), Padding(left=16000, top=16000))
