"""Colour spaces, CIEDE2000 and colour match."""

import pytest
import torch
from comfyui_mend.engine.color import (
    FLAT,
    ApplyTo,
    ColorMatch,
    delta_e_2000,
    lab_to_srgb,
    lab_to_xyz,
    linear_to_srgb,
    linear_to_xyz,
    match_around,
    match_color,
    srgb_to_lab,
    srgb_to_linear,
    xyz_to_lab,
    xyz_to_linear,
)
from comfyui_mend.engine.types import InputError
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage import color as skimage_color
from skimage import data

few = settings(max_examples=25)
methods = pytest.mark.parametrize("method", ColorMatch)

SHARMA = [  # L1 a1 b1, L2 a2 b2, difference: the paper's table 1
    (50.0, 2.6772, -79.7751, 50.0, 0.0, -82.7485, 2.0425),
    (50.0, 3.1571, -77.2803, 50.0, 0.0, -82.7485, 2.8615),
    (50.0, 2.8361, -74.02, 50.0, 0.0, -82.7485, 3.4412),
    (50.0, -1.3802, -84.2814, 50.0, 0.0, -82.7485, 1.0),
    (50.0, -1.1848, -84.8006, 50.0, 0.0, -82.7485, 1.0),
    (50.0, -0.9009, -85.5211, 50.0, 0.0, -82.7485, 1.0),
    (50.0, 0.0, 0.0, 50.0, -1.0, 2.0, 2.3669),
    (50.0, -1.0, 2.0, 50.0, 0.0, 0.0, 2.3669),
    (50.0, 2.49, -0.001, 50.0, -2.49, 0.0009, 7.1792),
    (50.0, 2.49, -0.001, 50.0, -2.49, 0.001, 7.1792),
    (50.0, 2.49, -0.001, 50.0, -2.49, 0.0011, 7.2195),
    (50.0, 2.49, -0.001, 50.0, -2.49, 0.0012, 7.2195),
    (50.0, -0.001, 2.49, 50.0, 0.0009, -2.49, 4.8045),
    (50.0, -0.001, 2.49, 50.0, 0.001, -2.49, 4.8045),
    (50.0, -0.001, 2.49, 50.0, 0.0011, -2.49, 4.7461),
    (50.0, 2.5, 0.0, 50.0, 0.0, -2.5, 4.3065),
    (50.0, 2.5, 0.0, 73.0, 25.0, -18.0, 27.1492),
    (50.0, 2.5, 0.0, 61.0, -5.0, 29.0, 22.8977),
    (50.0, 2.5, 0.0, 56.0, -27.0, -3.0, 31.903),
    (50.0, 2.5, 0.0, 58.0, 24.0, 15.0, 19.4535),
    (50.0, 2.5, 0.0, 50.0, 3.1736, 0.5854, 1.0),
    (50.0, 2.5, 0.0, 50.0, 3.2972, 0.0, 1.0),
    (50.0, 2.5, 0.0, 50.0, 1.8634, 0.5757, 1.0),
    (50.0, 2.5, 0.0, 50.0, 3.2592, 0.335, 1.0),
    (60.2574, -34.0099, 36.2677, 60.4626, -34.1751, 39.4387, 1.2644),
    (63.0109, -31.0961, -5.8663, 62.8187, -29.7946, -4.0864, 1.263),
    (61.2901, 3.7196, -5.3901, 61.4292, 2.248, -4.962, 1.8731),
    (35.0831, -44.1164, 3.7933, 35.0232, -40.0716, 1.5901, 1.8645),
    (22.7233, 20.0904, -46.694, 23.0331, 14.973, -42.5619, 2.0373),
    (36.4612, 47.858, 18.3852, 36.2715, 50.5065, 21.2231, 1.4146),
    (90.8027, -2.0831, 1.441, 91.1528, -1.6435, 0.0447, 1.4441),
    (90.9257, -0.5406, -0.9208, 88.6381, -0.8985, -0.7239, 1.5381),
    (6.7747, -0.2908, -2.4247, 5.8714, -0.0985, -2.2286, 0.6377),
    (2.0776, 0.0795, -1.135, 0.9033, -0.0636, -0.5514, 0.9082),
]


def noise(*shape, seed=0, low=0.0, high=1.0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * (high - low) + low


def photo(name):
    return torch.from_numpy(getattr(data, name)()).float()[None, ::3, ::3] / 255


def left(share, width=64, height=48):
    mask = torch.zeros(1, height, width)
    mask[..., : round(width * share)] = 1
    return mask


# --- colour spaces


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_conversion_comes_back(dtype):
    steps = torch.linspace(0, 1, 33, dtype=dtype)
    srgb = torch.cartesian_prod(steps, steps, steps)
    linear = srgb_to_linear(srgb)
    xyz = linear_to_xyz(linear)
    lab = xyz_to_lab(xyz)
    assert srgb.dtype == linear.dtype == xyz.dtype == lab.dtype == dtype
    pairs = [
        (linear_to_srgb(linear), srgb),
        (xyz_to_linear(xyz), linear),
        (lab_to_xyz(lab), xyz),
        (lab_to_srgb(srgb_to_lab(srgb)), srgb),
    ]
    assert all((there - here).abs().max() < 1e-5 for there, here in pairs)


def test_conversions_agree_with_scikit_image():
    srgb = noise(40, 30, 3).double()
    array = srgb.numpy()
    # its matrix has six digits and does not quite give its own white
    assert abs(skimage_color.rgb2xyz(array) - linear_to_xyz(srgb_to_linear(srgb)).numpy()).max() < 2e-4
    assert abs(skimage_color.rgb2lab(array) - srgb_to_lab(srgb).numpy()).max() < 0.02


def test_white_black_and_greys_are_neutral():
    grey = torch.linspace(0, 1, 50, dtype=torch.float64)[:, None].expand(-1, 3)
    lab = srgb_to_lab(grey)
    assert lab[:, 1:].abs().max() < 1e-9
    assert lab[0].abs().max() < 1e-9 and abs(float(lab[-1, 0]) - 100) < 1e-9
    assert (lab[1:, 0] > lab[:-1, 0]).all()


def test_ciede2000_gives_the_papers_table():
    table = torch.tensor(SHARMA, dtype=torch.float64)
    assert len(table) == 34
    difference = delta_e_2000(table[:, :3], table[:, 3:6])
    backwards = delta_e_2000(table[:, 3:6], table[:, :3])
    wrong = [
        index
        for index, (ours, other, paper) in enumerate(zip(difference, backwards, table[:, 6], strict=True))
        if abs(ours - paper) > 5e-5 or abs(other - paper) > 5e-5
    ]
    # pair 14 has opposite hues, where the formula jumps and the last bit decides
    assert set(wrong) <= {13}
    assert min(abs(difference[13] - value) for value in (4.8045, 4.7461)) < 5e-5


def test_ciede2000_agrees_with_scikit_image():
    first = noise(2000, 3).double() * torch.tensor([100, 200, 200]) - torch.tensor([0, 100, 100])
    second = first + (noise(2000, 3, seed=1) - 0.5) * 20
    expected = skimage_color.deltaE_ciede2000(first.numpy(), second.numpy())
    assert abs(delta_e_2000(first, second).numpy() - expected).max() < 1e-5
    assert delta_e_2000(first, first).abs().max() == 0


# --- colour match


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("excluded", [0, 0.5, 0.9])
@methods
def test_contrast_and_tint_are_taken_off_whatever_is_excluded(method, excluded, seed):
    reference = noise(1, 256, 256, 3, seed=seed, low=0.25, high=0.75)
    mask = torch.zeros(1, 256, 256)
    mask[:, : int(256 * excluded)] = 1
    kept = mask[0] == 0
    faded = (reference - 0.5) * 0.8 + 0.5
    tinted = reference + torch.tensor([0.06, 0, -0.06])
    for changed, bound in ((faded, 0.7), (tinted, 2.2)):
        matched = match_around(changed, reference, mask, method)
        assert (matched - reference)[0][kept].abs().mean() * 255 < bound


@methods
def test_what_weighs_nothing_cannot_move_a_bit(method):
    images, reference, mask = photo("chelsea")[:, :48, :64], photo("coffee")[:, :48, :64], left(0.5)
    matched = match_color(images, reference, method, weight=1 - mask, reference_weight=1 - mask)
    painted, painted_reference = images.clone(), reference.clone()
    painted[mask > 0], painted_reference[mask > 0] = torch.tensor([1.0, 0, 1]), noise(48 * 32, 3)
    other = match_color(painted, painted_reference, method, weight=1 - mask, reference_weight=1 - mask)
    kept = mask == 0
    assert torch.equal(matched[kept], other[kept])
    assert not torch.equal(matched[kept], images[kept])


@methods
def test_transparent_pixels_weigh_nothing(method):
    colors, reference = photo("chelsea")[:, :48, :64], photo("coffee")[:, :40, :40]
    alpha = 1 - left(0.4)[..., None]
    painted = torch.where(alpha == 0, 0.9, colors)
    matched, other = (match_color(torch.cat([c, alpha], dim=-1), reference, method) for c in (colors, painted))
    visible = alpha[..., 0] > 0
    assert torch.equal(matched[visible], other[visible])
    assert torch.equal(matched[..., 3:], alpha)


@methods
def test_a_weight_counts_like_repetition(method):
    images, reference = noise(1, 6, 8, 3, high=0.8), noise(1, 6, 8, 3, seed=1, low=0.3)
    weight = torch.ones(1, 6, 8)
    weight[:, :3] = 1 / 2
    repeated = torch.cat([images, images[:, 3:]], dim=1)
    by_weight = match_color(images, reference, method, weight=weight)
    assert torch.allclose(by_weight, match_color(repeated, reference, method)[:, :6], atol=1e-5)


@methods
def test_a_picture_in_its_own_colours_stays(method):
    images = photo("coffee")
    assert torch.allclose(match_color(images, images, method), images, atol=2e-5)


def test_each_method_gives_what_it_promises():
    images, reference = noise(1, 64, 64, 3, low=0.3, high=0.6), noise(1, 64, 64, 3, seed=1, low=0.4, high=0.7)
    reference = reference @ torch.tensor([[0.8, 0.2, 0], [0.1, 0.8, 0.1], [0, 0.3, 0.7]])

    def flat(tensor):
        return tensor.reshape(-1, 3).double()

    lab, wanted = (flat(srgb_to_lab(t)) for t in (match_color(images, reference, ColorMatch.REINHARD), reference))
    assert torch.allclose(lab.mean(0), wanted.mean(0), atol=1e-3)
    assert torch.allclose(lab.std(0), wanted.std(0), atol=1e-3)
    mkl = flat(match_color(images, reference, ColorMatch.MKL))
    assert torch.allclose(mkl.mean(0), flat(reference).mean(0), atol=1e-5)
    assert torch.allclose(mkl.T.cov(), flat(reference).T.cov(), atol=1e-6)
    histogram = flat(match_color(images, reference, ColorMatch.HISTOGRAM))
    assert torch.allclose(histogram.sort(dim=0).values, flat(reference).sort(dim=0).values, atol=1e-3)


def test_a_histogram_of_floats_has_no_bands():
    ramp = torch.linspace(0.2, 0.6, 4000)[None, None, :, None].expand(1, 2, -1, 3)
    matched = match_color(ramp, ramp**0.5, ColorMatch.HISTOGRAM)
    assert torch.allclose(matched, ramp**0.5, atol=1e-6)
    assert len(matched[0, 0, :, 0].unique()) == 4000


def test_a_histogram_keeps_the_order_of_values():
    ramp = torch.linspace(0, 1, 200)[None, None, :, None].expand(1, 1, -1, 3)
    weight = torch.zeros(1, 1, 200)
    weight[..., 60:140] = 1
    matched = match_color(ramp, photo("chelsea"), ColorMatch.HISTOGRAM, weight=weight)
    assert (matched[:, :, 1:] >= matched[:, :, :-1]).all()


@methods
def test_nothing_to_measure_gives_the_picture_back(method):
    images, reference = photo("coffee"), photo("chelsea")
    empty = torch.zeros(1, *images.shape[1:3])
    assert torch.equal(match_color(images, reference, method, weight=empty), images)
    assert torch.equal(match_around(images, images**2, 1 - empty, method), images)
    transparent = torch.cat([images, torch.zeros_like(images[..., :1])], dim=-1)
    assert torch.equal(match_color(images, transparent, method), images)


@methods
def test_flat_pictures_take_and_give_the_mean_alone(method):
    images, flat = photo("coffee"), torch.full((1, 5, 7, 3), 0.4)
    from_flat = match_color(images, flat, method)
    assert from_flat.isfinite().all()
    # the contrast of the photograph stays: nothing was there to be matched
    lab_spread = (srgb_to_lab(from_flat).std(dim=(0, 1, 2)), srgb_to_lab(images).std(dim=(0, 1, 2)))
    assert (lab_spread[0] > 0.5 * lab_spread[1]).all()
    to_photo = match_color(flat, images, method)
    assert to_photo.isfinite().all() and torch.allclose(to_photo, to_photo[:, :1, :1].expand_as(to_photo), atol=1e-6)
    one = noise(1, 1, 1, 3)
    assert torch.allclose(match_color(one, one, method), one, atol=1e-5)


@methods
def test_a_channel_that_is_all_equal_is_not_stretched(method):
    images = noise(1, 32, 32, 3)
    images[..., 2] = 0.5 + FLAT / 4 * (images[..., 2] - 0.5)
    matched = match_color(images, noise(1, 32, 32, 3, seed=1), method)
    assert matched.isfinite().all()
    if method is not ColorMatch.REINHARD:  # whose channels are not red, green and blue
        assert matched[..., 2].std() < 4 * FLAT


@methods
def test_strength_and_clamp_bound_the_change(method):
    images, reference = photo("coffee"), photo("chelsea")
    full = match_color(images, reference, method)
    assert torch.equal(match_color(images, reference, method, strength=0), images)
    half = match_color(images, reference, method, strength=0.5)
    inside = (full > 0) & (full < 1)
    assert torch.allclose(half[inside], ((images + full) / 2)[inside], atol=1e-6)
    clamped = match_color(images, reference, method, max_shift=0.05)
    assert (clamped - images).abs().max() <= 0.05 + 1e-6 < (full - images).abs().max()


@methods
def test_applied_to_the_mask_the_rest_stays_bit_identical(method):
    images, reference = (
        torch.cat([noise(1, 48, 64, 3), noise(1, 48, 64, 1, seed=9)], dim=-1),
        noise(1, 48, 64, 3, seed=1),
    )
    mask = left(0.5)
    mask[..., 20:32] = 0.5
    whole = match_around(images, reference**2, mask, method)
    part = match_around(images, reference**2, mask, method, apply_to=ApplyTo.MASK)
    assert torch.equal(part[mask == 0], images[mask == 0])
    assert torch.equal(part[mask == 1], whole[mask == 1])
    assert torch.equal(part[..., 3], images[..., 3])
    grey = mask == 0.5
    assert torch.allclose(part[grey], ((images + whole) / 2)[grey], atol=1e-6)


def test_a_reference_of_another_size_counts_whole():
    images, reference, mask = photo("coffee"), photo("chelsea")[:, :50, :70], left(0.5, 200, 134)
    expected = match_color(images, reference, weight=1 - mask)
    assert torch.equal(match_around(images, reference, mask), expected)


@methods
def test_a_batch_is_its_pictures_one_by_one(method):
    images, reference = noise(3, 9, 13, 3), noise(3, 9, 13, 3, seed=1) ** 2
    masks = (noise(3, 9, 13, seed=2) > 0.5).float()
    batch = match_around(images, reference, masks, method)
    for index in range(3):
        one = slice(index, index + 1)
        assert torch.equal(batch[one], match_around(images[one], reference[one], masks[one], method))
    fanned = match_around(images[:1], reference[:1], masks, method)
    assert torch.equal(fanned[2:], match_around(images[:1], reference[:1], masks[2:], method))
    assert match_around(images[:1], reference, masks[:1], method, apply_to="mask").shape == images.shape


@few
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 10**6), st.sampled_from(list(ColorMatch)))
def test_matching_commutes_with_flips_and_never_leaves_the_range(height, width, seed, method):
    images, reference = noise(1, height, width, 3, seed=seed), noise(1, 5, 6, 3, seed=seed + 1)
    mask = (noise(1, height, width, seed=seed + 2) > 0.7).float()
    matched = match_around(images, reference, mask, method)
    assert matched.isfinite().all() and matched.min() >= 0 and matched.max() <= 1
    for axis in (1, 2):
        flipped = match_around(images.flip(axis), reference.flip(axis), mask.flip(axis), method)
        assert torch.allclose(flipped.flip(axis), matched, atol=1e-5)


def test_bad_arguments_are_explained():
    images = noise(2, 8, 8, 3)
    with pytest.raises(InputError, match="2 images and 3 references; give one reference"):
        match_color(images, noise(3, 8, 8, 3))
    with pytest.raises(InputError, match=r"strength is 2; give a value from 0 to 1"):
        match_color(images, images, strength=2)
    with pytest.raises(InputError, match="max_shift is -1"):
        match_color(images, images, max_shift=-1)
    with pytest.raises(ValueError, match="nope"):
        match_color(images, images, "nope")
