"""Scheduler names -> the noise levels, network inputs and steps of one run.

diffusers supplies the solvers; this module decides which timesteps run for a strength, knows the noise level of every
intermediate state (variance exploding or preserving), and gives each row of a batch its own randomness. A ``Schedule``
is made for one run by ``plan`` and used from index 0 to ``evaluations - 1``, once.

Where the default differs from diffusers (``Compat.DIFFUSERS`` keeps diffusers' arithmetic):

- PNDM and KLMS restart their multistep warm-up at the first step that runs. diffusers slices the timesteps and goes on
  as if the skipped steps had been taken, which costs 5 to 60 times the solver error at strength < 1.
- PNDM extrapolates noise predictions, also for v_prediction checkpoints, where diffusers mixes velocities of different
  timesteps.
- The kept area of the KDPM2 samplers is noised to the level of the intermediate state, not to the next step's.
- LCM and TCD run all their steps below the noise level that strength picks, their own rule for a partial run, and may
  use a finer grid than the distillation's 50 timesteps. TCD keeps its stochasticity of 0.3.
- A checkpoint config that is silent on ``clip_sample`` or ``skip_prk_steps`` is read as a latent model's (False, True);
  the class defaults would clamp latents to -1..1 (DDIM) or start PNDM with Runge-Kutta steps.
- Zero-terminal-SNR checkpoints get their rescaled betas from every scheduler, also those whose class ignores the flag.
- A run of one step starts at the last training timestep (trailing spacing) instead of at nearly no noise.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .types import Compat, InputError, Sigmas

MAX_STEPS = 500

Generators: TypeAlias = "torch.Generator | list[torch.Generator]"
"""One generator for each row, or a single one that draws the whole batch at once as diffusers does."""

_LATENT_DEFAULTS = {"clip_sample": False, "skip_prk_steps": True}
_ALL_SIGMAS = (Sigmas.DEFAULT, Sigmas.KARRAS, Sigmas.EXPONENTIAL, Sigmas.BETA)
_LMS_ORDER = 4


class Level(NamedTuple):
    """A noise level: the state is ``signal * clean + noise * gaussian``."""

    signal: float
    noise: float

    @property
    def norm(self) -> float:
        """Standard deviation of a state whose clean latents have unit variance; the network wants it to be 1."""
        return math.hypot(self.signal, self.noise)

    @property
    def normal(self) -> Level:
        """The level of the state that is scaled to unit variance, as networks want it."""
        return self if self.signal != 1.0 else Level(self.signal / self.norm, self.noise / self.norm)

    def mix(self, clean: Tensor, noise: Tensor) -> Tensor:
        return self.signal * clean + self.noise * noise


class Prediction(str, Enum):
    """What a network predicts about a state ``signal * clean + noise * gaussian``."""

    EPSILON = "epsilon"
    """The gaussian."""
    V = "v_prediction"
    """signal * gaussian - noise * clean, for states of unit variance (Salimans and Ho 2022, arXiv 2202.00512)."""
    FLOW = "flow_prediction"
    """gaussian - clean, for states with signal + noise = 1 (Liu et al. 2022, arXiv 2209.03003)."""

    def clean(self, state: Tensor, output: Tensor, level: Level) -> Tensor:
        """The clean latents of a state whose network output is ``output``."""
        if self is Prediction.V:
            return level.signal * state - level.noise * output
        if self is Prediction.FLOW:
            return state - level.noise * output
        return (state - level.noise * output) / level.signal

    def output(self, state: Tensor, clean: Tensor, level: Level) -> Tensor:
        """The network output that says that ``clean`` are the clean latents of ``state``; the inverse of ``clean``."""
        if self is Prediction.FLOW:
            return (state - clean) / level.noise
        if self is Prediction.V:
            return (level.signal * state - clean) / level.noise
        return (state - level.signal * clean) / level.noise


@dataclass(frozen=True)
class SchedulerSpec:
    """One entry of the scheduler menu."""

    name: str
    class_name: str
    """The class in ``diffusers`` that solves, or (DPM++SDE) supplies the noise levels."""
    levels: Callable[[Any, Tensor, int], list[Level]] = field(repr=False)
    """(diffusers scheduler, timesteps that run, index of the first) -> the state's level before each evaluation and
    after the last."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """What the entry fixes in the checkpoint's config."""
    sigmas: tuple[Sigmas, ...] = (Sigmas.DEFAULT,)
    order: int = 1
    """Network evaluations per step; a second-order run takes ``2 * steps - 1``, as its last step is of first order."""
    stochastic: bool = False
    """Whether steps draw noise."""
    distilled: bool = False
    """Whether the timesteps come from a consistency distillation's grid."""

    def scheduler_class(self) -> Any:
        import diffusers

        return getattr(diffusers, self.class_name)


class Schedule(ABC):
    """The timesteps, noise levels and solver of one run.

    States and outputs are [B, C, h, w] float32. ``index`` counts evaluations: 0..evaluations - 1.
    """

    def __init__(
        self,
        timesteps: Tensor,
        levels: Sequence[Level],
        init_noise_sigma: float,
        *,
        from_noise: bool,
        prediction: Prediction,
    ) -> None:
        self.timesteps = timesteps.float() if timesteps.is_floating_point() else timesteps
        """[evaluations], descending but for repeated ones, possibly fractional; on the CPU."""
        self.levels = tuple(levels)
        """The state's noise level before each evaluation and after the last: evaluations + 1 of them."""
        self.init_noise_sigma = init_noise_sigma
        self.from_noise = from_noise
        """Whether the run starts on pure noise: strength is 1."""
        self._prediction = prediction

    @property
    def evaluations(self) -> int:
        """How often the network runs."""
        return len(self.timesteps)

    def start(self, noise: Tensor, image_latents: Tensor | None) -> Tensor:
        """The first state: ``noise`` at the starting level, over ``image_latents`` unless ``from_noise``."""
        if self.from_noise:
            return noise * self.init_noise_sigma
        if image_latents is None:
            raise InputError("A strength below 1 starts from the picture; give its latents.")
        return self.levels[0].mix(image_latents, noise)

    def scale(self, latents: Tensor, index: int) -> Tensor:
        """State -> network input."""
        level = self.levels[index]
        return latents / level.norm if level.signal == 1.0 else latents

    @abstractmethod
    def step(self, output: Tensor, index: int, latents: Tensor, generators: Generators) -> Tensor:
        """The state after evaluation ``index``, from the network's ``output`` for ``scale(latents, index)``."""

    def renoise(self, clean: Tensor, noise: Tensor, index: int) -> Tensor:
        """``clean`` latents at the level the state has after evaluation ``index``; as they are after the last."""
        return clean if index == self.evaluations - 1 else self._kept_level(index).mix(clean, noise)

    def _kept_level(self, index: int) -> Level:
        return self.levels[index + 1]

    def denoised(self, model_input: Tensor, output: Tensor, index: int) -> Tensor:
        """The guess at the clean latents, from the network's input (further channels are ignored) and ``output``."""
        return self._prediction.clean(model_input[:, : output.shape[1]], output, self.levels[index].normal)


class DiffusersSchedule(Schedule):
    """A run whose steps a diffusers scheduler takes."""

    def __init__(
        self, scheduler: Any, step_options: Mapping[str, Any], kept: Sequence[Level] | None, **common: Any
    ) -> None:
        super().__init__(init_noise_sigma=float(scheduler.init_noise_sigma), **common)
        self._scheduler = scheduler
        self._step_options = step_options
        self._kept = kept
        self._takes_generator = "generator" in inspect.signature(scheduler.step).parameters
        if hasattr(scheduler, "is_scale_input_called"):  # we scale by our own table; keeps it from warning
            scheduler.is_scale_input_called = True
        if hasattr(scheduler, "multistep_uni_c_bh_update"):
            correct_only_predicted(scheduler)

    def step(self, output: Tensor, index: int, latents: Tensor, generators: Generators) -> Tensor:
        options = dict(self._step_options)
        if self._takes_generator:
            options["generator"] = generators
        timestep = self.timesteps[index]
        stepped: Tensor = self._scheduler.step(output, timestep, latents, return_dict=False, **options)[0]
        return stepped

    def _kept_level(self, index: int) -> Level:
        return super()._kept_level(index) if self._kept is None else self._kept[index + 1]


def correct_only_predicted(scheduler: Any) -> None:
    """Keep UniPC from undoing what is done to a state between two steps.

    Its corrector takes the last step once more, from where that began. Of cells that were put back to the picture in
    between it would make what they were had they been free all along, and a soft mask would be let go with that.
    """
    predict, correct = scheduler.multistep_uni_p_bh_update, scheduler.multistep_uni_c_bh_update
    predicted: Tensor

    def remember(*args: Any, **options: Any) -> Tensor:
        nonlocal predicted
        predicted = predict(*args, **options)
        return predicted

    def correct_untouched(*args: Any, this_sample: Tensor, **options: Any) -> Tensor:
        return torch.where(this_sample == predicted, correct(*args, this_sample=this_sample, **options), this_sample)

    scheduler.multistep_uni_p_bh_update, scheduler.multistep_uni_c_bh_update = remember, correct_untouched


class _WarmLmsSchedule(DiffusersSchedule):
    """KLMS whose order grows with the history there is; diffusers takes it from the index in the whole schedule."""

    def step(self, output: Tensor, index: int, latents: Tensor, generators: Generators) -> Tensor:
        self._step_options = {"order": min(index + 1, _LMS_ORDER)}
        return super().step(output, index, latents, generators)


class _WarmPlmsSchedule(DiffusersSchedule):
    """PNDM on noise predictions: its scheduler is built for epsilon, and velocities are converted here."""

    def step(self, output: Tensor, index: int, latents: Tensor, generators: Generators) -> Tensor:
        if self._prediction is Prediction.V:
            signal, noise = self.levels[index]
            output = signal * output + noise * latents
        return super().step(output, index, latents, generators)


class _DpmSdeSchedule(Schedule):
    """SDE-DPM-Solver++ of second order, single-step with the midpoint in log sigma (Lu et al. 2022, arXiv 2211.01095).

    Two evaluations per step but for the last, which goes to sigma 0 at once. Variance exploding.
    """

    _step_start: Tensor
    _first_noise: Tensor

    def step(self, output: Tensor, index: int, latents: Tensor, generators: Generators) -> Tensor:
        from diffusers.utils.torch_utils import randn_tensor

        denoised = self.denoised(self.scale(latents, index), output, index)
        if index == self.evaluations - 1:
            return denoised
        drawn = randn_tensor(latents.shape, generator=generators, device=latents.device, dtype=latents.dtype)
        if index % 2 == 0:
            self._step_start, self._first_noise = latents, drawn
            return sde_step(latents, denoised, self.levels[index].noise, self.levels[index + 1].noise, drawn)
        sigma, middle, sigma_next = (level.noise for level in self.levels[index - 1 : index + 2])
        noise = joined_noise(self._first_noise, drawn, sigma, middle, sigma_next)
        return sde_step(self._step_start, denoised, sigma, sigma_next, noise)


def sde_step(state: Tensor, denoised: Tensor, sigma: float, sigma_next: float, noise: Tensor) -> Tensor:
    """From ``sigma`` down to ``sigma_next``, exact for a constant ``denoised`` (Lu et al. 2022, SDE-DPM-Solver++(1),
    with x scaled so that the signal is 1)."""
    decay = (sigma_next / sigma) ** 2
    return decay * state + (1 - decay) * denoised + sigma_next * math.sqrt(1 - decay) * noise


def joined_noise(first: Tensor, second: Tensor, sigma: float, middle: float, sigma_next: float) -> Tensor:
    """The unit noise of the interval sigma..sigma_next, from those of sigma..middle and middle..sigma_next.

    The noise of ``sde_step`` is the increment of one Brownian path whose clock is the signal-to-noise ratio
    1 / sigma ** 2, so that two steps with a constant ``denoised`` equal one.
    """
    before, after = middle**-2 - sigma**-2, sigma_next**-2 - middle**-2
    return (math.sqrt(before) * first + math.sqrt(after) * second) / math.sqrt(before + after)


def lms_coefficients(sigmas: Sequence[float], index: int, order: int) -> list[float]:
    """Adams-Bashforth weights of the last ``order`` (1..4) derivatives, newest first, from sigmas[index] to the next.

    Each is the integral of a Lagrange basis polynomial of degree order - 1 <= 3, for which the two-point
    Gauss-Legendre rule is exact.
    """
    low, high = sigmas[index], sigmas[index + 1]
    centre, reach = (low + high) / 2, (high - low) / 2
    points = (centre - reach / math.sqrt(3), centre + reach / math.sqrt(3))
    nodes = [sigmas[index - back] for back in range(order)]

    def basis(which: int, at: float) -> float:
        others = (node for back, node in enumerate(nodes) if back != which)
        return math.prod((at - node) / (nodes[which] - node) for node in others)

    return [reach * sum(basis(which, point) for point in points) for which in range(order)]


def plan(
    name: str,
    config: Mapping[str, Any],
    steps: int,
    strength: float,
    *,
    sigmas: Sigmas = Sigmas.DEFAULT,
    compat: Compat = Compat.OFF,
) -> Schedule:
    """The schedule of one run.

    ``name`` is a key of SCHEDULERS, ``config`` the checkpoint's scheduler_config.json (a fresh scheduler is built from
    it each time, so that nothing of an earlier choice survives), ``steps`` 1..500 and ``strength`` above 0 to 1: the
    last ``int(steps * strength)`` steps run, in the default at least one. Raises InputError.
    """
    spec = _find(name, sigmas)
    if not 1 <= steps <= MAX_STEPS:
        raise InputError(f"steps is {steps}; give a whole number from 1 to {MAX_STEPS}.")
    if not 0 < strength <= 1:
        raise InputError(f"strength is {strength}, which leaves no step to run; give a value above 0, up to 1.")
    exact = compat is Compat.DIFFUSERS
    settings = _settings(spec, config, steps, sigmas, exact)
    prediction_type = settings.get("prediction_type", "epsilon")
    if prediction_type not in (Prediction.EPSILON, Prediction.V):
        raise InputError(
            f'The checkpoint predicts "{prediction_type}", which these schedulers cannot follow; '
            "use one that predicts epsilon or v_prediction."
        )
    running = _running_steps(steps, strength, exact)
    common: dict[str, Any] = {"from_noise": strength == 1.0, "prediction": Prediction(prediction_type)}

    if spec.name == "DPM++SDE":
        return _plan_dpm_sde(spec, settings, steps, running, common)
    if spec.distilled:
        scheduler = _distilled_scheduler(spec, settings, steps, strength, exact)
        running = running if exact else steps
    elif spec.name == "PNDM" and not exact:
        return _plan_warm_plms(spec, settings, steps, running, common)
    else:
        scheduler = _scheduler(spec, settings, steps, exact)

    begin = (steps - running) * spec.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    timesteps = scheduler.timesteps[begin:]
    common |= {"timesteps": timesteps, "levels": spec.levels(scheduler, timesteps, begin)}
    step_options, kept = {}, None
    if exact:
        kept = _remask_levels(scheduler, timesteps, begin, common["levels"])
        if "eta" in inspect.signature(scheduler.step).parameters:
            step_options["eta"] = 0.0  # what the pipeline passes
    if spec.name == "KLMS":
        _use_closed_form(scheduler)
        if not exact:
            return _WarmLmsSchedule(scheduler, {}, None, **common)
    return DiffusersSchedule(scheduler, step_options, kept, **common)


def _find(name: str, sigmas: Sigmas) -> SchedulerSpec:
    if name not in SCHEDULERS:
        raise InputError(f'There is no scheduler "{name}"; choose one of {", ".join(SCHEDULERS)}.')
    spec = SCHEDULERS[name]
    if sigmas not in spec.sigmas:
        offered = ", ".join(option.value for option in spec.sigmas)
        raise InputError(f'{name} has no "{Sigmas(sigmas).value}" sigmas; choose {offered}, or another scheduler.')
    return spec


def _running_steps(steps: int, strength: float, exact: bool) -> int:
    running = min(int(steps * strength), steps)
    if running < 1 and exact:
        raise InputError(
            f"strength {strength} of {steps} steps leaves no step to run; raise strength to {1 / steps:.3g} or more, "
            "or the steps."
        )
    return max(running, 1)


def _settings(
    spec: SchedulerSpec, config: Mapping[str, Any], steps: int, sigmas: Sigmas, exact: bool
) -> dict[str, Any]:
    """The keyword arguments of the diffusers class: the checkpoint's own, then the entry's, then the request's."""
    accepted = inspect.signature(spec.scheduler_class().__init__).parameters
    # diffusers lists there what a class filled in by itself: another class has its own default for it
    filled_in = config.get("_use_default_values", ())
    merged = {key: value for key, value in config.items() if key not in filled_in}
    if not exact:
        merged = _LATENT_DEFAULTS | _with_zero_snr(merged, accepted)
        if steps == 1:
            merged["timestep_spacing"] = "trailing"
    merged |= spec.options
    if sigmas is not Sigmas.DEFAULT:
        merged |= {f"use_{s.value}_sigmas": s is sigmas for s in _ALL_SIGMAS if s is not Sigmas.DEFAULT}
    return {key: value for key, value in merged.items() if key in accepted}


def _with_zero_snr(config: dict[str, Any], accepted: Mapping[str, Any]) -> dict[str, Any]:
    """Rescaled betas for a class that does not know ``rescale_betas_zero_snr`` (Lin et al. 2023, arXiv 2305.08891)."""
    if not config.get("rescale_betas_zero_snr") or "rescale_betas_zero_snr" in accepted:
        return config
    # Euler's last cumulative alpha is tiny but not 0, so that every sigma is finite
    euler = SCHEDULERS["K_EULER"].scheduler_class()
    known = inspect.signature(euler.__init__).parameters
    alphas_cumprod = euler(**{key: value for key, value in config.items() if key in known}).alphas_cumprod.double()
    betas = 1 - alphas_cumprod / torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    return {**config, "trained_betas": betas.tolist()}


def _scheduler(spec: SchedulerSpec, settings: Mapping[str, Any], steps: int, exact: bool) -> Any:
    scheduler = spec.scheduler_class()(**settings)
    scheduler.set_timesteps(steps)
    if not exact and float(scheduler.timesteps[-1]) == -1:
        _drop_surplus_timestep(scheduler)
    return scheduler


def _drop_surplus_timestep(scheduler: Any) -> None:
    """Undo a rounding of diffusers' trailing spacing: 61, 103, 121, ... steps get one more, at timestep -1."""
    if scheduler.order > 1:  # these solve on sigmas, for which it is a harmless step at the lowest level
        scheduler.timesteps = scheduler.timesteps.clamp(min=0)
        return
    scheduler.timesteps = scheduler.timesteps[:-1]
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = torch.cat([scheduler.sigmas[:-2], scheduler.sigmas[-1:]])


def _plan_dpm_sde(
    spec: SchedulerSpec, settings: Mapping[str, Any], steps: int, running: int, common: Mapping[str, Any]
) -> Schedule:
    scheduler = _scheduler(spec, settings, steps, exact=False)
    sigmas = scheduler.sigmas[steps - running :].double()
    middles = (sigmas[:-2] * sigmas[1:-1]).sqrt()
    timesteps = scheduler.timesteps[steps - running :].double()
    timesteps = _interleave(timesteps, _timesteps_at(middles, scheduler.alphas_cumprod))
    levels = [Level(1.0, sigma) for sigma in _interleave(sigmas[:-1], middles).tolist()] + [Level(1.0, 0.0)]
    return _DpmSdeSchedule(
        timesteps=timesteps, levels=levels, init_noise_sigma=float(scheduler.init_noise_sigma), **common
    )


def _interleave(outer: Tensor, between: Tensor) -> Tensor:
    """n and n - 1 values -> a0 b0 a1 b1 ... a(n-1)."""
    return torch.cat([torch.stack([outer[:-1], between], dim=1).flatten(), outer[-1:]])


def _timesteps_at(sigmas: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Fractional training timesteps of ``sigmas``, linear in log sigma."""
    import numpy as np

    trained = ((1 - alphas_cumprod.double()) / alphas_cumprod.double()).sqrt().log()
    at = np.interp(sigmas.log().numpy(), trained.numpy(), np.arange(len(trained)))
    return torch.from_numpy(at)


def _plan_warm_plms(
    spec: SchedulerSpec, settings: Mapping[str, Any], steps: int, running: int, common: Mapping[str, Any]
) -> Schedule:
    scheduler = _scheduler(spec, {**settings, "prediction_type": "epsilon"}, steps, exact=False)
    timesteps = scheduler.timesteps.unique().flip(0)[-running:]
    if running > 1:  # PLMS starts with a Heun-like pair: its second timestep is evaluated twice
        timesteps = torch.cat([timesteps[:2], timesteps[1:]])
    levels = spec.levels(scheduler, timesteps, 0)
    return _WarmPlmsSchedule(scheduler, {}, None, timesteps=timesteps, levels=levels, **common)


def _distilled_scheduler(
    spec: SchedulerSpec, settings: Mapping[str, Any], steps: int, strength: float, exact: bool
) -> Any:
    cls = spec.scheduler_class()
    scheduler = cls(**settings)
    grid, trained = scheduler.config.original_inference_steps, scheduler.config.num_train_timesteps
    if exact:
        if steps > grid:
            raise InputError(f"{spec.name} has {grid} timesteps in diffusers; give steps from 1 to {grid}.")
        scheduler.set_timesteps(steps)
        return scheduler
    finer = (d for d in range(grid, trained + 1) if trained % d == 0 and int(d * strength) >= steps)
    divisions = next(finer, None)
    if divisions is None:
        raise InputError(
            f"{spec.name} runs all its steps below strength {strength}, where only {int(trained * strength)} of its "
            f"timesteps lie; give fewer than {steps} steps or more strength."
        )
    if divisions != grid:
        scheduler = cls(**{**settings, "original_inference_steps": divisions})
    scheduler.set_timesteps(steps, strength=strength)
    return scheduler


def _use_closed_form(scheduler: Any) -> None:
    """Replace the numerical quadrature in a KLMS scheduler; it takes longer than all else in a step."""
    sigmas = scheduler.sigmas.tolist()
    scheduler.get_lms_coefficient = lambda order, index, which: lms_coefficients(sigmas, index, order)[which]


def _remask_levels(scheduler: Any, timesteps: Tensor, begin: int, levels: list[Level]) -> list[Level]:
    """The levels to which StableDiffusionInpaintPipeline noises the kept area: those of ``add_noise(timesteps[i])``."""
    if not hasattr(scheduler, "sigmas"):
        return _timestep_levels(scheduler, timesteps)
    level = _exploding if levels[0].signal == 1.0 else _preserving
    return [level(sigma) for sigma in scheduler.sigmas[begin : begin + len(timesteps)]]


def _exploding(sigma: Tensor) -> Level:
    return Level(1.0, float(sigma))


def _preserving(sigma: Tensor) -> Level:
    signal = 1 / ((sigma**2 + 1) ** 0.5)
    return Level(float(signal), float(sigma * signal))


def _cumulative(alpha_cumprod: Tensor) -> Level:
    return Level(float(alpha_cumprod**0.5), float((1 - alpha_cumprod) ** 0.5))


def _exploding_levels(scheduler: Any, timesteps: Tensor, begin: int) -> list[Level]:
    return [_exploding(sigma) for sigma in scheduler.sigmas[begin : begin + len(timesteps) + 1]]


def _preserving_levels(scheduler: Any, timesteps: Tensor, begin: int) -> list[Level]:
    return [_preserving(sigma) for sigma in scheduler.sigmas[begin : begin + len(timesteps) + 1]]


def _kdpm2_levels(scheduler: Any, timesteps: Tensor, begin: int) -> list[Level]:
    levels = _exploding_levels(scheduler, timesteps, begin)
    # the ancestral class keeps a step's midpoint one place earlier in its table
    shift = -1 if hasattr(scheduler, "sigmas_up") else 0
    for index in range(1, len(timesteps), 2):
        levels[index] = _exploding(scheduler.sigmas_interpol[begin + index + shift])
    return levels


def _timestep_levels(scheduler: Any, timesteps: Tensor) -> list[Level]:
    return [_cumulative(scheduler.alphas_cumprod[timestep]) for timestep in timesteps]


def _ddim_levels(scheduler: Any, timesteps: Tensor, begin: int) -> list[Level]:
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    return _strided_levels(scheduler, timesteps[0], timesteps - stride)


def _pndm_levels(scheduler: Any, timesteps: Tensor, begin: int) -> list[Level]:
    stride = scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    reached = timesteps - stride
    reached[1:2] += stride  # the second evaluation takes the first step again
    return _strided_levels(scheduler, timesteps[0], reached)


def _strided_levels(scheduler: Any, first: Tensor, reached: Tensor) -> list[Level]:
    levels = _timestep_levels(scheduler, first[None])
    for timestep in reached:
        cumulative = scheduler.alphas_cumprod[timestep] if timestep >= 0 else scheduler.final_alpha_cumprod
        levels.append(_cumulative(cumulative))
    return levels


def _lcm_levels(scheduler: Any, timesteps: Tensor, begin: int) -> list[Level]:
    return [*_timestep_levels(scheduler, timesteps), Level(1.0, 0.0)]


def _tcd_levels(scheduler: Any, timesteps: Tensor, begin: int) -> list[Level]:
    return [*_timestep_levels(scheduler, timesteps), _cumulative(scheduler.alphas_cumprod[0])]


_MENU = (
    SchedulerSpec("DPMSolverMultistep", "DPMSolverMultistepScheduler", _preserving_levels, sigmas=_ALL_SIGMAS),
    SchedulerSpec("DDIM", "DDIMScheduler", _ddim_levels),
    SchedulerSpec("K_EULER", "EulerDiscreteScheduler", _exploding_levels, sigmas=_ALL_SIGMAS),
    SchedulerSpec("K_EULER_ANCESTRAL", "EulerAncestralDiscreteScheduler", _exploding_levels, stochastic=True),
    SchedulerSpec("PNDM", "PNDMScheduler", _pndm_levels),
    SchedulerSpec("KLMS", "LMSDiscreteScheduler", _exploding_levels, sigmas=_ALL_SIGMAS),
    SchedulerSpec("UniPC", "UniPCMultistepScheduler", _preserving_levels, sigmas=_ALL_SIGMAS),
    SchedulerSpec("DEIS", "DEISMultistepScheduler", _preserving_levels, sigmas=_ALL_SIGMAS),
    SchedulerSpec("Heun", "HeunDiscreteScheduler", _exploding_levels, sigmas=_ALL_SIGMAS, order=2),
    SchedulerSpec("KDPM2", "KDPM2DiscreteScheduler", _kdpm2_levels, sigmas=_ALL_SIGMAS, order=2),
    SchedulerSpec(
        "KDPM2_ANCESTRAL",
        "KDPM2AncestralDiscreteScheduler",
        _kdpm2_levels,
        sigmas=_ALL_SIGMAS,
        order=2,
        stochastic=True,
    ),
    SchedulerSpec(
        "DPM++2M_KARRAS",
        "DPMSolverMultistepScheduler",
        _preserving_levels,
        options={
            "algorithm_type": "dpmsolver++",
            "solver_order": 2,
            "use_karras_sigmas": True,
            "use_exponential_sigmas": False,
            "use_beta_sigmas": False,
        },
        sigmas=(Sigmas.DEFAULT, Sigmas.KARRAS),
    ),
    SchedulerSpec(
        "DPM++2M_SDE",
        "DPMSolverMultistepScheduler",
        _preserving_levels,
        options={"algorithm_type": "sde-dpmsolver++", "solver_order": 2},
        sigmas=_ALL_SIGMAS,
        stochastic=True,
    ),
    SchedulerSpec(
        "DPM++SDE",
        "EulerDiscreteScheduler",
        _exploding_levels,
        options={"final_sigmas_type": "zero"},
        sigmas=_ALL_SIGMAS,
        order=2,
        stochastic=True,
    ),
    SchedulerSpec("LCM", "LCMScheduler", _lcm_levels, stochastic=True, distilled=True),
    SchedulerSpec("TCD", "TCDScheduler", _tcd_levels, stochastic=True, distilled=True),
)
SCHEDULERS: dict[str, SchedulerSpec] = {spec.name: spec for spec in _MENU}
"""Every scheduler by its name, in menu order: the hosted names first."""
