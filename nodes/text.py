"""What a node has to say to the person at the graph; web/text.js draws it."""

from __future__ import annotations

import logging

from comfy_api.latest import ui

log = logging.getLogger("mend")


def show(notices: tuple[str, ...]) -> ui.PreviewText | None:
    """The notices on the node and in the log; None, which shows nothing, without any."""
    for notice in notices:
        log.warning("Mend: %s", notice)
    return ui.PreviewText("\n".join(notices)) if notices else None
