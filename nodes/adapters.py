"""MendLoadLoRA, MendLoadControlNet and MendApplyControlNet: what is added to a model of Load Model (Mend)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from comfy_api.latest import io

from ..engine.control import MAX_STRENGTH as MAX_CONTROL
from ..engine.control import Control
from ..engine.models.controlnet import ControlNet, find_controlnets, load_controlnet
from ..engine.models.load import find_files
from ..engine.models.lora import MAX_STRENGTH, Lora
from ..engine.types import InputError, ModelFileError
from .comfy_host import ComfyHost, MendModel, OnWire
from .convert import ControlNetType, ControlType, ModelType, connected
from .load import LoadedModel, file_stamp, load_shared
from .text import show

NONE_FOUND = "none found"
"""The only entry of a menu without files; an empty one could not be drawn."""
LORA_HINT = "put a .safetensors file into models/loras and reload the page"
CONTROLNET_HINT = "put a .safetensors file or a diffusers folder into models/controlnet and reload the page"


class MendLoadLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendLoadLoRA",
            display_name="Load LoRA (Mend)",
            category="Mend",
            description=(
                "Adds a LoRA to a model of Load Model (Mend): LoRA, LoCon, LoHa, LoKr or DoRA, in the formats of kohya,"
                " LyCORIS, diffusers and peft. Several in a row add up."
            ),
            search_aliases=["lora", "locon", "lycoris", "dora", "style", "adapter", "lora loader"],
            inputs=[
                ModelType.Input("model", tooltip="From Load Model (Mend) or another Load LoRA (Mend)."),
                io.Combo.Input(
                    "lora",
                    options=list(find_files(ComfyHost(), "loras")) or [NONE_FOUND],
                    tooltip=f"A file of models/loras, made for the model's family. To add one, {LORA_HINT}.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-MAX_STRENGTH,
                    max=MAX_STRENGTH,
                    step=0.05,
                    tooltip="How much the network that paints is changed; 0 leaves it exactly as it was.",
                ),
                io.Float.Input(
                    "text_strength",
                    default=1.0,
                    min=-MAX_STRENGTH,
                    max=MAX_STRENGTH,
                    step=0.05,
                    tooltip="How much the text encoders are changed, where the file has anything for them.",
                ),
            ],
            outputs=[ModelType.Output("model", tooltip="The model with the LoRA, for Inpaint (Mend).")],
        )

    @classmethod
    def validate_inputs(cls, lora: str | None) -> bool | str:
        return _listed(lora, find_files(ComfyHost(), "loras"), "LoRA", LORA_HINT)

    @classmethod
    def fingerprint_inputs(cls, lora: str, **options: Any) -> str:
        return _stamp(find_files(ComfyHost(), "loras").get(lora))

    @classmethod
    def execute(cls, model: MendModel, lora: str, strength: float, text_strength: float) -> io.NodeOutput:
        model = connected("model", model, MendModel, "Load Model (Mend)")
        if not isinstance(model, LoadedModel):
            raise InputError(
                "Load LoRA (Mend) changes models of Load Model (Mend), and this one comes from Wrap Model (Mend): put"
                " ComfyUI's own Load LoRA before Wrap Model."
            )
        path = _chosen(lora, find_files(ComfyHost(), "loras"), LORA_HINT)
        choices = model.choices
        changed = load_shared(model.path, replace(choices, loras=(*choices.loras, Lora(path, strength, text_strength))))
        # a sentence that the model before has said already is not said again
        news = [notice for notice in changed.notices if notice not in model.notices]
        return io.NodeOutput(changed, ui=show(tuple(news)))


@dataclass(frozen=True, eq=False)
class LoadedControlNet(OnWire):
    """What travels on a MEND_CONTROLNET wire."""

    network: ControlNet
    host: ComfyHost


@dataclass(frozen=True, eq=False)
class Controls:
    """What travels on a MEND_CONTROL wire: ControlNets with all that they are told."""

    controls: tuple[Control, ...]


# weak, as are the models in load.py
_loaded: WeakValueDictionary[tuple[Path, str], LoadedControlNet] = WeakValueDictionary()


def as_controls(control: Controls | None) -> tuple[Control, ...]:
    """What an optional input of a sampler brings."""
    if control is None:
        return ()
    return connected("control", control, Controls, "Apply ControlNet (Mend)").controls


class MendLoadControlNet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendLoadControlNet",
            display_name="Load ControlNet (Mend)",
            category="Mend",
            description=(
                "Loads a ControlNet of Stable Diffusion 1.x, 2.x or XL for models of Load Model (Mend), from a"
                " .safetensors file of either layout or a diffusers folder."
            ),
            search_aliases=["controlnet", "canny", "depth", "openpose", "scribble", "lineart", "controlnet loader"],
            inputs=[
                io.Combo.Input(
                    "controlnet",
                    options=list(find_controlnets(ComfyHost())) or [NONE_FOUND],
                    tooltip=f"Of models/controlnet. To add one, {CONTROLNET_HINT}.",
                )
            ],
            outputs=[ControlNetType.Output("controlnet", tooltip="For Apply ControlNet (Mend).")],
        )

    @classmethod
    def validate_inputs(cls, controlnet: str | None) -> bool | str:
        return _listed(controlnet, find_controlnets(ComfyHost()), "ControlNet", CONTROLNET_HINT)

    @classmethod
    def fingerprint_inputs(cls, controlnet: str) -> str:
        return _stamp(find_controlnets(ComfyHost()).get(controlnet))

    @classmethod
    def execute(cls, controlnet: str) -> io.NodeOutput:
        path = _chosen(controlnet, find_controlnets(ComfyHost()), CONTROLNET_HINT)
        key = (path, file_stamp(path))
        loaded = _loaded.get(key)
        if loaded is None:
            host = ComfyHost()
            loaded = _loaded[key] = LoadedControlNet(load_controlnet(path, host), host)
        return io.NodeOutput(loaded)


class Shown(str, Enum):
    """What a ControlNet is shown."""

    IMAGE = "image"
    MASKED_PICTURE = "masked picture"


class MendApplyControlNet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendApplyControlNet",
            display_name="Apply ControlNet (Mend)",
            category="Mend",
            description=(
                "Makes Inpaint (Mend) follow edges, depth, a pose or the surroundings themselves. The image is of the"
                " whole picture and is cut along with the crop."
            ),
            search_aliases=["controlnet", "canny", "depth", "openpose", "control", "controlnet inpaint"],
            inputs=[
                ControlNetType.Input("controlnet", tooltip="From Load ControlNet (Mend)."),
                io.Combo.Input(
                    "shown",
                    options=[option.value for option in Shown],
                    default=Shown.IMAGE.value,
                    tooltip=(
                        "image: the edges, depth, pose, ... on the image input. masked picture: the picture itself with"
                        " the hole in it, for ControlNets made for inpainting (control_v11p_sd15_inpaint)."
                    ),
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=MAX_CONTROL,
                    step=0.05,
                    tooltip="How much it counts; 0 is off.",
                ),
                io.Float.Input(
                    "start",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="The share of the way from noise to picture at which it begins to count.",
                ),
                io.Float.Input(
                    "end",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "And at which it ends. The way is measured in timesteps as ComfyUI does, so a strength below 1"
                        " of Inpaint starts in its middle; with compat=diffusers in steps."
                    ),
                ),
                io.Image.Input(
                    "image",
                    tooltip="Edges, depth, a pose, ... made from the whole picture; one, or one for each picture.",
                    optional=True,
                ),
                ControlType.Input(
                    "control", tooltip="Another ControlNet to follow as well; their results add up.", optional=True
                ),
            ],
            outputs=[ControlType.Output("control", tooltip="For Inpaint (Mend) or Outpaint (Mend).")],
        )

    @classmethod
    def execute(
        cls,
        controlnet: LoadedControlNet,
        shown: str,
        strength: float,
        start: float,
        end: float,
        image: Any = None,
        control: Controls | None = None,
    ) -> io.NodeOutput:
        network = connected("controlnet", controlnet, LoadedControlNet, "Load ControlNet (Mend)").network
        if Shown(shown) is Shown.IMAGE and image is None:
            raise InputError(
                f"The ControlNet {network.name} has no image to follow: connect one, or set shown to"
                f" {Shown.MASKED_PICTURE.value} for a ControlNet made for inpainting."
            )
        if Shown(shown) is Shown.MASKED_PICTURE and image is not None:
            raise InputError(
                f"An image is connected, but shown is {Shown.MASKED_PICTURE.value}, for which there is no use of one:"
                f" set shown to {Shown.IMAGE.value}, or take the image away."
            )
        added = Control(network=network, image=image, strength=strength, start=start, end=end)
        return io.NodeOutput(Controls((*as_controls(control), added)))


def _listed(name: str | None, found: dict[str, Path], kind: str, hint: str) -> bool | str:
    """Whether a menu has a name, or a sentence why not; None comes over a link."""
    if name is None or name in found:
        return True
    if not found:
        return f"No {kind} was found: {hint}."
    return f"{name} is not among the files found ({', '.join(list(found)[:5])}): choose another {kind}, or {hint}."


def _chosen(name: str, found: dict[str, Path], hint: str) -> Path:
    if name not in found:
        raise ModelFileError(f"{name} is not there any more: choose another, or {hint}.")
    return found[name]


def _stamp(path: Path | None) -> str:
    return "" if path is None else file_stamp(path)


NODES = [MendLoadLoRA, MendLoadControlNet, MendApplyControlNet]
