"""Coarse to fine, tile by tile: any filler of small pictures fills large ones, without seams."""

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
    filled = fill_tiled(pixels, mask, watched, window, ignore)
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
    shown = fill_tiled(hidden, mask, smooth, window, ignore)
    assert np.array_equal(shown, fill_tiled(pixels, mask, smooth, window, ignore))
    assert shown.min() >= 0.25
    assert shown.max() <= 0.75


def test_what_fits_the_window_is_filled_at_once_and_as_it_is():
    pixels, mask = noise(48, 56), hole(48, 56)
    watched = Watched()
    filled = fill_tiled(pixels, mask, watched, Window(48 * 56, 8), ignore)
    assert len(watched.seen) == 1
    assert np.array_equal(watched.seen[0][1], mask)
    assert np.array_equal(filled[mask], smooth(watched.seen[0][0], mask)[mask])


def test_an_empty_hole_needs_no_filler():
    pixels = noise(200, 200)
    assert fill_tiled(pixels, np.zeros((200, 200), bool), None, SMALL, ignore) is pixels


def test_shallow_holes_are_filled_at_full_resolution_only():
    """A scratch across a large picture: each tile sees both of its sides."""
    mask = hole(300, 300, slice(100, 110), slice(20, 280))
    watched = Watched()
    fill_tiled(noise(300, 300), mask, watched, SMALL, ignore)
    assert len(watched.seen) == np.unique(np.argwhere(mask) // 32, axis=0).shape[0]


def test_deep_holes_are_filled_at_half_the_resolution_first():
    pixels, mask = noise(220, 220), hole(220, 220)
    watched = Watched()
    fill_tiled(pixels, mask, watched, SMALL, ignore)
    shown, wanted = watched.seen[0]
    quarter, known = average(np.where(mask[..., None], 0, pixels), ~mask, 4)
    # 220 / 4 = 55 pixels fit the window, mirrored to its 64
    assert np.allclose(shown[:55, :55], quarter, atol=1e-6)
    assert np.array_equal(wanted[:55, :55], known == 0)
    assert np.array_equal(wanted[:, 55:], wanted[:, 46:55][:, ::-1])


def test_the_fine_result_agrees_with_the_coarse_one():
    """A filler that paints what is known in tiles but is right about the whole: the whole decides."""
    height = width = 128
    ramp = np.linspace(0.1, 0.9, width, dtype=np.float32)[None, :, None].repeat(height, 0).repeat(3, 2)
    mask = hole(height, width, slice(16, 112), slice(16, 112))

    def right_when_small(pixels, wanted):
        small = average(ramp, np.ones((height, width), bool), 2)[0]
        if pixels[0, 0, 0] == small[0, 0, 0] and wanted.shape == (64, 64):
            return small
        return np.full_like(pixels, 0.5)

    filled = fill_tiled(ramp, mask, right_when_small, SMALL, ignore)
    deep = (slice(24, 104), slice(24, 104))
    # what is off by up to 0.25 in a tile is off by a sixth of it where tiles break off, and right elsewhere
    assert np.abs(0.5 - ramp)[deep].max() > 0.24
    assert np.abs(filled - ramp)[deep].max() < 0.25 / 6
    assert np.abs(filled - ramp)[deep].mean() < 0.002


def test_tiles_meet_without_a_seam():
    """Each tile in another tone, up to 0.4 apart: that of the coarse result takes its place."""
    pixels, mask = np.full((200, 200, 3), 0.5, np.float32), hole(200, 200)
    tones = iter(np.tile([0.0, 0.2, -0.2, 0.1], 100))

    def uneven(shown, wanted):
        return np.clip(np.full_like(shown, 0.5) + np.float32(next(tones)), 0, 1)

    filled = fill_tiled(pixels, mask, uneven, SMALL, ignore)
    inner = filled[40:160, 40:160, 0]
    steps = max(np.abs(np.diff(inner, axis=axis)).max() for axis in (0, 1))
    assert steps < 0.4 / 10
    assert np.abs(inner - np.median(inner)).mean() < 0.4 / 100


def test_tiles_start_at_the_rim_and_build_on_one_another():
    pixels, mask = noise(300, 300), hole(300, 300)
    watched = Watched()
    fill_tiled(pixels, mask, watched, SMALL, ignore)
    share = [wanted.mean() for _, wanted in watched.seen]
    # the first tiles of the full resolution border on what is known, and the middle on what was filled before it
    assert max(share) < 1
    assert min(share[-10:]) < 0.7


def test_the_share_that_is_done_rises_and_the_caller_may_stop():
    shares = []
    fill_tiled(noise(200, 200), hole(200, 200), smooth, SMALL, shares.append)
    assert shares[0] == 0
    assert all(a < b for a, b in zip(shares, shares[1:], strict=False))
    assert 0.9 < shares[-1] < 1

    def stop(share):
        if share > 0.5:
            raise KeyboardInterrupt

    watched = Watched()
    with pytest.raises(KeyboardInterrupt):
        fill_tiled(noise(200, 200), hole(200, 200), watched, SMALL, stop)
    assert 0 < len(watched.seen) < len(shares)
