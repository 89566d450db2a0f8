"""MendOutpaintPad: room for more picture. MendOutpaint: the same, painted step by step."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from ..engine.fill import FillMethod
from ..engine.outpaint import (
    MAX_MULTIPLE,
    MAX_PADDING,
    SIDES,
    Anchor,
    Fitting,
    Length,
    Room,
    Unit,
    make_room,
    parse_target,
)
from ..engine.outpaint_steps import GrowthOptions, outpaint
from ..engine.types import MAX_SIDE, Blend, InpaintRequest, InputError, Sigmas
from .adapters import Controls, as_controls
from .comfy_host import MendModel
from .convert import FillModelType, ModelType, connected
from .fill import LoadedFillModel, as_network
from .inpaint import MendInpaint
from .progress import part_progress
from .text import show

log = logging.getLogger("mend")

FILLS = [method.value for method in FillMethod]
CHOICES = {"unit": Unit, "anchor": Anchor, "fitting": Fitting, "fill": FillMethod, "sigmas": Sigmas, "blend": Blend}
SAMPLER_INPUTS = ("scheduler", "steps", "guidance_scale", "strength", "seed", "count")
SAMPLER_OPTIONS = ("sigmas", "blend", "color_match", "grain")


def side_inputs() -> list[io.Input]:
    return [
        io.Int.Input(
            side,
            default=0,
            min=-MAX_PADDING,
            max=MAX_PADDING,
            tooltip=f"Pixels to add: {side} (or percent, see unit). Negative cuts off.",
        )
        for side in SIDES
    ]


def feather_input() -> io.Input:
    return io.Int.Input(
        "feather",
        default=40,
        min=0,
        max=MAX_PADDING,
        tooltip="Pixels over which the mask falls inside the original, so that both grow together.",
    )


def fill_input(tooltip: str) -> io.Input:
    return io.Combo.Input(
        "fill",
        options=FILLS,
        default=FillMethod.EDGE.value,
        optional=True,
        tooltip=(
            f"{tooltip} edge: the border's pixels repeated. mirror: the picture reflected. blur: its colours flowing"
            " outwards. patchmatch: texture copied from the picture, often good as it is. lama, mat: need fill_model."
        ),
        advanced=True,
    )


def fill_model_input() -> io.Input:
    return FillModelType.Input(
        "fill_model", optional=True, tooltip="From Load Fill Model (Mend): for the fills lama and mat."
    )


def room_inputs() -> list[io.Input]:
    """Ways to say how much room, beside the four sides."""
    return [
        io.Combo.Input(
            "unit",
            options=[unit.value for unit in Unit],
            default=Unit.PIXELS.value,
            optional=True,
            tooltip="What left, top, right and bottom count. percent: of the picture's width, or of its height.",
            advanced=True,
        ),
        io.String.Input(
            "target",
            default="",
            optional=True,
            tooltip=(
                "A size to reach, like 1024x768, or an aspect ratio, like 16:9, with the four sides at 0. Empty: the"
                " sides say how much."
            ),
            advanced=True,
        ),
        io.Combo.Input(
            "anchor",
            options=[anchor.value for anchor in Anchor],
            default=Anchor.CENTER.value,
            optional=True,
            tooltip="Where the picture stays while it grows to the target; the room is added on the other sides.",
            advanced=True,
        ),
        io.Combo.Input(
            "fitting",
            options=[fitting.value for fitting in Fitting],
            default=Fitting.EXTEND.value,
            optional=True,
            tooltip=(
                "How it gets to the target. extend: room is added, nothing cut. crop: what sticks out is cut. fit: the"
                " picture is scaled to fit in first."
            ),
            advanced=True,
        ),
        io.Int.Input(
            "multiple",
            default=1,
            min=1,
            max=MAX_MULTIPLE,
            optional=True,
            tooltip=(
                "Round the result's sides up to multiples of this, for nodes that want 8 or 64; Mend's own take any"
                " size. The pixels go to the sides that grow."
            ),
            advanced=True,
        ),
    ]


def place_outputs() -> list[io.Output]:
    return [
        io.Int.Output("x", tooltip="Where the left edge of the original lies on the canvas, in pixels."),
        io.Int.Output("y", tooltip="Where its top edge lies."),
    ]


def refuse_choices(target: str | None, choices: dict[str, str | None]) -> str | None:
    """Why these cannot be run, or None; what comes through a link is None and seen later."""
    for name, value in choices.items():
        options = [option.value for option in CHOICES[name]]
        if value is not None and value not in options:
            return f"There is no {name} {value!r}; choose one of {', '.join(options)}."
    try:
        parse_target(target or "")
    except InputError as error:
        return str(error)
    return None


def as_room(
    left: int, top: int, right: int, bottom: int, unit: str, target: str, anchor: str, fitting: str, multiple: int
) -> Room:
    counted = Unit(unit)
    return Room(
        left=Length(left, counted),
        top=Length(top, counted),
        right=Length(right, counted),
        bottom=Length(bottom, counted),
        target=parse_target(target),
        anchor=Anchor(anchor),
        fitting=Fitting(fitting),
        multiple=multiple,
    )


class MendOutpaintPad(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendOutpaintPad",
            display_name="Pad for Outpainting (Mend)",
            category="Mend",
            description=(
                "Adds room around the picture and makes the mask for painting it: so much on each side, or up to a"
                " target size or aspect ratio. The feather leads into the original on the sides that grow only, and"
                " where the picture is too small for it a notice says what was used."
            ),
            search_aliases=[
                "outpaint",
                "outpainting",
                "pad image",
                "extend",
                "expand canvas",
                "uncrop",
                "border",
                "aspect ratio",
            ],
            inputs=[
                io.Image.Input("image", tooltip="The picture, or a batch of pictures; any size."),
                *side_inputs(),
                feather_input(),
                fill_input("What the new area shows before it is painted."),
                *room_inputs(),
                fill_model_input(),
            ],
            outputs=[
                io.Image.Output("image", tooltip="The picture on its larger canvas; its own pixels are untouched."),
                io.Mask.Output("mask", tooltip="White on the new area, fading inside the original."),
                *place_outputs(),
            ],
        )

    @classmethod
    def validate_inputs(
        cls,
        target: str | None = None,
        fill: str | None = None,
        unit: str | None = None,
        anchor: str | None = None,
        fitting: str | None = None,
    ) -> bool | str:
        return refuse_choices(target, {"fill": fill, "unit": unit, "anchor": anchor, "fitting": fitting}) or True

    @classmethod
    def execute(
        cls,
        image: Tensor,
        left: int,
        top: int,
        right: int,
        bottom: int,
        feather: int,
        fill: str = FillMethod.EDGE.value,
        unit: str = Unit.PIXELS.value,
        target: str = "",
        anchor: str = Anchor.CENTER.value,
        fitting: str = Fitting.EXTEND.value,
        multiple: int = 1,
        fill_model: LoadedFillModel | None = None,
    ) -> io.NodeOutput:
        room = as_room(left, top, right, bottom, unit, target, anchor, fitting, multiple)
        padded = make_room(
            image,
            room,
            feather,
            FillMethod(fill),
            network=as_network(fill_model),
            on_progress=part_progress("Padding"),
        )
        return io.NodeOutput(padded.image, padded.mask, padded.box.left, padded.box.top, ui=show(padded.notices))


class MendOutpaint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        sampler = {widget.id: widget for widget in MendInpaint.define_schema().inputs}
        return io.Schema(
            node_id="MendOutpaint",
            display_name="Outpaint (Mend)",
            category="Mend",
            description=(
                "Paints more picture on any side, up to any size. It grows step by step, in windows of the model's own"
                " size that see what is painted beside them, so that a far target keeps its detail. The original is"
                " returned exactly as it came, but for the feather at the seam."
            ),
            search_aliases=["outpaint", "outpainting", "extend image", "uncrop", "expand", "zoom out", "aspect ratio"],
            inputs=[
                ModelType.Input("model", tooltip="From Load Model (Mend)."),
                io.Image.Input("image", tooltip="The picture, or a batch of pictures; any size."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="What the whole picture shows; each window is painted from it.",
                ),
                sampler["negative_prompt"],
                *side_inputs(),
                feather_input(),
                *(sampler[name] for name in SAMPLER_INPUTS),
                *room_inputs(),
                fill_input("What each step's new area shows before it is painted, where strength is below 1."),
                io.Int.Input(
                    "growth",
                    default=0,
                    min=0,
                    max=MAX_SIDE,
                    optional=True,
                    tooltip="The most pixels a step adds to a side, from 16 on. 0: half a window.",
                    advanced=True,
                ),
                io.Int.Input(
                    "overlap",
                    default=64,
                    min=0,
                    max=MAX_SIDE,
                    optional=True,
                    tooltip="Pixels of what earlier steps painted that are painted again, so that no seam shows.",
                    advanced=True,
                ),
                io.Int.Input(
                    "window",
                    default=0,
                    min=0,
                    max=MAX_SIDE,
                    optional=True,
                    tooltip=(
                        "Side of the square the model is shown, from 64 on. 0: its own size, in full detail. Larger"
                        " ones are scaled down: fewer runs and more overview, less detail."
                    ),
                    advanced=True,
                ),
                *(sampler[name] for name in SAMPLER_OPTIONS),
                fill_model_input(),
                sampler["control"],
            ],
            outputs=[
                io.Image.Output("images", tooltip="The finished pictures."),
                io.Mask.Output("mask", display_name="mask used", tooltip="Where it is 0 the picture is untouched."),
                io.Int.Output("seed", tooltip="The first picture's seed."),
                *place_outputs(),
            ],
        )

    @classmethod
    def validate_inputs(
        cls,
        target: str | None = None,
        fill: str | None = None,
        unit: str | None = None,
        anchor: str | None = None,
        fitting: str | None = None,
        sigmas: str | None = None,
        blend: str | None = None,
    ) -> bool | str:
        room = {"fill": fill, "unit": unit, "anchor": anchor, "fitting": fitting}
        return refuse_choices(target, {**room, "sigmas": sigmas, "blend": blend}) or True

    @classmethod
    def execute(
        cls,
        model: MendModel,
        image: Any,
        prompt: str,
        negative_prompt: str,
        left: int,
        top: int,
        right: int,
        bottom: int,
        feather: int,
        scheduler: str,
        steps: int,
        guidance_scale: float,
        strength: float,
        seed: int,
        count: int = 1,
        unit: str = Unit.PIXELS.value,
        target: str = "",
        anchor: str = Anchor.CENTER.value,
        fitting: str = Fitting.EXTEND.value,
        multiple: int = 1,
        fill: str = FillMethod.EDGE.value,
        growth: int = 0,
        overlap: int = 64,
        window: int = 0,
        sigmas: str = Sigmas.DEFAULT.value,
        blend: str = Blend.AUTO.value,
        color_match: float = 1.0,
        grain: float = 0.0,
        fill_model: LoadedFillModel | None = None,
        control: Controls | None = None,
    ) -> io.NodeOutput:
        model = connected("model", model, MendModel, "Load Model (Mend)")
        options = GrowthOptions(
            growth=Length(growth),
            overlap=overlap,
            window=window,
            fill=FillMethod(fill),
            network=as_network(fill_model),
        )
        padded = make_room(image, as_room(left, top, right, bottom, unit, target, anchor, fitting, multiple), feather)
        request = InpaintRequest(
            image=padded.image,
            mask=padded.mask,
            prompt=prompt,
            negative_prompt=negative_prompt,
            scheduler=scheduler,
            sigmas=Sigmas(sigmas),
            steps=steps,
            guidance_scale=guidance_scale,
            strength=strength,
            seed=seed,
            count=count,
            blend=Blend(blend),
            color_match=color_match,
            grain=grain,
            controls=as_controls(control),
        )
        result = outpaint(request, padded.box, model.model, model.host, options)
        for report in result.reports:
            log.info("Mend: %s", report)
        notices = show((*padded.notices, *result.notices))
        return io.NodeOutput(result.images, result.mask, result.seeds[0], padded.box.left, padded.box.top, ui=notices)


NODES = [MendOutpaintPad, MendOutpaint]
