"""A node pack for the tests: ComfyUI's loaders, with tiny random models in the place of the files.

``Tiny`` before a loader's name takes the same inputs and gives what the loader gives. Text encoders, networks and
autoencoders are ComfyUI's own classes in small sizes; only the edit model is a stand-in, which does to the picture what
edit models do to it (see ``edit_model``).
"""

import sys
from functools import cache
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2]
for folder in (TESTS, TESTS / "comfyui"):
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

import conftest  # noqa: E402, F401  imports the pack as comfyui_mend, which the tiny models need

from . import families  # noqa: E402


def loader(core, inputs, outputs, load):
    """The stand-in of a core loader; ``inputs`` are names of files or menu entries."""

    load = cache(load)

    class Loader:
        RETURN_TYPES = outputs
        FUNCTION = "load"
        CATEGORY = "tiny"

        @classmethod
        def INPUT_TYPES(cls):  # noqa: N802
            return {"required": {name: ("STRING", {}) for name in inputs}}

        def load(self, **values):
            loaded = load(*(values[name] for name in inputs))
            return loaded if isinstance(loaded, tuple) else (loaded,)

    Loader.__name__ = f"Tiny{core}"
    return Loader


NODE_CLASS_MAPPINGS = {
    f"Tiny{core}": loader(core, *specification)
    for core, specification in {
        "CheckpointLoaderSimple": (("ckpt_name",), ("MODEL", "CLIP", "VAE"), families.checkpoint),
        "UNETLoader": (("unet_name", "weight_dtype"), ("MODEL",), lambda name, _: families.MODELS[name]()),
        "CLIPLoader": (("clip_name", "type", "device"), ("CLIP",), lambda _, kind, __: families.CLIPS[kind]()),
        "DualCLIPLoader": (
            ("clip_name1", "clip_name2", "type", "device"),
            ("CLIP",),
            lambda _, __, kind, ___: families.CLIPS[kind](),
        ),
        "VAELoader": (("vae_name",), ("VAE",), lambda name: families.VAES[name]()),
        "ControlNetLoader": (("control_net_name",), ("CONTROL_NET",), lambda _: families.control_net()),
    }.items()
}
