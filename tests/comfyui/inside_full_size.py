"""Runs under ComfyUI's own Python: Stable Diffusion 1.5 inpainting at its real size, with random weights, in one file.

The file is loaded by ComfyUI's checkpoint loader and by the engine; prints how far their pictures are apart.
Takes about 9 GB of memory.
"""

from __future__ import annotations

import sys
from pathlib import Path

import inside
import torch

inside.boot()
sys.path.insert(0, str(inside.ROOT / "tests"))

import comfy.sd  # noqa: E402
from comfy.cli_args import args  # noqa: E402

args.force_fp32 = args.fp32_text_enc = args.fp32_vae = True

from comfyui_mend.engine.host import LocalHost  # noqa: E402
from comfyui_mend.engine.inpaint import inpaint  # noqa: E402
from comfyui_mend.engine.models.detect import CONFIGS  # noqa: E402
from comfyui_mend.engine.models.load import load_model  # noqa: E402
from comfyui_mend.engine.models.weight_files import read_json  # noqa: E402
from comfyui_mend.engine.types import InpaintRequest  # noqa: E402
from comfyui_mend.nodes.native import NativeModel  # noqa: E402
from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from tiny import photo_and_mask  # noqa: E402
from tiny_single_file import original_state_of  # noqa: E402
from transformers import CLIPTextConfig, CLIPTextModel  # noqa: E402

CONFIG = CONFIGS / "sd15-inpaint"


def write_checkpoint(path: Path) -> int:
    """Its size in bytes; half precision, so that both loaders read the same numbers."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config(read_json(CONFIG / "unet" / "config.json"))
    vae = AutoencoderKL.from_config(read_json(CONFIG / "vae" / "config.json"))
    text_encoder = CLIPTextModel(CLIPTextConfig.from_dict(read_json(CONFIG / "text_encoder" / "config.json")))
    state = original_state_of(unet, vae, text_encoder)
    save_file({key: value.half().contiguous() for key, value in state.items()}, path)
    return path.stat().st_size


def main(path: Path) -> dict[str, float]:
    size = write_checkpoint(path)
    image, mask = photo_and_mask(640, 448)
    request = InpaintRequest(image=image, mask=mask, prompt="a red bench", negative_prompt="blurry", seed=3, steps=2)
    host = LocalHost(torch.device("cpu"))
    model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(str(path))
    native = NativeModel(model, vae, clip)
    first = inpaint(request, native, host).images
    del native, model, clip, vae
    second = inpaint(request, load_model(path, host), host).images
    inside_mask = mask[0] > 0
    return {
        "gigabytes": size / 1e9,
        "difference": float((first - second).abs().max()),
        "painted": float((first - image)[0][inside_mask].abs().mean()),
        "outside": float((first - image)[0][~inside_mask].abs().max()),
    }


if __name__ == "__main__":
    with torch.no_grad():
        torch.set_num_threads(2)
        inside.answer(main(Path(sys.argv[1])))
