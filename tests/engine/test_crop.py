import pytest
import torch
from comfyui_mend.engine.crop import MAX_ASPECT, MIN_CONTEXT, CropPlan, around, whole
from comfyui_mend.engine.types import Box, Size
from hypothesis import given
from hypothesis import strategies as st

NATIVE, CELL = 512, 8


@st.composite
def mask_in_picture(draw):
    width, height = draw(st.integers(1, 3000)), draw(st.integers(1, 3000))
    left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    right, bottom = draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height))
    return Box(left, top, right, bottom), Size(width, height)


@given(mask_in_picture())
def test_the_box_holds_the_mask_and_lies_in_the_picture(case):
    mask, picture = case
    box = around(mask, picture, NATIVE, CELL).box
    assert box.left <= mask.left and box.top <= mask.top
    assert box.right >= mask.right and box.bottom >= mask.bottom
    assert box.left >= 0 and box.top >= 0
    assert box.right <= picture.width and box.bottom <= picture.height


@given(mask_in_picture())
def test_the_canvas_is_whole_cells_of_about_the_native_area(case):
    mask, picture = case
    plan = around(mask, picture, NATIVE, CELL)
    assert plan.canvas.width % CELL == 0 and plan.canvas.height % CELL == 0
    assert 0 <= plan.canvas.width - plan.scaled.width < CELL
    area = plan.scaled.width * plan.scaled.height
    # a sliver of a picture cannot reach the native area without a side below one cell
    if min(plan.scaled) > 4 * CELL:
        assert 0.7 <= area / NATIVE**2 <= 1.3


@given(mask_in_picture())
def test_context_is_given_on_every_side_that_has_room(case):
    mask, picture = case
    box = around(mask, picture, NATIVE, CELL).box
    if mask.width + 2 * MIN_CONTEXT <= picture.width and MIN_CONTEXT < mask.left < picture.width - mask.right:
        assert mask.left - box.left >= MIN_CONTEXT - CELL


def test_a_small_mask_in_a_large_picture_is_cut_without_resampling():
    plan = around(Box(1000, 700, 1100, 760), Size(2000, 1500), NATIVE, CELL)
    assert plan.box.size == plan.scaled == plan.canvas == Size(NATIVE, NATIVE)
    # and the mask sits in its middle
    assert plan.box == Box(794, 474, 1306, 986)


def test_a_long_thin_mask_gets_a_sane_aspect():
    plan = around(Box(0, 1000, 2000, 1010), Size(2000, 2000), NATIVE, CELL)
    assert plan.box.width / plan.box.height <= MAX_ASPECT * 1.02


def test_a_small_picture_is_enlarged_to_the_native_area():
    plan = around(Box(10, 10, 30, 30), Size(100, 100), NATIVE, CELL)
    assert plan.box.size == Size(100, 100)
    assert plan.scaled == Size(512, 512)


def test_whole_keeps_every_pixel_and_pads_to_cells():
    plan = whole(Size(513, 613), CELL)
    assert plan.box.size == plan.scaled == Size(513, 613)
    assert plan.canvas == Size(520, 616)


@given(st.integers(1, 70), st.integers(1, 70))
def test_cut_and_uncut_without_resampling_are_inverse(width, height):
    picture = torch.rand(2, height, width, 3, generator=torch.Generator().manual_seed(width * 71 + height))
    plan = whole(Size(width, height), CELL)
    assert torch.equal(plan.uncut(plan.cut(picture)), picture)


def test_the_padding_repeats_the_edge_in_picture_and_mask():
    plan = whole(Size(9, 9), CELL)
    picture = torch.rand(1, 9, 9, 3)
    mask = torch.zeros(1, 9, 9)
    mask[:, :, 8] = 1
    canvas, hole = plan.cut(picture), plan.cut_mask(mask)
    assert canvas.shape == (1, 16, 16, 3) and hole.shape == (1, 16, 16)
    assert torch.equal(canvas[:, :9, 15], picture[:, :, 8])
    assert bool((hole[:, :, 8:] == 1).all()) and not hole[:, :, :8].any()


def test_a_resampled_round_trip_keeps_a_smooth_picture():
    y, x = torch.meshgrid(torch.linspace(0, 1, 1200), torch.linspace(0, 1, 1600), indexing="ij")
    picture = torch.stack([x, y, (x + y) / 2], dim=-1)[None]
    plan = around(Box(100, 100, 1500, 1100), Size(1600, 1200), NATIVE, CELL)
    back = plan.uncut(plan.cut(picture))
    original = picture[:, plan.box.rows, plan.box.columns]
    assert back.shape == original.shape
    assert float((back - original).abs().mean()) < 1e-3


@pytest.mark.parametrize("scale", [0.2, 0.43, 0.9, 1.0, 1.3, 2.5, 6.0])
def test_nothing_under_the_mask_shows_on_the_canvas_outside_the_hole(scale):
    generator = torch.Generator().manual_seed(0)
    picture = torch.rand(1, 120, 150, 3, generator=generator)
    mask = torch.zeros(1, 120, 150)
    mask[:, 33:71, 40:97] = 1
    mask[:, 100, 3] = 0.02
    other = torch.where(mask[..., None] > 0, torch.rand(1, 120, 150, 3, generator=generator), picture)
    size = Size(round(150 * scale), round(120 * scale))
    plan = CropPlan(Box(0, 0, 150, 120), size, size)
    kept = 1 - plan.cut_hole(mask)[..., None]
    assert torch.equal(plan.cut(picture) * kept, plan.cut(other) * kept)
    # and the hole is not much larger than it has to be
    reach = 3 * max(1, scale)
    assert (
        float((1 - kept).sum())
        <= (57 * scale + 2 * reach + 2) * (38 * scale + 2 * reach + 2) + (2 * reach + scale + 2) ** 2
    )
