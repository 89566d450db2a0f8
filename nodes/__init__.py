"""ComfyUI's side: V3 nodes, each a schema, a conversion and one call into the engine."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import adapters, color, compare, crop, edit, fill, inpaint, load, mask, outpaint, safety, wrap


class MendExtension(ComfyExtension):
    """What ComfyUI registers."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            *load.NODES,
            *adapters.NODES,
            *wrap.NODES,
            *edit.NODES,
            *mask.NODES,
            *outpaint.NODES,
            *fill.NODES,
            *crop.NODES,
            *inpaint.NODES,
            *color.NODES,
            *compare.NODES,
            *safety.NODES,
        ]
