"""Detail for a hole that was filled small: sharp, from the picture, and never against the small fill."""

import numpy as np
import pytest
from comfyui_mend.engine.detail import fill_reduced
from comfyui_mend.engine.pull_push import average, enlarge, pull_push
from hypothesis import given, settings
from hypothesis import strategies as st

PHOTOS = ("brick", "grass", "gravel")


def photo(name):
    """A texture of 512 x 512, as [H, W, 3]."""
    from skimage import data

    return np.repeat(getattr(data, name)()[..., None], 3, axis=-1).astype(np.float32) / 255


def hole(height, width, rows, columns):
    mask = np.zeros((height, width), bool)
    mask[rows, columns] = True
    return mask


def oracle(original, factor):
    """A filler that knows what the reduced picture shows."""
    truth, _ = average(original, np.ones(original.shape[:2], bool), factor)

    def fill(pixels, wanted):
        return truth

    return fill


def reduced(pixels, mask, factor, filler=pull_push, seed=0, check=lambda: None):
    return fill_reduced(pixels, mask, factor, filler, seed, check)


def sharpness(picture, mask):
    """Standard deviation of the Laplacian in the mask."""
    grey = picture.mean(axis=-1)
    laplacian = 4 * grey - sum(np.roll(grey, shift, axis) for shift in (1, -1) for axis in (0, 1))
    return laplacian[mask].std()


@settings(max_examples=25)
@given(st.integers(4, 90), st.integers(4, 90), st.integers(2, 5), st.integers(0, 10**6))
def test_only_the_hole_changes_and_all_values_stay_in_range(height, width, factor, seed):
    generator = np.random.default_rng(seed)
    pixels = generator.random((height, width, 3), dtype=np.float32)
    mask = generator.random((height, width)) < 0.1
    mask[height // 3 : height // 2 + 1, width // 3 : width // 2 + 1] = True
    mask[0, 0] = False
    filled = reduced(pixels, mask, factor)
    assert np.array_equal(filled[~mask], pixels[~mask])
    assert filled.min() >= 0
    assert filled.max() <= 1


def test_what_is_under_the_hole_has_no_influence():
    pixels = np.random.default_rng(0).random((90, 70, 3), dtype=np.float32)
    mask = hole(90, 70, slice(30, 60), slice(20, 50))
    hidden = np.where(mask[..., None], np.float32(np.nan), pixels)
    assert np.array_equal(reduced(pixels, mask, 3), reduced(hidden, mask, 3))


def test_a_plain_picture_stays_plain():
    pixels = np.full((80, 80, 3), 0.3, np.float32)
    mask = hole(80, 80, slice(20, 60), slice(20, 60))
    assert np.abs(reduced(np.where(mask[..., None], 1, pixels), mask, 2) - 0.3).max() < 1e-5


@pytest.mark.parametrize("factor", [2, 3])
def test_a_pattern_that_repeats_is_continued_to_the_pixel(factor):
    """Stripes of 12 pixels, known small: the right ones are found and copied, where enlarging would blur them."""
    stripes = (np.arange(192) % 12 < 5).astype(np.float32) * 0.8 + 0.1
    original = np.broadcast_to(stripes[None, :, None], (192, 192, 3)).copy()
    mask = hole(192, 192, slice(60, 132), slice(60, 132))
    filled = reduced(np.where(mask[..., None], 0, original), mask, factor, oracle(original, factor))
    blurred = enlarge(oracle(original, factor)(None, None), factor)
    assert np.abs(filled - original)[mask].mean() < 0.1 * np.abs(blurred - original)[mask].mean()


@pytest.mark.parametrize("name", PHOTOS)
def test_photographs_keep_their_sharpness(name):
    original = photo(name)
    mask = hole(512, 512, slice(160, 352), slice(160, 352))
    filled = reduced(np.where(mask[..., None], 0, original), mask, 2, oracle(original, 2))
    blurred = enlarge(oracle(original, 2)(None, None), 2)
    # 1 is as sharp as what was there
    assert sharpness(blurred, mask) < 0.55 * sharpness(original, mask)
    assert 0.65 < sharpness(filled, mask) / sharpness(original, mask) < 1.3


@pytest.mark.parametrize("name", PHOTOS)
def test_the_tone_and_structure_are_those_of_the_small_fill(name):
    original = photo(name)
    mask = hole(512, 512, slice(160, 352), slice(160, 352))
    filled = reduced(np.where(mask[..., None], 0, original), mask, 2, oracle(original, 2))
    whole = np.ones_like(mask)
    small, found = average(original, whole, 2)[0], average(filled, whole, 2)[0]
    assert np.abs(found - small)[80:176, 80:176].mean() < 0.3 * small[80:176, 80:176].std()


def test_a_seed_repeats_its_search():
    original = photo("grass")[:160, :160]
    mask = hole(160, 160, slice(50, 110), slice(50, 110))
    first = reduced(original, mask, 2, seed=3)
    assert np.array_equal(reduced(original, mask, 2, seed=3), first)
    assert not np.array_equal(reduced(original, mask, 2, seed=4), first)


def test_where_no_whole_patch_is_known_the_small_fill_is_enlarged():
    pixels = np.random.default_rng(0).random((40, 40, 3), dtype=np.float32)
    mask = hole(40, 40, slice(2, None), slice(None))
    filled = reduced(pixels, mask, 2)
    assert np.isfinite(filled).all()
    assert np.array_equal(filled[:2], pixels[:2])


def test_the_caller_may_stop_the_search():
    calls = []

    def stop():
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reduced(photo("brick"), hole(512, 512, slice(160, 352), slice(160, 352)), 2, check=stop)
    assert len(calls) == 3
