import numpy as np
import pytest
import torch
from comfyui_mend.engine.grain import grain_level
from comfyui_mend.engine.masks import feather
from comfyui_mend.engine.registration import Shift, apply_shift
from comfyui_mend.engine.stitch import StitchOptions, stitch
from comfyui_mend.engine.tone import measure_tone, robust_mean, seam_step
from comfyui_mend.engine.types import Blend, InputError
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

LEVEL = 1 / 255
BLENDS = list(Blend)


def photo(name):
    data = pytest.importorskip("skimage.data")
    pixels = getattr(data, name)()
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    return torch.from_numpy(pixels[60:300, 50:350, :3].astype(np.float32) / 255)[None]


def texture(seed=0, height=160, width=200, batch=1):
    noise = np.random.default_rng(seed).random((batch, height, width, 3))
    smooth = ndimage.gaussian_filter(noise, (0, 1.5, 1.5, 0), mode="nearest")
    return torch.from_numpy((0.5 + (smooth - 0.5) * 2).clip(0.1, 0.9).astype(np.float32))


def masks(height, width):
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    shapes = {
        "box": (rows >= height // 3) & (rows < 2 * height // 3) & (columns >= width // 3) & (columns < 2 * width // 3),
        "disk": (rows - height // 2) ** 2 + (columns - width // 2) ** 2 < (min(height, width) // 4) ** 2,
        "stroke": ((rows - height // 2 - 30 * torch.sin(columns / 40)).abs() < 9)
        & (columns > 50)
        & (columns < width - 60),
        "border": (rows < height // 2) & (columns < width // 3),
        "corner": (rows >= height * 2 // 3) & (columns >= width * 3 // 5),
    }
    return {name: shape.float()[None] for name, shape in shapes.items()}


def disk(height=160, width=200):
    return masks(height, width)["disk"]


def settled(mask):
    """Values next to 0 are taken for it wherever masks come in."""
    return torch.where(mask < 4 / 255, 0.0, mask)


def steps(pixels, inside):
    across = [np.abs(np.diff(pixels, axis=axis)).mean(-1)[np.diff(inside, axis=axis)] for axis in (0, 1)]
    return np.concatenate(across)


def seam_ratio(image, mask):
    """The mean difference of neighbours across the contour over that on the contours 8 pixels to either side."""
    pixels, inside = image[0].double().numpy(), mask[0].numpy() > 0.5
    signed = ndimage.distance_transform_edt(inside) - ndimage.distance_transform_edt(~inside)
    beside = np.concatenate([steps(pixels, signed > 8), steps(pixels, signed >= -8)])
    return steps(pixels, inside).mean() / beside.mean()


def off_tone(mask, kind):
    """What is added to the photo: 6 levels, a tint, or 6 levels falling to -6 from one end of the mask to the other."""
    columns = torch.nonzero(mask[0].amax(0))
    left, right = int(columns[0]), int(columns[-1])
    place = ((torch.arange(mask.shape[2]) - left) / max(right - left, 1)).clamp(0, 1)[None, None, :, None]
    levels = {"offset": torch.tensor([6.0, 6, 6]), "tint": torch.tensor([6.0, 0, -6]), "tilt": 6 - 12 * place}
    return (levels[kind] * LEVEL).expand(1, 1, mask.shape[2], 3)


# --- the seam


@pytest.mark.parametrize("name", ["coffee", "cat", "brick", "rocket"])
@pytest.mark.parametrize("kind", ["offset", "tint", "tilt"])
@pytest.mark.parametrize("soft", [0, 16])
@pytest.mark.parametrize("everywhere", [True, False], ids=["everywhere", "inside"])
def test_auto_leaves_a_seam_no_steeper_than_the_photo(name, kind, soft, everywhere):
    original = photo(name)
    for shape, mask in masks(*original.shape[1:3]).items():
        softened = feather(mask, soft)
        off = off_tone(mask, kind) * (1 if everywhere else (softened > 0).float()[..., None])
        painted = (original + off).clamp(0, 1)
        joined = stitch(original, painted, softened).images
        ratio = seam_ratio(joined, mask) / seam_ratio(original, mask)
        assert ratio == pytest.approx(1, abs=0.1), shape
        if kind != "tilt" or shape not in ("border", "corner"):  # beyond the picture's edge nobody knows the tilt
            assert (joined - original).abs().mean() < 0.25 * (off * softened[..., None]).abs().mean(), shape
        assert torch.equal(joined[softened == 0], original[softened == 0])


def test_a_plain_paste_shows_the_seam_that_auto_removes():
    original = photo("rocket")
    mask = disk(*original.shape[1:3])
    painted = (original + off_tone(mask, "tilt")).clamp(0, 1)
    plain = stitch(original, painted, mask, StitchOptions(blend=Blend.LINEAR, color_match=0)).images
    assert seam_ratio(plain, mask) / seam_ratio(original, mask) > 1.5


@pytest.mark.parametrize("name", ["coffee", "brick"])
@pytest.mark.parametrize("blend", BLENDS)
def test_a_clean_patch_comes_back_as_it_was(name, blend):
    original = photo(name)
    for mask in masks(*original.shape[1:3]).values():
        for soft in (0, 16):
            joined = stitch(original, original.clone(), feather(mask, soft), StitchOptions(blend=blend)).images
            assert torch.allclose(joined, original, atol=1e-6)


def test_a_decoders_noise_is_no_seam():
    original = texture()
    painted = (original + torch.randn(original.shape, generator=torch.Generator().manual_seed(1)) * 2 * LEVEL).clamp(
        0, 1
    )
    joined = stitch(original, painted, disk()).images
    correction = (joined - painted)[disk() == 1]
    assert correction.abs().max() < 1.5 * LEVEL


# --- what auto chooses


def report_of(painted, original=None, mask=None, **options):
    original = texture() if original is None else original
    return stitch(original, painted, disk() if mask is None else mask, StitchOptions(**options)).reports[0]


def test_auto_says_what_it_chose_and_why():
    original = texture()
    assert report_of(original + 6 * LEVEL).startswith(
        "auto chose linear; tone off by 6.0/255; one offset leaves 0.0/255"
    )
    assert report_of(original + off_tone(disk(), "tilt")).startswith("auto chose poisson")
    assert report_of(texture(5)).startswith("auto chose multiband")
    assert report_of(original, mask=torch.ones(1, 160, 200)).startswith("auto chose linear; nothing around the mask")
    assert report_of(original, mask=torch.zeros(1, 160, 200)) == "the mask is empty: the picture stays as it was"
    assert report_of(original, blend=Blend.POISSON).startswith("poisson; tone off by 0.0/255")
    assert report_of(original, color_match=0) == "auto chose linear; colours as they are"


@settings(max_examples=12)
@given(st.integers(0, 10**6), st.sampled_from(["offset", "tint", "tilt"]), st.floats(0, 4), st.sampled_from([0, 8]))
def test_auto_is_never_worse_than_linear_on_its_own_measure(seed, kind, strength, soft):
    original, mask = texture(seed, 100, 120), settled(feather(disk(100, 120), soft))
    other = texture(seed + 1, 100, 120)
    painted = (original + strength * off_tone(disk(100, 120), kind)).clamp(0, 1)
    painted[:, :, 70:] = other[:, :, 70:]  # a part of the rim shows something else
    free = mask[0].numpy() > 0
    tone = measure_tone(original[0].numpy(), painted[0].numpy(), free, 16 * LEVEL)

    def error(blend):
        options = StitchOptions(blend=blend)
        joined = stitch(original, painted, mask, options)
        used = joined.reports[0].split(";")[0].removeprefix("auto chose ")
        largest = np.float32(options.max_shift)
        correction = (tone.local() if used == "poisson" else tone.offset).clip(-largest, largest)
        return tone.left_by(correction) + seam_step(joined.images[0].numpy(), mask[0].numpy())

    assert error(Blend.AUTO) <= error(Blend.LINEAR) + 1e-4


# --- content is not tone


@pytest.mark.parametrize("blend", BLENDS)
def test_what_was_painted_inside_keeps_its_colour(blend):
    original = photo("coffee")
    mask = disk(*original.shape[1:3])
    rows, columns = torch.meshgrid(torch.arange(240), torch.arange(300), indexing="ij")
    red = ((rows - 120) ** 2 + (columns - 150) ** 2 < 30**2)[None]
    painted = torch.where(red[..., None], torch.tensor([0.8, 0.1, 0.1]), original)
    joined = stitch(original, painted, mask, StitchOptions(blend=blend)).images
    assert torch.allclose(joined[red], painted[red], atol=1e-6)
    off = (painted + 6 * LEVEL).clamp(0, 1)
    joined = stitch(original, off, mask, StitchOptions(blend=blend)).images
    assert (joined[red] - painted[red]).abs().max() < 0.5 * LEVEL


@pytest.mark.parametrize("blend", BLENDS)
def test_no_colour_moves_further_than_the_clamp(blend):
    original = texture()
    options = StitchOptions(blend=blend, max_shift=4 * LEVEL)
    painted = (original * 0.5 + 0.4).clamp(0, 1)
    joined = stitch(original, painted, feather(disk(), 12), options).images
    inside = feather(disk(), 12) == 1
    assert (joined - painted)[inside].abs().max() <= 4.01 * LEVEL


def test_other_content_around_a_part_of_the_rim_does_not_bleed_inwards():
    original = texture()
    painted = original + off_tone(disk(), "tilt")
    clean = stitch(original, painted, disk(), StitchOptions(blend=Blend.POISSON)).images
    painted[:, 70:90, 142:165] = torch.tensor([0.95, 0.05, 0.05])  # beside the disk, to its right
    joined = stitch(original, painted, disk(), StitchOptions(blend=Blend.POISSON)).images
    assert (joined - clean)[disk() > 0].abs().max() < 3 * LEVEL


def test_statistics_ignore_what_few_pixels_show():
    sample = np.random.default_rng(0).normal(0.02, 0.01, (1000, 3)).astype(np.float32)
    sample[:250] = 0.9
    mean, spread = robust_mean(sample)
    assert np.allclose(mean, 0.02, atol=0.003)
    assert np.allclose(spread, 0.01, rtol=0.8)


def test_strength_is_the_share_of_the_tone_that_is_taken_off():
    original = texture()
    painted = original + 6 * LEVEL
    half = stitch(original, painted, disk(), StitchOptions(color_match=0.5)).images
    assert torch.allclose((half - original)[disk() == 1], torch.tensor(3 * LEVEL), atol=1e-5)
    tilted = original + off_tone(disk(), "tilt")
    half, none = (
        stitch(original, tilted, disk(), StitchOptions(blend=Blend.POISSON, color_match=share)).images
        for share in (0.5, 0)
    )
    assert torch.allclose(half[disk() == 1], ((tilted + original) / 2)[disk() == 1], atol=0.5 * LEVEL)
    assert torch.equal(none[disk() == 1], tilted[disk() == 1])


def test_tone_is_measured_beyond_what_was_repainted():
    original, mask = texture(), disk()
    repainted = (feather(mask, 8) > 0).float()
    painted = torch.where(repainted[..., None] > 0, texture(4), original + 6 * LEVEL)
    joined = stitch(original, painted, mask, repainted=repainted).images
    assert torch.allclose(joined[mask == 1], (painted - 6 * LEVEL)[mask == 1], atol=0.1 * LEVEL)


def test_a_part_that_was_pasted_before_is_matched_only_where_it_continues_the_picture():
    original, mask = texture(), disk()
    continued = torch.where(mask[..., None] > 0, original + 6 * LEVEL, original)
    assert torch.allclose(stitch(original, continued, mask).images, original, atol=0.1 * LEVEL)
    other = torch.where(mask[..., None] > 0, texture(4), original)
    assert torch.equal(stitch(original, other, mask).images, other)
    recoloured = torch.where(mask[..., None] > 0, original + 40 * LEVEL, original).clamp(0, 1)
    assert torch.equal(stitch(original, recoloured, mask).images, recoloured)


# --- registration and grain


@pytest.mark.parametrize(("dx", "dy"), [(3, -2), (1.5, 0.25), (-5.3, 4.8)])
def test_a_displaced_picture_is_moved_back(dx, dy):
    original, mask = photo("coffee"), masks(240, 300)["corner"]
    painted = apply_shift(original, Shift(dx, dy)) + 0.5 * off_tone(mask, "tilt")
    joined = stitch(original, painted.clamp(0, 1), mask, StitchOptions(register=True))
    assert "moved back by" in joined.reports[0]
    inside = (mask > 0).clone()
    inside[:, -12:], inside[:, :, -12:] = False, False  # here the picture's edge was pushed out and is lost
    wrong = (joined.images - original)[inside].abs().mean()
    assert wrong < 2 * LEVEL
    assert wrong < (painted - original)[inside].abs().mean() / 4


def test_no_black_comes_in_from_beyond_the_picture():
    original = torch.full((1, 90, 100, 3), 0.7) + (texture(0, 90, 100) - 0.5) * 0.3
    mask = torch.zeros(1, 90, 100)
    mask[:, :40, :40] = 1
    joined = stitch(original, apply_shift(original, Shift(6.5, 5)), mask, StitchOptions(register=True)).images
    assert joined.min() >= original.min() - 2 * LEVEL


def test_a_picture_that_did_not_move_is_not_touched():
    original = texture()
    painted = torch.where(disk()[..., None] > 0, texture(3), original)
    joined = stitch(original, painted, disk(), StitchOptions(register=True, blend=Blend.LINEAR))
    assert torch.equal(joined.images, painted)
    assert "not moved" in joined.reports[0]


def test_grain_is_matched_inside_and_untouched_outside():
    smooth = ndimage.gaussian_filter(texture().numpy(), (0, 4, 4, 0))
    painted = torch.from_numpy(smooth)
    original = painted + torch.randn(painted.shape, generator=torch.Generator().manual_seed(0)) * 0.03
    original, mask = original.clamp(0, 1), disk()
    joined = stitch(original, painted, mask, StitchOptions(grain=1, seed=7))
    assert torch.allclose(grain_level(joined.images, mask), torch.tensor(0.03), rtol=0.12)
    assert torch.equal(joined.images[mask == 0], original[mask == 0])
    assert "grain 0.0/255 inside, 7." in joined.reports[0]


# --- whatever comes


@st.composite
def pictures(draw):
    """(original, painted, mask), of any size and batch."""
    height, width, batch = draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.integers(1, 2))
    random = np.random.default_rng(draw(st.integers(0, 10**6)))
    field = ndimage.gaussian_filter(random.random((batch, height, width)), (0, 3, 3))
    level = np.quantile(field, draw(st.sampled_from([0, 0.3, 0.8])))
    mask = (field >= level) if draw(st.booleans()) else np.clip((field - level) * 30, 0, 1)
    if draw(st.booleans()):
        mask = mask * 0 if draw(st.booleans()) else mask * 0 + 1
    channels = draw(st.sampled_from([3, 4]))
    original = torch.from_numpy(random.random((batch, height, width, channels)).astype(np.float32))
    tone = draw(st.sampled_from([0.0, 0.02, 0.3]))
    painted = (original[..., :3] * 0.9 + tone).clamp(0, 1)
    return original, painted, torch.from_numpy(mask.astype(np.float32))


@settings(max_examples=60)
@given(pictures(), st.sampled_from(BLENDS), st.booleans(), st.sampled_from([0.0, 1.0]))
def test_outside_bits_finite_colours_and_batch_as_loop(given_pictures, blend, register, grain):
    original, painted, mask = given_pictures
    options = StitchOptions(blend=blend, register=register, grain=grain, seed=5)
    joined = stitch(original, painted, mask, options)
    assert joined.images.shape == original.shape
    assert torch.equal(joined.images[settled(mask) == 0], original[settled(mask) == 0])
    assert joined.images.min() >= 0
    assert joined.images.max() <= 1
    assert len(joined.reports) == len(original)
    if original.shape[-1] == 4:
        assert (joined.images[..., 3][mask == 1] == 1).all()
    for index in range(len(original)):
        one = slice(index, index + 1)
        alone = stitch(
            original[one],
            painted[one],
            mask[one],
            StitchOptions(blend=blend, register=register, grain=grain, seed=5 + index),
        )
        assert torch.equal(alone.images[0], joined.images[index])
        assert alone.reports[0] == joined.reports[index]


@pytest.mark.parametrize("blend", BLENDS)
@pytest.mark.parametrize("kind", ["offset", "tilt"])
def test_it_commutes_with_flips(blend, kind):
    original, mask = texture(0, 97, 131), feather(disk(97, 131), 6)
    painted = original + off_tone(disk(97, 131), kind)
    options = StitchOptions(blend=blend)
    joined = stitch(original, painted, mask, options).images
    for axis in (1, 2):
        flipped = stitch(original.flip(axis), painted.flip(axis), mask.flip(axis), options).images
        assert torch.allclose(flipped.flip(axis), joined, atol=0.2 * LEVEL)


def test_the_crop_that_holds_mask_and_ring_gives_what_the_whole_picture_gives():
    original, mask = texture(0, 200, 260), disk(200, 260)
    painted = original + off_tone(mask, "tilt")
    rows, columns = slice(20, 180), slice(50, 210)
    whole = stitch(original, painted, mask).images[:, rows, columns]
    cut = stitch(original[:, rows, columns], painted[:, rows, columns], mask[:, rows, columns]).images
    assert torch.equal(whole, cut)


def test_one_serves_many():
    originals, painted, mask = texture(batch=2), texture(1), disk()
    joined = stitch(originals, painted, mask)
    assert torch.equal(joined.images[1:], stitch(originals[1:], painted, mask).images)
    two_masks = torch.cat([mask, mask.flip(1)])
    assert stitch(originals[:1], painted, two_masks).images.shape[0] == 2
    assert stitch(originals[:1], texture(1, batch=2), mask).images.shape[0] == 2


def test_the_inputs_are_not_written_to():
    original, painted, mask = texture(), texture() + 6 * LEVEL, disk()
    copies = original.clone(), painted.clone(), mask.clone()
    stitch(original, painted, mask, StitchOptions(grain=1, register=True))
    assert all(torch.equal(a, b) for a, b in zip((original, painted, mask), copies, strict=True))


def test_what_cannot_be_joined_is_refused_in_one_sentence():
    with pytest.raises(InputError, match="painted picture is 50x40 and the original 200x160"):
        stitch(texture(), texture(0, 40, 50), disk())
    with pytest.raises(InputError, match="2 originals and 3 painted"):
        stitch(texture(batch=2), texture(batch=3), disk())
    with pytest.raises(InputError, match="NaN"):
        stitch(texture(), texture() * float("nan"), disk())
    for wrong in ({"max_shift": 2}, {"grain": -1}, {"color_match": 1.5}, {"seed": -1}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            StitchOptions(**wrong)
