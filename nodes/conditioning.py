"""CONDITIONING for a crop: what it says about places in the picture, said about the canvas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..engine import images
from ..engine.models.protocol import Place
from ..engine.types import Box, InputError

Cond: TypeAlias = list[list[Any]]
"""ComfyUI's CONDITIONING: pairs of embeddings and a dict of everything else."""
LATENT_CELL = 8
"""Pixels per unit of an ``area``, whatever the model."""


def with_values(cond: Cond, keep: bool = False, **values: Any) -> Cond:
    """With ``values`` in every entry; ``keep`` those that an entry has already."""
    return [[tokens, {**values, **options} if keep else {**options, **values}] for tokens, options in cond]


class Controls:
    """Copies of ControlNets whose hints are cut to canvases that show ``places`` of whole pictures.

    A ControlNet is copied once: ComfyUI runs entries together only where they share one.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = places
        self._copies: dict[int, Any] = {}

    def cut(self, control: Any) -> Any:
        """The copy of a ControlNet, and of those it is chained to."""
        if id(control) in self._copies:
            return self._copies[id(control)]
        copied = self._copies[id(control)] = control.copy()
        if control.cond_hint_original is not None:
            # hints for inpainting hold -1 in the hole
            copied.cond_hint_original = cut_planes((control.cond_hint_original + 1) / 2, self.places) * 2 - 1
        copied.extra_concat_orig = [
            cut_planes(planes, self.places) if min(planes.shape[-2:]) > 1 else planes
            for planes in getattr(control, "extra_concat_orig", [])
        ]
        if control.previous_controlnet is not None:
            copied.set_previous_controlnet(self.cut(control.previous_controlnet))
        return copied


def on_canvas(cond: Cond, controls: Controls) -> Cond:
    """``cond``, made for whole pictures, for canvases that show the places of ``controls`` of them.

    ControlNet hints and masks are cut along, areas are moved; an area outside the canvas drops its entry. Raises
    InputError where that cannot be done.
    """
    if not controls.places:
        return cond
    moved = [[tokens, _options_on_canvas(options, controls)] for tokens, options in cond]
    kept = [entry for entry in moved if entry[1] is not None]
    if not kept:
        raise InputError(
            "No area of the conditioning reaches the masked part of the picture: add conditioning for the whole of it."
        )
    return kept


def _options_on_canvas(options: dict[str, Any], controls: Controls) -> dict[str, Any] | None:
    moved, places = {**options}, controls.places
    if "gligen" in options and not all(_is_whole(place) for place in places):
        raise InputError("GLIGEN boxes cannot follow a crop: set crop to off.")
    if "control" in options:
        moved["control"] = controls.cut(options["control"])
    if "mask" in options:
        masks = options["mask"] if options["mask"].ndim == 3 else options["mask"][None]
        moved["mask"] = cut_planes(masks[:, None], places)[:, 0]
    if "area" in options:
        area = _area_on_canvas(options["area"], places)
        if area is None:
            return None
        moved["area"] = area
    return moved


def _is_whole(place: Place) -> bool:
    return place.plan.box.size == place.picture


def cut_planes(planes: Tensor, places: Sequence[Place]) -> Tensor:
    """[B, C, H, W] in 0..1 of whole pictures, at any size -> [places, C, canvas height, canvas width]."""
    whole = [images.resize_mask(planes[place.source % len(planes)], place.picture) for place in places]
    return torch.stack([place.plan.cut_mask(picture) for picture, place in zip(whole, places, strict=True)])


def _area_on_canvas(area: Sequence[Any], places: Sequence[Place]) -> tuple[Any, ...] | None:
    """(height, width, y, x) in latent cells or in shares of the picture -> shares of the canvas; None when outside."""
    found = {_share(_area_box(area, place), place) for place in places}
    if len(found) > 1:
        raise InputError("Areas of the conditioning differ between the pictures of this batch: run them one by one.")
    return found.pop()


def _area_box(area: Sequence[Any], place: Place) -> tuple[float, float, float, float]:
    """left, top, right, bottom in pixels of the picture."""
    if area[0] == "percentage":
        height, width, y, x = area[1:5]
        scale_x, scale_y = place.picture
    else:
        height, width, y, x = area[:4]
        scale_x = scale_y = LATENT_CELL
    return x * scale_x, y * scale_y, (x + width) * scale_x, (y + height) * scale_y


def _share(area: tuple[float, float, float, float], place: Place) -> tuple[Any, ...] | None:
    box: Box = place.plan.box
    left, right = (min(max(side, box.left), box.right) - box.left for side in (area[0], area[2]))
    top, bottom = (min(max(side, box.top), box.bottom) - box.top for side in (area[1], area[3]))
    if right <= left or bottom <= top:
        return None
    # a canvas may hold a little more than the box, at its right and bottom
    across = place.plan.scaled.width / place.plan.canvas.width / box.width
    down = place.plan.scaled.height / place.plan.canvas.height / box.height
    return ("percentage", (bottom - top) * down, (right - left) * across, top * down, left * across)
