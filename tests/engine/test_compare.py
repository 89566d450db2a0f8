"""What an edit did to a picture, in numbers and in a picture."""

import json

import numpy as np
import pytest
import torch
from comfyui_mend.engine.color import delta_e_2000, srgb_to_lab
from comfyui_mend.engine.compare import CONTOUR_DISTANCE, FLAT, Limits, Offset, compare
from comfyui_mend.engine.heatmap import LEGEND, LEGEND_WIDTH, LONGEST, SHORTEST, heatmaps
from comfyui_mend.engine.registration import Shift, apply_shift
from comfyui_mend.engine.types import InputError, Size
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage import data

few = settings(max_examples=25)
STEP = 6 / 255


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def photo(name="coffee"):
    return torch.from_numpy(getattr(data, name)()[40:240, 60:300]).float()[None] / 255


def box(size=(200, 240), rows=slice(60, 140), columns=slice(80, 170)):
    mask = torch.zeros(1, *size)
    mask[:, rows, columns] = 1
    return mask


def figures(before, after, mask, **options):
    return compare(before, after, mask, **options).images[0]


# --- outside and inside


def test_differences_are_counted_apart_inside_and_outside():
    before = torch.full((1, 10, 20, 3), 0.5)
    mask = box((10, 20), slice(0, 5), slice(0, 20))
    after = before.clone()
    after[0, 2, :, 1] = 0.75
    after[0, 7, 3] = torch.tensor([0.5, 0.375, 0.5])
    after[0, 8, 4] = 1
    found = figures(before, after, mask)
    assert found.size == Size(20, 10) and found.coverage == 0.5
    outside, inside = found.outside, found.inside
    assert (outside.max, outside.changed, outside.share) == (0.5, 2, 2 / 100)
    assert outside.mean == pytest.approx((0.125 + 3 * 0.5) / 300)
    assert (inside.max, inside.changed) == (0.25, 20)
    assert inside.mean == pytest.approx(20 * 0.25 / 300)


@few
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 10**6), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_every_picture_and_mask_has_a_report_without_nan(height, width, seed, density):
    before, after = noise(1, height, width, 3, seed=seed), noise(1, height, width, 3, seed=seed + 1)
    mask = (noise(1, height, width, seed=seed + 2) < density).float()
    comparison = compare(before, after, mask)
    report = json.loads(comparison.to_json(), parse_constant=lambda name: pytest.fail(f"{name} in the report"))
    difference = (after - before).abs()
    for name, area in (("outside", mask == 0), ("inside", mask > 0)):
        change = report["images"][0][name]
        if not area.any():
            assert change is None
        else:
            assert change["max"] == difference[area].max()
            assert change["mean"] == pytest.approx(float(difference[area].double().mean()), rel=1e-6)
    assert comparison.passed and str(comparison)


def test_strips_of_a_large_picture_add_up():
    before, mask = torch.zeros(1, 1500, 1024, 3), torch.zeros(1, 1500, 1024)
    after = before.clone()
    after[0, ::300, 5] = 0.25
    outside = figures(before, after, mask).outside
    assert (outside.changed, outside.max) == (5, 0.25)
    assert outside.mean == pytest.approx(5 * 0.25 / (1500 * 1024))


def test_empty_and_full_masks_leave_out_what_they_cannot_tell():
    before, after = photo(), photo() ** 1.1
    empty, full = (compare(before, after, mask).images[0] for mask in (0 * box(), 0 * box() + 1))
    assert empty.coverage == 0 and empty.inside is None and empty.outside.changed > 0
    assert full.coverage == 1 and full.outside is None and full.shift is None
    for found in (empty, full):
        assert found.seam is found.ring is found.grain is None


def test_alpha_is_compared_where_both_have_it():
    before = torch.cat([photo(), torch.ones(1, 200, 240, 1)], dim=-1)
    after = before.clone()
    after[0, 0, 0, 3] = 0.5
    assert figures(before, after, box()).outside.max == 0.5
    assert figures(before, after[..., :3], box()).outside.max == 0


# --- the seam


def test_the_seam_ratio_is_the_step_over_the_slope_beside_it():
    ramp = (torch.arange(200) / 255)[None, None, :, None].expand(1, 40, -1, 3)
    mask = box((40, 200), slice(0, 40), slice(0, 100))
    assert figures(ramp, ramp, mask).seam.ratio == pytest.approx(1, abs=1e-4)
    stepped = ramp - STEP * mask[..., None]
    seam = figures(ramp, stepped, mask).seam
    assert seam.ratio == pytest.approx(7, abs=1e-3) and seam.before == pytest.approx(1, abs=1e-4)


def test_the_seam_ratio_by_hand_on_a_photograph():
    picture = photo()
    after = (picture + STEP * box()[..., None]).numpy()[0]

    def line(grown):  # pairs across the edge of the box, side by side; round corners make the grown one longer
        inside = np.zeros((200, 240), bool)
        rows, columns = np.mgrid[:200, :240]
        outward = np.hypot(
            np.maximum(np.maximum(60 - rows, rows - 139), 0), np.maximum(np.maximum(80 - columns, columns - 169), 0)
        )
        inward = np.minimum(np.minimum(rows - 59, 140 - rows), np.minimum(columns - 79, 170 - columns))
        inside = outward <= grown if grown >= 0 else inward > -grown
        steps = [abs(after[y + 1, x] - after[y, x]).mean() for y, x in np.argwhere(inside[1:] != inside[:-1])]
        steps += [abs(after[y, x + 1] - after[y, x]).mean() for y, x in np.argwhere(inside[:, 1:] != inside[:, :-1])]
        return steps

    expected = np.mean(line(0)) / np.mean(line(CONTOUR_DISTANCE) + line(-CONTOUR_DISTANCE))
    assert figures(picture, torch.from_numpy(after)[None], box()).seam.ratio == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["coffee", "chelsea", "astronaut"])
def test_an_offset_patch_shows_in_seam_and_ring_and_a_clean_one_does_not(name):
    before, mask = photo(name), box()
    clean, offset = (figures(before, before + step * mask[..., None], mask) for step in (0, STEP))
    assert clean.seam.ratio == clean.seam.before and clean.ring.step == clean.ring.step_before
    assert offset.seam.ratio > clean.seam.ratio + 0.05 and offset.seam.before == clean.seam.ratio
    assert offset.ring.step > clean.ring.step + 0.3
    assert clean.ring.drift == 0 and 1 < offset.ring.drift < 4


def test_flat_pictures_have_a_ratio():
    before, mask = torch.full((1, 80, 80, 3), 0.5), box((80, 80), slice(20, 60), slice(20, 60))
    assert figures(before, before, mask).seam.ratio == 1
    assert figures(before, before + STEP * mask[..., None], mask).seam.ratio == pytest.approx(STEP / FLAT, rel=1e-4)


def test_a_feathered_mask_is_measured_where_it_crosses_half():
    before, hard = torch.full((1, 80, 80, 3), 0.5), box((80, 80), slice(0, 80), slice(0, 40))
    feathered = hard.clone()
    feathered[..., 40:46] = torch.linspace(0.45, 0.05, 6)
    after = before + STEP * hard[..., None]
    assert figures(before, after, feathered).seam.ratio == figures(before, after, hard).seam.ratio
    # a mask that is grey throughout has its contour too
    assert figures(before, after, feathered * 0.5).seam.ratio == figures(before, after, hard).seam.ratio


@pytest.mark.parametrize(
    "rows, columns",
    [
        (slice(0, 30), slice(0, 30)),
        (slice(170, 200), slice(200, 240)),
        (slice(0, 200), slice(0, 3)),
        (slice(50, 53), slice(9, 200)),
    ],
)
def test_masks_at_borders_and_thin_ones_are_measured(rows, columns):
    before, mask = (
        torch.linspace(0.2, 0.7, 240)[None, None, :, None].expand(1, 200, -1, 3),
        box(rows=rows, columns=columns),
    )
    clean, offset = (figures(before, before + step * mask[..., None], mask) for step in (0, STEP))
    assert clean.seam.ratio < 1.5 and clean.ring.step < 1
    assert offset.seam.ratio > 5 and offset.ring.step > 1.2


@few
@given(st.integers(0, 10**6))
def test_figures_commute_with_flips_and_turns(seed):
    before, after = noise(1, 50, 60, 3, seed=seed), noise(1, 50, 60, 3, seed=seed + 1)
    mask = (noise(1, 5, 6, seed=seed + 2) < 0.4).float().repeat_interleave(10, 1).repeat_interleave(10, 2)
    here = figures(before, after, mask)
    for turn in (lambda t: t.flip(1), lambda t: t.flip(2), lambda t: t.transpose(1, 2)):
        there = figures(*(turn(t) for t in (before, after, mask)))
        assert there.outside == here.outside or there.outside.mean == pytest.approx(here.outside.mean)
        if here.seam:
            assert there.seam.ratio == pytest.approx(here.seam.ratio)
            assert there.ring.step == pytest.approx(here.ring.step, abs=1e-6)


def test_the_ring_compares_colours_as_the_eye_does():
    red, green = torch.tensor([0.6, 0.3, 0.3]), torch.tensor([0.3, 0.6, 0.3])
    mask = box((60, 60), slice(20, 40), slice(20, 40))
    before = red.expand(1, 60, 60, 3)
    after = torch.where(mask[..., None] > 0, green, before)
    expected = float(delta_e_2000(srgb_to_lab(red.double()), srgb_to_lab(green.double())))
    ring = figures(before, after, mask).ring
    assert ring.step == pytest.approx(expected, abs=1e-4) == pytest.approx(ring.drift, abs=1e-4)
    assert ring.step_before == pytest.approx(0, abs=1e-6)


# --- shift and grain


@pytest.mark.parametrize(("dx", "dy"), [(2, -1), (0.5, 0.25)])
def test_a_displaced_picture_is_found_outside_the_mask(dx, dy):
    before, mask = photo(), box()
    after = torch.where(mask[..., None] > 0, noise(1, 200, 240, 3), apply_shift(before, Shift(dx, dy)))
    shift = figures(before, after, mask).shift
    assert abs(shift.dx - dx) < 0.1 and abs(shift.dy - dy) < 0.1


def test_what_did_not_change_did_not_move():
    assert figures(photo(), photo(), box()).shift == Shift(0, 0, 1)
    flat = torch.full((1, 40, 40, 3), 0.5)
    assert figures(flat, flat + 0.1, box((40, 40), slice(9, 20), slice(9, 20))).shift is None


def test_grain_is_the_insides_over_its_surroundings():
    mask = box()
    before = (0.5 + 0.02 * torch.randn(1, 200, 240, 3, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    after = torch.where(mask[..., None] > 0, 0.5 + (before - 0.5) / 4, before)
    grain = figures(before, after, mask).grain
    assert grain.ratio == pytest.approx(0.25, rel=0.1) and grain.before == pytest.approx(1, rel=0.1)
    assert grain.outside == pytest.approx(0.02, rel=0.1)
    assert figures(before, after, box(rows=slice(60, 70), columns=slice(80, 90))).grain is None


# --- limits


def test_each_limit_fails_with_a_sentence_of_its_own():
    before, mask = photo(), box()
    after = apply_shift(before, Shift(1, 0))
    after = torch.where(mask[..., None] > 0, torch.full_like(before, 0.5), after)
    expected = {
        "outside": (0, "pixels outside the mask"),
        "seam": (0.1, "times the contrast of its surroundings"),
        "ring": (0.1, "the colour steps by a delta E"),
        "shift": (0.5, "what lies outside the mask moved by"),
        "grain_low": (0.5, "the least allowed: add grain"),
    }
    for name, (value, words) in expected.items():
        comparison = compare(before, after, mask, Limits(**{name: value}))
        assert len(comparison.failures) == 1 and words in comparison.failures[0]
        assert comparison.failures[0].startswith("Picture 1: ") and not comparison.passed
        assert comparison.failures[0] in str(comparison)
    noisy = compare(before, torch.where(mask[..., None] > 0, noise(1, 200, 240, 3), before), mask, Limits(grain_high=2))
    assert "too noisy" in noisy.failures[0]
    assert len(compare(before, after, mask, Limits(**{k: v for k, (v, _) in expected.items()})).failures) == 5
    generous = Limits(outside=1, seam=1e3, ring=100, shift=10, grain_low=0, grain_high=1e3)
    assert compare(before, after, mask, generous).passed


def test_one_changed_bit_fails_the_strictest_limit_and_none_passes_it():
    before, mask = photo(), box()
    after = before + STEP * mask[..., None]
    assert compare(before, after, mask, Limits(outside=0)).passed
    after[0, 199, 239, 2] = torch.nextafter(after[0, 199, 239, 2], torch.tensor(2.0))
    assert "1 pixels outside the mask" in compare(before, after, mask, Limits(outside=0)).failures[0]


def test_limits_out_of_range_are_explained():
    with pytest.raises(InputError, match=r"The limit outside is -1; give a value from 0 to 1\."):
        Limits(outside=-1)
    with pytest.raises(InputError, match="The limit seam is nan"):
        Limits(seam=float("nan"))


# --- which is compared with which


def test_a_batch_is_its_pictures_one_by_one():
    before, after = noise(3, 30, 40, 3), noise(3, 30, 40, 3, seed=1)
    masks = (noise(3, 30, 40, seed=2) > 0.6).float()
    batch = compare(before, after, masks, Limits(outside=0.5))
    for index in range(3):
        one = slice(index, index + 1)
        assert batch.images[index] == figures(before[one], after[one], masks[one])
    assert [sentence[:9] for sentence in batch.failures] == ["Picture 1", "Picture 2", "Picture 3"]


def test_several_results_are_compared_with_their_own_input():
    before, masks = noise(2, 20, 20, 3), (noise(2, 20, 20, seed=1) > 0.5).float()
    results = before.repeat_interleave(3, 0)
    results = torch.where(masks.repeat_interleave(3, 0)[..., None] > 0, noise(6, 20, 20, 3, seed=2), results)
    comparison = compare(before, results, masks, Limits(outside=0))
    assert len(comparison.images) == 6 and comparison.passed
    assert len(compare(before[:1], before[:1], masks).images) == 2
    assert len(compare(before, before[:1], masks[:1]).images) == 2
    with pytest.raises(InputError, match="2 pictures before, 3 after and 1 masks"):
        compare(before, noise(3, 20, 20, 3), masks[:1])


def test_an_outpainted_picture_is_compared_at_its_offset():
    before = photo()
    after = noise(1, 230, 300, 3)
    after[:, 10:210, 40:280] = before
    mask = torch.zeros(1, 230, 300)
    mask[..., :50] = 1
    found = figures(before, after, mask, offset=Offset(40, 10))
    # the feather's ten columns are inside too, and so is all that is new although the mask leaves it out
    assert found.outside.max == 0 and found.coverage == pytest.approx(1 - 200 * 230 / (230 * 300))
    after[0, 100, 100] += 0.1
    assert figures(before, after, mask, offset=Offset(40, 10)).outside.changed == 1
    with pytest.raises(InputError, match="before is 240x200 and after is 300x230; compare pictures of one size"):
        compare(before, after, mask)
    with pytest.raises(InputError, match=r"does not fit into after, 300x230, at 61,0"):
        compare(before, after, mask, offset=Offset(61, 0))


def test_progress_counts_the_pictures():
    seen = []
    compare(noise(1, 8, 8, 3), noise(3, 8, 8, 3), torch.ones(1, 8, 8), on_image=lambda *done: seen.append(done))
    assert seen == [(1, 3), (2, 3), (3, 3)]


# --- heat-maps


def heatmap(before, after, mask):
    return heatmaps(before, after, mask, compare(before, after, mask))[0]


def test_a_heat_map_glows_outside_is_blue_inside_and_grey_where_nothing_changed():
    before = torch.full((1, 600, 700, 3), 0.5)
    mask = box((600, 700), slice(100, 300), slice(100, 300))
    after = before + 0.1 * mask[..., None]
    after[0, 500, 600] += 0.5
    picture = heatmap(before, after, mask)
    assert picture.shape == (600 + LEGEND, 700, 3) and picture.dtype == torch.float32
    red, _, blue = picture[200, 200]
    assert blue > red
    red, _, blue = picture[500, 600]
    assert red > blue and red > 0.9
    unchanged = picture[400, 50]
    assert unchanged[0] == unchanged[1] == unchanged[2]
    assert picture[100, 150, 1] == 1  # the contour
    assert picture.min() >= 0 and picture.max() <= 1


@pytest.mark.parametrize("factor", [1e-7, 0.1 / 255, 1 / 255, 0.1])
def test_one_changed_pixel_of_a_large_picture_can_be_seen(factor):
    before, mask = torch.full((1, 3100, 2000, 3), 0.5), torch.zeros(1, 3100, 2000)
    after = before.clone()
    after[0, 1601, 1402] += factor
    picture = heatmap(before, after, mask)
    assert max(picture.shape[0] - LEGEND, picture.shape[1]) <= LONGEST
    colored = (picture[:-LEGEND].amax(-1) - picture[:-LEGEND].amin(-1)) > 0.3
    assert colored.sum() == 9 and colored[1601 // 3, 1402 // 3]


@pytest.mark.parametrize("size", [(1, 1), (3, 40), (300, 7), (513, 613)])
def test_heat_maps_of_every_size_have_room_for_their_legend(size):
    before, after, mask = noise(1, *size, 3), noise(1, *size, 4), (noise(1, *size, seed=3) > 0.5).float()
    picture = heatmap(before, after, mask)
    assert picture.shape[1] >= LEGEND_WIDTH and max(picture.shape[0] - LEGEND, picture.shape[1]) >= min(SHORTEST, 512)
    assert picture[-LEGEND:].std() > 0.05
