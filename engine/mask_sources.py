"""Where masks come from: a picture's transparency, a colour, what changed between two pictures, two other masks.

Pictures are [B, H, W, C] in 0..1, masks come out float32 [B, H, W], 1 = repaint. A single picture or mask serves each
of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum

import numpy as np
import torch
from PIL import ImageColor
from torch import Tensor

from . import morphology
from .color import srgb_to_lab
from .images import as_images, as_mask_batch, resize_mask, same_shape, size_of
from .registration import apply_shift, shift_between
from .types import InputError, check_range

MAX_TOLERANCE = 100.0
"""The distance between black and white, by either measure."""
ROUNDING = 1e-3
"""Distances closer than this are taken as equal, so that a colour is never lost to the rounding of float32."""
MAX_NOISE = 16.0
STRIP = 2**20
"""Pixels whose colours are compared at once."""


class ColorDistance(str, Enum):
    """How far two colours are apart; black and white 100 by either."""

    LAB = "lab"
    """Euclidean in CIE Lab under D65 (CIE 1976 delta E): as far as they look apart; 2.3 is just noticeable."""
    RGB = "rgb"
    """Root mean square over the sRGB channels, times 100: as far as the numbers are apart."""


class Operation(str, Enum):
    """Two masks made one; on black and white masks what the name says, on grey ones the formula."""

    ADD = "add"
    """min(1, a + b): overlapping greys build up."""
    SUBTRACT = "subtract"
    """max(0, a - b): b is taken off a."""
    AND = "and"
    """min(a, b): where both are."""
    OR = "or"
    """max(a, b): where either is."""
    XOR = "xor"
    """|a - b|: where one is and not the other."""


_OPERATIONS: dict[Operation, Callable[[Tensor, Tensor], Tensor]] = {
    Operation.ADD: lambda a, b: (a + b).clamp(max=1),
    Operation.SUBTRACT: lambda a, b: (a - b).clamp(min=0),
    Operation.AND: torch.minimum,
    Operation.OR: torch.maximum,
    Operation.XOR: lambda a, b: (a - b).abs(),
}


def from_alpha(image: Tensor) -> Tensor:
    """1 - alpha of a picture [B, H, W, 4]: transparent = repaint, as in ComfyUI and in the hosted edit APIs.

    Raises InputError for a picture without an alpha channel.
    """
    images = as_images(image)
    if images.shape[-1] != 4:
        raise InputError(
            "The image has no alpha channel, so nothing in it is transparent; connect one with 4 channels (the mask"
            " output of Load Image has the transparency of a file), or make the mask from a colour."
        )
    return 1 - images[..., 3]


def from_color(
    image: Tensor,
    color: str,
    tolerance: float = 10.0,
    softness: float = 0.0,
    distance: ColorDistance = ColorDistance.LAB,
) -> Tensor:
    """1 where the picture's colour is within ``tolerance`` of ``color``, falling to 0 over ``softness`` more.

    ``color`` is "#rrggbb", "#rgb" or a CSS name; tolerance and softness are 0..100 by ``distance``. Alpha is ignored.
    Raises InputError for a colour that cannot be read.
    """
    check_range("tolerance", tolerance, 0, MAX_TOLERANCE)
    check_range("softness", softness, 0, MAX_TOLERANCE)
    images = as_images(image)[..., :3]
    wanted = _space(torch.tensor(parse_color(color)), distance)

    def mark(pixels: Tensor) -> Tensor:
        away = torch.linalg.vector_norm(_space(pixels, distance) - wanted, dim=-1)
        beyond = (away - tolerance - ROUNDING).clamp(min=0)
        return (1 - beyond / softness).clamp(min=0) if softness > ROUNDING else (beyond == 0).float()

    pixels = images.detach().cpu().reshape(-1, 3)
    return _in_strips(mark, pixels).reshape(images.shape[:3]).to(images.device)


def from_difference(
    before: Tensor, after: Tensor, tolerance: float = 10.0, noise: float = 2.0, register: bool = False
) -> Tensor:
    """1 where ``after`` shows something else than ``before``, 0 where the two differ by no more than ``tolerance``.

    The difference is taken in CIE Lab (0..100, black to white) after a Gaussian blur of ``noise`` / 2 pixels, which
    averages out what JPEG and a VAE add; what is then marked in specks of no more than ``noise`` pixels across is
    dropped (opening by a disk). ``noise`` is 0..16; 0 compares pixel by pixel. Transparency counts where both have it.
    ``register`` measures how far ``after`` was moved as a whole, as edit models do, and compares it moved back; the
    strip that then comes in from beyond its border counts as unchanged.
    Raises InputError for pictures of different sizes or batches.
    """
    check_range("tolerance", tolerance, 0, MAX_TOLERANCE)
    check_range("noise", noise, 0, MAX_NOISE)
    first, second = as_images(before), as_images(after)
    if size_of(first) != size_of(second):
        raise InputError(
            f"The first picture is {size_of(first)} and the second {size_of(second)}; resize one to the other's size,"
            " so that the same pixels can be compared."
        )
    count = _shared_batch(len(first), len(second), "pictures")
    masks = [
        torch.from_numpy((_registered_difference if register else _difference)(one, other, tolerance, noise))
        for one, other in zip(_batch_of(first, count), _batch_of(second, count), strict=True)
    ]
    return torch.stack(masks).to(first.device)


def combine(a: Tensor, b: Tensor, operation: Operation) -> Tensor:
    """Masks ``a`` and ``b`` as one, at the size of ``a``; see ``Operation`` for the formulas.

    All but SUBTRACT commute; an empty mask changes nothing in ADD, SUBTRACT, OR and XOR, a full one nothing in AND.
    A ``b`` of the same aspect ratio is resized. Raises InputError for other shapes and for batches that do not fit.
    """
    first, second = as_mask_batch(a), as_mask_batch(b)
    second = second.to(first.device)
    size, other = size_of(first), size_of(second)
    if not same_shape(other, size):
        raise InputError(
            f"The first mask is {size} and the second {other}, another shape; make both from the same picture, or"
            " resize one (Load Image gives 64x64 where nothing is painted)."
        )
    count = _shared_batch(len(first), len(second), "masks")
    second = resize_mask(second, size)
    return _OPERATIONS[operation](_batch_of(first, count), _batch_of(second, count))


def parse_color(color: str) -> tuple[float, float, float]:
    """sRGB in 0..1 of "#rrggbb", "#rgb", "rgb(r, g, b)" or a CSS name; InputError for anything else."""
    try:
        red, green, blue = ImageColor.getcolor(color.strip(), "RGB")  # type: ignore[misc]
    except (ValueError, AttributeError) as error:
        raise InputError(
            f"{color!r} is no colour; give one as #rrggbb, for example #00ff00, or by a name such as green."
        ) from error
    return red / 255, green / 255, blue / 255


def _space(srgb: Tensor, distance: ColorDistance) -> Tensor:
    """Colours [..., 3] where Euclidean distance is the one asked for."""
    return srgb_to_lab(srgb) if distance is ColorDistance.LAB else srgb * (100 / 3**0.5)


def _in_strips(operation: Callable[[Tensor], Tensor], pixels: Tensor) -> Tensor:
    """``operation`` on [N, ...], STRIP pixels at once: what it needs in between stays small."""
    return torch.cat([operation(strip) for strip in pixels.split(STRIP)])


def _registered_difference(before: Tensor, after: Tensor, tolerance: float, noise: float) -> morphology.FloatArray:
    shift = shift_between(before[..., :3], after[..., :3])
    if not shift.worth_undoing:
        return _difference(before, after, tolerance, noise)
    mask = _difference(before, apply_shift(after[None], -shift)[0], tolerance, noise)
    height, width = mask.shape
    right, down = math.ceil(max(shift.dx, 0)), math.ceil(max(shift.dy, 0))
    left, up = math.ceil(max(-shift.dx, 0)), math.ceil(max(-shift.dy, 0))
    known = np.zeros_like(mask)
    known[up : height - down, left : width - right] = 1
    return mask * known


def _difference(before: Tensor, after: Tensor, tolerance: float, noise: float) -> morphology.FloatArray:
    """Of one picture [H, W, C]."""
    one, other = before.detach().cpu(), after.detach().cpu()
    pixels = torch.stack([one[..., :3], other[..., :3]], dim=2).reshape(-1, 2, 3)
    change = _in_strips(lambda pair: srgb_to_lab(pair).diff(dim=1)[:, 0], pixels)
    planes = [*change.reshape(*one.shape[:2], 3).unbind(-1)]
    if one.shape[-1] == other.shape[-1] == 4:
        planes.append((other[..., 3] - one[..., 3]) * 100)
    blurred = [_blur(plane.numpy(), noise / 2) for plane in planes]
    away = np.sqrt(np.sum(np.square(blurred), axis=0))
    return morphology.opening((away > tolerance).astype(np.float32), noise / 2)


def _blur(plane: morphology.FloatArray, sigma: float) -> morphology.FloatArray:
    if sigma == 0:
        return plane
    from scipy import ndimage

    blurred: morphology.FloatArray = ndimage.gaussian_filter(plane, sigma, mode="nearest")
    return blurred


def _shared_batch(first: int, second: int, things: str) -> int:
    if first != second and 1 not in (first, second):
        raise InputError(f"There are {first} and {second} {things}; give as many of both, or one for all of them.")
    return max(first, second)


def _batch_of(batch: Tensor, count: int) -> Tensor:
    return batch.expand(count, *batch.shape[1:]) if len(batch) == 1 else batch
