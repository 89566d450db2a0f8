"""MendEditModel: models that edit a picture they are shown, painting under a mask."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io

from ..engine.types import InputError
from .comfy_host import MendModel
from .convert import ModelType, connected
from .native import NativeModel, Shown


class MendEditModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendEditModel",
            display_name="Edit Model (Mend)",
            category="Mend",
            description=(
                "For models that edit a picture they are shown: FLUX Kontext, FLUX.2, Qwen-Image-Edit. Between Wrap"
                " Model (Mend) and Inpaint (Mend), it shows them what they are to change, and only what is masked"
                " changes."
            ),
            search_aliases=["kontext", "klein", "qwen image edit", "reference latent", "instruction", "edit"],
            inputs=[
                ModelType.Input("model", tooltip="From Wrap Model (Mend)."),
                io.Combo.Input(
                    "shown",
                    options=[shown.value for shown in Shown],
                    default=Shown.LATENTS.value,
                    tooltip=(
                        "latents: FLUX Kontext, FLUX.2 and Klein read the picture's latents. qwen-image-edit and"
                        " qwen-image-edit-2509 (and later): the text encoder sees it, too, each in its own way."
                    ),
                ),
            ],
            outputs=[ModelType.Output("model", tooltip="For Inpaint (Mend) and Outpaint (Mend).")],
        )

    @classmethod
    def execute(cls, model: MendModel, shown: str) -> io.NodeOutput:
        model = connected("model", model, MendModel, "Wrap Model (Mend)")
        if not isinstance(model.model, NativeModel):
            raise InputError(
                "Edit Model (Mend) is for models of Wrap Model (Mend); Load Model (Mend) knows by itself, or by its"
                " family, which models are shown the picture."
            )
        return io.NodeOutput(replace(model, model=model.model.editing(Shown(shown))))


NODES = [MendEditModel]
