"""One import name everywhere: the repository's root is the package ``comfyui_mend``, installed or not."""

import importlib.util
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# tiny tensors: threads only get in each other's way
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]

if "comfyui_mend" not in sys.modules:
    spec = importlib.util.spec_from_file_location(
        "comfyui_mend", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules["comfyui_mend"] = module
    spec.loader.exec_module(module)
