"""ComfyUI's own MODEL, CLIP and VAE as an InpaintModel.

The network is only ever called through ComfyUI's CFGGuider, so that whatever a graph put on the model or on the
conditioning acts here as in any sampler: LoRA, ControlNet, IP-Adapter, hooks, quantised weights, attention patches,
torch.compile. ComfyUI loads and unloads; the noise levels, the solver and the mask are the engine's.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import comfy.model_management as mm
import comfy.model_sampling
import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor, nn

from ..engine.models.protocol import (
    Canvas,
    Conditioning,
    Denoiser,
    Guidance,
    MaskRule,
    ModelFacts,
    Posterior,
    PromptSyntax,
)
from ..engine.models.qwen_image import EDIT_SIGHT, LATER_EDIT_SIGHT
from ..engine.models.qwen_text import Picture
from ..engine.schedulers import Level, Prediction
from ..engine.types import InputError, ModelFileError, Size
from .comfy_host import ComfyHost, MendModel
from .conditioning import Cond, Controls, on_canvas, with_values

SUPPORTED = (
    "image models that predict noise (Stable Diffusion 1, 2, XL and their inpainting versions), v, or a flow (Stable"
    " Diffusion 3, FLUX and FLUX Fill, FLUX.2, Qwen-Image, Z-Image, ...)"
)
SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SAME_SIGMAS = 1e-4
"""Relative difference of noise levels that is rounding: ComfyUI's are float64 products, diffusers' float32."""
SDXL_CONTEXT = 2048
"""Width of the prompt embeddings, by which the checkpoints' own scheduler settings are known."""
FILL_GUIDANCE = 30.0
"""Of FLUX Fill; conditioning may hold a value of its own."""
FLUX_SHIFT = {"base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256, "max_image_seq_len": 4096}
CLEAN = 1e-3
"""Share of the first noise level below which the last is none."""
TIME_AXIS = 2
"""Where latents for a video have their frames; image models on video autoencoders have one frame."""


class Shown(str, Enum):
    """What a model that edits pictures is shown of the canvas, beside the latents that it paints on."""

    LATENTS = "latents"
    """Its clean latents: FLUX Kontext, FLUX.2."""
    QWEN_IMAGE_EDIT = "qwen-image-edit"
    """Also the picture, to the text encoder."""
    QWEN_IMAGE_EDIT_2509 = "qwen-image-edit-2509"
    """That at a small size and with other words: 2509 and later."""


SIGHTS = {Shown.QWEN_IMAGE_EDIT: EDIT_SIGHT, Shown.QWEN_IMAGE_EDIT_2509: LATER_EDIT_SIGHT}
"""How the text encoder is shown the picture."""


@dataclass(frozen=True)
class NativeMendModel(MendModel):
    """What travels on a MEND_MODEL wire from Wrap Model."""

    model: NativeModel

    @property
    def patcher(self) -> ModelPatcher:
        return self.model.patcher

    def get_models(self) -> list[ModelPatcher]:
        parts = (self.model.clip, self.model.vae)
        return [self.patcher, *(part.patcher for part in parts if part is not None)]

    def get_ram_usage(self) -> int:
        return sum(patcher.model_size() for patcher in self.get_models())


class NativeModel:
    """An InpaintModel that drives a MODEL, with the VAE and, for prompts, the CLIP that belong to it."""

    def __init__(
        self,
        patcher: ModelPatcher,
        vae: Any,
        clip: Any = None,
        *,
        native_size: int = 0,
        positive: Cond | None = None,
        negative: Cond | None = None,
        shown: Shown | None = None,
    ) -> None:
        """``positive`` and ``negative`` CONDITIONING take the place of prompts; ``native_size`` of 0 is the family's;
        ``shown`` is for models that edit.

        Raises ModelFileError for a kind of model that cannot be used and for a VAE of another kind of latents.
        """
        self.patcher, self.vae, self.clip = patcher, vae, clip
        self._positive, self._negative = positive, negative
        self._guider: Any = None
        self._shown = shown
        facts = _facts(patcher, vae, native_size, lambda: self._guider, positive is None)
        self.facts = replace(facts, reads_picture=shown is not None)
        self._frames = patcher.model.latent_format.latent_dimensions == 3

    def conditioned(self, positive: Cond | None, negative: Cond | None) -> NativeModel:
        """The same model, with CONDITIONING in the place of a prompt."""
        return self._changed(positive=positive, negative=negative)

    def editing(self, shown: Shown) -> NativeModel:
        """The same model, shown the canvas. Raises InputError for a model that cannot look, and a CLIP that cannot."""
        if self.facts.prediction_type != Prediction.FLOW:
            raise InputError(
                f"{self.facts.name} does not edit pictures it is shown, as FLUX Kontext, FLUX.2 and Qwen-Image-Edit do:"
                " connect Wrap Model (Mend) straight to Inpaint (Mend)."
            )
        if shown in SIGHTS and self.clip is not None and not _sees(self.clip):
            raise InputError(
                f"{shown.value} shows the picture to the text encoder, and the CLIP"
                f" ({type(self.clip.cond_stage_model).__name__})"
                " cannot see: load Qwen2.5-VL with Load CLIP of type qwen_image."
            )
        return self._changed(shown=shown)

    def _changed(self, **changes: Any) -> NativeModel:
        options = {"positive": self._positive, "negative": self._negative, "shown": self._shown, **changes}
        return NativeModel(self.patcher, self.vae, self.clip, native_size=self.facts.native_size, **options)

    # -- prompts and pictures

    def encode_prompt(
        self, prompts: Sequence[str | None], syntax: PromptSyntax, pictures: Tensor | None = None
    ) -> list[Cond]:
        """See InpaintModel. The last prompt is the one to follow, one before it the one to avoid.

        PLAIN takes parentheses literally; unlike diffusers ComfyUI reads a long prompt to its end.
        """
        given = [self._positive] if len(prompts) == 1 else [self._negative, self._positive]
        if syntax is PromptSyntax.PLAIN:
            prompts = [prompt and re.sub(r"([()])", r"\\\1", prompt) for prompt in prompts]
        conds = [
            self._encode(text, pictures) if cond is None else cond for text, cond in zip(prompts, given, strict=True)
        ]
        if self._shown is None:
            return conds
        assert pictures is not None
        latents = self.vae.encode((pictures[:1].permute(0, 2, 3, 1) + 1) / 2)
        # conditioning from elsewhere may have pictures of its own
        return [with_values(cond, keep=True, reference_latents=[latents]) for cond in conds]

    def _encode(self, text: str | None, pictures: Tensor | None) -> Cond:
        if self.clip is None:
            raise InputError(
                "A prompt is to be read and there is no CLIP: connect one to Wrap Model (Mend), or conditioning to both"
                " positive and negative."
            )
        cond: Cond = self.clip.encode_from_tokens_scheduled(self._tokens(text or "", pictures))
        return _zeroed(cond) if text is None else cond

    def _tokens(self, text: str, pictures: Tensor | None) -> Any:
        sight = None if self._shown is None else SIGHTS.get(self._shown)
        if sight is None:
            return self.clip.tokenize(text)
        assert pictures is not None
        seen = sight.glance.at(Picture.of(pictures[0]))
        return self.clip.tokenize(text, images=[seen.pixels], llama_template=sight.chat.around("{}"))

    def encode_image(self, pixels: Tensor) -> Posterior:
        """See InpaintModel. ComfyUI's VAE gives the mean alone, so a sample of the posterior is its mean."""
        pictures = (pixels.permute(0, 2, 3, 1) + 1) / 2
        # an autoencoder for videos would read a batch as one
        parts = pictures.split(1) if self._frames else (pictures,)
        latents = torch.cat([self.vae.encode(part) for part in parts]).float()
        mean = self._without_time(self.patcher.model.process_latent_in(latents))
        return Posterior(mean, torch.zeros_like(mean))

    def decode(self, latents: Tensor) -> Tensor:
        pictures = self.vae.decode(self.patcher.model.process_latent_out(self._with_time(latents)))
        return pictures.flatten(0, -4).float().cpu().permute(0, 3, 1, 2) * 2 - 1

    def _with_time(self, latents: Tensor) -> Tensor:
        return latents.unsqueeze(TIME_AXIS) if self._frames else latents

    def _without_time(self, latents: Tensor) -> Tensor:
        return latents.squeeze(TIME_AXIS) if self._frames else latents

    # -- sampling

    def rows_at_once(self, canvas: Size) -> int:
        """How many pictures of a size fit in memory together, both branches of the guidance included; one where each
        has conditioning of its own."""
        if self._shown is not None:
            return 1
        cells = (canvas.height // self.facts.downscale, canvas.width // self.facts.downscale)
        shape = self._with_time(torch.empty(2, self.facts.latent_channels, *cells, device="meta")).shape
        memory = mm.get_total_memory(self.patcher.load_device) * 0.9 - self.patcher.model_size()
        return max(1, int(memory / self.patcher.model.memory_required(list(shape))))

    def sample(
        self, canvas: Canvas, levels: Sequence[Level], guidance: Guidance, loop: Callable[[Denoiser], Tensor]
    ) -> Tensor:
        """See InpaintModel."""
        flow = self.facts.prediction_type == Prediction.FLOW
        patcher, clock = (self.patcher, None) if flow else with_clock(self.patcher)
        controls = Controls(canvas.places)
        positive, negative = (
            self._with_surroundings(on_canvas(cond, controls), canvas, guidance.scale)
            for cond in (guidance.positive, guidance.positive if guidance.negative is None else guidance.negative)
        )
        guider = comfy.samplers.CFGGuider(patcher)
        guider.set_conds(positive, negative)
        guider.set_cfg(1.0 if guidance.negative is None else guidance.scale)
        result: list[Tensor] = []

        def run(call: Callable[..., Tensor], device: torch.device) -> Tensor:
            denoiser = NativeDenoiser(call, device, Prediction(self.facts.prediction_type), self._frames, clock)
            result.append(loop(denoiser))
            return self._with_time(result[0]).to(device)

        latents = torch.zeros_like(canvas.noise) if canvas.image is None else canvas.expand(canvas.image)
        masked = self.facts.conditioning is Conditioning.REPLACE or canvas.soft is not None
        self._guider = guider
        try:
            guider.sample(
                self._with_time(canvas.noise),
                self.patcher.model.process_latent_out(self._with_time(latents)),
                _LoopSampler(run),
                sigmas_of(levels, flow),
                denoise_mask=self._with_time(canvas.expand(canvas.mask)) if masked else None,
                disable_pbar=True,
                seed=0,
            )
        finally:
            self._guider = None
        return result[0]

    def _with_surroundings(self, cond: Cond, canvas: Canvas, guidance_scale: float) -> Cond:
        """With the picture around the hole, where the network reads it, and the guidance scale."""
        if self.facts.conditioning is Conditioning.CONCAT:
            assert canvas.masked_image is not None
            raw = self.patcher.model.process_latent_out(self._with_time(canvas.expand(canvas.masked_image)))
            # FLUX Fill reads the mask pixel by pixel, Stable Diffusion by latent cells
            mask = canvas.hole if self.facts.prediction_type == Prediction.FLOW else canvas.mask
            cond = with_values(cond, concat_latent_image=raw, concat_mask=canvas.expand(mask))
        if self.facts.embedded_guidance:
            cond = with_values(cond, keep=True, guidance=guidance_scale)
        return cond


def _sees(clip: Any) -> bool:
    """Whether a CLIP is Qwen2.5-VL, as Qwen-Image's loaders set it up."""
    return hasattr(clip.tokenizer, "llama_template_images")


def _zeroed(cond: Cond) -> Cond:
    """Conditioning of zeros, the pooled prompt included."""
    pooled = "pooled_output"
    return [
        [torch.zeros_like(tokens), {**more, **({pooled: torch.zeros_like(more[pooled])} if pooled in more else {})}]
        for tokens, more in cond
    ]


class _LoopSampler(comfy.samplers.Sampler):  # type: ignore[misc]
    """Calls ``run`` with the guided network from inside ComfyUI's sampling."""

    def __init__(self, run: Callable[[Callable[..., Tensor], torch.device], Tensor]) -> None:
        self._run = run

    def sample(
        self,
        model_wrap: Any,
        sigmas: Tensor,
        extra_args: dict[str, Any],
        callback: Any,
        noise: Tensor,
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
        disable_pbar: bool = False,
    ) -> Tensor:
        def call(x: Tensor, sigma: Tensor) -> Tensor:
            clean: Tensor = model_wrap(x, sigma, **extra_args)
            return clean

        return self._run(call, noise.device)


class Clock:
    """The timestep of the evaluation that runs."""

    sigma: float = -1.0
    timestep: float = 0.0


@dataclass(frozen=True)
class NativeDenoiser:
    """ComfyUI's guided network as a Denoiser.

    It takes states whose signal is 1 (those of a flow as they are) and answers with the clean latents.
    """

    call: Callable[[Tensor, Tensor], Tensor]
    device: torch.device
    prediction: Prediction
    frames: bool
    """Whether the network's latents have an axis for time."""
    clock: Clock | None = None

    def __call__(self, state: Tensor, timestep: Tensor, level: Level) -> Tensor:
        flow = self.prediction is Prediction.FLOW
        sigma = level.noise if flow else level.noise / level.signal
        if self.clock is not None:
            self.clock.sigma, self.clock.timestep = sigma, float(timestep)
        x = state if flow else state / level.signal
        x = x.unsqueeze(TIME_AXIS) if self.frames else x
        clean = self.call(x.to(self.device), torch.full((len(x),), sigma, device=self.device)).to(state)
        return self.prediction.output(state, clean.squeeze(TIME_AXIS) if self.frames else clean, level)


def with_clock(patcher: ModelPatcher) -> tuple[ModelPatcher, Clock]:
    """A clone whose network is told the schedule's own timestep, where ComfyUI takes the nearest whole one.

    Some schedules have fractional timesteps. Everything else about the noise levels stays as the graph set it.
    """
    clock = Clock()
    original = patcher.get_model_object("model_sampling")

    class Clocked(type(original)):  # type: ignore[misc]
        def timestep(self, sigma: Tensor) -> Tensor:
            if math.isclose(float(sigma.flatten()[0]), clock.sigma, rel_tol=1e-5):
                return torch.full_like(sigma, clock.timestep)
            timestep: Tensor = super().timestep(sigma)
            return timestep

    clocked = copy.copy(original)
    clocked.__class__ = Clocked
    clone = patcher.clone()
    clone.add_object_patch("model_sampling", clocked)
    return clone, clock


def sigmas_of(levels: Sequence[Level], flow: bool) -> Tensor:
    """The levels as ComfyUI counts them, [len(levels)]; the last is 0 when the run ends at the clean latents."""
    sigmas = [level.noise if flow else level.noise / level.signal for level in levels]
    if sigmas[-1] < sigmas[0] * CLEAN:
        sigmas[-1] = 0.0
    return torch.tensor(sigmas)


def mask_rule(function: Any, flow: bool, guider: Callable[[], Any]) -> MaskRule | None:
    """The mask function that a node such as Differential Diffusion set on a model, as the engine's rule."""
    if function is None:
        return None

    def rule(soft: Tensor, levels: Sequence[Level], index: int) -> Tensor:
        sigmas = sigmas_of(levels, flow)
        changed: Tensor = function(
            sigmas[index : index + 1], soft, extra_options={"model": guider(), "sigmas": sigmas}
        ).to(soft)
        return changed

    return rule


# ------------------------------------------------------------------------------------------------------------ facts


def _facts(patcher: ModelPatcher, vae: Any, native_size: int, guider: Callable[[], Any], prompted: bool) -> ModelFacts:
    model = patcher.model
    name = type(getattr(model, "model_config", model)).__name__
    sampling = patcher.get_model_object("model_sampling")
    config = scheduler_config(patcher, name)
    dimensions = model.latent_format.latent_dimensions
    if dimensions not in (2, 3):
        raise ModelFileError(f"{name} does not make pictures; supported are {SUPPORTED}.")
    channels = model.latent_format.latent_channels
    if vae.latent_channels != channels:
        raise ModelFileError(
            f"The VAE has latents of {vae.latent_channels} channels and the model ({name}) of {channels}: connect the"
            " VAE that belongs to the model."
        )
    flow, conditioning = config["prediction_type"] == Prediction.FLOW, _conditioning(patcher, name)
    downscale = int(vae.spacial_compression_encode())
    return ModelFacts(
        name=name,
        conditioning=conditioning,
        native_size=native_size or _native_size(model, isinstance(sampling, comfy.model_sampling.V_PREDICTION)),
        scheduler_config=config,
        latent_channels=channels,
        downscale=downscale,
        # transformers read patches of 2 x 2 cells, unless the cells are that large themselves
        multiple=max(16, downscale) if flow else downscale,
        embedded_guidance=_reads_guidance(model),
        usual_guidance=FILL_GUIDANCE if flow and conditioning is Conditioning.CONCAT and prompted else None,
        latent_format=type(model.latent_format).__name__,
        mask_rule=mask_rule(patcher.model_options.get("denoise_mask_function"), flow, guider),
    )


def scheduler_config(patcher: ModelPatcher, name: str) -> dict[str, Any]:
    """The model's noise levels as the configuration of a diffusers scheduler, as they are set on the model now.

    Raises ModelFileError for a kind of model whose states these schedulers cannot follow.
    """
    sampling = patcher.get_model_object("model_sampling")
    kinds = comfy.model_sampling
    if isinstance(sampling, kinds.CONST) and not isinstance(sampling, getattr(kinds, "IMG_TO_IMG_FLOW", ())):
        return _flow_config(patcher, sampling, name)
    discrete = isinstance(sampling, kinds.EPS) and isinstance(sampling, kinds.ModelSamplingDiscrete)
    if discrete and not isinstance(sampling, (kinds.EDM, kinds.X0)):
        return _discrete_config(sampling, patcher.model.model_config.unet_config.get("context_dim") == SDXL_CONTEXT)
    found = ", ".join(base.__name__ for base in type(sampling).__mro__[1:-2] if base is not nn.Module)
    raise ModelFileError(f"{name} samples by {found}, which cannot be followed; supported are {SUPPORTED}.")


def _discrete_config(sampling: Any, sdxl: bool) -> dict[str, Any]:
    v_prediction = isinstance(sampling, comfy.model_sampling.V_PREDICTION)
    sigmas = sampling.sigmas.double().cpu()
    config: dict[str, Any] = {
        "prediction_type": (Prediction.V if v_prediction else Prediction.EPSILON).value,
        "num_train_timesteps": len(sigmas),
        "clip_sample": False,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
    }
    if getattr(sampling, "zsnr", False):
        config["timestep_spacing"] = "trailing"
    elif sdxl:
        config["timestep_spacing"] = "leading"
    cumulative = 1 / (sigmas**2 + 1)
    known = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    if len(cumulative) == len(known) and torch.allclose(cumulative, known, rtol=SAME_SIGMAS, atol=0):
        return config | SD_BETAS
    betas = 1 - cumulative / torch.cat([cumulative.new_ones(1), cumulative[:-1]])
    return config | {"trained_betas": betas.tolist()}


def _flow_config(patcher: ModelPatcher, sampling: Any, name: str) -> dict[str, Any]:
    if getattr(sampling, "noise_scale", 1.0) != 1.0:
        raise ModelFileError(f"{name} starts from scaled noise, which cannot be followed; supported are {SUPPORTED}.")
    config = {"prediction_type": Prediction.FLOW.value, "num_train_timesteps": 1000}
    if isinstance(sampling, comfy.model_sampling.ModelSamplingFlux):
        chosen = "model_sampling" in patcher.object_patches
        if type(patcher.model).__name__ == "Flux" and not chosen:
            return config | {"use_dynamic_shifting": True} | FLUX_SHIFT
        return config | {"use_dynamic_shifting": True, "mu": float(sampling.shift)}
    if type(patcher.model).__name__ == "SD3":
        return config | {"shift": float(sampling.shift)}
    # a constant shift s is the shift of mu = log(s)
    return config | {"use_dynamic_shifting": True, "mu": math.log(sampling.shift)}


def _conditioning(patcher: ModelPatcher, name: str) -> Conditioning:
    model = patcher.model
    keys = tuple(getattr(model, "concat_keys", ()))
    if keys == ("mask", "masked_image"):
        return Conditioning.CONCAT
    config = model.model_config.unet_config
    inputs, outputs = config.get("in_channels", 0), config.get("out_channels", 0)
    if config.get("image_model") == "flux" and inputs > 2 * outputs > 0:
        return Conditioning.CONCAT
    if keys:
        raise ModelFileError(
            f"{name} reads {' and '.join(keys)} beside the latents, which cannot be given to it; supported are"
            f" {SUPPORTED}."
        )
    return Conditioning.REPLACE


def _native_size(model: Any, v_prediction: bool) -> int:
    """Pixels, by what is known of the families: Stable Diffusion 1 and 2 tell themselves by their text's width."""
    context = model.model_config.unet_config.get("context_dim")
    if context == 768:
        return 512
    if context == 1024 and model.model_config.unet_config.get("adm_in_channels") is None:
        return 768 if v_prediction else 512
    return 1024


def _reads_guidance(model: Any) -> bool:
    """FLUX: dev and Fill read the scale, schnell was distilled without any."""
    return model.model_config.unet_config.get("image_model") == "flux"


def wrap(model: ModelPatcher, vae: Any, clip: Any, native_size: int) -> NativeMendModel:
    return NativeMendModel(NativeModel(model, vae, clip, native_size=native_size), ComfyHost())
