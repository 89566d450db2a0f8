"""MendFill: a hole filled without a model."""

from __future__ import annotations

from comfy_api.latest import io
from torch import Tensor

from ..engine import masks
from ..engine.fill import MAX_RADIUS, FillMethod, fill
from ..engine.images import pair
from ..engine.masks import MAX_PIXELS
from ..engine.types import MAX_SEED
from .progress import image_progress

METHODS = [method.value for method in FillMethod]


class MendFill(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendFill",
            display_name="Fill (Mend)",
            category="Mend",
            description=(
                "Fills what the mask marks from its surroundings, without a model. PatchMatch removes objects by"
                " copying fitting texture from elsewhere in the picture; the others make a start for an inpainting"
                " model. Every pixel outside the mask stays exactly as it came."
            ),
            search_aliases=[
                "remove object",
                "object removal",
                "erase",
                "content-aware fill",
                "infill",
                "patchmatch",
                "telea",
                "navier-stokes",
                "cv2 inpaint",
                "fill masked area",
            ],
            inputs=[
                io.Image.Input("image", tooltip="The picture, or a batch of pictures; any size."),
                io.Mask.Input(
                    "mask",
                    tooltip=(
                        "White (1) is filled, black (0) stays untouched, grey mixes. Cover the whole object and its"
                        " shadow."
                    ),
                ),
                io.Combo.Input(
                    "method",
                    options=METHODS,
                    default=FillMethod.PATCHMATCH.value,
                    tooltip=(
                        "patchmatch: copies fitting texture, for removing objects. telea, navier-stokes: small spots"
                        " and scratches. blur: colours flow in smoothly. edge: repeats the nearest pixels."
                        " neutral: grey, for inpainting models."
                    ),
                ),
                io.Int.Input(
                    "radius",
                    default=0,
                    min=0,
                    max=MAX_RADIUS,
                    optional=True,
                    tooltip=(
                        "patchmatch: half the size of the patches compared; larger follows larger structures, slower."
                        " telea, navier-stokes: how far to look for colours. 0 takes the method's own (3, 5, 5)."
                    ),
                    advanced=True,
                ),
                io.Int.Input(
                    "grow",
                    default=0,
                    min=0,
                    max=MAX_PIXELS,
                    optional=True,
                    tooltip="Pixels to grow the mask by first; raise it when an outline of the object remains.",
                    advanced=True,
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    optional=True,
                    control_after_generate=False,
                    tooltip="Another seed gives another patchmatch result; the same seed repeats it.",
                    advanced=True,
                ),
            ],
            outputs=[io.Image.Output("image", tooltip="The picture with the masked area filled.")],
        )

    @classmethod
    def validate_inputs(cls, method: str | None = None) -> bool | str:
        if method is not None and method not in METHODS:
            return f"There is no fill method {method!r}; choose one of {', '.join(METHODS)}."
        return True

    @classmethod
    def execute(
        cls, image: Tensor, mask: Tensor, method: str, radius: int = 0, grow: int = 0, seed: int = 0
    ) -> io.NodeOutput:
        image, mask = pair(image, mask)
        if grow > 0:
            mask = masks.grow(mask, grow)
        filled = fill(
            image,
            mask,
            FillMethod(method),
            radius=radius or None,
            seed=seed,
            on_image=image_progress("Filling"),
        )
        return io.NodeOutput(filled)


NODES = [MendFill]
