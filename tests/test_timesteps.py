# SPDX-License-Identifier: Apache-2.0
"""Networks that are told rounded timesteps, and runs that start from noise alone."""

import math
from itertools import pairwise

import pytest
import torch
from torch.autograd import gradcheck

import gradsampler as gs
from support.problems import Gaussian, normal

F64 = torch.float64
ABAR = torch.linspace(0.999, 0.02, 60, dtype=F64)
LEVELS = gs.schedules.discrete(ABAR, [50, 33, 20, 7], final="sigma_min")
TABLE = [50.4, 33.0, 19.6, 7.3]
FLOW = torch.tensor([0.8, 0.5, 0.3, 0.1], dtype=F64)


class Heard:
    """A network that notes what it is told."""

    def __init__(self):
        self.told = []

    def __call__(self, x, told):
        self.told.append(told[0].item())
        return torch.tanh(x) * torch.cos(0.05 * told.view(-1, 1))


@pytest.mark.parametrize("count", [3, 4])
def test_at_the_levels_of_a_run_the_table_is_told_to_the_bit(count):
    heard = Heard()
    table = TABLE[:count]
    gs.sample(gs.VP(heard, ABAR, timesteps=table), normal(2, 3), LEVELS)
    assert heard.told == table[:3]
    heard = Heard()
    sigmas = FLOW / (1 - FLOW)
    gs.sample(gs.Flow(heard, timesteps=[800, 499, 301][:count]), normal(2, 3), sigmas)
    assert heard.told == [800, 499, 301]


def test_a_second_evaluation_is_told_the_next_entry_and_a_middle_one_the_line_between():
    heard = Heard()
    gs.sample(gs.VP(heard, ABAR, timesteps=TABLE), normal(2, 3), LEVELS, solver="heun")
    assert heard.told == [TABLE[k] for k in (0, 1, 1, 2, 2, 3)]
    plain, heard = Heard(), Heard()
    options = {"solver": "midpoint"}
    gs.sample(gs.VP(plain, ABAR), normal(2, 3), LEVELS, **options)
    gs.sample(gs.VP(heard, ABAR, timesteps=TABLE), normal(2, 3), LEVELS, **options)
    at, between = [50.0, 33.0, 20.0, 7.0], []
    for k, t in enumerate(plain.told[1::2]):
        share = (at[k] - t) / (at[k] - at[k + 1])
        between.append((1 - share) * TABLE[k] + share * TABLE[k + 1])
    assert heard.told[1::2] == pytest.approx(between, rel=1e-9)


def test_beyond_the_table_the_line_goes_on():
    heard = Heard()
    model = gs.Flow(heard, timesteps=[800.0, 500.0, 300.0])  # t times 1000, for the steps alone
    gs.sample(model, normal(2, 3), FLOW / (1 - FLOW), solver="heun")
    assert heard.told[-1] == pytest.approx(100.0)


def test_one_step_is_told_its_number():
    heard = Heard()
    gs.sample(gs.VP(heard, ABAR, timesteps=[41]), normal(2, 3), [3.0, 1.0], solver="heun")
    assert heard.told == [41, 41]


@pytest.mark.parametrize("memory", ["store", "checkpoint"])
def test_gradients_reach_levels_and_table(memory):
    # Beside the levels of the process, at which the formula's timestep has a kink.
    z0, levels = normal(2, 3).requires_grad_(), (1.003 * LEVELS).requires_grad_()
    table = torch.tensor(TABLE, dtype=F64, requires_grad=True)

    def run(z0, levels, table):
        model = gs.VP(Heard(), ABAR, timesteps=table)
        return gs.sample(model, z0, levels, solver="midpoint", memory=memory)

    assert gradcheck(run, (z0, levels, table), eps=1e-5, rtol=1e-6, atol=1e-7)


TABLES = {
    "length": (
        lambda m: gs.sample(m([3.0, 2.0]), normal(2, 3), LEVELS),
        ValueError,
        "timesteps must hold a number for each of the 3 steps or 4 levels, got 2 numbers",
    ),
    "call": (
        lambda m: m(TABLE)(normal(2, 3), torch.ones(2)),
        ValueError,
        "timesteps must be used in a run, to whose levels they belong, got a call",
    ),
    "shape": (lambda m: m([[1.0]]), ValueError, r"timesteps must be finite, of shape \[N\] or"),
    "nan": (lambda m: m([math.nan]), ValueError, r"timesteps must be finite, of shape \[N\] or"),
    "words": (lambda m: m(["a"]), TypeError, "timesteps must be a tensor or a list of numbers"),
}


@pytest.mark.parametrize("case", TABLES)
@pytest.mark.parametrize("model", ["VP", "Flow"])
def test_tables_that_do_not_fit_are_refused(model, case):
    attempt, kind, message = TABLES[case]

    def make(table):
        if model == "VP":
            return gs.VP(Heard(), ABAR, timesteps=table)
        return gs.Flow(Heard(), timesteps=table)

    with pytest.raises(kind, match=f"^{model}: {message}"):
        attempt(make)


# A start from noise alone.


DATA = Gaussian(0.3, 0.5)
TO = [4.0, 1.5, 0.6, 0.2]


def velocity(x, t):
    return DATA.velocity(x, t)


def v_prediction(x, timestep):
    """v of `DATA` in VP coordinates, whose timestep of level sigma here is that of `ZERO`."""
    index = timestep.round().long()
    abar = ZERO[index].view(-1, 1)
    a, b = abar.sqrt(), (1 - abar).sqrt()
    variance = a**2 * DATA.std**2 + b**2
    centred = x - a * DATA.mean
    return b / variance * centred * a - b * DATA.mean - a * b * DATA.std**2 / variance * centred


ZERO = torch.cat([1 / (1 + torch.tensor([*TO, 0.1], dtype=F64).flip(0) ** 2), torch.zeros(1)])


def loop(z0, sigmas):
    """Euler in VE coordinates after DDIM's first step, the denoiser in closed form."""
    x = DATA.mean + sigmas[1] * z0  # at alpha = 0 the mean is all that can be said
    for s, t in pairwise(sigmas[1:]):
        x = x + (t - s) * (x - DATA.denoise(x, s)) / s
    return x


MODELS = {
    "flow": lambda: gs.Flow(velocity),
    "vp-v": lambda: gs.VP(v_prediction, ZERO, "v"),
    "guided": lambda: gs.Guided(gs.Flow(velocity), 3.0, {}),
}


@pytest.mark.parametrize("memory", ["store", "checkpoint", "revolve:2"])
@pytest.mark.parametrize("name", MODELS)
def test_a_run_starts_from_noise_alone(name, memory):
    z0, sigmas = normal(2, 3).requires_grad_(), torch.tensor([math.inf, *TO], dtype=F64)
    got = gs.sample(MODELS[name](), z0, sigmas, memory=memory)
    expected = loop(z0, sigmas)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    found, wanted = (torch.autograd.grad(x.square().sum(), z0)[0] for x in (got, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_flow_time_one_in_ve_coordinates_is_flow_time_one():
    """Euler's step is the same in both, up to the scale of the state."""
    times = torch.tensor([1.0, 0.8, 0.5, 0.2, 0.0], dtype=F64)
    native = gs.sample(velocity, normal(2, 3), times, prediction="flow")
    got = gs.sample(gs.Flow(velocity), normal(2, 3), times / (1 - times))
    torch.testing.assert_close(got, native, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", gs.solvers.names())
def test_every_solver_goes_on_from_noise_alone(solver):
    z0, upper = normal(2, 3).requires_grad_(), torch.tensor(TO, dtype=F64, requires_grad=True)
    sigmas = torch.cat([torch.tensor([math.inf], dtype=F64), upper, torch.zeros(1, dtype=F64)])
    x = gs.sample(gs.Flow(velocity), z0, sigmas, solver=solver)
    gradients = torch.autograd.grad(x.sum(), (z0, upper))
    assert x.isfinite().all()
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("memory", ["store", "checkpoint"])
def test_the_levels_after_it_have_their_gradient(memory):
    upper, z0 = torch.tensor(TO, dtype=F64, requires_grad=True), normal(2, 3).requires_grad_()

    def run(z0, upper):
        sigmas = torch.cat([torch.tensor([math.inf], dtype=F64), upper])
        return gs.sample(gs.Flow(velocity), z0, sigmas, solver="heun", memory=memory)

    assert gradcheck(run, (z0, upper), eps=1e-5, rtol=1e-6, atol=1e-7)


def test_what_the_network_is_told_there():
    heard = Heard()
    gs.sample(gs.VP(heard, ZERO, "v"), normal(2, 3), [math.inf, 1.0])
    gs.sample(gs.VP(heard, ZERO, "x0", timesteps=[999]), normal(2, 3), [math.inf, 1.0])
    gs.sample(gs.Flow(heard), normal(2, 3), [math.inf, 1.0])
    assert heard.told == [len(ZERO) - 1, 999, 1.0]


NOISE_ALONE = {
    "epsilon": (lambda: gs.VP(Heard(), ZERO), "be finite for VP with an epsilon prediction"),
    "edm": (lambda: gs.EDM(Heard()), "be finite for a network wrapped in EDM, got infinity"),
    "plain": (lambda: Heard(), "be finite for a network wrapped in Prediction"),
}


@pytest.mark.parametrize("case", NOISE_ALONE)
def test_networks_that_know_no_such_level_are_refused_before_a_call(case):
    make, message = NOISE_ALONE[case]
    model = make()
    with pytest.raises(ValueError, match=rf"sigmas\[0\] must {message}"):
        gs.sample(model, normal(2, 3), [math.inf, 1.0])
    assert not getattr(model, "network", model).told


@pytest.mark.parametrize("sigmas", [[math.inf, math.inf, 1.0], [2.0, -math.inf], [math.nan, 1.0]])
def test_no_other_level_may_be_infinite(sigmas):
    with pytest.raises(ValueError, match="sigmas must"):
        gs.sample(gs.Flow(velocity), normal(2, 3), sigmas)
