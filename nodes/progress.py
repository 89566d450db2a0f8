"""The progress bar of nodes that work through a batch picture by picture."""

from __future__ import annotations

from ..engine.fill import OnProgress
from ..engine.masks import OnImage
from .comfy_host import ComfyProgress

STEPS = 100
"""Of the bar for each picture that reports its parts."""


def image_progress(description: str) -> OnImage:
    """An ``on_image`` that moves the node's bar and stops when the user asks for it."""
    bars: list[ComfyProgress] = []

    def on_image(done: int, total: int) -> None:
        if not bars:
            bars.append(ComfyProgress(total, description))
        bars[0].update(done)

    return on_image


def part_progress(description: str) -> OnProgress:
    """An ``on_progress`` that moves the node's bar within a picture too, and stops when the user asks for it."""
    bars: list[ComfyProgress] = []

    def on_progress(done: float, total: int) -> None:
        if not bars:
            bars.append(ComfyProgress(total * STEPS, description))
        bars[0].update(round(done * STEPS))

    return on_progress
