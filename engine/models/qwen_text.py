"""Qwen2.5-VL, the language model that Qwen-Image reads prompts with, and Qwen-Image-Edit prompts and pictures.

A prompt is put as a user's message of a chat, and the states of all tokens behind the fixed head of that chat are what
the network reads (Wu et al., Qwen-Image technical report, arXiv 2508.02324, section 2). A picture stands in the message
as one token for 28x28 of its pixels, which has three places, in time, rows and columns, where a text's tokens are
counted through (Bai et al., Qwen2.5-VL technical report, arXiv 2502.13923, section 2.1.3).
"""

from __future__ import annotations

import functools
import inspect
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..host import ManagedModule, Role
from ..images import to_bytes
from ..memory import MIB
from ..types import InputError, ModelFileError
from .family import Components, Config, Part, State, brain_float
from .protocol import PromptSyntax

TOKENIZER_FOLDERS = "qwen25_tokenizer"
"""The kind of ``Host.model_folders`` that may hold a tokenizer of Qwen2.5's, for files without folders of their own."""

DESCRIBE = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the"
    " objects and background:"
)
CHANGE = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain how"
    " the user's text instruction should alter or modify the image. Generate a new image that meets the user's"
    " requirements while maintaining consistency with the original input where appropriate."
)
"""The system's message, as in training: of Qwen-Image and of Qwen-Image-Edit."""
PICTURE_TOKEN = "<|image_pad|>"
PICTURE = f"<|vision_start|>{PICTURE_TOKEN}<|vision_end|>"

PIPELINE_TOKENS = 512
"""Of a prompt, after which diffusers' QwenImageInpaintPipeline cuts it."""
MAX_TOKENS = 1024
"""Of a prompt: the longest that Qwen-Image's pipelines take."""

PATCH = 14
MERGED = 2
"""Patches along a picture token's side."""
FRAMES = 2
"""A still is shown to the vision tower as so many equal ones."""
VISION_BASE = 10000.0
"""Of its frequencies."""
LEAST_PIXELS, MOST_PIXELS = 56 * 56, 12_845_056
"""Of a picture as the vision tower is shown it."""
PICTURE_MEAN = (0.48145466, 0.4578275, 0.40821073)
PICTURE_STD = (0.26862954, 0.26130258, 0.27577711)

ACTIVATION_BYTES = 600 * MIB
"""Of the 7B model over 1024 tokens, in float32."""


# --- the network


def build_language_model(config: Config) -> nn.Module:
    """Qwen2.5-VL without its vision tower."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    full = _full_config(config)
    module = Qwen2_5_VLTextModel(full.text_config)
    _make_frequencies(module, full)
    return module


def build_vision_language_model(config: Config) -> nn.Module:
    """All of Qwen2.5-VL but its last layer, which would make words."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

    full = _full_config(config)
    module = Qwen2_5_VLModel(full)
    _make_frequencies(module, full)
    return module


def _full_config(config: Config) -> Any:
    from transformers import Qwen2_5_VLConfig

    text = dict(config.get("text_config") or {})
    rope = text.get("rope_parameters")
    # what transformers 5 saves, transformers 4 knows by its old names
    if rope and not hasattr(Qwen2_5_VLConfig().text_config, "rope_parameters"):
        text |= {"rope_scaling": rope, "rope_theta": rope["rope_theta"]}
    return Qwen2_5_VLConfig.from_dict({**config, **({"text_config": text} if text else {})})


def _make_frequencies(module: nn.Module, config: Any) -> None:
    """The rotary embeddings' frequencies, which files do not hold, also where a module is made without values."""
    for name, inner in module.named_modules():
        if "inv_freq" not in inner._buffers:
            continue
        if name.startswith("visual."):
            head = config.vision_config.hidden_size // config.vision_config.num_heads
            # rows and columns share a head
            frequencies = _frequencies(VISION_BASE, head // 2)
        else:
            text = config.text_config
            base = (getattr(text, "rope_parameters", None) or {}).get("rope_theta") or text.rope_theta
            frequencies = _frequencies(base, text.hidden_size // text.num_attention_heads)
        inner._buffers["inv_freq"] = frequencies
        # a second one, in some versions of transformers a buffer, for lengths that change the frequencies
        if "original_inv_freq" in inner._buffers:
            inner._buffers["original_inv_freq"] = frequencies.clone()
        else:
            inner.original_inv_freq = frequencies


def _frequencies(base: float, width: int) -> Tensor:
    return 1.0 / base ** (torch.arange(0, width, 2, dtype=torch.float32, device="cpu") / width)


def read_language_model(state: State, config: Config) -> dict[str, Tensor]:
    """From every spelling of a whole Qwen2.5-VL, without its vision tower."""
    return {
        key.removeprefix("language_model."): tensor
        for key, tensor in read_vision_language_model(state, config).items()
        if not key.startswith("visual.")
    }


def read_vision_language_model(state: State, config: Config) -> dict[str, Tensor]:
    """From transformers' names of all versions, which ComfyUI's files have as well."""
    result = {}
    for key, tensor in state.items():
        key = key.removeprefix("model.")
        if key.startswith("lm_head."):
            continue
        if not key.startswith(("visual.", "language_model.")):
            key = f"language_model.{key}"
        result[key] = tensor
    return result


_PREFIXES = ("text_encoders.qwen25_7b.transformer.",)
LANGUAGE_MODEL = Part(
    "text_encoder",
    Role.TEXT_ENCODER,
    "qwen2_5_vl",
    build_language_model,
    read_language_model,
    _PREFIXES,
    precision=brain_float,
)
VISION_LANGUAGE_MODEL = Part(
    "text_encoder",
    Role.TEXT_ENCODER,
    "qwen2_5_vl",
    build_vision_language_model,
    read_vision_language_model,
    _PREFIXES,
    precision=brain_float,
)


# --- the tokenizer


def qwen_tokenizer(components: Components) -> Any:
    """The model's own, else one the host has; raises ModelFileError where there is none."""
    folder = components.find_tokenizer(("tokenizer", "processor"), TOKENIZER_FOLDERS, "Qwen2.5")
    return load_qwen_tokenizer(folder)


def load_qwen_tokenizer(folder: Path) -> Any:
    """The tokenizer in ``folder``; raises ModelFileError where it cannot be read or knows no chats."""
    import transformers

    # transformers 4 reads a tokenizer.json with this one alone
    tokenizer_class: Any = getattr(transformers, "Qwen2TokenizerFast", None) or transformers.Qwen2Tokenizer
    try:
        tokenizer = tokenizer_class.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers package raises nothing narrower
        raise ModelFileError(
            f"{folder.parent.name} has a tokenizer of Qwen2.5 that cannot be read ({error}): download it again."
        ) from error
    if len(tokenizer("<|im_start|>")["input_ids"]) != 1:
        raise ModelFileError(
            f"{folder.parent.name} has a tokenizer without the marks of Qwen2.5's chats: download it again."
        )
    return tokenizer


# --- prompts and pictures


class Picture(NamedTuple):
    """What is shown to the vision tower: 8-bit RGB, row by row."""

    width: int
    height: int
    data: bytes

    @classmethod
    def of(cls, pixels: Tensor) -> Picture:
        """Of [3, H, W] in -1..1."""
        return cls.from_image(Image.fromarray(to_bytes(pixels.permute(1, 2, 0) / 2 + 0.5)))

    @classmethod
    def from_image(cls, image: Image.Image) -> Picture:
        return cls(image.width, image.height, image.tobytes())

    @property
    def pixels(self) -> Tensor:
        """[1, H, W, 3] in 0..1."""
        return torch.from_numpy(np.array(self.image, dtype=np.float32) / 255)[None]

    @property
    def image(self) -> Image.Image:
        return Image.frombytes("RGB", (self.width, self.height), self.data)


class Patches(NamedTuple):
    """A picture as the vision tower reads it."""

    values: Tensor
    """[rows * columns, 3 * 2 * 14 * 14], 2x2 neighbours after each other."""
    rows: int
    columns: int

    @property
    def grid(self) -> Tensor:
        return torch.tensor([[1, self.rows, self.columns]])

    @property
    def tokens(self) -> tuple[int, int]:
        """Rows and columns of them."""
        return self.rows // MERGED, self.columns // MERGED


def patches(picture: Picture) -> Patches:
    """``picture`` at the nearest size of whole tokens that is neither too large nor too small, in patches."""
    width, height = whole_tokens(picture.width, picture.height)
    resized = picture.image.resize((width, height), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.asarray(resized, dtype=np.float32).transpose(2, 0, 1) / 255)
    mean, std = (torch.tensor(values)[:, None, None] for values in (PICTURE_MEAN, PICTURE_STD))
    frames = ((pixels - mean) / std).expand(FRAMES, -1, -1, -1)
    rows, columns = height // PATCH, width // PATCH
    cut = frames.reshape(FRAMES, 3, rows // MERGED, MERGED, PATCH, columns // MERGED, MERGED, PATCH)
    values = cut.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(rows * columns, -1)
    return Patches(values, rows, columns)


def whole_tokens(width: int, height: int) -> tuple[int, int]:
    """The size at which a picture of ``width`` x ``height`` pixels is shown; raises InputError for a mere line."""
    if max(width, height) > 200 * min(width, height):
        raise InputError(
            f"The picture is {width}x{height}, and a picture for Qwen2.5-VL is at most 200 times as long as wide: give"
            " the mask more surroundings."
        )
    side = PATCH * MERGED
    sizes = [max(round(length / side), 1) * side for length in (width, height)]
    if not LEAST_PIXELS <= sizes[0] * sizes[1] <= MOST_PIXELS:
        large = sizes[0] * sizes[1] > MOST_PIXELS
        scale = math.sqrt((MOST_PIXELS if large else LEAST_PIXELS) / (width * height))
        whole = math.floor if large else math.ceil
        sizes = [max(whole(length * scale / side), 1) * side for length in (width, height)]
    return sizes[0], sizes[1]


def places(length: int, first: int, tokens: tuple[int, int]) -> Tensor:
    """Of ``length`` tokens in time, rows and columns, [3, 1, length], where a picture of ``tokens`` (rows, columns)
    begins at the token ``first``.

    The text behind a picture goes on after the largest place in it.
    """
    rows, columns = tokens
    behind = first + rows * columns
    picture = torch.stack(
        torch.broadcast_tensors(torch.zeros(1, 1), torch.arange(rows)[:, None], torch.arange(columns)[None])
    ).flatten(1)
    rest = torch.arange(length - behind).expand(3, -1) + max(rows, columns)
    return torch.cat([torch.arange(first).expand(3, -1), picture + first, rest + first], dim=1)[:, None].long()


@functools.cache
def pipelines_count_through() -> bool:
    """Whether diffusers' pipelines, with the installed transformers, give a picture's tokens the places of a text.

    Since transformers 5 a Qwen2.5-VL computes the three places only for callers that tell it which tokens are a
    picture's, which the pipelines of diffusers 0.42.1 do not; the network was not trained so.
    """
    from transformers import Qwen2_5_VLModel

    if "mm_token_type_ids" not in inspect.signature(Qwen2_5_VLModel.get_rope_index).parameters:
        return False
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit

    try:
        return "mm_token_type_ids" not in inspect.getsource(pipeline_qwenimage_edit)
    except OSError:  # installed without sources; every release up to 0.42.1 does
        return True


@dataclass(frozen=True)
class Chat:
    """The fixed parts around a prompt."""

    system: str
    before: str = ""
    """In front of the prompt, in the user's message."""

    @property
    def head(self) -> str:
        """What the network does not read the states of."""
        return f"<|im_start|>system\n{self.system}<|im_end|>\n<|im_start|>user\n"

    def around(self, prompt: str) -> str:
        return f"{self.head}{self.before}{prompt}<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True)
class QwenReader:
    """A Qwen2.5-VL and the chat in which it is shown a prompt."""

    encoder: ManagedModule
    tokenizer: Any
    chat: Chat

    def read(self, prompt: str, syntax: PromptSyntax) -> Tensor:
        """The states of a prompt, [1, tokens, width] in float32 on the CPU.

        The text is taken as it is, without weights; as in ComfyUI, ``COMFY`` reads ``\\(`` as a parenthesis. ``PLAIN``
        cuts it where diffusers' pipeline does. Raises InputError for one that is too long.
        """
        ids, head = self._ids(prompt, syntax)
        if syntax is PromptSyntax.PLAIN:
            ids = ids[: head + PIPELINE_TOKENS]
        return self._states(head, input_ids=torch.tensor([ids]))

    def read_with(self, prompt: str, picture: Picture, syntax: PromptSyntax) -> Tensor:
        """The states of a picture's tokens and the prompt's, as ``read``."""
        ids, head = self._ids(prompt, syntax)
        seen = patches(picture)
        (mark,) = self.tokenizer(PICTURE_TOKEN)["input_ids"]
        first = ids.index(mark)
        if ids.count(mark) > 1:
            raise InputError(f"The prompt holds {PICTURE_TOKEN}, which stands for the picture: take it out.")
        rows, columns = seen.tokens
        ids[first : first + 1] = [mark] * (rows * columns)
        at = places(len(ids), first, seen.tokens)
        if syntax is PromptSyntax.PLAIN and pipelines_count_through():
            at = torch.arange(len(ids)).expand(3, 1, -1)
        return self._states(
            head, input_ids=torch.tensor([ids]), position_ids=at, pixel_values=seen.values, image_grid_thw=seen.grid
        )

    def _ids(self, prompt: str, syntax: PromptSyntax) -> tuple[list[int], int]:
        """All tokens, and how many of them are the head's."""
        if syntax is PromptSyntax.COMFY:
            prompt = prompt.replace("\\(", "(").replace("\\)", ")")
        count = len(self.tokenizer(prompt)["input_ids"]) if prompt else 0
        if count > MAX_TOKENS and syntax is PromptSyntax.COMFY:
            raise InputError(f"The prompt has {count} tokens, and Qwen-Image reads {MAX_TOKENS}: make it shorter.")
        head = len(self.tokenizer(self.chat.head)["input_ids"])
        return list(self.tokenizer(self.chat.around(prompt))["input_ids"]), head

    def _states(self, head: int, **given: Tensor) -> Tensor:
        device = self.encoder.load(ACTIVATION_BYTES)
        with torch.no_grad():
            output = self.encoder.module(
                **{name: value.to(device) for name, value in given.items()}, use_cache=False, return_dict=True
            )
        states: Tensor = output.last_hidden_state[:, head:]
        return states.float().cpu()
