"""The paste itself."""

from __future__ import annotations

import torch
from torch import Tensor


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
