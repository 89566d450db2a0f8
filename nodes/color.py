"""MendColorMatch: one picture in the colours of another."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from ..engine.color import ApplyTo, ColorMatch, match_around
from ..engine.types import InputError
from .progress import image_progress

METHODS = [method.value for method in ColorMatch]
AREAS = [area.value for area in ApplyTo]


class MendColorMatch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendColorMatch",
            display_name="Color Match (Mend)",
            category="Mend",
            description=(
                "Gives a picture the colours of a reference. With a mask, what was repainted is left out of the"
                " measurement, so an edit's colour shift is taken off exactly, however large the edit."
            ),
            search_aliases=[
                "color match",
                "colour match",
                "color transfer",
                "color correct",
                "match colors",
                "histogram matching",
                "reinhard",
                "tone match",
                "color shift",
            ],
            inputs=[
                io.Image.Input("image", tooltip="The picture to change, or a batch; any size."),
                io.Image.Input(
                    "reference", tooltip="The picture whose colours are wanted: after inpainting, the original."
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip=(
                        "What was repainted (white): it does not count, because it is meant to differ. It is left out"
                        " of the reference too where both pictures have one size."
                    ),
                ),
                io.Combo.Input(
                    "method",
                    options=METHODS,
                    default=ColorMatch.MKL.value,
                    tooltip=(
                        "mkl: means and how channels vary together, best against the shifts that models make. reinhard:"
                        " mean and contrast in Lab, for a look. histogram: the whole distribution of each channel, also"
                        " undoes curves; strong between different scenes."
                    ),
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How far the colours go; 0 is not at all.",
                ),
                io.Combo.Input(
                    "apply_to",
                    options=AREAS,
                    default=ApplyTo.WHOLE.value,
                    optional=True,
                    tooltip=(
                        "whole: every pixel changes. mask: only what the mask marks, the rest stays exactly as it came."
                    ),
                    advanced=True,
                ),
                io.Float.Input(
                    "max_shift",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    optional=True,
                    tooltip="The most that a channel may change, of 1; 1 sets no limit, 0.06 is 16 levels of 255.",
                    advanced=True,
                ),
            ],
            outputs=[io.Image.Output("image", tooltip="The picture in the reference's colours.")],
        )

    @classmethod
    def validate_inputs(cls, method: str | None = None, apply_to: str | None = None) -> bool | str:
        if method is not None and method not in METHODS:
            return f"There is no colour match {method!r}; choose one of {', '.join(METHODS)}."
        if apply_to is not None and apply_to not in AREAS:
            return f"Colours cannot be applied to {apply_to!r}; choose one of {', '.join(AREAS)}."
        return True

    @classmethod
    def execute(
        cls,
        image: Tensor,
        reference: Tensor,
        method: str,
        strength: float,
        mask: Tensor | None = None,
        apply_to: str = ApplyTo.WHOLE.value,
        max_shift: float = 1.0,
    ) -> io.NodeOutput:
        if mask is None and apply_to == ApplyTo.MASK:
            raise InputError("apply_to is mask, but no mask is connected; connect one, or choose whole.")
        matched = match_around(
            image,
            reference,
            mask,
            ColorMatch(method),
            apply_to=ApplyTo(apply_to),
            strength=strength,
            max_shift=max_shift,
            on_image=image_progress("Matching colours"),
        )
        return io.NodeOutput(matched)


NODES = [MendColorMatch]
