"""``mend demo``: the main job on real photographs, and one contact sheet that shows it.

The scenes are the same wherever they run; a Runner does the work, in ComfyUI over its API or by the engine alone.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from . import contact_sheet
from .comfy_workspace import (
    Client,
    Server,
    ServerError,
    Workspace,
    find_workspace,
    install_requirements,
    missing_requirements,
)
from .contact_sheet import Row
from .engine.files import read_image, read_mask, write_image
from .engine.fill import FillMethod, fill
from .engine.host import LocalHost
from .engine.images import to_bytes
from .engine.inpaint import inpaint
from .engine.masks import MaskOptions, prepare
from .engine.models.detect import SHIPPED
from .engine.models.load import load_model
from .engine.outpaint import Padding, pad
from .engine.safety import BUILT_IN, SafetyAction, check, load_safety_checker
from .engine.types import Box, InpaintRequest, MendError, MissingPackageError, Size

MODEL = SHIPPED / "mend-shapes"

# The rocket with its tower, drawn on the 640x427 photograph.
ROCKET = (
    *((323, 121), (314, 130), (308, 142), (306, 156), (304, 170), (303, 318), (299, 320), (299, 326), (303, 328)),
    *((302, 340), (290, 352), (284, 361), (283, 407), (361, 407), (361, 361), (355, 352), (340, 340), (340, 327)),
    *((345, 324), (345, 318), (340, 316), (340, 175), (338, 142), (332, 130)),
)
ROCKET_OPTIONS = MaskOptions(grow=4, feather=3)
CAT_PADDING = Padding(right=150)
# A piece of the coffee in the cup, on the 600x400 photograph.
FOAM_BOX = (266, 122, 310, 166)
# The drawing: a red disk on a slope of two colours, whose hole is a square.
DRAWING_SIZE = Size(192, 128)
DRAWING_COLORS = ((0.16, 0.36, 0.60), (0.62, 0.80, 0.78))
DISK_BOX = (78, 46, 114, 82)
DISK_COLOR = (0.85, 0.10, 0.12)
HOLE_BOX = (74, 42, 118, 86)
EDIT_OPTIONS = MaskOptions(grow=0, feather=2)


class Edit(NamedTuple):
    """What the diffusion path is asked for."""

    prompt: str
    seed: int
    steps: int = 25
    guidance_scale: float = 4.0


class Runner(Protocol):
    """Whoever does the work. Images are [1, H, W, 3], masks [1, H, W], both 0..1."""

    @property
    def name(self) -> str: ...

    def remove(self, image: Tensor, mask: Tensor, options: MaskOptions) -> tuple[Tensor, Tensor]:
        """Prepare the mask and fill it by PatchMatch: (picture, mask used)."""
        ...

    def extend(self, image: Tensor, padding: Padding) -> tuple[Tensor, Tensor]:
        """Pad and fill the new area by PatchMatch: (picture, mask of the new area)."""
        ...

    def edit(self, image: Tensor, mask: Tensor, options: MaskOptions, edit: Edit) -> tuple[Tensor, Tensor]:
        """Prepare the mask and repaint it from a prompt: (picture, mask used)."""
        ...

    def score(self, image: Tensor) -> float | None:
        """The safety checker's, 0..1; None where it is not installed."""
        ...


@dataclass(frozen=True)
class EngineRunner:
    """The engine in this process."""

    host: LocalHost
    name: str = "the engine alone"

    def remove(self, image: Tensor, mask: Tensor, options: MaskOptions) -> tuple[Tensor, Tensor]:
        prepared = prepare(mask, options)
        return fill(image, prepared, FillMethod.PATCHMATCH), prepared

    def extend(self, image: Tensor, padding: Padding) -> tuple[Tensor, Tensor]:
        padded = pad(image, padding)
        return fill(padded.image, padded.mask, FillMethod.PATCHMATCH), padded.mask

    def edit(self, image: Tensor, mask: Tensor, options: MaskOptions, edit: Edit) -> tuple[Tensor, Tensor]:
        prepared = prepare(mask, options)
        model = load_model(MODEL, self.host)
        request = InpaintRequest(image=image, mask=prepared, **edit._asdict())
        return inpaint(request, model, self.host).images, prepared

    def score(self, image: Tensor) -> float | None:
        try:
            checker = load_safety_checker(BUILT_IN, self.host)
        except MissingPackageError:  # there is none for Python 3.10
            return None
        return check(image, checker, action=SafetyAction.PASS).scores[0].score


@dataclass(frozen=True)
class ComfyRunner:
    """A ComfyUI server, by workflows in API format."""

    name: str
    server: Server

    def remove(self, image: Tensor, mask: Tensor, options: MaskOptions) -> tuple[Tensor, Tensor]:
        return self._pictures(
            {
                **self._inputs(image, mask, options),
                "filled": _node("MendFill", image=["image", 0], mask=["prepared", 0], method="patchmatch"),
                **_outputs(image=["filled", 0], mask=["prepared", 0]),
            }
        )

    def extend(self, image: Tensor, padding: Padding) -> tuple[Tensor, Tensor]:
        return self._pictures(
            {
                "image": _node("LoadImage", image=self._input("image.png", image)),
                "padded": _node("MendOutpaintPad", image=["image", 0], feather=0, **vars(padding)),
                "filled": _node("MendFill", image=["padded", 0], mask=["padded", 1], method="patchmatch"),
                **_outputs(image=["filled", 0], mask=["padded", 1]),
            }
        )

    def edit(self, image: Tensor, mask: Tensor, options: MaskOptions, edit: Edit) -> tuple[Tensor, Tensor]:
        painted = _node(
            "MendInpaint",
            model=["model", 0],
            image=["image", 0],
            mask=["prepared", 0],
            negative_prompt="",
            scheduler="DPMSolverMultistep",
            strength=1.0,
            count=1,
            width=0,
            height=0,
            crop="auto",
            compat="off",
            **edit._asdict(),
        )
        return self._pictures(
            {
                **self._inputs(image, mask, options),
                "model": _node("MendLoadModel", model=MODEL.name, prediction_type="auto", precision="auto"),
                "painted": painted,
                **_outputs(image=["painted", 0], mask=["prepared", 0]),
            }
        )

    def score(self, image: Tensor) -> float | None:
        outputs = self._client.run(
            {
                "image": _node("LoadImage", image=self._input("image.png", image)),
                "checked": _node("MendSafetyCheck", images=["image", 0], threshold=0.5, action="pass"),
                "report": _node("PreviewAny", source=["checked", 4]),
            }
        )
        report = json.loads(outputs["report"]["text"][0])
        return float(report["images"][0]["score"])

    @property
    def _client(self) -> Client:
        return Client(self.server.url)

    def _inputs(self, image: Tensor, mask: Tensor, options: MaskOptions) -> dict[str, Any]:
        # as RGB: ComfyUI reads the white of a greyscale PNG as 254
        return {
            "image": _node("LoadImage", image=self._input("image.png", image)),
            "mask": _node(
                "LoadImageMask", image=self._input("mask.png", mask[..., None].expand(-1, -1, -1, 3)), channel="red"
            ),
            "prepared": _node("MendPrepareMask", mask=["mask", 0], **vars(options)),
        }

    def _input(self, name: str, picture: Tensor) -> str:
        write_image(self.server.base / "input" / name, picture, force=True)
        return name

    def _pictures(self, workflow: dict[str, Any]) -> tuple[Tensor, Tensor]:
        outputs = self._client.run(workflow)
        files = []
        for name in ("save_image", "save_mask"):
            saved = outputs[name]["images"][0]
            files.append(self.server.base / saved["type"] / saved["subfolder"] / saved["filename"])
        return read_image(files[0]), read_mask(files[1])


def _node(class_type: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": class_type, "inputs": inputs}


def _outputs(image: list[Any], mask: list[Any]) -> dict[str, Any]:
    return {
        "save_image": _node("SaveImage", images=image, filename_prefix="image"),
        "mask_image": _node("MaskToImage", mask=mask),
        "save_mask": _node("SaveImage", images=["mask_image", 0], filename_prefix="mask"),
    }


# --- scenes


@dataclass(frozen=True)
class Stage:
    """What every scene is given."""

    runner: Runner
    photo: Callable[[str], Tensor]
    """A photograph by its name in scikit-image, [1, H, W, 3]."""


@dataclass(frozen=True)
class Scene:
    """What came of one scene."""

    key: str
    """Begins the files' names."""
    title: str
    facts: str
    before: Tensor
    mask: Tensor
    after: Tensor
    place: Box
    """Where ``before`` lies in ``after``."""
    seconds: float = 0.0
    score: float | None = None

    @property
    def change_outside(self) -> float:
        """The largest difference of any channel of any pixel whose mask is 0, in levels of 255."""
        kept = self.mask[0, self.place.rows, self.place.columns] == 0
        difference = (self.after[0, self.place.rows, self.place.columns] - self.before[0]).abs().amax(dim=-1)
        return round(float(difference[kept].max()) * 255, 3)


def remove_object(stage: Stage) -> Scene:
    photo = stage.photo("rocket")
    mask = _drawn(photo, lambda pen, scale: pen.polygon([(x * scale, y * scale) for x, y in ROCKET], fill=255))
    after, used = stage.runner.remove(photo, mask, ROCKET_OPTIONS)
    facts = "PatchMatch copies texture from the rest of the photo: no model, no prompt"
    return Scene("1-remove", "Remove an object", facts, photo, used, after, _box_of(photo))


def extend_picture(stage: Stage) -> Scene:
    photo = stage.photo("chelsea")
    after, mask = stage.runner.extend(photo, CAT_PADDING)
    facts = f"{CAT_PADDING.right} pixels more on the right, filled by PatchMatch"
    return Scene("2-extend", "Extend a picture", facts, photo, mask, after, _box_of(photo))


def edit_photo(stage: Stage) -> Scene:
    return _edited(
        stage, "3-edit", "Edit a photo by a prompt", stage.photo("coffee"), FOAM_BOX, Edit("a white heart", 0)
    )


def replace_shape(stage: Stage) -> Scene:
    return _edited(stage, "4-replace", "Replace something", draw_disk(), HOLE_BOX, Edit("a yellow star", 0))


def continue_background(stage: Stage) -> Scene:
    return _edited(stage, "5-continue", "Remove something, with an empty prompt", draw_disk(), HOLE_BOX, Edit("", 0))


def _edited(stage: Stage, key: str, title: str, before: Tensor, box: tuple[int, ...], edit: Edit) -> Scene:
    mask = _drawn(before, lambda pen, scale: pen.rectangle([edge * scale for edge in box], fill=255))
    after, used = stage.runner.edit(before, mask, EDIT_OPTIONS, edit)
    prompt = f"“{edit.prompt}”" if edit.prompt else "no words"
    facts = f"{prompt}, {edit.steps} steps, seed {edit.seed}, painted by {MODEL.name}, which comes with the pack"
    return Scene(key, title, facts, before, used, after, _box_of(before))


def draw_disk() -> Tensor:
    """A red disk on a gradient from top left to bottom right, [1, H, W, 3] of whole levels, as a file holds it."""
    down, right = torch.linspace(0, 1, DRAWING_SIZE.height), torch.linspace(0, 1, DRAWING_SIZE.width)
    weight = ((down[:, None] + right) / 2)[None, ..., None]
    first, second = torch.tensor(DRAWING_COLORS)
    ground = first * (1 - weight) + second * weight
    disk = _coverage(DRAWING_SIZE, lambda pen, scale: pen.ellipse([edge * scale for edge in DISK_BOX], fill=255))
    drawing = ground * (1 - disk[..., None]) + torch.tensor(DISK_COLOR) * disk[..., None]
    return (drawing * 255).round() / 255


SCENES = (remove_object, extend_picture, edit_photo, replace_shape, continue_background)


def play(scene: Callable[[Stage], Scene], stage: Stage) -> Scene:
    """One scene with its time and its safety score."""
    started = time.perf_counter()
    played = scene(stage)
    seconds = time.perf_counter() - started
    return replace(played, seconds=seconds, score=stage.runner.score(played.after))


def _drawn(photo: Tensor, shape: Callable[[ImageDraw.ImageDraw, int], None]) -> Tensor:
    """A black and white mask of the photo's size from a shape that is drawn four times as large."""
    return (_coverage(_box_of(photo).size, shape) > 0.5).float()


def _coverage(size: Size, shape: Callable[[ImageDraw.ImageDraw, int], None]) -> Tensor:
    """How much of each pixel a shape covers, [1, H, W]."""
    scale = 4
    canvas = Image.new("L", (size.width * scale, size.height * scale))
    shape(ImageDraw.Draw(canvas), scale)
    return torch.from_numpy(np.asarray(canvas.reduce(scale)) / np.float32(255))[None]


def _box_of(photo: Tensor) -> Box:
    return Box(0, 0, photo.shape[2], photo.shape[1])


# --- the run


def run(out: Path, host: LocalHost, *, say: Callable[[str], None], engine_only: bool = False) -> dict[str, Any]:
    """Play every scene, leave the pictures under ``out`` and return what happened; ``say`` gets a line for each step.

    Files of an earlier run are replaced. Raises MendError.
    """
    photo = _photos()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mend-demo-") as folder:
        scratch = Path(folder)
        workspace = None if engine_only else _find_comfyui(say)
        with _open_runner(workspace, scratch, host) as runner:
            say(f"Run by {runner.name}.")
            stage = Stage(runner, photo)
            scenes = []
            for scene in SCENES:
                scenes.append(play(scene, stage))
                say(_summary(scenes[-1]))
    files = [path for scene in scenes for path in _save(out, scene)]
    sheet = _save_sheet(out, scenes, runner.name)
    seconds = {scene.key: round(scene.seconds, 3) for scene in scenes}
    return {
        "files": [str(path) for path in files],
        "sheet": str(sheet),
        "runner": runner.name,
        "model": MODEL.name,
        "change_outside": {scene.key: scene.change_outside for scene in scenes},
        "scores": {scene.key: scene.score for scene in scenes},
        "timings": {**seconds, "total": round(time.perf_counter() - started, 3)},
    }


def _summary(scene: Scene) -> str:
    return (
        f"{scene.title:40}{scene.seconds:5.1f} s   largest change outside the mask: {scene.change_outside:g}"
        f"   safety score: {_score_text(scene)}"
    )


def _score_text(scene: Scene) -> str:
    return "checker not installed" if scene.score is None else f"{scene.score:.3f}"


def _photos() -> Callable[[str], Tensor]:
    try:
        from skimage import data
    except ImportError as error:
        raise MissingPackageError(
            f"The demo needs the package scikit-image for its photographs ({error}); install it with"
            " `pip install scikit-image`."
        ) from error
    return lambda name: torch.from_numpy(getattr(data, name)().astype(np.float32) / 255)[None]


def _find_comfyui(say: Callable[[str], None]) -> Workspace | None:
    """A ComfyUI with what the pack requires; says why there is none."""
    workspace = find_workspace()
    if workspace is None:
        say("No ComfyUI was found; COMFYUI_PATH can name one.")
        return None
    missing = missing_requirements(workspace)
    if missing:
        say(f"Installing {', '.join(missing)} into the Python of {workspace.path}, as ComfyUI Manager would.")
        try:
            install_requirements(workspace)
        except ServerError as error:
            say(str(error))
            return None
    return workspace


@contextlib.contextmanager
def _open_runner(workspace: Workspace | None, scratch: Path, host: LocalHost) -> Iterator[Runner]:
    if workspace is None:
        yield EngineRunner(host)
        return
    try:
        with Server(workspace, scratch / "comfyui") as server:
            yield ComfyRunner(f"ComfyUI {workspace.version}", server)
    except ServerError as error:
        raise MendError(str(error)) from error


def _save(out: Path, scene: Scene) -> list[Path]:
    pictures = {"before": scene.before, "mask": scene.mask[..., None], "after": scene.after}
    return [write_image(out / f"{scene.key}-{name}.png", picture, force=True) for name, picture in pictures.items()]


def _save_sheet(out: Path, scenes: Sequence[Scene], runner: str) -> Path:
    rows = [
        Row(
            title=scene.title,
            facts=f"{scene.facts}  ·  {scene.seconds:.1f} s",
            before=_picture(scene.before),
            place=scene.place,
            mask=_picture(scene.mask[..., None]),
            after=_picture(scene.after),
        )
        for scene in scenes
    ]
    worst = max(scene.change_outside for scene in scenes)
    scores = ",  ".join(_score_text(scene) for scene in scenes)
    sheet = contact_sheet.draw(
        "Mend",
        f"changes what you masked, and nothing else  ·  made by {runner}",
        rows,
        [
            f"Largest change of any pixel outside the masks: {worst:g} of 255 levels",
            f"Safety scores of the results, from 0 (safe) to 1:  {scores}",
        ],
    )
    pixels = torch.from_numpy(np.asarray(sheet).astype(np.float32) / 255)
    return write_image(out / "contact-sheet.png", pixels, force=True)


def _picture(pixels: Tensor) -> Image.Image:
    levels = to_bytes(pixels[0])
    return Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels)
