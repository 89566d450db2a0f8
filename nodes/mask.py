"""MendPrepareMask: from what was painted to what should be repainted."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from ..engine.images import as_mask_batch
from ..engine.masks import MAX_PIXELS, MaskOptions, prepare
from .progress import image_progress


class MendPrepareMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendPrepareMask",
            display_name="Prepare Mask (Mend)",
            category="Mend",
            description=(
                "Grows a mask by exact pixels and softens its edge outwards, so that what you painted stays fully"
                " masked. In this order: threshold, invert, fill holes, grow, feather. Grey masks stay grey."
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
            ],
            outputs=[io.Mask.Output("mask", tooltip="The prepared mask, as many as came in and of the same size.")],
        )

    @classmethod
    def execute(
        cls, mask: Tensor, grow: int, feather: int, invert: bool, fill_holes: bool, threshold: float
    ) -> io.NodeOutput:
        options = MaskOptions(threshold=threshold, invert=invert, fill_holes=fill_holes, grow=grow, feather=feather)
        return io.NodeOutput(prepare(as_mask_batch(mask), options, image_progress("Preparing masks")))


NODES = [MendPrepareMask]
