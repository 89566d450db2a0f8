"""Models made of diffusers and transformers modules, behind the InpaintModel protocol."""

from __future__ import annotations

import itertools
import sys
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..control import Influence, controlled, influences
from ..host import Host, ManagedModule
from ..memory import MIB, Form, Forms, halved, is_out_of_memory, slice_attention
from ..prompts import LAST_LAYER, EmbeddingFinder, TextLayer, encode_prompts
from ..schedulers import Level
from ..types import MendError, Size
from .protocol import Canvas, Conditioning, Denoiser, Guidance, ModelFacts, Posterior, PromptSyntax
from .tiled_vae import TiledVae

VAE_ENCODE_BYTES = 1767
VAE_DECODE_BYTES = 2178
"""Activations of the VAE per pixel and byte of precision, where its first two levels have VAE_CHANNELS in all."""
VAE_CHANNELS = 128 + 256
BAND_BYTES = (256 * MIB, 64 * MIB, 16 * MIB)
"""Activations of a band, where the VAE runs in bands."""
REMEMBERED_BYTES = 256 * MIB
"""Of prompts' states; those of the last call are kept, however many."""
RESERVE = 300 * MIB
"""Left alone when a batch is sized: kernels' workspaces and the allocator's slack."""

Rows = tuple[Tensor, ...]
"""What the network reads beside timestep and prompt, a row for each picture; the latents come first."""


@dataclass(frozen=True)
class Embedding:
    """A prompt as the text encoders leave it, float32 on the CPU."""

    tokens: Tensor
    """[1, tokens, width]; of networks that read each picture with its prompt, [N, tokens, width]."""
    pooled: Tensor | None = None
    """[1 or N, width]: the whole prompt as one vector, for networks that read one."""

    def zeros(self) -> Embedding:
        """What stands for no prompt at all."""
        return Embedding(torch.zeros_like(self.tokens), None if self.pooled is None else torch.zeros_like(self.pooled))

    @property
    def bytes(self) -> int:
        return self.tokens.nbytes + (0 if self.pooled is None else self.pooled.nbytes)

    def of(self, rows: slice) -> Embedding:
        """That of some pictures of the batch."""
        if len(self.tokens) == 1:
            return self
        return Embedding(self.tokens[rows], None if self.pooled is None else self.pooled[rows])


class DiffusersModel(ABC):
    """An InpaintModel made of text encoders, a denoising network and an autoencoder.

    Families differ in how a prompt is encoded and in what their network reads: ``_encode`` and ``_denoise``; an
    AutoencoderKL is what most have.
    """

    notices: tuple[str, ...] = ()
    """What should be known of how it was loaded."""
    denoiser_bytes: ClassVar[float] = 1.5 * 65 * MIB / (512 * 512 * 2)
    """Activations of the denoiser per sample, pixel and byte of precision: 1.5 times the tensors alive at once; here
    Stable Diffusion's."""

    def __init__(self, facts: ModelFacts, *, denoiser: ManagedModule, vae: ManagedModule, host: Host) -> None:
        config: Any = vae.module.config
        width = dict(denoiser.module.config).get("cross_attention_dim")  # type: ignore[arg-type]
        self.facts = replace(
            facts, latent_format=latent_format(config), control_width=width if isinstance(width, int) else None
        )
        self.denoiser = denoiser
        self.vae = vae
        self._host = host
        self._scaling_factor, self._shift_factor = latent_scale(config)
        self._prompts: OrderedDict[tuple[Hashable, PromptSyntax], Embedding] = OrderedDict()

    @abstractmethod
    def _encode(self, prompts: Sequence[Any], syntax: PromptSyntax) -> list[Embedding]:
        """Each prompt through the text encoders, once. A prompt is a text or, where a family makes it so, a text and
        more."""

    @abstractmethod
    def _denoise(self, rows: Rows, timestep: Tensor, embedding: Embedding) -> Tensor:
        """The network's output [N, C, h, w] in float32 for one branch."""

    def encode_prompt(
        self, prompts: Sequence[str | None], syntax: PromptSyntax, pictures: Tensor | None = None
    ) -> list[Embedding]:
        """See InpaintModel. Recent prompts are remembered, so that a new seed does not reload the text encoder.

        Raises MendError where memory is too short for the text encoder.
        """
        embeddings = self._remembered([prompt or "" for prompt in prompts], syntax)
        return [e.zeros() if prompt is None else e for prompt, e in zip(prompts, embeddings, strict=True)]

    def _remembered(self, prompts: Sequence[Hashable], syntax: PromptSyntax) -> list[Embedding]:
        wanted = list(dict.fromkeys(prompts))
        known = {p: self._prompts.pop((p, syntax)) for p in wanted if (p, syntax) in self._prompts}
        unknown = [p for p in wanted if p not in known]
        known |= dict(zip(unknown, self._read(unknown, syntax), strict=True))
        room = REMEMBERED_BYTES - sum(embedding.bytes for embedding in known.values())
        while self._prompts and sum(embedding.bytes for embedding in self._prompts.values()) > room:
            self._prompts.popitem(last=False)
        # a textual-inversion file may change between runs
        lasting = (p for p in wanted if not (isinstance(p, str) and "embedding:" in p))
        self._prompts.update(((p, syntax), known[p]) for p in lasting)
        return [known[p] for p in prompts]

    def _read(self, prompts: Sequence[Hashable], syntax: PromptSyntax) -> list[Embedding]:
        try:
            return self._encode(prompts, syntax) if prompts else []
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise MendError(
                f"There is not enough memory to read the prompt with {self.facts.name}: load the model in a smaller"
                " precision, or close what else uses the memory."
            ) from error

    def encode_image(self, pixels: Tensor) -> Posterior:
        def encode(part: Tensor, bands: TiledVae | None) -> Tensor:
            distribution = self._encode_whole(part) if bands is None else bands.encode(part)
            return torch.stack([distribution.mean, distribution.std]).float()

        size = Size(pixels.shape[-1], pixels.shape[-2])
        mean, std = torch.cat(self._through_vae("encode", size, VAE_ENCODE_BYTES, encode, pixels), dim=1)
        factor, shift = self._scaling_factor.to(mean), self._shift_factor.to(mean)
        return Posterior((mean - shift) * factor, std * factor)

    def decode(self, latents: Tensor) -> Tensor:
        def decode(part: Tensor, bands: TiledVae | None) -> Tensor:
            pixels = self._decode_whole(part) if bands is None else bands.decode(part)
            # many finished pictures are too large to wait for each other beside the network
            return pixels.float().cpu()

        size = Size(latents.shape[-1] * self.facts.downscale, latents.shape[-2] * self.facts.downscale)
        raw = latents / self._scaling_factor.to(latents) + self._shift_factor.to(latents)
        return torch.cat(self._through_vae("decode", size, VAE_DECODE_BYTES, decode, raw))

    def _encode_whole(self, pixels: Tensor) -> Any:
        """The VAE's distribution, with a ``mean`` and a ``std``, of pixels [B, 3, H, W]."""
        vae: Any = self.vae.module
        return vae.encode(pixels).latent_dist

    def _decode_whole(self, latents: Tensor) -> Tensor:
        """The VAE's pixels of its own latents [B, C, h, w]."""
        vae: Any = self.vae.module
        pixels: Tensor = vae.decode(latents, return_dict=False)[0]
        return pixels

    def _vae_widths(self) -> Sequence[int]:
        """Channels of each level of the VAE from the picture down."""
        config: Any = self.vae.module.config
        widths: Sequence[int] = config.get("block_out_channels", ())
        return widths

    def rows_at_once(self, canvas: Size) -> int:
        """See InpaintModel: any number, each evaluation is split to fit."""
        return sys.maxsize

    def sample(
        self, canvas: Canvas, levels: Sequence[Level], guidance: Guidance, loop: Callable[[Denoiser], Tensor]
    ) -> Tensor:
        """See InpaintModel. Splits the batch, and the two branches of guidance, where memory is short."""
        forms = self._denoiser_forms(canvas, guidance)
        evaluation = itertools.count()

        def denoiser(state: Tensor, timestep: Tensor, level: Level) -> Tensor:
            rows = self._rows(state, canvas)
            active = influences(canvas.hints, next(evaluation))
            return forms.run(lambda form: self._predict(rows, timestep, guidance, form, forms.failed, active))

        return loop(denoiser)

    def _rows(self, state: Tensor, canvas: Canvas) -> Rows:
        """Here the latents [N, 4 or 9, h, w]."""
        if self.facts.conditioning is Conditioning.REPLACE:
            return (state,)
        assert canvas.masked_image is not None
        return (torch.cat([state, canvas.expand(canvas.mask), canvas.expand(canvas.masked_image)], dim=1),)

    def _predict(
        self,
        rows: Rows,
        timestep: Tensor,
        guidance: Guidance,
        form: Form,
        failed: int = 0,
        active: Sequence[Influence] = (),
    ) -> Tensor:
        """One evaluation of a whole batch under the ``active`` ControlNets, after so many larger forms ``failed``."""
        size = Size(*(side * self.facts.downscale for side in (rows[0].shape[-1], rows[0].shape[-2])))

        def guided(of: slice, *part: Tensor) -> Tensor:
            shown = [one._replace(pixels=hint) for one, hint in zip(active, part[len(rows) :], strict=True)]
            with controlled(self.denoiser.module, shown):
                return self._guided(part[: len(rows)], timestep, _guidance_of(guidance, of), apart=form.apart)

        # an estimate that failed was too low: leave more room for each row
        needed = self._sample_bytes(size, len(active)) * (1 if form.apart else _branches(guidance)) << failed
        hints = tuple(one.pixels for one in active)
        beside = [one.network.managed for one in active]
        return torch.cat(self._in_parts(self.denoiser, needed, form.rows, guided, (*rows, *hints), beside))

    def _denoiser_forms(self, canvas: Canvas, guidance: Guidance) -> Forms:
        per_sample, branches = self._sample_bytes(canvas.size, len(canvas.hints)), _branches(guidance)
        beside = [hint.network.managed for hint in canvas.hints]
        device = self.denoiser.load(per_sample * branches + RESERVE, beside)
        slice_attention(self.denoiser.module, device)
        fitting = (self._host.free_memory() - RESERVE) // per_sample
        forms = halved(min(len(canvas.noise), fitting // branches)) if fitting >= branches else []
        if branches == 2 or not forms:
            forms.append(Form(1, apart=branches == 2))
        return Forms(forms, f"paint {canvas.size}")

    def _sample_bytes(self, size: Size, controls: int = 0) -> int:
        # a ControlNet is the first half of such a network
        networks = 1 + controls / 2
        return int(self.denoiser_bytes * size.width * size.height * self.denoiser.dtype.itemsize * networks)

    def _guided(self, rows: Rows, timestep: Tensor, guidance: Guidance, apart: bool = False) -> Tensor:
        """Classifier-free guidance: u + scale * (c - u), both branches in one batch unless one prompt is longer or they
        are kept ``apart``."""
        positive, negative = guidance.positive, guidance.negative
        if negative is None:
            return self._denoise(rows, timestep, positive)
        if apart or _branches(guidance) == 1:
            unconditional = self._denoise(rows, timestep, negative)
            conditional = self._denoise(rows, timestep, positive)
        else:
            both = _per_branch(negative, positive, len(rows[0]))
            twice = tuple(torch.cat([row, row]) for row in rows)
            unconditional, conditional = self._denoise(twice, timestep, both).chunk(2)
        return self._away(unconditional, conditional, guidance.scale)

    def _away(self, unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
        return unconditional + scale * (conditional - unconditional)

    def _through_vae(
        self,
        verb: str,
        size: Size,
        bytes_per_pixel: float,
        run: Callable[[Tensor, TiledVae | None], Tensor],
        inputs: Tensor,
    ) -> list[Tensor]:
        """``run`` over as many rows of ``inputs`` at a time as memory allows, or over bands of each."""
        module: Any = self.vae.module
        channels = sum(self._vae_widths()[:2]) or VAE_CHANNELS
        per_row = int(bytes_per_pixel * size.width * size.height * self.vae.dtype.itemsize * channels / VAE_CHANNELS)
        # what can never fit would drive everything else out of memory, and the VAE's own weights with it
        hopeless = per_row + RESERVE > self._host.total_memory()
        self.vae.load((BAND_BYTES[0] * 2 if hopeless else per_row) + RESERVE)
        free = self._host.free_memory() - RESERVE
        wholes = halved(min(len(inputs), free // per_row)) if free >= per_row else []
        bands: list[Form] = []
        if TiledVae.supports(module):
            fitting = [band for band in BAND_BYTES if band <= min(per_row, free) // 2] or BAND_BYTES[-1:]
            bands = [Form(1, band_bytes=band) for band in fitting]
        forms = Forms(wholes + bands or [Form(1)], f"{verb} {size}")

        def attempt(form: Form) -> list[Tensor]:
            def run_part(_: slice, part: Tensor) -> Tensor:
                if not form.band_bytes:
                    return run(part, None)
                return run(part, TiledVae(module, part.device, form.band_bytes, self._host.check_interrupt))

            needed = (form.band_bytes * 2 or per_row) << forms.failed
            return self._in_parts(self.vae, needed, form.rows, run_part, (inputs,))

        return forms.run(attempt)

    def _in_parts(
        self,
        managed: ManagedModule,
        needed: int,
        at_once: int,
        run: Callable[..., Tensor],
        rows: Rows,
        beside: Sequence[ManagedModule] = (),
    ) -> list[Tensor]:
        """``run`` over so many rows at a time, which it is told with them, on the module's device and in its
        precision."""
        device = managed.load(needed + RESERVE, beside)
        parts = []
        for start in range(0, len(rows[0]), at_once):
            self._host.check_interrupt()
            of = slice(start, start + at_once)
            parts.append(run(of, *(row[of].to(device=device, dtype=managed.dtype) for row in rows)))
        return parts


class StableDiffusionModel(DiffusersModel):
    """Stable Diffusion 1 and 2: a CLIP text encoder and a UNet2DConditionModel."""

    def __init__(
        self,
        facts: ModelFacts,
        *,
        tokenizer: Any,
        text_encoder: ManagedModule,
        denoiser: ManagedModule,
        vae: ManagedModule,
        find_embedding: EmbeddingFinder,
        host: Host,
        layer: TextLayer = LAST_LAYER,
    ) -> None:
        super().__init__(facts, denoiser=denoiser, vae=vae, host=host)
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self._find_embedding = find_embedding
        self._layer = layer

    def _encode(self, prompts: Sequence[str], syntax: PromptSyntax) -> list[Embedding]:
        device = self.text_encoder.load(RESERVE)
        encoder = self.text_encoder.module
        states = encode_prompts(prompts, self.tokenizer, encoder, device, syntax, self._find_embedding, self._layer)
        return [Embedding(state.tokens.cpu()) for state in states]

    def _denoise(self, rows: Rows, timestep: Tensor, embedding: Embedding) -> Tensor:
        (latents,) = rows
        tokens = per_row(embedding.tokens, latents)
        return self.denoiser.module(latents, timestep.to(latents.device), tokens, return_dict=False)[0].float()


LATENT_FORMATS = {(4, 0.18215): "SD15", (4, 0.13025): "SDXL", (16, 1.5305): "SD3", (16, 0.3611): "Flux"}
"""By channels and scaling factor, which every autoencoder has for itself."""


def latent_scale(vae_config: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """What a VAE's latents are multiplied by for the network, and what is taken from them before: [1, C, 1, 1] each,
    with one channel where all have the same."""
    if "scaling_factor" in vae_config:
        factor, shift = torch.tensor(vae_config["scaling_factor"]), torch.tensor(vae_config.get("shift_factor") or 0.0)
    else:
        factor, shift = 1 / torch.tensor(vae_config["latents_std"]), torch.tensor(vae_config["latents_mean"])
    return factor.float().reshape(1, -1, 1, 1), shift.float().reshape(1, -1, 1, 1)


def latent_format(vae_config: Mapping[str, Any]) -> str | None:
    """See ModelFacts.latent_format."""
    if "scaling_factor" not in vae_config:
        return "Wan21"
    if vae_config.get("latents_mean") is not None:
        return None
    return LATENT_FORMATS.get((vae_config["latent_channels"], round(float(vae_config["scaling_factor"]), 5)))


def _guidance_of(guidance: Guidance, rows: slice) -> Guidance:
    negative = None if guidance.negative is None else guidance.negative.of(rows)
    return Guidance(guidance.positive.of(rows), negative, guidance.scale)


def _branches(guidance: Guidance) -> int:
    """How many rows the network reads for each picture at once."""
    positive, negative = guidance.positive, guidance.negative
    return 1 if negative is None or negative.tokens.shape[1] != positive.tokens.shape[1] else 2


def _per_branch(negative: Embedding, positive: Embedding, rows: int) -> Embedding:
    """Both prompts, each for so many rows."""

    def both(first: Tensor, second: Tensor) -> Tensor:
        return torch.cat([first.expand(rows, *first.shape[1:]), second.expand(rows, *second.shape[1:])])

    pooled = None
    if negative.pooled is not None and positive.pooled is not None:
        pooled = both(negative.pooled, positive.pooled)
    return Embedding(both(negative.tokens, positive.tokens), pooled)


def per_row(embedding: Tensor, rows: Tensor) -> Tensor:
    """[1 or rows, ...] -> [rows, ...], where and as ``rows`` are."""
    return embedding.to(rows).expand(len(rows), *embedding.shape[1:])
