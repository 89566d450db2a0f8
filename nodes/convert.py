"""The socket types this pack adds to ComfyUI."""

from __future__ import annotations

from typing import TypeVar

from comfy_api.latest import io

from ..engine.types import InputError

T = TypeVar("T")

ModelType = io.Custom("MEND_MODEL")
"""Carries a comfy_host.MendModel."""
SafetyCheckerType = io.Custom("MEND_SAFETY_CHECKER")
"""Carries an engine.safety.SafetyChecker."""
CropType = io.Custom("MEND_CROP")
"""Carries an engine.crop_record.CropRecord."""
ControlNetType = io.Custom("MEND_CONTROLNET")
"""Carries an adapters.LoadedControlNet."""
ControlType = io.Custom("MEND_CONTROL")
"""Carries an adapters.Controls."""
FillModelType = io.Custom("MEND_FILL_MODEL")
"""Carries a fill.LoadedFillModel."""


def connected(name: str, value: object, kind: type[T], source: str) -> T:
    """What came through a wire of ours. The host checks links only; an API graph can hold anything."""
    if not isinstance(value, kind):
        raise InputError(f"{name} is {str(value)[:80]!r}; connect {source} to it.")
    return value


def wired(name: str, value: T, source: str) -> T:
    """What came through a wire of ComfyUI's own, whose values other packs make as well: anything but a constant."""
    if isinstance(value, (str, int, float, dict)):
        raise InputError(f"{name} is {str(value)[:80]!r}; connect {source} to it.")
    return value
