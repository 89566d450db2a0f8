"""MendFill and MendLoadFillModel: a hole filled without a diffusion model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import folder_paths
from comfy_api.latest import io
from torch import Tensor

from ..engine import masks
from ..engine.fill import MAX_RADIUS, FillMethod, fill
from ..engine.images import pair
from ..engine.masks import MAX_PIXELS
from ..engine.models.fill_model import FOLDER, SUPPORTED, FillModel, find_fill_models, load_fill_model
from ..engine.types import MAX_SEED, ModelFileError
from .comfy_host import ComfyHost, OnWire
from .convert import FillModelType, connected
from .progress import part_progress

METHODS = [method.value for method in FillMethod]
NO_MODELS = "no fill model found"
FOLDER_HINT = (
    "put the file into models/inpaint and reload the page; LaMa is published as big-lama.pt (turn it into .safetensors"
    " with `mend models convert`), MAT as MAT_Places512_G_fp16.safetensors"
)


@dataclass(frozen=True, eq=False)
class LoadedFillModel(OnWire):
    """What travels on a MEND_FILL_MODEL wire."""

    network: FillModel
    host: ComfyHost = field(default_factory=ComfyHost)


def as_network(fill_model: LoadedFillModel | None) -> FillModel | None:
    if fill_model is None:
        return None
    return connected("fill_model", fill_model, LoadedFillModel, "Load Fill Model (Mend)").network


def find_models() -> dict[str, Path]:
    """The files of models/inpaint; other packs and extra_model_paths.yaml may have said where that is."""
    if FOLDER not in folder_paths.folder_names_and_paths:
        folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))
    return find_fill_models(ComfyHost())


class MendLoadFillModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendLoadFillModel",
            display_name="Load Fill Model (Mend)",
            category="Mend",
            description=(
                f"Loads {SUPPORTED}, networks that remove objects and fill holes in one pass, from models/inpaint, for"
                " Fill (Mend)."
            ),
            search_aliases=["lama", "big-lama", "mat", "load inpaint model", "object removal", "spandrel"],
            inputs=[
                io.Combo.Input(
                    "fill_model",
                    options=list(find_models()) or [NO_MODELS],
                    tooltip=f"A file of models/inpaint. To add one, {FOLDER_HINT}.",
                ),
            ],
            outputs=[FillModelType.Output("fill_model", tooltip="For Fill (Mend), with its method lama or mat.")],
        )

    @classmethod
    def validate_inputs(cls, fill_model: str | None = None) -> bool | str:
        found = find_models()
        if fill_model is None or fill_model in found:
            return True
        if not found:
            return f"No fill model found: {FOLDER_HINT}."
        return f"There is no fill model {fill_model!r} in models/inpaint; choose one of {', '.join(list(found)[:5])}."

    @classmethod
    def fingerprint_inputs(cls, fill_model: str) -> str:
        path = find_models().get(fill_model)
        return "" if path is None else f"{path.stat().st_mtime_ns}:{path.stat().st_size}"

    @classmethod
    def execute(cls, fill_model: str) -> io.NodeOutput:
        path = find_models().get(fill_model)
        if path is None:
            raise ModelFileError(f"{fill_model} is not there any more: choose another, or {FOLDER_HINT}.")
        host = ComfyHost()
        return io.NodeOutput(LoadedFillModel(load_fill_model(path, host), host))


class MendFill(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendFill",
            display_name="Fill (Mend)",
            category="Mend",
            description=(
                "Fills what the mask marks from its surroundings, without a diffusion model. PatchMatch removes objects"
                " by copying fitting texture from elsewhere in the picture, LaMa and MAT by networks made for it; the"
                " others make a start for an inpainting model. Every pixel outside the mask stays exactly as it came."
            ),
            search_aliases=[
                "remove object",
                "object removal",
                "erase",
                "content-aware fill",
                "infill",
                "patchmatch",
                "lama",
                "mat",
                "mirror",
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
                        "patchmatch: copies fitting texture, for removing objects. lama, mat: a network does it, with"
                        " fill_model connected. telea, navier-stokes: small spots and scratches. blur: colours flow in"
                        " smoothly; noise: with the grain of the surroundings. mirror: the surroundings reflected."
                        " edge: repeats the nearest pixels. neutral: grey, for inpainting models."
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
                    tooltip="Another seed gives another result of patchmatch, noise and mat; the same seed repeats it.",
                    advanced=True,
                ),
                FillModelType.Input(
                    "fill_model",
                    optional=True,
                    tooltip="From Load Fill Model (Mend), for the methods lama and mat; the others work without.",
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
        cls,
        image: Tensor,
        mask: Tensor,
        method: str,
        radius: int = 0,
        grow: int = 0,
        seed: int = 0,
        fill_model: LoadedFillModel | None = None,
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
            network=as_network(fill_model),
            on_progress=part_progress("Filling"),
        )
        return io.NodeOutput(filled)


NODES: list[type[io.ComfyNode]] = [MendLoadFillModel, MendFill]
