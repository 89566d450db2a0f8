import pytest
import torch
from comfyui_mend.engine.crop import CropOptions
from comfyui_mend.engine.regions import MAX_REGIONS, Video, regions, stable_boxes
from comfyui_mend.engine.types import Box, InputError
from hypothesis import given, settings
from hypothesis import strategies as st

TIGHT = CropOptions(context_factor=1, context_pixels=4, min_size=0, target=None, multiple=1, max_aspect=100)
few = settings(max_examples=40)


def spots(*boxes, height=200, width=300):
    mask = torch.zeros(1, height, width)
    for left, top, right, bottom in boxes:
        mask[:, top:bottom, left:right] = 1
    return mask


# --- regions


def test_places_apart_are_regions_in_reading_order():
    found = regions(spots((200, 20, 220, 40), (10, 100, 40, 130), (10, 20, 30, 30)), TIGHT)
    assert [region.box for region in found] == [Box(10, 20, 30, 30), Box(200, 20, 220, 40), Box(10, 100, 40, 130)]
    assert found[0].plan.box == Box(6, 16, 34, 34)


def test_places_whose_contexts_meet_are_one():
    near, far = spots((10, 10, 20, 20), (26, 10, 36, 20)), spots((10, 10, 20, 20), (30, 10, 40, 20))
    assert len(regions(near, TIGHT)) == 1
    assert len(regions(far, TIGHT)) == 2


def test_joining_goes_on_until_nothing_meets():
    # the first two meet only as one box, which then reaches the third
    mask = spots((10, 10, 20, 20), (24, 60, 34, 70), (10, 30, 16, 52))
    found = regions(mask, TIGHT)
    assert len(found) < 3
    boxes = [region.box for region in found]
    assert all(abs(a.left - b.left) > 8 or abs(a.top - b.top) > 8 for a in boxes for b in boxes if a != b)


def test_touching_at_a_corner_belongs_together():
    options = CropOptions(context_factor=1, context_pixels=0, min_size=0, target=None, multiple=1)
    assert len(regions(spots((10, 10, 20, 20), (20, 20, 30, 30)), options)) == 1


def test_the_minimum_size_does_not_join():
    options = CropOptions(context_factor=1, context_pixels=0, min_size=150, target=None)
    assert len(regions(spots((10, 10, 20, 20), (60, 10, 70, 20)), options)) == 2


def test_an_empty_mask_has_no_regions():
    assert regions(torch.zeros(2, 30, 40), TIGHT) == []


def test_a_full_mask_is_one_region():
    (region,) = regions(torch.ones(1, 30, 40), TIGHT)
    assert region.box == region.plan.box == Box(0, 0, 40, 30)


def test_specks_beyond_reason_are_refused_in_a_sentence():
    mask = torch.zeros(1, 340, 340)
    mask[:, ::20, ::20] = 1
    assert mask.sum() > MAX_REGIONS
    with pytest.raises(InputError, match=f"has {int(mask.sum())} separate regions"):
        regions(mask, TIGHT)


@st.composite
def speckled(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    height, width = draw(st.integers(1, 90)), draw(st.integers(1, 90))
    noise = torch.rand(draw(st.integers(1, 2)), height, width, generator=generator)
    return torch.where(noise < draw(st.sampled_from([0.001, 0.01, 0.5])), noise + 0.1, torch.zeros(()))


@few
@given(speckled())
def test_regions_take_every_pixel_once(mask):
    found = regions(mask, TIGHT)
    whole = sum((region.own(mask) for region in found), torch.zeros_like(mask))
    assert torch.equal(whole, mask)
    taken = sum(((region.own(mask) > 0).amax(0).int() for region in found), torch.zeros(mask.shape[1:]))
    assert float(taken.max()) <= 1
    for region in found:
        assert region.where.any() and region.where.shape == (region.box.height, region.box.width)
        assert region.plan.box.left <= region.box.left and region.plan.box.bottom >= region.box.bottom


@few
@given(speckled())
def test_regions_mirror_with_the_picture(mask):
    def boxes(mask):
        return {region.box for region in regions(mask, TIGHT)}

    width = mask.shape[2]
    mirrored = {Box(width - box.right, box.top, width - box.left, box.bottom) for box in boxes(mask.flip(2))}
    assert mirrored == boxes(mask)


# --- stable boxes


@st.composite
def walk(draw):
    boxes = []
    for _ in range(draw(st.integers(1, 30))):
        left, top = draw(st.integers(-50, 900)), draw(st.integers(-50, 500))
        box = Box(left, top, left + draw(st.integers(1, 200)), top + draw(st.integers(1, 200)))
        boxes.append(draw(st.sampled_from([box, box, box, None])))
    return boxes if any(boxes) else [Box(0, 0, 5, 5)]


@given(walk(), st.sampled_from([Video.UNION, Video.SMOOTHED]), st.sampled_from([0, 1.5, 8, 1000]))
def test_stable_boxes_have_one_size_and_hold_every_frames_box(boxes, mode, smoothing):
    stable = stable_boxes(boxes, mode, smoothing)
    assert len(stable) == len(boxes) and len({box.size for box in stable}) == 1
    for box, frame in zip(stable, boxes, strict=True):
        if frame is not None:
            assert box.left <= frame.left and box.top <= frame.top
            assert box.right >= frame.right and box.bottom >= frame.bottom
    if mode is Video.UNION:
        assert len(set(stable)) == 1


@given(walk(), st.sampled_from([1.5, 8]))
def test_smoothing_neither_lags_nor_leads(boxes, smoothing):
    forth = stable_boxes(boxes, Video.SMOOTHED, smoothing)
    back = stable_boxes(boxes[::-1], Video.SMOOTHED, smoothing)[::-1]
    assert all(abs(a.left - b.left) <= 1 and abs(a.top - b.top) <= 1 for a, b in zip(forth, back, strict=True))


def test_a_trembling_box_comes_to_rest():
    boxes = [Box(100 + 6 * (-1) ** frame, 50, 200 + 6 * (-1) ** frame, 120) for frame in range(60)]
    stable = stable_boxes(boxes, Video.SMOOTHED, 4)
    assert len({box.left for box in stable[10:-10]}) == 1
    assert stable[0].width <= 124


def test_a_steady_walk_is_followed_exactly():
    boxes = [Box(5 * frame, 10, 5 * frame + 40, 30) for frame in range(100)]
    stable = stable_boxes(boxes, Video.SMOOTHED, 3)
    inner = zip(stable[20:-20], boxes[20:-20], strict=True)
    assert all(abs((box.left + box.right) - (frame.left + frame.right)) <= 2 for box, frame in inner)


def test_frames_without_a_mask_lie_between_their_neighbours():
    stable = stable_boxes([Box(0, 0, 10, 10), None, None, Box(30, 0, 40, 10)], Video.SMOOTHED, 0)
    assert [box.left - stable[0].left for box in stable] == [0, 10, 20, 30]


def test_a_video_without_any_mask_is_refused():
    with pytest.raises(InputError, match="all frames are empty"):
        stable_boxes([None, None], Video.UNION)
