"""Where two pictures differ, made visible.

Differences outside the mask glow on a darkened picture, differences inside are blue: the first should not be there, the
second are the edit. The scale is logarithmic and the same for every picture, so that a fraction of a level of 255 can
be seen and heat-maps can be compared.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .compare import Change, Comparison, ImageComparison, Offset, Triple, align, levels

FloatArray = npt.NDArray[np.float32]
Region = npt.NDArray[np.bool_]
Ramp = tuple[tuple[float, tuple[float, float, float]], ...]
"""(place on the scale from 0 to 1, sRGB), straight lines between."""

SHORTEST, LONGEST = 512, 1536
"""The longer side of what is drawn: smaller pictures are enlarged by whole factors; in larger ones each pixel shows the
largest difference among those it stands for."""
FAINTEST, BRIGHTEST = 0.25 / 255, 64 / 255
"""The ends of the scale."""
TICKS = (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64)
"""Levels of 255 that the legend names."""
OUTSIDE: Ramp = ((0.0, (0.40, 0.05, 0.50)), (0.4, (0.90, 0.15, 0.25)), (0.7, (1.0, 0.6, 0.05)), (1.0, (1.0, 1.0, 0.8)))
INSIDE: Ramp = ((0.0, (0.05, 0.12, 0.35)), (1.0, (0.6, 0.85, 1.0)))
CONTOUR = (0.2, 1.0, 0.8)
BACKGROUND = (0.08, 0.08, 0.08)
INK = (235, 235, 235)
DIMMED = 0.35
"""Brightness of the picture underneath."""
LETTERS, MARGIN, BAR = 15, 8, 12
"""Pixels: the height of letters, the space around things, the thickness of the scale."""
LEGEND = 6 * MARGIN + 4 * LETTERS + 2 * BAR
LEGEND_WIDTH, SCALE_WIDTH = 480, 384
"""A picture narrower than the legend gets dark sides."""


def heatmaps(
    before: Tensor, after: Tensor, mask: Tensor, comparison: Comparison, *, offset: Offset | None = None
) -> Tensor:
    """Pictures of what ``comparison = compare(before, after, mask, offset=offset)`` measured: [B, h, w, 3] in 0..1.

    Outside the mask differences go from purple over red and orange to white, inside from dark to light blue; the
    mask's edge is green, the rest shows ``after`` in dark grey. A legend below names the scale and the figures.
    """
    triples = align(before, after, mask, offset)
    drawn = [_draw(triple, image) for triple, image in zip(triples, comparison.images, strict=True)]
    return torch.from_numpy(np.stack(drawn))


def _draw(triple: Triple, figures: ImageComparison) -> FloatArray:
    before, after, mask = triple
    channels = min(before.shape[-1], after.shape[-1])
    difference = (after[..., :channels] - before[..., :channels]).abs().amax(dim=-1).numpy()
    inside = mask > 0
    factor = -(-max(figures.size) // LONGEST)
    grey = _blocks(after[..., :3].mean(dim=-1).numpy(), factor).mean(axis=(1, 3))
    outer = _neighbourhood_max(_blocks(np.where(inside, 0, difference), factor).max(axis=(1, 3)))
    inner = _blocks(np.where(inside, difference, 0), factor).max(axis=(1, 3))
    area = _blocks(inside, factor).max(axis=(1, 3))
    picture = np.repeat(DIMMED * grey[..., None], 3, axis=-1)
    # where a pixel stands for both, what should not be there is shown
    for changed, ramp in (((inner > 0) & area, INSIDE), ((outer > 0) & ~area, OUTSIDE)):
        picture[changed] = _color(np.where(area, inner, outer)[changed], ramp)
    enlarged = -(-SHORTEST // max(picture.shape[:2]))
    picture, area = (array.repeat(enlarged, axis=0).repeat(enlarged, axis=1) for array in (picture, area))
    picture[_edge(area)] = CONTOUR
    return _with_legend(picture.astype(np.float32), figures)


def _blocks(array: npt.NDArray, factor: int) -> npt.NDArray:
    """[H, W] -> [rows, factor, columns, factor]; the last ones repeat the picture's edge."""
    height, width = array.shape
    padded = np.pad(array, ((0, -height % factor), (0, -width % factor)), mode="edge")
    return padded.reshape(padded.shape[0] // factor, factor, padded.shape[1] // factor, factor)


def _neighbourhood_max(values: FloatArray) -> FloatArray:
    """A single changed pixel becomes a spot that can be found."""
    framed = np.pad(values, 1)
    rows = np.maximum(np.maximum(framed[:-2], framed[1:-1]), framed[2:])
    return np.maximum(np.maximum(rows[:, :-2], rows[:, 1:-1]), rows[:, 2:])


def _edge(area: Region) -> Region:
    """The pixels of the area that have a neighbour outside it."""
    framed = np.pad(area, 1, mode="edge")
    surrounded = framed[:-2, 1:-1] & framed[2:, 1:-1] & framed[1:-1, :-2] & framed[1:-1, 2:]
    return area & ~surrounded


def _color(difference: npt.NDArray, ramp: Ramp) -> FloatArray:
    """Differences above 0 [...] -> sRGB [..., 3]."""
    place = np.log2(np.maximum(difference, FAINTEST) / FAINTEST) / np.log2(BRIGHTEST / FAINTEST)
    stops = [stop for stop, _ in ramp]
    channels = [np.interp(place, stops, [color[channel] for _, color in ramp]) for channel in range(3)]
    return np.stack(channels, axis=-1).astype(np.float32)


# --- the legend


def _with_legend(picture: FloatArray, figures: ImageComparison) -> FloatArray:
    height, width = picture.shape[:2]
    canvas = np.full((height + LEGEND, max(width, LEGEND_WIDTH), 3), BACKGROUND, dtype=np.float32)
    left = (canvas.shape[1] - width) // 2
    canvas[:height, left : left + width] = picture
    scale = np.geomspace(FAINTEST, BRIGHTEST, SCALE_WIDTH)
    top = height + MARGIN
    for ramp in (OUTSIDE, INSIDE):
        canvas[top : top + BAR, MARGIN : MARGIN + SCALE_WIDTH] = _color(scale, ramp)
        top += BAR + MARGIN // 2
    sheet = Image.fromarray(np.rint(canvas[height:] * 255).astype(np.uint8))
    _write(ImageDraw.Draw(sheet), figures)
    canvas[height:] = np.asarray(sheet, dtype=np.float32) / 255
    return canvas


def _write(draw: ImageDraw.ImageDraw, figures: ImageComparison) -> None:
    font = ImageFont.load_default(LETTERS)
    end = MARGIN + SCALE_WIDTH
    for index, name in enumerate(("outside", "inside")):
        middle = MARGIN + BAR // 2 + index * (BAR + MARGIN // 2)
        draw.text((end + MARGIN, middle), name, fill=INK, font=font, anchor="lm")
    y = 2 * MARGIN + 2 * BAR
    for place, tick in zip(np.linspace(MARGIN, end - 1, len(TICKS)), TICKS, strict=True):
        anchor = "la" if tick == TICKS[0] else "ra" if tick == TICKS[-1] else "ma"
        draw.text((place, y), f"{tick:g}".removeprefix("0"), fill=INK, font=font, anchor=anchor)
    draw.text((end + MARGIN, y), "/ 255", fill=INK, font=font, anchor="la")
    for line in _lines(figures):
        y += LETTERS + MARGIN // 2 + 1
        draw.text((MARGIN, y), line, fill=INK, font=font, anchor="la")


def _lines(figures: ImageComparison) -> tuple[str, str, str]:
    """Short enough for LEGEND_WIDTH."""
    measures = [
        f"seam {figures.seam.ratio:.2f}" if figures.seam else "",
        f"ring delta E {figures.ring.step:.2f}" if figures.ring else "",
        f"shift {figures.shift.distance:.2f} px" if figures.shift else "",
        f"grain {figures.grain.ratio:.2f}" if figures.grain else "",
    ]
    return (
        f"outside: {_summary(figures.outside)}",
        f"inside: {_summary(figures.inside)}",
        "   ".join(filter(None, measures)),
    )


def _summary(change: Change | None) -> str:
    if change is None:
        return "no pixels"
    return f"max {levels(change.max)}, mean {levels(change.mean)}, {change.changed} px changed"
