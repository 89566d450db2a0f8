"""MendCompare: what an edit changed, in numbers, and a run that stops when it was too much."""

from __future__ import annotations

import logging
from enum import Enum

from comfy_api.latest import io, ui
from torch import Tensor

from ..engine.compare import Limits, compare
from ..engine.heatmap import heatmaps
from .progress import image_progress

log = logging.getLogger("mend")


class OnFailure(str, Enum):
    """What becomes of a run that exceeds a limit."""

    STOP = "stop"
    WARN = "warn"


ACTIONS = [action.value for action in OnFailure]
UNCHECKED = -1.0
"""The value of ``max_outside`` that sets no limit; of the others 0 does."""


class MendCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendCompare",
            display_name="Compare (Mend)",
            category="Mend",
            description=(
                "Measures what an edit did to a picture: changes outside the mask, the seam, colour, shift and grain."
                " Stops the run when a limit is exceeded. Works with the results of any node; place it before Save"
                " Image, or at the end."
            ),
            search_aliases=[
                "compare images",
                "difference",
                "diff",
                "check inpaint",
                "quality check",
                "unchanged pixels",
                "seam",
                "delta e",
                "assert",
                "heatmap",
            ],
            inputs=[
                io.Image.Input("before", tooltip="The picture before the edit; after outpainting, the padded picture."),
                io.Image.Input("after", tooltip="The result, of the same size; or a batch of results."),
                io.Mask.Input("mask", tooltip="What was to be repainted (white); black was to stay."),
                io.Float.Input(
                    "max_outside",
                    default=0.0,
                    min=UNCHECKED,
                    max=1.0,
                    step=0.001,
                    round=False,
                    tooltip=(
                        "The largest change allowed where the mask is black. 0: not one bit. 0.004 is one level of 255."
                        " -1 does not check."
                    ),
                ),
                io.Combo.Input(
                    "on_failure",
                    options=ACTIONS,
                    default=OnFailure.STOP.value,
                    tooltip="stop: the run ends with the figures. warn: it goes on, and says so on the node.",
                ),
                *_optional_limits(),
            ],
            outputs=[
                io.Image.Output("images", tooltip="after, untouched: to be saved."),
                io.Boolean.Output("passed", tooltip="True when no limit was exceeded; for a switch."),
                io.String.Output(
                    "report",
                    tooltip="All figures of every picture as one JSON text: passed, failures, limits, images.",
                ),
                io.Image.Output(
                    "heatmap",
                    tooltip=(
                        "Where the pictures differ: changes outside the mask glow from purple to white, the edit is"
                        " blue; with a scale and the figures."
                    ),
                ),
            ],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, on_failure: str | None = None, max_outside: float | None = None) -> bool | str:
        if on_failure is not None and on_failure not in ACTIONS:
            return f"A failure cannot lead to {on_failure!r}; choose one of {', '.join(ACTIONS)}."
        if max_outside is not None and not (max_outside == UNCHECKED or 0 <= max_outside <= 1):
            return f"max_outside is {max_outside}; give a value from 0 to 1, or -1 to leave it unchecked."
        return True

    @classmethod
    def execute(
        cls,
        before: Tensor,
        after: Tensor,
        mask: Tensor,
        max_outside: float,
        on_failure: str,
        max_seam: float = 0,
        max_ring_delta_e: float = 0,
        max_shift: float = 0,
        min_grain: float = 0,
        max_grain: float = 0,
    ) -> io.NodeOutput:
        limits = Limits(
            outside=None if max_outside == UNCHECKED else max_outside,
            seam=max_seam or None,
            ring=max_ring_delta_e or None,
            shift=max_shift or None,
            grain_low=min_grain or None,
            grain_high=max_grain or None,
        )
        comparison = compare(before, after, mask, limits, on_image=image_progress("Comparing"))
        if OnFailure(on_failure) is OnFailure.STOP:
            comparison.enforce()
        for sentence in comparison.failures:
            log.warning(sentence)
        return io.NodeOutput(
            after,
            comparison.passed,
            comparison.to_json(),
            heatmaps(before, after, mask, comparison),
            ui=ui.PreviewText(str(comparison)),
        )


def _optional_limits() -> list[io.Input]:
    limits = (
        (
            "max_seam",
            100,
            "The seam: contrast on the mask's contour over that on lines 8 pixels beside it. 1 is invisible.",
        ),
        (
            "max_ring_delta_e",
            100,
            "The colour step across the contour in CIEDE2000; 1 can just be seen, texture makes up to 4.",
        ),
        ("max_shift", 100, "Pixels by which what is outside the mask may have moved."),
        ("min_grain", 100, "The grain inside the mask over that around it; 1 is even, below 0.5 looks smooth."),
        ("max_grain", 100, "The same, at most."),
    )
    return [
        io.Float.Input(
            name,
            default=0.0,
            min=0.0,
            max=highest,
            step=0.05,
            optional=True,
            tooltip=f"{tooltip} 0 does not check.",
            advanced=True,
        )
        for name, highest, tooltip in limits
    ]


NODES = [MendCompare]
