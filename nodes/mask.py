"""MendPrepareMask, MendMaskFromImage and MendCombineMasks: from what was painted to what should be repainted."""

from __future__ import annotations

import json
from enum import Enum

from comfy_api.latest import io, ui
from torch import Tensor

from ..engine.images import as_mask_batch
from ..engine.mask_report import MaskReport, mask_report, preview
from ..engine.mask_sources import (
    MAX_NOISE,
    MAX_TOLERANCE,
    ColorDistance,
    Operation,
    combine,
    from_alpha,
    from_color,
    from_difference,
)
from ..engine.masks import MAX_DOWNSCALE, MAX_PIXELS, FeatherSide, MaskOptions, Shape, Unit, prepare_masks
from ..engine.types import InputError
from .progress import image_progress


class Source(str, Enum):
    """What a mask is made from."""

    COLOR = "color"
    ALPHA = "alpha"
    DIFFERENCE = "difference"


def refuse_unknown(name: str, value: str | None, choices: type[Enum]) -> str | None:
    """The sentence for a choice that does not exist, None for one that does."""
    options = [choice.value for choice in choices]
    if value is None or value in options:
        return None
    return f"There is no {name} {value!r}; choose one of {', '.join(options)}."


class MendPrepareMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendPrepareMask",
            display_name="Prepare Mask (Mend)",
            category="Mend",
            description=(
                "Grows a mask by exact pixels and softens its edge outwards, so that what you painted stays fully"
                " masked. In this order: floor, threshold, invert, close, fill holes, open, islands, grow, feather."
                " Grey masks stay grey."
            ),
            search_aliases=[
                "grow mask",
                "expand mask",
                "shrink mask",
                "erode",
                "dilate",
                "feather mask",
                "blur mask",
                "invert mask",
                "fill holes",
                "threshold mask",
                "mask preview",
                "mask info",
                "keep largest",
                "remove small",
            ],
            inputs=[
                io.Mask.Input("mask", tooltip="White (1) marks what to repaint. One mask or a batch."),
                io.Int.Input(
                    "grow",
                    default=8,
                    min=-MAX_PIXELS,
                    max=MAX_PIXELS,
                    tooltip=(
                        "Pixels to grow by on all sides, rounded at corners. Negative shrinks. A little growth takes"
                        " along the edge of the object, which otherwise shows as an outline."
                    ),
                ),
                io.Int.Input(
                    "feather",
                    default=8,
                    min=0,
                    max=MAX_PIXELS,
                    tooltip="Pixels of soft edge added outside the grown mask; the mask itself stays as it is.",
                ),
                io.Boolean.Input(
                    "invert", default=False, tooltip="Swap masked and unmasked, before holes, growth and feather."
                ),
                io.Boolean.Input(
                    "fill_holes", default=True, tooltip="Take along unmasked spots that the mask fully encloses."
                ),
                io.Float.Input(
                    "threshold",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Values from here up become white, the rest black. 0 keeps grey values as they are.",
                    advanced=True,
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="What the preview shows the mask on; grey when nothing is connected.",
                ),
                io.Combo.Input(
                    "unit",
                    options=Unit,
                    default=Unit.PIXELS,
                    optional=True,
                    tooltip=(
                        "What grow, feather, close and open are given in: pixels, or percent of the picture's longer"
                        " side (then min_island is in percent of its area)."
                    ),
                    advanced=True,
                ),
                io.Combo.Input(
                    "shape",
                    options=Shape,
                    default=Shape.ROUND,
                    optional=True,
                    tooltip="round: corners become arcs, the same distance everywhere. square: corners stay corners.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "feather_side",
                    options=FeatherSide,
                    default=FeatherSide.OUTWARD,
                    optional=True,
                    tooltip=(
                        "Where the soft edge lies. outward: around the mask. inward: within it, so that nothing more is"
                        " repainted. centred: half and half."
                    ),
                    advanced=True,
                ),
                io.Boolean.Input(
                    "keep_solid",
                    default=False,
                    optional=True,
                    tooltip=(
                        "What you painted stays fully masked also with an inward feather: grow by as much as you"
                        " feather, and the soft edge lies between the two."
                    ),
                    advanced=True,
                ),
                io.Float.Input(
                    "floor",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="Values below it become black, the rest stays grey: takes off faint smears.",
                    advanced=True,
                ),
                io.Float.Input(
                    "close",
                    default=0.0,
                    min=0.0,
                    max=MAX_PIXELS,
                    step=0.5,
                    optional=True,
                    tooltip="Bridges gaps up to twice as wide, for example in an outline that should be filled.",
                    advanced=True,
                ),
                io.Float.Input(
                    "open",
                    default=0.0,
                    min=0.0,
                    max=MAX_PIXELS,
                    step=0.5,
                    optional=True,
                    tooltip="Drops specks and hairs up to twice as wide.",
                    advanced=True,
                ),
                io.Float.Input(
                    "min_island",
                    default=0.0,
                    min=0.0,
                    max=2**27,
                    step=0.01,
                    optional=True,
                    tooltip="Islands with fewer pixels than this are dropped (percent: of the picture's area).",
                    advanced=True,
                ),
                io.Boolean.Input(
                    "keep_largest",
                    default=False,
                    optional=True,
                    tooltip="Only the largest island stays.",
                    advanced=True,
                ),
                io.Int.Input(
                    "downscale",
                    default=8,
                    min=1,
                    max=MAX_DOWNSCALE,
                    optional=True,
                    tooltip="Pixels of one latent cell: 8 for SD and SDXL, 16 for models that pack latents, as Flux.",
                    advanced=True,
                ),
            ],
            outputs=[
                io.Mask.Output("mask", tooltip="The prepared mask, as many as came in and of the same size."),
                io.Mask.Output(
                    "sampler_mask",
                    tooltip=(
                        "The grown mask on whole latent cells, without feather. For samplers of other packs (Set Latent"
                        " Noise Mask): no stroke is too thin to survive."
                    ),
                ),
                io.Mask.Output("user_mask", tooltip="What you painted, cleaned up, before it is grown and feathered."),
                io.Image.Output(
                    "preview",
                    tooltip=(
                        "The prepared mask on the picture with its numbers; latent cells that a plain sampler would"
                        " lose are framed in yellow."
                    ),
                ),
                io.String.Output(
                    "report",
                    tooltip=(
                        "The prepared masks' numbers as JSON: coverage, box, values, islands, latent cells, and what"
                        " a plain sampler would lose."
                    ),
                ),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, unit: str | None = None, shape: str | None = None, feather_side: str | None = None
    ) -> bool | str:
        return (
            refuse_unknown("unit", unit, Unit)
            or refuse_unknown("shape", shape, Shape)
            or refuse_unknown("feather side", feather_side, FeatherSide)
            or True
        )

    @classmethod
    def execute(
        cls,
        mask: Tensor,
        grow: int,
        feather: int,
        invert: bool,
        fill_holes: bool,
        threshold: float,
        image: Tensor | None = None,
        unit: str = Unit.PIXELS.value,
        shape: str = Shape.ROUND.value,
        feather_side: str = FeatherSide.OUTWARD.value,
        keep_solid: bool = False,
        floor: float = 0.0,
        close: float = 0.0,
        open: float = 0.0,
        min_island: float = 0.0,
        keep_largest: bool = False,
        downscale: int = 8,
    ) -> io.NodeOutput:
        options = MaskOptions(
            floor=floor,
            threshold=threshold,
            invert=invert,
            close=close,
            fill_holes=fill_holes,
            open=open,
            min_island=min_island,
            keep_largest=keep_largest,
            grow=grow,
            feather=feather,
            feather_side=FeatherSide(feather_side),
            keep_solid=keep_solid,
            shape=Shape(shape),
            unit=Unit(unit),
        )
        prepared = prepare_masks(as_mask_batch(mask), options, downscale, image_progress("Preparing masks"))
        reports = [mask_report(one, downscale) for one in prepared.stitch]
        return io.NodeOutput(
            prepared.stitch,
            prepared.sampler,
            prepared.user,
            preview(image, prepared.stitch, reports),
            json.dumps({"masks": [report.as_dict() for report in reports]}),
            ui=ui.PreviewText(summarise(reports)),
        )


class MendMaskFromImage(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendMaskFromImage",
            display_name="Mask from Image (Mend)",
            category="Mend",
            description=(
                "Makes a mask from a colour in the picture, from its transparency, or from what an edited copy of it"
                " changed. Follow it with Prepare Mask to grow and feather."
            ),
            search_aliases=[
                "color to mask",
                "colour to mask",
                "color key",
                "green screen",
                "chroma key",
                "alpha to mask",
                "transparency",
                "difference mask",
                "what changed",
                "before after",
                "image to mask",
            ],
            inputs=[
                io.Image.Input("image", tooltip="The picture; for difference: the one before the edit."),
                io.Combo.Input(
                    "source",
                    options=Source,
                    default=Source.COLOR,
                    tooltip=(
                        "color: what is close to the colour. alpha: what is transparent. difference: what is no longer"
                        " the same in changed_image."
                    ),
                ),
                io.String.Input(
                    "color", default="#00ff00", tooltip="For color: #rrggbb, or a name such as green or hotpink."
                ),
                io.Float.Input(
                    "tolerance",
                    default=10.0,
                    min=0.0,
                    max=MAX_TOLERANCE,
                    step=0.5,
                    tooltip=(
                        "How far colours may be apart and still count as the same: 2 is just visible, 10 clearly, and"
                        " black and white are 100 apart."
                    ),
                ),
                io.Image.Input(
                    "changed_image", optional=True, tooltip="For difference: the picture after the edit, same size."
                ),
                io.Float.Input(
                    "softness",
                    default=0.0,
                    min=0.0,
                    max=MAX_TOLERANCE,
                    step=0.5,
                    optional=True,
                    tooltip="For color: the mask fades over so much more of it instead of ending at the tolerance.",
                    advanced=True,
                ),
                io.Combo.Input(
                    "distance",
                    options=ColorDistance,
                    default=ColorDistance.LAB,
                    optional=True,
                    tooltip="For color: lab compares as the eye does, rgb as the numbers are.",
                    advanced=True,
                ),
                io.Float.Input(
                    "noise",
                    default=2.0,
                    min=0.0,
                    max=MAX_NOISE,
                    step=0.5,
                    optional=True,
                    tooltip=(
                        "For difference: pixels over which JPEG and VAE noise is averaged out; specks no larger are"
                        " dropped. 0 compares pixel by pixel."
                    ),
                    advanced=True,
                ),
                io.Boolean.Input(
                    "register",
                    default=False,
                    optional=True,
                    tooltip="For difference: measure whether the picture was moved, and compare it moved back.",
                    advanced=True,
                ),
            ],
            outputs=[io.Mask.Output("mask", tooltip="White where the source says so, at the size of the picture.")],
        )

    @classmethod
    def validate_inputs(cls, source: str | None = None, distance: str | None = None) -> bool | str:
        return refuse_unknown("source", source, Source) or refuse_unknown("distance", distance, ColorDistance) or True

    @classmethod
    def execute(
        cls,
        image: Tensor,
        source: str,
        color: str,
        tolerance: float,
        changed_image: Tensor | None = None,
        softness: float = 0.0,
        distance: str = ColorDistance.LAB.value,
        noise: float = 2.0,
        register: bool = False,
    ) -> io.NodeOutput:
        if source == Source.ALPHA:
            return io.NodeOutput(from_alpha(image))
        if source == Source.COLOR:
            return io.NodeOutput(from_color(image, color, tolerance, softness, ColorDistance(distance)))
        if changed_image is None:
            raise InputError("The source is difference, but there is only one picture; connect changed_image.")
        return io.NodeOutput(from_difference(image, changed_image, tolerance, noise, register))


class MendCombineMasks(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendCombineMasks",
            display_name="Combine Masks (Mend)",
            category="Mend",
            description="Makes one mask of two: together, without, both, either, or one but not the other.",
            search_aliases=[
                "mask composite",
                "add masks",
                "subtract masks",
                "intersect masks",
                "union masks",
                "mask boolean",
                "xor",
            ],
            inputs=[
                io.Mask.Input("a", tooltip="The first mask, or a batch; the result has its size."),
                io.Mask.Input("b", tooltip="The second mask: one for all, or one for each of the first."),
                io.Combo.Input(
                    "operation",
                    options=Operation,
                    default=Operation.ADD,
                    tooltip=(
                        "add: a + b, up to white. subtract: a - b, down to black. and: the smaller of both. or: the"
                        " larger. xor: the difference, where one is and not the other."
                    ),
                ),
            ],
            outputs=[io.Mask.Output("mask", tooltip="The combined mask, at the size of a.")],
        )

    @classmethod
    def validate_inputs(cls, operation: str | None = None) -> bool | str:
        return refuse_unknown("operation", operation, Operation) or True

    @classmethod
    def execute(cls, a: Tensor, b: Tensor, operation: str) -> io.NodeOutput:
        return io.NodeOutput(combine(a, b, Operation(operation)))


def summarise(reports: list[MaskReport]) -> str:
    """For the person at the graph: the numbers of each mask."""
    if len(reports) == 1:
        return str(reports[0])
    return "\n\n".join(f"Mask {number} of {len(reports)}: {report}" for number, report in enumerate(reports, start=1))


NODES: list[type[io.ComfyNode]] = [MendPrepareMask, MendMaskFromImage, MendCombineMasks]
