"""The benchmark's own arithmetic: its measures on pictures whose figures are known, its cases with Mend alone."""

import json
import math

import numpy as np
import pytest
import torch
from comfyui_mend import contact_sheet
from comfyui_mend.benchmarks import pixel_cases, pixel_sheet, pixels
from comfyui_mend.benchmarks.measures import (
    SeamGauge,
    changed_pixels,
    interleaved,
    largest_difference,
    mean_difference,
    reach,
)
from comfyui_mend.benchmarks.peers.contestant import Contestant, NotOfferedError
from comfyui_mend.benchmarks.peers.mend import Mend, MendWithScipy
from comfyui_mend.benchmarks.pixel_cases import CASES, Bench
from comfyui_mend.benchmarks.table import Row, as_json, draw
from comfyui_mend.engine import masks
from comfyui_mend.engine.compare import compare


class Halves(Contestant):
    """Does everything by half."""

    name = "Halves"

    def grow(self, mask, pixels):
        return Mend().grow(mask, pixels // 2)

    def round_trip(self, image, mask, edit, *, feather, target):
        raise ValueError("no")


def box(rows, columns, size=64):
    mask = torch.zeros(1, size, size)
    mask[:, rows, columns] = 1
    return mask


def test_differences_are_taken_where_they_are_asked_for():
    a = torch.zeros(1, 8, 8, 3)
    b = a.clone()
    b[0, 2, 3] = torch.tensor([0.5, 0.0, 0.1])
    b[0, 6, 6] = -0.25
    where = torch.zeros(1, 8, 8)
    where[0, :4] = 1
    assert largest_difference(a, b, where) == 0.5
    assert largest_difference(a, b, 1 - where) == 0.25
    assert largest_difference(a, b, torch.zeros(1, 8, 8)) == 0
    assert math.isclose(mean_difference(b, a, where), 0.6 / (32 * 3) * 255, rel_tol=1e-6)
    assert changed_pixels(a, b, where) == 1


def test_reach_counts_from_the_pixel_on_each_side():
    mask = torch.zeros(9, 9)
    mask[2:6, 3:9] = 1
    assert reach(mask, 4, 4) == {"left": 1, "right": 4, "up": 2, "down": 1}


def test_a_seam_is_as_steep_as_its_step_over_the_slope_beside_it():
    slope = torch.arange(64).float()[None, :, None].expand(64, 64, 3) / 640
    mask = torch.zeros(64, 64)
    mask[:, :32] = 1
    assert math.isclose(SeamGauge(mask).ratio(slope), 1, rel_tol=1e-5)
    stepped = slope + 0.05 * mask[..., None]
    assert math.isclose(SeamGauge(mask).ratio(stepped), abs(1 / 640 - 0.05) * 640, rel_tol=1e-5)


@pytest.mark.parametrize("shape", range(4))
def test_the_seam_is_the_one_that_compare_measures(shape):
    generator = torch.Generator().manual_seed(shape)
    picture = torch.rand(1, 96, 120, 3, generator=generator)
    mask = pixel_cases.seam_masks(picture)[shape]
    painted = pixel_cases.patched(picture, mask, "offset +6", 0, everywhere=False)
    seam = compare(picture, painted, mask).images[0].seam
    assert math.isclose(SeamGauge(mask[0]).ratio(painted[0]), seam.ratio, rel_tol=0.02)


@pytest.mark.parametrize("kind", pixel_cases.PATCHES)
@pytest.mark.parametrize("feather", [0, 5])
def test_a_patch_in_the_mask_leaves_the_rest_alone_and_one_everywhere_does_not(kind, feather):
    picture = torch.full((1, 64, 64, 3), 0.5)
    mask = box(slice(20, 40), slice(20, 40))
    inside = pixel_cases.patched(picture, mask, kind, feather, everywhere=False)
    changed = (inside != picture).any(-1)
    assert changed[:, 20 - feather : 40 + feather, 20 - feather : 40 + feather].float().mean() > 0.9
    assert not changed[:, : 20 - feather].any() and not changed[:, :, 40 + feather :].any()
    everywhere = pixel_cases.patched(picture, mask, kind, feather, everywhere=True)
    assert (everywhere != picture).any(-1)[:, 0].all()
    assert float((everywhere - picture).abs().max()) == pytest.approx(6 / 255, abs=1e-6)


def test_runs_take_turns_and_a_slow_one_runs_once():
    order = []
    runs = {name: (lambda name=name: order.append(name)) for name in ("a", "b", "slow")}
    seconds = interleaved(runs, {"a": 0.0, "b": 0.0, "slow": 9.5}, rounds=3)
    assert order == ["a", "b"] * 3
    assert seconds["slow"] == 9.5 and seconds["a"] < 1


def test_the_verdict_names_what_is_missed_and_who_is_ahead():
    assert Row("T", "x", {"Mend": 0, "peer": 0.5}).verdict == "reached, better"
    assert Row("T", "x", {"Mend": 0, "peer": 0}).verdict == "reached, as good"
    assert Row("T", "x", {"Mend": 0.2, "peer": 0.1}, within=0.5).verdict == "reached, BEHIND"
    assert Row("T", "x", {"Mend": 0.9, "peer": -2.0}, ideal=1.0, within=0.05).verdict == "MISSED, better"
    assert Row("T", "x", {"Mend": 0.1, "peer": 2.0}, within=0.3, unit="s").verdict == "reached, 20x as fast"
    assert Row("T", "x", {"Mend": 2.0, "peer": 1.0}, within=0.3, unit="s").verdict == "MISSED, BEHIND (2x)"
    assert Row("T", "x", {"Mend": "ok", "peer": "KeyError"}, ideal="ok").verdict == "reached, better"
    assert Row("T", "x", {"Mend": "KeyError"}, ideal="ok").verdict == "MISSED, no peer has it"
    assert Row("T", "x", {"peer": 1}).verdict == "not run"
    assert Row("T", "x", {"Mend": 0, "Mend, SciPy": 3, "peer": 1}).best_peer == "peer"


def test_the_table_has_a_column_for_everybody_and_survives_as_json():
    rows = [
        Row("T1", "figure", {"Mend": 0, "peer": 0.25}),
        Row("T2", "speed", {"Mend": 0.1}, within=0.5, unit="s", note="a note"),
    ]
    lines = draw(rows, ["Mend", "peer", "nobody"]).splitlines()
    assert "nobody" not in lines[0] and "peer" in lines[0]
    assert [line for line in lines if "0.25*" in line and "reached, better" in line]
    assert [line for line in lines if "0.100" in line and "< 0.5 s" in line]
    assert "      a note" in lines
    (first, _) = json.loads(json.dumps(as_json(rows)))
    assert first["best_peer"] == "peer" and first["verdict"] == "reached, better"


def test_what_is_not_offered_is_left_out_and_what_fails_is_named():
    bench = Bench([Mend(), Halves(), Contestant()])
    bench.contestants[2].name = "nothing"
    t6 = {row.what: row for row in CASES["T6"](bench)}
    assert t6["grow 32: reach to the right"].values == {"Mend": 32, "Halves": 16}
    t1 = CASES["T1"](Bench([Mend(), Halves()], quick=True))
    assert {row.values["Halves"] for row in t1} == {"ValueError"}
    with pytest.raises(NotOfferedError):
        bench.contestants[2].bounding_box(torch.zeros(1, 4, 4))


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("T8", "T12")])
def test_mend_reaches_every_exact_figure(case):
    for row in CASES[case](Bench([Mend()], quick=True)):
        assert row.reached, (row.what, row.values)


def test_the_speeds_run_on_small_pictures_and_the_seams_on_photos(monkeypatch):
    monkeypatch.setattr(Bench, "side", lambda self, pixels: pixels // 16)
    rows = CASES["T8"](Bench([Mend()]))
    assert len(rows) == 13 and all(isinstance(row.values["Mend"], float) for row in rows)
    photo = torch.rand(1, 96, 128, 3, generator=torch.Generator().manual_seed(0))
    assert all(row.reached for row in CASES["T12"](Bench([Mend()], {"noise": photo})))
    assert CASES["T12"](Bench([Mend()]))[0].note


def test_the_scipy_variant_does_not_see_opencv_and_puts_it_back(monkeypatch):
    seen = []
    monkeypatch.setattr(masks, "bounding_box", lambda mask: seen.append(masks.opencv()))
    before = masks.opencv()
    for contestant in (Mend(), MendWithScipy(), Mend()):
        contestant.bounding_box(torch.zeros(1, 4, 4))
    assert seen == [before, None, before] and masks.opencv() is before


def test_cases_that_are_none_are_refused_with_their_names(capsys):
    for main, argument in ((pixels.main, "T8,T99"), (pixel_sheet.main, "fills,nonsense")):
        with pytest.raises(SystemExit):
            main(["--only", argument])
        assert argument.split(",")[1] in capsys.readouterr().err


def test_a_page_of_the_sheet_is_drawn(tmp_path, capsys):
    assert pixel_sheet.main(["--only", "masks", "--out", str(tmp_path)]) == 0
    page = tmp_path / "masks.png"
    assert capsys.readouterr().out.strip() == str(page)
    levels = np.asarray(pixel_sheet.Image.open(page))
    assert levels.shape[1] == pixel_sheet.PAGE_WIDTH
    # paper around, pictures on it
    assert tuple(levels[2, 2]) == contact_sheet.PAPER
    assert (levels != contact_sheet.PAPER).any(-1).mean() > 0.1
