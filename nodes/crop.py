"""MendCropToMask and MendStitch, with any sampler between them; MendSaveCrop and MendLoadCrop between two runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..engine.crop import KEEP_SCALE, MAX_ASPECT, MIN_CONTEXT, CanvasSize, CropOptions, Overflow, target_of
from ..engine.crop_record import CropRecord, load, save
from ..engine.crop_stitch import Separate, crop_to_mask, stitch_crops
from ..engine.fill import NETWORKS, FillMethod
from ..engine.images import check_tensor
from ..engine.regions import MAX_SMOOTHING, Video
from ..engine.stitch import StitchOptions
from ..engine.types import MAX_SEED, MAX_SIDE, Blend, InputError, Size
from .convert import CropType, connected
from .progress import image_progress
from .text import show

RECORDS = "mend-crops"
"""Folder of saved records, in ComfyUI's output folder or its input folder."""
FILLS = [method.value for method in FillMethod if method not in NETWORKS]
CHOICES = {
    "size": [choice.value for choice in CanvasSize],
    "regions": [choice.value for choice in Separate],
    "video": [choice.value for choice in Video],
    "overflow": [choice.value for choice in Overflow],
    "fill": FILLS,
}
BLENDS = [blend.value for blend in Blend]


class MendCropToMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendCropToMask",
            display_name="Crop to Mask (Mend)",
            category="Mend",
            description=(
                "Cuts out the mask's surroundings at a size that suits the model, for any sampler. Stitch (Mend) puts"
                " the painted crop back; every pixel outside the mask stays exactly as it came, and a crop that comes"
                " back untouched changes nothing at all."
            ),
            search_aliases=[
                "crop",
                "crop and stitch",
                "inpaint crop",
                "only masked",
                "masked area",
                "detailer",
                "context",
                "zoom",
                "bounding box",
                "video inpainting",
                "split mask",
            ],
            inputs=[
                io.Image.Input("image", tooltip="The picture, or a batch of pictures or frames; any size."),
                io.Mask.Input(
                    "mask",
                    tooltip=(
                        "White (1) marks what the sampler may paint. One for all pictures or one for each; several"
                        " masks for one picture give a crop and a result for each. Without any the crop is the whole"
                        " picture."
                    ),
                    optional=True,
                ),
                io.Float.Input(
                    "context_factor",
                    default=1.5,
                    min=1.0,
                    max=20.0,
                    step=0.05,
                    tooltip=(
                        "The crop is this many times as wide and as high as the mask: 1.5 shows a quarter of the"
                        " mask's width on its left and a quarter on its right. 1 shows the mask alone."
                    ),
                ),
                io.Combo.Input(
                    "size",
                    options=CHOICES["size"],
                    default=CanvasSize.MEGAPIXELS.value,
                    tooltip=(
                        "What the crop is scaled to. own: nothing, pixel for pixel. exact: width x height. megapixels:"
                        " that area in the crop's own shape. sdxl, sd15, sd2: the nearest of the sizes the model was"
                        " trained on."
                    ),
                ),
                io.Float.Input(
                    "megapixels",
                    default=1.0,
                    min=0.01,
                    max=64.0,
                    step=0.01,
                    tooltip="For the size megapixels: 1 is 1024 x 1024 pixels, 0.25 is 512 x 512.",
                ),
                io.Int.Input(
                    "width", default=1024, min=8, max=MAX_SIDE, step=8, tooltip="For the size exact.", advanced=True
                ),
                io.Int.Input(
                    "height", default=1024, min=8, max=MAX_SIDE, step=8, tooltip="For the size exact.", advanced=True
                ),
                io.Combo.Input(
                    "regions",
                    options=CHOICES["regions"],
                    default=Separate.TOGETHER.value,
                    optional=True,
                    tooltip=(
                        "together: one crop holds all that is masked. each: separate places get crops of their own,"
                        " the sampler runs for each, and Stitch (Mend) puts all of them into one picture."
                    ),
                ),
                io.Combo.Input(
                    "video",
                    options=CHOICES["video"],
                    default=Video.OFF.value,
                    optional=True,
                    tooltip=(
                        "How the crops of a batch move. off: each picture for itself. union: one place that holds the"
                        " masks of all frames. smoothed: one size that follows the mask without trembling."
                    ),
                ),
                io.Mask.Input(
                    "stitch_mask",
                    optional=True,
                    tooltip=(
                        "What of the painted crop comes back, where that differs from the mask: a feathered one, for"
                        " example. Without it the mask decides."
                    ),
                ),
                io.Mask.Input(
                    "context_mask",
                    optional=True,
                    tooltip="Marks what the sampler must see too: the other eye, the light, the horizon.",
                ),
                io.Int.Input(
                    "context_pixels",
                    default=MIN_CONTEXT,
                    min=0,
                    max=MAX_SIDE,
                    optional=True,
                    tooltip="Pixels shown on each side at least, where the factor gives fewer.",
                    advanced=True,
                ),
                io.Int.Input(
                    "min_size",
                    default=512,
                    min=0,
                    max=MAX_SIDE,
                    optional=True,
                    tooltip="The crop takes in at least this many pixels each way, where the picture has room.",
                    advanced=True,
                ),
                io.Float.Input(
                    "max_aspect",
                    default=MAX_ASPECT,
                    min=1.0,
                    max=100.0,
                    step=0.1,
                    optional=True,
                    tooltip="A longer crop takes in more on its short side.",
                    advanced=True,
                ),
                io.Int.Input(
                    "multiple",
                    default=8,
                    min=1,
                    max=1024,
                    optional=True,
                    tooltip="The crop's width and height are multiples of it: 8 for most models, 16 for FLUX and SD3.",
                    advanced=True,
                ),
                io.Float.Input(
                    "keep_scale",
                    default=KEEP_SCALE,
                    min=0.0,
                    max=0.9,
                    step=0.05,
                    optional=True,
                    tooltip=(
                        "A crop whose area is within this share of the size asked for is not scaled at all, which"
                        " keeps every detail. 0 always scales."
                    ),
                    advanced=True,
                ),
                io.Combo.Input(
                    "overflow",
                    options=CHOICES["overflow"],
                    default=Overflow.INSIDE.value,
                    optional=True,
                    tooltip=(
                        "Where the crop needs more room than the picture has. inside: it moves inside, or gets smaller."
                        " extend: it moves inside, or shows the fill beyond the border."
                    ),
                    advanced=True,
                ),
                io.Combo.Input(
                    "fill",
                    options=FILLS,
                    default=FillMethod.EDGE.value,
                    optional=True,
                    tooltip="What extend shows beyond the picture's border.",
                    advanced=True,
                ),
                io.Boolean.Input(
                    "mask_outside",
                    default=False,
                    optional=True,
                    tooltip="Lets the sampler paint what extend adds; it helps the picture but never comes back.",
                    advanced=True,
                ),
                io.Float.Input(
                    "smoothing",
                    default=8.0,
                    min=0.0,
                    max=MAX_SMOOTHING,
                    step=0.5,
                    optional=True,
                    tooltip="For smoothed video: frames over which the movement is evened out.",
                    advanced=True,
                ),
            ],
            outputs=[
                io.Image.Output(
                    "image",
                    is_output_list=True,
                    tooltip="The crops: batches of one size each; with each region its own.",
                ),
                io.Mask.Output("mask", is_output_list=True, tooltip="The sampler's masks of the crops."),
                CropType.Output("crop", tooltip="For Stitch (Mend): how the crops go back."),
                io.String.Output("info", tooltip="One line for each crop: place, size, scale."),
            ],
        )

    @classmethod
    def validate_inputs(
        cls,
        size: str | None = None,
        regions: str | None = None,
        video: str | None = None,
        overflow: str | None = None,
        fill: str | None = None,
    ) -> bool | str:
        given = {"size": size, "regions": regions, "video": video, "overflow": overflow, "fill": fill}
        for name, value in given.items():
            if value is not None and value not in CHOICES[name]:
                return f"There is no {name} {value!r}; choose one of {', '.join(CHOICES[name])}."
        return True

    @classmethod
    def execute(
        cls,
        image: Tensor,
        context_factor: float,
        size: str,
        megapixels: float,
        width: int,
        height: int,
        mask: Tensor | None = None,
        regions: str = Separate.TOGETHER.value,
        video: str = Video.OFF.value,
        stitch_mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        smoothing: float = 8.0,
        **options: Any,
    ) -> io.NodeOutput:
        cropped = crop_to_mask(
            image,
            mask,
            CropOptions(
                context_factor=context_factor,
                target=target_of(CanvasSize(size), Size(width, height), megapixels),
                **options,
            ),
            stitch_mask=stitch_mask,
            context_mask=context_mask,
            separate=Separate(regions),
            video=Video(video),
            smoothing=smoothing,
            on_image=image_progress("Cropping"),
        )
        return io.NodeOutput(list(cropped.crops), list(cropped.masks), cropped.record, "\n".join(cropped.reports))


class MendStitch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendStitch",
            display_name="Stitch (Mend)",
            category="Mend",
            description=(
                "Puts painted crops back where Crop to Mask (Mend) cut them, all regions into one picture, and joins"
                " them so that nobody sees where they begin. Every pixel outside the mask stays exactly as it came."
            ),
            search_aliases=[
                "stitch",
                "inpaint stitch",
                "uncrop",
                "paste back",
                "composite",
                "blend",
                "poisson",
                "seamless",
                "color match",
            ],
            is_input_list=True,
            inputs=[
                io.Image.Input(
                    "image",
                    tooltip=(
                        "The painted crops, at their size or upscaled as a whole. Several paintings of each crop make"
                        " several pictures."
                    ),
                ),
                CropType.Input("crop", tooltip="From Crop to Mask (Mend) or Load Crop (Mend)."),
                io.Image.Input(
                    "original",
                    optional=True,
                    tooltip=(
                        "The picture to put them into: needed after Load Crop (Mend), else the one that was cut is"
                        " used."
                    ),
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip=(
                        "What of the painted crops comes back, in the crops' own pixels, where that is known only now:"
                        " what an edit model changed. It never reaches beyond the mask they were cut by."
                    ),
                ),
                io.Combo.Input(
                    "blend",
                    options=BLENDS,
                    default=Blend.AUTO.value,
                    optional=True,
                    tooltip=(
                        "auto measures the seam and picks. linear mixes by the mask. multiband joins coarse structure"
                        " softly and detail sharply. poisson takes the tone from the rim."
                    ),
                ),
                io.Float.Input(
                    "color_match",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip="How much of the tone difference measured around the mask is taken off.",
                ),
                io.Boolean.Input(
                    "register",
                    default=False,
                    optional=True,
                    tooltip="Measure whether the model moved the picture, and move it back; for edit models.",
                    advanced=True,
                ),
                io.Float.Input(
                    "grain",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    optional=True,
                    tooltip="How much of the surroundings' grain is added where the painted part is smoother.",
                    advanced=True,
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    optional=True,
                    control_after_generate=False,
                    tooltip="Decides the grain.",
                    advanced=True,
                ),
            ],
            outputs=[
                io.Image.Output("image", tooltip="The pictures, at their own size."),
                io.String.Output("report", tooltip="One line for each picture: what was measured and done."),
            ],
        )

    @classmethod
    def validate_inputs(cls, blend: list[str | None] | str | None = None) -> bool | str:
        for value in blend if isinstance(blend, list) else [blend]:
            if value is not None and value not in BLENDS:
                return f"There is no blend {value!r}; choose one of {', '.join(BLENDS)}."
        return True

    @classmethod
    def execute(
        cls,
        image: list[Tensor],
        crop: list[CropRecord],
        original: list[Tensor] | None = None,
        mask: list[Tensor] | None = None,
        **options: list[Any],
    ) -> io.NodeOutput:
        stitched = stitch_crops(
            connected("crop", _only("crop", crop), CropRecord, "Crop to Mask (Mend)"),
            image,
            _one_batch(original) if original else None,
            StitchOptions(**{name: _only(name, values) for name, values in options.items()}),
            masks=mask,
            on_image=image_progress("Stitching"),
        )
        return io.NodeOutput(stitched.images, "\n".join(stitched.reports), ui=show(stitched.notices))


class MendSaveCrop(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendSaveCrop",
            display_name="Save Crop (Mend)",
            category="Mend",
            description=(
                "Writes how crops go back to the output folder, as JSON and 16-bit masks, so that they can be painted"
                " today and stitched tomorrow. The pictures are not part of it: save the crops with Save Image."
            ),
            search_aliases=["save crop", "save stitcher", "export crop", "crop record"],
            is_output_node=True,
            inputs=[
                CropType.Input("crop", tooltip="From Crop to Mask (Mend)."),
                io.String.Input(
                    "filename_prefix",
                    default="crop",
                    tooltip=f"What the files are called, in output/{RECORDS}; may name a folder in it: cats/crop.",
                ),
            ],
            outputs=[],
        )

    @classmethod
    def execute(cls, crop: CropRecord, filename_prefix: str) -> io.NodeOutput:
        crop = connected("crop", crop, CropRecord, "Crop to Mask (Mend)")
        prefix = Path(filename_prefix.strip() or "crop")
        if prefix.is_absolute() or ".." in prefix.parts or "\\" in filename_prefix:
            raise InputError(
                f"The prefix {filename_prefix!r} leaves the folder output/{RECORDS}; give a plain name like cats/crop."
            )
        folder = Path(folder_paths.get_output_directory(), RECORDS)
        target, name, counter, subfolder, _ = folder_paths.get_save_image_path(str(prefix), str(folder), *crop.size)
        file = save(crop, Path(target) / f"{name}_{counter:05}_.json")
        return io.NodeOutput(ui=ui.PreviewText(f"{Path(subfolder, file.name).as_posix()} [output]"))


class MendLoadCrop(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendLoadCrop",
            display_name="Load Crop (Mend)",
            category="Mend",
            description=(
                "Reads what Save Crop (Mend) wrote. Connect the painted crops, this, and the original picture to"
                " Stitch (Mend)."
            ),
            search_aliases=["load crop", "load stitcher", "import crop", "crop record"],
            inputs=[
                io.Combo.Input(
                    "record",
                    options=list(find_records()),
                    tooltip=f"A record in output/{RECORDS} or input/{RECORDS}; reload the page to see new ones.",
                )
            ],
            outputs=[CropType.Output("crop", tooltip="For Stitch (Mend), which then needs the original picture.")],
        )

    @classmethod
    def validate_inputs(cls, record: str | None = None) -> bool | str:
        if record is None or record in find_records():
            return True
        return f"There is no crop record {record!r}; choose one from the menu, or make one with Save Crop (Mend)."

    @classmethod
    def fingerprint_inputs(cls, record: str) -> str:
        file = find_records().get(record)
        return "" if file is None else f"{file}:{file.stat().st_mtime_ns}"

    @classmethod
    def execute(cls, record: str) -> io.NodeOutput:
        return io.NodeOutput(load(find_records()[record]))


def find_records() -> dict[str, Path]:
    """Saved records by what the menu calls them; only what is listed here is ever opened."""
    roots = {"output": folder_paths.get_output_directory(), "input": folder_paths.get_input_directory()}
    found = {}
    for label, root in roots.items():
        folder = Path(root, RECORDS)
        for file in sorted(folder.rglob("*.json")):
            found[f"{file.relative_to(folder).as_posix()} [{label}]"] = file
    return found


def _only(name: str, values: list[Any]) -> Any:
    """The one value of an input that does not come in lists."""
    if len(values) != 1:
        raise InputError(f"Stitch (Mend) takes one {name}, but {len(values)} came in a list; connect a single one.")
    return values[0]


def _one_batch(originals: list[Tensor]) -> Tensor:
    for batch in originals:
        check_tensor("original", batch)
    if len({tuple(batch.shape[1:]) for batch in originals}) > 1:
        raise InputError("The originals came as a list of pictures of several sizes; connect the batch that was cut.")
    return originals[0] if len(originals) == 1 else torch.cat(originals)


NODES = [MendCropToMask, MendStitch, MendSaveCrop, MendLoadCrop]
