"""ComfyUI's own nodes and those of a custom_nodes folder, called by id with the defaults that they declare."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any


def node(node_id: str) -> type:
    """A loaded node's class; KeyError where it is not loaded."""
    import nodes

    found: type = nodes.NODE_CLASS_MAPPINGS[node_id]
    return found


def call(node_id: str, **inputs: Any) -> tuple[Any, ...]:
    """What the node returns; inputs that are not given take the node's defaults."""
    cls: Any = node(node_id)
    declared = cls.INPUT_TYPES()
    values = {}
    for name, specification in {**declared.get("required", {}), **declared.get("optional", {})}.items():
        kind, options = specification[0], (specification[1] if len(specification) > 1 else {})
        if "default" in options:
            values[name] = options["default"]
        elif isinstance(kind, list):
            values[name] = kind[0]
    result = getattr(cls(), cls.FUNCTION)(**{**values, **inputs})
    return tuple(getattr(result, "result", result))


def load_builtin(module: str) -> None:
    """Nodes of comfy_extras, "nodes_mask" for example."""
    import comfy_extras

    import nodes

    path = Path(comfy_extras.__path__[0]) / f"{module}.py"
    asyncio.run(nodes.load_custom_node(str(path), module_parent="comfy_extras"))


def load_pack(folders: list[Path], name: str) -> bool:
    """Load the pack whose folder is called ``name`` but for case and punctuation; False where there is none."""
    import nodes

    for folder in folders:
        for pack in sorted(folder.iterdir()) if folder.is_dir() else []:
            if _plain(name) in _plain(pack.name) and (pack / "__init__.py").exists():
                if not asyncio.run(nodes.load_custom_node(str(pack))):
                    raise RuntimeError(f"ComfyUI could not load {pack}")
                return True
    return False


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
