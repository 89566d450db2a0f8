"""What a mask holds, in numbers and as a picture, and which of its strokes a latent grid would lose.

Samplers work on a grid of latent cells and commonly bring the mask down to it with a filter that looks at the middle
(bilinear, not antialiased) or at the first pixel (nearest) of each cell. A stroke that runs between those pixels is
gone: nothing is repainted there. ``masks.snap_to_grid`` keeps every stroke.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from . import images, morphology
from .masks import MAX_DOWNSCALE, OnImage, bounding_box, whole_cells
from .morphology import BoolArray, FloatArray, Shape
from .types import Box, InputError, Size, check_range

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

PREVIEW_SIDE = 1024
"""Longest side of a preview; larger pictures are reduced."""
MIN_PREVIEW_SIDE = 512
"""Smaller pictures are enlarged to about this, by whole pixels."""

TINT = (255, 40, 90)
OUTLINE = (255, 255, 255)
SHADE = (0, 0, 0)
BOX = (0, 220, 255)
LOST = (255, 214, 0)
PAPER = (24, 25, 28)
INK = (235, 236, 240)


class Lost(NamedTuple):
    """What a mask loses on its way to the latent grid."""

    islands: int
    """Islands of which nothing is left."""
    cells: int
    """Cells that the mask touches, which come out empty together with all their neighbours: a cell lost beside one
    that survives only trims the mask's rim."""

    def __str__(self) -> str:
        cells = _count(self.cells, "cell")
        return f"{_count(self.islands, 'island')} ({cells})" if self.islands else cells


@dataclass(frozen=True)
class MaskReport:
    """The numbers of one mask."""

    size: Size
    coverage: float
    """Share of the picture's pixels above 0."""
    box: Box | None
    """Of the pixels above 0; None for an empty mask."""
    minimum: float
    maximum: float
    grey: float
    """Share of the pixels above 0 that are below 1."""
    islands: int
    """Parts above 0 that hang together, also by a corner."""
    largest: int
    """Pixels of the largest island."""
    downscale: int
    """Side of a latent cell in pixels."""
    cells: int
    """Latent cells that the mask touches."""
    cells_in_all: int
    lost_bilinear: Lost
    """By bilinear resampling that is not antialiased, as ComfyUI's samplers bring a noise mask to the grid."""
    lost_nearest: Lost
    """By taking the first pixel of each cell, as diffusers' pipelines do."""

    def as_dict(self) -> dict[str, Any]:
        """The same, ready for JSON: size as [width, height], box as [left, top, right, bottom] or null."""
        return {
            "size": list(self.size),
            "coverage": round(self.coverage, 6),
            "box": None if self.box is None else list(self.box),
            "minimum": round(self.minimum, 4),
            "maximum": round(self.maximum, 4),
            "grey": round(self.grey, 4),
            "islands": self.islands,
            "largest_island": self.largest,
            "downscale": self.downscale,
            "cells": self.cells,
            "cells_in_all": self.cells_in_all,
            "lost_bilinear": self.lost_bilinear._asdict(),
            "lost_nearest": self.lost_nearest._asdict(),
        }

    def lines(self) -> list[str]:
        """The same for a person: what it covers, what it consists of, and what would be lost."""
        if self.box is None:
            return [f"{self.size}, the mask is empty: nothing will be repainted."]
        values = f"values {self.minimum:g} to {self.maximum:.3g}"
        solid = "none grey" if self.grey == 0 else f"{_percent(self.grey)} of it grey"
        return [
            f"{self.size}, {_percent(self.coverage)} masked, box {self.box.size} at {self.box.left},{self.box.top}",
            f"{_count(self.islands, 'island')}, the largest {_count(self.largest, 'pixel')}; {values}, {solid}",
            f"{self.cells} of {_count(self.cells_in_all, 'latent cell')} of {self.downscale} pixels; {self._losses()}",
        ]

    def __str__(self) -> str:
        return "\n".join(self.lines())

    @property
    def loses(self) -> bool:
        """Whether a sampler that brings the mask to the grid by itself may lose a stroke."""
        return any((*self.lost_bilinear, *self.lost_nearest))

    def _losses(self) -> str:
        if not self.loses:
            return "plain resampling would lose none"
        by_filter = (("bilinear", self.lost_bilinear), ("nearest", self.lost_nearest))
        losses = [f"{name} resampling would lose {lost}" for name, lost in by_filter if any(lost)]
        return ", ".join(losses)


def mask_report(mask: Tensor, downscale: int = 8) -> MaskReport:
    """The numbers of one mask [H, W] or [1, H, W] in 0..1; ``downscale`` is the side of a latent cell, 1..64."""
    check_range("downscale", downscale, 1, MAX_DOWNSCALE)
    if mask.ndim == 3 and len(mask) > 1:
        raise InputError(f"There are {len(mask)} masks; ask for the report of one at a time.")
    mask = images.as_mask_batch(mask)[0]
    height, width = mask.shape
    columns, rows = -(-width // downscale), -(-height // downscale)
    box = bounding_box(mask)
    if box is None:
        none = Lost(0, 0)
        return MaskReport(Size(width, height), 0, None, 0, 0, 0, 0, 0, downscale, 0, columns * rows, none, none)
    part = whole_cells(box, downscale, height, width)
    array = mask[part.rows, part.columns].detach().cpu().contiguous().numpy()
    labels, islands = morphology.islands(array)
    cells = _cells(labels, downscale)
    touched = _any_in_cell(cells)
    masked = int(np.count_nonzero(labels))
    return MaskReport(
        size=Size(width, height),
        coverage=masked / (width * height),
        box=box,
        minimum=float(mask.min()),
        maximum=float(mask.max()),
        grey=1 - int(np.count_nonzero(array == 1)) / masked,
        islands=islands,
        largest=int(np.bincount(labels.ravel())[1:].max()),
        downscale=downscale,
        cells=int(np.count_nonzero(touched)),
        cells_in_all=columns * rows,
        lost_bilinear=_lost(touched, _middles(cells), islands),
        lost_nearest=_lost(touched, _firsts(cells), islands),
    )


def preview(
    image: Tensor | None, mask: Tensor, reports: Sequence[MaskReport], on_image: OnImage | None = None
) -> Tensor:
    """Pictures [B, h, w, 3] that show masks [B or 1, H, W] on ``image`` [B or 1, H, W, C], or on grey without one.

    Each has the mask as a tint as strong as its value, an outline around all that is above 0, the bounding box, the
    cells that bilinear resampling would lose, and the numbers of its report underneath. The longest side is brought to
    512..1024 pixels. ``reports`` has one for each mask; an image of another size is brought to theirs. Raises
    InputError for an image that does not fit the masks.
    """
    masks = images.as_mask_batch(mask)
    if image is None:
        image = torch.full((len(masks), *masks.shape[1:], 3), 0.5)
    pictures, _ = images.pair(image, masks)
    # the reports count the masks' own pixels
    pictures = images.resize(pictures, images.size_of(masks))
    if len(masks) == 1:
        masks, reports = masks.expand(len(pictures), -1, -1), list(reports) * len(pictures)
    drawn = []
    for index, (picture, one, report) in enumerate(zip(pictures, masks, reports, strict=True)):
        drawn.append(_draw(picture[..., :3].detach().cpu(), one.detach().cpu(), report))
        if on_image is not None:
            on_image(index + 1, len(masks))
    return _batch(drawn)


def _cells(array: npt.NDArray, downscale: int) -> npt.NDArray:
    """[H, W] from the corner of a cell -> [rows, downscale, columns, downscale]; 0 beyond the picture."""
    height, width = array.shape
    padded = np.pad(array, ((0, -height % downscale), (0, -width % downscale)))
    return padded.reshape(padded.shape[0] // downscale, downscale, padded.shape[1] // downscale, downscale)


def _middles(cells: npt.NDArray) -> npt.NDArray:
    """The pixels whose mean a bilinear filter takes: the middle one of each cell, or the middle four."""
    side = cells.shape[1]
    middle = slice((side - 1) // 2, side // 2 + 1)
    return cells[:, middle, :, middle]


def _firsts(cells: npt.NDArray) -> npt.NDArray:
    return cells[:, :1, :, :1]


def _any_in_cell(cells: npt.NDArray) -> BoolArray:
    marked: BoolArray = (cells.max(axis=1) > 0).any(axis=2)
    return marked


def _lost_cells(touched: BoolArray, sampled: npt.NDArray) -> BoolArray:
    survived = _any_in_cell(sampled).astype(np.float32)
    lost: BoolArray = touched & (morphology.grow(survived, 1, Shape.SQUARE) == 0)
    return lost


def _lost(touched: BoolArray, sampled: npt.NDArray, islands: int) -> Lost:
    found = np.bincount(sampled.ravel(), minlength=islands + 1)[1:]
    return Lost(int(np.count_nonzero(found == 0)), int(np.count_nonzero(_lost_cells(touched, sampled))))


# --- drawing


def _draw(picture: Tensor, mask: Tensor, report: MaskReport) -> Image.Image:
    """One preview of a picture [H, W, 3] and its mask [H, W]."""
    size = _preview_size(report.size)
    shown, alpha = _resample(picture, size).numpy(), _resample(mask[..., None], size)[..., 0].numpy()
    tinted = shown + (np.array(TINT, np.float32) / 255 - shown) * (0.55 * alpha[..., None])
    sheet = Image.fromarray(np.rint(np.clip(tinted, 0, 1) * 255).astype(np.uint8))
    _draw_outline(sheet, alpha)
    pen = ImageDraw.Draw(sheet)
    scale = size.width / report.size.width
    if report.box is not None:
        _frame(pen, report.box, scale, BOX, 1)
        for cell in _lost_boxes(mask.numpy(), report.box, report.downscale):
            _frame(pen, cell, scale, LOST, 2)
    return _with_lines(sheet, report)


def _frame(pen: ImageDraw.ImageDraw, box: Box, scale: float, colour: tuple[int, int, int], width: int) -> None:
    left, top, right, bottom = (edge * scale for edge in box)
    pen.rectangle((left, top, max(right - 1, left), max(bottom - 1, top)), outline=colour, width=width)


def _preview_size(size: Size) -> Size:
    longest = max(size)
    if longest > PREVIEW_SIDE:
        scale = PREVIEW_SIDE / longest
        return Size(max(round(size.width * scale), 1), max(round(size.height * scale), 1))
    times = max(MIN_PREVIEW_SIDE // longest, 1)
    return Size(size.width * times, size.height * times)


def _resample(plane: Tensor, size: Size) -> Tensor:
    """[H, W, C] reduced by means that leave no pixel out, or each pixel enlarged to a block."""
    times = size.width // plane.shape[1]
    if times > 1:
        return plane.repeat_interleave(times, dim=0).repeat_interleave(times, dim=1)
    return F.adaptive_avg_pool2d(plane.permute(2, 0, 1), (size.height, size.width)).permute(1, 2, 0)


def _draw_outline(sheet: Image.Image, alpha: FloatArray) -> None:
    """A light line just inside what is masked at all, and a dark one just outside, so that it shows on any picture."""
    masked = (alpha > 0).astype(np.float32)
    pixels = np.asarray(sheet).copy()
    pixels[morphology.grow(masked, 1) != masked] = SHADE
    pixels[morphology.grow(masked, -1) != masked] = OUTLINE
    sheet.paste(Image.fromarray(pixels))


def _lost_boxes(mask: FloatArray, box: Box, side: int) -> list[Box]:
    """The cells of ``side`` pixels within ``box`` that bilinear resampling loses, in pixels of the picture."""
    part = whole_cells(box, side, *mask.shape)
    cells = _cells(mask[part.rows, part.columns], side)
    rows, columns = np.nonzero(_lost_cells(_any_in_cell(cells), _middles(cells)))
    return [
        Box(left, top, left + side, top + side)
        for left, top in zip((part.left + columns * side).tolist(), (part.top + rows * side).tolist(), strict=True)
    ]


def _with_lines(sheet: Image.Image, report: MaskReport) -> Image.Image:
    """The sheet with the report's lines under it, broken to its width."""
    font = ImageFont.load_default(max(12, round(max(sheet.size) / 56)))
    margin = 8
    lines = [
        (part, LOST if report.loses and "lose" in line else INK)
        for line in report.lines()
        for part in _wrap(line, font, sheet.width - 2 * margin)
    ]
    step = round(font.getbbox("Ag")[3] * 1.35)
    full = Image.new("RGB", (sheet.width, sheet.height + 2 * margin + step * len(lines)), PAPER)
    full.paste(sheet)
    pen = ImageDraw.Draw(full)
    for index, (text, colour) in enumerate(lines):
        pen.text((margin, sheet.height + margin + step * index), text, colour, font)
    return full


def _wrap(line: str, font: Font, width: int) -> list[str]:
    """The line in parts that fit ``width`` pixels; a single word may stick out."""
    parts = [""]
    for word in line.split():
        longer = f"{parts[-1]} {word}".strip()
        if parts[-1] and font.getlength(longer) > width:
            parts.append(word)
        else:
            parts[-1] = longer
    return parts


def _batch(pictures: list[Image.Image]) -> Tensor:
    """One batch [B, h, w, 3]; the shorter ones get more of the paper."""
    height = max(picture.height for picture in pictures)
    batch = torch.empty(len(pictures), height, pictures[0].width, 3)
    for target, picture in zip(batch, pictures, strict=True):
        sheet = Image.new("RGB", (picture.width, height), PAPER)
        sheet.paste(picture)
        target.copy_(torch.from_numpy(np.asarray(sheet, np.float32) / np.float32(255)))
    return batch


def _percent(share: float) -> str:
    return f"{share:.1%}" if share >= 0.001 else f"{share:.2g}"


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}{'' if number == 1 else 's'}"
