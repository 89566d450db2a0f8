"""Telea and Navier-Stokes without OpenCV: what they promise exactly, and how near OpenCV's own they come."""

import numpy as np
import pytest
import torch
from comfyui_mend.engine import fill as fill_module
from comfyui_mend.engine import marching
from comfyui_mend.engine.fill import FillMethod, fill
from comfyui_mend.engine.marching import navier_stokes, telea
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from scipy import ndimage
from skimage import data

RADIUS = 5
FILLS = pytest.mark.parametrize("march", [telea, navier_stokes])
METHOD = {telea: FillMethod.TELEA, navier_stokes: FillMethod.NAVIER_STOKES}
ROUNDING = 1e-6


def noise(height=40, width=50, seed=0):
    return np.random.default_rng(seed).random((height, width, 3), dtype=np.float32)


def rectangle(height=40, width=50, rows=slice(12, 26), columns=slice(15, 40)):
    hole = np.zeros((height, width), bool)
    hole[rows, columns] = True
    return hole


def drawn(size, draw):
    canvas = Image.new("1", size)
    draw(ImageDraw.Draw(canvas))
    return np.array(canvas)


def text(size):
    def draw(canvas):
        for line in range(6):
            canvas.text((10, 15 + 45 * line), "Mend the hole 42", fill=1, font_size=34)

    return drawn(size, draw)


def scratches(size):
    ends = np.random.default_rng(0).uniform(0, size, (12, 2, 2)).round().astype(int)

    def draw(canvas):
        for index, (start, end) in enumerate(ends):
            canvas.line([*start, *end], fill=1, width=1 + index % 5)

    return drawn(size, draw)


def discs(radius):
    def mask(size):
        centres = np.random.default_rng(radius).uniform(0, size, (4, 2))

        def draw(canvas):
            for x, y in centres:
                canvas.ellipse([x - radius, y - radius, x + radius, y + radius], fill=1)

        return drawn(size, draw)

    return mask


@FILLS
@settings(max_examples=30)
@given(
    st.integers(1, 24),
    st.integers(1, 24),
    st.integers(1, 9),
    st.integers(0, 10**6),
    st.sampled_from([0.05, 0.5, 0.95]),
)
def test_any_hole_is_filled_within_the_range_of_what_is_kept_and_nothing_else_changes(
    march, height, width, radius, seed, density
):
    pixels = noise(height, width, seed) * 7 - 3  # a float picture need not lie in 0..1
    hole = noise(height, width, seed + 1)[..., 0] < density
    hole[seed % height, seed % width] = False
    before = pixels.copy()
    filled = march(pixels, hole, radius)
    assert filled.dtype == np.float32
    assert np.array_equal(pixels, before)
    assert np.array_equal(filled[~hole], pixels[~hole])
    kept = pixels[~hole]
    assert (filled >= kept.min(axis=0)).all()
    assert (filled <= kept.max(axis=0)).all()


@FILLS
@pytest.mark.parametrize(
    "hole",
    [
        rectangle(),
        rectangle(rows=slice(0, 9)),
        rectangle(columns=slice(38, None)),
        rectangle(rows=slice(0, 8), columns=slice(0, 8)),
        rectangle(rows=slice(32, None), columns=slice(42, None)),
        rectangle(rows=slice(20, 21), columns=slice(30, 31)),
        rectangle(rows=slice(1, None), columns=slice(1, None)),
        rectangle(rows=slice(4, 8), columns=slice(4, 8)) | rectangle(rows=slice(20, 39)),
    ],
    ids=["middle", "top", "right", "corner", "far corner", "one pixel", "all but two edges", "islands"],
)
def test_a_plain_picture_is_completed_to_the_bit(march, hole):
    plain = np.broadcast_to(np.array([0.2, 0.6, 0.9], np.float32), (*hole.shape, 3))
    damaged = np.where(hole[..., None], np.float32(np.nan), plain)
    assert np.array_equal(march(damaged, hole, RADIUS), plain)


@FILLS
def test_one_missing_pixel_of_a_ramp_is_restored(march):
    ramp = np.broadcast_to(np.linspace(0, 1, 50, dtype=np.float32)[None, :, None], (40, 50, 3))
    hole = rectangle(rows=slice(20, 21), columns=slice(30, 31))
    assert np.allclose(march(np.where(hole[..., None], 0, ramp), hole, RADIUS), ramp, atol=ROUNDING, rtol=0)


@FILLS
@pytest.mark.parametrize("direction", [(0, 1), (1, 0), (0.5, 0.5)], ids=["across", "down", "diagonal"])
def test_a_gradient_goes_on_through_a_scratch(march, direction):
    rows, columns = np.mgrid[:96, :96] / 95
    ramp = (0.1 + 0.8 * (direction[0] * rows + direction[1] * columns)).astype(np.float32)
    ramp = np.repeat(ramp[..., None], 3, axis=2)
    cross = rectangle(96, 96, slice(44, 49), slice(10, 90)) | rectangle(96, 96, slice(10, 90), slice(44, 49))
    filled = march(np.where(cross[..., None], 0, ramp), cross, RADIUS)
    # the scratch is 5 pixels wide, 0.04 of the ramp
    assert np.abs(filled - ramp)[cross].max() < 0.02
    assert np.abs(filled - ramp)[cross].mean() < 0.008


def step_by_step(march, pixels, hole, radius):
    """The same in plain loops over one channel [H, W], pixel by pixel and neighbour by neighbour."""
    height, width = hole.shape
    filled, known = np.where(hole, 0, pixels).astype(float), ~hole
    inside, outside = ndimage.distance_transform_edt(hole), ndimage.distance_transform_edt(~hole)
    distance = np.where(hole, inside, 1 - outside)
    normals = np.stack(np.gradient(np.pad(distance, 1, mode="edge")))[:, 1:-1, 1:-1]

    def difference(pixel, axis):
        line = [tuple(np.add(pixel, way * np.eye(2, dtype=int)[axis])) for way in (-1, 0, 1)]
        line = [at for at in line if 0 <= at[0] < height and 0 <= at[1] < width and known[at]]
        return (filled[line[-1]] - filled[line[0]]) / max(len(line) - 1, 1)

    def weight(pixel, neighbour):
        way = np.subtract(neighbour, pixel)
        length = np.hypot(*way)
        if march is telea:
            direction = abs(normals[:, pixel[0], pixel[1]] @ way) / length
            return max(direction, 1e-6) / length**2 / (1 + abs(distance[pixel] - distance[neighbour]))
        slope = np.array([difference(neighbour, 0), difference(neighbour, 1)])
        isophote = np.array([slope[1], -slope[0]]) / max(np.hypot(*slope), 1e-12)
        return max(abs(isophote @ way) / length, 1e-6) / (1 + length**4)

    everywhere = list(np.ndindex(hole.shape))
    for level in np.unique(inside[hole]):
        wave, values = [pixel for pixel in everywhere if inside[pixel] == level], []
        for pixel in wave:
            near = [other for other in everywhere if known[other] and np.hypot(*np.subtract(other, pixel)) <= radius]
            values.append(np.average([filled[n] for n in near], weights=[weight(pixel, n) for n in near]))
        for pixel, value in zip(wave, values, strict=True):
            filled[pixel], known[pixel] = value, True
    return filled


@FILLS
@pytest.mark.parametrize("radius", [1, 3])
def test_the_weights_are_those_of_the_formulas(march, radius):
    pixels = noise(14, 16)
    hole = rectangle(14, 16, slice(0, 6), slice(3, 10)) | rectangle(14, 16, slice(8, 12), slice(9, 14))
    expected = step_by_step(march, pixels[..., 0], hole, radius)
    assert np.allclose(march(pixels, hole, radius)[..., 0], expected, atol=1e-5, rtol=0)


@FILLS
@pytest.mark.parametrize("flip", [np.flipud, np.fliplr, lambda pixels: np.swapaxes(pixels, 0, 1)])
def test_a_mirrored_picture_gives_the_mirrored_fill(march, flip):
    pixels, hole = noise(), noise(seed=1)[..., 0] < 0.6
    flipped = flip(march(flip(pixels), flip(hole), RADIUS))
    assert np.allclose(flipped, march(pixels, hole, RADIUS), atol=ROUNDING, rtol=0)


@FILLS
def test_the_channels_are_filled_in_one_march(march):
    pixels, hole = noise(), rectangle()
    filled = march(pixels, hole, RADIUS)
    assert np.array_equal(march(pixels[..., ::-1], hole, RADIUS), filled[..., ::-1])
    single = [march(pixels[..., channel : channel + 1], hole, RADIUS) for channel in range(3)]
    assert np.allclose(np.concatenate(single, axis=-1), filled, atol=ROUNDING, rtol=0)


@FILLS
def test_what_lies_farther_than_the_radius_has_no_influence(march):
    pixels, hole = noise(), rectangle()
    # one pixel more: isophotes are taken from a pixel's neighbours
    reach = RADIUS + 1
    near = rectangle(rows=slice(12 - reach, 26 + reach), columns=slice(15 - reach, 40 + reach))
    other = np.where(near[..., None], pixels, 0)
    assert np.array_equal(march(other, hole, RADIUS)[hole], march(pixels, hole, RADIUS)[hole])


@FILLS
def test_the_pixels_computed_at_once_do_not_show(march, monkeypatch):
    pixels, hole = noise(), rectangle()
    expected = march(pixels, hole, RADIUS)
    monkeypatch.setattr(marching, "NEIGHBOURS_AT_ONCE", 100)
    assert np.array_equal(march(pixels, hole, RADIUS), expected)


@FILLS
@pytest.mark.parametrize(
    ("mask", "gate"),
    [(text, 3), (scratches, 3), (discs(10), 5), (discs(20), 9), (discs(40), 9)],
    ids=["text", "scratches", "discs of 10", "discs of 20", "discs of 40"],
)
@pytest.mark.parametrize("photo", [data.coffee, data.chelsea, data.rocket], ids=["coffee", "chelsea", "rocket"])
def test_on_photographs_the_fill_is_nearly_opencvs(march, mask, gate, photo, monkeypatch):
    """Mean differences in the hole in 256ths; and no farther from what was there than OpenCV's."""
    photo = photo()[:300, :450]
    hole = mask((450, 300))
    image, holes = torch.from_numpy(photo)[None] / 255, torch.from_numpy(hole).float()[None]

    def filled(method):
        return fill(image, holes, method)[holes > 0] * 255

    truth = image[holes > 0] * 255
    opencvs = filled(METHOD[march])
    monkeypatch.setattr(fill_module, "opencv", lambda: None)
    ours = filled(METHOD[march])
    difference = (ours - opencvs).abs().mean()
    assert difference < gate
    # another fill from the surroundings is farther away
    assert difference < (filled(FillMethod.BLUR) - opencvs).abs().mean()
    assert (ours - truth).abs().mean() < 1.1 * (opencvs - truth).abs().mean()


@FILLS
def test_fill_takes_it_where_opencv_does_not_import(march, monkeypatch):
    pixels, hole = noise(120, 160), rectangle(120, 160, slice(50, 70), slice(60, 100))
    monkeypatch.setattr(fill_module, "opencv", lambda: None)
    result = fill(torch.from_numpy(pixels)[None], torch.from_numpy(hole).float()[None], METHOD[march], radius=7)
    # nothing is rounded to bytes, and the part of the picture worked on does not show
    assert np.array_equal(result[0].numpy(), march(pixels, hole, 7))
