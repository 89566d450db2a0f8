"""What the pack adds to ComfyUI's start: seconds to import it and read its nodes, in fresh processes.

python benchmarks/import_time.py [runs]      (needs a ComfyUI, as the tests do)
"""

import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "tests"), str(ROOT / "tests" / "comfyui")]

INSIDE = """
import asyncio, importlib.util, sys, time
sys.path.insert(0, {comfyui!r})
from comfy.cli_args import args
args.cpu = True
import nodes, comfy_extras.nodes_mask, comfy_api.latest   # what ComfyUI has imported by then

start = time.perf_counter()
spec = importlib.util.spec_from_file_location("pack", {root!r} + "/__init__.py", submodule_search_locations=[{root!r}])
pack = importlib.util.module_from_spec(spec)
sys.modules["pack"] = pack
spec.loader.exec_module(pack)
extension = asyncio.run(pack.comfy_entrypoint())
for node in asyncio.run(extension.get_node_list()):
    node.GET_SCHEMA()
print(time.perf_counter() - start)
heavy = [name for name in ("diffusers", "cv2", "onnxruntime", "patchmatch", "skimage") if name in sys.modules]
print(",".join(heavy) or "none")
"""


def main() -> None:
    from workspace import _inside, ensure_requirements, find_workspace

    workspace = find_workspace()
    if workspace is None:
        sys.exit("no ComfyUI found; set COMFYUI_PATH")
    ensure_requirements(workspace)
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    code = INSIDE.format(comfyui=str(workspace.path), root=str(ROOT))
    answers = [_inside(workspace, code).splitlines()[-2:] for _ in range(runs)]
    seconds = [float(first) for first, _ in answers]
    print(f"ComfyUI {workspace.version}: the pack adds {statistics.median(seconds):.3f} s to the start", end=" ")
    print(f"(median of {runs}, {min(seconds):.3f} to {max(seconds):.3f}; the aim is under 0.3)")
    print(f"heavy packages imported by it: {answers[0][1]}")


if __name__ == "__main__":
    main()
