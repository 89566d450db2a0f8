"""The cases T1 to T16: the same pictures, masks and measures for every contestant.

Each case is a function of a Bench that gives rows of the table; a contestant that has not what a case needs is left out
of it, and one that fails has the name of its error where the figure would be.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .measures import (
    SeamGauge,
    changed_pixels,
    interleaved,
    largest_difference,
    mean_difference,
    reach,
    timed,
)
from .peers.contestant import Contestant, Edit, NotOfferedError, Sides
from .table import OURS, VARIANT, Row, Value

LEVEL = 1 / 255
BLEND = 32
"""The blend width, in pixels, that the peers' figures are known at: CropAndStitch's default."""
JITTER = 0.004
"""Standard deviation of the noise that stands for a VAE round trip."""


@dataclass(frozen=True)
class Bench:
    """Who is measured, on what."""

    contestants: Sequence[Contestant]
    photos: Mapping[str, Tensor] = field(default_factory=dict)
    """By name, [1, H, W, 3]."""
    quick: bool = False
    """Sizes a quarter as wide and high."""

    def side(self, pixels: int) -> int:
        return pixels // 4 if self.quick else pixels

    def only(self, keep: Callable[[Contestant], bool]) -> Bench:
        """With fewer contestants."""
        return replace(self, contestants=[c for c in self.contestants if keep(c)])

    def collect(self, measure: Callable[[Contestant], Value]) -> dict[str, Value]:
        """What ``measure`` says of each contestant."""
        found: dict[str, Value] = {}
        for contestant in self.contestants:
            try:
                found[contestant.name] = measure(contestant)
            except NotOfferedError:
                continue
            except Exception as error:  # a contestant that falls is a result
                found[contestant.name] = type(error).__name__
        return found

    def seconds(self, task: Callable[[Contestant], object]) -> dict[str, Value]:
        """Median seconds of ``task`` for each contestant, interleaved."""
        first = self.collect(lambda c: timed(lambda: task(c)))
        seconds = {name: value for name, value in first.items() if not isinstance(value, str)}
        runs = {c.name: (lambda c=c: task(c)) for c in self.contestants if c.name in seconds}
        return {**first, **interleaved(runs, seconds)}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def box_mask(height: int, width: int, rows: slice, columns: slice) -> Tensor:
    mask = torch.zeros(1, height, width)
    mask[:, rows, columns] = 1
    return mask


def t1_mask(side: int) -> Tensor:
    """The mask of the peers' figures, 1024 pixels wide there: rows 400 to 560, columns 300 to 500."""
    at = side / 1024
    rows, columns = slice(round(400 * at), round(560 * at)), slice(round(300 * at), round(500 * at))
    return box_mask(side, side, rows, columns)


def textured(side: int) -> Tensor:
    """Smooth colours with fine noise on them, [1, side, side, 3]."""
    coarse = F.interpolate(noise(1, 3, side // 16, side // 16), size=(side, side), mode="bicubic").clamp(0, 1)
    return (coarse.movedim(1, -1) * 0.8 + 0.2 * noise(1, side, side, 3, seed=1)).clamp(0, 1)


def untouched(crop: Tensor) -> Tensor:
    return crop


# --- crop and stitch


def t1(bench: Bench) -> list[Row]:
    """Crop and stitch without an edit, a float picture, no blend, no resampling."""
    side = bench.side(1024)
    image, mask = noise(1, side, side, 3), t1_mask(side)
    results = Results(bench, lambda c: c.round_trip(image, mask, untouched, feather=0, target=None))
    return [
        Row("T1", "largest change outside", results.of(lambda r: largest_difference(r, image, mask == 0))),
        Row("T1", "largest change inside", results.of(lambda r: largest_difference(r, image, mask))),
        Row("T1", "bias inside, /255", results.of(lambda r: mean_difference(r, image, mask))),
    ]


def t2(bench: Bench) -> list[Row]:
    """The same with a blend of 32 pixels, at the picture's scale and resampled to 512 x 512."""
    side = bench.side(1024)
    image, mask = textured(side), t1_mask(side)
    free = Results(bench, lambda c: c.round_trip(image, mask, untouched, feather=BLEND, target=None))
    target = Results(bench, lambda c: c.round_trip(image, mask, untouched, feather=BLEND, target=bench.side(512)))
    return [
        Row("T2", "changed pixels outside", free.of(lambda r: changed_pixels(r, image, mask == 0))),
        Row("T2", "largest change outside", free.of(lambda r: largest_difference(r, image, mask == 0)), within=1e-6),
        Row("T2", "the same, resampled", target.of(lambda r: largest_difference(r, image, mask == 0)), within=1e-6),
    ]


def t3(bench: Bench) -> list[Row]:
    """Five times crop, zero-mean jitter, stitch."""
    side = bench.side(1024)
    image, mask = noise(1, side, side, 3), t1_mask(side)

    def repeated(contestant: Contestant) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        result = image
        for _ in range(5):

            def jitter(crop: Tensor) -> Tensor:
                return (crop + torch.randn(crop.shape, generator=generator) * JITTER).clamp(0, 1)

            result = contestant.round_trip(result, mask, jitter, feather=0, target=None)
        return result

    results = Results(bench, repeated)
    return [
        Row("T3", "bias of five edits, /255", results.of(lambda r: mean_difference(r, image, mask)), within=0.05),
        Row("T3", "largest change outside", results.of(lambda r: largest_difference(r, image, mask == 0))),
    ]


def t4(bench: Bench) -> list[Row]:
    """Alpha of a blend of 32 pixels around a box."""
    mask = t1_mask(1024)
    results = Results(bench, lambda c: c.alpha(mask, BLEND))

    def first_full(alpha: Tensor) -> Value:
        full = torch.nonzero(alpha[480, 300:400] >= 0.999)
        return int(full[0, 0]) if len(full) else "never"

    return [
        Row("T4", "alpha at the mask's edge", results.of(lambda a: float(a[480, 300])), ideal=1.0),
        Row("T4", "first full alpha, px inside", results.of(first_full)),
        Row("T4", "largest alpha", results.of(lambda a: float(a.max())), ideal=1.0),
    ]


def t5(bench: Bench) -> list[Row]:
    """A mask that touches the picture's border, blend of 32 pixels."""
    mask = box_mask(512, 512, slice(None), slice(0, 100))
    results = Results(bench, lambda c: c.alpha(mask, BLEND))
    sampler = Results(bench, lambda c: c.crop_mask(mask, BLEND))
    return [
        Row("T5", "alpha on the border", results.of(lambda a: float(a[256, 0])), ideal=1.0),
        Row("T5", "alpha in the corner", results.of(lambda a: float(a[0, 0])), ideal=1.0),
        Row(
            "T5",
            "sampler's mask on the border",
            sampler.of(lambda m: float(m[0, m.shape[1] // 2, 0])),
            ideal=1.0,
        ),
    ]


class Results:
    """What each contestant made, once, for several measures."""

    def __init__(self, bench: Bench, make: Callable[[Contestant], Tensor]) -> None:
        self._made: dict[str, Tensor] = {}

        def keep(contestant: Contestant) -> Value:
            self._made[contestant.name] = make(contestant)
            return 0

        self._failed = {name: value for name, value in bench.collect(keep).items() if value != 0}

    def of(self, measure: Callable[[Tensor], Value]) -> dict[str, Value]:
        return {**{name: measure(result) for name, result in self._made.items()}, **self._failed}


# --- masks


def t6(bench: Bench) -> list[Row]:
    """One pixel, grown."""
    rows = []
    mask = torch.zeros(1, 304, 304)
    mask[0, 152, 152] = 1
    for pixels in (6, 16, 32):
        results = Results(bench, lambda c, pixels=pixels: c.grow(mask, pixels))
        disk = _disk(304, pixels)
        rows.append(Row("T6", f"grow {pixels}: reach to the right", results.of(lambda m: _reach(m, "right")), pixels))
        rows.append(Row("T6", f"grow {pixels}: reach to the left", results.of(lambda m: _reach(m, "left")), pixels))
        rows.append(
            Row("T6", f"grow {pixels}: px off a disk", results.of(lambda m, d=disk: int(((m[0] > 0) != d).sum())))
        )
    return rows


def _reach(mask: Tensor, side: str) -> int:
    return reach(mask[0], 152, 152)[side]


def _disk(side: int, radius: int) -> Tensor:
    axis = torch.arange(side) - side // 2
    return axis[:, None] ** 2 + axis[None, :] ** 2 <= radius**2


def t7(bench: Bench) -> list[Row]:
    """Strokes of 3, 4 and 7 pixels on the latent grid, at each of the 8 places they can have in it."""
    rows = []
    for width in (1, 3, 4, 7):
        strokes = [box_mask(512, 512, slice(None), slice(256 + phase, 256 + phase + width)) for phase in range(8)]
        weakest = bench.collect(lambda c, s=strokes: min(float(c.sampler_mask(mask).max()) for mask in s))
        rows.append(Row("T7", f"{width} px stroke, weakest phase", weakest, ideal=1.0))
        alive = bench.collect(lambda c, s=strokes: sum(float(c.sampler_mask(mask).max()) > 0 for mask in s))
        rows.append(Row("T7", f"{width} px stroke, phases alive", alive, ideal=8))
    return rows


def t8(bench: Bench) -> list[Row]:
    """CPU seconds on one thread."""
    side = bench.side(4096)
    blob = box_mask(
        side, side, slice(side * 1000 // 4096, side * 1800 // 4096), slice(side * 1200 // 4096, side * 2200 // 4096)
    )
    span = torch.zeros(1, side, side)
    span[:, side // 100 : -side // 100, side // 100 : -side // 100] = 1
    span[:, side // 3 : side // 2, side // 3 : side // 2] = 0
    strokes = _strokes(side)
    image = noise(1, side, side, 3)
    quarter = t1_mask(bench.side(1024))
    canvas = noise(1, bench.side(2048), bench.side(2048), 3)
    pad, feather = bench.side(256), bench.side(400)

    # on the CPU the other path's speed says nothing about a card's
    peers = bench.only(lambda c: "GPU" not in c.name)
    ours = bench.only(lambda c: c.name in (OURS, VARIANT))

    def row(what: str, within: float, task: Callable[[Contestant], object], bench: Bench = peers) -> Row:
        return Row("T8", what, bench.seconds(task), within=within, unit="s")

    tinted = (canvas * 0.9 + 0.02).clamp(0, 1)
    middle = bench.side(2048) // 2 - bench.side(300), bench.side(2048) // 2 + bench.side(300)
    hole = box_mask(*canvas.shape[1:3], slice(*middle), slice(*middle))

    return [
        row(f"fill holes, {side}", 0.5, lambda c: c.fill_holes(blob)),
        row("fill holes, mask with a hole all over", 0.5, lambda c: c.fill_holes(span), ours),
        row(f"default preparation, {side}", 0.5, lambda c: c.prepare(blob)),
        row("default preparation, mask all over", 0.5, lambda c: c.prepare(span), ours),
        row("default preparation, strokes", 0.5, lambda c: c.prepare(strokes), ours),
        row(f"default crop, {side}", 0.5, lambda c: c.crop(image, blob)),
        row(f"grow 32, {side}", 0.5, lambda c: c.grow(blob, 32)),
        row(f"grow 16, {side}", 0.5, lambda c: c.grow(blob, 16)),
        row(f"shrink 16, {bench.side(1024)}", 0.5, lambda c: c.shrink(quarter, 16)),
        row(f"pad {bench.side(2048)}, feather 40, right", 0.3, lambda c: c.pad(canvas, Sides(right=pad), 40)),
        row(
            f"pad {bench.side(2048)}, feather {feather}, four sides",
            0.3,
            lambda c: c.pad(canvas, Sides(pad, pad, pad, pad), feather),
        ),
        row(f"match colour, {bench.side(2048)}", 1.0, lambda c: c.match_color(tinted, canvas, hole)),
        row(f"join a patch, {bench.side(2048)}", 2.0, lambda c: c.join(canvas, tinted, hole, feather=16)),
    ]


def _strokes(side: int) -> Tensor:
    """Thirty strokes across the whole picture."""
    mask = torch.zeros(1, side, side)
    places = noise(30, 2) * 0.8
    for y, x in (places * side).int().tolist():
        mask[:, y : y + side // 200, x : x + side // 8] = 1
    return mask


# --- colour


def t9(bench: Bench) -> list[Row]:
    """A loss of contrast and a tint, undone by what 100, 50 and 10 % of the picture show."""
    reference = noise(1, 256, 256, 3) * 0.5 + 0.25
    tint = torch.tensor([0.06, 0.0, -0.06])
    damaged = {"contrast 0.8": ((reference - 0.5) * 0.8 + 0.5, 0.7), "tint": (reference + tint, 2.2)}
    rows = []
    for kind, (target, limit) in damaged.items():
        for share in (0, 50, 90):
            excluded = box_mask(256, 256, slice(0, 256 * share // 100), slice(None))
            kept = excluded == 0

            def error(
                c: Contestant, target: Tensor = target, excluded: Tensor = excluded, kept: Tensor = kept
            ) -> Value:
                matched = c.match_color(target, reference, excluded)
                return float((matched - reference).abs()[kept].mean()) * 255

            rows.append(Row("T9", f"{kind}, {share} % excluded, /255", bench.collect(error), within=limit))
    target = damaged["tint"][0]
    excluded = box_mask(256, 256, slice(0, 128), slice(None))
    wild = torch.where(excluded[..., None] > 0, noise(1, 256, 256, 3, seed=9), target)

    def leak(c: Contestant) -> Value:
        calm, moved = (c.match_color(t, reference, excluded) for t in (target, wild))
        return largest_difference(calm, moved, excluded == 0)

    rows.append(Row("T9", "moved by excluded content", bench.collect(leak)))
    return rows


def t10(bench: Bench) -> list[Row]:
    """513 x 613 pixels through a VAE of 8-pixel cells."""
    image, mask = noise(1, 613, 513, 3), box_mask(613, 513, slice(200, 400), slice(150, 350))
    results = Results(bench, lambda c: c.through_vae(image, mask, whole_cells))

    def outside(result: Tensor) -> Value:
        return largest_difference(result, image, mask == 0) if result.shape == image.shape else "other size"

    return [
        Row("T10", "size of the result", results.of(lambda r: f"{r.shape[2]}x{r.shape[1]}"), ideal="513x613"),
        Row("T10", "largest change outside", results.of(outside)),
    ]


def whole_cells(crop: Tensor) -> Tensor:
    """A perfect VAE: everything comes back, in whole cells of 8 pixels."""
    return crop[:, : crop.shape[1] // 8 * 8, : crop.shape[2] // 8 * 8]


def t11(bench: Bench) -> list[Row]:
    """A smooth picture, untouched, cropped to squares of three sizes."""
    side = bench.side(1024)
    turn = torch.linspace(0, 6 * math.pi, side)
    wave = 0.5 + 0.4 * torch.cos(turn)[:, None] * torch.sin(turn)[None, :]
    image, mask = wave[None, ..., None].repeat(1, 1, 1, 3), t1_mask(side)
    rows = []
    for target in (256, 512, 1024):
        results = Results(
            bench,
            lambda c, target=target: c.round_trip(image, mask, untouched, feather=BLEND, target=bench.side(target)),
        )
        everywhere = torch.ones_like(mask)
        worst = results.of(lambda r, w=everywhere: largest_difference(r, image, w) * 255)
        rows.append(Row("T11", f"to {target}: largest change, /255", worst, within=1e-3))
        rows.append(
            Row(
                "T11",
                f"to {target}: bias inside, /255",
                results.of(lambda r: mean_difference(r, image, mask)),
                within=0.05,
            )
        )
    return rows


# --- seams


def t12(bench: Bench) -> list[Row]:
    """A patch of the photo itself, off in tone: is it steeper across the mask's contour than beside it?

    As photos are not 1 themselves, it is the result's ratio over the untouched photo's; the worst of all scenes.
    """
    if not bench.photos:
        return [Row("T12", "seams on photos", {}, note="no photos: scikit-image has them")]
    # one picture after the other through both paths would take a quarter of an hour
    bench = bench.only(lambda c: "GPU" not in c.name)
    scenes = [(photo, mask, SeamGauge(mask[0])) for photo in bench.photos.values() for mask in seam_masks(photo)]
    rows = []
    for kind in PATCHES:
        for everywhere in (True, False):
            for feather in (0, BLEND):
                patches = [patched(photo, mask, kind, feather, everywhere=everywhere) for photo, mask, _ in scenes]

                def worst(c: Contestant, patches: list[Tensor] = patches, feather: int = feather) -> Value:
                    seams = []
                    for (photo, mask, gauge), painted in zip(scenes, patches, strict=True):
                        joined = c.join(photo, painted, mask, feather=feather)
                        seams.append(gauge.ratio(joined[0]) / gauge.ratio(photo[0]))
                    return max(seams, key=lambda seam: abs(seam - 1))

                place = "everywhere" if everywhere else "in the mask"
                what = f"{kind} {place}, {'soft' if feather else 'hard'} mask"
                rows.append(Row("T12", what, bench.collect(worst), ideal=1.0, within=0.1))
    return rows


def _constant(*levels: float) -> Callable[[int, int, int], Tensor]:
    return lambda width, left, right: (torch.tensor(levels) * LEVEL).expand(1, 1, width, 3)


def _ramp(width: int, left: int, right: int) -> Tensor:
    """6 levels at the mask's left end, -6 at its right one."""
    place = ((torch.arange(width) - left) / max(right - 1 - left, 1)).clamp(0, 1)
    return ((6 - 12 * place) * LEVEL)[None, None, :, None].expand(1, 1, width, 3)


PATCHES: dict[str, Callable[[int, int, int], Tensor]] = {
    "offset +6": _constant(6, 6, 6),
    "tint +6/0/-6": _constant(6, 0, -6),
    "tilt +6..-6": _ramp,
}
"""What is added to the photo, from its width and the mask's left and right end: [1, 1, W, 3]."""


def patched(photo: Tensor, mask: Tensor, kind: str, feather: int, *, everywhere: bool) -> Tensor:
    """The photo as a model would give it back: off in tone as a whole, or only where it was free to paint."""
    columns = torch.nonzero(mask[0].amax(0))
    offset = PATCHES[kind](photo.shape[2], int(columns[0]), int(columns[-1]) + 1)
    if not everywhere:
        offset = offset * _square_growth(mask, feather)[..., None]
    return (photo + offset).clamp(0, 1)


def _square_growth(mask: Tensor, pixels: int) -> Tensor:
    """The mask grown by a square, one axis after the other."""
    across = F.max_pool2d(mask, (1, 2 * pixels + 1), stride=1, padding=(0, pixels))
    return F.max_pool2d(across, (2 * pixels + 1, 1), stride=1, padding=(pixels, 0))


def seam_masks(photo: Tensor) -> list[Tensor]:
    """A box, a disk, a box in the corner and a slanted stroke of 24 pixels."""
    _, height, width, _ = photo.shape
    box = box_mask(height, width, slice(height // 3, height * 2 // 3), slice(width // 3, width * 2 // 3))
    border = box_mask(height, width, slice(0, height // 2), slice(0, width // 3))
    rows, columns = torch.arange(height)[:, None], torch.arange(width)[None, :]
    disk = ((rows - height // 2) ** 2 + (columns - width // 2) ** 2 < (min(height, width) // 4) ** 2).float()[None]
    stroke = ((rows - height // 3 - columns // 4).abs() < 12) & (columns > width // 8) & (columns < width * 3 // 4)
    return [box, disk, border, stroke.float()[None]]


# --- whatever comes


def t13(bench: Bench) -> list[Row]:
    """Shapes that real workflows have: "ok", or the error that came."""
    side = 128
    image, mask = noise(1, side, side, 3), box_mask(side, side, slice(40, 80), slice(30, 70))
    two = image.repeat(2, 1, 1, 1)
    rgba = noise(1, side, side, 4)

    def trip(image: Tensor, mask: Tensor, edit: Edit = untouched, expected: int = 1) -> Callable[[Contestant], Value]:
        def run(c: Contestant) -> Value:
            result = c.round_trip(image, mask, edit, feather=8, target=64)
            fits = result.shape[:3] == (expected, *image.shape[1:3])
            return "ok" if fits else "x".join(map(str, result.shape))

        return run

    cases = {
        "mask of [H, W]": trip(image, mask[0]),
        "mask of [B, 1, H, W]": trip(image, mask[:, None]),
        "empty mask": trip(image, mask * 0),
        "full mask": trip(image, torch.ones_like(mask)),
        "RGBA picture, RGB crop": trip(rgba, mask, lambda crop: crop[..., :3]),
        "one picture, two masks": trip(image, mask.repeat(2, 1, 1), expected=2),
        "two pictures, one mask": trip(two, mask, expected=2),
        "127 x 93 pixels": trip(image[:, :93, :127], mask[:, :93, :127]),
    }
    rows = [Row("T13", f"crop and stitch: {what}", bench.collect(run), ideal="ok") for what, run in cases.items()]

    def faint(c: Contestant) -> Value:
        filled = c.fill(torch.ones(1, 64, 64, 3), torch.full((1, 64, 64), 0.98))
        return "ok" if float((filled - 1).abs().max()) > 0.1 else "not filled"

    def boxed(c: Contestant) -> Value:
        c.bounding_box(torch.zeros(1, 64, 64))
        return "ok"

    rows.append(Row("T13", "fill: mask of .98", bench.collect(faint), ideal="ok"))
    rows.append(Row("T13", "bounding box of an empty mask", bench.collect(boxed), ideal="ok"))
    return rows


def t14(bench: Bench) -> list[Row]:
    """A picture too low for twice the feather."""
    image = noise(1, 64, 512, 3)

    def feathered(c: Contestant) -> Value:
        mask = c.pad(image, Sides(right=128), 40)[1]
        return int((mask[0, 32, :512] > 0).sum())

    return [Row("T14", "64 x 512, feather 40: soft columns", bench.collect(feathered), ideal=40)]


def t15(bench: Bench) -> list[Row]:
    """A lossy codec in place of a VAE: JPEG at quality 60, in whole cells, and 2/255 lighter."""
    image = next(iter(bench.photos.values()), textured(512))[:, :512, :512]
    height, width = image.shape[1:3]
    mask = box_mask(height, width, slice(height // 3, height // 2), slice(width // 3, width // 2))
    results = Results(bench, lambda c: c.through_vae(image, mask, lossy))

    beyond = 1 - _square_growth(mask, BLEND)

    def outside(result: Tensor) -> Value:
        return largest_difference(result, image[:, : result.shape[1], : result.shape[2]], beyond)

    note = "no model's VAE: JPEG stands in for it"
    return [Row("T15", f"largest change beyond {BLEND} px of the mask", results.of(outside), note=note)]


def lossy(crop: Tensor) -> Tensor:
    pixels = (whole_cells(crop)[0, ..., :3].clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=60)
    decoded = np.asarray(Image.open(buffer), dtype=np.float32) / 255
    return (torch.from_numpy(decoded)[None] + 2 * LEVEL).clamp(0, 1)


def t16(bench: Bench) -> list[Row]:
    """The same mask by the contestant's other path: another device, or SciPy for OpenCV."""
    dot = torch.zeros(1, 101, 101)
    dot[0, 50, 50] = 1
    border = box_mask(200, 200, slice(None), slice(0, 60))
    tasks: dict[str, Callable[[Contestant], Tensor]] = {
        "grow 8": lambda c: c.grow(dot, 8),
        "default preparation": lambda c: c.prepare(border),
        "sampler's mask": lambda c: c.crop_mask(border, BLEND),
    }

    def difference(task: Callable[[Contestant], Tensor]) -> Callable[[Contestant], Value]:
        return lambda c: float((task(c) - task(c.other_path())).abs().max())

    return [Row("T16", f"{what}: largest difference", bench.collect(difference(task))) for what, task in tasks.items()]


CASES: dict[str, Callable[[Bench], list[Row]]] = {
    function.__name__.upper(): function
    for function in (t1, t2, t3, t4, t5, t6, t7, t8, t9, t10, t11, t12, t13, t14, t15, t16)
}
