"""ControlNets in a run: what each is shown, how much it counts, and when."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from . import images
from .types import Box, Compat, InpaintRequest, InputError, check_range

if TYPE_CHECKING:
    from .models.controlnet import ControlNet
    from .models.protocol import Canvas, ModelFacts
    from .schedulers import Schedule

MAX_STRENGTH = 10.0
FAMILIES = {768: "Stable Diffusion 1.x", 1024: "Stable Diffusion 2.x", 2048: "Stable Diffusion XL"}
"""By the width of the prompt embeddings."""
HIDDEN = -1.0
"""What inpainting ControlNets are shown, in all channels, where the picture is to be repainted."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Control:
    """A ControlNet and what it shall follow; raises InputError for what is out of range."""

    network: ControlNet
    image: Tensor | None = None
    """[B or 1, H, W, 1, 3 or 4] in 0..1: edges, depth, a pose ... of the whole picture, which is cut along with the
    crop. None: the picture itself with the hole in it, for ControlNets made for inpainting."""
    strength: float = 1.0
    """0..10."""
    start: float = 0.0
    """0..1: the share of the way from noise to picture at which it begins to count."""
    end: float = 1.0
    """0..1: and ends. A run of ``Compat.OFF`` measures the way by timesteps, from the first that the model was trained
    on, as ComfyUI does: a strength below 1 starts in the middle of it, and a spacing of the noise levels does not move
    it. ``Compat.DIFFUSERS`` counts the steps that run."""

    def __post_init__(self) -> None:
        check_range("The ControlNet's strength", self.strength, 0, MAX_STRENGTH)
        check_range("The ControlNet's start", self.start, 0, 1)
        check_range("The ControlNet's end", self.end, 0, 1)
        if self.start > self.end:
            raise InputError(
                f"The ControlNet starts at {self.start:g} and ends at {self.end:g}, before that; give start the"
                " smaller value."
            )

    def fit(self, pictures: Tensor) -> Control:
        """The same with an image [B, H, W, 3] for each of the ``pictures`` [B, H, W, C], at their size.

        Raises InputError for another number of images, and for another shape, which would be squashed.
        """
        if self.image is None:
            return self
        image = images.as_images(self.image)[..., :3].to(pictures)
        came, size = images.size_of(image), images.size_of(pictures)
        if not images.same_shape(came, size):
            raise InputError(
                f"The ControlNet's image is {came} but the picture is {size}, another shape; make it from this picture,"
                f" or resize it to {size}."
            )
        if len(image) not in (1, len(pictures)):
            raise InputError(
                f"There are {len(pictures)} pictures and {len(image)} images for the ControlNet; give one, or one for"
                " each."
            )
        return replace(self, image=images.resize(image, size).expand(len(pictures), -1, -1, -1))

    def part(self, box: Box, count: int) -> Control:
        """The same for a part of each picture, ``count`` times."""
        if self.image is None:
            return self
        return replace(self, image=self.image[:, box.rows, box.columns].repeat_interleave(count, dim=0))

    def scales(self, schedule: Schedule, facts: ModelFacts, compat: Compat) -> tuple[float, ...]:
        """How much it counts in each evaluation of the network."""
        total = schedule.evaluations
        if compat is Compat.DIFFUSERS:
            inside = [index / total >= self.start and (index + 1) / total <= self.end for index in range(total)]
        else:
            last = int(facts.scheduler_config.get("num_train_timesteps", 1000)) - 1
            way = [1 - float(timestep) / last for timestep in schedule.timesteps]
            inside = [self.start <= min(max(share, 0), 1) <= self.end for share in way]
        return tuple(self.strength * follows for follows in inside)


def check(controls: Sequence[Control], facts: ModelFacts) -> None:
    """Raises InputError for a ControlNet that the model cannot follow."""
    for control in controls:
        width = control.network.context_width
        if facts.control_width is None:
            raise InputError(
                f"{facts.name} cannot follow the ControlNet {control.network.name}: those that Mend loads work with"
                " Stable Diffusion 1.x, 2.x and XL loaded by Mend; for ComfyUI's own models connect its Apply"
                " ControlNet to positive and negative."
            )
        if width is not None and width != facts.control_width:
            raise InputError(
                f"The ControlNet {control.network.name} is made for {FAMILIES.get(width, 'another kind of model')}, and"
                f" {facts.name} is {FAMILIES.get(facts.control_width, 'another')}: choose one that was made for it."
            )


class Influence(NamedTuple):
    """A ControlNet in one evaluation."""

    network: ControlNet
    pixels: Tensor
    """[N, 3, H, W]."""
    scale: float


@dataclass(frozen=True)
class Hint:
    """What a ControlNet is shown for a canvas, and how much it counts."""

    network: ControlNet
    pixels: Tensor
    """[N, 3, H, W] in 0..1, or HIDDEN."""
    scales: tuple[float, ...]
    """In each evaluation of the network, in order."""


def influences(hints: Sequence[Hint], evaluation: int) -> tuple[Influence, ...]:
    """The hints that count in an evaluation."""
    now = (Influence(hint.network, hint.pixels, hint.scales[evaluation]) for hint in hints)
    return tuple(influence for influence in now if influence.scale)


def show(
    canvas: Canvas, request: InpaintRequest, cut: Callable[[Tensor], Tensor], schedule: Schedule, facts: ModelFacts
) -> Canvas:
    """The canvas with what the request's ControlNets are shown; ``cut`` brings pictures [B, H, W, 3] to the canvas,
    [N, 3, h, w] in 0..1."""

    def shown(image: Tensor | None) -> Tensor:
        if image is not None:
            return cut(image)
        return torch.where(canvas.hole > 0.5, HIDDEN, cut(request.image[..., :3]))

    hints = tuple(
        Hint(control.network, shown(control.image), control.scales(schedule, facts, request.compat))
        for control in request.controls
    )
    return replace(canvas, hints=hints)


@contextmanager
def controlled(unet: nn.Module, active: Sequence[Influence]) -> Iterator[None]:
    """While it lasts, a call of the ``unet`` gets what the ``active`` ControlNets add.

    Each reads what the UNet is given - the latents without what inpainting models read beside them, timestep, prompt,
    SDXL's sizes - and its hint, repeated where guidance runs both branches in one batch. Their results add up.
    """
    if not active:
        yield
        return
    names = list(inspect.signature(unet.forward).parameters)

    def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        inputs = dict(zip(names, args, strict=False)) | kwargs
        down, middle = _residuals(inputs, active)
        return args, kwargs | {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}

    handle = unet.register_forward_pre_hook(add, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _residuals(inputs: Mapping[str, Any], active: Sequence[Influence]) -> tuple[list[Tensor], Tensor]:
    sample: Tensor = inputs["sample"]
    outputs = [_run(influence, inputs, sample) for influence in active]
    downs = [
        torch.stack(level).sum(dim=0) if len(level) > 1 else level[0]
        for level in zip(*(o[0] for o in outputs), strict=True)
    ]
    return downs, sum((output[1] for output in outputs[1:]), outputs[0][1])


def _run(influence: Influence, inputs: Mapping[str, Any], sample: Tensor) -> tuple[list[Tensor], Tensor]:
    managed = influence.network.managed
    module: Any = managed.module

    def cast(value: Tensor) -> Tensor:
        return value.to(managed.dtype)

    conditions = inputs.get("added_cond_kwargs")
    hint = influence.pixels.repeat(len(sample) // len(influence.pixels), 1, 1, 1)
    down, middle = module(
        cast(sample[:, : module.config.in_channels]),
        inputs["timestep"],
        encoder_hidden_states=cast(inputs["encoder_hidden_states"]),
        controlnet_cond=cast(hint),
        conditioning_scale=influence.scale,
        added_cond_kwargs=conditions and {key: cast(value) for key, value in conditions.items()},
        return_dict=False,
    )
    return [level.to(sample.dtype) for level in down], middle.to(sample.dtype)
