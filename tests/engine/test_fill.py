"""Fills: only the hole changes, and it is filled with what belongs there."""

import builtins

import numpy as np
import pytest
import torch
from comfyui_mend.engine import fill as fill_module
from comfyui_mend.engine import masks
from comfyui_mend.engine.fill import FillMethod
from comfyui_mend.engine.fill import fill as engine_fill
from comfyui_mend.engine.tiles import Window
from comfyui_mend.engine.types import InputError, MissingPackageError, Size
from hypothesis import given, settings
from hypothesis import strategies as st


class Mean:
    """A network that paints the mean colour of what is known."""

    def __init__(self, architecture="LaMa", window=None):
        self.name = f"{architecture}.safetensors"
        self.architecture = architecture
        self.window = window or Window(512 * 512, 8)

    def fill(self, pixels, hole, seed):
        mean = pixels[~hole].mean(axis=0, dtype=np.float64)
        return np.where(hole[..., None], mean, pixels).astype(np.float32)


NETWORKS = {FillMethod.LAMA: Mean(), FillMethod.MAT: Mean("MAT", Window(64 * 64, 64, square=64))}


def fill(image, mask, method, **options):
    return engine_fill(image, mask, method, **{"network": NETWORKS.get(method), **options})


METHODS = list(FillMethod)
FROM_SURROUNDINGS = [method for method in METHODS if method is not FillMethod.NEUTRAL]
EXACT = 1e-6
BYTES = {FillMethod.TELEA: 3 / 255, FillMethod.NAVIER_STOKES: 1 / 255, FillMethod.PATCHMATCH: 1 / 255}
"""The error of computing with 8 bits on a plain picture."""
OVERSHOOT = 0.08
"""PatchMatch enlarges its levels with a sharpening filter; on noise of amplitude 0.2 that leaves the range."""


def noise(height=48, width=64, batch=1, channels=3, seed=0):
    return torch.rand(batch, height, width, channels, generator=torch.Generator().manual_seed(seed))


def hole(height=48, width=64, rows=slice(15, 30), columns=slice(20, 45), batch=1):
    mask = torch.zeros(batch, height, width)
    mask[:, rows, columns] = 1
    return mask


def stripes(height=96, width=96, period=8):
    """Vertical stripes, [1, H, W, 3]."""
    line = (torch.arange(width) % period < period // 2).float() * 0.8 + 0.1
    return line[None, None, :, None].expand(1, height, width, 3).contiguous()


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=15)
@given(
    st.integers(2, 40),
    st.integers(2, 40),
    st.integers(0, 10**6),
    st.sampled_from([0.01, 0.2, 0.9]),
    st.sampled_from([3, 4]),
)
def test_only_masked_pixels_change_and_all_values_stay_in_range(method, height, width, seed, density, channels):
    image = noise(height, width, channels=channels, seed=seed)
    mask = noise(height, width, channels=3, seed=seed + 1)[..., 0]
    mask = torch.where(mask < density, mask / density, 0.0)
    mask[0, 0, 0] = 0
    before = image.clone()
    filled = fill(image, mask, method)
    assert torch.equal(filled[mask == 0], before[mask == 0])
    assert torch.equal(image, before)
    assert filled.shape == image.shape
    assert filled.min() >= 0
    assert filled.max() <= 1


@pytest.mark.parametrize("method", METHODS)
def test_pixels_outside_the_mask_keep_values_no_byte_can_hold(method):
    image = noise() * 3 - 1
    mask = hole()
    assert torch.equal(fill(image, mask, method)[mask == 0], image[mask == 0])


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_mask_gives_the_image_back(method):
    image = noise()
    assert torch.equal(fill(image, torch.zeros(1, 48, 64), method), image)


@pytest.mark.parametrize("method", FROM_SURROUNDINGS)
def test_a_full_mask_is_refused_with_the_number_of_the_image(method):
    mask = hole(batch=2)
    mask[1] = 0.5
    with pytest.raises(InputError, match="image 2 covers the whole picture"):
        fill(noise(batch=2), mask, method)


def test_the_neutral_fill_is_mid_grey_and_needs_no_surroundings():
    assert torch.equal(fill(noise(), torch.ones(1, 48, 64), FillMethod.NEUTRAL), torch.full((1, 48, 64, 3), 0.5))


@pytest.mark.parametrize("method", FROM_SURROUNDINGS)
def test_a_plain_picture_is_completed_without_a_trace(method):
    image = torch.tensor([0.2, 0.6, 0.9]).expand(1, 48, 64, 3).contiguous()
    mask = hole()
    damaged = torch.where(mask[..., None] > 0, 1.0, image)
    assert torch.allclose(fill(damaged, mask, method), image, atol=BYTES.get(method, EXACT), rtol=0)


@pytest.mark.parametrize("method", FROM_SURROUNDINGS)
def test_what_lies_under_the_mask_has_no_influence(method):
    mask = hole()
    one = torch.where(mask[..., None] > 0, 0.0, noise())
    other = torch.where(mask[..., None] > 0, 1.0, noise())
    assert torch.equal(fill(one, mask, method), fill(other, mask, method))


@pytest.mark.parametrize("method", METHODS)
def test_grey_mask_values_mix_the_fill_with_the_original_in_proportion(method):
    image, mask = noise(), hole()
    full = fill(image, mask, method)
    half = fill(image, mask * 0.25, method)
    assert torch.allclose(half, torch.lerp(image, full, 0.25), atol=EXACT, rtol=0)


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_is_its_images_one_by_one(method):
    images = noise(batch=3)
    several = torch.cat([hole(), hole(rows=slice(0, 5)), torch.zeros(1, 48, 64)])
    one_by_one = torch.cat([fill(images[i : i + 1], several[i : i + 1], method) for i in range(3)])
    assert torch.equal(fill(images, several, method), one_by_one)
    assert torch.equal(fill(images, hole(), method)[1:2], fill(images[1:2], hole(), method))
    assert torch.equal(fill(images[:1], several[:2], method)[1:], fill(images[:1], several[1:2], method))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "area",
    [
        (slice(0, 10), slice(None)),
        (slice(None), slice(50, None)),
        (slice(0, 8), slice(0, 8)),
        (slice(40, None), slice(56, None)),
        (slice(24, 25), slice(30, 31)),
        (slice(1, None), slice(1, None)),
    ],
    ids=["top", "right", "corner", "far corner", "one pixel", "all but two edges"],
)
def test_holes_anywhere_are_filled_from_the_colours_that_are_kept(method, area):
    image = 0.4 + 0.2 * noise()
    mask = hole(rows=area[0], columns=area[1])
    damaged = torch.where(mask[..., None] > 0, 1.0, image)
    filled = fill(damaged, mask, method)
    tolerance = OVERSHOOT if method is FillMethod.PATCHMATCH else BYTES.get(method, EXACT)
    assert filled.min() >= 0.4 - tolerance
    assert filled.max() <= 0.6 + tolerance


@pytest.mark.parametrize("method", METHODS)
def test_alpha_becomes_opaque_where_something_was_filled_and_stays_elsewhere(method):
    image, mask = noise(channels=4), hole()
    filled = fill(image, mask, method)
    assert torch.equal(filled[..., :3], fill(image[..., :3], mask, method))
    assert (filled[..., 3][mask == 1] == 1).all()
    assert torch.equal(filled[..., 3][mask == 0], image[..., 3][mask == 0])


def test_edge_repeats_the_nearest_pixel_that_is_kept():
    image, mask = noise(), hole(rows=slice(None), columns=slice(10, 31))
    filled = fill(image, mask, FillMethod.EDGE)
    assert torch.equal(filled[:, :, 10:20], image[:, :, 9:10].expand(-1, -1, 10, -1))
    assert torch.equal(filled[:, :, 21:31], image[:, :, 31:32].expand(-1, -1, 10, -1))


@pytest.mark.parametrize("axis", [1, 2])
def test_blur_commutes_with_flips(axis):
    # sizes and places that halve evenly: the pyramid pairs the same pixels from either side
    image, mask = noise(64, 64), hole(64, 64, slice(16, 40), slice(8, 48))
    flipped = fill(image.flip(axis), mask.flip(axis), FillMethod.BLUR).flip(axis)
    assert torch.allclose(flipped, fill(image, mask, FillMethod.BLUR), atol=1e-5, rtol=0)


def test_blur_continues_a_gradient_without_a_step():
    ramp = torch.linspace(0.1, 0.9, 64)[None, None, :, None].expand(1, 48, 64, 3).contiguous()
    mask = hole()
    filled = fill(torch.where(mask[..., None] > 0, 1.0, ramp), mask, FillMethod.BLUR)
    assert (filled - ramp).abs().max() < 0.03
    steps = (filled[:, :, 1:] - filled[:, :, :-1]).abs()
    assert steps.max() < 3 * 0.8 / 63


@pytest.mark.parametrize("method", [FillMethod.TELEA, FillMethod.NAVIER_STOKES])
def test_the_part_of_the_picture_worked_on_does_not_show(method):
    import cv2

    image, mask = noise(), hole()
    flag = cv2.INPAINT_TELEA if method is FillMethod.TELEA else cv2.INPAINT_NS
    whole = cv2.inpaint((image[0].numpy() * 255).round().astype(np.uint8), mask[0].byte().numpy(), 7, flag)
    expected = torch.from_numpy(whole).float()[None] / 255
    assert torch.equal(fill(image, mask, method, radius=7)[mask > 0], expected[mask > 0])


def test_patchmatch_continues_a_pattern():
    image = stripes()
    mask = hole(96, 96, slice(30, 66), slice(28, 70))
    filled = fill(torch.where(mask[..., None] > 0, 0.5, image), mask, FillMethod.PATCHMATCH)
    assert (filled - image).abs().mean() < 0.02
    smooth = fill(torch.where(mask[..., None] > 0, 0.5, image), mask, FillMethod.BLUR)
    assert (filled - image).abs().mean() < 0.2 * (smooth - image).abs().mean()


def test_patchmatch_repeats_itself_for_a_seed_whatever_ran_before():
    image, mask = noise(64, 64), hole(64, 64)
    first = fill(image, mask, FillMethod.PATCHMATCH, seed=7)
    fill(noise(seed=3), hole(), FillMethod.PATCHMATCH, seed=1)
    assert torch.equal(fill(image, mask, FillMethod.PATCHMATCH, seed=7), first)
    assert not torch.equal(fill(image, mask, FillMethod.PATCHMATCH, seed=8), first)


def test_patchmatch_treats_distant_holes_as_pictures_of_their_own():
    image = noise(64, 600)
    left, right = hole(64, 600, columns=slice(20, 40)), hole(64, 600, columns=slice(550, 570))
    both = fill(image, left + right, FillMethod.PATCHMATCH)
    assert torch.equal(both[:, :, :300], fill(image, left, FillMethod.PATCHMATCH)[:, :, :300])
    assert torch.equal(both[:, :, 300:], fill(image, right, FillMethod.PATCHMATCH)[:, :, 300:])


def test_patchmatch_joins_holes_whose_surroundings_meet():
    mask = hole(64, 600, columns=slice(20, 40)) + hole(64, 600, columns=slice(120, 140))
    boxes = fill_module._separate_regions(mask[0].numpy() > 0)
    assert len(boxes) == 1
    assert boxes[0].left == 0
    assert boxes[0].right == 140 + fill_module.MIN_CONTEXT


def test_patchmatch_lowers_the_resolution_of_what_is_too_large(monkeypatch):
    monkeypatch.setattr(fill_module, "MAX_AREA", 48 * 48)
    image = stripes(128, 128, period=16)
    mask = hole(128, 128, slice(40, 90), slice(40, 90))
    filled = fill(torch.where(mask[..., None] > 0, 1.0, image), mask, FillMethod.PATCHMATCH)
    assert torch.equal(filled[mask == 0], image[mask == 0])
    # nothing of the object is mixed into its surroundings, and the stripes go on through its place, if softer
    assert torch.equal(fill(torch.where(mask[..., None] > 0, 0.0, image), mask, FillMethod.PATCHMATCH), filled)
    assert (filled - image).abs()[mask > 0].mean() < 0.2


def test_the_context_of_a_large_hole_is_cut_before_its_resolution():
    small = fill_module._context(fill_module.Box(0, 0, 300, 200))
    assert small == 300
    width, height = 1200, 900
    margin = fill_module._context(fill_module.Box(0, 0, width, height))
    assert fill_module.LARGE_CONTEXT * width <= margin < width
    middle = fill_module._context(fill_module.Box(0, 0, 600, 400))
    assert (600 + 2 * middle) * (400 + 2 * middle) <= fill_module.MAX_AREA
    assert middle < 600
    # and never so far that there is little left to copy from
    assert fill_module._context(fill_module.Box(0, 0, 4000, 4000)) == fill_module.LARGE_CONTEXT * 4000


@pytest.mark.parametrize("size", [Size(2, 2), Size(1, 64), Size(64, 1), Size(3, 200), Size(9, 9)])
def test_patchmatch_fills_pictures_smaller_than_its_patches(size):
    image = 0.4 + 0.2 * noise(size.height, size.width)
    mask = hole(size.height, size.width, slice(size.height // 2, None), slice(size.width // 2, None))
    filled = fill(image, mask, FillMethod.PATCHMATCH, radius=15)
    assert filled.min() >= 0.4 - OVERSHOOT
    assert filled.max() <= 0.6 + OVERSHOOT


def test_every_method_but_patchmatch_does_without_further_packages(monkeypatch):
    real = builtins.__import__

    def refuse(name, *arguments, **options):
        if name.partition(".")[0] in ("cv2", "patchmatch"):
            raise ImportError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingPackageError, match=r'"patchmatch" needs .*pypatchmatch'):
        fill(noise(), hole(), FillMethod.PATCHMATCH)
    for method in METHODS:
        if method is not FillMethod.PATCHMATCH:
            assert (fill(noise(), hole(), method) != noise())[hole() > 0].float().mean() > 0.9


def test_masks_of_other_shapes_and_sizes_are_understood():
    image, mask = noise(), hole()
    expected = fill(image, mask, FillMethod.EDGE)
    for same in (mask[0], mask[:, None], mask[..., None]):
        assert torch.equal(fill(image, same, FillMethod.EDGE), expected)
    twice = mask.repeat_interleave(2, 1).repeat_interleave(2, 2)
    changed = (fill(image, twice, FillMethod.NEUTRAL) != image).any(dim=-1)
    assert changed[mask == 1].all()
    assert not changed[masks.grow(mask, 2) == 0].any()


def test_nearly_white_masks_are_filled():
    image = noise()
    filled = fill(image, hole() * 0.98, FillMethod.EDGE)
    assert (filled - image).abs()[hole() > 0].mean() > 0.1


@pytest.mark.parametrize("radius", [0, 65])
def test_a_radius_out_of_range_is_refused(radius):
    with pytest.raises(InputError, match="radius"):
        fill(noise(), hole(), FillMethod.TELEA, radius=radius)


def test_each_image_is_reported_and_the_caller_may_stop():
    seen = []
    fill(noise(batch=2), hole(), FillMethod.EDGE, on_image=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(noise(batch=2), hole(), FillMethod.EDGE, on_image=stop)


def test_a_soft_mask_grown_from_an_object_removes_it_whole():
    image = torch.full((1, 80, 80, 3), 0.3)
    image[:, 30:50, 30:50] = 1
    mask = masks.feather(masks.grow(hole(80, 80, slice(30, 50), slice(30, 50)), 2), 6)
    for method in FROM_SURROUNDINGS:
        assert (fill(image, mask, method) - 0.3).abs().max() <= BYTES.get(method, EXACT)
