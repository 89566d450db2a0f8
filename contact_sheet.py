"""The demo's contact sheet: rows of before, mask and after, with a line of facts under each title."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageEnhance, ImageFont, ImageOps

from .engine.types import Box, Size

PANEL_WIDTH = 560
MARGIN = 56
GAP = 20
TITLE_HEIGHT = 84
ROW_GAP = 36

PAPER = (251, 250, 247)
INK = (28, 30, 34)
FAINT = (116, 118, 124)
LINE = (222, 220, 214)
ACCENT = (238, 82, 48)
COLUMNS = ("before", "mask", "after")


@dataclass(frozen=True)
class Row:
    """One scene: pictures of one size, except that ``before`` may fill only a part of it."""

    title: str
    facts: str
    before: Image.Image
    """RGB."""
    place: Box
    """Where ``before`` lies on the canvas of the result."""
    mask: Image.Image
    """L, at the size of ``after``; white was changed."""
    after: Image.Image
    """RGB."""

    @property
    def panel(self) -> Size:
        return Size(PANEL_WIDTH, round(self.after.height * PANEL_WIDTH / self.after.width))


def draw(title: str, subtitle: str, rows: Sequence[Row], footer: Sequence[str]) -> Image.Image:
    """The finished sheet, RGB."""
    header = 132
    foot = 40 + 30 * len(footer)
    heights = [TITLE_HEIGHT + row.panel.height + ROW_GAP for row in rows]
    width = 2 * MARGIN + 3 * PANEL_WIDTH + 2 * GAP
    sheet = Image.new("RGB", (width, header + sum(heights) + foot), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, 38), title, INK, _font(46))
    pen.text((MARGIN + pen.textlength(title, _font(46)) + 22, 58), subtitle, FAINT, _font(23))
    top = header
    for number, (row, height) in enumerate(zip(rows, heights, strict=True), start=1):
        _draw_row(sheet, top, number, row)
        top += height
    pen.line((MARGIN, top, width - MARGIN, top), LINE, 1)
    for index, line in enumerate(footer):
        pen.text((MARGIN, top + 24 + 30 * index), line, FAINT, _font(20))
    return sheet


def _draw_row(sheet: Image.Image, top: int, number: int, row: Row) -> None:
    pen = ImageDraw.Draw(sheet)
    pen.line((MARGIN, top - 8, sheet.width - MARGIN, top - 8), LINE, 1)
    heading = f"{number}  {row.title}"
    pen.text((MARGIN, top + 10), heading, INK, _font(30))
    pen.text((MARGIN + pen.textlength(heading, _font(30)) + 18, top + 19), row.facts, FAINT, _font(20))
    for column, (name, panel) in enumerate(zip(COLUMNS, _panels(row), strict=True)):
        left = MARGIN + column * (PANEL_WIDTH + GAP)
        pen.text((left, top + 54), name, FAINT, _font(18))
        sheet.paste(panel, (left, top + TITLE_HEIGHT))


def _panels(row: Row) -> tuple[Image.Image, Image.Image, Image.Image]:
    """Before on the result's canvas; the mask in colour over the greyed picture; after."""
    scale = PANEL_WIDTH / row.after.width
    canvas = Image.new("RGB", row.panel, (240, 238, 232))
    place = [round(edge * scale) for edge in row.place]
    before = row.before.resize((place[2] - place[0], place[3] - place[1]), Image.Resampling.LANCZOS)
    canvas.paste(before, (place[0], place[1]))
    grey = ImageOps.grayscale(canvas).convert("RGB")
    faded = ImageEnhance.Brightness(grey).enhance(0.75)
    strength = row.mask.resize(row.panel, Image.Resampling.LANCZOS).point([round(0.88 * v) for v in range(256)])
    masked = Image.composite(Image.new("RGB", row.panel, ACCENT), faded, strength)
    return canvas, masked, row.after.resize(row.panel, Image.Resampling.LANCZOS)


def _font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own, so that the sheet looks the same everywhere."""
    font = ImageFont.load_default(size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise RuntimeError("Pillow was built without FreeType")
    return font
