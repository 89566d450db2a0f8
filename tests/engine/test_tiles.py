"""Any filler of small pictures fills large ones: tile by tile without seams, or small first and then in detail."""

import numpy as np
import pytest
from comfyui_mend.engine.pull_push import average, pull_push
from comfyui_mend.engine.tiles import Window, fill_tiled
from hypothesis import given, settings
from hypothesis import strategies as st

SMALL = Window(64 * 64, 8, square=64)
"""Tiles of 64 pixels, of which 32 are their own part."""


def noise(height, width, seed=0):
    return np.random.default_rng(seed).random((height, width, 3), dtype=np.float32)


def hole(height, width, rows=slice(10, -10), columns=slice(10, -10)):
    mask = np.zeros((height, width), bool)
    mask[rows, columns] = True
    return mask


def ignore(share):
    pass


def tiled(pixels, mask, filler, window, check=ignore):
    return fill_tiled(pixels, mask, filler, window, check=check)


def smooth(pixels, wanted):
    return pull_push(pixels, wanted)


class Watched:
    """A filler that notes what it was shown."""

    def __init__(self, filler=smooth):
        self.filler = filler
        self.seen = []

    def __call__(self, pixels, wanted):
        self.seen.append((pixels.copy(), wanted.copy()))
        return self.filler(pixels, wanted)


@settings(max_examples=25)
@given(
    st.integers(1, 200),
    st.integers(1, 200),
    st.integers(0, 10**6),
    st.sampled_from([SMALL, Window(40 * 40, 8), Window(10**6, 8)]),
)
def test_the_filler_gets_sizes_it_takes_and_only_the_hole_changes(height, width, seed, window):
    generator = np.random.default_rng(seed)
    pixels = noise(height, width, seed)
    mask = np.zeros((height, width), bool)
    top, left = generator.integers(height), generator.integers(width)
    mask[top : top + generator.integers(1, height + 1), left : left + generator.integers(1, width + 1)] = True
    mask[0, 0] = False
    watched = Watched()
    filled = tiled(pixels, mask, watched, window)
    assert (filled[~mask] == pixels[~mask]).all()
    assert filled.shape == pixels.shape
    assert np.isfinite(filled).all()
    for shown, wanted in watched.seen:
        assert shown.shape[:2] == wanted.shape
        assert wanted.shape == (64, 64) if window.square else all(side % 8 == 0 for side in wanted.shape)
        assert not wanted.all()


@pytest.mark.parametrize("window", [SMALL, Window(10**6, 8)])
def test_what_is_under_the_hole_is_never_shown(window):
    pixels, mask = noise(150, 130) * 0.5 + 0.25, hole(150, 130)
    hidden = np.where(mask[..., None], np.float32(np.nan), pixels)
    shown = tiled(hidden, mask, smooth, window)
    assert np.array_equal(shown, tiled(pixels, mask, smooth, window))
    assert shown.min() >= 0.25
    assert shown.max() <= 0.75


def test_what_fits_the_window_is_filled_at_once_and_as_it_is():
    pixels, mask = noise(48, 56), hole(48, 56)
    watched = Watched()
    filled = tiled(pixels, mask, watched, Window(48 * 56, 8))
    assert len(watched.seen) == 1
    assert np.array_equal(watched.seen[0][1], mask)
    assert np.array_equal(filled[mask], smooth(watched.seen[0][0], mask)[mask])


def test_an_empty_hole_needs_no_filler():
    pixels = noise(200, 200)
    assert tiled(pixels, np.zeros((200, 200), bool), None, SMALL) is pixels


def scratches(height, width):
    mask = np.zeros((height, width), bool)
    mask[20:-20:28, 10:-10] = True
    mask[21:-20:28, 10:-10] = True
    mask[10:-10, 30:-30:46] = True
    return mask


def test_shallow_holes_are_filled_at_full_resolution_in_each_tile_that_has_some():
    mask = hole(300, 300, slice(100, 110), slice(20, 280))
    watched = Watched()
    tiled(noise(300, 300), mask, watched, SMALL)
    assert len(watched.seen) == np.unique(np.argwhere(mask) // 32, axis=0).shape[0]


def test_tiles_carry_a_gradient_on_without_a_seam():
    ramp = np.linspace(0.1, 0.9, 400, dtype=np.float32)[None, :, None].repeat(300, 0).repeat(3, 2)
    mask = scratches(300, 400)
    filled = tiled(np.where(mask[..., None], 1, ramp), mask, smooth, SMALL)
    assert np.abs(filled - ramp).max() < 0.01


def test_neighbouring_tiles_fade_into_one_another():
    """Each tile in another tone: no step is as large as between two tiles, and the fade is as wide as it should be."""
    pixels, mask = np.full((200, 200, 3), 0.5, np.float32), hole(200, 200, slice(90, 106), slice(10, -10))
    tones = iter(np.tile([0.0, 1.0], 100))

    def uneven(shown, wanted):
        return np.full_like(shown, np.float32(next(tones)))

    filled = tiled(pixels, mask, uneven, SMALL)
    steps = np.abs(np.diff(filled[91:105, 20:180, 0], axis=1))
    assert 0 < steps.max() <= 1 / SMALL.overlap + 1e-6


def test_deep_holes_are_filled_at_a_lower_resolution_first():
    pixels, mask = noise(220, 220), hole(220, 220)
    watched = Watched()
    tiled(pixels, mask, watched, SMALL)
    [(shown, wanted)] = watched.seen
    quarter, known = average(np.where(mask[..., None], 0, pixels), ~mask, 4)
    # 220 / 4 = 55 pixels fit the window, mirrored to its 64
    assert np.allclose(shown[:55, :55][known == 1], quarter[known == 1], atol=1e-6)
    assert np.array_equal(wanted[:55, :55], known == 0)
    assert np.array_equal(wanted[:, 55:], wanted[:, 46:55][:, ::-1])


def test_tiles_build_on_one_another():
    """What a tile has painted is known to the next: nothing but the fade is asked for twice."""
    mask = scratches(300, 300)
    watched = Watched()
    tiled(noise(300, 300), mask, watched, SMALL)
    asked = sum(wanted.sum() for _, wanted in watched.seen)
    alone = sum(mask[max(r - 16, 0) : r + 48, max(c - 16, 0) : c + 48].sum() for r, c in cells_of(mask))
    assert mask.sum() < asked < alone


def cells_of(mask):
    return np.unique(np.argwhere(mask) // 32, axis=0) * 32


def test_the_share_that_is_done_rises_and_the_caller_may_stop():
    shares = []
    mask = scratches(200, 200)
    tiled(noise(200, 200), mask, smooth, SMALL, shares.append)
    assert shares[0] == 0
    assert shares == sorted(shares)
    assert 0.9 < shares[-1] < 1

    def stop(share):
        if share > 0.5:
            raise KeyboardInterrupt

    watched = Watched()
    with pytest.raises(KeyboardInterrupt):
        tiled(noise(200, 200), mask, watched, SMALL, stop)
    assert 0 < len(watched.seen) < len(cells_of(mask))
