# SPDX-License-Identifier: Apache-2.0
"""Programs of one's own: what a Recorder writes down and `integrate` runs."""

from itertools import pairwise

import pytest
import torch
from torch import nn

import gradsampler as gs
from gradsampler.parameterization import Prediction
from support.problems import normal

F64 = torch.float64
LEVELS = [3.0, 1.6, 0.7, 0.2]
memories = pytest.mark.parametrize("memory", ["store", "checkpoint", "revolve:2", "auto"])


def network(x, sigma, shift=0.0):
    return torch.tanh(x) * 0.4 + 0.5 * x / (1 + sigma.view(-1, 1) ** 2) + shift


def assert_same(got, expected, inputs, tolerance=1e-11):
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    lam = normal(*got.shape, seed=9)
    found = torch.autograd.grad(got, inputs, lam)
    wanted = torch.autograd.grad(expected, inputs, lam)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@memories
def test_a_loop_of_ones_own_runs_under_every_strategy(memory):
    """Levels that rise again between steps down, and a noise that enters twice."""
    sigmas = [3.0, 1.0, 2.0, 1.0, 0.3]
    z0, shift = normal(2, 5).requires_grad_(), normal(5, seed=3).requires_grad_()
    source = gs.noise.SignedRoll(4)

    def method(x, denoise, noise):
        kept = None
        for i, (s, t) in enumerate(pairwise(sigmas)):
            if t > s:
                kept = noise(i)
                x = x + (t**2 - s**2) ** 0.5 * kept
                continue
            x, denoised = denoise(i, x, s)
            x = denoised + t / s * (x - denoised)
        return x + 0.1 * kept

    run = gs.solvers.Recorder(network, num_steps=4)

    def recorded(i, x, s):
        run.step = i
        return run.denoise(x, s)

    def drawn(i):
        run.step = i
        return run.noise()

    program = run.finish(method(sigmas[0] * run.z0(), recorded, drawn))
    got = gs.integrate(program, network, z0, noise=source, cond={"shift": shift}, memory=memory)
    expected = method(
        sigmas[0] * z0,
        lambda i, x, s: (x, network(x, torch.full((2,), s, dtype=F64), shift)),
        lambda i: source.at(z0, i, 4),
    )
    assert_same(got, expected, [z0, shift])


class Restarted(gs.solvers.Solver):
    """Euler down the levels, and noise up them."""

    stochastic = True
    monotone = False

    def step(self, run, x, s, t):
        if t > s:
            return x + (t**2 - s**2) ** 0.5 * run.noise()
        x, denoised = run.denoise(x, s)
        return denoised + t / s * (x - denoised)


def test_a_solver_says_itself_whether_levels_must_decrease():
    sigmas, z0 = [3.0, 1.0, 2.0, 2.0, 0.5], normal(2, 5)
    noise = gs.noise.Philox(3)
    got = gs.sample(network, z0, sigmas, solver=Restarted(), noise=noise)
    x = 3.0 * z0
    for i, (s, t) in enumerate(pairwise(sigmas)):
        if t > s:
            x = x + 3**0.5 * noise.at(z0, i, 4)
        else:
            denoised = network(x, torch.full((2,), s, dtype=F64))
            x = denoised + t / s * (x - denoised)
    torch.testing.assert_close(got, x)
    with pytest.raises(ValueError, match="sigmas must decrease strictly"):
        gs.sample(network, z0, sigmas)
    with pytest.raises(ValueError, match=r"be positive up to the last, got sigmas\[1\] = 0.0"):
        gs.sample(network, z0, [3.0, 0.0, 2.0], solver=Restarted())


class CFGpp(gs.solvers.Solver):
    """Chung et al. 2024, arXiv 2406.08070, algorithm 2: the noise of the unconditional branch."""

    def step(self, run, x, s, t):
        x, denoised = run.denoise(x, s)
        return denoised + t / s * (x - run.predictions[-1].unconditional)


def cfgpp_loop(z0, sigmas, scale, shift):
    x = sigmas[0] * z0
    for s, t in pairwise(sigmas):
        level = torch.full((len(z0),), s, dtype=F64)
        plain, full = network(x, level), network(x, level, shift)
        x = plain + scale * (full - plain) + t / s * (x - plain)
    return x


@memories
@pytest.mark.parametrize("scale", [0.6, 1.0, 3.0])
def test_a_guided_prediction_hands_out_its_branches(scale, memory):
    z0, shift = normal(2, 5).requires_grad_(), normal(5, seed=3).requires_grad_()
    model = gs.Guided(network, scale, {"shift": 0.0})
    got = gs.sample(model, z0, LEVELS, solver=CFGpp(), cond={"shift": shift}, memory=memory)
    assert_same(got, cfgpp_loop(z0, LEVELS, scale, shift), [z0, shift])


def test_without_guidance_the_unconditional_branch_is_the_prediction():
    z0 = normal(2, 5)
    torch.testing.assert_close(
        gs.sample(network, z0, LEVELS, solver=CFGpp()), gs.sample(network, z0, LEVELS)
    )


@pytest.mark.parametrize(("scale", "calls"), [(1.0, 3), (0.0, 3), (2.0, 6)])
def test_a_branch_that_nothing_reads_is_not_called(scale, calls):
    seen = []

    def counted(x, sigma, which):
        seen.append(which)
        return network(x, sigma)

    model = gs.Guided(counted, scale, {"which": "plain"})
    gs.sample(model, normal(2, 5), LEVELS, cond={"which": "full"})
    assert len(seen) == calls
    assert set(seen) == {1.0: {"full"}, 0.0: {"plain"}, 2.0: {"plain", "full"}}[scale]


def test_a_program_says_when_it_is_run_with_another_denoiser():
    program = gs.solvers.Euler().program(
        torch.tensor(LEVELS, dtype=F64), gs.Guided(network, 2.0, {})
    )
    with pytest.raises(ValueError, match="be the one that the program was recorded with, got Pred"):
        gs.integrate(program, network, normal(2, 5))
    with pytest.raises(TypeError, match="program must be recorded by a Solver or a Recorder"):
        gs.integrate(LEVELS, network, normal(2, 5))


@pytest.mark.parametrize("kind", ["x0", "epsilon", "v", "flow"])
def test_a_recorder_reads_plain_callables_by_what_they_predict(kind):
    levels = [0.9, 0.5, 0.2]
    run = gs.solvers.Recorder(network, 2, prediction=kind)
    x, model = levels[0] * run.z0(), Prediction(network, kind)
    for run.step, (s, t) in enumerate(pairwise(levels)):
        x, denoised = run.denoise(x, s)
        x = denoised + t / s * (x - denoised)
    got = gs.integrate(run.finish(x), network, normal(2, 5))
    expected = gs.sample(network, normal(2, 5), levels, prediction=kind)
    torch.testing.assert_close(got, expected)
    by_solver = gs.solvers.Euler().program(
        torch.tensor(levels, dtype=F64), network, prediction=kind
    )
    torch.testing.assert_close(gs.integrate(by_solver, model, normal(2, 5)), expected)


# Networks behind a lambda.


class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 5, dtype=torch.bfloat16)

    def forward(self, x, sigma):
        assert x.dtype == torch.bfloat16
        return self.layer(x)


WRAPPED = {
    "sample": lambda f, net: (f, {"modules": [net]}),
    "EDM": lambda f, net: (gs.EDM(f, modules=[net]), {}),
    "VP": lambda f, net: (gs.VP(f, torch.linspace(0.99, 0.01, 9), modules=[net]), {}),
    "Flow": lambda f, net: (gs.Flow(f, modules=[net]), {}),
    "Guided": lambda f, net: (gs.Guided(f, 2.0, {}, modules=[net]), {}),
}


@pytest.mark.parametrize("wrapper", WRAPPED)
def test_named_modules_are_those_of_a_lambda(wrapper):
    net = Half()
    model, options = WRAPPED[wrapper](lambda x, sigma: net(x, sigma), net)
    z0 = normal(2, 5, dtype=torch.float32).requires_grad_()
    x = gs.sample(model, z0, LEVELS, memory="checkpoint", **options)
    assert torch.autograd.grad(x.sum(), z0)[0].isfinite().all()
    if not options:
        assert list(model.modules()) == [net]


@pytest.mark.parametrize("bad", [3, [3], "net"])
def test_modules_that_are_none_are_refused(bad):
    for attempt in (
        lambda: gs.sample(network, normal(2, 5), LEVELS, modules=bad),
        lambda: gs.EDM(network, modules=bad),
        lambda: gs.Flow(network, modules=bad),
        lambda: gs.Guided(network, 2.0, {}, modules=bad),
    ):
        with pytest.raises(TypeError, match=r"modules must be a list of nn\.Modules"):
            attempt()


# A scale for each step.


@memories
def test_a_scale_for_each_step(memory):
    z0, shift = normal(2, 5).requires_grad_(), normal(5, seed=3).requires_grad_()
    scale = torch.tensor([1.5, 3.0, 0.5], dtype=F64, requires_grad=True)
    model = gs.Guided(network, scale, {"shift": 0.0})
    options = {"cond": {"shift": shift}, "memory": memory, "final_denoise": True}
    got = gs.sample(model, z0, LEVELS, solver="heun", **options)

    def guided(i, x, s):
        level = torch.full((2,), s, dtype=F64)
        plain, full = network(x, level), network(x, level, shift)
        return plain + scale[min(i, 2)] * (full - plain)

    x = LEVELS[0] * z0
    for i, (s, t) in enumerate(pairwise(LEVELS)):
        slope = (x - guided(i, x, s)) / s
        ahead = x + (t - s) * slope
        x = x + (t - s) * 0.5 * (slope + (ahead - guided(i, ahead, t)) / t)
    assert_same(got, guided(3, x, LEVELS[-1]), [z0, shift, scale])


def test_scales_that_fit_no_run_are_refused():
    model = gs.Guided(network, [1.0, 2.0], {})
    with pytest.raises(ValueError, match="Guided: scale must hold one number a step, 3, got 2"):
        gs.sample(model, normal(2, 5), LEVELS)
    with pytest.raises(ValueError, match="Guided: scale must be one number outside of a run"):
        model(normal(2, 5), torch.ones(2, dtype=F64))
