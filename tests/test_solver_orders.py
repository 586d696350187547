# SPDX-License-Identifier: Apache-2.0
"""Orders of convergence, measured: to the ODE, and of the moments to those of a linear SDE."""

import dataclasses
import math
from functools import cache

import numpy as np
import pytest
import torch
from scipy import integrate

import gradsampler as gs
from gradsampler import noise as noises
from gradsampler import solvers
from support.problems import Gaussian, Mixture, normal

MIXTURE = Mixture(6)
START = normal(2, 6, seed=3)
GAUSSIAN = Gaussian(mean=0.3, std=0.5)


def rho(x):
    return x


# Name, options, and the measured order of a run in VE coordinates and in flow time. There the first
# steps change much, and their lower order remains that of the run.
ORDERS = [
    ("ddim", {}, 1, 1),
    ("deis", {}, 3, 2),
    ("deis", {"order": 2}, 2, 2),
    ("deis", {"order": 4}, 3, 2),
    ("deis", {"variable": "rho"}, 3, 2),
    ("deis", {"variable": "log_rho"}, 3, 2),
    ("dpm_2", {}, 2, 2),
    ("dpm_2_ancestral", {"eta": 0.0}, 2, 2),
    ("dpm_adaptive", {}, 3, 3),  # of its steps, here all accepted
    ("dpm_adaptive", {"order": 2}, 2, 2),
    ("dpm_fast", {}, 2, 2),
    ("dpmpp_2m", {}, 2, 2),
    ("dpmpp_2m_cfg_pp", {}, 2, 2),
    ("dpmpp_2m_sde", {"eta": 0.0}, 2, 2),
    ("dpmpp_2m_sde_heun", {"eta": 0.0}, 2, 2),
    ("dpmpp_2s_ancestral", {"eta": 0.0}, 2, 2),
    ("dpmpp_2s_ancestral_cfg_pp", {"eta": 0.0}, 2, 2),
    ("dpmpp_3m_sde", {"eta": 0.0}, 2, None),  # two terms of its error cancel at some N
    ("dpmpp_sde", {"eta": 0.0}, 2, 2),
    ("er_sde", {"phi": rho}, 2, 2),
    ("er_sde", {"phi": rho, "order": 1}, 1, 1),
    ("euler", {}, 1, 1),
    ("euler_ancestral", {"eta": 0.0}, 1, 1),
    ("euler_ancestral_cfg_pp", {"eta": 0.0}, 1, 1),
    ("euler_cfg_pp", {}, 1, 1),
    ("gradient_estimation", {}, 1, 1),
    ("gradient_estimation_cfg_pp", {}, 1, 1),
    ("heun", {}, 2, 2),
    ("heun_edm_x0", {}, 2, 2),
    ("heunpp2", {}, 1, 1),
    ("ipndm", {}, 2, 2),
    ("ipndm_v", {}, 2, 2),
    ("kutta3", {}, 3, 3),
    ("lms", {"order": 1}, 1, 1),
    ("lms", {"order": 2}, 2, 2),
    ("lms", {"order": 3}, 3, 2),
    ("lms", {}, 4, 2),
    ("midpoint", {}, 2, 2),
    ("midpoint_reversible", {}, 2, 2),
    ("res_2ab", {}, 2, 2),
    ("res_2mid", {}, 2, 2),
    ("res_2mid_stable", {}, 2, 2),
    ("res_multistep", {}, 2, 2),
    ("res_multistep_ancestral", {"eta": 0.0}, 2, 2),
    ("res_multistep_ancestral_cfg_pp", {"eta": 0.0}, 2, 2),
    ("res_multistep_cfg_pp", {}, 2, 2),
    ("restart", {}, 2, 2),
    ("sa_solver", {"eta": 0.0}, 4, 4),
    ("sa_solver", {"eta": 0.0, "predictor_order": 2, "corrector_order": 0}, 2, 2),
    ("sa_solver", {"eta": 0.0, "predictor_order": 2, "corrector_order": 3}, 3, 3),
    ("sa_solver_pece", {"eta": 0.0}, 4, 4),
    ("seeds_2", {"eta": 0.0}, 2, 2),
    ("seeds_3", {"eta": 0.0}, 3, 3),
    ("uni_pc", {}, 2, 2),
    ("uni_pc", {"order": 1}, 2, 2),
    ("uni_pc", {"order": 2, "lower_order_final": False}, 3, 3),
    ("uni_pc", {"lower_order_final": False}, 4, 4),
    ("uni_pc_bh2", {}, 2, 2),
]
CHEAP = {"lms", "sa_solver"}
# Where the asymptotic order shows late.
COUNTS = {"ipndm_v": [256, 512, 1024], "dpm_fast": [128, 256], "uni_pc": [128, 256, 512]}


def label(case):
    name, options, *_ = case
    return "-".join([name, *(f"{k}={getattr(v, '__name__', v)}" for k, v in options.items())])


def marked(cases):
    for case in cases:
        cheap = case[0] in CHEAP and len(case[1]) < 2
        marks = () if cheap else pytest.mark.thorough
        yield pytest.param(*case, marks=marks, id=label(case))


def error(got, expected):
    return ((got - expected).abs().max() / expected.abs().max()).item()


def integrated(slope, x, s, t):
    """The solution at t of dx/ds = slope(x, s) through x at s, by an adaptive method of order 8."""

    def flat(level, y):
        return slope(torch.from_numpy(y).view(x.shape), level).numpy().ravel()

    y = integrate.solve_ivp(
        flat, (s, t), x.numpy().ravel(), method="DOP853", rtol=1e-12, atol=1e-12
    )
    return torch.from_numpy(y.y[:, -1]).view(x.shape)


@cache
def solution(flow):
    """What becomes of START between the levels 20 and 0.05, or the times 0.98 and 0.02."""
    if flow:
        return integrated(MIXTURE.velocity, 0.98 * START, 0.98, 0.02)
    return integrated(MIXTURE.epsilon, 20.0 * START, 20.0, 0.05)


def levels(n, flow):
    if flow:
        return torch.linspace(0.98, 0.02, n + 1, dtype=torch.float64)
    return gs.schedules.karras(n, sigma_min=0.05, sigma_max=20.0)


def solver(name, options):
    return dataclasses.replace(solvers.resolve(name), **options)


def fitted(counts, errors):
    """The slope of -log(error) over log(N)."""
    return -np.polyfit(np.log2(counts), np.log2(errors), 1)[0]


def measured(name, options, flow):
    model = MIXTURE.velocity if flow else MIXTURE.denoise
    prediction = "flow" if flow else "x0"
    counts = COUNTS.get(name, [64, 128, 256])
    errors = []
    for n in counts:
        program, wrapped = gs.arguments.record(
            model, levels(n, flow), solver=solver(name, options), prediction=prediction
        )
        x = gs.integrate(program, wrapped, START, noise=noises.Off())
        errors.append(error(x, solution(flow)))
    return fitted(counts, errors)


@pytest.mark.parametrize(("name", "options", "ve", "flow"), list(marked(ORDERS)))
def test_order_of_convergence(name, options, ve, flow):
    assert measured(name, options, flow=False) == pytest.approx(ve, abs=0.4)
    assert solver(name, options).ode_order == ve


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "options", "ve", "flow"), list(marked(ORDERS)))
def test_order_of_convergence_in_flow_time(name, options, ve, flow):
    if flow is None:
        pytest.skip("no clear order")
    assert measured(name, options, flow=True) == pytest.approx(flow, abs=0.4)


def test_every_order_that_a_solver_claims_is_measured():
    claimed = {name: solvers.resolve(name) for name in solvers.names() if home(name)}
    ode = {name for name, solver in claimed.items() if solver.ode_order is not None}
    weak = {name for name, solver in claimed.items() if solver.weak_order is not None}
    assert ode == {name for name, *_ in ORDERS}
    assert weak == {name for name, *_ in WEAK}
    assert set(claimed) == ode | weak | {"lcm"}  # which solves no equation
    injecting = {name for name, solver in claimed.items() if hasattr(solver, "s_noise")}
    assert injecting == weak | {"lcm", "restart"}  # of the latter a test of its own


def home(name):
    return type(solvers.resolve(name)).__module__.startswith(solvers.__name__)


@pytest.mark.thorough
def test_the_midpoint_method_is_of_third_order_on_gaussian_data():
    """There x is proportional to sqrt(std^2 + s^2), for which its leading error, that of
    x_sss + 3 f_x x_ss, vanishes.
    """
    expected = GAUSSIAN.ode(20.0 * START, 20.0, 0.05)
    errors = [
        error(gs.sample(GAUSSIAN.denoise, START, levels(n, False), solver="midpoint"), expected)
        for n in (64, 128, 256)
    ]
    assert fitted([64, 128, 256], errors) == pytest.approx(3, abs=0.2)


# With the exact denoiser of Gaussian data the SDE dx = -(1+e)(x - D) dlambda + sqrt(2e) sigma dW is
# linear, and so is each run: its mean is the run without noise, its variance the sum of the squared
# derivatives to z0 and to each noise. Name, options, e, and the order of the worse moment.
WEAK = [
    ("ddim", {"eta": 0.6}, 0.36, 1),
    ("ddpm", {}, 1.0, 1),
    ("dpm_2_ancestral", {"eta": 0.6}, 0.36, 1),
    ("dpm_adaptive", {"eta": 0.6}, 0.36, 1),
    ("dpm_fast", {"eta": 0.6}, 0.36, 1),
    ("dpmpp_2m_sde", {"eta": 0.6}, 0.6, 2),
    ("dpmpp_2m_sde", {}, 1.0, 2),
    ("dpmpp_2m_sde_heun", {"eta": 0.6}, 0.6, 2),
    ("dpmpp_2s_ancestral", {"eta": 0.6}, 0.36, 1),
    ("dpmpp_2s_ancestral_cfg_pp", {"eta": 0.6}, 0.36, 1),
    ("dpmpp_3m_sde", {"eta": 0.6}, 0.6, 2),
    ("dpmpp_3m_sde", {}, 1.0, 2),
    ("dpmpp_sde", {"eta": 0.6}, 0.36, 1),
    ("dpmpp_sde", {"independent": True}, 1.0, 1),
    ("er_sde", {}, None, 2),
    ("er_sde", {"order": 1}, None, 1),
    ("euler_ancestral", {"eta": 0.6}, 0.36, 1),
    ("euler_ancestral", {}, 1.0, 1),
    ("euler_ancestral_cfg_pp", {"eta": 0.6}, 0.36, 1),
    ("euler_cfg_pp", {"eta": 0.6}, 0.36, 1),
    ("midpoint_reversible", {"eta": 0.6}, 0.36, 1),
    ("res_multistep", {"eta": 0.6}, 0.36, 1),
    ("res_multistep_ancestral", {"eta": 0.6}, 0.36, 1),
    ("res_multistep_ancestral_cfg_pp", {"eta": 0.6}, 0.36, 1),
    ("res_multistep_cfg_pp", {"eta": 0.6}, 0.36, 1),
    ("sa_solver", {"eta": 0.6}, 0.6, 2),
    ("sa_solver", {}, 1.0, 2),
    ("sa_solver_pece", {"eta": 0.6}, 0.6, 2),
    ("seeds_2", {"eta": 0.6}, 0.6, 2),
    ("seeds_3", {"eta": 0.6}, 0.6, 2),
]


def er_sde_rate(rho):
    """1 + e as it depends on rho: rho times the logarithmic derivative of phi."""
    power = rho**0.3
    return 1 + 0.3 * power * math.exp(power) / (math.exp(power) + 10)


def exact_moments(e, s, t):
    """Mean and variance at t of the SDE that starts at s as N(0, s^2)."""
    square = GAUSSIAN.std**2
    if e is None:

        def rate(log_rho):
            return er_sde_rate(math.exp(log_rho)) / (1 + square * math.exp(-2 * log_rho))

        decay = math.exp(-integrate.quad(rate, math.log(t), math.log(s), epsrel=1e-12)[0])
    else:
        decay = ((square + t**2) / (square + s**2)) ** ((1 + e) / 2)
    return GAUSSIAN.mean * (1 - decay), square + t**2 - square * decay**2


def moments(method, sigmas):
    """Mean and variance of what a solver makes of z0 and of its noises."""
    program, model = gs.arguments.record(GAUSSIAN.denoise, sigmas, solver=method)
    zeros = [
        torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
        for _ in range(1 + len(program.noises))
    ]
    given = noises.Given(zeros[1:])
    x = gs.sampling.integrate(program, model, zeros[0], noise=given, memory="store")
    slopes = torch.autograd.grad(x.sum(), zeros)
    return x.item(), sum(g.square().item() for g in slopes)


def weak_order(method, e, counts):
    errors = []
    for n in counts:
        sigmas = levels(n, False)
        expected = exact_moments(e, sigmas[0].item(), sigmas[-1].item())
        errors.append([abs(a - b) for a, b in zip(moments(method, sigmas), expected, strict=True)])
    return min(fitted(counts, each) for each in zip(*errors, strict=True) if each[-1] > 1e-12)


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "options", "e", "order"), WEAK, ids=list(map(label, WEAK)))
def test_weak_order_on_a_linear_sde(name, options, e, order):
    method = solver(name, options)
    assert weak_order(method, e, [64, 128, 256]) == pytest.approx(order, abs=0.4)
    if name != "dpmpp_sde" or "independent" not in options:
        assert method.weak_order == order


@pytest.mark.thorough
def test_restart_is_of_second_order_between_its_noises():
    """The exact moments: the ODE keeps the shape of a Gaussian, and the way up adds variance."""

    def down(moments, s, t):
        ratio = math.hypot(GAUSSIAN.std, t) / math.hypot(GAUSSIAN.std, s)
        mean, variance = moments
        return GAUSSIAN.mean + (mean - GAUSSIAN.mean) * ratio, variance * ratio**2

    counts, errors = [32, 64, 128], []
    for n in counts:
        sigmas = levels(n, False)
        low, high = sigmas[3 * n // 4].item(), sigmas[n // 2].item()
        found = moments(
            solver("restart", {}), gs.schedules.restart(sigmas, low, high, steps=n // 2, times=2)
        )
        exact = down((0.0, 20.0**2), 20.0, low)
        for _ in range(2):
            exact = down((exact[0], exact[1] + high**2 - low**2), high, low)
        exact = down(exact, low, 0.05)
        errors.append([abs(a - b) for a, b in zip(found, exact, strict=True)])
    for each in zip(*errors, strict=True):
        assert fitted(counts, each) == pytest.approx(2, abs=0.3)


def test_the_parts_of_one_path_make_dpmpp_sde_a_method_of_second_order():
    """At eta = 1, where its mean is exact: independent noises leave it of the first."""
    method = solver("dpmpp_sde", {})
    assert weak_order(method, 1.0, [16, 32, 64]) == pytest.approx(2, abs=0.4)
