"""The figures that decide which inpainting pack to use, where they are exact; benchmarks/pixels.py has the peers'."""

import math

import pytest
import torch
from comfyui_mend.engine.color import ColorMatch, match_around
from comfyui_mend.engine.compare import Limits, compare
from comfyui_mend.engine.crop import SD15_SIZES, CropOptions, Sizes
from comfyui_mend.engine.crop_stitch import crop_to_mask, stitch_crops
from comfyui_mend.engine.images import as_mask_batch
from comfyui_mend.engine.masks import MaskOptions, bounding_box, feather, grow, prepare_masks, to_latent_grid
from comfyui_mend.engine.outpaint import Padding, pad
from comfyui_mend.engine.stitch import Blend, StitchOptions, stitch
from comfyui_mend.engine.types import Box, Size
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage import data

few = settings(max_examples=15)
ALPHA_ONLY = StitchOptions(blend=Blend.LINEAR, color_match=0)
FREE, TO_MEGAPIXEL, TO_BUCKET = CropOptions(target=None), CropOptions(), CropOptions(target=Sizes(SD15_SIZES))
TO_SMALL, TO_LARGER = (CropOptions(target=Sizes((Size(side, side),)), keep_scale=0) for side in (24, 96))


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def box_mask(height, width, rows, columns):
    mask = torch.zeros(1, height, width)
    mask[:, rows, columns] = 1
    return mask


def photo(name):
    pixels = torch.from_numpy(getattr(data, name)()).float() / 255
    return (pixels if pixels.ndim == 3 else pixels[..., None].expand(-1, -1, 3))[None].contiguous()


def round_trip(image, mask, edit, crop=FREE, blend_pixels=0, options=None):
    cropped = crop_to_mask(image, mask, crop, stitch_mask=feather(mask, blend_pixels))
    return stitch_crops(
        cropped.record, [edit(part) for part in cropped.crops], options=options or StitchOptions()
    ).images


MASK = box_mask(200, 240, slice(80, 130), slice(70, 150))


@pytest.mark.parametrize("crop", [FREE, TO_MEGAPIXEL, TO_BUCKET], ids=["free", "area", "bucket"])
@pytest.mark.parametrize("blend_pixels", [0, 32])
def test_a_crop_that_nobody_painted_comes_back_to_the_bit(crop, blend_pixels):
    image = noise(1, 200, 240, 3)
    assert torch.equal(round_trip(image, MASK, lambda part: part.clone(), crop, blend_pixels), image)


@few
@given(
    size=st.tuples(st.integers(9, 70), st.integers(9, 70)),
    place=st.tuples(*[st.floats(0, 1)] * 4),
    channels=st.sampled_from([3, 4]),
    crop=st.sampled_from([FREE, TO_SMALL, TO_LARGER]),
)
def test_so_does_one_of_any_size_with_the_mask_anywhere(size, place, channels, crop):
    height, width = size
    top, bottom = sorted(round(share * height) for share in place[:2])
    left, right = sorted(round(share * width) for share in place[2:])
    image = noise(1, height, width, channels)
    mask = box_mask(height, width, slice(top, bottom), slice(left, right))
    assert torch.equal(round_trip(image, mask, lambda part: part.clone(), crop, 3), image)


def test_five_edits_with_jitter_do_not_drift():
    image = noise(1, 200, 240, 3)
    generator = torch.Generator().manual_seed(1)
    result = image
    for _ in range(5):

        def jitter(part):
            return (part + torch.randn(part.shape, generator=generator) * 0.004).clamp(0, 1)

        result = round_trip(result, MASK, jitter)
    assert abs(float((result - image)[MASK > 0].mean())) < 0.05 / 255
    assert torch.equal(result[MASK == 0], image[MASK == 0])


@few
@given(place=st.sampled_from(["middle", "left", "top", "bottom right", "all"]), blend_pixels=st.integers(0, 40))
def test_alpha_is_one_from_the_edge_of_the_users_mask_and_on_the_pictures_border(place, blend_pixels):
    rows, columns = {
        "middle": (slice(40, 80), slice(50, 90)),
        "left": (slice(30, 60), slice(0, 30)),
        "top": (slice(0, 30), slice(40, 90)),
        "bottom right": (slice(90, 120), slice(100, 140)),
        "all": (slice(None), slice(None)),
    }[place]
    mask = box_mask(120, 140, rows, columns)
    black = torch.zeros(1, 120, 140, 3)
    alpha = round_trip(black, mask, torch.ones_like, FREE, blend_pixels, ALPHA_ONLY)[..., 0]
    assert (alpha[mask > 0] == 1).all()
    assert torch.allclose(alpha, as_mask_batch(feather(mask, blend_pixels)), atol=1 / 65535, rtol=0)


@few
@given(st.integers(1, 48), st.integers(0, 119), st.integers(0, 99))
def test_growth_is_what_was_asked_for_on_every_side(pixels, y, x):
    mask = torch.zeros(1, 100, 120).transpose(1, 2).contiguous()
    mask[0, y, x] = 1
    box = bounding_box(grow(mask, pixels))
    reached = Box(max(x - pixels, 0), max(y - pixels, 0), min(x + pixels + 1, 100), min(y + pixels + 1, 120))
    assert box == reached


def test_growth_by_32_is_the_disk_of_32():
    mask = torch.zeros(1, 101, 101)
    mask[0, 50, 50] = 1
    axis = torch.arange(101) - 50
    assert torch.equal(grow(mask, 32)[0] > 0, axis[:, None] ** 2 + axis**2 <= 32**2)


@pytest.mark.parametrize("downscale", [8, 16])
@pytest.mark.parametrize("width", [1, 3])
def test_a_thin_stroke_has_cells_along_all_of_it_at_every_phase(width, downscale):
    for phase in range(downscale):
        for turned in (False, True):
            mask = box_mask(128, 128, slice(None), slice(48 + phase, 48 + phase + width))
            mask = mask.transpose(1, 2).contiguous() if turned else mask
            sampler = prepare_masks(mask, MaskOptions(), downscale).sampler
            cells = to_latent_grid(sampler, downscale)[0, 0]
            assert cells.amax(0 if turned else 1).min() == 1, (phase, turned)
            assert (sampler >= mask).all()


DAMAGES = {
    "contrast": lambda pixels: (pixels - 0.5) * 0.8 + 0.5,
    "tint": lambda pixels: pixels + torch.tensor([0.06, 0.0, -0.06]),
}


@pytest.mark.parametrize("share", [0, 50, 90])
@pytest.mark.parametrize(("damage", "limit"), [("contrast", 0.7), ("tint", 2.2)])
@pytest.mark.parametrize("method", ColorMatch)
def test_colours_come_back_from_what_the_mask_leaves(method, damage, limit, share):
    reference = noise(1, 256, 256, 3) * 0.5 + 0.25
    excluded = box_mask(256, 256, slice(0, 256 * share // 100), slice(None))
    damaged = torch.where(excluded[..., None] > 0, noise(1, 256, 256, 3, seed=5), DAMAGES[damage](reference))
    matched = match_around(damaged, reference, excluded, method)
    assert float((matched - reference).abs()[excluded == 0].mean()) * 255 < limit


PATCHES = {
    "offset": torch.full((1, 1, 256, 3), 6 / 255),
    "tint": (torch.tensor([6.0, 0.0, -6.0]) / 255).expand(1, 1, 256, 3),
    "tilt": (torch.linspace(12, -12, 256).clamp(-6, 6) / 255)[None, None, :, None].expand(1, 1, 256, 3),
}


@pytest.mark.parametrize("soft", [0, 24])
@pytest.mark.parametrize("kind", PATCHES)
@pytest.mark.parametrize("name", ["coffee", "brick"])
def test_no_seam_shows_where_the_patch_was_off_in_tone(name, kind, soft):
    original = photo(name)[:, :256, 40:296]
    mask = box_mask(256, 256, slice(80, 180), slice(70, 190))
    painted = (original + PATCHES[kind]).clamp(0, 1)
    joined = stitch(original, painted, feather(mask, soft)).images
    seam = compare(original, joined, mask).images[0].seam
    assert abs(seam.ratio / seam.before - 1) < 0.1
    linear = compare(original, stitch(original, painted, mask, ALPHA_ONLY).images, mask).images[0].seam
    assert linear.ratio / linear.before > 1.2, "the patch would not have shown anyway"


def test_513_by_613_comes_back_at_its_size_through_whole_latent_cells():
    image = noise(1, 613, 513, 3)
    mask = box_mask(613, 513, slice(200, 400), slice(150, 350))

    def whole_cells(part):
        assert part.shape[1] % 8 == 0 and part.shape[2] % 8 == 0
        return part * 0.9

    result = round_trip(image, mask, whole_cells, TO_MEGAPIXEL)
    assert result.shape == image.shape
    assert torch.equal(result[mask == 0], image[mask == 0])
    assert compare(image, result, mask, Limits(outside=0)).passed


def test_a_low_picture_keeps_the_feather_it_was_given():
    padded = pad(noise(1, 64, 512, 3), Padding(right=128), 40)
    soft = padded.mask[0, 32, :512] > 0
    assert int(soft.sum()) == 40 and soft[-40:].all()
    assert math.isclose(float(padded.mask[0, :, 512:].min()), 1.0)
