"""Fills, stitches, seams, masks, outpaint pads and colour matches on CC0 photographs, to be looked at.

python benchmarks/pixel_sheet.py [--out DIR] [--only fills,stitches]
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from comfyui_mend.benchmarks.measures import SeamGauge
from comfyui_mend.benchmarks.pixel_cases import lossy, patched, seam_masks
from comfyui_mend.contact_sheet import FAINT, INK, LINE, MARGIN, PAPER
from comfyui_mend.engine.color import ApplyTo, ColorMatch, match_around
from comfyui_mend.engine.compare import compare
from comfyui_mend.engine.fill import FillMethod, fill
from comfyui_mend.engine.heatmap import heatmaps
from comfyui_mend.engine.images import to_bytes
from comfyui_mend.engine.mask_report import mask_report, preview
from comfyui_mend.engine.masks import FeatherSide, MaskOptions, feather, fill_holes, grow, prepare, prepare_masks
from comfyui_mend.engine.morphology import Shape
from comfyui_mend.engine.outpaint import Padding, pad
from comfyui_mend.engine.registration import Shift, apply_shift
from comfyui_mend.engine.stitch import Blend, StitchOptions, stitch
from comfyui_mend.engine.types import Box, MendError
from PIL import Image, ImageDraw, ImageFont
from skimage import data
from torch import Tensor

PAGE_WIDTH = 2100
PANEL_HEIGHT = 250
HEADING = 60
GAP = 14
LABEL = 24
MAGNIFIED = 96
"""Pixels of the picture that a magnified panel shows."""
ACCENT = torch.tensor([238, 82, 48]) / 255


@dataclass(frozen=True)
class Panel:
    """One picture with a line above it."""

    label: str
    picture: Tensor
    """[H, W, 3] in 0..1."""
    zoom: Box | None = None
    """Show this part, its pixels as squares."""


@dataclass(frozen=True)
class Section:
    """A row of panels under a title."""

    title: str
    panels: list[Panel] = field(default_factory=list)
    height: int = PANEL_HEIGHT
    """Of the panels."""


def photo(name: str) -> Tensor:
    """[1, H, W, 3]."""
    levels = getattr(data, name)().astype(np.float32) / 255
    pixels = torch.from_numpy(levels)
    return (pixels if pixels.ndim == 3 else pixels[..., None].expand(-1, -1, 3))[None].contiguous()


def methods() -> list[FillMethod]:
    """Those that need neither a model file nor a package that is not here."""
    picture, mask = torch.rand(1, 32, 32, 3), torch.zeros(1, 32, 32)
    mask[:, 12:20, 12:20] = 1
    able = []
    for method in FillMethod:
        with contextlib.suppress(MendError):
            fill(picture, mask, method)
            able.append(method)
    return able


def masked(picture: Tensor, mask: Tensor) -> Tensor:
    """The mask in colour over the greyed picture, [1, H, W, 3]."""
    grey = picture[..., :3].mean(-1, keepdim=True).expand(-1, -1, -1, 3) * 0.75
    return grey + (ACCENT - grey) * 0.85 * mask[..., None]


def grey(mask: Tensor) -> Tensor:
    return mask[..., None].expand(-1, -1, -1, 3)


def blob(picture: Tensor, *ellipses: tuple[float, float, float, float]) -> Tensor:
    """Ellipses as shares of the picture: centre x, centre y, half-width, half-height."""
    _, height, width, _ = picture.shape
    y, x = torch.arange(height)[:, None] / height, torch.arange(width)[None, :] / width
    inside = torch.zeros(height, width, dtype=torch.bool)
    for cx, cy, rx, ry in ellipses:
        inside |= ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1
    return inside.float()[None]


def rim(mask: Tensor) -> Box:
    """A square around a point of the mask's right edge."""
    _, height, width = mask.shape
    row = int(torch.nonzero(mask[0].amax(1) > 0.5).float().median())
    column = int(torch.nonzero(mask[0, row] > 0.5).max())
    left = min(max(column - MAGNIFIED // 2, 0), width - MAGNIFIED)
    top = min(max(row - MAGNIFIED // 2, 0), height - MAGNIFIED)
    return Box(left, top, left + MAGNIFIED, top + MAGNIFIED)


# --- the pages


def fills() -> Iterator[Section]:
    places = {
        "coffee": [(0.48, 0.5, 0.16, 0.2)],
        "cat": [(0.3, 0.4, 0.1, 0.14), (0.85, 0.85, 0.15, 0.2)],
        "brick": [(0.5, 0.5, 0.2, 0.15)],
        "gravel": [(0.5, 0.5, 0.25, 0.2), (0.0, 0.0, 0.2, 0.2)],
        "rocket": [(0.5, 0.45, 0.05, 0.42)],
    }
    for name, ellipses in places.items():
        picture = photo(name)
        mask = blob(picture, *ellipses)
        panels = [Panel("mask", masked(picture, mask)[0])]
        panels += [Panel(method.value, fill(picture, mask, method)[0]) for method in methods()]
        yield Section(f"Fill: {name}", panels)
    picture = photo("coffee")
    soft = feather(blob(picture, (0.48, 0.5, 0.16, 0.2)), 40)
    yield Section(
        "Fill under a soft mask: coffee",
        [Panel(method.value, fill(picture, soft, method)[0]) for method in methods()],
    )


def stitches() -> Iterator[Section]:
    for name, kind, soft, place in (
        ("coffee", "offset +6", 0, "in the mask"),
        ("coffee", "tilt +6..-6", 0, "everywhere"),
        ("cat", "tint +6/0/-6", 0, "in the mask"),
        ("rocket", "offset +6", 24, "everywhere"),
        ("brick", "tilt +6..-6", 24, "in the mask"),
    ):
        yield _stitched(name, kind, soft, place)
    yield _red_disk()


def _stitched(name: str, kind: str, soft: int, place: str) -> Section:
    picture = photo(name)
    user = seam_masks(picture)[1]
    mask = feather(user, soft)
    painted = patched(picture, user, kind, soft, everywhere=place == "everywhere")
    panels = []
    gauge, zoom = SeamGauge(user[0]), rim(user)
    plain = StitchOptions(blend=Blend.LINEAR, color_match=0)
    for label, options in {"pasted as it is": plain, **{b.value: StitchOptions(blend=b) for b in Blend}}.items():
        joined = stitch(picture, painted, mask, options).images
        ratio = gauge.ratio(joined[0]) / gauge.ratio(picture[0])
        shown = exaggerated(joined, picture)[0]
        panels.append(Panel(f"{label}: seam {ratio:.2f}", shown))
        panels.append(Panel("its edge", shown, zoom))
    edge = f"{soft} px soft" if soft else "hard"
    return Section(f"Stitch: {name}, {kind} {place}, {edge} mask; differences from the original x 8", panels)


def exaggerated(result: Tensor, original: Tensor, factor: float = 8) -> Tensor:
    """The original with its differences from the result made larger."""
    return (original + factor * (result - original)).clamp(0, 1)


def _red_disk() -> Section:
    picture = photo("coffee")
    user = blob(picture, (0.5, 0.5, 0.2, 0.3))
    disk = blob(picture, (0.5, 0.5, 0.12, 0.18))[..., None]
    painted = picture + 6 / 255
    painted = torch.where(disk > 0, torch.tensor([0.8, 0.1, 0.1]), painted).clamp(0, 1)
    panels = [Panel("painted", painted[0]), Panel("mask", masked(picture, user)[0])]
    for blend in Blend:
        joined = stitch(picture, painted, user, StitchOptions(blend=blend)).images
        moved = (joined - painted).abs()[disk[..., 0] > 0].max() * 255
        panels.append(Panel(f"{blend.value}: disk moved {moved:.1f}/255", joined[0]))
    return Section("Stitch: new content keeps its colour", panels)


def details() -> Iterator[Section]:
    """Grain and registration."""
    for name in ("gravel", "rocket"):
        picture = photo(name)
        noise = torch.randn(picture.shape[:3], generator=torch.Generator().manual_seed(0))[..., None] * 0.03
        grainy = (picture + noise).clamp(0, 1)
        user = seam_masks(picture)[1]
        smooth = F.avg_pool2d(picture.movedim(-1, 1), 5, 1, 2).movedim(1, -1)
        panels = [Panel("original", grainy[0], rim(user))]
        for strength in (0.0, 0.5, 1.0):
            joined = stitch(grainy, smooth, user, StitchOptions(grain=strength))
            panels.append(Panel(f"grain {strength:g}", joined.images[0], rim(user)))
        panels.append(Panel("grain 1, whole", joined.images[0]))
        yield Section(f"Grain: {name} with noise of .03, a smoothed patch", panels)
    for name in ("brick", "coffee"):
        picture = photo(name)
        user = seam_masks(picture)[0]
        moved = apply_shift(picture, Shift(3.4, -2.3, 1.0))
        panels = [Panel("original", picture[0], rim(user))]
        for register in (False, True):
            joined = stitch(picture, moved, user, StitchOptions(register=register))
            panels.append(Panel(f"register {'on' if register else 'off'}", joined.images[0], rim(user)))
            panels.append(Panel("difference x 8", (0.5 + 4 * (joined.images - picture)).clamp(0, 1)[0]))
        yield Section(f"Registration: {name}, moved by 3.4 right and 2.3 up", panels)


def mask_steps() -> Iterator[Section]:
    picture = photo("chelsea")
    mask = blob(picture, (0.35, 0.45, 0.12, 0.2), (0.97, 0.1, 0.1, 0.15))
    mask[:, 100:103, 200:400] = 1
    mask[:, 120:150, 130:160] = 0
    steps = {
        "painted": mask,
        "holes filled": fill_holes(mask),
        "grown 12": grow(mask, 12),
        "grown 12, square": grow(mask, 12, Shape.SQUARE),
        "shrunk 6": grow(mask, -6),
        "opened 4": prepare(mask, MaskOptions(open=4)),
        "closed 20": prepare(mask, MaskOptions(close=20)),
        "largest island": prepare(mask, MaskOptions(keep_largest=True)),
        **{f"feathered 24, {side.value}": feather(mask, 24, side) for side in FeatherSide},
    }
    yield Section("Masks: chelsea", [Panel(name, masked(picture, step)[0]) for name, step in steps.items()])
    prepared = prepare_masks(mask, MaskOptions(fill_holes=True, grow=8, feather=8))
    three = zip(("the user's", "the sampler's", "the stitch mask"), prepared, strict=True)
    panels = [panel for name, one in three for panel in _mask_panels(name, picture, one, rim(mask))]
    yield Section("Masks: the three that leave the preparation", panels)
    strokes = torch.zeros_like(mask)
    for index in range(12):
        strokes[:, 20 + 22 * index : 21 + 22 * index + index // 3, 30 + 9 * index : 300] = 1
    previews = [preview(picture, one, [mask_report(one)])[0] for one in (mask, feather(mask, 24), strokes)]
    panels = [Panel(name, one) for name, one in zip(("painted", "feathered", "thin strokes"), previews, strict=True)]
    yield Section("Masks: previews", panels, height=480)


def _mask_panels(name: str, picture: Tensor, mask: Tensor, zoom: Box) -> list[Panel]:
    return [Panel(name, masked(picture, mask)[0]), Panel("magnified", grey(mask)[0], zoom)]


def outpaints() -> Iterator[Section]:
    for name, sides, soft in (
        ("coffee", Padding(120, 60, 0, 0), 40),
        ("cat", Padding(100, 80, 100, 80), 0),
        ("rocket", Padding(0, 0, 160, 0), 80),
    ):
        picture = photo(name)
        edge = pad(picture, sides, soft)
        panels = [Panel("mask", masked(edge.image, edge.mask)[0])]
        panels += [Panel(method.value, pad(picture, sides, soft, method).image[0]) for method in methods()]
        yield Section(f"Outpaint: {name}, {tuple(vars(sides).values())}, feather {soft}", panels)


def colors() -> Iterator[Section]:
    for name, change in (
        ("coffee", lambda p: (p - 0.5) * 0.7 + 0.5 + torch.tensor([0.08, 0.0, -0.08])),
        ("rocket", lambda p: p**1.5),
        ("cat", lambda p: p * torch.tensor([0.8, 1.0, 1.15])),
    ):
        picture = photo(name)
        mask = seam_masks(picture)[0]
        damaged = torch.where(mask[..., None] > 0, torch.tensor([0.1, 0.9, 0.2]), change(picture)).clamp(0, 1)
        panels = [Panel("reference", picture[0]), Panel("came, green is excluded", damaged[0])]
        for method in ColorMatch:
            matched = match_around(damaged, picture, mask, method)
            error = (matched - picture).abs()[mask == 0].mean() * 255
            panels.append(Panel(f"{method.value}: off by {error:.1f}/255", matched[0]))
        inside = match_around(damaged, picture, mask, apply_to=ApplyTo.MASK)
        panels.append(Panel("mkl, mask only", inside[0]))
        yield Section(f"Colour match: {name}", panels)


def comparisons() -> Iterator[Section]:
    """A lossy round trip of the whole picture, kept as it came and pasted back."""
    for name in ("coffee", "chelsea", "brick"):
        whole = photo(name)
        picture = whole[:, : whole.shape[1] // 8 * 8, : whole.shape[2] // 8 * 8]
        mask = feather(seam_masks(picture)[1], 16)
        painted = lossy(picture)
        pasted = stitch(picture, painted, mask).images
        panels = []
        for label, after in (("whole picture through a codec", painted), ("pasted back", pasted)):
            comparison = compare(picture, after, mask)
            panels.append(Panel(label, heatmaps(picture, after, mask, comparison)[0]))
        yield Section(f"Compare: {name}", panels, height=560)


PAGES: dict[str, Callable[[], Iterator[Section]]] = {
    "fills": fills,
    "stitches": stitches,
    "details": details,
    "masks": mask_steps,
    "outpaint": outpaints,
    "colors": colors,
    "compare": comparisons,
}


# --- drawing


def draw(title: str, sections: Sequence[Section]) -> Image.Image:
    """One page, RGB; rows that are too long go on below."""
    rows = [row for section in sections for row in _rows(section)]
    heights = [(HEADING if row.heading else 0) + LABEL + row.height + GAP for row in rows]
    page = Image.new("RGB", (PAGE_WIDTH, 110 + sum(heights) + MARGIN), PAPER)
    pen = ImageDraw.Draw(page)
    pen.text((MARGIN, 34), title, INK, ImageFont.load_default(38))
    top = 110
    for row, height in zip(rows, heights, strict=True):
        bottom = top + height
        if row.heading:
            pen.line((MARGIN, top + 8, PAGE_WIDTH - MARGIN, top + 8), LINE, 1)
            pen.text((MARGIN, top + 14), row.heading, INK, ImageFont.load_default(24))
            top += HEADING
        left = MARGIN
        for label, picture in row.pictures:
            pen.text((left, top), _fitted(pen, label, picture.width), FAINT, ImageFont.load_default(16))
            page.paste(picture, (left, top + LABEL))
            left += picture.width + GAP
        top = bottom
    return page


@dataclass
class _Row:
    heading: str
    height: int
    pictures: list[tuple[str, Image.Image]] = field(default_factory=list)


def _rows(section: Section) -> list[_Row]:
    """The section's panels in rows that fit the page, the title with the first."""
    rows = [_Row(section.title, section.height)]
    used = 2 * MARGIN
    for panel in section.panels:
        picture = _render(panel, section.height)
        if used + picture.width > PAGE_WIDTH and rows[-1].pictures:
            rows.append(_Row("", section.height))
            used = 2 * MARGIN
        rows[-1].pictures.append((panel.label, picture))
        used += picture.width + GAP
    return rows


def _render(panel: Panel, height: int) -> Image.Image:
    if panel.zoom is None:
        picture = Image.fromarray(to_bytes(panel.picture))
        resample = Image.Resampling.LANCZOS
    else:
        picture = Image.fromarray(to_bytes(panel.picture[panel.zoom.rows, panel.zoom.columns]))
        resample = Image.Resampling.NEAREST
    return picture.resize((round(picture.width * height / picture.height), height), resample)


def _fitted(pen: ImageDraw.ImageDraw, text: str, width: int) -> str:
    font = ImageFont.load_default(16)
    while pen.textlength(text, font) > width:
        text = text[:-2] + "…"
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("sheet-output"), metavar="DIR")
    parser.add_argument("--only", default=",".join(PAGES), help=f"pages of {', '.join(PAGES)}")
    options = parser.parse_args(arguments)
    names = [name.strip() for name in options.only.split(",")]
    if unknown := [name for name in names if name not in PAGES]:
        parser.error(f"no page is called {', '.join(unknown)}; there are {', '.join(PAGES)}")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name in names:
        target = options.out / f"{name}.png"
        draw(f"Mend: {name}", list(PAGES[name]())).save(target)
        print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
