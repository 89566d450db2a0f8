"""MendLoadSafetyChecker and MendSafetyCheck."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io, ui
from torch import Tensor

from ..engine.safety import (
    BUILT_IN,
    DEFAULT_THRESHOLD,
    Rating,
    SafetyAction,
    SafetyChecker,
    SafetyResult,
    check,
    find_safety_checkers,
    load_safety_checker,
)
from .comfy_host import ComfyHost
from .convert import SafetyCheckerType, connected

log = logging.getLogger("mend")

BUILT_IN_CHOICE = f"{BUILT_IN} (built in)"
FOLDERS_HINT = (
    "put a StableDiffusionSafetyChecker folder (config.json and model.safetensors), or a diffusers model that has a"
    " safety_checker inside, into models/diffusers and reload the page"
)


@dataclass(frozen=True)
class LoadedChecker:
    """What travels on a MEND_SAFETY_CHECKER wire: a checker that owns the patchers of what it loaded."""

    checker: SafetyChecker
    host: ComfyHost = field(default_factory=ComfyHost)

    @property
    def name(self) -> str:
        return self.checker.name

    @property
    def default_threshold(self) -> float:
        return self.checker.default_threshold

    def score(self, images: Tensor) -> list[Rating]:
        return self.checker.score(images)

    def get_models(self) -> list[ModelPatcher]:
        """For ComfyUI, which keeps the models of the running prompt in fast memory."""
        return self.host.patchers


def load_choice(choice: str) -> LoadedChecker:
    """The checker of a menu entry."""
    host = ComfyHost()
    source: str | Path = BUILT_IN if choice == BUILT_IN_CHOICE else find_safety_checkers(host)[choice]
    return LoadedChecker(load_safety_checker(source, host), host)


def refuse_unknown(choice: str) -> str | None:
    """Why a menu entry cannot be loaded, or None; only what the menu lists is ever opened."""
    if choice == BUILT_IN_CHOICE or choice in find_safety_checkers(ComfyHost()):
        return None
    return f"There is no safety checker '{choice}'; choose one from the menu, or {FOLDERS_HINT}."


class MendLoadSafetyChecker(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendLoadSafetyChecker",
            display_name="Load Safety Checker (Mend)",
            category="Mend",
            description=(
                "Loads what Safety Check (Mend) judges pictures with. The built-in checker needs no download; Stable"
                " Diffusion's own is found in models/diffusers."
            ),
            search_aliases=["safety checker", "nsfw", "nsfw filter", "content filter", "censor", "moderation"],
            inputs=[
                io.Combo.Input(
                    "checker",
                    options=[BUILT_IN_CHOICE, *find_safety_checkers(ComfyHost())],
                    default=BUILT_IN_CHOICE,
                    tooltip=(
                        f"{BUILT_IN_CHOICE}: a small network for photographs, on the CPU, nothing to download. Folders:"
                        f" Stable Diffusion's own checker; to add one, {FOLDERS_HINT}."
                    ),
                ),
            ],
            outputs=[
                SafetyCheckerType.Output("checker", tooltip="Goes into Safety Check (Mend)."),
            ],
        )

    @classmethod
    def validate_inputs(cls, checker: str) -> bool | str:
        return refuse_unknown(checker) or True

    @classmethod
    def fingerprint_inputs(cls, checker: str) -> str:
        folder = find_safety_checkers(ComfyHost()).get(checker)
        if folder is None:
            return checker
        files = (path for path in sorted(folder.iterdir()) if path.is_file())
        return json.dumps([checker, *([path.name, path.stat().st_mtime_ns, path.stat().st_size] for path in files)])

    @classmethod
    def execute(cls, checker: str) -> io.NodeOutput:
        return io.NodeOutput(load_choice(checker))


class MendSafetyCheck(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="MendSafetyCheck",
            display_name="Safety Check (Mend)",
            category="Mend",
            description=(
                "Judges each finished picture and blacks out, blurs or only reports what is flagged; the others pass"
                " untouched. Place it last, just before the picture is saved."
            ),
            search_aliases=["safety checker", "nsfw", "nsfw filter", "content filter", "censor", "moderation", "blur"],
            inputs=[
                io.Image.Input("images", tooltip="The finished picture, or a batch: each is judged by itself."),
                io.Float.Input(
                    "threshold",
                    default=DEFAULT_THRESHOLD,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "Pictures that score above it are flagged. 0.5 is the verdict each checker was made for, lower"
                        " is stricter, 1 never flags. With Stable Diffusion's checker 0.1 is 0.02 of similarity."
                    ),
                ),
                io.Combo.Input(
                    "action",
                    options=SafetyAction,
                    default=SafetyAction.BLACK,
                    tooltip=(
                        "What becomes of a flagged picture. black: all black. blur: a few soft colours, nothing to"
                        " recognise. pass: unchanged, the verdict is in the other outputs."
                    ),
                ),
                SafetyCheckerType.Input(
                    "checker",
                    optional=True,
                    tooltip="From Load Safety Checker (Mend); without one the built-in checker judges.",
                ),
            ],
            outputs=[
                io.Image.Output("images", tooltip="The same pictures, flagged ones concealed."),
                io.Boolean.Output("flagged", tooltip="True when any picture was flagged; for a switch."),
                io.Boolean.Output(
                    "flags",
                    is_output_list=True,
                    tooltip="One true or false for each picture, as a list: a node connected here runs once for each.",
                ),
                io.Float.Output(
                    "scores",
                    is_output_list=True,
                    tooltip=(
                        "One score from 0 (safe) to 1 for each picture, as a list: a node connected here runs once for"
                        " each."
                    ),
                ),
                io.String.Output(
                    "report",
                    tooltip=(
                        "All of it as one JSON text, to show, save or parse: checker, threshold, action, flagged, and"
                        " for each picture score, flagged and the checker's own numbers."
                    ),
                ),
            ],
        )

    @classmethod
    def execute(
        cls, images: Tensor, threshold: float, action: str, checker: LoadedChecker | None = None
    ) -> io.NodeOutput:
        if checker is None:
            checker = load_choice(BUILT_IN_CHOICE)
        checker = connected("checker", checker, LoadedChecker, "Load Safety Checker (Mend)")
        result = check(images, checker, threshold=threshold, action=SafetyAction(action))
        summary = summarise(result, checker.name, threshold)
        if result.flagged:
            log.warning(summary)
        return io.NodeOutput(
            result.images,
            result.flagged,
            list(result.flags),
            [score.score for score in result.scores],
            json.dumps(report(result, checker.name, threshold, action)),
            ui=ui.PreviewText(summary),
        )


def summarise(result: SafetyResult, checker: str, threshold: float) -> str:
    """For the person at the graph: "1 of 3 pictures flagged by opennsfw at 0.5; scores 0.01, 0.92, 0.03"."""
    scores = ", ".join(f"{score.score:.3f}" for score in result.scores)
    return f"{sum(result.flags)} of {len(result.flags)} pictures flagged by {checker} at {threshold:g}; scores {scores}"


def report(result: SafetyResult, checker: str, threshold: float, action: str) -> dict[str, object]:
    """The ``report`` output, ready for JSON."""
    return {
        "checker": checker,
        "threshold": threshold,
        "action": action,
        "flagged": result.flagged,
        "images": [
            {"score": score.score, "flagged": score.flagged, "details": dict(score.details)} for score in result.scores
        ],
    }


NODES: list[type[io.ComfyNode]] = [MendLoadSafetyChecker, MendSafetyCheck]
