"""Masks: every property is checked with OpenCV and without it."""

import math

import numpy as np
import pytest
import torch
from comfyui_mend.engine import morphology
from comfyui_mend.engine.masks import (
    FeatherSide,
    MaskOptions,
    Shape,
    Unit,
    bounding_box,
    feather,
    fill_holes,
    grow,
    invert,
    prepare,
    prepare_masks,
    snap_to_grid,
    threshold,
    to_latent_grid,
    to_pixels,
)
from comfyui_mend.engine.types import Box, InputError, Size
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

few = settings(max_examples=40)


@pytest.fixture(params=["opencv", "scipy"], autouse=True)
def backend(request, monkeypatch):
    if request.param == "scipy":
        monkeypatch.setattr(morphology, "opencv", lambda: None)
    return request.param


def with_scipy(operation, mask):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(morphology, "opencv", lambda: None)
        return operation(mask)


def dot(size=101, y=None, x=None):
    mask = torch.zeros(1, size, size)
    mask[0, size // 2 if y is None else y, size // 2 if x is None else x] = 1
    return mask


def distances(size, y, x):
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return ((rows - y) ** 2 + (columns - x) ** 2).double().sqrt()


@st.composite
def binary(draw, batch=1):
    height, width = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    seed, density = draw(st.integers(0, 10**6)), draw(st.sampled_from([0.0, 0.03, 0.3, 0.8, 1.0]))
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, height, width, generator=generator) < density).float()


@st.composite
def grey(draw, batch=1):
    support = draw(binary(batch))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    values = torch.rand(support.shape, generator=generator)
    levels = draw(st.sampled_from([None, 4]))
    return support * (values if levels is None else torch.ceil(values * levels) / levels)


any_mask = st.one_of(binary(), grey())
pixels = st.one_of(st.integers(0, 12).map(float), st.floats(0, 12, width=32))

OPERATIONS = {
    "grow": lambda mask: grow(mask, 4),
    "shrink": lambda mask: grow(mask, -3),
    "feather": lambda mask: feather(mask, 5),
    "fill_holes": fill_holes,
    "prepare": lambda mask: prepare(mask, MaskOptions(invert=True, fill_holes=True, grow=2.5, feather=3)),
    "everything": lambda mask: prepare(mask, EVERYTHING),
    "user": lambda mask: prepare_masks(mask, EVERYTHING).user,
}
EVERYTHING = MaskOptions(
    floor=0.1,
    close=2,
    fill_holes=True,
    open=1,
    min_island=3,
    keep_largest=True,
    grow=2,
    feather=4,
    feather_side=FeatherSide.CENTRED,
    keep_solid=True,
    shape=Shape.SQUARE,
)


@pytest.mark.parametrize("radius", [1, 2, 6, 16, 32])
def test_one_pixel_grows_into_a_disk_of_exactly_that_radius(radius):
    expected = distances(101, 50, 50) <= radius
    assert torch.equal(grow(dot(), radius)[0], expected.float())


def test_growing_at_the_border_and_in_corners_clips_the_disk():
    for y, x in [(0, 0), (0, 100), (100, 0), (100, 100), (0, 50), (50, 100)]:
        assert torch.equal(grow(dot(y=y, x=x), 20)[0], (distances(101, y, x) <= 20).float())


@few
@given(any_mask, pixels)
def test_growing_is_the_largest_value_within_reach(mask, radius):
    reach = math.ceil(radius)
    rows, columns = np.ogrid[-reach : reach + 1, -reach : reach + 1]
    disk = rows**2 + columns**2 <= radius**2
    array = mask[0].numpy()
    expected = ndimage.grey_dilation(array, footprint=disk, mode="constant", cval=0)
    assert np.array_equal(grow(mask, radius)[0].numpy(), expected)
    expected = ndimage.grey_erosion(array, footprint=disk, mode="constant", cval=1)
    assert np.array_equal(grow(mask, -radius)[0].numpy(), expected)


@few
@given(any_mask, pixels, pixels)
def test_growth_is_monotone_in_the_radius_and_shrinking_is_its_mirror(mask, a, b):
    small, large = sorted((a, b))
    assert (grow(mask, small) <= grow(mask, large)).all()
    assert (grow(mask, -large) <= grow(mask, -small)).all()
    assert (mask <= grow(grow(mask, large), -large)).all()


@few
@given(binary(), pixels)
def test_shrinking_a_binary_mask_grows_what_it_leaves_out(mask, radius):
    assert torch.equal(grow(mask, -radius), invert(grow(invert(mask), radius)))


def test_shrinking_leaves_a_mask_at_the_picture_border_on_it():
    mask = torch.zeros(1, 40, 40)
    mask[:, :, :20] = 1
    shrunk = grow(mask, -5)
    assert shrunk[0, :, :15].all()
    assert not shrunk[0, :, 15:].any()


@pytest.mark.parametrize("name", OPERATIONS)
@few
@given(mask=any_mask)
def test_operations_commute_with_flips_and_turns(name, mask):
    operation = OPERATIONS[name]
    for turn in (lambda m: m.flip(1), lambda m: m.flip(2), lambda m: m.transpose(1, 2)):
        assert torch.allclose(operation(turn(mask)), turn(operation(mask)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", OPERATIONS)
@few
@given(mask=st.one_of(binary(3), grey(3)))
def test_a_batch_is_its_masks_one_by_one_and_the_input_is_left_alone(name, mask):
    before = mask.clone()
    batch = OPERATIONS[name](mask)
    assert torch.equal(batch, torch.cat([OPERATIONS[name](one) for one in mask.split(1)]))
    assert torch.equal(mask, before)
    assert batch.dtype == torch.float32
    assert batch.min() >= 0
    assert batch.max() <= 1


@pytest.mark.parametrize("name", OPERATIONS)
@few
@given(mask=binary())
def test_opencv_and_scipy_agree_to_the_bit_on_binary_masks(name, mask):
    assert torch.equal(OPERATIONS[name](mask), with_scipy(OPERATIONS[name], mask))


@pytest.mark.parametrize("name", OPERATIONS)
@few
@given(mask=grey())
def test_opencv_and_scipy_agree_on_grey_masks(name, mask):
    assert torch.allclose(OPERATIONS[name](mask), with_scipy(OPERATIONS[name], mask), atol=1e-6, rtol=0)


def test_opencv_and_scipy_agree_on_a_large_mask():
    mask = torch.zeros(1, 1500, 1400)
    mask[:, 1::173, 3::211] = 1
    for name, operation in OPERATIONS.items():
        assert torch.equal(operation(mask), with_scipy(operation, mask)), name


@pytest.mark.parametrize("width", [1, 5, 40])
def test_feather_follows_the_raised_cosine_of_the_distance(width):
    t = (distances(101, 50, 50) / (width + 1)).clamp(max=1)
    expected = (0.5 * (1 + torch.cos(math.pi * t))).float()
    assert torch.allclose(feather(dot(), width)[0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("width", [1, 8, 32])
def test_feather_reaches_its_last_pixel_and_no_further(width):
    line = feather(dot(), width)[0, 50, 50:]
    assert (line[: width + 1] > 0).all()
    assert not line[width + 1 :].any()


@few
@given(any_mask, pixels)
def test_feather_never_lowers_the_mask_and_ends_where_growth_does(mask, width):
    soft = feather(mask, width)
    assert (soft >= mask).all()
    assert (soft[mask == 1] == 1).all()
    assert not soft[grow(mask, width + 1) == 0].any()


@few
@given(binary(), pixels, pixels)
def test_feather_is_monotone_in_width_and_mask(mask, a, b):
    small, large = sorted((a, b))
    assert (feather(mask, small) <= feather(mask, large) + 1e-6).all()
    assert (feather(mask, large) <= feather(grow(mask, 2), large) + 1e-6).all()


@few
@given(grey())
def test_grey_feathering_is_the_parabolic_dilation_written_out(mask):
    reach = 5.0
    t = torch.acos((2 * mask[0].double() - 1).clamp(-1, 1)) / math.pi
    height = 1 - t * t
    rows, columns = torch.meshgrid(*(torch.arange(n) for n in height.shape), indexing="ij")
    squared = (rows.flatten()[:, None] - rows.flatten()) ** 2 + (columns.flatten()[:, None] - columns.flatten()) ** 2
    best = (height.flatten()[None, :] - squared / reach**2).amax(dim=1).clamp(0, 1).reshape(height.shape)
    expected = 0.5 * (1 + torch.cos(math.pi * torch.sqrt(1 - best)))
    assert torch.allclose(feather(mask, reach - 1)[0].double(), expected, atol=2e-6, rtol=0)


def test_a_mask_on_the_border_keeps_full_alpha_there():
    mask = torch.zeros(1, 256, 256)
    mask[:, :, :100] = 1
    soft = prepare(mask, MaskOptions(feather=32))
    assert (soft[:, :, :100] == 1).all()
    assert soft[0, 0, 0] == soft[0, -1, 0] == 1
    assert (soft[0, :, 100:132] > 0).all()
    assert not soft[0, :, 133:].any()


def test_alpha_is_one_from_the_edge_of_the_users_mask():
    mask = torch.zeros(1, 200, 200)
    mask[:, 60:140, 50:150] = 1
    assert (prepare(mask, MaskOptions(grow=4, feather=32, fill_holes=True))[mask == 1] == 1).all()


def test_a_soft_edge_stays_soft_when_it_grows():
    mask = torch.zeros(1, 9, 60)
    mask[:, :, :20] = 1
    mask[:, :, 20:25] = torch.tensor([0.9, 0.7, 0.5, 0.3, 0.1])
    grown = grow(mask, 8)
    assert torch.equal(grown[:, :, 28:33], mask[:, :, 20:25])


def test_holes_are_filled_and_bays_are_not():
    mask = torch.zeros(1, 30, 30)
    mask[:, 5:25, 5:25] = 1
    mask[:, 10:15, 10:15] = 0
    mask[:, 18:20, 18:] = 0
    filled = fill_holes(mask)
    assert (filled[:, 10:15, 10:15] == 1).all()
    assert not filled[:, 18:20, 18:].any()


def test_a_region_open_to_the_picture_border_is_no_hole():
    mask = torch.ones(1, 20, 20)
    mask[:, :5, 8:12] = 0
    mask[:, 10:15, 8:12] = 0
    filled = fill_holes(mask)
    assert torch.equal(filled[:, :10], mask[:, :10])
    assert filled[:, 10:].all()


def test_a_diagonal_line_of_pixels_closes_a_hole():
    mask = torch.zeros(1, 5, 5)
    for y, x in [(0, 2), (1, 1), (1, 3), (2, 0), (2, 4), (3, 1), (3, 3), (4, 2)]:
        mask[0, y, x] = 1
    assert fill_holes(mask).sum() == 13


def test_a_hole_in_a_grey_ring_gets_the_level_of_the_ring():
    mask = torch.zeros(1, 20, 20)
    mask[:, 2:18, 2:18] = 0.4
    mask[:, 5:15, 5:15] = 1
    mask[:, 7:13, 7:13] = 0.2
    filled = fill_holes(mask)
    assert (filled[:, 5:15, 5:15] == 1).all()
    assert (filled[:, 2:5, 2:18] == 0.4).all()


@few
@given(any_mask)
def test_filling_holes_only_adds_and_repeats_without_change(mask):
    filled = fill_holes(mask)
    assert (filled >= mask).all()
    assert torch.equal(fill_holes(filled), filled)


@few
@given(grey())
def test_thresholding_commutes_with_growing_and_filling_holes(mask):
    mask = torch.round(mask * 4) / 4
    for level in (0.25, 0.75):
        assert torch.equal(threshold(grow(mask, 3), level), grow(threshold(mask, level), 3))
        assert torch.equal(threshold(fill_holes(mask), level), fill_holes(threshold(mask, level)))


def test_preparation_follows_the_documented_order():
    mask = torch.rand(2, 40, 50, generator=torch.Generator().manual_seed(0))
    options = MaskOptions(threshold=0.02, invert=True, fill_holes=True, grow=2, feather=6)
    expected = feather(grow(fill_holes(invert(threshold(mask, 0.02))), 2), 6)
    assert torch.equal(prepare(mask, options), expected)


def test_the_default_preparation_changes_nothing_and_grey_stays_grey():
    mask = torch.rand(1, 30, 30, generator=torch.Generator().manual_seed(1))
    assert torch.equal(prepare(mask, MaskOptions()), mask)
    assert prepare(mask * 0.5, MaskOptions(grow=3, fill_holes=True)).max() <= 0.5


def test_nearly_white_masks_are_prepared_like_white_ones():
    mask = torch.zeros(1, 40, 40)
    mask[:, 15:25, 15:25] = 0.98
    prepared = prepare(mask, MaskOptions(grow=3, fill_holes=True))
    assert torch.equal(prepared, grow((mask > 0).float(), 3) * mask.max())


def test_empty_and_full_masks_stay_what_they_are():
    for mask in (torch.zeros(1, 20, 30), torch.ones(1, 20, 30)):
        for name, operation in OPERATIONS.items():
            if name != "prepare":  # it inverts
                assert torch.equal(operation(mask), mask), name


def test_preparation_reports_each_image_and_stops_when_told():
    seen = []
    prepare(torch.zeros(3, 8, 8), MaskOptions(grow=1), on_image=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(torch.ones(3, 8, 8), MaskOptions(grow=1), on_image=stop)


@pytest.mark.parametrize(
    "options",
    [
        {"grow": 2000},
        {"grow": float("nan")},
        {"feather": -1},
        {"threshold": 1.5},
        {"floor": -0.1},
        {"close": -3},
        {"open": 1025},
        {"min_island": -1},
        {"grow": 101, "unit": Unit.PERCENT},
        {"min_island": 200, "unit": Unit.PERCENT},
    ],
)
def test_numbers_out_of_range_are_refused_by_name(options):
    with pytest.raises(InputError, match=next(iter(options))):
        MaskOptions(**options)


def test_the_bounding_box_holds_every_pixel_of_every_mask():
    mask = torch.zeros(2, 30, 40)
    assert bounding_box(mask) is None
    mask[0, 5, 7] = 0.01
    assert bounding_box(mask) == Box(7, 5, 8, 6)
    mask[1, 29, 39] = 1
    assert bounding_box(mask) == Box(7, 5, 40, 30)
    assert bounding_box(mask[1]) == Box(39, 29, 40, 30)


@pytest.mark.parametrize("phase", range(8))
@pytest.mark.parametrize("thickness", [1, 3, 4, 7])
def test_thin_strokes_survive_on_the_latent_grid_at_every_phase(thickness, phase):
    mask = torch.zeros(1, 64, 64)
    mask[:, 24 + phase : 24 + phase + thickness] = 1
    grid = to_latent_grid(mask, 8)
    assert grid.shape == (1, 1, 8, 8)
    assert grid.amax(dim=2).eq(1).all()
    cells = grid[0, 0, :, 0].sum()
    assert 1 <= cells <= 1 + math.ceil(thickness / 8)


@few
@given(binary(2))
def test_every_masked_pixel_lies_in_a_masked_cell_and_no_cell_is_masked_without(mask):
    mask = torch.nn.functional.pad(mask, (0, -mask.shape[2] % 4, 0, -mask.shape[1] % 4))
    grid = to_latent_grid(mask, 4)
    spread = grid[:, 0].repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert (spread >= mask).all()
    assert torch.equal(to_latent_grid(spread, 4), grid)
    assert grid.sum() <= mask.sum()


def test_the_latent_grid_refuses_sizes_that_are_not_whole_cells():
    with pytest.raises(InputError, match="613x515"):
        to_latent_grid(torch.zeros(1, 515, 613), 8)


# --- three masks

outward = st.builds(
    MaskOptions,
    fill_holes=st.booleans(),
    close=pixels,
    open=pixels,
    grow=pixels,
    feather=pixels,
    shape=st.sampled_from(Shape),
)
any_options = st.builds(
    MaskOptions,
    invert=st.booleans(),
    fill_holes=st.booleans(),
    close=pixels,
    min_island=st.integers(0, 5),
    grow=st.floats(-6, 12),
    feather=pixels,
    feather_side=st.sampled_from(FeatherSide),
    shape=st.sampled_from(Shape),
    keep_solid=st.just(True),
)


@settings(max_examples=80)
@given(any_mask, st.one_of(outward, any_options), st.integers(1, 9))
def test_the_users_mask_is_within_the_other_two(mask, options, downscale):
    user, sampler, stitch = prepare_masks(mask, options, downscale)
    assert (user <= stitch).all() and (user <= sampler).all()
    assert (stitch[user == 1] == 1).all()
    assert torch.equal(snap_to_grid(sampler, downscale), sampler)
    assert torch.equal(prepare(mask, options), stitch)


def test_the_three_masks_follow_the_documented_order():
    mask = torch.rand(2, 45, 61, generator=torch.Generator().manual_seed(0))
    options = MaskOptions(floor=0.3, invert=True, close=2, fill_holes=True, open=1, grow=3, feather=5)
    user = grow(grow(invert(torch.where(mask < 0.3, 0.0, mask)), 2), -2)
    user = grow(grow(fill_holes(user), -1), 1)
    prepared = prepare_masks(mask, options, 8)
    assert torch.equal(prepared.user, user)
    assert torch.equal(prepared.sampler, snap_to_grid(grow(user, 3), 8))
    assert torch.allclose(prepared.stitch, feather(grow(user, 3), 5), atol=1e-6)


@pytest.mark.parametrize("y", [0, 20, 39])
@pytest.mark.parametrize("x", [0, 25, 49])
@pytest.mark.parametrize("side", FeatherSide)
def test_alpha_is_one_on_borders_and_in_corners_that_the_mask_touches(y, x, side):
    mask = torch.zeros(1, 40, 50)
    mask[:, max(y - 9, 0) : y + 10, max(x - 9, 0) : x + 10] = 1
    stitch = prepare(mask, MaskOptions(grow=6, feather=6, feather_side=side, keep_solid=True))
    assert (stitch[mask == 1] == 1).all()
    assert stitch[0, y, x] == 1


@pytest.mark.parametrize("side", [FeatherSide.INWARD, FeatherSide.CENTRED])
def test_a_mask_that_covers_half_the_picture_is_soft_on_its_edge_only(side):
    mask = torch.zeros(1, 60, 80)
    mask[:, :, :40] = 1
    soft = feather(mask, 8, side)
    assert (soft[:, :, :31] == 1).all() and not soft[:, :, 46:].any()
    assert torch.equal(soft[0], soft[0, :1].expand(60, -1))


def test_growing_by_as_much_as_the_inward_feather_keeps_the_edge_between_both():
    mask = torch.zeros(1, 80, 80)
    mask[:, 30:50, 30:50] = 1
    stitch = prepare(mask, MaskOptions(grow=10, feather=10, feather_side=FeatherSide.INWARD, keep_solid=True))
    assert (stitch[mask == 1] == 1).all()
    assert torch.equal(stitch > 0, grow(mask, 10) > 0)


@pytest.mark.parametrize("phase", range(8))
@pytest.mark.parametrize("thickness", [1, 3])
def test_a_stroke_keeps_at_least_one_whole_cell_at_every_phase(thickness, phase):
    mask = torch.zeros(1, 61, 75)
    mask[:, :, 24 + phase : 24 + phase + thickness] = 1
    sampler = prepare_masks(mask, MaskOptions()).sampler
    small = torch.nn.functional.interpolate(sampler[:, None], size=(7, 9), mode="bilinear")
    assert (sampler >= mask).all()
    assert (to_latent_grid(sampler[:, :56, :72], 8).amax(dim=3) == 1).all()
    assert small.amax() > 0.5
    assert sampler.sum() == 61 * 8 * math.ceil((phase + thickness) / 8)


@few
@given(st.one_of(binary(2), grey(2)), st.integers(1, 9))
def test_snapping_takes_the_largest_value_of_each_cell_whatever_the_size(mask, side):
    snapped = snap_to_grid(mask, side)
    for top in range(0, mask.shape[1], side):
        for left in range(0, mask.shape[2], side):
            cell = (slice(None), slice(top, top + side), slice(left, left + side))
            assert torch.equal(snapped[cell], mask[cell].amax(dim=(1, 2), keepdim=True).expand_as(mask[cell]))


def test_percent_is_of_the_longer_side_and_of_the_area():
    mask = torch.zeros(1, 100, 200)
    mask[:, 45:55, 95:105] = 1
    mask[:, 5, 5:9] = 1
    options = MaskOptions(unit=Unit.PERCENT, grow=2, feather=1.5, min_island=0.1)
    assert torch.equal(prepare(mask, options), prepare(mask, MaskOptions(grow=4, feather=3, min_island=20)))
    assert not prepare(mask, options)[:, :20].any()
    assert to_pixels("grow", -3, Unit.PERCENT, Size(60, 400)) == -12
    with pytest.raises(
        InputError, match="grow is 50 % of 4096x10, 2048 pixels; give at most 1024 pixels, which are 25 %"
    ):
        prepare(torch.zeros(1, 10, 4096), MaskOptions(unit=Unit.PERCENT, grow=50))


def test_every_mask_of_a_batch_has_its_own_islands():
    mask = torch.zeros(3, 20, 30)
    mask[0, 2:6, 2:6] = mask[0, 10, 10] = 1
    mask[1, 10, 10] = 1
    largest = prepare(mask, MaskOptions(keep_largest=True))
    assert torch.equal(largest[1:], mask[1:])
    assert largest[0].sum() == 16
    assert not prepare(mask, MaskOptions(min_island=2))[1:].any()


def test_a_faint_smear_falls_under_the_floor_and_the_rest_stays_grey():
    mask = torch.tensor([[[0.05, 0.1, 0.5, 1.0]]])
    assert torch.equal(prepare(mask, MaskOptions(floor=0.1)), torch.tensor([[[0.0, 0.1, 0.5, 1.0]]]))


def test_a_latent_cell_of_no_size_is_refused():
    for downscale in (0, 65):
        with pytest.raises(InputError, match="downscale"):
            prepare_masks(torch.ones(1, 8, 8), MaskOptions(), downscale)
        with pytest.raises(InputError, match="downscale"):
            snap_to_grid(torch.ones(1, 8, 8), downscale)
