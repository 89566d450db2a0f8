"""MendOutpaintPad: room for more picture."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from ..engine.fill import FillMethod
from ..engine.outpaint import MAX_PADDING, Padding, pad
from .progress import image_progress

FILLS = [method.value for method in FillMethod]
SIDES = ("left", "top", "right", "bottom")


class MendOutpaintPad(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendOutpaintPad",
            display_name="Pad for Outpainting (Mend)",
            category="Mend",
            description=(
                "Adds room around the picture and makes the mask for painting it. The feather leads into the original"
                " on the padded sides only, and shrinks to what fits where the picture is small."
            ),
            search_aliases=["outpaint", "outpainting", "pad image", "extend", "expand canvas", "uncrop", "border"],
            inputs=[
                io.Image.Input("image", tooltip="The picture, or a batch of pictures; any size."),
                *(
                    io.Int.Input(side, default=0, min=0, max=MAX_PADDING, tooltip=f"Pixels to add: {side}.")
                    for side in SIDES
                ),
                io.Int.Input(
                    "feather",
                    default=40,
                    min=0,
                    max=MAX_PADDING,
                    tooltip="Pixels over which the mask falls inside the original, so that both grow together.",
                ),
                io.Combo.Input(
                    "fill",
                    options=FILLS,
                    default=FillMethod.EDGE.value,
                    optional=True,
                    tooltip=(
                        "What the new area shows before it is painted. edge: the border's pixels repeated. blur: its"
                        " colours flowing outwards. patchmatch: texture copied from the picture, often good as it is."
                    ),
                    advanced=True,
                ),
            ],
            outputs=[
                io.Image.Output("image", tooltip="The picture on its larger canvas; its own pixels are untouched."),
                io.Mask.Output("mask", tooltip="White on the new area, fading inside the original."),
            ],
        )

    @classmethod
    def validate_inputs(
        cls,
        left: int | None = None,
        top: int | None = None,
        right: int | None = None,
        bottom: int | None = None,
        fill: str | None = None,
    ) -> bool | str:
        for side, pixels in zip(SIDES, (left, top, right, bottom), strict=True):
            if pixels is not None and pixels < 0:
                return f"{side} is {pixels}, but padding can only add pixels; crop the picture first."
        if fill is not None and fill not in FILLS:
            return f"There is no fill {fill!r}; choose one of {', '.join(FILLS)}."
        return True

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
    ) -> io.NodeOutput:
        padded = pad(
            image, Padding(left, top, right, bottom), feather, FillMethod(fill), on_image=image_progress("Padding")
        )
        return io.NodeOutput(padded.image, padded.mask)


NODES = [MendOutpaintPad]
