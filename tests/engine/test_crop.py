import pytest
import torch
from comfyui_mend.engine.crop import (
    MAX_ASPECT,
    MIN_CONTEXT,
    SD2_SIZES,
    SD15_SIZES,
    SDXL_SIZES,
    Area,
    CanvasSize,
    CropOptions,
    CropPlan,
    Overflow,
    Sizes,
    around,
    plan,
    surroundings,
    target_of,
    whole,
)
from comfyui_mend.engine.fill import FillMethod, fill
from comfyui_mend.engine.types import Box, InputError, Size
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


@pytest.mark.parametrize(("picture", "canvas"), [(Size(12, 9), Size(3000, 2250)), (Size(4, 3), Size(5000, 12))])
def test_the_hole_is_as_large_and_as_quickly_made_however_far_a_crop_is_enlarged(picture, canvas):
    """A window of 501 or 2501 pixels: looking at each of its pixels for every pixel would take minutes."""
    mask = torch.zeros(1, picture.height, picture.width)
    mask[0, 1, 2] = 1
    plan = CropPlan(Box(0, 0, *picture), canvas, canvas)
    touched = (plan.cut_mask(mask)[0] > 0).nonzero()
    (top, left), (bottom, right) = touched.amin(dim=0).tolist(), touched.amax(dim=0).tolist()
    reach = max(canvas.width // picture.width, canvas.height // picture.height)
    expected = torch.zeros(1, canvas.height, canvas.width)
    expected[:, max(top - reach, 0) : bottom + reach + 1, max(left - reach, 0) : right + reach + 1] = 1
    assert torch.equal(plan.cut_hole(mask), expected)


# --- plans from options

OWN = {"target": None, "min_size": 0, "context_pixels": 0, "max_aspect": 100, "multiple": 1}


@st.composite
def options(draw):
    multiple = draw(st.sampled_from([1, 8, 64]))
    targets = [None, Area(200_000), Area(1024 * 1024), Sizes((Size(512, 768),)), Sizes(SDXL_SIZES)]
    return CropOptions(
        context_factor=draw(st.sampled_from([1, 1.5, 4])),
        context_pixels=draw(st.sampled_from([0, 17, 200])),
        min_size=draw(st.sampled_from([0, 300, 1024])),
        target=draw(st.sampled_from(targets)),
        multiple=multiple,
        keep_scale=draw(st.sampled_from([0, 0.25])),
        max_aspect=draw(st.sampled_from([1, 2, 100])),
        overflow=draw(st.sampled_from(list(Overflow))),
    )


@st.composite
def mask_in_photo(draw):
    width, height = draw(st.integers(40, 2000)), draw(st.integers(40, 2000))
    left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    right, bottom = draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height))
    return Box(left, top, right, bottom), Size(width, height)


def holds(outer, inner):
    return (
        outer.left <= inner.left
        and outer.top <= inner.top
        and outer.right >= inner.right
        and outer.bottom >= inner.bottom
    )


@given(mask_in_photo(), options())
def test_a_plan_shows_the_mask_on_a_canvas_of_whole_multiples(case, options):
    mask, picture = case
    planned = plan(mask, picture, options)
    assert holds(planned.box, mask) and holds(Box(0, 0, *picture), planned.box)
    assert planned.canvas.width % options.multiple == 0 and planned.canvas.height % options.multiple == 0
    assert planned.scaled.width <= planned.canvas.width and planned.scaled.height <= planned.canvas.height
    if isinstance(options.target, Sizes):
        assert planned.canvas in options.target.sizes
    if options.overflow is Overflow.INSIDE:
        assert planned.outside is None
    else:
        # what sticks out does so only where the picture is too small
        assert planned.outside is None or (
            (planned.extent.width == planned.box.width or planned.box.width == picture.width)
            and (planned.extent.height == planned.box.height or planned.box.height == picture.height)
        )


@given(mask_in_photo(), options())
def test_a_plan_keeps_the_aspect(case, options):
    planned = plan(*case, options)
    across, down = planned.scaled.width / planned.extent.width, planned.scaled.height / planned.extent.height
    # to the rounding of a pixel, or the percent that fills the canvas
    assert abs(across / down - 1) <= max(0.01, 1 / min(planned.scaled))


@given(mask_in_photo(), options())
def test_a_plan_mirrors_with_the_picture(case, options):
    mask, picture = case
    mirrored = plan(Box(picture.width - mask.right, mask.top, picture.width - mask.left, mask.bottom), picture, options)
    planned = plan(mask, picture, options)
    assert mirrored.canvas == planned.canvas and mirrored.scaled == planned.scaled
    # an odd pixel goes to one side
    assert abs(picture.width - mirrored.box.right - planned.box.left) <= 1


@given(mask_in_photo(), options())
def test_the_same_place_elsewhere_gets_the_same_size(case, options):
    mask, picture = case
    moved = Box(0, picture.height - mask.height, mask.width, picture.height)
    planned, other = plan(mask, picture, options), plan(moved, picture, options)
    assert (planned.extent, planned.scaled, planned.canvas) == (other.extent, other.scaled, other.canvas)


def test_a_factor_is_the_boxs_side_over_the_masks():
    planned = plan(Box(400, 300, 600, 400), Size(1000, 1000), CropOptions(context_factor=1.5, **OWN))
    assert planned.box == Box(350, 275, 650, 425)


def test_context_pixels_are_a_least():
    options = CropOptions(**OWN | {"context_factor": 1.5, "context_pixels": 40})
    assert plan(Box(400, 300, 600, 400), Size(1000, 1000), options).box == Box(350, 260, 650, 440)


def test_a_context_box_is_shown_in_full():
    planned = plan(
        Box(400, 300, 410, 310), Size(1000, 1000), CropOptions(context_factor=1, **OWN), Box(700, 20, 705, 25)
    )
    assert planned.box == Box(400, 20, 705, 310)


def test_a_box_at_the_border_moves_inside_at_full_size():
    planned = plan(Box(0, 0, 100, 50), Size(1000, 1000), CropOptions(**OWN | {"min_size": 300}))
    assert planned.box == Box(0, 0, 300, 300)


def test_no_target_never_resamples():
    planned = plan(Box(3, 5, 1500, 1200), Size(2000, 1501), CropOptions(target=None))
    assert not planned.resamples and planned.canvas.width % 8 == 0


@pytest.mark.parametrize(("side", "resamples"), [(440, True), (480, False), (512, False), (560, False), (640, True)])
def test_a_box_of_nearly_the_target_is_used_pixel_for_pixel(side, resamples):
    options = CropOptions(**OWN | {"target": Sizes((Size(512, 512),)), "context_factor": 1})
    planned = plan(Box(500, 500, 500 + side, 500 + side // 2), Size(2000, 2000), options)
    if side == 560:
        # trimmed to the target it would lose a part of the mask
        assert planned.resamples
    else:
        assert planned.resamples == resamples
    assert holds(planned.box, Box(500, 500, 500 + side, 500 + side // 2))


def test_keep_scale_0_always_hits_the_target():
    mask = Box(500, 500, 980, 980)
    options = {**OWN, "context_factor": 1, "target": Area(512 * 512), "multiple": 8}
    assert plan(mask, Size(2000, 2000), CropOptions(**options)).canvas == Size(480, 480)
    assert plan(mask, Size(2000, 2000), CropOptions(**options, keep_scale=0)).canvas == Size(512, 512)


@pytest.mark.parametrize("sizes", [SDXL_SIZES, SD15_SIZES, SD2_SIZES])
def test_buckets_have_one_area_and_both_orientations(sizes):
    area = sizes[0].width * sizes[0].height
    assert all(
        0.89 * area <= width * height <= 1.05 * area and not width % 64 and not height % 64 for width, height in sizes
    )
    assert {Size(height, width) for width, height in sizes} == set(sizes)


def test_the_bucket_is_the_one_of_the_boxs_aspect():
    options = CropOptions(**OWN | {"target": Sizes(SDXL_SIZES)})
    assert plan(Box(100, 100, 500, 320), Size(2000, 2000), options).canvas == Size(1344, 768)
    assert plan(Box(100, 100, 320, 500), Size(2000, 2000), options).canvas == Size(768, 1344)


def test_extending_shows_a_fill_beyond_the_border_and_leaves_it_there():
    picture = torch.rand(2, 60, 40, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 60, 40)
    mask[:, 20:40, :10] = 1
    options = CropOptions(
        **OWN | {"min_size": 50, "overflow": "extend", "fill": "blur", "mask_outside": True, "context_factor": 1}
    )
    planned = plan(Box(0, 20, 10, 40), Size(40, 60), options)
    assert planned.extent == Size(50, 50) and planned.box.width == 40
    crop, crop_mask = planned.cut(picture), planned.cut_mask(mask)
    beyond = planned.outside.padding
    assert beyond.left + beyond.right == 10 and beyond.top == beyond.bottom == 0
    inside = (slice(None), slice(None), slice(beyond.left, beyond.left + 40))
    assert torch.equal(crop[inside], picture[:, planned.box.rows])
    assert torch.equal(crop_mask[inside], mask[:, planned.box.rows])
    outside = torch.ones(1, 50, 50)
    outside[inside] = 0
    assert bool((crop_mask[:, outside[0] == 1] == 1).all())
    assert torch.equal(crop, fill(crop, outside.expand(2, -1, -1), FillMethod.BLUR))
    assert torch.equal(planned.uncut(crop), picture[:, planned.box.rows])


@given(mask_in_photo(), options(), st.sampled_from([1, 2, 3]))
def test_a_canvas_comes_back_at_any_scale(case, options, times):
    mask, picture = case
    planned = plan(mask, picture, options)
    canvas = torch.zeros(1, 1, 1, 3).expand(1, planned.canvas.height * times, planned.canvas.width * times, 3)
    if canvas.shape[1] * canvas.shape[2] < 2**21:
        assert planned.uncut(canvas).shape == (1, planned.box.height, planned.box.width, 3)


@pytest.mark.parametrize("scale", [0.37, 0.8, 1.0, 1.7, 4.3])
def test_a_change_reaches_no_further_than_the_filter(scale):
    generator = torch.Generator().manual_seed(1)
    size = Size(round(90 * scale), round(70 * scale))
    planned = CropPlan(Box(0, 0, 90, 70), size, size)
    cut = planned.cut(torch.rand(1, 70, 90, 3, generator=generator))
    other = cut.clone()
    y, x = size.height // 3, size.width // 2
    other[0, y, x, 1] = 1 - other[0, y, x, 1]
    changed = planned.changed(cut, other)
    same = planned.uncut(cut) == planned.uncut(other)
    # what is called unchanged is, and little else is called changed
    assert bool(same[changed == 0].all())
    assert float(changed.sum()) <= (5 * max(1, 1 / scale) + 3) ** 2
    assert not planned.changed(cut, cut + 5e-7).any()


def test_surroundings_may_stick_out():
    assert surroundings(Box(0, 0, 10, 10), CropOptions(**OWN | {"context_factor": 2})) == Box(-5, -5, 15, 15)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"context_factor": 0.5}, "context_factor is 0.5"),
        ({"context_pixels": -1}, "context_pixels"),
        ({"multiple": 0}, "multiple is 0"),
        ({"keep_scale": 1}, "keep_scale"),
        ({"max_aspect": 0.9}, "max_aspect"),
        ({"fill": "lama"}, "needs a network"),
        ({"target": Sizes((Size(500, 512),))}, "give 496"),
    ],
)
def test_options_out_of_range_are_named(wrong, says):
    with pytest.raises(InputError, match=says):
        CropOptions(**wrong)


@pytest.mark.parametrize("make", [lambda: Area.megapixels(0), lambda: Area.megapixels(1e9), lambda: Sizes(())])
def test_targets_out_of_range_are_refused(make):
    with pytest.raises(InputError):
        make()


def test_every_choice_of_a_canvas_size_is_a_target():
    targets = {choice: target_of(choice, Size(640, 512), 0.25) for choice in CanvasSize}
    assert targets[CanvasSize.OWN] is None
    assert targets[CanvasSize.EXACT] == Sizes((Size(640, 512),))
    assert targets[CanvasSize.MEGAPIXELS] == Area(512 * 512)
    assert {Size(1024, 1024), Size(512, 512), Size(768, 768)} <= {
        size for choice in (CanvasSize.SDXL, CanvasSize.SD15, CanvasSize.SD2) for size in targets[choice].sizes
    }
