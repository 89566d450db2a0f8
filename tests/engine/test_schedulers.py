"""Schedules: equality with diffusers in compat, the exact solution of a solvable model, noise levels, randomness."""

import inspect
import time
from itertools import permutations

import diffusers
import numpy as np
import pytest
import torch
from comfyui_mend.engine import schedulers
from comfyui_mend.engine.schedulers import SCHEDULERS, joined_noise, lms_coefficients, plan, sde_step
from comfyui_mend.engine.types import Compat, InputError, Sigmas
from tiny import SD15_SCHEDULER

HOSTED = ["DPMSolverMultistep", "DDIM", "K_EULER", "K_EULER_ANCESTRAL", "PNDM", "KLMS"]
FROM_DIFFUSERS = [name for name in SCHEDULERS if name != "DPM++SDE"]
STOCHASTIC = [name for name, spec in SCHEDULERS.items() if spec.stochastic]
VARIANTS = [(name, sigmas) for name, spec in SCHEDULERS.items() for sigmas in spec.sigmas]
V_PREDICTION = {**SD15_SCHEDULER, "prediction_type": "v_prediction"}
ZERO_SNR = {**V_PREDICTION, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}

MEAN, SPREAD = torch.linspace(-2, 2, 256).double(), 0.5


@pytest.fixture(autouse=True, scope="module")
def quick_kdpm2_constructors():
    """The constructors of both classes tabulate all 1000 training timesteps, 0.2 s each, which is never read."""
    with pytest.MonkeyPatch.context() as patch:
        for cls in (diffusers.KDPM2DiscreteScheduler, diffusers.KDPM2AncestralDiscreteScheduler):

            def set_timesteps(self, steps, *args, original=cls.set_timesteps):
                original(self, 1 if steps == 1000 else steps, *args)

            patch.setattr(cls, "set_timesteps", set_timesteps)
        yield


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def network(model_input, timestep):
    """Something smooth that depends on the timestep, in the place of a network."""
    return torch.tanh(model_input + torch.sin(timestep.float() / 100))


def run(schedule, noise, image_latents, generators, mask=None, predict=network):
    """The sampling loop; with ``mask``, that of a 4-channel checkpoint (1 = repaint)."""
    latents = schedule.start(noise, image_latents)
    for index, timestep in enumerate(schedule.timesteps):
        output = predict(schedule.scale(latents, index), timestep)
        latents = schedule.step(output, index, latents, generators)
        if mask is not None:
            latents = mask * latents + (1 - mask) * schedule.renoise(image_latents, noise, index)
    return latents


def diffusers_run(scheduler, steps, strength, noise, image_latents, generator, mask=None):
    """What StableDiffusionInpaintPipeline does with its scheduler."""
    scheduler.set_timesteps(steps)
    begin = (steps - min(int(steps * strength), steps)) * scheduler.order
    timesteps = scheduler.timesteps[begin:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    if strength == 1:
        latents = noise * scheduler.init_noise_sigma
    else:
        latents = scheduler.add_noise(image_latents, noise, timesteps[:1].repeat(len(noise)))
    parameters = inspect.signature(scheduler.step).parameters
    extra = {"eta": 0.0} if "eta" in parameters else {}
    extra |= {"generator": generator} if "generator" in parameters else {}
    for index, timestep in enumerate(timesteps):
        output = network(scheduler.scale_model_input(latents, timestep), timestep)
        latents = scheduler.step(output, timestep, latents, **extra, return_dict=False)[0]
        if mask is not None:
            kept = image_latents
            if index < len(timesteps) - 1:
                kept = scheduler.add_noise(kept, noise, timesteps[index + 1 : index + 2])
            latents = (1 - mask) * kept + mask * latents
    return latents


def documented_evaluations(name, steps, strength, compat):
    if SCHEDULERS[name].distilled and compat is Compat.OFF:
        return steps
    running = max(1, int(steps * strength))
    if name == "PNDM":
        # the second timestep is evaluated twice; diffusers' slice keeps one entry more than the steps it runs
        return running + 1 if running > 1 or (compat is Compat.DIFFUSERS and steps > 1) else 1
    return 2 * running - 1 if SCHEDULERS[name].order == 2 else running


def batch(rows=2, seed=5):
    generator = seeded(seed)
    return torch.randn(rows, 4, 4, 4, generator=generator), torch.randn(rows, 4, 4, 4, generator=generator)


@pytest.mark.parametrize("steps", [1, 2, 25])
@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize(("name", "sigmas"), VARIANTS, ids=lambda value: getattr(value, "value", value))
def test_every_run_is_finite_and_as_long_as_documented(name, sigmas, strength, steps):
    noise, image_latents = batch()
    for compat in Compat:
        if compat is Compat.DIFFUSERS and int(steps * strength) == 0:
            with pytest.raises(InputError, match="no step to run"):
                plan(name, SD15_SCHEDULER, steps, strength, sigmas=sigmas, compat=compat)
            continue
        schedule = plan(name, SD15_SCHEDULER, steps, strength, sigmas=sigmas, compat=compat)
        assert schedule.evaluations == documented_evaluations(name, steps, strength, compat)
        assert schedule.from_noise == (strength == 1)
        assert len(schedule.levels) == schedule.evaluations + 1
        latents = run(schedule, noise, image_latents, seeded(1), mask=torch.ones(1))
        assert latents.shape == noise.shape
        assert latents.dtype == torch.float32
        assert latents.isfinite().all()


@pytest.mark.parametrize("config", [SD15_SCHEDULER, V_PREDICTION, ZERO_SNR], ids=["epsilon", "v", "zero-snr"])
@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("name", FROM_DIFFUSERS)
def test_compat_equals_the_diffusers_loop(name, strength, config):
    noise, image_latents = batch()
    mask = (torch.arange(16).reshape(1, 1, 4, 4) % 3 > 0).float()
    spec = SCHEDULERS[name]
    for kept in (None, mask):
        scheduler = spec.scheduler_class().from_config({"_class_name": "PNDMScheduler", **config}, **spec.options)
        expected = diffusers_run(scheduler, 20, strength, noise, image_latents, seeded(3), kept)
        schedule = plan(name, config, 20, strength, compat=Compat.DIFFUSERS)
        latents = run(schedule, noise, image_latents, seeded(3), kept)
        # rounding alone: an input scaled by a float64 norm, and KLMS's closed form against quadrature in float32
        tolerance = (1e-5 if name == "KLMS" else 2e-6) * float(expected.abs().max())
        torch.testing.assert_close(latents, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("sigmas", [Sigmas.KARRAS, Sigmas.EXPONENTIAL, Sigmas.BETA])
def test_sigmas_options_equal_those_of_diffusers(sigmas):
    noise, image_latents = batch()
    for name in ("DPMSolverMultistep", "K_EULER", "UniPC", "Heun"):
        scheduler = SCHEDULERS[name].scheduler_class()(
            **{k: v for k, v in SD15_SCHEDULER.items() if "beta" in k or k == "steps_offset"},
            **{f"use_{sigmas.value}_sigmas": True},
        )
        expected = diffusers_run(scheduler, 12, 0.6, noise, image_latents, seeded(3))
        latents = run(plan(name, SD15_SCHEDULER, 12, 0.6, sigmas=sigmas), noise, image_latents, seeded(3))
        torch.testing.assert_close(latents, expected, rtol=1e-5, atol=1e-5)


def test_the_menu_tells_the_truth_about_the_diffusers_classes():
    for name, spec in SCHEDULERS.items():
        cls = spec.scheduler_class()
        accepted = inspect.signature(cls.__init__).parameters
        if name != "DPM++2M_KARRAS":
            offered = [s for s in Sigmas if s is Sigmas.DEFAULT or f"use_{s.value}_sigmas" in accepted]
            assert list(spec.sigmas) == offered, name
        assert spec.order == (2 if name == "DPM++SDE" else cls.order), name
    assert list(SCHEDULERS)[:6] == HOSTED


# --- the exact solution -------------------------------------------------------------------------------------------
# For data ~ N(MEAN, SPREAD^2) the best noise prediction and the solution of the probability-flow ODE are known.


def gaussian_network(alphas_cumprod, v_prediction=False):
    trained = ((1 - alphas_cumprod) / alphas_cumprod).sqrt().log()

    def predict(model_input, timestep):
        sigma = torch.tensor(np.exp(np.interp(float(timestep), np.arange(len(trained)), trained))).double()
        signal, noise = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
        epsilon = noise * (model_input.double() - signal * MEAN) / (signal**2 * SPREAD**2 + noise**2)
        if not v_prediction:
            return epsilon.float()
        clean = (model_input.double() - noise * epsilon) / signal
        return (signal * epsilon - noise * clean).float()

    return predict


def trained_alphas_cumprod():
    betas = torch.linspace(SD15_SCHEDULER["beta_start"] ** 0.5, SD15_SCHEDULER["beta_end"] ** 0.5, 1000) ** 2
    return torch.cumprod(1 - betas, 0).double()


def solver_error(name, strength, compat=Compat.OFF, steps=25, config=SD15_SCHEDULER):
    """Root mean square distance to the exact solution from the same start, and the evaluations spent."""
    schedule = plan(name, config, steps, strength, compat=compat)
    noise = torch.randn(256, generator=seeded(1))[None]
    level = schedule.levels[0]
    predict = gaussian_network(trained_alphas_cumprod(), config.get("prediction_type") == "v_prediction")
    final = run(schedule, noise, MEAN.float()[None], seeded(1), predict=predict).double()
    start = schedule.start(noise, MEAN.float()[None]).double() / level.signal
    sigma = level.noise / level.signal
    exact = MEAN + (start - MEAN) * SPREAD / (SPREAD**2 + sigma**2) ** 0.5
    return float((final - exact).square().mean().sqrt()), schedule.evaluations


@pytest.mark.parametrize("name", [name for name, spec in SCHEDULERS.items() if not spec.stochastic])
def test_cells_let_go_late_end_where_a_run_that_starts_there_ends(name):
    """What a solver remembers of the steps before does not count in them: a soft mask sets states back in between."""
    predict = gaussian_network(trained_alphas_cumprod())
    noise, clean = torch.randn(1, 256, generator=seeded(1)), 3 + MEAN.float()[None]
    whole = plan(name, SD15_SCHEDULER, 40, 1.0)
    part = plan(name, SD15_SCHEDULER, 40, 0.5)
    state = whole.start(noise, clean)
    for index in range(whole.evaluations):
        if index <= whole.evaluations - part.evaluations:
            state = whole.levels[index].mix(clean, noise)
        state = whole.step(predict(whole.scale(state, index), whole.timesteps[index]), index, state, seeded(0))
    alone = part.start(noise, clean)
    for index in range(part.evaluations):
        alone = part.step(predict(part.scale(alone, index), part.timesteps[index]), index, alone, seeded(0))
    assert float((state - alone).abs().max()) < 0.1


@pytest.mark.parametrize(
    ("name", "strength", "factor"),
    [("PNDM", 0.8, 4), ("PNDM", 0.6, 5), ("PNDM", 0.3, 6), ("KLMS", 0.8, 50), ("KLMS", 0.6, 40), ("KLMS", 0.3, 6)],
)
def test_restarted_warm_up_is_far_closer_to_the_exact_solution(name, strength, factor):
    error, evaluations = solver_error(name, strength)
    diffusers_error, diffusers_evaluations = solver_error(name, strength, Compat.DIFFUSERS)
    assert evaluations == diffusers_evaluations
    assert error * factor < diffusers_error


@pytest.mark.parametrize("strength", [1.0, 0.8, 0.6, 0.3])
@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("DDIM", 0.046),
        ("K_EULER", 0.052),
        ("DPMSolverMultistep", 0.036),
        ("PNDM", 0.006),
        ("KLMS", 0.0012),
        ("Heun", 0.0032),
        ("KDPM2", 0.015),
        ("UniPC", 0.036),
        ("DEIS", 0.015),
        ("DPM++2M_KARRAS", 0.004),
    ],
)
def test_deterministic_solvers_stay_near_the_exact_solution(name, bound, strength):
    assert solver_error(name, strength)[0] < bound


def test_pndm_follows_velocity_checkpoints_as_well_as_epsilon_ones():
    for strength in (1.0, 0.6):
        epsilon, _ = solver_error("PNDM", strength)
        velocity, _ = solver_error("PNDM", strength, config=V_PREDICTION)
        diffusers_velocity, _ = solver_error("PNDM", strength, Compat.DIFFUSERS, config=V_PREDICTION)
        assert velocity == pytest.approx(epsilon, rel=0.05)
        assert velocity * 7 < diffusers_velocity


# --- KLMS ---------------------------------------------------------------------------------------------------------


def test_closed_form_lms_coefficients_equal_quadrature(record_property):
    for use_karras in (False, True):
        scheduler = diffusers.LMSDiscreteScheduler(beta_schedule="scaled_linear", use_karras_sigmas=use_karras)
        scheduler.set_timesteps(25)
        scheduler.sigmas = scheduler.sigmas.double()
        sigmas = scheduler.sigmas.tolist()
        cases = [(order, index) for index in range(25) for order in range(1, min(index + 1, 4) + 1)]
        began = time.perf_counter()
        closed = [lms_coefficients(sigmas, index, order) for order, index in cases]
        halfway = time.perf_counter()
        quadrature = [[scheduler.get_lms_coefficient(o, i, which) for which in range(o)] for o, i in cases]
        record_property("quadrature_over_closed_form_time", (time.perf_counter() - halfway) / (halfway - began))
        for ours, theirs in zip(closed, quadrature, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-9)


# --- randomness ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_row_of_a_batch_equals_that_row_alone(name):
    noise, image_latents = batch(rows=3)
    together = run(plan(name, SD15_SCHEDULER, 6, 1.0), noise, image_latents, [seeded(s) for s in (10, 11, 12)])
    for row in range(3):
        alone = run(
            plan(name, SD15_SCHEDULER, 6, 1.0),
            noise[row : row + 1],
            image_latents[row : row + 1],
            [seeded(10 + row)],
        )
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_only_stochastic_schedulers_depend_on_the_seed(name):
    noise, image_latents = batch()

    def sample(seed):
        return run(plan(name, SD15_SCHEDULER, 6, 1.0), noise, image_latents, seeded(seed))

    assert torch.equal(sample(1), sample(1))
    assert torch.equal(sample(1), sample(2)) == (not SCHEDULERS[name].stochastic)


# --- DPM++ SDE ----------------------------------------------------------------------------------------------------


def sde_samples(steps):
    schedule = plan("DPM++SDE", SD15_SCHEDULER, steps, 1.0, sigmas=Sigmas.KARRAS)
    noise = torch.randn(1024, 256, generator=seeded(1))
    return run(schedule, noise, None, seeded(2), predict=gaussian_network(trained_alphas_cumprod())).double()


def test_dpm_sde_samples_the_data_distribution():
    samples = sde_samples(25)
    # standard errors: 0.016 for each of the 256 means, 0.0007 for the common spread
    assert (samples.mean(0) - MEAN).abs().max() < 0.06
    assert float((samples - MEAN).mean()) == pytest.approx(0, abs=0.004)
    spread_error = abs(float(samples.std(0).mean()) - SPREAD)
    assert spread_error < 0.015
    # of second order: twice the steps, about a quarter of the error
    assert abs(float(sde_samples(50).std(0).mean()) - SPREAD) < spread_error / 3


def test_sde_steps_with_joined_noise_compose():
    state, denoised, first, second = torch.randn(4, 1000, generator=seeded(0), dtype=torch.float64)
    for sigma, middle, sigma_next in ((14.6, 3.0, 1.0), (1.0, 0.9, 0.1), (0.2, 0.05, 0.029)):
        twice = sde_step(sde_step(state, denoised, sigma, middle, first), denoised, middle, sigma_next, second)
        once = sde_step(state, denoised, sigma, sigma_next, joined_noise(first, second, sigma, middle, sigma_next))
        torch.testing.assert_close(twice, once, rtol=1e-12, atol=1e-12)


def test_joined_noise_is_a_unit_increment_of_the_same_path():
    first, second = torch.randn(2, 200_000, generator=seeded(0), dtype=torch.float64)
    joined = joined_noise(first, second, 2.0, 1.0, 0.5)
    assert float(joined.std()) == pytest.approx(1, abs=0.01)
    # clock 1 / sigma^2: 1/4 -> 1 -> 4, so the first part holds 0.75 of 3.75
    assert float((joined * first).mean()) == pytest.approx((0.75 / 3.75) ** 0.5, abs=0.01)


# --- levels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize(("name", "sigmas"), VARIANTS, ids=lambda value: getattr(value, "value", value))
def test_kept_area_has_the_level_of_the_state(name, sigmas, strength):
    """Where the data is a single picture each state is signal * clean + noise * eps; deterministic solvers keep eps."""
    schedule = plan(name, SD15_SCHEDULER, 10, strength, sigmas=sigmas)
    clean = torch.full((64, 4, 8, 8), 1.5)
    noise = torch.randn(clean.shape, generator=seeded(0))
    # at strength 1 too the start has to hold the picture, as every later state does
    latents = schedule.levels[0].mix(clean, noise)
    assert schedule.from_noise or torch.equal(latents, schedule.start(noise, clean))
    generator = seeded(1)
    for index in range(schedule.evaluations):
        signal, sigma = (part / schedule.levels[index].norm for part in schedule.levels[index])
        model_input = schedule.scale(latents, index)
        output = (model_input - signal * clean) / sigma
        torch.testing.assert_close(schedule.denoised(model_input, output, index), clean, rtol=1e-3, atol=2e-3)
        latents = schedule.step(output, index, latents, generator)
        if index == schedule.evaluations - 1:
            assert torch.equal(schedule.renoise(clean, noise, index), clean)
            continue
        kept = schedule.renoise(clean, noise, index)
        assert float(latents.mean()) == pytest.approx(float(kept.mean()), abs=0.02 + 0.02 * float(kept.std()))
        assert float(latents.std()) == pytest.approx(float(kept.std()), rel=0.02, abs=1e-4)
        if not SCHEDULERS[name].stochastic:
            torch.testing.assert_close(latents, kept, rtol=1e-3, atol=2e-3)
        assert float(schedule.renoise(torch.zeros_like(clean), noise, index).std()) == pytest.approx(
            schedule.levels[index + 1].noise, rel=0.01
        )


def test_denoised_reads_velocities_and_ignores_further_channels():
    noise, clean = batch()
    for name in ("DDIM", "K_EULER", "UniPC", "KDPM2"):
        schedule = plan(name, V_PREDICTION, 10, 0.6)
        for index in range(schedule.evaluations):
            signal, sigma = (part / schedule.levels[index].norm for part in schedule.levels[index])
            nine_channels = torch.cat([signal * clean + sigma * noise, torch.ones(2, 5, 4, 4)], 1)
            velocity = signal * noise - sigma * clean
            torch.testing.assert_close(schedule.denoised(nine_channels, velocity, index), clean, rtol=1e-4, atol=1e-4)


# --- configs ------------------------------------------------------------------------------------------------------


def test_what_ran_before_does_not_change_a_result():
    noise, image_latents = batch(rows=1)
    config = dict(SD15_SCHEDULER)

    def sample(name):
        sigmas = SCHEDULERS[name].sigmas[-1]
        return run(plan(name, config, 5, 0.6, sigmas=sigmas), noise, image_latents, seeded(0))

    alone = {name: sample(name) for name in SCHEDULERS}
    for order in permutations(["DPM++2M_KARRAS", "K_EULER", "LCM", "PNDM"]):
        for name in order:
            assert torch.equal(sample(name), alone[name])
    for name in reversed(SCHEDULERS):
        assert torch.equal(sample(name), alone[name])
    assert config == SD15_SCHEDULER


def test_a_config_silent_on_clipping_does_not_clamp_latents():
    silent = {key: value for key, value in SD15_SCHEDULER.items() if key != "clip_sample"}
    noise, image_latents = batch()

    def sample(config, compat):
        return run(plan("DDIM", config, 10, 1.0, compat=compat), 3 * noise, image_latents, seeded(0))

    assert torch.equal(sample(silent, Compat.OFF), sample(SD15_SCHEDULER, Compat.OFF))
    assert not torch.equal(sample(silent, Compat.DIFFUSERS), sample(SD15_SCHEDULER, Compat.DIFFUSERS))


def test_defaults_that_another_class_filled_in_are_not_taken_for_the_checkpoints():
    loaded = dict(diffusers.PNDMScheduler(**{k: v for k, v in SD15_SCHEDULER.items() if k != "clip_sample"}).config)
    assert loaded["timestep_spacing"] == "leading"
    assert torch.equal(plan("K_EULER", loaded, 10, 1.0).timesteps, plan("K_EULER", SD15_SCHEDULER, 10, 1.0).timesteps)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_zero_terminal_snr_reaches_every_scheduler(name):
    noise, image_latents = batch()
    schedule = plan(name, ZERO_SNR, 10, 1.0)
    assert schedule.timesteps[0] == 999
    first = schedule.levels[0]
    assert first.signal / first.noise < 1e-3
    assert run(schedule, noise, image_latents, seeded(0)).isfinite().all()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_one_step_starts_where_there_is_only_noise(name):
    assert plan(name, SD15_SCHEDULER, 1, 1.0).timesteps.tolist() == [999]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_trailing_spacing_never_runs_timestep_minus_one(name):
    trailing = {**SD15_SCHEDULER, "timestep_spacing": "trailing"}
    for steps in (61, 103):
        schedule = plan(name, trailing, steps, 1.0)
        assert schedule.timesteps.min() >= 0
        if name not in ("Heun", "KDPM2", "KDPM2_ANCESTRAL"):
            assert schedule.evaluations == documented_evaluations(name, steps, 1.0, Compat.OFF)
        noise, image_latents = batch()
        assert run(schedule, noise, image_latents, seeded(0)).isfinite().all()


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_longest_run_is_finite(name):
    noise, image_latents = batch()
    schedule = plan(name, SD15_SCHEDULER, 500, 1.0)
    assert schedule.evaluations == documented_evaluations(name, 500, 1.0, Compat.OFF)
    assert run(schedule, noise, image_latents, seeded(0)).isfinite().all()


@pytest.mark.parametrize("name", ["LCM", "TCD"])
def test_distilled_schedulers_run_all_steps_below_the_strength(name):
    schedule = plan(name, SD15_SCHEDULER, 4, 0.6)
    assert schedule.evaluations == 4
    assert schedule.timesteps[0] == 599
    finer = plan(name, SD15_SCHEDULER, 25, 0.3)
    assert finer.evaluations == 25
    assert finer.timesteps[0] == 299


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("Euler", SD15_SCHEDULER, 10, 1.0), "DPMSolverMultistep, DDIM, K_EULER"),
        (("DDIM", SD15_SCHEDULER, 0, 1.0), "1 to 500"),
        (("DDIM", SD15_SCHEDULER, 501, 1.0), "1 to 500"),
        (("DDIM", SD15_SCHEDULER, 10, 0.0), "above 0"),
        (("DDIM", SD15_SCHEDULER, 10, float("nan")), "above 0"),
        (("DDIM", {**SD15_SCHEDULER, "prediction_type": "sample"}, 10, 1.0), "epsilon or v_prediction"),
        (("LCM", SD15_SCHEDULER, 500, 0.3), "fewer than 500 steps"),
    ],
)
def test_what_cannot_run_is_refused_in_a_sentence(arguments, message):
    with pytest.raises(InputError, match=message):
        plan(*arguments)


def test_refusals_name_what_there_is():
    with pytest.raises(InputError, match=r"DDIM has no \"karras\" sigmas; choose default"):
        plan("DDIM", SD15_SCHEDULER, 10, 1.0, sigmas=Sigmas.KARRAS)
    with pytest.raises(InputError, match="1 to 50"):
        plan("LCM", SD15_SCHEDULER, 51, 1.0, compat=Compat.DIFFUSERS)
    with pytest.raises(InputError, match="no step to run"):
        plan("DDIM", SD15_SCHEDULER, 10, 0.05, compat=Compat.DIFFUSERS)
    assert plan("DDIM", SD15_SCHEDULER, 10, 0.05).evaluations == 1
    with pytest.raises(InputError, match="latents"):
        plan("DDIM", SD15_SCHEDULER, 10, 0.5).start(torch.zeros(1, 4, 4, 4), None)


def test_the_menu_needs_no_diffusers_until_a_run_is_planned():
    lines = inspect.getsource(schedulers).splitlines()
    assert not [line for line in lines if line.startswith(("import diffusers", "from diffusers"))]
