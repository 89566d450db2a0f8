"""Putting the painted part back so that it belongs: colour on a ring around the mask, then the paste itself."""

from __future__ import annotations

import torch
from torch import Tensor

from .masks import grow

RING_PIXELS = 24
"""How far from the repainted area the surroundings are compared."""
MAX_SHIFT = 16 / 255
"""The largest colour correction: beyond it the difference is content, not the VAE's tone shift."""


def match_ring(painted: Tensor, original: Tensor, repainted: Tensor) -> Tensor:
    """``painted`` [B, H, W, 3] with the mean colour of ``original`` on a ring just outside ``repainted`` [B, H, W].

    ``repainted`` is above 0 wherever the model was free to paint. A VAE round trip shifts the tone of the whole picture
    a little; on the ring both pictures show the same thing, so the shift can be measured there and taken off. One
    offset per image and channel, at most MAX_SHIFT; images without a ring stay as they are.
    """
    ring = ((grow(repainted, RING_PIXELS) > 0) & (repainted == 0)).to(painted)[..., None]
    pixels = ring.sum(dim=(1, 2), keepdim=True)
    offset = ((original - painted) * ring).sum(dim=(1, 2), keepdim=True) / pixels.clamp(min=1)
    return (painted + offset.clamp(-MAX_SHIFT, MAX_SHIFT)).clamp(0, 1)


def paste(original: Tensor, painted: Tensor, mask: Tensor) -> Tensor:
    """``original`` [B, H, W, C] where ``mask`` [B, H, W] is 0, bit for bit; ``painted`` [B, H, W, 3] where it is 1.

    Grey mask values mix linearly. An alpha channel becomes opaque where something was painted.
    """
    alpha = mask[..., None]
    if original.shape[-1] == 4:
        painted = torch.cat([painted, torch.ones_like(painted[..., :1])], dim=-1)
    mixed = original + (painted - original) * alpha
    # x + (y - x) is not y to the last bit, and x + 0 * y is not x where y is infinite
    return torch.where(alpha == 0, original, torch.where(alpha == 1, painted, mixed))
