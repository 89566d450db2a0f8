"""The kernels against the definitions written out, whatever the tiles and the library."""

import heapq
import math

import numpy as np
import pytest
from comfyui_mend.engine import morphology
from comfyui_mend.engine.morphology import (
    Shape,
    closing,
    drop_islands,
    feather_centred,
    feather_inward,
    feather_outward,
    fill_holes,
    grow,
    islands,
    opening,
    squared_distance,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

few = settings(max_examples=40)


@pytest.fixture(params=["opencv", "scipy"], autouse=True)
def backend(request, monkeypatch):
    if request.param == "scipy":
        monkeypatch.setattr(morphology, "opencv", lambda: None)
    return request.param


@st.composite
def solid(draw):
    shape = draw(st.tuples(st.integers(1, 24), st.integers(1, 24)))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    return (rng.random(shape) < draw(st.sampled_from([0.0, 0.03, 0.3, 0.8, 1.0]))).astype(np.float32)


@st.composite
def grey(draw):
    support = draw(solid())
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    levels = draw(st.sampled_from([4, 255]))
    return support * (np.ceil(rng.random(support.shape) * levels) / levels).astype(np.float32)


masks = st.one_of(solid(), grey())
radii = st.one_of(st.integers(0, 9).map(float), st.floats(0, 9, width=32))

KERNELS = {
    "grow": lambda a: grow(a, 5.5),
    "grow far": lambda a: grow(a, morphology.NEAR + 2),
    "shrink": lambda a: grow(a, -3),
    "square": lambda a: grow(a, 6, Shape.SQUARE),
    "outward": lambda a: feather_outward(a, 6),
    "inward": lambda a: feather_inward(a, 6),
    "centred": lambda a: feather_centred(a, 6),
    "closing": lambda a: closing(a, 3),
    "opening": lambda a: opening(a, 1.5),
}


def blots(height=150, width=170):
    """A mask with even ground, edges and grey in every place of a tile."""
    rng = np.random.default_rng(3)
    soft = ndimage.gaussian_filter(rng.random((height, width)), 7)
    return np.clip((soft - soft.mean()) * 40 + 0.3, 0, 1).astype(np.float32)


@pytest.mark.parametrize("name", KERNELS)
def test_tiles_do_not_show(name, monkeypatch):
    binary = (blots() > 0.5).astype(np.float32)
    whole = {key: KERNELS[name](mask) for key, mask in (("binary", binary), ("grey", blots()))}
    monkeypatch.setattr(morphology, "TILE", 16)
    assert np.array_equal(KERNELS[name](binary), whole["binary"])
    assert np.allclose(KERNELS[name](blots()), whole["grey"], atol=1e-6, rtol=0)


@few
@given(solid(), st.integers(1, 400))
def test_squared_distances_are_exact_below_the_limit(mask, limit):
    exact = np.rint(ndimage.distance_transform_edt(mask == 0) ** 2) if mask.any() else np.full(mask.shape, limit)
    assert np.array_equal(squared_distance(mask == 1, limit), np.minimum(exact, limit))


@few
@given(solid(), st.integers(1, 400))
def test_shifting_and_a_distance_transform_find_the_same(mask, limit):
    near = squared_distance(mask == 1, limit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(morphology, "NEAR", 0)
        assert np.array_equal(squared_distance(mask == 1, limit), near)


def test_a_large_radius_grows_into_the_same_disk():
    mask = np.zeros((501, 501), np.float32)
    mask[250, 250] = 1
    rows, columns = np.ogrid[-250:251, -250:251]
    for radius in (morphology.NEAR, morphology.NEAR + 1, 200.5):
        assert np.array_equal(grow(mask, radius) == 1, rows**2 + columns**2 <= radius**2)


@few
@given(masks, radii)
def test_a_square_grows_by_the_larger_of_both_distances(mask, radius):
    side = 2 * math.floor(radius) + 1
    assert np.array_equal(grow(mask, radius, Shape.SQUARE), ndimage.maximum_filter(mask, side, mode="constant"))
    assert np.array_equal(
        grow(mask, -radius, Shape.SQUARE), ndimage.minimum_filter(mask, side, mode="constant", cval=1)
    )


@few
@given(masks, radii, st.sampled_from(Shape))
def test_closing_adds_opening_takes_and_both_repeat_without_change(mask, radius, shape):
    closed, opened = closing(mask, radius, shape), opening(mask, radius, shape)
    assert (opened <= mask).all() and (mask <= closed).all()
    assert np.array_equal(closing(closed, radius, shape), closed)
    assert np.array_equal(opening(opened, radius, shape), opened)


def test_closing_bridges_a_gap_and_opening_drops_a_hair():
    mask = np.zeros((40, 60), np.float32)
    mask[10:30, 5:25] = mask[10:30, 29:50] = 1
    assert closing(mask, 2)[15:25, 25:29].all()
    assert not closing(mask, 1).any(axis=0)[25:29].any()
    mask[20, 50:58] = 1
    assert not opening(mask, 1)[:, 51:].any()
    assert opening(mask, 1)[10:30, 6:24].sum() == 20 * 18


# --- soft edges


def half(width=60):
    """Solid on the left half."""
    mask = np.zeros((9, width), np.float32)
    mask[:, : width // 2] = 1
    return mask


@pytest.mark.parametrize("pixels", [1, 4, 9])
def test_an_inward_feather_is_the_outward_one_of_what_is_left_out(pixels):
    line = feather_inward(half(), pixels)[4]
    distance = np.arange(1, 31)
    expected = (1 - np.cos(np.pi * np.minimum(distance / (pixels + 1), 1))) / 2
    assert np.allclose(line[29::-1], expected, atol=1e-6)
    assert not line[30:].any()


@pytest.mark.parametrize("pixels", [2, 4, 10])
def test_a_centred_feather_lies_half_inside_and_half_outside(pixels):
    line = feather_centred(half(), pixels)[4]
    from_edge = np.arange(60) - 29.5
    expected = (1 - np.sin(np.pi * np.clip(from_edge / (pixels + 1), -0.5, 0.5))) / 2
    assert np.allclose(line, expected, atol=1e-6)
    assert ((line > 0) & (line < 1)).sum() == pixels


@few
@given(masks, radii)
def test_inward_only_takes_and_nothing_of_the_mask_is_lost(mask, pixels):
    soft = feather_inward(mask, pixels)
    assert (soft <= mask).all()
    assert ((soft > 0) == (mask > 0)).all()


@few
@given(masks, radii)
def test_a_centred_feather_treats_both_sides_alike(mask, pixels):
    assert np.allclose(feather_centred(1 - mask, pixels), 1 - feather_centred(mask, pixels), atol=2e-6)


@few
@given(solid(), radii)
def test_a_centred_feather_lies_between_the_other_two_and_loses_no_stroke(mask, pixels):
    soft = feather_centred(mask, pixels)
    assert (soft <= feather_outward(mask, pixels) + 1e-6).all()
    assert (soft >= feather_inward(mask, pixels) - 1e-6).all()
    assert (soft[mask == 1] > 0).all()


@pytest.mark.parametrize("level", [0.0, 0.1, 0.5, 0.83, 1.0])
@pytest.mark.parametrize("feather", [feather_outward, feather_inward, feather_centred])
def test_even_grey_stays_as_it_is(level, feather):
    mask = np.full((40, 40), level, np.float32)
    mask[:, 30:] = 1 if level < 0.5 else 0
    assert np.allclose(feather(mask, 6)[:, :20], level, atol=1e-6)


@few
@given(grey(), st.floats(0, 0.5, width=32))
def test_a_centred_feather_is_monotone_in_the_mask(mask, more):
    assert (feather_centred(mask, 5) <= feather_centred(np.minimum(mask + more, 1), 5) + 1e-5).all()


# --- holes and islands


def escape_levels(mask):
    """The lowest crossing on the way to the border, by Dijkstra's algorithm."""
    height, width = mask.shape
    framed = np.pad(mask, 1)
    lowest = np.full(framed.shape, np.inf, np.float32)
    lowest[0, 0] = 0
    queue = [(np.float32(0), 0, 0)]
    while queue:
        level, y, x = heapq.heappop(queue)
        if level > lowest[y, x]:
            continue
        for v, u in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if 0 <= v < height + 2 and 0 <= u < width + 2 and max(level, framed[v, u]) < lowest[v, u]:
                lowest[v, u] = max(level, framed[v, u])
                heapq.heappush(queue, (lowest[v, u], v, u))
    return lowest[1:-1, 1:-1]


@settings(max_examples=120)
@given(masks)
def test_holes_are_filled_up_to_the_lowest_crossing_on_the_way_out(mask):
    assert np.array_equal(fill_holes(mask), escape_levels(mask))


def test_a_spiral_way_out_is_followed_to_its_end():
    mask = np.zeros((41, 41), np.float32)
    for ring in range(2, 20, 3):
        mask[ring, ring:-ring] = mask[-ring - 1, ring:-ring] = mask[ring:-ring, ring] = mask[ring:-ring, -ring - 1] = 1
        mask[20, ring if ring % 2 else -ring - 1] = ring / 41  # one grey gate in each wall
    filled = fill_holes(mask)
    assert np.array_equal(filled, escape_levels(mask))
    assert filled[20, 20] == np.float32(17 / 41)


def test_very_grey_masks_are_filled_in_steps_that_miss_by_less_than_one(monkeypatch):
    mask = blots()
    exact = fill_holes(mask)
    monkeypatch.setattr(morphology, "MAX_NODES", 10)
    stepped = fill_holes(mask)
    assert (stepped >= mask).all() and (stepped <= exact).all()
    assert 0 < (exact - stepped).max() <= mask.max() / morphology.HOLE_LEVELS
    few_levels = np.ceil(mask * 8) / np.float32(8)
    assert np.array_equal(fill_holes(few_levels), escape_levels(few_levels))


def test_islands_hang_together_by_corners():
    mask = np.zeros((6, 8), np.float32)
    mask[1, 1] = mask[2, 2] = 0.3
    mask[4, 6] = 1
    assert islands(mask)[1] == 2


@few
@given(masks, st.integers(0, 12))
def test_islands_are_dropped_whole_by_their_size(mask, smallest):
    kept = drop_islands(mask, smallest)
    labels, _ = islands(mask)
    sizes = np.bincount(labels.ravel(), minlength=1)
    large = (sizes >= smallest) & (np.arange(len(sizes)) > 0)
    assert np.array_equal(kept, np.where(large[labels], mask, 0))


@few
@given(masks)
def test_the_largest_island_stays_and_none_is_larger(mask):
    kept = drop_islands(mask, keep_largest=True)
    assert (kept.any() == mask.any()) and np.array_equal(drop_islands(kept, keep_largest=True), kept)
    sizes = np.bincount(islands(mask)[0].ravel())[1:]
    assert set(np.bincount(islands(kept)[0].ravel())[1:]) == ({sizes.max()} if len(sizes) else set())
    assert np.array_equal(drop_islands(mask[::-1, ::-1], keep_largest=True), kept[::-1, ::-1])
