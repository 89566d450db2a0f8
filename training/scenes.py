"""Procedural training pictures: one coloured shape on a background, a mask, and a caption of what the hole holds.

Everything follows from (seed, index) alone, so a stopped run goes on with the pictures it would have seen, and
held-out pictures are those of another seed, with parts of the photos that training never shows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import TypeVar

import numpy as np
from numpy.random import Generator
from PIL import Image, ImageDraw

SIZE = 64
"""Pixels of a side: the native size of the model."""
SUPERSAMPLE = 4
"""Outlines are drawn this many times larger and averaged down."""

T = TypeVar("T")
Array = np.ndarray
Point = tuple[float, float]

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.10, 0.12),
    "orange": (0.97, 0.52, 0.06),
    "yellow": (0.96, 0.88, 0.15),
    "green": (0.13, 0.62, 0.22),
    "blue": (0.12, 0.30, 0.86),
    "purple": (0.53, 0.16, 0.66),
    "white": (0.97, 0.97, 0.97),
    "black": (0.04, 0.04, 0.04),
}
COLOR_JITTER = 0.03
"""Standard deviation of a shape's colour around that of its name."""
CONTRAST = 0.35
"""Least distance in RGB between a shape and the mean of what it lies on."""

# CC0 or released to the public domain; the grey ones are tinted
PHOTOS = ("coffee", "chelsea", "rocket", "hubble_deep_field", "camera")
TEXTURES = ("brick", "grass", "gravel")
HELD_OUT_WIDTH = 0.25
"""The right part of every photo, which only held-out pictures show."""


class Kind(str, Enum):
    """What a sample teaches."""

    PAINT = "paint"
    """The hole covers the whole shape and the caption names it."""
    RESTORE = "restore"
    """The hole covers any part of the picture and the caption names its shape."""
    REMOVE = "remove"
    """The hole covers background only and the caption is empty."""


SHARES: dict[Kind, float] = {Kind.PAINT: 0.5, Kind.RESTORE: 0.1, Kind.REMOVE: 0.4}


@dataclass(frozen=True, eq=False)
class Sample:
    """One training picture."""

    image: Array
    """float32 [SIZE, SIZE, 3], 0..1."""
    mask: Array
    """float32 [SIZE, SIZE], 1 = repaint, 0 = keep."""
    caption: str
    kind: Kind
    background: Array
    """The picture without its shape."""
    coverage: Array
    """float32 [SIZE, SIZE]: how much of each pixel the shape covers."""
    color: str
    shape: str


def sample(seed: int, index: int, *, kind: Kind | None = None, held_out: bool = False) -> Sample:
    """The picture number ``index`` of ``seed``; of a random kind when ``kind`` is None."""
    rng = np.random.default_rng((seed, index))
    drawn = pick(rng, SHARES)
    kind = kind or drawn
    color, shape = str(rng.choice(list(COLORS))), str(rng.choice(list(SHAPES)))
    rgb = np.clip(np.asarray(COLORS[color]) + rng.normal(0, COLOR_JITTER, 3), 0, 1)
    place = random_place(rng)
    coverage = rasterise([place.point(p) for p in SHAPES[shape]()])
    background = contrasting_background(rng, rgb, coverage, held_out)
    image = background * (1 - coverage[..., None]) + rgb * coverage[..., None]
    if kind is Kind.PAINT:
        mask = covering_mask(rng, coverage)
    elif kind is Kind.RESTORE:
        mask = random_mask(rng)
    else:
        mask = random_mask(rng)
        # a shape beside the hole stays half of the time, and must not be copied into it
        if rng.random() < 0.5 or (mask * coverage).any():
            image = background
    caption = "" if kind is Kind.REMOVE else describe(color, shape)
    return Sample(image.astype(np.float32), mask, caption, kind, background, coverage, color, shape)


def pick(rng: Generator, shares: Mapping[T, float]) -> T:
    """One of the keys, with the probabilities that are their values."""
    return list(shares)[rng.choice(len(shares), p=list(shares.values()))]


def describe(color: str, shape: str) -> str:
    """ "a red circle", "an orange star"."""
    return f"{'an' if color[0] in 'aeiou' else 'a'} {color} {shape}"


def captions() -> list[str]:
    """Every caption there is, the empty one first."""
    return ["", *(describe(color, shape) for color in COLORS for shape in SHAPES)]


# ---------------------------------------------------------------------------------------------------------- shapes


@dataclass(frozen=True)
class Place:
    """Where a shape of the unit circle lies, in pixels."""

    x: float
    y: float
    radius: float
    angle: float = 0.0

    def point(self, p: Point) -> Point:
        c, s = np.cos(self.angle), np.sin(self.angle)
        return self.x + self.radius * (c * p[0] - s * p[1]), self.y + self.radius * (s * p[0] + c * p[1])


def random_place(rng: Generator) -> Place:
    """Shapes of 18 to 46 pixels, wholly inside the picture, at most a little tilted."""
    radius = rng.uniform(9, 23)
    x, y = rng.uniform(radius + 1, SIZE - radius - 1, 2)
    return Place(float(x), float(y), float(radius), float(rng.normal(0, 0.08)))


def _ring(count: int, radii: Sequence[float] = (1.0,), start: float = -np.pi / 2) -> list[Point]:
    angles = start + 2 * np.pi * np.arange(count) / count
    return [(radii[i % len(radii)] * np.cos(a), radii[i % len(radii)] * np.sin(a)) for i, a in enumerate(angles)]


def _circle() -> list[Point]:
    return _ring(48)


def _square() -> list[Point]:
    return [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]


def _triangle() -> list[Point]:
    return [(0.0, -1.0), (1.0, 0.85), (-1.0, 0.85)]


def _star() -> list[Point]:
    return _ring(10, (1.05, 0.42))


def _cross() -> list[Point]:
    a, b = 1.0, 0.34
    return [(-b, -a), (b, -a), (b, -b), (a, -b), (a, b), (b, b), (b, a), (-b, a), (-b, b), (-a, b), (-a, -b), (-b, -b)]


def _heart() -> list[Point]:
    t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return [(float(a) / 16, (-float(b) - 2.5) / 15) for a, b in zip(x, y, strict=True)]


SHAPES: dict[str, Callable[[], list[Point]]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "heart": _heart,
}


def rasterise(outline: Sequence[Point]) -> Array:
    """How much of each pixel a polygon covers, float32 [SIZE, SIZE]."""
    canvas = Image.new("L", (SIZE * SUPERSAMPLE, SIZE * SUPERSAMPLE))
    ImageDraw.Draw(canvas).polygon([(x * SUPERSAMPLE, y * SUPERSAMPLE) for x, y in outline], fill=255)
    return np.asarray(canvas.reduce(SUPERSAMPLE), dtype=np.float32) / 255


# ----------------------------------------------------------------------------------------------------- backgrounds


def contrasting_background(rng: Generator, rgb: Array, coverage: Array, held_out: bool) -> Array:
    """A background [SIZE, SIZE, 3] that the shape can be told from."""
    under = coverage > 0.5
    for _ in range(8):
        background = random_background(rng, held_out)
        if np.linalg.norm(background[under].mean(axis=0) - rgb) > CONTRAST:
            break
    return background


def random_background(rng: Generator, held_out: bool = False) -> Array:
    """Plain, gradient, stripes, photo texture or photo."""
    return np.clip(pick(rng, BACKGROUNDS)(rng, held_out), 0, 1).astype(np.float32)


def _random_color(rng: Generator) -> Array:
    return rng.uniform(0.05, 0.95, 3)


def _ramp(rng: Generator) -> Array:
    """A linear ramp over the picture in a random direction, [SIZE, SIZE] within -0.5..0.5."""
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[0:SIZE, 0:SIZE] / (SIZE - 1) - 0.5
    return (np.cos(angle) * x + np.sin(angle) * y) / (abs(np.cos(angle)) + abs(np.sin(angle)))


def _plain(rng: Generator, _: bool) -> Array:
    return np.broadcast_to(_random_color(rng), (SIZE, SIZE, 3))


def _gradient(rng: Generator, _: bool) -> Array:
    weight = _ramp(rng)[..., None] + 0.5
    return _random_color(rng) * weight + _random_color(rng) * (1 - weight)


def _stripes(rng: Generator, _: bool) -> Array:
    period, phase = rng.uniform(8, 24), rng.uniform(0, 2 * np.pi)
    wave = np.sin(2 * np.pi * _ramp(rng) * SIZE / period + phase)
    weight = np.clip(0.5 + wave * period / 4, 0, 1)[..., None]  # edges about a pixel wide
    first = _random_color(rng)
    second = np.clip(first + rng.normal(0, 0.25, 3), 0, 1)
    return first * weight + second * (1 - weight)


def _texture(rng: Generator, held_out: bool) -> Array:
    grey = _crop(rng, str(rng.choice(TEXTURES)), held_out).mean(axis=2, keepdims=True)
    return _random_color(rng) + (grey - grey.mean()) * rng.uniform(0.2, 0.6, 3)


def _photo(rng: Generator, held_out: bool) -> Array:
    return _crop(rng, str(rng.choice(PHOTOS)), held_out)


BACKGROUNDS: dict[Callable[[Generator, bool], Array], float] = {
    _plain: 0.25,
    _gradient: 0.25,
    _stripes: 0.15,
    _texture: 0.15,
    _photo: 0.2,
}


@cache
def load_photo(name: str, held_out: bool) -> Image.Image:
    """The part of a photo in scikit-image that is trained on, or the part that is not."""
    import skimage.data

    pixels = getattr(skimage.data, name)()
    edge = round(pixels.shape[1] * (1 - HELD_OUT_WIDTH))
    part = pixels[:, edge:] if held_out else pixels[:, :edge]
    return Image.fromarray(np.ascontiguousarray(part)).convert("RGB")


def _crop(rng: Generator, name: str, held_out: bool) -> Array:
    """A random square of a photo, mirrored half of the time, brought to SIZE."""
    photo = load_photo(name, held_out)
    side = int(rng.integers(min(SIZE, *photo.size), min(photo.size) + 1))
    left, top = (int(rng.integers(0, extent - side + 1)) for extent in photo.size)
    box = (left, top, left + side, top + side)
    pixels = np.asarray(photo.resize((SIZE, SIZE), Image.Resampling.BOX, box), dtype=np.float64) / 255
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


# ----------------------------------------------------------------------------------------------------------- masks


def random_mask(rng: Generator) -> Array:
    """A box, an ellipse, thick or thin strokes, a side, or the whole picture: float32 [SIZE, SIZE], 1 = repaint."""
    return (pick(rng, MASKS)(rng) > 0.5).astype(np.float32)


def covering_mask(rng: Generator, coverage: Array) -> Array:
    """A mask that holds the whole shape: its box with a margin (the most common), an ellipse, a blob of strokes over
    it, or the whole picture."""
    rows, columns = np.nonzero(coverage.any(axis=1))[0], np.nonzero(coverage.any(axis=0))[0]
    sides = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], dtype=np.float64)
    center, half = (sides[:2] + sides[2:]) / 2, (sides[2:] - sides[:2]) / 2
    draw = rng.random()
    if draw < 0.1:
        return np.ones((SIZE, SIZE), np.float32)
    if draw < 0.7:
        margins = rng.uniform(1, 7, 4)
        box = _scaled(sides + margins * [-1, -1, 1, 1])
        mask = _fill(lambda d: d.rectangle(box, fill=255))
    else:
        # an ellipse through the corners of a box is sqrt(2) times as wide
        wide = half * rng.uniform(1.3, 1.6)
        mask = _fill(lambda d: d.ellipse(_scaled([*(center - wide), *(center + wide)]), fill=255))
        if draw > 0.85:
            mask = np.maximum(mask, _strokes(rng, 4, 10))
    return np.maximum(mask > 0.5, coverage > 0).astype(np.float32)


def _scaled(box: Sequence[float] | Array) -> list[float]:
    return [float(side) * SUPERSAMPLE for side in box]


def _fill(draw: Callable[[ImageDraw.ImageDraw], None]) -> Array:
    canvas = Image.new("L", (SIZE * SUPERSAMPLE, SIZE * SUPERSAMPLE))
    draw(ImageDraw.Draw(canvas))
    return np.asarray(canvas.reduce(SUPERSAMPLE), dtype=np.float32) / 255


def _random_box(rng: Generator) -> list[float]:
    width, height = rng.uniform(12, 48, 2)
    x, y = rng.uniform(-width / 4, SIZE - width * 3 / 4), rng.uniform(-height / 4, SIZE - height * 3 / 4)
    return _scaled([x, y, x + width, y + height])


def _box(rng: Generator) -> Array:
    return _fill(lambda d: d.rectangle(_random_box(rng), fill=255))


def _ellipse(rng: Generator) -> Array:
    return _fill(lambda d: d.ellipse(_random_box(rng), fill=255))


def _strokes(rng: Generator, thinnest: float, thickest: float) -> Array:
    """A few bent lines with round ends, of one width in pixels each."""

    def draw(d: ImageDraw.ImageDraw) -> None:
        for _ in range(int(rng.integers(1, 4))):
            width = rng.uniform(thinnest, thickest) * SUPERSAMPLE
            points = rng.uniform(0, SIZE * SUPERSAMPLE, (int(rng.integers(2, 5)), 2))
            d.line([tuple(p) for p in points], fill=255, width=round(width), joint="curve")
            for x, y in (points[0], points[-1]):
                d.ellipse([x - width / 2, y - width / 2, x + width / 2, y + width / 2], fill=255)

    return _fill(draw)


def _thick(rng: Generator) -> Array:
    return _strokes(rng, 8, 18)


def _thin(rng: Generator) -> Array:
    return _strokes(rng, 2, 6)


def _side(rng: Generator) -> Array:
    """A band along one side, as outpainting has it."""
    mask = np.zeros((SIZE, SIZE), np.float32)
    mask[: int(rng.integers(6, 40))] = 1
    return np.ascontiguousarray(np.rot90(mask, int(rng.integers(4))))


def _whole(_: Generator) -> Array:
    return np.ones((SIZE, SIZE), np.float32)


MASKS: dict[Callable[[Generator], Array], float] = {
    _box: 0.3,
    _ellipse: 0.15,
    _thick: 0.2,
    _thin: 0.1,
    _side: 0.22,
    _whole: 0.03,
}
