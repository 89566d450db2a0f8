import numpy as np
import pytest
import torch
from comfyui_mend.engine.masks import feather
from comfyui_mend.engine.multiband import MAX_BAND, band_shares, bands, mix_bands, soft_edge
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage


def picture(seed=0, height=60, width=80):
    return np.random.default_rng(seed).random((height, width, 3)).astype(np.float32)


def box(height=60, width=80, soft=0):
    mask = torch.zeros(1, height, width)
    mask[:, 15:45, 20:60] = 1
    return feather(mask, soft)[0].numpy()


@st.composite
def masks(draw):
    height, width = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    field = ndimage.gaussian_filter(random.random((height, width)), draw(st.sampled_from([0, 2, 5])))
    level = np.quantile(field, draw(st.sampled_from([0, 0.2, 0.7, 1])))
    mask = (field >= level) if draw(st.booleans()) else np.clip((field - level) * 20, 0, 1)
    return mask.astype(np.float32)


@settings(max_examples=40)
@given(masks())
def test_the_originals_bits_where_the_mask_is_0_and_no_colour_that_neither_has(mask):
    height, width = mask.shape
    original, painted = picture(1, height, width), picture(2, height, width)
    mixed = mix_bands(original, painted, mask)
    assert np.array_equal(mixed[mask == 0], original[mask == 0])
    assert mixed.min() >= 0
    assert mixed.max() <= 1
    same = mix_bands(original, original, mask)
    assert np.array_equal(same, original)
    for flip in (np.flipud, np.fliplr, lambda array: array.swapaxes(0, 1)):
        assert np.allclose(mix_bands(flip(original), flip(painted), flip(mask)), flip(mixed), atol=1e-5)


@given(masks())
def test_the_shares_of_both_pictures_lie_in_0_to_1_and_are_whole_at_both_ends(mask):
    edge, width = soft_edge(mask)
    for share in band_shares(edge, width):
        assert share.min() >= 0
        assert share.max() <= 1
        assert not share[mask == 0].any()
        assert (share[edge == 1] == 1).all()


def test_bands_add_up_to_the_picture():
    assert np.allclose(np.sum(bands(picture()), axis=0), picture(), atol=1e-6)


def test_a_soft_mask_keeps_the_painted_bits_where_it_is_1():
    mask, painted = box(soft=12), picture(2)
    assert np.array_equal(mix_bands(picture(1), painted, mask)[mask == 1], painted[mask == 1])


def test_a_hard_mask_keeps_the_painted_bits_beyond_the_widest_band():
    painted = picture(2, 200, 200)
    mask = np.zeros((200, 200), np.float32)
    mask[50:150, 50:150] = 1
    mixed = mix_bands(picture(1, 200, 200), painted, mask)
    deep = np.s_[50 + MAX_BAND + 1 : 150 - MAX_BAND - 1, 50 + MAX_BAND + 1 : 150 - MAX_BAND - 1]
    assert np.array_equal(mixed[deep], painted[deep])


def test_at_the_picture_border_the_mask_has_no_edge():
    mask = np.zeros((60, 80), np.float32)
    mask[:, :40] = 1
    painted = picture(2)
    assert np.array_equal(mix_bands(picture(1), painted, mask)[:, :20], painted[:, :20])


@pytest.mark.parametrize("soft", [0, 12])
def test_a_tone_step_becomes_a_slope_and_detail_is_never_doubled(soft):
    """Left and right halves of stripes that are half a period apart."""
    rows, columns = np.mgrid[:80, :200]
    mask = feather((torch.arange(200) >= 100).float().expand(1, 80, 200), soft)[0].numpy()
    stripes = 0.1 * np.sign(np.sin(rows * np.pi / 2 + 0.1)) + 0.0 * columns
    original = np.repeat((0.3 + stripes)[..., None], 3, axis=2).astype(np.float32)
    painted = np.repeat((0.6 - stripes)[..., None], 3, axis=2).astype(np.float32)
    mixed = mix_bands(original, painted, mask)
    tone = ndimage.uniform_filter(mixed[..., 0], (40, 1))[40]
    assert np.abs(np.diff(tone)).max() < 0.05
    linear = original + (painted - original) * mask[..., None]
    if soft:
        contrast, contrast_linear = (result.std(axis=(0, 2)) for result in (mixed, linear))
        # where both stripes cancel out; a linear mix shows the blur over the whole edge
        assert (contrast < 0.07).sum() < (contrast_linear < 0.07).sum() / 2


def test_a_flat_grey_mask_mixes_in_its_proportion():
    original, painted = picture(1), picture(2)
    half = np.full((60, 80), 0.5, np.float32)
    assert np.allclose(mix_bands(original, painted, half), (original + painted) / 2, atol=1e-5)
