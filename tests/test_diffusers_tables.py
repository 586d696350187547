# SPDX-License-Identifier: Apache-2.0
"""Every scheduler of diffusers by each way, and gradients to its levels."""

import pytest
import torch

import gradsampler as gs
import gradsampler.integrations.diffusers as gsd
from support import schedulers, tables, ways
from support.pipelines import BETAS, apart, bare, diffusers
from support.schedulers import OTHER, SETUPS
from support.tiers import few

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),  # upstream under numpy 2
    pytest.mark.filterwarnings("ignore:Should have t:UserWarning"),  # torchsde in float32
]

CHEAP = ("DDIMScheduler", "UniPCMultistepScheduler")
BROWNIAN = ("CosineDPMSolverMultistepScheduler", "DPMSolverSDEScheduler")


def test_no_scheduler_is_forgotten():
    assert set(schedulers.classes()) == {*SETUPS, *OTHER}
    for name in OTHER:
        tables.check(tables.SCHEDULERS, tables.other(name))


def setups():
    for name, each in SETUPS.items():
        for k in range(len(each)):
            marks = [] if name in CHEAP else [pytest.mark.thorough]
            yield pytest.param(name, k, marks=marks, id=f"{name}-{k}")


@pytest.mark.parametrize(("name", "k"), list(setups()))
def test_a_scheduler_has_the_sample_and_the_gradient_of_its_own_code(name, k):
    if name in BROWNIAN:
        pytest.importorskip("torchsde")
    setup = SETUPS[name][k]
    found = ways.scheduler(name, setup)
    assert found.method == ("program" if setup.affine else "steps")
    assert {"steps", "calls"} <= set(found.errors)
    for way, error in found.errors.items():
        assert error.sample == 0 or (way == "program" and error.sample < 1e-5)
        assert error.gradient < 1e-5
    tables.check(tables.SCHEDULERS, tables.scheduler(name, setup, found))


# ------------------------------------------------------------------ levels


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True:UserWarning")
@pytest.mark.parametrize(
    ("name", "k"), few(schedulers.leveled(), ("EulerAncestralDiscreteScheduler", 0))
)
def test_gradients_to_the_levels_are_those_of_differences(name, k):
    """Also where the pipeline's own code has NaN, or another number."""
    setup = SETUPS[name][k]
    found = ways.levels(name, setup)
    assert found.ours < 1e-5
    tables.check(tables.LEVELS, tables.levels(name, setup, found))


@pytest.mark.thorough
def test_no_other_scheduler_takes_levels():
    for name, each in SETUPS.items():
        for setup in each:
            if name in schedulers.LEVELS or not setup.affine:
                continue
            pipe = schedulers.pipeline(schedulers.classes()[name], setup)
            run = gsd.pipeline(pipe, method="program")
            with pytest.raises(ValueError, match="levels must be None for"):
                run(**schedulers.arguments(setup), levels=torch.ones(setup.steps + 1))


@pytest.mark.parametrize("method", ["program", "steps", "calls"])
def test_levels_take_the_place_of_the_schedulers(method):
    pipe = bare(diffusers.EulerDiscreteScheduler(**BETAS))
    arguments = schedulers.arguments(schedulers.Setup(steps=4))
    levels = gs.schedules.karras(3, sigma_min=0.1, sigma_max=9.0, final="sigma_min")
    levels = torch.cat([levels, torch.zeros(1)]).float()
    x = gsd.pipeline(pipe, method=method)(**arguments, levels=levels)
    scheduler = pipe.scheduler
    scheduler.set_timesteps(4)
    state = arguments["latents"] * levels[0]
    for s, t, when in zip(levels[:-1], levels[1:], scheduler.timesteps, strict=True):
        epsilon = pipe.unet(state / (s**2 + 1) ** 0.5, when)
        state = state + (t - s) * epsilon
    assert apart(x, state) < 1e-5


def test_levels_that_do_not_fit_are_named():
    arguments = schedulers.arguments(schedulers.Setup(steps=4))
    run = gsd.pipeline(bare(diffusers.EulerDiscreteScheduler(**BETAS)))
    with pytest.raises(ValueError, match=r"levels of EulerDiscreteScheduler must have shape \[5\]"):
        run(**arguments, levels=torch.ones(4))
    with pytest.raises(ValueError, match="levels must be finite and at least 0"):
        run(**arguments, levels=-torch.ones(5))
    run = gsd.pipeline(bare(diffusers.DDIMScheduler(**BETAS)))
    with pytest.raises(ValueError, match="levels must be None for a scheduler without a table"):
        run(**arguments, levels=torch.ones(5))
    run = gsd.pipeline(bare(diffusers.KDPM2DiscreteScheduler(**BETAS)))
    with pytest.raises(ValueError, match="whose sigmas_interpol follow from its own"):
        run(**arguments, levels=torch.ones(5))
