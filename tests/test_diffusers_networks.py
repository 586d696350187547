# SPDX-License-Identifier: Apache-2.0
"""Networks of diffusers as denoisers: a run of ours against the scheduler's own steps."""

import pytest
import torch

import gradsampler as gs
import gradsampler.integrations.diffusers as gsd
from support import pipelines
from support.pipelines import BETAS, apart, diffusers
from support.tiers import few

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


def conditioned():
    torch.manual_seed(0)
    return pipelines.unet().eval().double(), {"encoder_hidden_states": normal(2, 5, 8)}


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def by_scheduler(model, scheduler, z0, cond):
    """The loop of the scheduler's documentation, in float64."""
    scheduler.set_timesteps(6)
    scheduler.sigmas = scheduler.sigmas.double()
    x = z0 * scheduler.init_noise_sigma if hasattr(scheduler, "init_noise_sigma") else z0
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(model(given, t, **cond).sample, t, x).prev_sample
    return x


KINDS = {
    "epsilon": ("EulerDiscreteScheduler", BETAS),
    "v": ("EulerDiscreteScheduler", BETAS | {"prediction_type": "v_prediction"}),
    "heun": ("HeunDiscreteScheduler", BETAS),
    "edm": ("EDMEulerScheduler", {"sigma_data": 0.7}),
    "flow": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
}


@pytest.mark.parametrize("kind", few(KINDS, "epsilon"))
def test_a_run_is_that_of_the_scheduler(kind):
    name, options = KINDS[kind]
    scheduler = getattr(diffusers, name)(**options)
    model, cond = conditioned()
    z0 = normal(2, 4, 8, 8, seed=1).requires_grad_()
    sample = by_scheduler(model, scheduler, z0, cond)
    levels = torch.unique_consecutive(scheduler.sigmas)
    start = None  # flow time 1 is an infinite level, where z0 is the state
    if kind == "flow":
        levels = levels / (1 - levels)
    else:
        start = scheduler.init_noise_sigma * z0
    solver = "heun" if kind == "heun" else "euler"
    denoiser = gsd.denoiser_from(model, scheduler)
    x = gs.sample(denoiser, z0, levels, solver=solver, cond=cond, start=start)
    assert apart(x, sample) < 1e-5
    (ours,) = torch.autograd.grad(x.square().mean(), z0)
    assert apart(ours, torch.autograd.grad(sample.square().mean(), z0)[0]) < 1e-5


@pytest.mark.thorough
def test_a_transformer_is_told_its_own_time():
    pipe = pipelines.CASES["flux"].build()
    model = pipe.transformer.double()
    cond = {
        "encoder_hidden_states": normal(1, 5, 8),
        "pooled_projections": normal(1, 8),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(5, 3),
        "guidance": torch.ones(1),
    }
    denoiser = gsd.denoiser_from(model, pipe.scheduler, time_scale=1.0)
    x, sigma = normal(1, 4, 16), torch.tensor([1.5], dtype=torch.float64)
    time = sigma / (1 + sigma)
    velocity = model(x * (1 - time), timestep=time, **cond).sample
    assert apart(denoiser(x, sigma, **cond), (1 - time) * x - time * velocity) < 1e-6


def test_what_does_not_fit_is_named():
    model, _ = conditioned()
    with pytest.raises(TypeError, match=r"model must be an nn\.Module"):
        gsd.denoiser_from(lambda x, t: x, diffusers.DDIMScheduler())
    with pytest.raises(ValueError, match="scheduler must have alphas_cumprod, or be of EDM"):
        gsd.denoiser_from(model, diffusers.CMStochasticIterativeScheduler())
    with pytest.raises(ValueError, match="time_scale must be None for DDIMScheduler"):
        gsd.denoiser_from(model, diffusers.DDIMScheduler(), time_scale=1.0)
