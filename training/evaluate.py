"""Measures an exported model on held-out pictures, prompts, holes and seeds.

A line of JSON each: the VAE's PSNR; the error of removal (an empty prompt) against the true background; the judges'
verdict on the true pictures, which is the most that any model can reach; and for every scheduler and number of steps
how often colour and shape are right and whether what was painted lies in the hole.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..engine.host import LocalHost
from ..engine.inpaint import inpaint
from ..engine.models.detect import SHIPPED
from ..engine.models.load import load_model
from ..engine.models.protocol import InpaintModel
from ..engine.schedulers import SCHEDULERS
from ..engine.types import InpaintRequest
from . import scenes
from .pipeline import paint, use_scheduler
from .runs import save_sheet
from .scenes import Array, Kind, Sample
from .train_vae import check

MODEL = SHIPPED / "mend-shapes"
SEED = 2001
CHANGED = 0.2
"""Distance in RGB, of sqrt(3), from which a pixel differs from the background."""
NAMED = 0.35
"""Distance in RGB within which a pixel has a named colour, if no other is nearer."""
TEMPLATE = 24
"""Pixels of a side of the templates and of what is compared with them."""
TILTS = (-0.2, -0.1, 0.0, 0.1, 0.2)
LEAST_AREA = 16
"""Pixels that a shape has at least."""
CELL = 4


@dataclass(frozen=True)
class Verdict:
    """Shares of pictures, 0..1."""

    color: float
    """What was painted has the caption's colour."""
    shape: float
    """The best fitting template is the caption's shape."""
    both: float
    inside: float
    """At most a fiftieth of what was painted lies outside the hole and the latent cells it touches."""


def held_out(kind: Kind, count: int) -> list[Sample]:
    return [scenes.sample(SEED, i, kind=kind, held_out=True) for i in range(count)]


def planes(images: Sequence[Array]) -> Tensor:
    """[N, 3, H, W] in -1..1."""
    return torch.stack([torch.from_numpy(np.ascontiguousarray(image)) for image in images]).permute(0, 3, 1, 2) * 2 - 1


def pixels(images: Tensor) -> list[Array]:
    """Pictures [H, W, 3] in 0..1."""
    return list((images.clamp(-1, 1).permute(0, 2, 3, 1).numpy() + 1) / 2)


# -------------------------------------------------------------------------------------------------------- painters


class Painter(Protocol):
    """Repaints the samples' holes: pictures [H, W, 3] in 0..1; picture i has the seed SEED + i."""

    def __call__(
        self, samples: Sequence[Sample], prompts: Sequence[str], scheduler: str, steps: int, guidance: float
    ) -> list[Array]: ...


@dataclass(frozen=True)
class EnginePainter:
    """Mend with its default settings."""

    model: InpaintModel
    host: LocalHost

    def __call__(
        self, samples: Sequence[Sample], prompts: Sequence[str], scheduler: str, steps: int, guidance: float
    ) -> list[Array]:
        requests = (
            InpaintRequest(
                image=torch.from_numpy(sample.image)[None],
                mask=torch.from_numpy(sample.mask)[None],
                prompt=prompt,
                scheduler=scheduler,
                steps=steps,
                guidance_scale=guidance,
                seed=SEED + i,
            )
            for i, (sample, prompt) in enumerate(zip(samples, prompts, strict=True))
        )
        return [inpaint(request, self.model, self.host).images[0].numpy() for request in requests]


@dataclass(frozen=True)
class DiffusersPainter:
    """diffusers' StableDiffusionInpaintPipeline."""

    pipeline: Any

    def __call__(
        self, samples: Sequence[Sample], prompts: Sequence[str], scheduler: str, steps: int, guidance: float
    ) -> list[Array]:
        spec = SCHEDULERS[scheduler]
        use_scheduler(self.pipeline, spec.class_name, **spec.options)
        return pixels(paint(self.pipeline, samples, prompts, steps=steps, guidance=guidance, seed=SEED))


def load_pipeline(folder: Path) -> Any:
    """The exported model as plain diffusers loads it, in single precision."""
    from diffusers import StableDiffusionInpaintPipeline

    pipeline = StableDiffusionInpaintPipeline.from_pretrained(folder, torch_dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# ---------------------------------------------------------------------------------------------------------- judges


@dataclass(frozen=True, eq=False)
class Find:
    """The shape that was painted, as far as it can be seen."""

    color: str | None
    area: Array
    """bool [H, W]."""

    @property
    def shape(self) -> str | None:
        return judge_shape(self.area)


def find_shape(image: Array, background: Array, near: Array) -> Find:
    """The largest connected part of ``near`` that has one of the named colours and is not the true background.

    Where ``near`` is the whole picture nobody can know the background that was meant: there a part that touches the
    picture's border is one, as shapes lie wholly inside.
    """
    from scipy import ndimage

    colors = np.asarray(list(scenes.COLORS.values()), np.float32)
    distances = np.linalg.norm(image[:, :, None] - colors, axis=3)
    named = np.where(distances.min(axis=2) < NAMED, distances.argmin(axis=2), -1)
    whole = bool(near.all())
    if not whole:
        named[(near == 0) | (np.linalg.norm(image - background, axis=2) < CHANGED)] = -1
    best = Find(None, np.zeros(near.shape, bool))
    for index, color in enumerate(scenes.COLORS):
        labels, count = ndimage.label(ndimage.binary_opening(named == index))
        border = {*labels[0], *labels[-1], *labels[:, 0], *labels[:, -1]} if whole else set()
        for part in range(1, count + 1):
            area = labels == part
            if part not in border and area.sum() > max(LEAST_AREA, best.area.sum()):
                best = Find(color, ndimage.binary_fill_holes(area))
    return best


def judge_shape(area: Array) -> str | None:
    """The shape whose outline, brought to the area's bounding box, overlaps it best."""
    if not area.any():
        return None
    found = _fit(area)
    return max(templates(), key=lambda pair: float((found & pair[1]).sum() / (found | pair[1]).sum()))[0]


@cache
def templates() -> tuple[tuple[str, Array], ...]:
    """Every shape at a few tilts, as bool [TEMPLATE, TEMPLATE] that it fills."""
    center = scenes.SIZE / 2
    return tuple(
        (name, _fit(scenes.rasterise([scenes.Place(center, center, 24, tilt).point(p) for p in outline()]) > 0.5))
        for name, outline in scenes.SHAPES.items()
        for tilt in TILTS
    )


def _fit(area: Array) -> Array:
    rows, columns = np.nonzero(area.any(axis=1))[0], np.nonzero(area.any(axis=0))[0]
    cut = area[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scaled = Image.fromarray(cut.astype(np.uint8) * 255).resize((TEMPLATE, TEMPLATE), Image.Resampling.BILINEAR)
    return np.asarray(scaled) > 127


def inside(sample: Sample, image: Array) -> bool:
    from scipy import ndimage

    changed = np.linalg.norm(image - sample.background, axis=2) > CHANGED
    allowed = ndimage.maximum_filter(sample.mask, size=2 * CELL - 1) > 0
    return bool((changed & ~allowed).sum() <= 0.02 * max(1, int(changed.sum())))


def judge(samples: Sequence[Sample], images: Sequence[Array]) -> Verdict:
    votes = []
    for sample, image in zip(samples, images, strict=True):
        found = find_shape(image, sample.background, sample.mask)
        color, shape = found.color == sample.color, found.shape == sample.shape
        votes.append((color, shape, color and shape, inside(sample, image)))
    return Verdict(*(round(float(share), 3) for share in np.mean(votes, axis=0)))


# -------------------------------------------------------------------------------------------------------- measures


def vae_psnr(vae: Any, count: int) -> dict[str, float]:
    """dB of the error over all pixels, and the mean and the least dB of single pictures."""
    wanted = planes([scenes.sample(SEED, i, held_out=True).image for i in range(count)])
    errors = ((check(vae, wanted)[1].clamp(-1, 1) - wanted) / 2).square().mean(dim=(1, 2, 3)).numpy()
    single = -10 * np.log10(errors)
    return {
        "psnr": round(float(-10 * np.log10(errors.mean())), 2),
        "mean": round(float(single.mean()), 2),
        "least": round(float(single.min()), 2),
    }


def removal(painter: Painter, vae: Any, samples: Sequence[Sample], steps: int) -> dict[str, float]:
    """Root mean square errors in the hole, 0..1, against the true background: of the model with an empty prompt, of
    the VAE alone (no model can be better), and of the mean colour of what surrounds the hole."""
    pictures = {
        "model": painter(samples, [""] * len(samples), "DPMSolverMultistep", steps, 1.0),
        "vae": pixels(check(vae, planes([s.background for s in samples]))[1]),
        "mean_color": [np.broadcast_to(_surroundings(s), s.background.shape) for s in samples],
    }
    return {
        name: round(float(np.mean([_hole_error(s, image) for s, image in zip(samples, images, strict=True)])), 4)
        for name, images in pictures.items()
    }


def _surroundings(sample: Sample) -> Array:
    kept: Array = sample.background[sample.mask == 0]
    return kept.mean(axis=0)


def _hole_error(sample: Sample, image: Array) -> float:
    return float(np.sqrt(np.square(image - sample.background)[sample.mask > 0].mean()))


def partial_holes(count: int) -> list[Sample]:
    """Removal pictures whose hole leaves something to go by."""
    return [s for s in held_out(Kind.REMOVE, 2 * count) if s.mask.mean() < 0.6][:count]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m comfyui_mend.training.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "model", type=Path, nargs="?", default=SHIPPED / "mend-shapes", help="a folder (default: the shipped model)"
    )
    parser.add_argument("--by", choices=("mend", "diffusers"), default="mend", help="who paints (default: mend)")
    parser.add_argument("--count", type=int, default=96, help="pictures for each line (default: %(default)s)")
    parser.add_argument("--guidance", type=float, nargs="+", default=[4.0], help="default: 4")
    parser.add_argument("--schedulers", nargs="+", choices=SCHEDULERS, default=list(SCHEDULERS), metavar="NAME",
                        help="of the menu (default: all)")  # fmt: skip
    parser.add_argument("--steps", nargs="+", type=int, default=[10, 25], help="default: 10 25")
    parser.add_argument("--sheet", type=Path, help="PNG of twelve pictures, their holes, and a row for each line")
    options = parser.parse_args()
    pipeline, host = load_pipeline(options.model), LocalHost(torch.device("cpu"), show_progress=False)
    painter = DiffusersPainter(pipeline) if options.by == "diffusers" else EnginePainter(
        load_model(options.model, host), host
    )  # fmt: skip
    samples = held_out(Kind.PAINT, options.count)
    prompts = [s.caption for s in samples]
    rows = [planes([s.image for s in samples[:12]])]
    rows.append(rows[0] * (1 - torch.stack([torch.from_numpy(s.mask)[None] for s in samples[:12]])))

    def say(what: str, **values: object) -> None:
        print(json.dumps({"what": what, **values}), flush=True)

    say("vae", **vae_psnr(pipeline.vae, options.count))
    say("removal", **removal(painter, pipeline.vae, partial_holes(options.count), max(options.steps)))
    say("ceiling", **asdict(judge(samples, [s.image for s in samples])))
    for name in options.schedulers:
        for steps in options.steps:
            for guidance in options.guidance:
                painted = painter(samples, prompts, name, steps, guidance)
                rows.append(planes(painted[:12]))
                say(name, steps=steps, guidance=guidance, **asdict(judge(samples, painted)))
    if options.sheet:
        save_sheet(options.sheet, rows)


if __name__ == "__main__":
    main()
