"""Runs under ComfyUI's own Python, which has spandrel: LaMa with random weights, from its file to a filled picture.

Prints as one line of JSON what test_fill_nodes.py holds to what it should be.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from unittest import mock

import inside
import numpy as np
import torch
from inside import CPU, VRAM, fake_vram
from torch import Tensor, nn

inside.boot()

import comfy.model_management as mm  # noqa: E402
import folder_paths  # noqa: E402
from comfyui_mend.engine import tiles  # noqa: E402
from comfyui_mend.engine.fill import FillMethod, fill  # noqa: E402
from comfyui_mend.engine.host import LocalHost  # noqa: E402
from comfyui_mend.engine.models import fill_model  # noqa: E402
from comfyui_mend.engine.models.fill_model import FillModel, load_fill_model  # noqa: E402
from comfyui_mend.engine.types import InputError, MendError  # noqa: E402
from comfyui_mend.nodes.comfy_host import ComfyHost  # noqa: E402
from comfyui_mend.nodes.fill import LoadedFillModel, MendFill, MendLoadFillModel, find_models  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from spandrel.architectures.Compact import Compact  # noqa: E402
from spandrel.architectures.LaMa import LaMa  # noqa: E402


def lama() -> LaMa:
    """Random, but steady enough that 36 layers neither vanish nor explode."""
    torch.manual_seed(0)
    return LaMa(in_nc=4, out_nc=3).eval()


def save(path: Path, module: nn.Module, rename: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key.replace("model.model", rename or "model.model"): t for key, t in module.state_dict().items()}, path)
    return path


def picture(height: int, width: int, channels: int = 3, batch: int = 1) -> Tensor:
    return torch.rand(batch, height, width, channels, generator=torch.Generator().manual_seed(5))


def hole(height: int, width: int) -> Tensor:
    mask = torch.zeros(1, height, width)
    mask[:, height // 4 : height // 2, width // 3 : width // 2] = 1
    return mask


def refusal(path: Path) -> str:
    try:
        load_fill_model(path, LocalHost(CPU))
    except MendError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def files(folder: Path) -> dict:
    """What each file is answered with."""
    unknown = folder / "unknown.safetensors"
    save_file({"some.weight": torch.zeros(3)}, unknown)
    state = {key: tensor for key, tensor in lama().state_dict().items() if "model.model.9" not in key}
    save_file(state, folder / "damaged.safetensors")
    mat = folder / "mat.safetensors"
    save_file({"synthesis.first_stage.conv_first.conv.resample_filter": torch.zeros(4, 4)}, mat)
    upscaler = save(folder / "upscaler.safetensors", Compact(num_feat=8, num_conv=2))
    half = folder / "half.safetensors"
    save_file({key: tensor.half() for key, tensor in lama().state_dict().items() if tensor.is_floating_point()}, half)
    before = np.random.get_state()[1].copy()
    original = save(folder / "checkpoint.safetensors", lama(), rename="generator.model")
    names = {path.name: load_fill_model(path, LocalHost(CPU)).architecture for path in (half, original)}
    return {
        "refusals": {p.name: refusal(p) for p in (unknown, folder / "damaged.safetensors", mat, upscaler)},
        "architectures": names,
        "dtype": str(load_fill_model(half, LocalHost(CPU))._managed.dtype),
        "numpy's generator untouched": bool((np.random.get_state()[1] == before).all()),
    }


def results(path: Path) -> dict:
    """The engine beside the plain network."""
    network = load_fill_model(path, LocalHost(CPU))
    image, mask = picture(45, 61), hole(45, 61)
    filled = fill(image, mask, FillMethod.LAMA, network=network)
    # sides are made multiples of 8 by mirroring
    framed = np.pad(image[0].numpy(), ((0, 3), (0, 3), (0, 0)), mode="symmetric")
    with torch.no_grad():
        expected = lama()(
            torch.from_numpy(framed).permute(2, 0, 1)[None],
            torch.from_numpy(np.pad(mask[0].numpy(), ((0, 3), (0, 3)), mode="symmetric"))[None, None],
        )
    expected = expected[0].permute(1, 2, 0)[:45, :61].clamp(0, 1)
    batch = fill(picture(45, 61, 4, 2), mask, FillMethod.LAMA, network=network)
    return {
        "difference": float((filled[0] - expected).abs().max()),
        "outside": bool((filled[mask == 0] == image[mask == 0]).all()),
        "changed": float((filled - image).abs()[mask > 0].mean()),
        "batch": torch.equal(batch[1:], fill(picture(45, 61, 4, 2)[1:], mask, FillMethod.LAMA, network=network)),
        "alpha": bool((batch[..., 3][mask.expand(2, -1, -1) > 0] == 1).all()),
        "generator": generator_moves(network, image, mask),
    }


def generator_moves(network: FillModel, image: Tensor, mask: Tensor) -> bool:
    before = torch.get_rng_state()
    fill(image, mask, FillMethod.LAMA, network=network)
    return not torch.equal(before, torch.get_rng_state())


def memory(path: Path) -> dict:
    """The node's output under ComfyUI's memory management, beside the plain engine's."""
    image, mask = picture(72, 88), hole(72, 88)
    with inside.PretendedDevice():
        expected = fill(image, mask, FillMethod.LAMA, network=load_fill_model(path, LocalHost(VRAM)))
    rows = {}
    size = path.stat().st_size
    with mock.patch.dict(fill_model.BYTES_PER_PIXEL, LaMa=1):
        for label, share in (("full", 10.0), ("40 %", 0.4)):
            with fake_vram(share * size):
                host = ComfyHost()
                loaded = LoadedFillModel(load_fill_model(path, host), host)
                result = MendFill.execute(image, mask, "lama", fill_model=loaded).result[0]
                rows[label] = {
                    "loaded": loaded.patcher.loaded_size() / loaded.patcher.model_size(),
                    "equal": torch.equal(result, expected),
                    "models": len(loaded.get_models()),
                }
                mm.unload_all_models()
    return rows


def interruption() -> dict:
    """Stop is pressed while the second tile is painted."""
    painted: list[int] = []

    class Network:
        """Paints nothing."""

        name, architecture, window = "big-lama.safetensors", "LaMa", tiles.Window(64 * 64, 8)

        def fill(self, pixels: np.ndarray, wanted: np.ndarray, seed: int) -> np.ndarray:
            painted.append(1)
            if len(painted) == 2:
                mm.interrupt_current_processing(True)
            return pixels

    # shallow enough for tiles
    mask = torch.zeros(1, 600, 1200)
    mask[:, 300:310, 10:-10] = 1
    stopped = False
    try:
        MendFill.execute(picture(600, 1200), mask, "lama", fill_model=LoadedFillModel(Network()))
    except mm.InterruptProcessingException:
        stopped = True
    return {"stopped": stopped, "painted": len(painted)}


def nodes() -> dict:
    """Folders and answers of the two nodes."""
    registered = "inpaint" in folder_paths.folder_names_and_paths
    find_models()
    try:
        MendFill.execute(picture(8, 8), hole(8, 8), "lama", fill_model="big-lama")
    except InputError as error:
        not_a_model = str(error)
    return {
        "registered by": [registered, "inpaint" in folder_paths.folder_names_and_paths],
        "not a model": not_a_model,
        "unknown": MendLoadFillModel.validate_inputs(fill_model="nothing"),
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = save(Path(folder) / "inpaint" / "big-lama.safetensors", lama())
        report = {
            "nodes": nodes(),
            "files": files(Path(folder)),
            "results": results(path),
            "memory": memory(path),
            "interruption": interruption(),
        }
    inside.answer(report)


if __name__ == "__main__":
    sys.exit(main())
