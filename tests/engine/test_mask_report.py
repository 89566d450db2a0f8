"""The numbers of a mask, and the picture that shows them."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comfyui_mend.engine import mask_report as module
from comfyui_mend.engine.mask_report import Lost, mask_report, preview
from comfyui_mend.engine.masks import snap_to_grid
from comfyui_mend.engine.types import Box, InputError, Size
from hypothesis import given, settings
from hypothesis import strategies as st


def strokes():
    mask = torch.zeros(1, 61, 90)
    mask[:, 10:30, 5:40] = 1
    mask[:, 12, 6] = 0.5
    mask[:, 40:43, 60:80] = 0.25
    mask[:, 60, 89] = 1
    return mask


def test_the_numbers_are_those_of_the_mask():
    report = mask_report(strokes(), 8)
    assert report.size == Size(90, 61)
    assert report.coverage == pytest.approx((700 + 60 + 1) / (61 * 90))
    assert report.box == Box(5, 10, 90, 61)
    assert (report.minimum, report.maximum) == (0, 1)
    assert report.grey == pytest.approx(61 / 761)
    assert (report.islands, report.largest) == (3, 700)
    assert (report.cells, report.cells_in_all) == (3 * 5 + 3 + 1, 8 * 12)


def test_an_empty_mask_has_no_box_and_says_so():
    report = mask_report(torch.zeros(20, 30))
    assert report.box is None and report.islands == report.cells == 0 and not report.loses
    assert str(report) == "30x20, the mask is empty: nothing will be repainted."
    assert json.loads(json.dumps(report.as_dict()))["box"] is None


def test_a_full_mask_is_one_island_that_loses_nothing():
    report = mask_report(torch.ones(1, 64, 40))
    assert (report.coverage, report.grey, report.islands, report.cells) == (1, 0, 1, 40)
    assert not report.loses


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.sampled_from([2, 3, 4, 8]), st.sampled_from([0.002, 0.02, 0.2]))
def test_what_resampling_loses_is_what_torch_loses(seed, downscale, density):
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(1, 6 * downscale, 9 * downscale, generator=generator) < density).float()
    mask = F.max_pool2d(mask, 2, stride=1, padding=1)[:, : 6 * downscale, : 9 * downscale]
    report = mask_report(mask, downscale)
    for lost, mode in ((report.lost_bilinear, "bilinear"), (report.lost_nearest, "nearest")):
        small = F.interpolate(mask[:, None], size=(6, 9), mode=mode)
        near = F.max_pool2d((small > 0).float(), 3, stride=1, padding=1) > 0
        touched = F.max_pool2d(mask[:, None], downscale) > 0
        assert lost.cells == int((touched & ~near).sum())
        assert lost.islands <= report.islands
        assert (lost.islands == report.islands) == (report.islands > 0 and not small.any()) or report.islands == 0


@pytest.mark.parametrize("phase", range(8))
def test_a_thin_stroke_is_lost_at_some_phases_and_never_once_it_is_snapped(phase):
    mask = torch.zeros(1, 64, 64)
    mask[:, 24 + phase : 27 + phase] = 1
    report = mask_report(mask)
    assert report.lost_bilinear.islands == (phase not in (1, 2, 3, 4))
    assert report.lost_nearest.islands == (phase not in (0, 6, 7))
    assert not mask_report(snap_to_grid(mask)).loses


def test_trimming_the_rim_is_no_loss():
    mask = torch.zeros(1, 64, 64)
    mask[:, 15:49, 15:49] = 1
    assert mask_report(mask).lost_bilinear == Lost(0, 0)


def test_the_text_counts_and_names_what_is_lost():
    lines = mask_report(strokes()).lines()
    assert lines[0] == "90x61, 13.9% masked, box 85x51 at 5,10"
    assert lines[1] == "3 islands, the largest 700 pixels; values 0 to 1, 8.0% of it grey"
    assert lines[2].startswith("19 of 96 latent cells of 8 pixels; bilinear resampling would lose 2 islands (4 cells)")


def test_one_report_is_of_one_mask():
    with pytest.raises(InputError, match="2 masks"):
        mask_report(torch.zeros(2, 8, 8))
    with pytest.raises(InputError, match="downscale"):
        mask_report(torch.zeros(1, 8, 8), 0)


# --- preview


def drawn(image, mask):
    return preview(image, mask, [mask_report(one) for one in mask])


def test_one_mask_is_shown_on_each_of_several_pictures():
    pictures = torch.rand(3, 40, 56, 3, generator=torch.Generator().manual_seed(2))
    mask = torch.zeros(1, 40, 56)
    mask[:, 8:24, 8:40] = 1
    report = mask_report(mask)
    together = preview(pictures, mask, [report])
    assert torch.equal(together, torch.cat([preview(picture[None], mask, [report]) for picture in pictures]))


@pytest.mark.parametrize("times", [0.5, 2])
def test_a_picture_of_another_size_is_shown_with_the_masks_own_cells(times):
    mask = torch.zeros(1, 600, 800)
    mask[:, 400:402, 500:700] = 1
    sides = (1, round(600 * times), round(800 * times), 3)
    assert torch.allclose(drawn(torch.full(sides, 0.5), mask), drawn(None, mask), atol=1.1 / 255)


def has(picture, colour):
    return (picture == torch.tensor(colour) / 255).all(dim=-1)


def test_the_preview_shows_the_picture_the_tint_the_box_and_the_lost_cells():
    image = torch.rand(1, 600, 800, 3) * 0.5
    mask = torch.zeros(1, 600, 800)
    mask[:, 100:300, 200:400] = 1
    mask[:, 400:402, 500:700] = 1
    shown = drawn(image, mask)
    assert shown.shape[0] == 1 and shown.shape[2:] == (800, 3) and shown.shape[1] > 640
    assert torch.allclose(shown[:, :90], image[:, :90], atol=0.5 / 255)
    tint = torch.tensor(module.TINT) / 255
    inside = shown[:, 110:290, 210:390]
    assert torch.allclose(inside, image[:, 110:290, 210:390] * 0.45 + 0.55 * tint, atol=0.6 / 255)
    assert has(shown[0, 100, 201:399], module.BOX).all() and has(shown[0, 102:298, 399], module.OUTLINE).all()
    yellow = has(shown[0, :600], module.LOST)
    rows, columns = yellow.nonzero().T
    assert (rows.min(), rows.max()) == (400, 407) and (columns.min(), columns.max()) == (496, 703)
    assert has(shown[0, 600:], module.INK).any() and has(shown[0, 600:], module.LOST).any()


def test_a_soft_mask_is_tinted_as_strongly_as_it_is():
    image = torch.zeros(1, 600, 600, 3)
    mask = torch.zeros(1, 600, 600)
    mask[:, :, 100:500] = torch.linspace(0.1, 1, 400)
    row = drawn(image, mask)[0, 300, 110:490, 0]
    assert torch.allclose(row, 0.55 * mask[0, 300, 110:490], atol=0.6 / 255)


def test_small_pictures_are_enlarged_and_large_ones_reduced_without_losing_a_stroke():
    small = torch.zeros(1, 61, 47)
    small[:, 10, 20] = 1
    assert drawn(None, small).shape[2] == 47 * 8
    large = torch.zeros(1, 900, 3000)
    large[:, 450, 300:2700] = 1
    shown = drawn(None, large)
    assert shown.shape[2] == module.PREVIEW_SIDE
    assert not torch.allclose(shown[0, 150:157, 500], torch.tensor(0.5), atol=0.01)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_batches_rgba_and_empty_masks_are_drawn(channels):
    mask = torch.cat([strokes(), torch.zeros(1, 61, 90), torch.ones(1, 61, 90)])
    shown = drawn(torch.rand(1, 61, 90, channels), mask)
    assert shown.shape[0] == 3 and shown.shape[3] == 3 and shown.dtype == torch.float32
    assert shown.min() >= 0 and shown.max() <= 1
    seen = []
    reports = [mask_report(one) for one in mask]
    preview(None, mask, reports, on_image=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]


def test_a_picture_of_another_shape_is_refused():
    with pytest.raises(InputError, match="90x61 but the image is 64x64"):
        drawn(torch.rand(1, 64, 64, 3), strokes())


def test_lines_are_broken_to_the_width_of_the_picture():
    narrow = torch.zeros(1, 600, 100)
    narrow[:, 10:500, 10:90] = 1
    wide = torch.zeros(1, 600, 1000)
    wide[:, 10:500, 10:90] = 1
    assert drawn(None, narrow).shape[1] > drawn(None, wide).shape[1]
    assert np.allclose(drawn(None, wide)[0, :5, :, 0], 128 / 255)
