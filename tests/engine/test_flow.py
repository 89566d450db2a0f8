"""Schedules of flow models: diffusers' noise levels, solvers that converge on a flow whose path is known, masks."""

import itertools

import diffusers
import numpy as np
import pytest
import torch
from comfyui_mend.engine.flow import FLOW_SCHEDULERS, noise_levels, plan_flow
from comfyui_mend.engine.host import SilentProgress
from comfyui_mend.engine.models.protocol import Canvas, Conditioning, ModelFacts
from comfyui_mend.engine.sampling import denoise
from comfyui_mend.engine.schedulers import SCHEDULERS
from comfyui_mend.engine.types import InputError, Sigmas

SD3 = {"shift": 3.0, "prediction_type": "flow_prediction"}
FLUX = {"use_dynamic_shifting": True, "shift": 3.0, "prediction_type": "flow_prediction"}
SCHNELL = {"shift": 1.0, "timestep_spacing": "trailing", "prediction_type": "flow_prediction"}
CELLS = 128 * 128
"""Of a canvas of 1024x1024."""
MULTISTEP = [name for name in FLOW_SCHEDULERS if name != "K_EULER"]
MEAN, SPREAD = 0.7, 0.5
"""Of the Gaussian that the known flow ends at."""


def velocity(state, sigma):
    """E[gaussian - clean | state] where the clean values are Gaussian."""
    signal = 1 - sigma
    deviation = (state - signal * MEAN) / ((signal * SPREAD) ** 2 + sigma**2)
    return sigma * deviation - (MEAN + signal * SPREAD**2 * deviation)


def on_path(z, level):
    """The flow carries a state along the quantiles of its Gaussian."""
    return level.signal * MEAN + ((level.signal * SPREAD) ** 2 + level.noise**2) ** 0.5 * z


def error(name, steps, strength=1.0, sigmas=Sigmas.DEFAULT, config=SCHNELL, cells=CELLS):
    """Largest distance from the path's end, in units of the clean values' spread."""
    schedule = plan_flow(name, config, steps, strength, sigmas=sigmas, cells=cells)
    z = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    state = on_path(z, schedule.levels[0])
    for index in range(schedule.evaluations):
        state = schedule.step(velocity(state, schedule.levels[index].noise), index, state, [])
    return float((state - MEAN - SPREAD * z).abs().max()) / SPREAD


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("sigmas", Sigmas)
@pytest.mark.parametrize("config", [SD3, FLUX, SCHNELL], ids=["SD3", "FLUX", "schnell"])
@pytest.mark.parametrize("name", FLOW_SCHEDULERS)
def test_every_run_is_finite(name, config, sigmas, strength):
    far = (itertools.chain(range(1, 8), [14, 15, 25]), [499, 500])
    assert all(error(name, steps, strength, sigmas, config) < 8 for steps in itertools.chain(*far))


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_euler_is_of_first_order_and_the_others_of_higher(strength):
    halved = {name: error(name, 80, strength) / error(name, 40, strength) for name in FLOW_SCHEDULERS}
    assert halved.pop("K_EULER") == pytest.approx(0.5, abs=0.03)
    assert all(ratio < 0.37 for ratio in halved.values()), halved


@pytest.mark.parametrize("config", [SD3, FLUX, SCHNELL], ids=["SD3", "FLUX", "schnell"])
@pytest.mark.parametrize("name", MULTISTEP)
def test_a_usual_run_is_nearer_the_path_than_eulers(name, config):
    assert error(name, 25, config=config) < 0.5 * error("K_EULER", 25, config=config)


def test_multistep_solvers_leave_out_a_last_sigma_of_nearly_nothing():
    """diffusers' 25 levels for SD3 end 0.11, 0.009, 0: an extrapolation over that jump costs more than it gains."""
    assert noise_levels(SD3, 25, Sigmas.DEFAULT, CELLS)[-2] < 0.01
    assert all(plan_flow(name, SD3, 25, 1.0, cells=CELLS).levels[-2].noise > 0.1 for name in MULTISTEP)
    linspace = {**SD3, "num_train_timesteps": 1000}
    levels = [float(sigma) for sigma in noise_levels(linspace, 25, Sigmas.DEFAULT, CELLS)]
    solver = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    solver.set_timesteps(25)
    solver.sigmas = torch.tensor(levels).clamp(max=0.9999)
    solver.set_begin_index(0)
    z = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    state = z
    for sigma in levels[:-1]:
        state = solver.step(velocity(state, sigma), sigma * 1000, state, return_dict=False)[0]
    wild = float((state - MEAN - SPREAD * z).abs().max()) / SPREAD
    assert wild > 5 * error("DPMSolverMultistep", 25, config=SD3)


def test_levels_are_those_of_the_flux_pipelines():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**{k: v for k, v in FLUX.items() if k != "prediction_type"})
    for side, mu in ((512, 0.63), (1024, 1.15), (2048, 3.23)):
        cells = (side // 8) ** 2
        exact = 0.5 + (1.15 - 0.5) * (cells // 4 - 256) / (4096 - 256)
        assert exact == pytest.approx(mu, abs=5e-3)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 20, 20), mu=exact)
        assert torch.equal(noise_levels(FLUX, 20, Sigmas.DEFAULT, cells), scheduler.sigmas)
        assert torch.equal(plan_flow("K_EULER", FLUX, 20, 1.0, cells=cells).timesteps, scheduler.timesteps)


def test_a_mu_of_its_own_does_not_follow_the_size():
    one, other = (noise_levels({**FLUX, "mu": 1.15}, 20, Sigmas.DEFAULT, cells) for cells in (64**2, 256**2))
    assert torch.equal(one, other)
    assert torch.allclose(one, noise_levels(FLUX, 20, Sigmas.DEFAULT, CELLS), atol=1e-6)


def test_levels_are_those_of_the_sd3_pipelines():
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(28)
    assert torch.equal(noise_levels(SD3, 28, Sigmas.DEFAULT, CELLS), scheduler.sigmas)


def test_schnell_takes_four_even_steps():
    assert noise_levels(SCHNELL, 4, Sigmas.DEFAULT, CELLS).tolist() == [1, 0.75, 0.5, 0.25, 0]


@pytest.mark.parametrize("sigmas", [Sigmas.KARRAS, Sigmas.EXPONENTIAL, Sigmas.BETA])
def test_spacings_are_diffusers_own(sigmas):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, **{f"use_{sigmas.value}_sigmas": True})
    scheduler.set_timesteps(20)
    levels = noise_levels(SD3, 20, sigmas, CELLS)
    assert torch.equal(levels, scheduler.sigmas)
    assert (levels.diff() < 0).all()
    assert (levels - noise_levels(SD3, 20, Sigmas.DEFAULT, CELLS)).abs().max() > 0.02


@pytest.mark.parametrize(
    ("steps", "strength", "running"),
    [(8, 0.6, 5), (28, 0.6, 17), (10, 1.0, 10), (10, 0.05, 1), (10, 1e-18, 1), (500, 0.999, 500), (1, 0.5, 1)],
)
def test_as_many_steps_run_as_diffusers_pipelines_run(steps, strength, running):
    schedule = plan_flow("K_EULER", SD3, steps, strength, cells=CELLS)
    assert schedule.evaluations == running
    assert len(schedule.levels) == running + 1
    assert schedule.levels[-1] == (1.0, 0.0)
    assert schedule.from_noise == (strength == 1.0)


@pytest.mark.parametrize("name", FLOW_SCHEDULERS)
def test_a_part_run_starts_on_its_own_level(name):
    schedule = plan_flow(name, FLUX, 10, 0.5, cells=CELLS)
    clean, noise = torch.full((1, 1, 2, 2), 3.0), torch.full((1, 1, 2, 2), -1.0)
    signal, sigma = schedule.levels[0]
    assert signal + sigma == pytest.approx(1)
    assert torch.allclose(schedule.start(noise, clean), signal * clean + sigma * noise)
    assert torch.equal(schedule.scale(clean, 0), clean)


def test_schedulers_that_follow_no_flow_are_refused():
    for name in SCHEDULERS.keys() - FLOW_SCHEDULERS.keys():
        with pytest.raises(InputError, match="choose one of K_EULER"):
            plan_flow(name, SD3, 10, 1.0, cells=CELLS)


@pytest.mark.parametrize(("steps", "strength"), [(0, 1.0), (501, 1.0), (10, 0.0), (10, 1.5), (10, float("nan"))])
def test_numbers_out_of_range_are_refused(steps, strength):
    with pytest.raises(InputError, match="give a value"):
        plan_flow("K_EULER", SD3, steps, strength, cells=CELLS)


def test_a_canvas_too_large_for_its_levels_is_refused():
    for name in FLOW_SCHEDULERS:
        for side in (8192, 16384):
            with pytest.raises(InputError, match="too close together"):
                plan_flow(name, FLUX, 25, 1.0, cells=(side // 8) ** 2)
        assert error(name, 25, config=FLUX, cells=(4096 // 8) ** 2) < 8


class KnownFlow:
    """An InpaintModel as far as sampling goes."""

    def __init__(self, conditioning):
        self.facts = ModelFacts(name="known", conditioning=conditioning, native_size=1024, scheduler_config=SD3)
        self.asked = []

    def sample(self, canvas, levels, guidance, loop):
        def denoiser(state, timestep, level):
            self.asked.append(float(timestep))
            return velocity(state, level.noise)

        return loop(denoiser)


def canvas(soft=None, image=3.0):
    noise = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., :2] = 1
    hole = torch.zeros(1, 1, 32, 32)
    return Canvas(noise=noise, mask=mask, hole=hole, image=torch.full_like(noise, image), masked_image=None, soft=soft)


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("name", FLOW_SCHEDULERS)
def test_the_kept_cells_end_as_they_were_and_the_others_on_the_path(name, strength):
    given = canvas()
    model = KnownFlow(Conditioning.REPLACE)
    schedule = plan_flow(name, SD3, 60, strength, cells=CELLS)
    latents = denoise(model, schedule, given, None, torch.Generator(), SilentProgress())
    assert torch.equal(latents[..., 2:], given.image[..., 2:])
    if strength == 1:
        # the known flow moves every cell by itself: the end of the free ones does not depend on the kept ones
        assert torch.allclose(latents[..., :2], (MEAN + SPREAD * given.noise)[..., :2], atol=0.1)
    assert model.asked == pytest.approx([level.noise * 1000 for level in schedule.levels[:-1]])


@pytest.mark.parametrize("conditioning", Conditioning)
@pytest.mark.parametrize("name", FLOW_SCHEDULERS)
def test_soft_cells_run_their_own_share_of_the_steps(name, conditioning):
    """A cell of value v ends where a run of strength v ends, whatever a solver remembers of the steps before."""
    steps, values = 20, torch.tensor([0.0, 0.25, 0.5, 1.0])
    config = {**SD3, "timestep_spacing": "trailing"}

    def run(strength, canvas, conditioning):
        schedule = plan_flow(name, config, steps, strength, cells=CELLS)
        return denoise(KnownFlow(conditioning), schedule, canvas, None, torch.Generator(), SilentProgress())

    given = canvas(soft=values.expand(1, 1, 4, 4).clone())
    latents = run(1.0, given, conditioning)
    assert torch.equal(latents[..., 0], given.image[..., 0])
    for column, value in enumerate(values.tolist()[1:], start=1):
        alone = run(value, canvas(), Conditioning.CONCAT)
        assert torch.allclose(latents[..., column], alone[..., column], atol=0.05)
