"""Qwen-Image and Qwen-Image-Edit, painting with a mask (Wu et al. 2025, arXiv 2508.02324).

The network reads patches of 2x2 latent cells as FLUX does, and of a prompt the states of a language model. The editing
models read the picture twice: that language model sees it with the prompt, and its clean latents follow the state's as
tokens of a second picture.

Guidance keeps the length of each token of the prompt's own prediction, as diffusers' pipelines do.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..host import Host, ManagedModule, Role
from ..memory import MIB
from ..types import ModelFileError
from . import wan_vae
from .detect import STILL_MARK, Found
from .diffusers_model import DiffusersModel, Embedding, Rows, per_row
from .family import Components, Config, Family, Part, State, brain_float
from .flux import PATCH, pack, unpack
from .protocol import Canvas, Conditioning, ModelFacts, PromptSyntax
from .qwen_text import (
    CHANGE,
    DESCRIBE,
    LANGUAGE_MODEL,
    PICTURE,
    VISION_LANGUAGE_MODEL,
    Chat,
    Picture,
    QwenReader,
    qwen_tokenizer,
)

NATIVE_SIZE = 1024
SHORTEST = 1e-12
"""A token that guidance left nothing of stays nothing."""


@dataclass(frozen=True)
class Glance:
    """How the language model is shown a picture."""

    side: int
    """Of a square of as many pixels."""
    enlarges: bool
    """Whether smaller pictures are brought to that size, too."""

    def at(self, picture: Picture) -> Picture:
        scale = self.side / math.sqrt(picture.width * picture.height)
        if scale >= 1 and not self.enlarges:
            return picture
        width, height = (max(round(side * scale / 32), 1) * 32 for side in (picture.width, picture.height))
        return Picture.from_image(picture.image.resize((width, height), Image.Resampling.LANCZOS))


@dataclass(frozen=True)
class Sight:
    """How an editing model's language model is told of a picture."""

    chat: Chat
    glance: Glance


EDIT_SIGHT = Sight(Chat(CHANGE, PICTURE), Glance(NATIVE_SIZE, enlarges=False))
"""Of the first editing model, which was shown what it was to paint."""
LATER_EDIT_SIGHT = Sight(Chat(CHANGE, f"Picture 1: {PICTURE}"), Glance(384, enlarges=True))
"""Of those since."""


class QwenImageModel(DiffusersModel):
    """A Qwen2.5-VL, a QwenImageTransformer2DModel and an autoencoder for films, of which it is one frame."""

    denoiser_bytes = 1.5 * 370 * MIB / (1024 * 1024 * 2)

    def __init__(
        self, facts: ModelFacts, *, reader: QwenReader, denoiser: ManagedModule, vae: ManagedModule, host: Host
    ) -> None:
        super().__init__(facts, denoiser=denoiser, vae=vae, host=host)
        self.reader = reader
        rope: Any = denoiser.module.pos_embed
        # diffusers before 0.37 has to be told how long the prompts are
        self._wants_lengths = "max_txt_seq_len" not in inspect.signature(type(rope).forward).parameters

    def _encode(self, prompts: Sequence[Any], syntax: PromptSyntax) -> list[Embedding]:
        return [Embedding(self.reader.read(prompt, syntax)) for prompt in prompts]

    def _encode_whole(self, pixels: Tensor) -> Any:
        return wan_vae.encode(self.vae.module, pixels)

    def _decode_whole(self, latents: Tensor) -> Tensor:
        return wan_vae.decode(self.vae.module, latents)

    def _vae_widths(self) -> Sequence[int]:
        config: Any = self.vae.module.config
        return wan_vae.widths(config)

    def _denoise(self, rows: Rows, timestep: Tensor, embedding: Embedding) -> Tensor:
        state = rows[0]
        count, (height, width) = len(state), state.shape[-2:]
        tokens = per_row(embedding.tokens, state)
        options = {"txt_seq_lens": [tokens.shape[1]] * count} if self._wants_lengths else {}
        output: Tensor = self.denoiser.module(
            hidden_states=torch.cat([pack(row) for row in rows], dim=1),
            timestep=(timestep / 1000).to(state).expand(count),
            encoder_hidden_states=tokens,
            img_shapes=[[(1, height // PATCH, width // PATCH)] * len(rows)] * count,
            return_dict=False,
            **options,
        )[0]
        return unpack(output[:, : height // PATCH * (width // PATCH)], height, width).float()

    def _away(self, unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
        guided = super()._away(unconditional, conditional, scale)
        return guided * (token_norms(conditional) / token_norms(guided).clamp(min=SHORTEST))


def token_norms(planes: Tensor) -> Tensor:
    """The length of each token of [N, C, h, w], a vector of 2x2 cells' channels, at each of its cells: [N, 1, h, w]."""
    squares = F.avg_pool2d(planes.square().sum(1, keepdim=True), PATCH) * PATCH**2
    return squares.sqrt().repeat_interleave(PATCH, -1).repeat_interleave(PATCH, -2)


@dataclass(frozen=True)
class Instruction:
    """A prompt with the picture it is to change."""

    text: str
    picture: Picture


class QwenImageEditModel(QwenImageModel):
    """Qwen-Image-Edit, which is shown the canvas, and what is to be done with it."""

    denoiser_bytes = 1.5 * 785 * MIB / (1024 * 1024 * 2)

    def __init__(self, *args: Any, glance: Glance, **parts: Any) -> None:
        super().__init__(*args, **parts)
        self.glance = glance

    def encode_prompt(
        self, prompts: Sequence[str | None], syntax: PromptSyntax, pictures: Tensor | None = None
    ) -> list[Embedding]:
        """See InpaintModel; each prompt's states for every one of ``pictures``."""
        assert pictures is not None
        seen = [self.glance.at(Picture.of(picture)) for picture in pictures]
        wanted = [Instruction(prompt or "", picture) for prompt in prompts for picture in seen]
        states = self._remembered(wanted, syntax)
        embeddings = []
        for number, prompt in enumerate(prompts):
            rows = states[number * len(seen) : (number + 1) * len(seen)]
            embedding = Embedding(torch.cat([row.tokens for row in rows]) if len(set(seen)) > 1 else rows[0].tokens)
            embeddings.append(embedding.zeros() if prompt is None else embedding)
        return embeddings

    def _encode(self, prompts: Sequence[Any], syntax: PromptSyntax) -> list[Embedding]:
        return [Embedding(self.reader.read_with(prompt.text, prompt.picture, syntax)) for prompt in prompts]

    def _rows(self, state: Tensor, canvas: Canvas) -> Rows:
        """The state, and the picture's latents; [N, 16, h, w] each."""
        assert canvas.image is not None
        return state, canvas.expand(canvas.image)


def build_transformer(config: Config) -> nn.Module:
    """Raises ModelFileError where the installed diffusers does not know what the config asks for."""
    from diffusers import QwenImageTransformer2DModel

    known = inspect.signature(QwenImageTransformer2DModel.__init__).parameters
    if config.get("zero_cond_t") and "zero_cond_t" not in known:
        raise ModelFileError(
            "This is Qwen-Image-Edit 2511 or later, which the installed diffusers cannot run: update diffusers."
        )
    module: Any = QwenImageTransformer2DModel.from_config(dict(config))
    # frequencies that files do not hold, also where a module is made without values
    with torch.device("cpu"):
        rope = module.pos_embed
        module.pos_embed = type(rope)(theta=rope.theta, axes_dim=rope.axes_dim, scale_rope=rope.scale_rope)
    _forget_sizes(module.pos_embed)
    result: nn.Module = module
    return result


def _forget_sizes(rope: Any) -> None:
    """Without what diffusers remembers as long as the program runs: tables on the card for every size of a canvas."""
    for name in ("_compute_video_freqs", "_get_device_freqs"):
        remembering = getattr(type(rope), name, None)
        if remembering is not None:
            setattr(rope, name, MethodType(inspect.unwrap(remembering), rope))


def read_transformer(state: State, config: Config) -> dict[str, Tensor]:
    """diffusers' names, which all files have. Raises ModelFileError for a file that is marked as of another network
    than the config's."""
    if STILL_MARK in state and not config.get("zero_cond_t"):
        raise ModelFileError(
            "The file is of Qwen-Image-Edit 2511 or later and the configs beside it are of an earlier model"
            " (transformer/config.json lacks zero_cond_t): put those of Qwen-Image-Edit-2511 there, or none."
        )
    return {key: tensor for key, tensor in state.items() if key != STILL_MARK}


def qwen_image_facts(components: Components, reads_picture: bool = False) -> ModelFacts:
    vae = components.configs["vae"]
    downscale = 2 ** len(vae["temperal_downsample"])
    return ModelFacts(
        name=components.name,
        conditioning=Conditioning.REPLACE,
        native_size=NATIVE_SIZE,
        scheduler_config={
            **components.scheduler,
            "prediction_type": "flow_prediction",
            "timestep_spacing": "trailing",
        },
        latent_channels=vae["z_dim"],
        downscale=downscale,
        multiple=downscale * PATCH,
        reads_picture=reads_picture,
    )


def make(components: Components) -> DiffusersModel:
    model = QwenImageModel(qwen_image_facts(components), **_parts(components, Chat(DESCRIBE)))
    # the weights cannot tell, and a picture that is not shown is not seen to be missing
    if "edit" in components.name.lower():
        model.notices = (
            f"{components.name} is used as Qwen-Image, which is not shown the picture with the prompt; if it is an"
            f" editing model, set its family to {QWEN_IMAGE_EDIT.name}, {QWEN_IMAGE_EDIT_2509.name} or"
            f" {QWEN_IMAGE_EDIT_2511.name}.",
        )
    return model


def make_edit(components: Components) -> DiffusersModel:
    return _make_edit(components, EDIT_SIGHT)


def make_later_edit(components: Components) -> DiffusersModel:
    model = _make_edit(components, LATER_EDIT_SIGHT)
    if "2511" in components.name and not components.configs["transformer"].get("zero_cond_t"):
        model.notices = (
            f"{components.name} is used as Qwen-Image-Edit 2509, which takes the picture for as noisy as what it"
            f" paints; if it is of 2511, set its family to {QWEN_IMAGE_EDIT_2511.name}.",
        )
    return model


def _make_edit(components: Components, sight: Sight) -> QwenImageEditModel:
    facts = qwen_image_facts(components, reads_picture=True)
    return QwenImageEditModel(facts, glance=sight.glance, **_parts(components, sight.chat))


def _parts(components: Components, chat: Chat) -> dict[str, Any]:
    modules = components.modules
    return {
        "reader": QwenReader(modules["text_encoder"], qwen_tokenizer(components), chat),
        "denoiser": modules["transformer"],
        "vae": modules["vae"],
        "host": components.host,
    }


def choose_config(found: Found, _: str | None) -> str | None:
    """By the mark of 2511, whatever family the user has set."""
    return {"": "qwen-image", "still": "qwen-image-edit-2511"}.get(found.variant)


def choose_2511(found: Found, _: str | None) -> str | None:
    return None if choose_config(found, _) is None else "qwen-image-edit-2511"


TRANSFORMER = Part(
    "transformer",
    Role.DENOISER,
    "QwenImageTransformer2DModel",
    build_transformer,
    read_transformer,
    precision=brain_float,
)
_PREDICTIONS = ("flow_prediction",)
QWEN_IMAGE = Family(
    "qwen-image",
    "Qwen-Image",
    (TRANSFORMER, wan_vae.WAN_VAE, LANGUAGE_MODEL),
    choose_config,
    make,
    _PREDICTIONS,
)
_EDIT_PARTS = (TRANSFORMER, wan_vae.WAN_VAE, VISION_LANGUAGE_MODEL)
QWEN_IMAGE_EDIT = Family("qwen-image-edit", "Qwen-Image-Edit", _EDIT_PARTS, choose_config, make_edit, _PREDICTIONS)
QWEN_IMAGE_EDIT_2509 = Family(
    "qwen-image-edit-2509", "Qwen-Image-Edit 2509", _EDIT_PARTS, choose_config, make_later_edit, _PREDICTIONS
)
QWEN_IMAGE_EDIT_2511 = Family(
    "qwen-image-edit-2511", "Qwen-Image-Edit 2511", _EDIT_PARTS, choose_2511, make_later_edit, _PREDICTIONS
)
