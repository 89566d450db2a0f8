"""``python -m comfyui_mend.training``: VAE, then UNet and text encoder, then the model's folder.

Everything follows from the seeds in the code. Stopped at any moment, the same command goes on where it was. Losses go
to log.jsonl and sample pictures to sheet.png, in a folder for each part below RUNS.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..engine.models.detect import SHIPPED
from . import train_unet, train_vae
from .export import export

MODEL = SHIPPED / "mend-shapes"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m comfyui_mend.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--runs", type=Path, default=Path("training-runs"), help="checkpoints (default: %(default)s)")
    parser.add_argument("--model", type=Path, default=MODEL, help="folder to write (default: the shipped one)")
    parser.add_argument("--vae-steps", type=int, default=train_vae.STEPS, help="default: %(default)s")
    parser.add_argument("--unet-steps", type=int, default=train_unet.STEPS, help="default: %(default)s")
    options = parser.parse_args()
    vae_run, unet_run = options.runs / "vae", options.runs / "unet"
    finished = train_vae.train(vae_run, options.vae_steps)
    finished = finished and train_unet.train(unet_run, vae_run, options.unet_steps)
    if not finished:
        raise SystemExit(f"Stopped; the same command goes on with what is in {options.runs}.")
    size = export(vae_run, unet_run, options.model)
    print(f"{options.model}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
