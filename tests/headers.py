"""safetensors files of which only the header is real: what detection reads, at no cost in room."""

from __future__ import annotations

import json
import struct

import torch
from comfyui_mend.engine.models import ldm
from comfyui_mend.engine.models.weight_files import DTYPES


def write_header(path, shapes, dtype="F16", data=b"", sparse=True):
    """A safetensors file of these shapes whose data takes no room on disk."""
    header, offset = {}, 0
    for key, shape in shapes.items():
        size = torch.Size(shape).numel() * DTYPES[dtype].itemsize
        header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw + data)
        file.truncate(8 + len(raw) + offset)
    return path


def checkpoint_shapes(context=768, channels=4, text=ldm.CLIP_PREFIX + "text_model."):
    unet = ldm.UNET_PREFIX
    return {
        f"{unet}output_blocks.11.1.transformer_blocks.0.norm1.bias": (320,),
        f"{unet}input_blocks.0.0.weight": (320, channels, 3, 3),
        f"{unet}middle_block.1.transformer_blocks.0.attn2.to_k.weight": (1280, context),
        "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
        f"{text}embeddings.position_embedding.weight": (77, context),
    }
