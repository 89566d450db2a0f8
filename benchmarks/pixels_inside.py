"""Runs the cases of pixels.py, in ComfyUI's own Python where there is one, and leaves the rows as JSON.

pixels.py starts it with a JSON object as its argument: only, quick, folders (of custom nodes), photos (an .npz), out.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    order = json.loads(sys.argv[1])
    if "COMFYUI_PATH" in os.environ:
        sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "comfyui")]
        import inside

        inside.boot()
    else:
        _import_pack()
    from comfyui_mend.benchmarks import pixel_cases
    from comfyui_mend.benchmarks.table import as_json

    bench, missing = _bench(order)
    rows = []
    for name in order["only"]:
        sys.stderr.write(f"{name}: {(pixel_cases.CASES[name].__doc__ or '').splitlines()[0]}\n")
        rows += pixel_cases.CASES[name](bench)
    answer = {"contestants": [c.name for c in bench.contestants], "not_found": missing, "rows": as_json(rows)}
    Path(order["out"]).write_text(json.dumps(answer))


def _import_pack() -> None:
    spec = importlib.util.spec_from_file_location(
        "comfyui_mend", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    assert spec and spec.loader
    pack = importlib.util.module_from_spec(spec)
    sys.modules["comfyui_mend"] = pack
    spec.loader.exec_module(pack)


def _bench(order: dict) -> tuple:
    """Everybody who is here, and the names of the packs that are not."""
    import torch
    from comfyui_mend.benchmarks.peers.mend import Mend, MendWithScipy
    from comfyui_mend.benchmarks.pixel_cases import Bench
    from comfyui_mend.engine.masks import opencv

    torch.set_num_threads(1)
    if opencv() is not None:
        opencv().setNumThreads(1)
    contestants: list = [Mend(), MendWithScipy()] if opencv() is not None else [Mend()]
    missing = []
    if "COMFYUI_PATH" in os.environ:
        from comfyui_mend.benchmarks.peers import comfy, core, crop_and_stitch, inpaint_nodes

        contestants += [core.Core(), core.CoreEncodeForInpaint()]
        folders = [Path(folder) for folder in order["folders"]]
        for module, pack in (
            (
                crop_and_stitch,
                [crop_and_stitch.CropAndStitch(mode) for mode in (crop_and_stitch.CPU, crop_and_stitch.GPU)],
            ),
            (inpaint_nodes, [inpaint_nodes.InpaintNodes()]),
        ):
            if comfy.load_pack(folders, module.PACK):
                contestants += pack
            else:
                missing.append(module.PACK)
    return Bench(contestants, _photos(order["photos"]), order["quick"]), missing


def _photos(path: str | None) -> dict:
    import numpy as np
    import torch

    if path is None:
        return {}
    return {name: torch.from_numpy(levels.astype(np.float32) / 255)[None] for name, levels in np.load(path).items()}


if __name__ == "__main__":
    main()
