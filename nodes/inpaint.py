"""MendInpaint: the sampler."""

from __future__ import annotations

import logging
from typing import Any

from comfy_api.latest import io

from ..engine.inpaint import inpaint
from ..engine.models.protocol import InpaintModel
from ..engine.schedulers import SCHEDULERS
from ..engine.types import MAX_SEED, MAX_SIDE, Blend, Compat, Crop, InpaintRequest, InputError, Sigmas
from .adapters import Controls, as_controls
from .comfy_host import MendModel
from .convert import ControlType, ModelType, connected, wired
from .native import NativeModel
from .text import show

log = logging.getLogger("mend")


class MendInpaint(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendInpaint",
            display_name="Inpaint (Mend)",
            category="Mend",
            description=(
                "Repaints what the mask marks and returns every other pixel exactly as it came. Works at any picture"
                " size: the mask's surroundings are cropped to the size the model was trained on, painted, matched in"
                " colour and pasted back."
            ),
            search_aliases=["inpaint", "inpainting", "sampler", "stable diffusion", "repaint", "edit", "fill", "erase"],
            inputs=[
                ModelType.Input("model", tooltip="From Load Model (Mend), or ComfyUI's own through Wrap Model (Mend)."),
                io.Image.Input("image", tooltip="The picture, or a batch of pictures; any size."),
                io.Mask.Input(
                    "mask",
                    tooltip=(
                        "White (1) is repainted, black (0) is returned untouched, grey mixes. One mask for all"
                        " pictures, or one for each."
                    ),
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="What the masked area should show. (word:1.2) gives emphasis; embedding:name works too.",
                ),
                io.String.Input(
                    "negative_prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="",
                    tooltip="What it should not show. Unused when guidance_scale is 1 or less.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=list(SCHEDULERS),
                    default="DPMSolverMultistep",
                    tooltip="The solver that takes the picture from noise to clean.",
                ),
                io.Int.Input("steps", default=25, min=1, max=500, tooltip="Denoising steps; 20 to 30 suit most."),
                io.Float.Input(
                    "guidance_scale",
                    default=7.5,
                    min=0.0,
                    max=50.0,
                    step=0.1,
                    tooltip="How strictly the prompt is followed. At 1 or less it runs twice as fast, unguided.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="1 replaces the masked area; lower keeps more of what was there; 0 returns the input.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="The same seed makes the same picture. Picture i of a run uses seed + i.",
                ),
                io.Int.Input(
                    "count",
                    default=1,
                    min=1,
                    max=64,
                    optional=True,
                    tooltip="Pictures to make from each input picture.",
                ),
                io.Int.Input(
                    "width",
                    default=0,
                    min=0,
                    max=MAX_SIDE,
                    tooltip="Width of the result; 0 keeps the picture's own.",
                    optional=True,
                    advanced=True,
                ),
                io.Int.Input(
                    "height",
                    default=0,
                    min=0,
                    max=MAX_SIDE,
                    tooltip="Height of the result; 0 keeps the picture's own.",
                    optional=True,
                    advanced=True,
                ),
                io.Combo.Input(
                    "crop",
                    options=[option.value for option in Crop],
                    default=Crop.AUTO.value,
                    tooltip=(
                        "auto: the model sees the mask's surroundings at its native size, which is fast and detailed."
                        " each: the same for every separate part of the mask, one after the other. off: it sees the"
                        " whole picture at its own size."
                    ),
                    optional=True,
                    advanced=True,
                ),
                io.Combo.Input(
                    "compat",
                    options=[option.value for option in Compat],
                    default=Compat.OFF.value,
                    tooltip=(
                        "diffusers: compute exactly what StableDiffusionInpaintPipeline would (resized to the model's"
                        " size, nothing pasted back, prompts literal and cut at 77 tokens), to reproduce its pictures."
                    ),
                    optional=True,
                    advanced=True,
                ),
                io.Combo.Input(
                    "sigmas",
                    options=[option.value for option in Sigmas],
                    default=Sigmas.DEFAULT.value,
                    tooltip="Spacing of the noise levels, for schedulers that have a choice.",
                    optional=True,
                    advanced=True,
                ),
                io.Mask.Input(
                    "sampler_mask",
                    tooltip=(
                        "Where the model paints, when that is not everywhere the mask touches: Prepare Mask (Mend)"
                        " gives one. The mask then only joins the result to the picture."
                    ),
                    optional=True,
                ),
                io.Conditioning.Input(
                    "positive",
                    tooltip=(
                        "In place of the prompt, for a model from Wrap Model (Mend): ControlNet, areas, masks and hooks"
                        " on it are followed; what it says about places in the picture is cut along with the crop."
                    ),
                    optional=True,
                ),
                io.Conditioning.Input(
                    "negative",
                    tooltip="In place of the negative prompt, for a model from Wrap Model (Mend).",
                    optional=True,
                ),
                ControlType.Input(
                    "control",
                    tooltip=(
                        "From Apply ControlNet (Mend), for models of Load Model (Mend). ComfyUI's own models follow its"
                        " Apply ControlNet on positive and negative."
                    ),
                    optional=True,
                ),
                io.Boolean.Input(
                    "soft",
                    default=False,
                    tooltip=(
                        "Grey parts of the mask are repainted less, as if strength were lower there (differential"
                        " diffusion). Off: grey is repainted in full and mixed in."
                    ),
                    optional=True,
                    advanced=True,
                ),
                io.Combo.Input(
                    "blend",
                    options=[option.value for option in Blend],
                    default=Blend.AUTO.value,
                    tooltip=(
                        "How the painted part is joined. auto measures the seam and picks. linear mixes by the mask's"
                        " grey. multiband mixes coarse tones wide and fine detail narrow. poisson takes the tone from"
                        " the rim."
                    ),
                    optional=True,
                    advanced=True,
                ),
                io.Float.Input(
                    "color_match",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How much of a tone difference measured around the mask is taken off the painted part.",
                    optional=True,
                    advanced=True,
                ),
                io.Float.Input(
                    "grain",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="How much of the surroundings' film grain the painted part gets where it has less.",
                    optional=True,
                    advanced=True,
                ),
                io.Boolean.Input(
                    "zero_negative",
                    default=False,
                    tooltip=(
                        "An empty negative prompt is embedded as zeros, as diffusers does for SDXL, instead of being"
                        " read by the text encoders. Unused where there is a negative prompt."
                    ),
                    optional=True,
                    advanced=True,
                ),
            ],
            outputs=[
                io.Image.Output("images", tooltip="The finished pictures."),
                io.Mask.Output("mask", display_name="mask used", tooltip="Where it is 0 the picture is untouched."),
                io.Int.Output("seed", tooltip="The first picture's seed."),
            ],
        )

    @classmethod
    def validate_inputs(
        cls,
        width: int | None = 0,
        height: int | None = 0,
        compat: str | None = "off",
        crop: str | None = "auto",
        blend: str | None = "auto",
    ) -> bool | str:
        for name, value, options in (("compat", compat, Compat), ("crop", crop, Crop), ("blend", blend, Blend)):
            if value is not None and value not in [option.value for option in options]:
                return f"{name} is {value!r}; choose one of {', '.join(option.value for option in options)}."
        for name, side in (("width", width), ("height", height)):
            if side and not 16 <= side <= MAX_SIDE:
                return f"{name} is {side}; give 16 to {MAX_SIDE}, or 0 for the picture's own."
            if side and compat == Compat.DIFFUSERS.value and side % 8:
                return f"{name} is {side}; compat=diffusers needs a multiple of 8, so set {side // 8 * 8}."
        return True

    @classmethod
    def execute(
        cls,
        model: MendModel,
        image: Any,
        mask: Any,
        prompt: str,
        negative_prompt: str,
        scheduler: str,
        steps: int,
        guidance_scale: float,
        strength: float,
        seed: int,
        count: int = 1,
        width: int = 0,
        height: int = 0,
        crop: str = Crop.AUTO.value,
        compat: str = Compat.OFF.value,
        sigmas: str = Sigmas.DEFAULT.value,
        sampler_mask: Any = None,
        soft: bool = False,
        blend: str = Blend.AUTO.value,
        color_match: float = 1.0,
        grain: float = 0.0,
        positive: Any = None,
        negative: Any = None,
        control: Controls | None = None,
        zero_negative: bool = False,
    ) -> io.NodeOutput:
        model = connected("model", model, MendModel, "Load Model (Mend) or Wrap Model (Mend)")
        request = InpaintRequest(
            image=image,
            mask=mask,
            prompt=prompt,
            negative_prompt=negative_prompt,
            scheduler=scheduler,
            sigmas=Sigmas(sigmas),
            steps=steps,
            guidance_scale=guidance_scale,
            strength=strength,
            seed=seed,
            count=count,
            width=width,
            height=height,
            crop=Crop(crop),
            compat=Compat(compat),
            sampler_mask=sampler_mask,
            soft=soft,
            blend=Blend(blend),
            color_match=color_match,
            grain=grain,
            controls=as_controls(control),
            zero_negative=zero_negative,
        )
        result = inpaint(request, conditioned(model, positive, negative), model.host)
        for report in result.reports:
            log.info("Mend: %s", report)
        return io.NodeOutput(result.images, result.mask, result.seeds[0], ui=show(result.notices))


def conditioned(model: MendModel, positive: Any, negative: Any) -> InpaintModel:
    """The model with CONDITIONING in the place of prompts, if there is any."""
    if positive is None and negative is None:
        return model.model
    positive, negative = (
        wired("positive", positive, "CLIP Text Encode"),
        wired("negative", negative, "CLIP Text Encode"),
    )
    if not isinstance(model.model, NativeModel):
        raise InputError(
            "positive and negative conditioning can be followed by a model from Wrap Model (Mend) only, and this one is"
            " from Load Model (Mend): write prompts instead."
        )
    return model.model.conditioned(positive, negative)


NODES = [MendInpaint]
