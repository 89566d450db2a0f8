"""Value types that travel through the engine, and its errors.

Conventions, everywhere: images are float32 ``[B, H, W, C]`` in 0..1 with C = 3 or 4, masks are float32 ``[B, H, W]``
in 0..1 where 1 (white) means "repaint this".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple

from torch import Tensor

MAX_SEED = 2**64 - 1
MAX_SIDE = 16384
MAX_PIXELS = 2**27
"""134 megapixels: 1.6 GB as float32 RGB."""
MAX_TOTAL_PIXELS = 2**30
"""Of all pictures that one run multiplies: 13 GB as float32 RGB."""


class MendError(Exception):
    """A message for the person at the graph: what came, what was expected, what to do. One sentence."""

    # ComfyUI shows the class with its module, which would be the path of the pack's folder
    __module__ = "mend"


class InputError(MendError, ValueError):
    """An image, mask, prompt or number that cannot be used."""

    __module__ = "mend"


class ModelFileError(MendError):
    """A model file or folder that cannot be used; the message names it."""

    __module__ = "mend"


class MissingPackageError(MendError, ImportError):
    """An optional package is not installed; the message names it and the option that needs it."""

    __module__ = "mend"


class Size(NamedTuple):
    """Width and height in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


class Box(NamedTuple):
    """A rectangle of whole pixels: ``left`` and ``top`` are inside it, ``right`` and ``bottom`` are not."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def size(self) -> Size:
        return Size(self.width, self.height)

    @property
    def rows(self) -> slice:
        return slice(self.top, self.bottom)

    @property
    def columns(self) -> slice:
        return slice(self.left, self.right)


class Crop(str, Enum):
    """What part of the picture the model sees."""

    AUTO = "auto"
    """The surroundings of the mask, at the model's native size."""
    OFF = "off"
    """The whole picture at its own size."""
    EACH = "each"
    """As AUTO, once for every separate part of the mask."""


class Blend(str, Enum):
    """How the painted part and its surroundings are joined."""

    AUTO = "auto"
    """Measures the error on the ring around the mask and picks one of the others."""
    LINEAR = "linear"
    """The mask's values mix the two pictures."""
    MULTIBAND = "multiband"
    """Each band of detail is mixed over its own width (Burt and Adelson 1983)."""
    POISSON = "poisson"
    """The painted part keeps its gradients and takes its tone from the rim (Perez et al. 2003)."""


class Compat(str, Enum):
    """Whose arithmetic the run follows."""

    OFF = "off"
    """Ours: exact paste-back, thin strokes kept, solver warm-up restarted."""
    DIFFUSERS = "diffusers"
    """StableDiffusionInpaintPipeline, to rounding."""


class Sigmas(str, Enum):
    """How the noise levels are spaced."""

    DEFAULT = "default"
    KARRAS = "karras"
    EXPONENTIAL = "exponential"
    BETA = "beta"


@dataclass(frozen=True, kw_only=True)
class InpaintRequest:
    """Everything that decides a picture, from any front door; raises InputError for what is out of range.

    ``width`` and ``height`` of 0 keep the image's own size (with ``Compat.DIFFUSERS``: the model's, as its pipeline
    does). The input image ``b`` repeated ``count`` times gives result ``b * count + n``, made with ``seed + b * count
    + n`` (modulo 2**64), so that each picture can be made again alone.
    """

    image: Tensor
    """[B, H, W, 3 or 4], 0..1."""
    mask: Tensor
    """[B or 1, H, W], 0..1; 1 = repaint."""
    prompt: str = ""
    negative_prompt: str = ""
    zero_negative: bool = False
    """An empty ``negative_prompt`` is zeros instead of the encoded empty text: for SDXL what diffusers does where no
    negative prompt is given, and ComfyUI's ConditioningZeroOut."""
    scheduler: str = "DPMSolverMultistep"
    """A key of ``schedulers.SCHEDULERS``."""
    sigmas: Sigmas = Sigmas.DEFAULT
    steps: int = 25
    """1..500."""
    guidance_scale: float = 7.5
    """0..50; at 1 or below only the prompt's branch runs."""
    strength: float = 1.0
    """0..1: the share of the steps that run; 1 starts from pure noise, 0 gives the input back."""
    seed: int = 0
    """0..2**64-1."""
    count: int = 1
    """1..64 pictures for each input image."""
    width: int = 0
    height: int = 0
    crop: Crop = Crop.AUTO
    compat: Compat = Compat.OFF
    sampler_mask: Tensor | None = None
    """[B or 1, H, W], 0..1: where the model paints, if not everywhere that ``mask`` touches."""
    soft: bool = False
    """Grey values of the sampler's mask repaint less, each as if it were the strength there."""
    controls: tuple[Any, ...] = ()
    """ControlNets to follow, each a ``control.Control``; their results add up."""
    blend: Blend = Blend.AUTO
    color_match: float = 1.0
    """0..1: how much of a tone difference around the mask is taken off the painted part."""
    grain: float = 0.0
    """0..1: how much of the surroundings' grain the painted part is given."""

    def __post_init__(self) -> None:
        check_range("steps", self.steps, 1, 500)
        check_range("guidance_scale", self.guidance_scale, 0, 50)
        check_range("strength", self.strength, 0, 1)
        check_range("seed", self.seed, 0, MAX_SEED)
        check_range("count", self.count, 1, 64)
        check_range("color_match", self.color_match, 0, 1)
        check_range("grain", self.grain, 0, 1)
        for name, value in (("width", self.width), ("height", self.height)):
            if value != 0:
                check_range(name, value, 16, MAX_SIDE, "or 0 for the image's own size")
        check_area(Size(self.width, self.height))


def check_range(name: str, value: float, low: float, high: float, note: str = "") -> None:
    """Raise InputError unless ``low <= value <= high``."""
    # written so that NaN fails too
    if not low <= value <= high:
        raise InputError(f"{name} is {value}; give a value from {low} to {high}{' ' + note if note else ''}.")


def check_area(size: Size) -> None:
    """Raise InputError for a picture too large to hold in memory along with what is made from it."""
    if max(size) > MAX_SIDE or size.width * size.height > MAX_PIXELS:
        raise InputError(
            f"The result would be {size}; at most {MAX_SIDE} pixels a side and {MAX_PIXELS // 10**6} megapixels can be"
            " worked on, so ask for less."
        )


def check_total(pictures: int, size: Size) -> None:
    """Raise InputError for more pictures than common machines hold together."""
    fitting = max(MAX_TOTAL_PIXELS // (size.width * size.height), 1)
    if pictures > fitting:
        raise InputError(
            f"{pictures} pictures of {size} would be made at once, and {fitting} fit: lower count and run again with"
            " other seeds."
        )


@dataclass(frozen=True, kw_only=True)
class InpaintResult:
    """What came out of one request."""

    images: Tensor
    """[B * count, H, W, C], 0..1; C as in the input."""
    mask: Tensor
    """[B, H, W]: the stitch mask that was used, at the size of the result; where it is 0 the input is untouched."""
    seeds: tuple[int, ...]
    """The seed of each image."""
    notices: tuple[str, ...] = ()
    """Sentences the user should see, e.g. that the mask was empty."""
    reports: tuple[str, ...] = ()
    """For each image how the painted part was joined, with the figures behind it."""
    timings: dict[str, float] = field(default_factory=dict)
    """Seconds by phase."""
