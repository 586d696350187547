# SPDX-License-Identifier: Apache-2.0
"""Runs that start from a given state: values and gradients, and z0 that is no noise."""

import math
import pickle
import warnings
from itertools import pairwise

import pytest
import torch
from torch.autograd import gradcheck

import gradsampler as gs
from support.problems import Gaussian, normal
from support.tiers import few

F64 = torch.float64
LEVELS = [3.0, 1.6, 0.7, 0.2]
MEMORIES = ["store", "checkpoint", "offload", "revolve:2", "auto"]
memories = pytest.mark.parametrize("memory", MEMORIES)


def network(x, sigma, shift=0.0):
    return torch.tanh(x) * 0.4 + 0.5 * x / (1 + sigma.view(-1, 1) ** 2) + shift


def leaves():
    """Noise, a state that is not noise alone, conditioning and levels."""
    sigmas = torch.tensor(LEVELS, dtype=F64, requires_grad=True)
    z0, shift = normal(2, 5).requires_grad_(), normal(5, seed=3).requires_grad_()
    return z0, (2.0 + 3.0 * normal(2, 5, seed=1)).requires_grad_(), shift, sigmas


def euler(z0, start, shift, sigmas, noise=None):
    """Euler's method, with churn of 0.3 at each step where there is a noise."""
    x = start
    for i, (s, t) in enumerate(pairwise(sigmas)):
        if noise is not None:
            x = x + s * math.sqrt(0.3 * 2.3) * noise.at(z0, i, 3)
            s = s * 1.3
        x = x + (t - s) * (x - network(x, s.expand(2), shift)) / s
    return x


def assert_same(got, expected, inputs, tolerance=1e-11):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    lam = normal(*got.shape, seed=9)
    found = torch.autograd.grad(got, inputs, lam)
    wanted = torch.autograd.grad(expected, inputs, lam)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@memories
def test_gradients_reach_the_start_and_the_noise_alike(memory):
    z0, start, shift, sigmas = leaves()
    noise = gs.noise.SignedRoll(4)
    options = {"noise": noise, "churn": gs.Churn(0.9), "cond": {"shift": shift}}
    got = gs.sample(network, z0, sigmas, start=start, memory=memory, **options)
    assert_same(got, euler(z0, start, shift, sigmas, noise), [z0, start, shift, sigmas])


@memories
def test_without_noise_z0_is_not_asked(memory):
    z0, start, shift, sigmas = leaves()
    got = gs.sample(network, z0, sigmas, start=start, cond={"shift": shift}, memory=memory)
    assert_same(got, euler(None, start, shift, sigmas), [start, shift, sigmas])
    again = gs.sample(network, z0, sigmas, start=start, cond={"shift": shift}, memory=memory)
    (gradient,) = torch.autograd.grad(again.sum(), z0, allow_unused=True)
    assert gradient is None or not gradient.any()


@pytest.mark.parametrize("memory", ["store", "reversible", "auto"])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_reversible_runs_hold_any_start(memory, scale):
    z0, start = normal(2, 5).requires_grad_(), (scale * normal(2, 5, seed=1)).requires_grad_()
    options = {"solver": "midpoint_reversible", "noise": gs.noise.SignedRoll(3)}
    options |= {"churn": gs.Churn(0.9), "start": start}
    got = gs.sample(network, z0, LEVELS, memory=memory, **options)
    expected = gs.sample(network, z0, LEVELS, memory="checkpoint", **options)
    tolerance = 1e-9 * scale
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)
    for a, b in zip(
        torch.autograd.grad(got.sum(), (z0, start)),
        torch.autograd.grad(expected.sum(), (z0, start)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("solver", gs.solvers.names())
def test_every_solver_takes_a_start(solver):
    """From the state that it would have made itself it goes the same way."""
    z0 = normal(2, 5)
    whole = gs.sample(network, z0, LEVELS, solver=solver)
    started = gs.sample(network, z0, LEVELS, solver=solver, start=LEVELS[0] * z0)
    torch.testing.assert_close(started, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", few(["heun", "euler_ancestral", "dpmpp_2m_sde"], "heun"))
@pytest.mark.parametrize("final", few([0.2, 0.0], 0.0))
@pytest.mark.parametrize("memory", ["store", "checkpoint"])
def test_by_central_differences(solver, final, memory):
    z0, start, shift, _ = leaves()
    upper = torch.tensor(LEVELS[:-1], dtype=F64, requires_grad=True)

    def run(z0, start, shift, upper):
        sigmas = torch.cat([upper, torch.tensor([final], dtype=F64)])
        options = {"solver": solver, "cond": {"shift": shift}, "memory": memory}
        return gs.sample(network, z0, sigmas, start=start, **options)

    assert gradcheck(run, (z0, start, shift, upper), eps=1e-5, rtol=1e-6, atol=1e-7)


@memories
def test_in_flow_time(memory):
    data, times = Gaussian(0.3, 0.5), torch.tensor([0.7, 0.4, 0.1], dtype=F64)
    start = normal(2, 5, seed=1).requires_grad_()
    options = {"prediction": "flow", "memory": memory}
    got = gs.sample(data.velocity, normal(2, 5), times, start=start, **options)
    x = start
    for s, t in pairwise(times):
        x = x + (t - s) * data.velocity(x, s)
    assert_same(got, x, [start])


def test_a_start_at_an_infinite_level_is_what_z0_would_be():
    sigmas, z0 = [math.inf, 2.0, 0.5], normal(2, 5)
    model = gs.Flow(Gaussian(0.3, 0.5).velocity)
    whole = gs.sample(model, z0, sigmas)
    torch.testing.assert_close(gs.sample(model, normal(2, 5, seed=8), sigmas, start=z0), whole)


def test_the_sum_is_in_the_wider_dtype_and_the_result_in_that_of_z0():
    z0, start = normal(2, 5, dtype=torch.float32), normal(2, 5, seed=1).requires_grad_()
    got = gs.sample(network, z0, LEVELS, start=start, memory="checkpoint")
    wide = gs.sample(network, z0.double(), LEVELS, start=start)
    assert got.dtype == torch.float32
    assert (got - wide).abs().max() < 1e-6
    assert torch.autograd.grad(got.sum(), start)[0].dtype == F64


def test_the_last_steps_alone_say_that_the_start_gets_nothing():
    z0, start, _, _ = leaves()
    noise, churn = gs.noise.SignedRoll(4), gs.Churn(0.9)
    options = {"start": start, "noise": noise, "churn": churn}
    with pytest.warns(UserWarning, match="memory=Truncated: start receives no gradient"):
        x = gs.sample(network, z0, LEVELS, memory="truncated:1", **options)
    torch.testing.assert_close(x, gs.sample(network, z0, LEVELS, **options))
    own, given = torch.autograd.grad(x.sum(), (z0, start), allow_unused=True)
    assert own.any()
    assert given is None
    whole = gs.sample(network, z0, LEVELS, memory="truncated:3", **options)
    assert torch.autograd.grad(whole.sum(), start)[0].any()


def test_optimize_starts_there_and_a_checkpoint_knows_it(tmp_path):
    start = 2.0 + 3.0 * normal(2, 5, seed=1)
    z0 = normal(2, 5).requires_grad_()
    options = {"solver": "euler_ancestral", "steps": 2, "checkpoint": tmp_path / "run"}
    found = gs.optimize(network, z0, LEVELS, lambda x: x.square().sum(), start=start, **options)
    direct = gs.sample(network, found.z0, LEVELS, solver="euler_ancestral", start=start)
    torch.testing.assert_close(found.sample, direct)
    assert found.history[1].loss < found.history[0].loss
    with pytest.raises(ValueError, match="checkpoint must be of this run with start"):
        gs.optimize(network, z0, LEVELS, lambda x: x.square().sum(), start=2 * start, **options)


def test_a_plan_knows_the_start():
    plan = gs.memory.plan(network, normal(2, 5), LEVELS, start=normal(2, 5, seed=1), budget="1GB")
    assert plan.best is not None
    with pytest.raises(ValueError, match=r"start must have shape \[2, 5\]"):
        gs.memory.plan(network, normal(2, 5), LEVELS, start=normal(2, 4))


def test_a_program_is_recorded_for_a_start():
    sigmas, z0, start = torch.tensor(LEVELS, dtype=F64), normal(2, 5), normal(2, 5, seed=1)
    plain = gs.solvers.Euler().program(sigmas, network)
    started = gs.solvers.Euler().program(sigmas, network, started=True)
    got = gs.integrate(started, network, z0, start=start)
    torch.testing.assert_close(got, gs.sample(network, z0, LEVELS, start=start))
    with pytest.raises(ValueError, match="start must be None, as the program begins with z0"):
        gs.integrate(plain, network, z0, start=start)
    with pytest.raises(ValueError, match="start must be given, as the program begins with it"):
        gs.integrate(started, network, z0)


ERRORS = {
    "shape": (lambda: normal(2, 4), ValueError, r"start must have shape \[2, 5\], got \[2, 4\]"),
    "integers": (lambda: torch.ones(2, 5).int(), ValueError, "start must have a floating-point"),
    "list": (lambda: [1.0], TypeError, r"start must be a torch\.Tensor, got list"),
    "device": (lambda: torch.ones(2, 5, device="meta"), ValueError, "start must be on cpu"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_a_start_that_does_not_fit_is_refused_before_any_call(case):
    make, kind, message = ERRORS[case]
    calls = []
    with pytest.raises(kind, match=message):
        gs.sample(lambda x, s: calls.append(x), normal(2, 5), LEVELS, start=make())
    assert not calls


# z0 that is no noise.


def injected(z0, **options):
    """All the noise of a run whose denoiser predicts nothing."""
    run = gs.solvers.Recorder(lambda x, s: x, 1)
    _, denoised = run.denoise(run.z0(), 1.0)
    return gs.integrate(run.finish(0.0 * denoised + run.noise()), lambda x, s: x, z0, **options)


def test_noise_made_of_an_image_is_too_wide_and_says_so():
    """What an edit got that passed x/sigma as z0: noise of the state's own standard deviation."""
    state = 2.0 * torch.sign(normal(4, 4096)) + 1.5 * normal(4, 4096, seed=1)
    with pytest.warns(gs.NoiseWarning, match="as start=, and standard normal noise as z0") as seen:
        wide = injected(state / 1.5)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    assert seen[0].message.mean_square == pytest.approx((4 + 1.5**2) / 1.5**2, rel=0.05)
    assert wide.std().item() == pytest.approx(1.667, rel=0.03)
    assert injected(normal(4, 4096)).std().item() == pytest.approx(1.0, rel=0.03)


@pytest.mark.parametrize("memory", ["store", "checkpoint"])
@pytest.mark.parametrize("scale", [0.5, 1.5])
def test_a_sampler_warns_once(scale, memory):
    z0 = (scale * normal(2, 400)).requires_grad_()
    with pytest.warns(gs.NoiseWarning) as caught:
        gs.sample(network, z0, LEVELS, solver="euler_ancestral", memory=memory)
    assert len(caught) == 1
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="deterministic"),
        pytest.param({"solver": "euler_ancestral", "noise": gs.noise.Philox()}, id="philox"),
        pytest.param({"solver": "euler_ancestral", "noise": gs.noise.Off()}, id="off"),
        pytest.param({"solver": "euler_ancestral", "noise": gs.noise.SinCos()}, id="never-normal"),
    ],
)
def test_where_no_noise_is_made_of_z0_it_may_be_anything(options):
    gs.sample(network, 5.0 + normal(2, 400), LEVELS, **options)


def test_chance_is_given_its_due():
    """Small and large samples, many of them, none of which warns; half the variance always does."""
    for size in (2, 3, 5, 10, 100, 3000):
        for seed in range(20):
            injected(normal(64, size, seed=seed))
    for size in (300, 3000):
        with pytest.warns(gs.NoiseWarning):
            injected(math.sqrt(0.5) * normal(1, size))


def test_a_single_odd_sample_of_a_batch_is_found():
    z0 = normal(16, 900)
    z0[11] *= 1.3
    with pytest.warns(gs.NoiseWarning) as caught:
        injected(z0)
    square = z0[11].square().mean().item()
    assert caught[0].message.mean_square == pytest.approx(square, rel=1e-6)


def test_in_sixteen_bits_the_sum_does_not_overflow():
    injected(normal(2, 70000, dtype=torch.float16))


def test_a_loop_over_changing_noise_shows_the_warning_once():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for k in range(4):
            injected((2.0 + k) * normal(2, 400))
    assert [w.category for w in caught] == [gs.NoiseWarning]


def test_the_warning_survives_a_pickle():
    again = pickle.loads(pickle.dumps(gs.NoiseWarning(2.5)))
    assert again.mean_square == 2.5
    assert str(again) == str(gs.NoiseWarning(1.0))
