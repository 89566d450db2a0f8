"""Pictures and masks as they arrive, made into the two shapes the engine works with.

Nodes, routes and the command line all pass what they were given through here, so one set of rules decides what is
accepted: see ``as_images`` and ``as_masks``.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from .types import InputError, Size

PLACEHOLDER = Size(64, 64)
"""ComfyUI's LoadImage gives an all-zero mask of this size for a picture without alpha."""
NEARLY = 4 / 255
"""Mask values closer than this to 0 or 1 are taken for them."""
ASPECT_TOLERANCE = 0.02
"""Relative difference of aspect ratio up to which a mask of another size is taken for a resized one."""


def size_of(images: Tensor) -> Size:
    """The size of images [B, H, W, C] or masks [B, H, W]."""
    return Size(images.shape[2], images.shape[1])


def as_images(image: Tensor) -> Tensor:
    """[H, W, C] or [B, H, W, C] in 0..1 -> float32 [B, H, W, 3 or 4]; grey becomes RGB, alpha stays.

    Values already float32 are passed on untouched. Raises InputError for other shapes, integer types and empty or
    non-finite pictures.
    """
    check_tensor("image", image)
    shape = "x".join(map(str, image.shape))
    if image.ndim == 3:
        image = image[None]
    if image.ndim != 4 or image.shape[-1] not in (1, 3, 4):
        raise InputError(
            f"The image has shape {shape}; connect an IMAGE of [batch, height, width, channels] with 1, 3 or 4"
            " channels."
        )
    if image.numel() == 0:
        raise InputError(f"The image is empty ({shape}); connect one with at least one pixel.")
    if not image.is_floating_point():
        raise InputError(f"The image holds {image.dtype} values; convert it to float in 0..1 first.")
    image = image.float()
    if not _all_finite(image):
        raise InputError("The image holds NaN or infinite values; check the node that made it.")
    return image.expand(-1, -1, -1, 3) if image.shape[-1] == 1 else image


def check_tensor(what: str, value: object) -> None:
    """Raises InputError for anything else: ComfyUI checks the type of links only, and an API graph can hold a file's
    name where a link belongs."""
    if not isinstance(value, Tensor):
        raise InputError(f"The {what} is {str(value)[:80]!r}; connect the output of a node, such as Load Image.")


def as_masks(mask: Tensor, images: Tensor) -> Tensor:
    """A mask in any of ComfyUI's shapes -> float32 [B, H, W] in 0..1, of the size and on the device of ``images``.

    Accepts [H, W], [B, H, W], [B, 1, H, W] and [B, H, W, 1]; one mask serves every image of the batch. A mask of
    another size but the same aspect ratio is resized. Raises InputError for the rest, and for the placeholder that
    LoadImage gives where no mask was painted.
    """
    mask = as_mask_batch(mask).to(images.device)
    size = size_of(images)
    if size_of(mask) != size:
        mask = _fit_mask(mask, size)
    if mask.shape[0] == 1:
        return mask.expand(images.shape[0], -1, -1)
    if mask.shape[0] != images.shape[0]:
        raise InputError(
            f"There are {images.shape[0]} images and {mask.shape[0]} masks; give one mask, or one for each image."
        )
    return mask


def pair(images: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised images and masks with equal batches; a single image is repeated for each of several masks."""
    images = as_images(images)
    masks = as_mask_batch(masks)
    if images.shape[0] == 1 and masks.shape[0] > 1:
        images = images.expand(masks.shape[0], -1, -1, -1)
    return images, as_masks(masks, images)


def as_mask_batch(mask: Tensor) -> Tensor:
    """A mask in any of ComfyUI's shapes -> float32 [B, H, W] in 0..1, of whatever size it is.

    Values within NEARLY of 0 and 1 become 0 and 1.
    """
    check_tensor("mask", mask)
    shape = "x".join(map(str, mask.shape))
    if mask.ndim == 2:
        mask = mask[None]
    if mask.ndim == 4:
        if mask.shape[1] == 1:
            mask = mask[:, 0]
        elif mask.shape[-1] == 1:
            mask = mask[..., 0]
    if mask.ndim != 3 or mask.numel() == 0:
        raise InputError(
            f"The mask has shape {shape}; connect a MASK of [batch, height, width], not an image (Convert Image to Mask"
            " makes one)."
        )
    mask = mask.float()
    if not _all_finite(mask):
        raise InputError("The mask holds NaN or infinite values; check the node that made it.")
    low, high = float(mask.min()), float(mask.max())
    if low < -1e-3 or high > 1 + 1e-3:
        raise InputError(f"The mask's values run from {low:.3g} to {high:.3g}; they must lie in 0..1 (1 = repaint).")
    return _settle(mask)


def _all_finite(values: Tensor) -> bool:
    """A sum shows NaN and infinity too, and is ten times as fast as looking at each value; large ones may overflow."""
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def _settle(mask: Tensor) -> Tensor:
    """Nearly 0 is 0 and nearly 1 is 1: JPEG noise must not move the crop or touch the picture, and the white of a grey
    PNG, which some readers give as 254, must cover it."""
    return torch.where(mask < NEARLY, 0.0, torch.where(mask > 1 - NEARLY, 1.0, mask))


def _fit_mask(mask: Tensor, size: Size) -> Tensor:
    came = size_of(mask)
    if came == PLACEHOLDER and not mask.any():
        raise InputError(
            "No mask is painted: Load Image gives an empty 64x64 mask for a picture without transparency, so"
            " right-click the picture, open the Mask Editor and paint what to change."
        )
    if not same_shape(came, size):
        hint = " (Load Image gives 64x64 where nothing is painted)" if came == PLACEHOLDER else ""
        raise InputError(
            f"The mask is {came}{hint} but the image is {size}, another shape; make the mask from this image, or resize"
            f" it to {size}."
        )
    return resize_mask(mask, size)


def same_shape(one: Size, other: Size) -> bool:
    """Whether one may be the other resized: the aspect ratios differ by no more than ASPECT_TOLERANCE."""
    return abs(one.width * other.height / (one.height * other.width) - 1) <= ASPECT_TOLERANCE


def resize(images: Tensor, size: Size) -> Tensor:
    """Images [B, H, W, C] at another size (antialiased bicubic, clamped to 0..1); untouched when it fits already."""
    if size_of(images) == size:
        return images
    channels_first = images.permute(0, 3, 1, 2)
    resized = F.interpolate(channels_first, size=(size.height, size.width), mode="bicubic", antialias=True)
    return resized.clamp(0, 1).permute(0, 2, 3, 1).contiguous()


def resize_mask(masks: Tensor, size: Size) -> Tensor:
    """Masks [B, H, W] at another size; antialiased, so that thin strokes fade rather than vanish."""
    if size_of(masks) == size:
        return masks
    resized = F.interpolate(masks[:, None], size=(size.height, size.width), mode="bilinear", antialias=True)
    return resized[:, 0].clamp(0, 1)


def to_bytes(values: Tensor) -> npt.NDArray[np.uint8]:
    """0..1 in any shape -> the nearest of 256 levels; what lies outside is clamped."""
    return (values.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).numpy()
