"""Putting the painted part back: the common colour offset taken off, and the paste itself."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .tone import measure_tone

MAX_SHIFT = 16 / 255
"""The largest colour correction: beyond it the difference is content, not the VAE's tone shift."""


def match_ring(painted: Tensor, original: Tensor, repainted: Tensor) -> Tensor:
    """``painted`` [B, H, W, 3] with the mean colour of ``original`` on a ring just outside ``repainted`` [B, H, W].

    ``repainted`` is above 0 wherever the model was free to paint. A VAE round trip shifts the tone of the whole picture
    a little; on the ring both pictures show the same thing, so the shift can be measured there (``tone.measure_tone``)
    and taken off. One offset per image and channel, at most MAX_SHIFT; images without a ring stay as they are.
    """
    offsets = np.zeros((len(painted), 1, 1, 3), np.float32)
    for index in range(len(painted)):
        new, old, area = (batch[index].detach().cpu() for batch in (painted, original, repainted))
        tone = measure_tone(old.numpy(), new.numpy(), (area > 0).numpy(), MAX_SHIFT)
        if tone is not None:
            offsets[index] = tone.offset
    return (painted + torch.from_numpy(offsets).to(painted).clamp(-MAX_SHIFT, MAX_SHIFT)).clamp(0, 1)


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
