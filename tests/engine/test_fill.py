"""Fills: only the hole changes, and it is filled with what belongs there."""

import builtins
import threading

import numpy as np
import pytest
import torch
from comfyui_mend.engine import fill as fill_module
from comfyui_mend.engine import masks
from comfyui_mend.engine import patchmatch as patchmatch_module
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
    monkeypatch.setattr(fill_module, "MAX_AREA", 80 * 80)
    monkeypatch.setattr(patchmatch_module, "MAX_AREA", 80 * 80)
    image = stripes(128, 128, period=16)
    mask = hole(128, 128, slice(40, 90), slice(40, 90))
    filled = fill(torch.where(mask[..., None] > 0, 1.0, image), mask, FillMethod.PATCHMATCH)
    assert torch.equal(filled[mask == 0], image[mask == 0])
    # nothing of the object is mixed into its surroundings, and stripes, roughly placed, go on there
    assert torch.equal(fill(torch.where(mask[..., None] > 0, 0.0, image), mask, FillMethod.PATCHMATCH), filled)
    assert (filled - image).abs()[mask > 0].mean() < 0.15


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


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(InputError, match="seed"):
        fill(noise(), hole(), FillMethod.NOISE, seed=seed)


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


# --- mirror


@pytest.mark.parametrize(
    ("above", "below", "left", "right"),
    [(20, 0, 0, 0), (0, 0, 0, 30), (7, 9, 11, 13), (100, 0, 0, 0), (60, 70, 80, 90)],
    ids=["above", "right", "all sides", "more than the picture", "more on all sides"],
)
def test_mirror_outside_a_picture_is_mirror_padding(above, below, left, right):
    image = noise(24, 31)
    expected = np.pad(image[0].numpy(), ((above, below), (left, right), (0, 0)), mode="reflect")
    mask = torch.ones(1, *expected.shape[:2])
    mask[:, above : above + 24, left : left + 31] = 0
    filled = fill(torch.where(mask[..., None] > 0, 0.5, torch.from_numpy(expected)[None]), mask, FillMethod.MIRROR)
    assert torch.equal(filled[0], torch.from_numpy(expected))


def test_mirror_reflects_at_the_rim_of_a_hole():
    image, mask = noise(), hole(rows=slice(None), columns=slice(20, 28))
    filled = fill(image, mask, FillMethod.MIRROR)
    assert torch.equal(filled[:, :, 20:24], image[:, :, 15:19].flip(2))
    assert torch.equal(filled[:, :, 24:28], image[:, :, 29:33].flip(2))


def test_mirror_between_two_holes_takes_what_is_kept():
    image, mask = noise(20, 30), hole(20, 30, slice(None), slice(None))
    mask[:, :, 14] = 0
    filled = fill(image, mask, FillMethod.MIRROR)
    assert torch.equal(filled, image[:, :, 14:15].expand(-1, -1, 30, -1))


@pytest.mark.parametrize("axis", [1, 2])
def test_mirror_commutes_with_flips(axis):
    # no pixel of this hole is as near to one side as to another
    image, mask = noise(64, 64), hole(64, 64, slice(None), slice(0, 20)) if axis == 2 else hole(64, 64, slice(0, 20))
    flipped = fill(image.flip(axis), mask.flip(axis), FillMethod.MIRROR).flip(axis)
    assert torch.equal(flipped[mask > 0][:100], fill(image, mask, FillMethod.MIRROR)[mask > 0][:100])


# --- noise


def grainy(height=96, width=96):
    """Grey with grain that is strong in red, weak in blue, and common to red and green."""
    common, own = noise(height, width)[..., :1] - 0.5, noise(height, width, seed=1) - 0.5
    return 0.5 + common * torch.tensor([0.2, 0.2, 0.0]) + own * torch.tensor([0.1, 0.1, 0.05])


def test_noise_has_the_colour_and_the_grain_of_the_ring():
    image, mask = grainy(), hole(96, 96, slice(24, 72), slice(24, 72))
    filled = fill(image, mask, FillMethod.NOISE)[mask > 0].double()
    around = image[mask == 0].double()
    assert torch.allclose(filled.mean(dim=0), around.mean(dim=0), atol=0.01)
    covariance, expected = torch.cov(filled.T), torch.cov(around.T)
    assert torch.allclose(covariance, expected, atol=0.15 * expected.max().item())
    assert covariance[0, 0] > 10 * covariance[2, 2] > 0
    # the common part of red and green
    assert covariance[0, 1] > 0.5 * covariance[0, 0]


def test_noise_follows_the_tone_of_its_surroundings():
    ramp = torch.linspace(0.1, 0.9, 96)[None, None, :, None].expand(1, 96, 96, 3)
    image, mask = ramp + 0.05 * (noise(96, 96) - 0.5), hole(96, 96, slice(24, 72), slice(24, 72))
    filled = fill(image, mask, FillMethod.NOISE)
    means = filled[0, 24:72, 24:72].mean(dim=(0, 2))
    assert (means - ramp[0, 0, 24:72, 0]).abs().max() < 0.05


def test_noise_repeats_itself_for_a_seed_alone():
    image, mask = grainy(), hole(96, 96)
    state = np.random.get_state()[1].copy()
    first = fill(image, mask, FillMethod.NOISE, seed=2**64 - 1)
    assert torch.equal(fill(image, mask, FillMethod.NOISE, seed=2**64 - 1), first)
    assert not torch.equal(fill(image, mask, FillMethod.NOISE, seed=0), first)
    assert (np.random.get_state()[1] == state).all()


# --- networks


@pytest.mark.parametrize("method", ["lama", "mat"])
def test_a_network_method_without_its_network_says_where_to_get_it(method):
    with pytest.raises(InputError, match=f'"{method}" needs its network.*Load Fill Model .*--model FILE'):
        engine_fill(noise(), hole(), method)


def test_another_network_than_the_method_names_is_refused():
    with pytest.raises(InputError, match=r'is "mat" but LaMa.safetensors is a LaMa model; choose the method "lama"'):
        engine_fill(noise(), hole(), "mat", network=Mean())


def test_the_other_methods_have_no_use_for_a_network():
    assert torch.equal(engine_fill(noise(), hole(), "blur", network=Mean()), engine_fill(noise(), hole(), "blur"))


class Sizes(Mean):
    """Notes the sizes and seeds it is asked for."""

    def __init__(self, **options):
        super().__init__(**options)
        self.seen = []

    def fill(self, pixels, hole, seed):
        self.seen.append((*hole.shape, seed))
        return super().fill(pixels, hole, seed)


def test_a_network_sees_its_window_around_a_small_hole_and_its_own_resolution():
    network = Sizes(window=Window(1536 * 1024, 8))
    fill(noise(900, 1000), hole(900, 1000, slice(400, 420), slice(500, 540)), FillMethod.LAMA, network=network, seed=9)
    [(height, width, seed)] = network.seen
    # at least a tile in each direction, in multiples of 8
    assert 512 <= height < 560
    assert 512 <= width < 560
    assert seed == 9


def test_distant_holes_are_shown_to_a_network_one_by_one():
    mask = hole(256, 1600, columns=slice(100, 120)) + hole(256, 1600, columns=slice(1500, 1520))
    network = Sizes()
    fill(noise(256, 1600), mask, FillMethod.LAMA, network=network)
    assert len(network.seen) == 2


# --- progress and interruption


def test_progress_rises_to_the_number_of_images():
    seen = []
    images = noise(96, 96, batch=2)
    fill(images, hole(96, 96), FillMethod.PATCHMATCH, on_progress=lambda done, total: seen.append((done, total)))
    shares = [done for done, _ in seen]
    assert shares == sorted(shares)
    assert shares[0] == 0
    assert shares[-1] == 2
    assert 1 in shares
    assert {total for _, total in seen} == {2}


def test_patchmatch_can_be_stopped_while_it_runs():
    image, mask = noise(400, 400), hole(400, 400, slice(100, 300), slice(100, 300))
    calls = []

    def stop(done, total):
        calls.append(done)
        # the first comes before it starts, the next while it runs
        if len(calls) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill(image, mask, FillMethod.PATCHMATCH, on_progress=stop)
    assert len(calls) == 4
    # what was left running does not disturb the next one
    small = hole()
    again = fill(noise(), small, FillMethod.PATCHMATCH, seed=1)
    assert torch.equal(fill(noise(), small, FillMethod.PATCHMATCH, seed=1), again)


def test_stopped_syntheses_that_had_not_begun_never_begin(monkeypatch):
    library = pytest.importorskip("patchmatch").patch_match
    free, sizes = threading.Event(), []

    def inpaint(source, hole, patch_size):
        sizes.append(len(source))
        assert free.wait(30)
        return source

    monkeypatch.setattr(library, "inpaint", inpaint)

    for side in (50, 60, 70):
        looks = iter([True, True])

        def stop(done, total, looks=looks):
            if not next(looks, False):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fill(noise(side, side), hole(side, side), FillMethod.PATCHMATCH, on_progress=stop)
    free.set()
    fill(noise(80, 80), hole(80, 80), FillMethod.PATCHMATCH)
    assert sizes == [50, 80]


# --- OpenCV


@pytest.mark.parametrize("method", [FillMethod.TELEA, FillMethod.NAVIER_STOKES])
@pytest.mark.parametrize("size", [(33, 40), (3, 17), (17, 2), (1, 17), (17, 1)])
def test_what_is_under_a_hole_at_the_border_stays_unseen(method, size):
    image, corner = noise(*size), hole(*size, rows=slice(0, 4), columns=slice(0, 4))
    other = torch.where(corner[..., None] > 0, 1 - image, image)
    filled = fill(image, corner, method)
    assert torch.equal(fill(other, corner, method), filled)
    assert torch.isfinite(filled).all()
