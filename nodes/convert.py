"""The socket types this pack adds to ComfyUI."""

from __future__ import annotations

from comfy_api.latest import io

ModelType = io.Custom("MEND_MODEL")
"""Carries a comfy_host.MendModel."""
SafetyCheckerType = io.Custom("MEND_SAFETY_CHECKER")
"""Carries an engine.safety.SafetyChecker."""
CropType = io.Custom("MEND_CROP")
"""Carries an engine.crop_record.CropRecord."""
FillModelType = io.Custom("MEND_FILL_MODEL")
"""Carries a fill.LoadedFillModel."""
