"""Masks from pictures, and from each other."""

import io

import numpy as np
import pytest
import torch
from comfyui_mend.engine import morphology
from comfyui_mend.engine.mask_sources import (
    ColorDistance,
    Operation,
    combine,
    from_alpha,
    from_color,
    from_difference,
    parse_color,
)
from comfyui_mend.engine.registration import Shift, apply_shift
from comfyui_mend.engine.types import InputError
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from skimage import color, data

few = settings(max_examples=40)


@pytest.fixture(params=["opencv", "scipy"], autouse=True)
def backend(request, monkeypatch):
    if request.param == "scipy":
        monkeypatch.setattr(morphology, "opencv", lambda: None)


def to_image(picture):
    return torch.from_numpy(np.asarray(picture).astype(np.float32) / 255)[None]


def photo():
    return Image.fromarray(data.coffee()[60:260, 100:400])


# --- alpha


def test_transparent_is_masked_and_half_transparent_half():
    image = torch.rand(2, 5, 7, 4)
    image[..., 3] = torch.linspace(0, 1, 7)
    assert torch.equal(from_alpha(image), 1 - image[..., 3])
    assert torch.equal(from_alpha(image[0]), from_alpha(image)[:1])


def test_a_picture_without_alpha_says_where_to_get_it():
    with pytest.raises(InputError, match=r"no alpha channel.*mask output of Load Image"):
        from_alpha(torch.rand(1, 5, 7, 3))


# --- colour


@pytest.mark.parametrize(
    ("text", "srgb"),
    [("#ff8000", (255, 128, 0)), ("#f80", (255, 136, 0)), (" Gold ", (255, 215, 0)), ("rgb(1, 2, 3)", (1, 2, 3))],
)
def test_colours_are_read_as_people_write_them(text, srgb):
    assert parse_color(text) == tuple(value / 255 for value in srgb)


@pytest.mark.parametrize("text", ["", "grren", "#12345", "12,3,4", "#gggggg"])
def test_what_is_no_colour_is_quoted(text):
    with pytest.raises(InputError, match="is no colour; give one as #rrggbb"):
        parse_color(text)


def test_tolerance_is_delta_e_in_lab():
    image = to_image(photo())
    wanted = np.array([200, 120, 60]) / 255
    away = np.linalg.norm(color.rgb2lab(image[0].numpy()) - color.rgb2lab(wanted), axis=-1)
    mask = from_color(image, "#c8783c", tolerance=18)[0].numpy()
    clear = np.abs(away - 18) > 0.05
    assert np.array_equal(mask[clear] == 1, away[clear] < 18)
    assert 0.02 < mask.mean() < 0.9


def test_black_and_white_are_a_hundred_apart_by_either_distance():
    image = torch.ones(1, 2, 2, 3)
    for distance in ColorDistance:
        assert not from_color(image, "black", 99.9, distance=distance).any()
        assert from_color(image, "black", 100, distance=distance).all()


def test_the_colour_itself_is_marked_without_any_tolerance():
    picture = Image.new("RGB", (9, 9), "#123456")
    picture.putpixel((4, 4), (0x12, 0x34, 0x58))
    for distance in ColorDistance:
        mask = from_color(to_image(picture), "#123456", 0, distance=distance)
        assert mask.sum() == 80 and mask[0, 4, 4] == 0


def test_softness_fades_from_the_tolerance_on():
    grey = torch.linspace(0, 1, 101)[None, None, :, None].expand(1, 1, 101, 3)
    mask = from_color(grey, "black", 20, 40, ColorDistance.RGB)[0, 0]
    assert torch.allclose(mask, (1 - (torch.arange(101.0) - 20) / 40).clamp(0, 1), atol=1e-4)


@few
@given(st.floats(0, 50), st.floats(0, 50), st.floats(0, 50), st.sampled_from(ColorDistance))
def test_more_tolerance_or_softness_marks_more(tolerance, more, softness, distance):
    image = torch.rand(2, 6, 7, 4, generator=torch.Generator().manual_seed(1))
    less = from_color(image, "orange", tolerance, softness, distance)
    assert (less <= from_color(image, "orange", tolerance + more, softness, distance)).all()
    assert (from_color(image, "orange", tolerance, 0, distance) <= less).all()
    assert less.shape == (2, 6, 7) and less.min() >= 0 and less.max() <= 1


# --- difference


def edited():
    """The photograph with a disk and a line painted in, and where they are."""
    picture, truth = photo(), Image.new("L", (300, 200))
    for target, disk, line in ((picture, (200, 30, 30), (30, 30, 200)), (truth, 255, 255)):
        pen = ImageDraw.Draw(target)
        pen.ellipse((150, 30, 220, 100), fill=disk)
        pen.line((20, 150, 120, 170), fill=line, width=5)
    changed = np.abs(np.asarray(picture).astype(int) - np.asarray(photo())).sum(axis=-1) > 60
    return picture, changed & (np.asarray(truth) > 0)


def jpeg(picture, quality):
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return Image.open(io.BytesIO(buffer.getvalue()))


@pytest.mark.parametrize("quality", [70, 90])
def test_an_edit_is_found_through_jpeg_noise(quality):
    picture, truth = edited()
    mask = from_difference(to_image(photo()), to_image(jpeg(picture, quality)))[0].numpy() == 1
    assert mask[truth].mean() > 0.995
    far = morphology.grow(truth.astype(np.float32), 4) == 0
    assert mask[far].mean() < 0.002
    plain = from_difference(to_image(photo()), to_image(jpeg(picture, quality)), noise=0)[0].numpy() == 1
    assert plain[far].mean() > 4 * mask[far].mean()


def test_an_edit_is_found_through_the_blur_and_grain_of_an_autoencoder():
    picture, truth = edited()
    small = picture.resize((150, 100), Image.Resampling.LANCZOS).resize(picture.size, Image.Resampling.BICUBIC)
    grain = np.random.default_rng(0).normal(0, 3, (200, 300, 3))
    after = torch.from_numpy(np.clip(np.asarray(small) + grain, 0, 255).astype(np.float32) / 255)[None]
    mask = from_difference(to_image(photo()), after)[0].numpy() == 1
    assert mask[truth].mean() > 0.99
    assert mask[morphology.grow(truth.astype(np.float32), 4) == 0].mean() < 0.005


@pytest.mark.parametrize(("dx", "dy"), [(3, -2), (1.6, 0.7)])
def test_an_edit_is_found_in_a_picture_that_was_moved(dx, dy):
    picture, where = edited()
    moved = apply_shift(to_image(picture), Shift(dx, dy))
    plain = from_difference(to_image(photo()), moved)[0].numpy() == 1
    found = from_difference(to_image(photo()), moved, register=True)[0].numpy() == 1
    assert plain[~where].mean() > 0.03
    assert found[where].mean() > 0.9 and found[~where].mean() < 0.01
    unrelated = torch.rand(to_image(picture).shape)
    assert torch.equal(
        from_difference(to_image(photo()), unrelated), from_difference(to_image(photo()), unrelated, register=True)
    )


def test_equal_pictures_have_no_difference_and_one_pixel_is_seen_without_noise_suppression():
    before = to_image(photo())
    after = before.clone()
    assert not from_difference(before, after, 0, 0).any()
    after[0, 50, 60] = (after[0, 50, 60] + 0.3).clamp(max=1)
    assert from_difference(before, after, 10, 0).sum() == 1
    assert not from_difference(before, after, 10, 2).any()


def test_order_does_not_matter_and_a_batch_is_its_pictures():
    before = to_image(photo())
    after = torch.cat([to_image(edited()[0]), before.flip(2)])
    mask = from_difference(before, after)
    assert torch.equal(mask, from_difference(after, before))
    assert torch.equal(mask, torch.cat([from_difference(before, one[None]) for one in after]))


def test_what_became_transparent_has_changed():
    before = torch.full((1, 20, 20, 4), 0.5)
    before[..., 3] = 1
    after = before.clone()
    after[:, 5:15, 5:15, 3] = 0
    assert from_difference(before, after, noise=0).sum() == 100


def test_pictures_that_cannot_be_compared_are_named():
    with pytest.raises(InputError, match="7x5 and the second 8x5; resize one"):
        from_difference(torch.rand(1, 5, 7, 3), torch.rand(1, 5, 8, 3))
    with pytest.raises(InputError, match="2 and 3 pictures"):
        from_difference(torch.rand(2, 5, 7, 3), torch.rand(3, 5, 7, 3))
    for wrong in ({"tolerance": -1}, {"tolerance": 101}, {"noise": 17}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            from_difference(torch.rand(1, 5, 7, 3), torch.rand(1, 5, 7, 3), **wrong)


# --- combining

masks = st.integers(0, 10**6).map(
    lambda seed: (torch.rand(2, 5, 6, generator=torch.Generator().manual_seed(seed)) * 8).round() / 8
)
COMMUTING = [operation for operation in Operation if operation is not Operation.SUBTRACT]


@few
@given(masks, masks, st.sampled_from(COMMUTING))
def test_all_but_subtraction_commute(a, b, operation):
    assert torch.equal(combine(a, b, operation), combine(b, a, operation))


@few
@given(masks)
def test_empty_and_full_masks_are_the_identities(mask):
    empty, full = torch.zeros(1, 5, 6), torch.ones(1, 5, 6)
    for operation in (Operation.ADD, Operation.SUBTRACT, Operation.OR, Operation.XOR):
        assert torch.equal(combine(mask, empty, operation), mask)
    assert torch.equal(combine(mask, full, Operation.AND), mask)
    assert torch.equal(combine(mask, full, Operation.XOR), 1 - mask)
    assert not combine(mask, mask, Operation.XOR).any()
    assert not combine(mask, mask, Operation.SUBTRACT).any()


@few
@given(masks, masks)
def test_black_and_white_masks_follow_the_truth_tables(a, b):
    first, second = a > 0.5, b > 0.5
    expected = {
        Operation.ADD: first | second,
        Operation.SUBTRACT: first & ~second,
        Operation.AND: first & second,
        Operation.OR: first | second,
        Operation.XOR: first ^ second,
    }
    for operation, truth in expected.items():
        assert torch.equal(combine(first.float(), second.float(), operation), truth.float())


@few
@given(masks, masks)
def test_greys_stay_in_range_and_and_subtract_add_back_up(a, b):
    for operation in Operation:
        combined = combine(a, b, operation)
        assert combined.min() >= 0 and combined.max() <= 1
    assert torch.equal(combine(combine(a, b, Operation.SUBTRACT), combine(a, b, Operation.AND), Operation.ADD), a)


def test_one_mask_combines_with_many_either_way_round():
    one, many = torch.rand(1, 5, 6), torch.rand(3, 5, 6)
    for operation in Operation:
        assert torch.equal(combine(one, many, operation)[1:2], combine(one, many[1:2], operation))
        assert torch.equal(combine(many, one, operation)[2:], combine(many[2:], one, operation))
    with pytest.raises(InputError, match="2 and 3 masks"):
        combine(many[:2], many, Operation.ADD)


def test_a_mask_of_another_size_is_resized_and_of_another_shape_refused():
    assert combine(torch.zeros(1, 40, 60), torch.ones(1, 20, 30), Operation.OR).shape == (1, 40, 60)
    with pytest.raises(InputError, match="60x40 and the second 64x64"):
        combine(torch.zeros(1, 40, 60), torch.zeros(1, 64, 64), Operation.OR)
