"""Crops that go to a sampler and come back."""

import math

import pytest
import torch
import torch.nn.functional as F
from comfyui_mend.engine import crop_stitch
from comfyui_mend.engine.crop import SDXL_SIZES, Area, CropOptions, Overflow, Sizes
from comfyui_mend.engine.crop_record import load, save
from comfyui_mend.engine.crop_stitch import Separate, crop_to_mask, stitch_crops
from comfyui_mend.engine.images import NEARLY, resize, size_of
from comfyui_mend.engine.masks import feather
from comfyui_mend.engine.regions import Video
from comfyui_mend.engine.stitch import Blend, Stitched, StitchOptions
from comfyui_mend.engine.types import Box, InputError, Size
from hypothesis import given, settings
from hypothesis import strategies as st

PLAIN = StitchOptions(blend=Blend.LINEAR, color_match=0)
OWN_SIZE = CropOptions(target=None, min_size=0)
SMALL = CropOptions(target=Area(96 * 96), min_size=0)
LARGE = CropOptions(target=Area(256 * 256), min_size=0)
EXTENDED = CropOptions(target=Sizes((Size(160, 160),)), min_size=100, overflow="extend", fill="blur")
TARGETS = [OWN_SIZE, SMALL, LARGE, CropOptions(target=Sizes((Size(128, 192),)), min_size=0), EXTENDED]
few = settings(max_examples=12)


def photo(batch=1, height=90, width=120, channels=3, seed=0):
    return torch.rand(batch, height, width, channels, generator=torch.Generator().manual_seed(seed))


def square(batch=1, height=90, width=120, box=Box(50, 30, 80, 55)):  # noqa: B008
    mask = torch.zeros(batch, height, width)
    mask[:, box.rows, box.columns] = 1
    return mask


def repaint(crops, by=0.3):
    """Every pixel different."""
    return [torch.where(crop > 0.5, crop - by, crop + by) for crop in crops]


def halves(batch=1):
    return square(batch, box=Box(4, 40, 14, 50)) + square(batch, box=Box(100, 10, 112, 20))


# --- exactness


@pytest.mark.parametrize("options", TARGETS)
@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("blend", list(Blend))
def test_an_untouched_crop_comes_back_exactly(options, channels, blend):
    image, mask = photo(channels=channels), feather(square(), 7)
    cropped = crop_to_mask(image, mask, options)
    assert cropped.crops[0].shape[-1] == 3
    back = stitch_crops(cropped.record, cropped.crops, options=StitchOptions(blend=blend))
    assert torch.equal(back.images, image)
    assert "came back as it was cut" in back.reports[0]


@pytest.mark.parametrize("options", TARGETS)
def test_pixels_outside_the_mask_keep_their_bits_whatever_was_painted(options):
    image, mask = photo(channels=4), feather(square(), 7)
    cropped = crop_to_mask(image, mask, options)
    back = stitch_crops(cropped.record, repaint(cropped.crops)).images
    assert torch.equal(back[mask == 0], image[mask == 0])
    assert bool((back[mask == 1] != image[mask == 1]).any(dim=-1).all())


@pytest.mark.parametrize("options", [SMALL, LARGE])
def test_what_was_painted_in_one_place_leaves_the_others_exact(options):
    image, mask = photo(), torch.ones(1, 90, 120)
    cropped = crop_to_mask(image, mask, options)
    crop = cropped.crops[0].clone()
    crop[:, :20, :20] = 0.5
    back = stitch_crops(cropped.record, [crop], options=PLAIN).images
    assert torch.equal(back[:, 50:], image[:, 50:]) and torch.equal(back[:, :, 50:], image[:, :, 50:])
    assert not torch.equal(back, image)


@pytest.mark.parametrize("options", [OWN_SIZE, LARGE])
def test_five_edits_with_jitter_do_not_drift(options):
    generator = torch.Generator().manual_seed(3)
    start = photo(height=300, width=300) * 0.9 + 0.05
    mask = square(height=300, width=300, box=Box(60, 60, 240, 240))
    image = start
    for _ in range(5):
        cropped = crop_to_mask(image, mask, options)
        jittered = [crop + 0.004 * torch.randn(crop.shape, generator=generator) for crop in cropped.crops]
        image = stitch_crops(cropped.record, jittered).images
    assert abs(float((image - start)[mask == 1].mean())) * 255 < 0.05
    assert torch.equal(image[mask == 0], start[mask == 0])


def test_fine_levels_survive():
    image = (photo() * 65535).round() / 65535 / 64
    cropped = crop_to_mask(image, square(), OWN_SIZE)
    back = stitch_crops(cropped.record, [crop + 3 / 65535 for crop in cropped.crops], options=PLAIN).images
    inside = square() == 1
    assert torch.equal(back[inside], (image + 3 / 65535)[inside])


@pytest.mark.parametrize("box", [Box(0, 0, 30, 30), Box(0, 20, 40, 50), Box(90, 60, 120, 90), Box(30, 0, 60, 90)])
def test_alpha_is_1_from_the_edge_of_the_mask_also_on_the_border(box):
    mask = square(box=box)
    cropped = crop_to_mask(torch.zeros(1, 90, 120, 3), mask, OWN_SIZE, stitch_mask=feather(mask, 16))
    white = [torch.ones_like(crop) for crop in cropped.crops]
    alpha = stitch_crops(cropped.record, white, options=PLAIN).images[..., 0]
    assert bool((alpha[mask == 1] == 1).all())
    # nearly 0 is 0, as in every mask
    assert torch.allclose(alpha, feather(mask, 16), atol=NEARLY)


@few
@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    seed=st.integers(0, 10**6),
    density=st.sampled_from([0.0, 0.01, 0.4, 1.0]),
    options=st.sampled_from(TARGETS),
    separate=st.sampled_from(list(Separate)),
    batch=st.integers(1, 3),
)
def test_any_masks_round_trip(size, seed, density, options, separate, batch):
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(batch, size[1], size[0], 3, generator=generator)
    mask = (torch.rand(batch, size[1], size[0], generator=generator) < density).float()
    cropped = crop_to_mask(image, mask, options, separate=separate)
    assert torch.equal(stitch_crops(cropped.record, cropped.crops).images, image)
    back = stitch_crops(cropped.record, repaint(cropped.crops), options=PLAIN).images
    assert torch.equal(back[mask == 0], image[mask == 0])
    if options is OWN_SIZE:
        assert torch.equal(back[mask == 1], repaint([image])[0][mask == 1])


@settings(max_examples=60)
@given(data=st.data())
def test_whatever_is_combined_the_outside_keeps_its_bits(data, tmp_path_factory):
    """Crops extended, resampled, taken apart, sent through the disk, enlarged and painted, in any combination."""
    one_of = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    batch, channels, (height, width) = one_of(1, 2), one_of(1, 3, 4), one_of((1, 1), (33, 7), (61, 85), (129, 64))
    image = torch.rand(batch, height, width, channels, generator=generator)
    mask = torch.zeros(batch, height, width)
    for _ in range(one_of(0, 1, 3)):
        top, left = one_of(0, height // 2, height - 1), one_of(0, width // 3, width - 1)
        mask[one_of(0, -1), top : top + one_of(1, 20), left : left + one_of(1, 20)] = one_of(0.3, 1.0)
    options = CropOptions(
        context_factor=one_of(1, 1.5, 4),
        context_pixels=one_of(0, 5, 60),
        min_size=one_of(0, 100),
        target=one_of(None, Area(1024), Area(128 * 128), Sizes((Size(64, 128), Size(128, 64)))),
        multiple=one_of(1, 8, 64),
        keep_scale=one_of(0, 0.25, 0.9),
        max_aspect=one_of(1, 2, 100),
        overflow=one_of(*Overflow),
        fill=one_of("edge", "mirror", "noise", "blur"),
        mask_outside=one_of(True, False),
    )
    stitch_mask = one_of(mask, feather(mask, 12))
    video, separate = one_of(
        (Video.OFF, Separate.EACH),
        (Video.OFF, Separate.TOGETHER),
        (Video.UNION, Separate.EACH),
        (Video.UNION, Separate.TOGETHER),
        (Video.SMOOTHED, Separate.TOGETHER),
    )
    cropped = crop_to_mask(image, mask, options, stitch_mask=stitch_mask, separate=separate, video=video)
    colour = image.expand(-1, -1, -1, max(channels, 3))
    assert torch.equal(stitch_crops(cropped.record, cropped.crops).images, colour)
    painted = [torch.rand(crop.shape, generator=generator) for crop in cropped.crops]
    scale = one_of(1, 2, 1.5)
    painted = [resize(crop, Size(*(round(side * scale) for side in size_of(crop)))) for crop in painted]
    how = StitchOptions(blend=one_of(*Blend), color_match=one_of(0, 1), grain=one_of(0, 1))
    back = stitch_crops(cropped.record, painted, options=how).images
    assert torch.equal(back[stitch_mask < NEARLY], colour[stitch_mask < NEARLY])
    assert bool(torch.isfinite(back).all()) and float(back.min()) >= 0 and float(back.max()) <= 1
    record = load(save(cropped.record, tmp_path_factory.mktemp("record")))
    later = stitch_crops(record, painted, image, how)
    assert torch.equal(later.images, back) and "not what was cut" not in "".join(later.reports)


# --- batches


def test_n_pictures_with_one_mask_one_picture_with_n_masks_and_n_with_n():
    images, masks = photo(3), torch.cat([square(), square(box=Box(5, 5, 20, 40)), torch.zeros(1, 90, 120)])
    for image, mask in ((images, masks[:1]), (images[:1], masks), (images, masks)):
        cropped = crop_to_mask(image, mask, SMALL)
        back = stitch_crops(cropped.record, repaint(cropped.crops), options=PLAIN).images
        alone = []
        for index in range(3):
            one = crop_to_mask(image[index % len(image), None], mask[index % len(mask), None], SMALL)
            alone.append(stitch_crops(one.record, repaint(one.crops), options=PLAIN).images)
        assert torch.equal(back, torch.cat(alone))


def test_crops_of_one_size_are_one_batch():
    images = photo(3)
    masks = torch.cat([square(box=Box(10, 10, 30, 30)), square(box=Box(60, 50, 80, 70)), square(box=Box(2, 2, 40, 12))])
    cropped = crop_to_mask(images, masks, CropOptions(target=Sizes((Size(64, 64),)), min_size=0))
    assert [len(batch) for batch in cropped.crops] == [3] == [len(batch) for batch in cropped.masks]
    cropped = crop_to_mask(images, masks, OWN_SIZE)
    assert [len(batch) for batch in cropped.crops] == [2, 1]


def test_two_of_three_is_refused():
    with pytest.raises(InputError, match="2 masks do not go with the 3"):
        crop_to_mask(photo(3), square(2))


def test_paintings_of_one_crop_make_as_many_pictures():
    image, mask = photo(2), square(2)
    cropped = crop_to_mask(image, mask, SMALL)
    first, second = repaint(cropped.crops, 0.2), repaint(cropped.crops, 0.4)
    both = [torch.cat(pair) for pair in zip(first, second, strict=True)]
    back = stitch_crops(cropped.record, both, options=PLAIN).images
    assert torch.equal(back[:2], stitch_crops(cropped.record, first, options=PLAIN).images)
    assert torch.equal(back[2:], stitch_crops(cropped.record, second, options=PLAIN).images)


def test_a_crop_too_few_is_refused():
    cropped = crop_to_mask(photo(3), square(3), SMALL)
    with pytest.raises(InputError, match="3 crops were cut and 2 came back"):
        stitch_crops(cropped.record, [cropped.crops[0][:2]])
    with pytest.raises(InputError, match="3 crops were cut and 0 came back"):
        stitch_crops(cropped.record, [])


# --- regions


def test_each_region_has_its_crop_and_all_come_into_one_picture():
    image, mask = photo(), halves()
    cropped = crop_to_mask(image, mask, SMALL, separate=Separate.EACH)
    assert len(cropped.crops) == 2 and all(len(crop) == 1 for crop in cropped.crops)
    back = stitch_crops(cropped.record, repaint(cropped.crops), options=PLAIN).images
    assert torch.equal(back[mask == 0], image[mask == 0])
    assert bool((back[mask == 1] != image[mask == 1]).any(dim=-1).all())


def test_regions_may_arrive_as_one_batch():
    options = CropOptions(target=Sizes((Size(64, 64),)), min_size=0)
    cropped = crop_to_mask(photo(), halves(), options, separate=Separate.EACH)
    painted = repaint(cropped.crops)
    apart = stitch_crops(cropped.record, painted).images
    assert torch.equal(stitch_crops(cropped.record, [torch.cat(painted)]).images, apart)


def test_neighbouring_boxes_that_overlap_do_not_see_each_others_paint():
    options = CropOptions(context_factor=1, context_pixels=2, min_size=80, target=None)
    mask = square(box=Box(30, 30, 40, 40)) + square(box=Box(60, 30, 70, 40))
    cropped = crop_to_mask(photo(), mask, options, separate=Separate.EACH)
    one, two = (patch.plan.box for patch in cropped.record.patches)
    assert one.right > two.left
    only_two = [cropped.crops[0], repaint(cropped.crops)[1]]
    both = stitch_crops(cropped.record, repaint(cropped.crops)).images
    assert torch.equal(stitch_crops(cropped.record, only_two).images[:, :, 55:], both[:, :, 55:])


def test_every_region_of_a_video_is_a_batch_of_frames():
    masks = halves(3)
    masks[1] = 0
    cropped = crop_to_mask(photo(3), masks, SMALL, separate=Separate.EACH, video=Video.UNION)
    assert [len(crop) for crop in cropped.crops] == [3, 3]
    image = photo(3)
    back = stitch_crops(cropped.record, repaint(cropped.crops), image, PLAIN).images
    assert torch.equal(back[masks == 0], image[masks == 0]) and torch.equal(back[1], image[1])


def test_smoothed_regions_are_refused():
    with pytest.raises(InputError, match="follows one place"):
        crop_to_mask(photo(3), square(3), separate=Separate.EACH, video=Video.SMOOTHED)


# --- video


@pytest.mark.parametrize("video", [Video.UNION, Video.SMOOTHED])
@pytest.mark.parametrize("options", TARGETS)
def test_a_video_is_one_batch_with_empty_frames_too(video, options):
    boxes = [Box(10 + 7 * n, 20 + 3 * n, 30 + 7 * n, 50 + n) for n in range(9)]
    masks = torch.cat([square(box=box) for box in boxes])
    masks[4] = 0
    image = photo(9)
    cropped = crop_to_mask(image, masks, options, video=video)
    assert [len(crop) for crop in cropped.crops] == [9]
    for patch, box in zip(cropped.record.patches, boxes, strict=True):
        if patch.picture != 4:
            assert patch.plan.box.left <= box.left and patch.plan.box.bottom >= box.bottom
    if video is Video.UNION:
        assert len({patch.plan.box for patch in cropped.record.patches}) == 1
    back = stitch_crops(cropped.record, repaint(cropped.crops)).images
    assert torch.equal(back[masks == 0], image[masks == 0])


def test_a_video_without_any_mask_comes_back():
    image = photo(3)
    cropped = crop_to_mask(image, torch.zeros(3, 90, 120), SMALL, video=Video.SMOOTHED)
    assert torch.equal(stitch_crops(cropped.record, repaint(cropped.crops)).images, image)


def test_the_record_keeps_no_copy_of_the_frames(monkeypatch):
    frames = torch.rand(1, 270, 480, 3).expand(80, -1, -1, -1)
    mask = square(height=270, width=480).expand(80, -1, -1)
    largest = 0

    def watched(original, painted, mask, *rest, **options):
        nonlocal largest
        largest = max(largest, original.shape[0])
        return Stitched(original)

    monkeypatch.setattr(crop_stitch, "stitch", watched)
    cropped = crop_to_mask(frames, mask, OWN_SIZE, video=Video.UNION)
    assert cropped.record.original.data_ptr() == frames.data_ptr()
    held = sum(patch.mask.nbytes + patch.repainted.nbytes for patch in cropped.record.patches)
    assert held < 80 * 270 * 480 * 3 / 10
    stitch_crops(cropped.record, repaint(cropped.crops))
    assert largest == 1


# --- three masks


def test_the_stitch_mask_travels_apart_from_the_samplers():
    mask, wide = square(), feather(square(), 12)
    cropped = crop_to_mask(photo(), mask, OWN_SIZE, stitch_mask=wide)
    box = cropped.record.patches[0].plan.box
    assert torch.equal(cropped.masks[0][:, : box.height, : box.width], mask[:, box.rows, box.columns])
    assert torch.allclose(cropped.record.patches[0].stitch_mask(), wide[:, box.rows, box.columns], atol=NEARLY)
    assert box.left <= 50 - 12


def test_a_context_mask_is_shown():
    cropped = crop_to_mask(photo(), square(), OWN_SIZE, context_mask=square(box=Box(0, 80, 4, 90)))
    box = cropped.record.patches[0].plan.box
    assert box.left == 0 and box.bottom == 90


def test_a_mask_known_only_afterwards_decides_what_comes_back():
    """As an edit model: all of the crop comes back moved and in another tone, and one place in it was edited."""
    image = F.avg_pool2d(photo(height=128, width=160).permute(0, 3, 1, 2), 5, 1, 2).permute(0, 2, 3, 1)
    cropped = crop_to_mask(image, None, OWN_SIZE)
    assert torch.equal(cropped.crops[0][:, :128, :160], image)
    edited = cropped.crops[0].roll((2, 3), (1, 2)) - 0.03
    edited[:, 52:72, 63:93] = 0.2
    spot = square(height=128, width=160, box=Box(56, 46, 96, 76))
    options = StitchOptions(register=True, blend=Blend.LINEAR)
    back = stitch_crops(cropped.record, [edited], options=options, masks=[feather(spot, 4)])
    changed = (back.images != image).any(dim=-1)
    assert not changed[feather(spot, 4) == 0].any() and "moved back by -3" in back.reports[0]
    # the edit is where it belongs, and what surrounds it within the mask is the picture again
    around = (spot > 0) & (square(height=128, width=160, box=Box(59, 49, 91, 71)) == 0)
    assert (back.images - image).abs()[around].mean() < 0.02
    assert (back.images - 0.23)[:, 52:68, 62:88].abs().max() < 0.02
    # a whole picture that may change leaves nothing to measure by
    unmeasured = stitch_crops(cropped.record, [edited], options=options)
    assert "not moved" in unmeasured.reports[0] and (unmeasured.images - image).abs()[around].mean() > 0.03


def test_a_mask_for_the_way_back_never_reaches_beyond_the_one_that_was_cut():
    image, mask = photo(), square()
    cropped = crop_to_mask(image, mask, SMALL)
    everything = [torch.ones(crop.shape[:3]) for crop in cropped.crops]
    plain = stitch_crops(cropped.record, repaint(cropped.crops), options=PLAIN)
    same = stitch_crops(cropped.record, repaint(cropped.crops), options=PLAIN, masks=everything)
    assert torch.equal(plain.images, same.images)
    paintings = [torch.cat([*repaint(cropped.crops), *cropped.crops])]
    twice = stitch_crops(cropped.record, paintings, options=PLAIN, masks=everything)
    assert torch.equal(twice.images[:1], same.images) and torch.equal(twice.images[1:], image)
    with pytest.raises(InputError, match="another aspect ratio"):
        stitch_crops(cropped.record, cropped.crops, masks=[torch.ones(1, 8, 100)])


def test_each_region_has_its_mask_for_the_way_back():
    image, mask = photo(), halves()
    cropped = crop_to_mask(image, mask, OWN_SIZE, separate=Separate.EACH)
    on_the_right = [float(patch.plan.box.left > 0) for patch in cropped.record.patches]
    masks = [torch.full(crop.shape[:3], value) for crop, value in zip(cropped.crops, on_the_right, strict=True)]
    back = stitch_crops(cropped.record, repaint(cropped.crops), options=PLAIN, masks=masks)
    changed = (back.images != image).any(dim=-1)
    assert torch.equal(changed, (mask > 0) & (torch.arange(120) > 60))


def test_what_the_sampler_may_change_is_whole_cells():
    cropped = crop_to_mask(photo(), square(box=Box(41, 41, 42, 42)), CropOptions(target=None, min_size=64))
    patch = cropped.record.patches[0]
    assert patch.repainted.sum() == 64


# --- what comes in


def test_masks_of_every_shape_and_the_placeholder():
    image, mask = photo(), square()
    expected = stitch_crops(*_cut(image, mask)).images
    for shaped in (mask[0], mask[:, None], mask[..., None]):
        assert torch.equal(stitch_crops(*_cut(image, shaped)).images, expected)
    assert torch.equal(stitch_crops(*_cut(image[0], mask)).images, expected)
    twice = stitch_crops(*_cut(image, F.interpolate(mask[None], size=(180, 240))[0])).images
    assert torch.equal(twice[:, :28], image[:, :28]) and not torch.equal(twice, image)
    with pytest.raises(InputError, match="No mask is painted"):
        crop_to_mask(image, torch.zeros(1, 64, 64))


def _cut(image, mask):
    cropped = crop_to_mask(image, mask, OWN_SIZE)
    return cropped.record, repaint(cropped.crops)


def test_grey_pictures_and_integers():
    assert stitch_crops(*_cut(photo(channels=1), square())).images.shape == (1, 90, 120, 3)
    with pytest.raises(InputError, match="uint8"):
        crop_to_mask((photo() * 255).byte(), square())


def test_a_transparent_crop_lets_the_original_show():
    image, mask = photo(), square()
    cropped = crop_to_mask(image, mask, OWN_SIZE)
    crop = torch.cat([repaint(cropped.crops)[0], torch.zeros(*cropped.crops[0].shape[:3], 1)], dim=-1)
    assert torch.equal(stitch_crops(cropped.record, [crop]).images, image)
    crop[..., 3] = 1
    opaque = stitch_crops(cropped.record, repaint(cropped.crops)).images
    assert torch.equal(stitch_crops(cropped.record, [crop]).images, opaque)


@pytest.mark.parametrize("options", TARGETS)
@pytest.mark.parametrize("scale", [2, 4, 1.5, 0.5])
def test_a_crop_that_was_resized_as_a_whole_comes_back(options, scale):
    y, x = torch.meshgrid(torch.linspace(0, 1, 90), torch.linspace(0, 1, 120), indexing="ij")
    image, mask = torch.stack([x, y, (x + y) / 2], dim=-1)[None], square()
    cropped = crop_to_mask(image, mask, options)
    crop = cropped.crops[0].permute(0, 3, 1, 2)
    resized = F.interpolate(crop, scale_factor=scale, mode="bilinear", antialias=True).permute(0, 2, 3, 1)
    back = stitch_crops(cropped.record, [resized], options=PLAIN).images
    assert torch.equal(back[mask == 0], image[mask == 0])
    # a ramp shows where everything lies: a pixel of the picture is 1 / 89 of it
    assert float((back - image).abs().max()) < 0.25 / 89


def test_an_enlarged_crop_brings_its_detail():
    image, mask = photo(height=256, width=256), torch.ones(1, 256, 256)
    cropped = crop_to_mask(image, mask, CropOptions(target=Area(128 * 128)))
    assert cropped.crops[0].shape[1:3] == (128, 128)
    assert torch.equal(stitch_crops(cropped.record, [1 - image], options=PLAIN).images, 1 - image)


@pytest.mark.parametrize("scale", [0.3, 0.5, 1.5, 2.25])
@pytest.mark.parametrize("rounded", [math.floor, round, math.ceil])
def test_the_sides_of_a_resized_crop_are_rounded_as_they_may(scale, rounded):
    mask = torch.zeros(1, 90, 120)
    mask[:, 30:45, 20:89] = 1
    bare = CropOptions(context_factor=1, context_pixels=0, min_size=0, target=None, multiple=1, max_aspect=100)
    cropped = crop_to_mask(photo(), mask, bare)
    came = torch.zeros(1, rounded(15 * scale), rounded(69 * scale), 3)
    assert cropped.crops[0].shape[1:3] == (15, 69)
    assert (stitch_crops(cropped.record, [came], options=PLAIN).images[mask == 1] == 0).all()


@pytest.mark.parametrize(
    ("size", "says"),
    [((64, 96), "another aspect ratio"), ((85, 75), "another aspect ratio"), ((80, 72), "multiple to 8")],
)
def test_a_crop_of_another_shape_is_refused(size, says):
    cropped = crop_to_mask(photo(), torch.ones(1, 90, 120), CropOptions(target=Sizes((Size(85, 79),)), multiple=1))
    with pytest.raises(InputError, match=says):
        stitch_crops(cropped.record, [torch.zeros(1, size[1], size[0], 3)])


def test_another_original_of_the_same_size_is_stitched_into():
    image, other = photo(seed=1), photo(seed=2)
    cropped = crop_to_mask(image, square(), LARGE)
    back = stitch_crops(cropped.record, repaint(cropped.crops), other).images
    assert torch.equal(back[square() == 0], other[square() == 0])


def test_originals_that_do_not_fit_are_refused():
    cropped = crop_to_mask(photo(2), square(), LARGE)
    with pytest.raises(InputError, match="cut from a picture of 120x90, but the original is 121x90"):
        stitch_crops(cropped.record, cropped.crops, photo(width=121))
    with pytest.raises(InputError, match="for 2 pictures, but there are 3"):
        stitch_crops(cropped.record, cropped.crops, photo(3))


def test_nan_in_a_painted_crop_is_refused():
    cropped = crop_to_mask(photo(), square(), LARGE)
    with pytest.raises(InputError, match="NaN"):
        stitch_crops(cropped.record, [crop * float("nan") for crop in cropped.crops])


def test_progress_counts_crops():
    seen = []
    cropped = crop_to_mask(photo(3), square(), SMALL, on_image=lambda *step: seen.append(step))
    stitch_crops(cropped.record, cropped.crops, on_image=lambda *step: seen.append(step))
    assert seen == [(1, 3), (2, 3), (3, 3)] * 2


def test_the_report_says_what_was_cut():
    mask = square(box=Box(400, 300, 600, 500), height=1000, width=1000)
    report = crop_to_mask(photo(height=1000, width=1000), mask, CropOptions(target=Sizes(SDXL_SIZES))).reports
    assert report == ("picture 1: 512x512 at (244, 144) of 1000x1000 -> 1024x1024, scaled by 2",)
    extended = crop_to_mask(photo(), square(), CropOptions(target=None, overflow="extend", fill="blur")).reports
    assert "120x90 at (0, 0) of 120x90, extended to 512x512 by blur" in extended[0]
    empty = crop_to_mask(photo(), torch.zeros(1, 90, 120), SMALL).reports
    assert "empty mask" in empty[0]
