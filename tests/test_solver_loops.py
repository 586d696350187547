# SPDX-License-Identifier: Apache-2.0
"""Solvers against their methods written out as plain loops: values, model calls and gradients."""

import dataclasses
import re

import pytest
import torch

import gradsampler as gs
from gradsampler import noise as noises
from gradsampler import solvers
from gradsampler.parameterization import Prediction
from support.loops import LOOPS, Run
from support.problems import Mixture, normal
from support.tiers import few

SHAPE = (3, 2, 3)
MIXTURE = Mixture(6)
WEIGHTS = normal(*SHAPE, seed=5)
Z0 = normal(*SHAPE, seed=1)
NOISES = [normal(*SHAPE, seed=20 + k) for k in range(24)]

LEVELS = {
    "to-sigma_min": [10.0, 4.0, 1.5, 0.9, 0.31, 0.1],
    "to-zero": [10.0, 4.0, 1.5, 0.9, 0.31, 0.0],
    "one-step": [5.0, 1.0],
    "one-step-to-zero": [5.0, 0.0],
}
TIMES = {
    "to-t_min": [0.97, 0.8, 0.55, 0.3, 0.1, 0.02],
    "from-noise-to-zero": [1.0, 0.9, 0.75, 0.5, 0.2, 0.0],
    "one-step": [1.0, 0.4],
    "one-step-to-zero": [1.0, 0.0],
}


def square(rho):
    return rho**2


# Options beside the defaults.
OPTIONS = {
    "ddim": [{"eta": 0.5}, {"eta": 1.0, "s_noise": 0.8}],
    "ddpm": [{"s_noise": 1.3}],
    "deis": [{"variable": "rho"}, {"variable": "log_rho"}, {"order": 4}, {"order": 2}],
    "dpm_2_ancestral": [{"eta": 0.0}, {"eta": 0.5, "s_noise": 0.8}, {"eta": 1.7}],
    "dpm_fast": [{"eta": 0.5, "s_noise": 0.8}],
    "dpmpp_2m_sde": [{"eta": 0.0}, {"eta": 0.5, "s_noise": 0.8}, {"variant": "heun", "eta": 0.5}],
    "dpmpp_2s_ancestral": [{"eta": 0.0}, {"eta": 0.5, "s_noise": 0.8}, {"eta": 1.7}],
    "dpmpp_3m_sde": [{"eta": 0.0}, {"eta": 0.5, "s_noise": 0.8}],
    "dpmpp_sde": [{"eta": 0.0}, {"eta": 0.5, "s_noise": 0.8}, {"r": 0.3, "independent": True}],
    "er_sde": [{"order": 1}, {"order": 2}, {"s_noise": 0.8}, {"phi": square}],
    "euler_ancestral": [{"eta": 0.0}, {"eta": 0.5, "s_noise": 0.8}, {"eta": 1.7}],
    "gradient_estimation": [{"gamma": 1.5}],
    "ipndm": [{"order": 1}, {"order": 2}, {"order": 3}],
    "ipndm_v": [{"order": 1}, {"order": 2}, {"order": 3}],
    "lcm": [{"sigma_min": 0.2, "s_noise": 0.8}],
    "lms": [{"order": 1}, {"order": 2}, {"order": 3}],
    "euler_cfg_pp": [{"eta": 0.5, "s_noise": 0.8}],
    "res_multistep": [{"eta": 0.5, "s_noise": 0.8}, {"eta": 1.7}],
    "sa_solver": [
        {"eta": 0.0},
        {"eta": 0.5, "s_noise": 0.8, "s_tmin": 0.25, "s_tmax": 2.0},
        {"predictor_order": 2, "corrector_order": 2, "simple_order_2": True},
        {"predictor_order": 4, "corrector_order": 0},
        {"predictor_order": 1, "corrector_order": 1},
    ],
    "sa_solver_pece": [{"eta": 0.5}],
    "seeds_2": [{"eta": 0.0}, {"eta": 0.5, "s_noise": 0.8, "r": 0.3}],
    "seeds_3": [{"eta": 0.0}, {"eta": 0.5, "s_noise": 0.8, "r_1": 0.2, "r_2": 0.7}],
    "uni_pc": [{"order": 1}, {"order": 2}, {"lower_order_final": False}],
    "uni_pc_bh2": [{"order": 2}],
}


def label(name, options):
    return "-".join([name, *(f"{k}={getattr(v, '__name__', v)}" for k, v in options.items())])


CASES = {
    label(name, options): (name, options)
    for name in sorted(LOOPS)
    for options in [{}, *OPTIONS.get(name, [])]
}
every_case = pytest.mark.parametrize(("name", "options"), CASES.values(), ids=CASES)
every_name = pytest.mark.parametrize("name", sorted(LOOPS))


def flow_denoise(x, t):
    """E[x0 | x] in flow time, also where the state is noise alone."""
    t = torch.as_tensor(t, dtype=torch.float64)
    return MIXTURE.posterior(x, 1 - t, t)


def flow_velocity(x, t):
    return (x - flow_denoise(x, t)) / t.view(-1, 1, 1)


def error(got, expected):
    """The largest deviation relative to the largest element, where that is not small itself."""
    assert got.shape == expected.shape
    return ((got - expected).abs().max() / expected.abs().max().clamp(min=0.1)).item()


def solver(name, options):
    """The solver of that name with options that `resolve` does not take."""
    return dataclasses.replace(solvers.resolve(name), **options)


def loop(name, options, levels, flow, z0=Z0, noise=NOISES):
    run = Run(flow_denoise if flow else MIXTURE.denoise, iter(noise), flow)
    return LOOPS[name](run, levels[0] * z0, levels, **options), run


def sample(name, options, levels, flow, count, z0=Z0, noise=NOISES, model=None):
    """Over these very levels, also if the solver would choose others."""
    program, wrapped = gs.arguments.record(
        model or (flow_velocity if flow else MIXTURE.denoise),
        torch.as_tensor(levels, dtype=torch.float64),
        solver=solver(name, options),
        prediction="flow" if flow else "x0",
    )
    return gs.integrate(program, wrapped, z0, noise=noises.Given(noise[:count]) if count else None)


def holds(name, options, levels, flow):
    calls = []

    def noted(x, sigma):
        calls.append((x.detach(), sigma[0].item()))
        return (flow_velocity if flow else MIXTURE.denoise)(x, sigma)

    def gradients(run):
        z0 = Z0.clone().requires_grad_()
        noise = [x.clone().requires_grad_() for x in NOISES[:count]]
        x = run(z0, noise)
        return x, torch.autograd.grad((x * WEIGHTS).sum(), [z0, *noise])

    _, run = loop(name, options, levels, flow)
    count = run.drawn
    assert error(sample(name, options, levels, flow, count, model=noted), _) <= 1e-10
    assert len(calls) == len(run.calls)
    for (x, sigma), (x_loop, sigma_loop) in zip(calls, run.calls, strict=True):
        assert error(x, x_loop) <= 1e-10
        assert sigma == pytest.approx(sigma_loop, rel=1e-12)
    got = gradients(lambda z0, noise: sample(name, options, levels, flow, count, z0, noise))
    want = gradients(lambda z0, noise: loop(name, options, levels, flow, z0, noise)[0])
    for a, b in zip([got[0], *got[1]], [want[0], *want[1]], strict=True):
        assert error(a, b) <= 1e-9


@every_case
def test_agrees_with_the_loop(name, options):
    holds(name, options, LEVELS["to-zero"], flow=False)


@every_case
def test_agrees_with_the_loop_in_flow_time(name, options):
    if not solver(name, options).flow:
        pytest.skip("not defined in flow time")
    holds(name, options, TIMES["from-noise-to-zero"], flow=True)


@pytest.mark.parametrize("end", ["to-sigma_min", "one-step", "one-step-to-zero"])
@every_name
def test_agrees_with_the_loop_over_other_levels(name, end):
    holds(name, {}, LEVELS[end], flow=False)


@pytest.mark.parametrize("end", ["to-t_min", "one-step", "one-step-to-zero"])
@every_name
def test_agrees_with_the_loop_over_other_times(name, end):
    holds(name, {}, TIMES[end], flow=True)


def central_differences(name, options, levels, flow, count):
    slopes = []
    for k, s in enumerate(levels):
        if s == 0 or (flow and s == 1):
            continue
        ends = []
        for sign in (1, -1):
            moved = list(levels)
            moved[k] = s * (1 + sign * 1e-5)
            ends.append((loop(name, options, moved, flow)[0] * WEIGHTS).sum().item())
        slopes.append((ends[0] - ends[1]) / (2e-5 * s))
    return torch.tensor(slopes, dtype=torch.float64)


@pytest.mark.parametrize("flow", few([False, True], False), ids=["ve", "flow"])
@every_case
def test_gradient_to_the_levels_is_the_loops_difference_quotient(name, options, flow):
    """From noise alone to level 0, where the formulas have logarithms and roots of 0."""
    if flow and not solver(name, options).flow:
        pytest.skip("not defined in flow time")
    levels = TIMES["from-noise-to-zero"] if flow else LEVELS["to-zero"]
    count = loop(name, options, levels, flow)[1].drawn
    expected = central_differences(name, options, levels, flow, count)
    sigmas = torch.tensor(levels, dtype=torch.float64, requires_grad=True)
    x = sample(name, options, sigmas, flow, count)
    (got,) = torch.autograd.grad((x * WEIGHTS).sum(), sigmas)
    assert torch.isfinite(got).all()
    inner = got[1:-1] if flow else got[:-1]
    assert error(inner, expected) <= 1e-6


RISING = [10.0, 4.0, 1.5, 0.4, 3.0, 0.9, 0.4, 3.0, 0.9, 0.4, 0.0]


@pytest.mark.parametrize("flow", [False, True], ids=["ve", "flow"])
@pytest.mark.parametrize("options", [{}, {"s_noise": 0.8}], ids=str)
def test_restarts_go_up_the_levels(options, flow):
    levels = [s / (1 + s) for s in RISING] if flow else RISING
    holds("restart", options, levels, flow)
    expected = central_differences("restart", options, levels, flow, 2)
    sigmas = torch.tensor(levels, dtype=torch.float64, requires_grad=True)
    x = sample("restart", options, sigmas, flow, 2)
    (got,) = torch.autograd.grad((x * WEIGHTS).sum(), sigmas)
    assert error(got[:-1], expected) <= 1e-6


def test_other_solvers_refuse_to_go_up():
    with pytest.raises(ValueError, match="sigmas must decrease strictly"):
        gs.sample(MIXTURE.denoise, Z0, RISING, solver="heun")


def test_the_bar_of_a_run_with_restarts_ends_at_its_end(capsys):
    gs.sample(MIXTURE.denoise, Z0, RISING, solver="restart", progress=True)
    assert "10/10" in capsys.readouterr().err


def conditional(x, sigma, kind):
    return OTHER.denoise(x, sigma) if kind else MIXTURE.denoise(x, sigma)


def conditional_velocity(x, t, kind):
    clean = (OTHER if kind else MIXTURE).posterior(x, 1 - t, t)
    return (x - clean) / t.view(-1, 1, 1)


OTHER = Mixture(6, seed=8)
GUIDED = sorted(name for name in LOOPS if "cfg_pp" in name)


@pytest.mark.parametrize("flow", [False, True], ids=["ve", "flow"])
@pytest.mark.parametrize("name", GUIDED)
def test_cfg_pp_keeps_the_noise_of_the_unconditional_prediction(name, flow):
    scale = 1.7
    levels = TIMES["to-t_min"] if flow else LEVELS["to-zero"]
    free = flow_denoise if flow else MIXTURE.denoise

    def guided(x, sigma):
        s = torch.as_tensor(sigma, dtype=torch.float64)
        bound = OTHER.posterior(x, 1 - s, s) if flow else OTHER.denoise(x, sigma)
        return (1 - scale) * free(x, sigma) + scale * bound

    def gradients(run):
        z0 = Z0.clone().requires_grad_()
        x = run(z0)
        return x, torch.autograd.grad((x * WEIGHTS).sum(), z0)[0]

    def looped(z0):
        run = Run(guided, iter(NOISES), flow, free)
        x = LOOPS[name](run, levels[0] * z0, levels)
        looped.drawn = run.drawn
        return x

    want = gradients(looped)
    network = Prediction(conditional_velocity, "flow") if flow else conditional
    model = gs.Guided(network, scale, {"kind": 0})
    noise = noises.Given(NOISES[: looped.drawn]) if looped.drawn else None
    got = gradients(
        lambda z0: gs.sample(
            model, z0, levels, solver=name, cond={"kind": 1}, noise=noise, memory="store"
        )
    )
    for a, b in zip(got, want, strict=True):
        assert error(a, b) <= 1e-9


def test_every_loop_is_a_solver_of_that_name():
    assert set(LOOPS) <= set(solvers.names())


AMOUNTS = {"eta": 0.6, "s_noise": 0.9}  # where no branch ends


def amounts_of(name):
    """What a solver that injects takes beside the levels."""
    return {k: v for k, v in AMOUNTS.items() if k in vars(solvers.resolve(name))}


STOCHASTIC = [name for name in sorted(LOOPS) if amounts_of(name) and name != "restart"]


@pytest.mark.parametrize("memory", ["store", "checkpoint"])
@pytest.mark.parametrize("flow", [False, True], ids=["ve", "flow"])
@pytest.mark.parametrize("name", STOCHASTIC)
def test_gradient_to_the_amounts_of_noise_is_the_loops_difference_quotient(name, flow, memory):
    """Also where the run ends in 0, or starts from noise alone."""
    amounts = amounts_of(name)
    if flow and not solver(name, amounts).flow:
        pytest.skip("not defined in flow time")
    levels = TIMES["from-noise-to-zero"] if flow else LEVELS["to-zero"]
    count = loop(name, amounts, levels, flow)[1].drawn
    expected = []
    for key, value in amounts.items():
        ends = [
            (loop(name, {**amounts, key: value + h}, levels, flow)[0] * WEIGHTS).sum().item()
            for h in (1e-5, -1e-5)
        ]
        expected.append((ends[0] - ends[1]) / 2e-5)
    learned = {
        key: torch.tensor(value, dtype=torch.float64, requires_grad=True)
        for key, value in amounts.items()
    }
    program, wrapped = gs.arguments.record(
        flow_velocity if flow else MIXTURE.denoise,
        levels,
        solver=solver(name, learned),
        prediction="flow" if flow else "x0",
    )
    x = gs.integrate(program, wrapped, Z0, noise=noises.Given(NOISES[:count]), memory=memory)
    got = torch.autograd.grad((x * WEIGHTS).sum(), list(learned.values()))
    assert error(torch.stack(got), torch.tensor(expected, dtype=torch.float64)) <= 1e-6


def test_amounts_are_learned_through_sample():
    """In 32 bits as well, and one that is 1 at first."""
    eta = torch.tensor(0.5, requires_grad=True)
    s_noise = torch.tensor(1.0, requires_grad=True)
    x = gs.sample(
        MIXTURE.denoise,
        Z0,
        LEVELS["to-zero"],
        solver="euler_ancestral",
        eta=eta,
        s_noise=s_noise,
        noise=noises.Given(NOISES[:4]),
    )
    got = torch.autograd.grad((x * WEIGHTS).sum(), [eta, s_noise])
    expected = []
    for key in ("eta", "s_noise"):
        values = {"eta": 0.5, "s_noise": 1.0}
        ends = [
            (loop("euler_ancestral", {**values, key: values[key] + h}, LEVELS["to-zero"], False)[0])
            for h in (1e-5, -1e-5)
        ]
        expected.append(((ends[0] - ends[1]) * WEIGHTS).sum().item() / 2e-5)
    assert [g.dtype for g in got] == [torch.float32, torch.float32]
    assert torch.stack(got).tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("amount", "message"),
    [
        (torch.tensor(-0.5), "euler_ancestral: eta must be a finite number of at least 0.0"),
        (torch.tensor([0.5]), "euler_ancestral: eta must have shape []"),
        (torch.tensor(1), "euler_ancestral: eta must have a floating-point dtype"),
        (torch.tensor(torch.nan), "euler_ancestral: eta must be a finite number"),
    ],
)
def test_an_amount_that_is_no_number_is_refused(amount, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        gs.sample(MIXTURE.denoise, Z0, [1.0, 0.5], solver="euler_ancestral", eta=amount)
