"""Nodes around ComfyUI's own models: MendWrapModel, MendSampler, MendInpaintConditioning and MendControlHint."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..engine.images import as_masks, pair, size_of
from ..engine.masks import snap_to_grid, to_latent_grid
from ..engine.types import InputError, Sigmas
from .conditioning import with_values
from .convert import ModelType, wired
from .inpaint import MendInpaint
from .native import wrap
from .native_sampler import ScheduledSampler, sigmas_for

HOLE_AT = 0.5
"""Mask value from which ControlNets made for inpainting are shown a hole."""


class MendWrapModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendWrapModel",
            display_name="Wrap Model (Mend)",
            category="Mend",
            description=(
                "Makes ComfyUI's own MODEL, CLIP and VAE paint in Inpaint (Mend): checkpoints of every family ComfyUI"
                " loads, with the LoRAs, ControlNets, IP-Adapters and patches that are on them."
            ),
            search_aliases=[
                "native",
                "checkpoint",
                "convert",
                "adapter",
                "SDXL",
                "FLUX",
                "Qwen",
                "MODEL to MEND_MODEL",
            ],
            inputs=[
                io.Model.Input("model", tooltip="From Load Checkpoint, Load Diffusion Model, LoRA loaders, ..."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model."),
                io.Clip.Input(
                    "clip",
                    tooltip="Reads the prompts. Not needed where Inpaint (Mend) is given conditioning.",
                    optional=True,
                ),
                io.Int.Input(
                    "native_size",
                    default=0,
                    min=0,
                    max=4096,
                    step=8,
                    tooltip="Side in pixels of the pictures the model was trained on; 0 is what its family uses.",
                    optional=True,
                    advanced=True,
                ),
            ],
            outputs=[ModelType.Output("model", tooltip="For Inpaint (Mend) and Outpaint (Mend).")],
        )

    @classmethod
    def execute(cls, model: Any, vae: Any, clip: Any = None, native_size: int = 0) -> io.NodeOutput:
        model = wired("model", model, "Load Checkpoint")
        return io.NodeOutput(wrap(model, wired("vae", vae, "Load VAE"), wired("clip", clip, "Load CLIP"), native_size))


class MendSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        inpainting = {widget.id: widget for widget in MendInpaint.define_schema().inputs}
        return io.Schema(
            node_id="MendSampler",
            display_name="Sampler (Mend)",
            category="Mend",
            description=(
                "The schedulers of Inpaint (Mend) for a graph of your own: connect both outputs to Sampler Custom"
                " (Advanced). Starts as diffusers does, and puts the kept area back after every step."
            ),
            search_aliases=["scheduler", "sigmas", "KSampler", "custom sampler", "diffusers", "DDIM", "PNDM", "UniPC"],
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled; its noise levels are read."),
                inpainting["scheduler"],
                inpainting["steps"],
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="The share of the steps that run; 1 starts from pure noise.",
                ),
                inpainting["sigmas"],
                io.Latent.Input(
                    "latent",
                    tooltip="What will be sampled: for models whose noise levels depend on the size (FLUX).",
                    optional=True,
                ),
            ],
            outputs=[
                io.Sampler.Output("sampler", tooltip="For the sampler input of Sampler Custom (Advanced)."),
                io.Sigmas.Output("sigmas", tooltip="For its sigmas input; the sampler runs these and no others."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        scheduler: str,
        steps: int,
        strength: float,
        sigmas: str = Sigmas.DEFAULT.value,
        latent: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        model = wired("model", model, "Load Checkpoint")
        sampler = ScheduledSampler(model, scheduler, steps, strength, Sigmas(sigmas))
        return io.NodeOutput(sampler, sigmas_for(sampler, None if latent is None else latent["samples"]))


class MendInpaintConditioning(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendInpaintConditioning",
            display_name="Inpaint Conditioning (Mend)",
            category="Mend",
            description=(
                "Conditioning and latent of a prepared mask for a sampler of your own: the model is shown nothing that"
                " the mask touches, and no stroke is too thin to survive on the latent grid."
            ),
            search_aliases=["inpaint model conditioning", "VAE encode for inpainting", "noise mask", "latent"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="What the masked area should show."),
                io.Conditioning.Input("negative", tooltip="What it should not show."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model."),
                io.Image.Input("image", tooltip="Sides in multiples of the VAE's cells, as Crop to Mask (Mend) gives."),
                io.Mask.Input("mask", tooltip="Where to paint: the sampler mask of Prepare Mask (Mend)."),
                io.Boolean.Input(
                    "noise_mask",
                    default=True,
                    tooltip=(
                        "Keep what is outside the mask while sampling. Needed by ordinary models; models made for"
                        " inpainting do without."
                    ),
                    optional=True,
                ),
            ],
            outputs=[
                io.Conditioning.Output("positive", tooltip="With the picture around the hole, for inpainting models."),
                io.Conditioning.Output("negative", tooltip="The same for what to avoid."),
                io.Latent.Output("latent", tooltip="The picture, with the mask as its noise mask if asked for."),
            ],
        )

    @classmethod
    def execute(
        cls, positive: Any, negative: Any, vae: Any, image: Any, mask: Any, noise_mask: bool = True
    ) -> io.NodeOutput:
        positive, negative = (
            wired(name, cond, "CLIP Text Encode") for name, cond in (("positive", positive), ("negative", negative))
        )
        vae = wired("vae", vae, "Load VAE")
        image, mask = pair(image, mask)
        cell = int(vae.spacial_compression_encode())
        size = size_of(image)
        if size.width % cell or size.height % cell:
            raise InputError(
                f"The picture is {size} and the VAE needs multiples of {cell}: use Crop to Mask (Mend), which gives"
                " them, and Stitch (Mend) afterwards."
            )
        hole = (mask > 0).to(mask)
        picture = image[..., :3]
        values = {
            "concat_latent_image": vae.encode(picture * (1 - hole[..., None]) + 0.5 * hole[..., None]),
            # by cells: ComfyUI looks at the middle of each only
            "concat_mask": snap_to_grid(hole, cell)[:, None],
        }
        latent = {"samples": vae.encode(picture)}
        if noise_mask:
            latent["noise_mask"] = to_latent_grid(mask, cell)
        return io.NodeOutput(with_values(positive, **values), with_values(negative, **values), latent)


class MendControlHint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendControlHint",
            display_name="Inpaint Hint (Mend)",
            category="Mend",
            description=(
                "The hint for ControlNets made for inpainting: the picture, with -1 where the mask is. Connect it"
                " straight to Apply ControlNet; a node in between that saves or resizes would lose the negative values."
            ),
            search_aliases=["controlnet inpaint", "control_v11p_sd15_inpaint", "inpaint preprocessor", "hint"],
            inputs=[
                io.Image.Input("image", tooltip="The picture that is inpainted."),
                io.Mask.Input("mask", tooltip="From one half up a pixel is part of the hole."),
            ],
            outputs=[io.Image.Output("hint", tooltip="For the image input of Apply ControlNet.")],
        )

    @classmethod
    def execute(cls, image: Any, mask: Any) -> io.NodeOutput:
        image, mask = pair(image, mask)
        hole = as_masks(mask, image)[..., None] >= HOLE_AT
        return io.NodeOutput(torch.where(hole, -1.0, image[..., :3]))


NODES = [MendWrapModel, MendSampler, MendInpaintConditioning, MendControlHint]
