# SPDX-License-Identifier: Apache-2.0
"""The Cosmos drop-in against Cosmos's arithmetic, written out here as a plain loop over tensors.

The loop knows nothing of programs, anchors and strategies: levels are Python floats, and torch's
own autograd differentiates it.
"""

import ast
import copy
import importlib.util
import logging
import math
import pickle
import re
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import gradsampler as gs
from gradsampler import gradient_flow
from gradsampler.integrations import cosmos
from gradsampler.integrations.cosmos import (
    Sampler,
    SamplerConfig,
    SolverConfig,
    SolverTimestampConfig,
)
from support.problems import Gaussian, normal

ROOT = Path(__file__).parents[1]
SHAPE = (2, 1, 2, 3, 4)  # B, C, T, H, W
OPTIONS = ["2ab", "1euler", "2mid", "2mid_stable", "2heun_edm", "2heun_naive", "3kutta_naive"]
ORDERS = {"2ab": 1, "1euler": 1, "3kutta_naive": 3}
CHURNS = {
    "none": {},
    "window": {"S_churn": 1.5, "S_min": 0.05, "S_max": 50.0, "S_noise": 1.003},
    "capped": {"S_churn": 40.0},
}
MODES = ["drawn", "off", "sincos", "roll"]
INERT = "inert: this run injects nothing; set S_churn"

# ------------------------------------------------------------------ the loop


def toward(x, clean, s, t):
    """From s to t, exact where the prediction is constant."""
    return (t * x + (s - t) * clean) / s


def refined(x, s, m, t, clean, at_m):
    """The second-order step of arXiv 2308.02157 with predictions at s and at m."""
    h = math.log(s / t)
    c2 = math.log(s / m) / h
    one = math.expm1(-h) / -h
    two = (one - 1) / -h
    return math.exp(-h) * x + h * ((one - two / c2) * clean + two / c2 * at_m)


def two_ab(x, s, t, call, past):
    clean = call(x, s)
    out = refined(x, s, past[0][0], t, clean, past[0][1]) if past else toward(x, clean, s, t)
    past[:] = [(s, clean)]
    return out


def euler(x, s, t, call, past):
    return toward(x, call(x, s), s, t)


def mid(x, s, t, call, past):
    m, clean = math.sqrt(s * t), call(x, s)
    return refined(x, s, m, t, clean, call(toward(x, clean, s, m), m))


def mid_stable(x, s, t, call, past):
    m = math.sqrt(s * t)
    return toward(x, call(toward(x, call(x, s), s, m), m), s, t)


def heun_edm(x, s, t, call, past):
    clean = call(x, s)
    return toward(x, (clean + call(toward(x, clean, s, t), t)) / 2, s, t)


def heun_naive(x, s, t, call, past):
    clean = call(x, s)
    ahead = toward(x, clean, s, t)
    first = (ahead - clean) / s  # sic: at the predicted state
    return x + (t - s) * (first + (ahead - call(ahead, t)) / t) / 2


def kutta_naive(x, s, t, call, past):
    m, clean = s + (t - s) / 2, call(x, s)
    k1 = (x - clean) / s
    half = toward(x, clean, s, m)
    k2 = (half - call(half, m)) / m
    end = x + (t - s) * (2 * k2 - k1)
    k3 = (end - call(end, t)) / t
    return x + (t - s) * (k1 / 6 + 4 * k2 / 6 + k3 / 6)


STEPS = dict(
    zip(
        OPTIONS,
        [two_ab, euler, mid, mid_stable, heun_edm, heun_naive, kutta_naive],
        strict=True,
    )
)


def karras(steps, low=0.002, high=80.0, rho=7.0):
    a, b = high ** (1 / rho), low ** (1 / rho)
    return [(a + i / steps * (b - a)) ** rho for i in range(steps + 1)]


def loop(
    x0_fn,
    x,
    option="2ab",
    num_steps=6,
    S_churn=0.0,
    S_min=0.0,
    S_max=math.inf,
    S_noise=1.0,
    draw=None,
    levels=None,
    clean=True,
    seen=None,
):
    """Cosmos's sampler; ``draw(i, N, x)`` is the noise of step i, by default ``randn_like(x)``.

    What its callbacks see is appended to ``seen``.
    """
    dtype = x.dtype
    levels = levels or karras(num_steps // ORDERS.get(option, 2))
    count, past = len(levels) - 1, []
    eta = min(S_churn / (count + 1), math.sqrt(1.2) - 1)

    def call(x, sigma):
        sigma = torch.full((len(x),), sigma, dtype=torch.float64).to(dtype)
        return x0_fn(x.to(dtype), sigma).double()

    for i in range(count):
        s, t = levels[i], levels[i + 1]
        if S_min < s < S_max:
            noise = torch.randn_like(x) if draw is None else draw(i, count, x)
            hat = s * (1 + eta)
            amount = torch.tensor(math.sqrt(hat**2 - s**2) * S_noise, dtype=torch.float64)
            x, s = x + amount * noise, hat  # of 16 bits, a tensor and a float differ here
        start, first = x, []

        def told(x, sigma, first=first):
            out = call(x, sigma)
            first.append(out)
            return out

        x = STEPS[option](x.double(), s, t, told, past)
        if seen is not None:
            seen.append((i, start, x, s, t, first[0]))
    return (call(x, levels[-1]) if clean else x).to(dtype)


def sincos(z0):
    """The founding formula."""

    def draw(i, count, x):
        wave = 0.1 * torch.sin(z0 * (0.1 * i) + i) + 0.05 * torch.cos(z0 * (0.1 * i))
        return z0 * (1 + 0.1 * i / count) + wave

    return draw


def noise_of(mode, z0):
    """What the loop draws in a mode; signed roll's definition has tests of its own."""
    return {
        "drawn": None,
        "off": lambda i, count, x: torch.zeros_like(x),
        "sincos": sincos(z0),
        "roll": lambda i, count, x: gs.noise.SignedRoll(3).at(z0, i, count),
    }[mode]


SWITCHES = {
    "drawn": {},
    "off": {"learn_noise": True},
    "sincos": {"learn_noise": True, "learnable_step_noise": True},
    "roll": {"noise": gs.noise.SignedRoll(3)},
}

CENTRE = normal(*SHAPE[1:], seed=11)
WEIGHT = normal(*SHAPE, seed=5)


def blobs(x, sigma):
    """E[x0 | x] of two blobs of deviation 0.6 at +-CENTRE: curved, all elements coupled."""
    s2 = (sigma**2).view(-1, *[1] * (x.ndim - 1))
    total = 0.36 + s2
    along = (x * CENTRE).flatten(1).sum(1).view(s2.shape)
    return (0.36 * x + s2 * CENTRE * torch.tanh(along / total)) / total


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    monkeypatch.delenv("LEARNABLE_STEP_NOISE", raising=False)


def close(actual, expected, tolerance=1e-9):
    scale = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(scale, 1e-30))


def quiet(mode, churn):
    """Expects the warning of a learnable noise that would do nothing, and no other."""
    if churn == "none" and mode in ("sincos", "roll"):
        return pytest.warns(UserWarning, match=INERT)
    return warnings.catch_warnings()


# ------------------------------------------------------------------ numbers


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("churn", CHURNS)
@pytest.mark.parametrize("option", OPTIONS)
def test_values_and_gradients_are_those_of_the_loop(option, churn, mode):
    z0 = normal(*SHAPE).requires_grad_()
    torch.manual_seed(7)
    expected = loop(blobs, 80.0 * z0, option, 7, **CHURNS[churn], draw=noise_of(mode, z0))
    (dz0,) = torch.autograd.grad((WEIGHT * expected).sum(), z0)
    for memory in ("store", "checkpoint"):
        sampler = Sampler()
        torch.manual_seed(7)
        with quiet(mode, churn):
            x = sampler(
                blobs,
                80.0 * z0.detach(),
                7,
                **CHURNS[churn],
                solver_option=option,
                allow_grad=True,
                memory=memory,
                **SWITCHES[mode],
            )
        close(x.detach(), expected.detach())
        torch.manual_seed(99)  # backward draws from no state but its own
        (WEIGHT * x).sum().backward()
        close(sampler.z0.grad, dz0)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("option", OPTIONS)
def test_without_gradient_the_numbers_are_the_same_and_no_graph_is_made(option, mode):
    z0 = normal(*SHAPE).requires_grad_()
    torch.manual_seed(7)
    with torch.no_grad():
        expected = loop(blobs, 80.0 * z0, option, **CHURNS["window"], draw=noise_of(mode, z0))
    after = torch.get_rng_state()
    torch.manual_seed(7)
    sampler = Sampler()
    x = sampler(blobs, 80.0 * z0, 6, **CHURNS["window"], solver_option=option, **SWITCHES[mode])
    assert not x.requires_grad
    assert x.grad_fn is None
    assert sampler.z0 is None
    close(x, expected)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("allow_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_random_numbers_are_consumed_as_by_cosmos_also_without_churn(dtype, allow_grad):
    x = (80 * normal(*SHAPE)).to(dtype)
    torch.manual_seed(7)
    loop(blobs, x)
    after = torch.get_rng_state()
    torch.manual_seed(7)
    Sampler()(blobs, x, 6, allow_grad=allow_grad)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("allow_grad", [False, True])
@pytest.mark.parametrize("churn", CHURNS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, 1e-9),
        (torch.float32, 1e-6),
        (torch.bfloat16, 2**-8),
        (torch.float16, 2**-11),
    ],
    ids=str,
)
def test_the_model_is_called_in_the_inputs_dtype(dtype, tolerance, churn, allow_grad):
    x = (80 * normal(*SHAPE)).to(dtype)
    calls, wanted = [], []

    def model(to):
        def x0_fn(x, sigma):
            layout = tuple(sigma.shape), sigma.is_contiguous()
            to.append((x.dtype, sigma.dtype, layout, x.detach(), sigma.detach()))
            return blobs(x.double(), sigma.double()).to(x.dtype)

        return x0_fn

    torch.manual_seed(7)
    expected = loop(model(wanted), x, **CHURNS[churn])
    torch.manual_seed(7)
    y = Sampler()(model(calls), x, 6, **CHURNS[churn], allow_grad=allow_grad)
    assert y.dtype == dtype
    close(y.detach(), expected, tolerance)
    assert [c[:3] for c in calls] == [(dtype, dtype, ((2,), True))] * 7
    for call, want in zip(calls, wanted, strict=True):
        close(call[3], want[3], tolerance)
        close(call[4], want[4], 1e-14)


def test_the_first_noise_is_drawn_and_rounded_in_the_inputs_dtype():
    x = (80 * normal(*SHAPE)).to(torch.bfloat16)
    seen, mine = [], []
    torch.manual_seed(7)
    loop(blobs, x, **CHURNS["capped"], seen=seen)
    torch.manual_seed(7)
    Sampler()(blobs, x, 6, **CHURNS["capped"], callback_fns=[lambda **names: mine.append(names)])
    first = mine[0]["input_x_B_StateShape"]
    assert torch.equal(first.to(torch.bfloat16), seen[0][1])
    close(first, seen[0][1].double(), 1e-12)
    close(mine[1]["input_x_B_StateShape"], seen[1][1], 1e-2)


@pytest.mark.parametrize("memory", ["store", "checkpoint"])
def test_a_model_that_draws_random_numbers_stays_in_step_with_the_noise(memory):
    def noisy(x, sigma):
        return blobs(x, sigma) * (1 + 0.1 * torch.rand_like(x))

    z0 = normal(*SHAPE).requires_grad_()
    torch.manual_seed(7)
    expected = loop(noisy, 80.0 * z0, "2mid", **CHURNS["capped"])
    (dz0,) = torch.autograd.grad((WEIGHT * expected).sum(), z0)
    torch.manual_seed(7)
    sampler = Sampler()
    x = sampler(
        noisy,
        80.0 * z0.detach(),
        6,
        **CHURNS["capped"],
        solver_option="2mid",
        allow_grad=True,
        memory=memory,
    )
    (WEIGHT * x).sum().backward()
    close(x.detach(), expected.detach())
    close(sampler.z0.grad, dz0)


def test_2ab_takes_the_previous_prediction_from_either_side():
    """Where the window begins churn may raise a level above the one before it."""
    churn, z0 = {"S_churn": 20.0, "S_max": 40.0}, normal(*SHAPE)
    levels = karras(100)
    first = next(i for i, s in enumerate(levels) if s < churn["S_max"])
    assert levels[first] * math.sqrt(1.2) > levels[first - 1]
    torch.manual_seed(7)
    expected = loop(blobs, 80 * z0, "2ab", 100, **churn)
    torch.manual_seed(7)
    close(Sampler()(blobs, 80 * z0, 100, **churn), expected)


def test_2ab_refuses_two_steps_from_one_level():
    levels = [4.0, 2.0 * math.sqrt(1.2), 2.0, 1.0]
    cfg = SolverConfig(is_multi=True, s_churn=9.0, s_t_max=2.1)
    solve = cosmos.differential_equation_solver(
        blobs, torch.tensor(levels, dtype=torch.float64), cfg
    )
    with pytest.raises(ValueError, match="S_churn must lead two steps to different levels"):
        solve(normal(*SHAPE))


def test_parameters_of_the_model_receive_their_gradient():
    gain = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    z0 = normal(*SHAPE)
    expected = loop(lambda x, s: gain * blobs(x, s), 80 * z0, draw=sincos(z0), S_churn=3.0)
    wanted = torch.autograd.grad((WEIGHT * expected).sum(), gain)
    x = Sampler()(
        lambda x, s: gain * blobs(x, s),
        80 * z0,
        6,
        S_churn=3.0,
        allow_grad=True,
        learnable_step_noise=True,
    )
    close(torch.autograd.grad((WEIGHT * x).sum(), gain)[0], wanted[0])


@pytest.mark.parametrize("option", OPTIONS)
def test_num_steps_counts_evaluations_and_the_last_prediction_is_one_more(option):
    calls = []

    def counting(x, sigma):
        calls.append(sigma[0].item())
        return 0.5 * x

    Sampler()(counting, torch.ones(1, 2, dtype=torch.float64), 7, solver_option=option)
    order = ORDERS.get(option, 2)
    assert len(calls) == 7 // order * order + 1
    assert calls[0] == pytest.approx(80)
    assert calls[-1] == pytest.approx(0.002)


@pytest.mark.parametrize("bound", [80.0, 4.0])
def test_the_window_is_open(bound):
    """A bound that is itself a level leaves that level alone."""
    levels = karras(2, 1.0, 9.0, 2.0)  # 9, 4, 1
    raised = []

    def watching(x, sigma):
        raised.append(sigma[0].item())
        return 0.5 * x

    cfg = SamplerConfig(
        SolverConfig(is_multi=True, s_churn=0.15, s_t_min=4.0, s_t_max=bound),
        SolverTimestampConfig(2, 1.0, 9.0, 2.0),
        sample_clean=False,
    )
    Sampler(cfg)._forward_impl(watching, torch.ones(1, 2))
    assert raised == pytest.approx([9.0 * 1.05 if bound == 80 else 9.0, levels[1]])


def test_levels_are_those_of_the_formula():
    for steps, low, high, rho in ((1, 0.002, 80.0, 7), (5, 0.5, 5.0, 3.0), (35, 0.002, 80.0, 7.0)):
        levels = cosmos.get_rev_ts(low, high, steps, rho)
        assert levels.dtype == torch.float64
        assert levels.tolist() == pytest.approx(karras(steps, low, high, rho), rel=1e-14)
        backwards = cosmos.get_rev_ts(low, high, steps, rho, is_forward=True)
        assert torch.equal(backwards.flip(0), levels)


def test_same_seed_same_result():
    x = 80 * normal(*SHAPE)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn = Sampler()(blobs, x, 6, S_churn=5)
        learned = Sampler()(blobs, x, 6, S_churn=5, learnable_step_noise=True, allow_grad=True)
        runs.append((drawn, learned.detach()))
    assert torch.equal(runs[0][0], runs[1][0])
    assert not torch.equal(runs[0][0], runs[2][0])
    assert torch.equal(runs[0][1], runs[1][1])
    assert torch.equal(runs[0][1], runs[2][1])  # needs no generator


# ------------------------------------------------------------------ the anchor


def test_the_anchor_is_a_leaf_ready_for_an_optimiser():
    sampler, x = Sampler(), 80 * normal(*SHAPE).float()
    out = sampler(blobs, x, 4, allow_grad=True)
    anchor = sampler.z0
    assert anchor.is_leaf
    assert anchor.dtype == torch.float64
    close(anchor.detach(), x.double() / 80, 1e-15)
    assert not x.requires_grad
    (-out.square().mean()).backward()
    before = anchor.detach().clone()
    torch.optim.Adam([anchor], lr=0.01).step()
    changed = (anchor.detach() - before).abs()
    close(changed, torch.full_like(changed, 0.01), 1e-3)  # Adam's first step is lr, up to its eps
    with torch.no_grad():
        sampler(blobs, x, 4)
    assert sampler.z0 is anchor


def test_the_callers_tensor_and_the_anchor_both_get_the_gradient():
    z0 = normal(*SHAPE).requires_grad_()
    x = 80 * z0
    x.retain_grad()
    sampler = Sampler()
    (WEIGHT * sampler(blobs, x, 4, allow_grad=True)).sum().backward()
    assert not sampler.z0.is_leaf
    close(sampler.z0.grad, z0.grad)
    close(80 * x.grad, z0.grad)

    narrow = (80 * z0.detach()).bfloat16().requires_grad_()
    Sampler()(blobs, narrow, 4, allow_grad=True).sum().backward()
    assert narrow.grad.dtype == torch.bfloat16
    assert narrow.grad.any()


def test_an_optimiser_may_go_on_with_the_anchor():
    sampler, x = Sampler(), 80 * normal(*SHAPE)
    out = sampler(blobs, x, 4, allow_grad=True)
    z0 = sampler.z0
    optimiser, sizes = torch.optim.Adam([z0], lr=0.005), []
    for _ in range(4):
        optimiser.zero_grad()
        size = out.square().mean()
        sizes.append(size.item())
        size.backward()
        optimiser.step()
        out = sampler(blobs, 80 * z0, 4, allow_grad=True)
    assert sizes == sorted(sizes, reverse=True)


def test_a_model_with_a_used_sampler_can_be_copied():
    model = torch.nn.Module()
    model.sampler = Sampler(SamplerConfig(allow_grad=True))
    model.sampler(blobs, (80 * normal(*SHAPE)).requires_grad_(), 4)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.sampler.z0 is None
        assert twin.sampler.cfg == model.sampler.cfg
    assert model.sampler.z0 is not None
    assert not model.state_dict()


def test_allow_grad_records_the_graph_under_no_grad():
    x, sampler = 80 * normal(*SHAPE), Sampler()
    with torch.no_grad():
        out = sampler(blobs, x, 4, allow_grad=True)
        assert not torch.is_grad_enabled()
    out.sum().backward()
    assert sampler.z0.grad.any()
    with torch.inference_mode():
        close(sampler(blobs, x, 4), out.detach())
        with pytest.raises(
            ValueError, match=r"allow_grad must be False under torch\.inference_mode"
        ):
            sampler(blobs, x, 4, allow_grad=True)


# ------------------------------------------------------------------ the switches


def outcome(sampler, **arguments):
    """The mode that a call runs in, told by its result."""
    z0, churn = normal(*SHAPE), CHURNS["capped"]
    torch.manual_seed(7)
    x = sampler(blobs, 80 * z0, 4, **churn, **arguments)
    for mode in MODES:
        torch.manual_seed(7)
        expected = loop(blobs, 80 * z0, "2ab", 4, **churn, draw=noise_of(mode, z0))
        if (x - expected).abs().max() < 1e-9:
            return mode
    return None


ROLL = gs.noise.SignedRoll(3)


@pytest.mark.parametrize(
    ("arguments", "config", "env", "mode"),
    [
        ({}, {}, None, "drawn"),
        ({}, {}, "0", "drawn"),
        ({}, {}, "", "drawn"),
        ({}, {}, "1", "sincos"),
        ({"learn_noise": True}, {}, None, "off"),
        ({"learn_noise": True}, {}, "1", "sincos"),
        ({"learn_noise": False}, {}, "1", "drawn"),
        ({"learnable_step_noise": True}, {}, None, "sincos"),
        ({"learnable_step_noise": False}, {}, "1", "drawn"),
        ({"learn_noise": True, "learnable_step_noise": False}, {}, "1", "off"),
        ({}, {"learnable_step_noise": True}, "0", "sincos"),
        ({}, {"learnable_step_noise": False}, "1", "drawn"),
        ({}, {"learn_noise": True, "learnable_step_noise": False}, "1", "off"),
        ({"learnable_step_noise": True}, {"learnable_step_noise": False}, "0", "sincos"),
        ({"learnable_step_noise": False}, {"learnable_step_noise": True}, "1", "drawn"),
        ({"learn_noise": False}, {"learnable_step_noise": True}, None, "drawn"),
        ({"noise": ROLL}, {}, "1", "roll"),
        ({"noise": ROLL}, {"learnable_step_noise": True}, "1", "roll"),
        ({}, {"noise": ROLL}, "1", "roll"),
        ({"learnable_step_noise": True}, {"noise": ROLL}, None, "sincos"),
        ({"learn_noise": True}, {"noise": ROLL}, None, "off"),
        ({"noise": gs.noise.Off()}, {"noise": ROLL}, "1", "off"),
    ],
)
@pytest.mark.parametrize("place", ["sampler", "solver"])
def test_an_argument_precedes_the_configuration_and_that_the_environment(
    monkeypatch, arguments, config, env, mode, place
):
    if env is not None:
        monkeypatch.setenv("LEARNABLE_STEP_NOISE", env)
    cfg = SamplerConfig()
    for name, value in config.items():
        setattr(cfg if place == "sampler" else cfg.solver, name, value)
    assert outcome(Sampler(cfg), **arguments) == mode


def test_gradient_and_memory_come_from_the_configuration_too():
    x = 80 * normal(*SHAPE)
    sampler = Sampler(SamplerConfig(allow_grad=True, memory="store"))
    out = sampler(blobs, x, 4)
    assert out.requires_grad
    assert "Connection" not in repr(out.grad_fn.next_functions)
    assert not sampler(blobs, x, 4, allow_grad=False).requires_grad
    with pytest.raises(ValueError, match="memory must be one of"):
        sampler(blobs, x, 4, memory="nothing")


def test_the_log_says_how_many_noises_were_made(caplog):
    x = 80 * normal(*SHAPE)
    with caplog.at_level(logging.INFO, "gradsampler.integrations.cosmos"):
        Sampler()(blobs, x, 6, S_churn=2, learnable_step_noise=True)
        Sampler()(blobs, x, 6, **CHURNS["window"], learnable_step_noise=True)
        Sampler()(blobs, x, 6, S_churn=2, learn_noise=True)
        Sampler()(blobs, x, 6, S_churn=2)
    inside = sum(0.05 < s < 50 for s in karras(6)[:-1])
    assert 0 < inside < 6
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("INFO", f"Generated {n} learnable step noises from z0 (gradient-preserving)")
        for n in (6, inside)
    ]


@pytest.mark.parametrize(
    "churn",
    [
        {"S_churn": 0.0},
        {"S_churn": 9.0, "S_min": 90.0},
        {"S_churn": 9.0, "S_max": 0.001},
        {"S_churn": 9.0, "S_min": 1.0, "S_max": 0.5},
        {"S_churn": 9.0, "S_noise": 0.0},
    ],
    ids=str,
)
def test_noise_that_would_do_nothing_says_so(churn, caplog):
    z0 = normal(*SHAPE)
    with caplog.at_level(logging.INFO), pytest.warns(UserWarning, match=INERT) as caught:
        x = Sampler()(blobs, 80 * z0, 6, **churn, learnable_step_noise=True)
    assert len(caught) == 1
    assert not caplog.records
    close(x, loop(blobs, 80 * z0, **churn, draw=sincos(z0)))
    Sampler()(blobs, 80 * z0, 6, **churn, learn_noise=True)  # injects nothing by intention
    Sampler()(blobs, 80 * z0, 6, **churn, noise=gs.noise.Off())


def test_noise_may_be_given():
    z0, steps = normal(*SHAPE), 6
    levels = karras(steps)
    inside = [i for i in range(steps) if 0.05 < levels[i] < 50.0]
    tensors = {i: normal(*SHAPE, seed=20 + i).requires_grad_() for i in inside}
    expected = loop(blobs, 80 * z0, **CHURNS["window"], draw=lambda i, count, x: tensors[i])
    wanted = torch.autograd.grad((WEIGHT * expected).sum(), list(tensors.values()))
    x = Sampler()(
        blobs,
        80 * z0,
        steps,
        **CHURNS["window"],
        allow_grad=True,
        noise=gs.noise.Given(list(tensors.values())),
    )
    close(x.detach(), expected.detach())
    for got, want in zip(
        torch.autograd.grad((WEIGHT * x).sum(), list(tensors.values())), wanted, strict=True
    ):
        close(got, want)


# ------------------------------------------------------------------ callbacks


@pytest.mark.parametrize("allow_grad", [False, True])
@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("mode", ["drawn", "roll"])
@pytest.mark.parametrize("option", ["2ab", "2mid", "3kutta_naive"])
def test_callbacks_see_what_cosmoss_see(option, mode, clean, allow_grad):
    z0, seen, told = normal(*SHAPE), [], []
    torch.manual_seed(7)
    expected = loop(
        blobs,
        80 * z0,
        option,
        7,
        **CHURNS["window"],
        draw=noise_of(mode, z0),
        clean=clean,
        seen=seen,
    )
    after = torch.get_rng_state()
    churn = CHURNS["window"]
    cfg = SamplerConfig(
        SolverConfig(
            option == "2ab",
            option,
            option,
            churn["S_churn"],
            churn["S_max"],
            churn["S_min"],
            churn["S_noise"],
        ),
        SolverTimestampConfig(nfe=7),
        sample_clean=clean,
        allow_grad=allow_grad,
        **SWITCHES[mode],
    )
    torch.manual_seed(7)
    others = []
    x = Sampler()._forward_impl(
        blobs,
        80 * z0,
        cfg,
        [lambda **names: told.append(names), lambda i_th, **_: others.append(i_th)],
    )
    close(x.detach(), expected)
    assert torch.equal(torch.get_rng_state(), after)
    assert others == list(range(len(seen)))
    for names, want in zip(told, seen, strict=True):
        assert names["i_th"] == want[0]
        close(names["input_x_B_StateShape"], want[1])
        close(names["output_x_B_StateShape"], want[2])
        assert names["sigma_cur_0"].item() == pytest.approx(want[3], rel=1e-13)
        assert names["sigma_next_0"].item() == pytest.approx(want[4], rel=1e-13)
        close(names["x0_pred_B_StateShape"], want[5])
        del names["i_th"]
        assert all(v.dtype == torch.float64 and not v.requires_grad for v in names.values())


@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("option", ["2ab", "2mid"])
def test_callbacks_come_between_the_steps_and_not_in_backward(option, clean):
    events = []

    def x0_fn(x, sigma):
        events.append("call")
        return 0.5 * x

    cfg = SamplerConfig(
        SolverConfig(option == "2ab", option, option, s_churn=1.0),
        SolverTimestampConfig(nfe=3 * ORDERS.get(option, 2)),
        sample_clean=clean,
        allow_grad=True,
    )
    cfg.memory = "checkpoint"  # makes its calls again
    told = [lambda i_th, **_: events.append(i_th)]
    out = Sampler()._forward_impl(x0_fn, 80 * normal(*SHAPE), cfg, told)
    calls = ["call"] * ORDERS.get(option, 2)
    assert events == [*calls, 0, *calls, 1, *calls, 2, *["call"] * clean]
    events.clear()
    out.sum().backward()
    assert set(events) == {"call"}


def test_an_exception_in_a_callback_ends_the_run():
    def stop(i_th, **_):
        if i_th == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Sampler()(blobs, 80 * normal(*SHAPE), 6, callback_fns=[stop])


# ------------------------------------------------------------------ other entrances


@pytest.mark.parametrize("option", OPTIONS)
def test_the_solver_alone_follows_the_grad_mode(option):
    x = (9 * normal(*SHAPE)).requires_grad_()
    levels = karras(4, 0.3, 9.0)
    cfg = SolverConfig(option == "2ab", option, option, s_churn=1.0)
    torch.manual_seed(7)
    expected = loop(blobs, x, option, S_churn=1.0, S_min=0.05, levels=levels, clean=False)
    (dx,) = torch.autograd.grad((WEIGHT * expected).sum(), x)
    solve = cosmos.differential_equation_solver(
        blobs, torch.tensor(levels, dtype=torch.float64), cfg
    )
    torch.manual_seed(7)
    y = solve(x)
    close(y.detach(), expected.detach())
    close(torch.autograd.grad((WEIGHT * y).sum(), x)[0], dx)
    with torch.no_grad():
        assert not solve(x).requires_grad

    cfg.learnable_step_noise = True
    draw = sincos(x.detach() / 9.0)
    expected = loop(
        blobs, x, option, S_churn=1.0, S_min=0.05, levels=levels, clean=False, draw=draw
    )
    close(solve(x).detach(), expected.detach())


@pytest.mark.parametrize("memory", ["store", "checkpoint"])
def test_the_levels_of_the_solver_alone_may_be_learned(memory):
    x, values = 9 * normal(*SHAPE), karras(4, 0.3, 9.0)
    cfg = SolverConfig(is_multi=True, s_churn=0.3)
    cfg.memory = memory
    levels = torch.tensor(values, dtype=torch.float64, requires_grad=True)

    def loss(values):
        torch.manual_seed(7)
        y = loop(blobs, x, S_churn=0.3, S_min=0.05, levels=values, clean=False)
        return (WEIGHT * y).sum().item()

    torch.manual_seed(7)
    y = cosmos.differential_equation_solver(blobs, levels, cfg)(x)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    (gradient,) = torch.autograd.grad((WEIGHT * y).sum(), levels)
    assert torch.equal(torch.get_rng_state(), before)
    for i, value in enumerate(values):
        h = 1e-5 * value
        up, down = ([*values[:i], value + d, *values[i + 1 :]] for d in (h, -h))
        slope = (loss(up) - loss(down)) / (2 * h)
        assert gradient[i].item() == pytest.approx(slope, rel=1e-6, abs=1e-5)


def test_a_modules_parameters_do_not_set_the_dtype_of_its_calls():
    class Wide(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = torch.nn.Parameter(torch.tensor(0.5))

        def forward(self, x, sigma):
            assert x.dtype == sigma.dtype == torch.float64
            return self.gain * x

    x = 80 * normal(*SHAPE).float()
    assert Sampler()._forward_impl(Wide(), x).dtype == torch.float64


def test_cosmoss_own_configuration_objects_serve():
    """They have the fields of ours but for the added ones, and take those with setattr."""
    solver = SimpleNamespace(
        is_multi=False,
        rk="2heun_edm",
        multistep="2ab",
        s_churn=2.0,
        s_t_max=math.inf,
        s_t_min=0.05,
        s_noise=1.0,
    )
    times = SimpleNamespace(nfe=6, t_min=0.002, t_max=80.0, order=7.0, is_forward=False)
    cfg = SimpleNamespace(solver=solver, timestamps=times, sample_clean=True)
    z0 = normal(*SHAPE)
    torch.manual_seed(7)
    expected = loop(blobs, 80 * z0, "2heun_edm", S_churn=2.0, S_min=0.05)
    torch.manual_seed(7)
    close(Sampler(cfg)._forward_impl(blobs, 80 * z0), expected)
    solver.learnable_step_noise = True
    solver.allow_grad = True
    expected = loop(blobs, 80 * z0, "2heun_edm", S_churn=2.0, S_min=0.05, draw=sincos(z0))
    out = Sampler()._forward_impl(blobs, 80 * z0, cfg)
    assert out.requires_grad
    close(out.detach(), expected)


def test_the_fields_and_arguments_are_cosmoss():
    solver, times, whole = SolverConfig(), SolverTimestampConfig(), SamplerConfig()
    assert list(vars(solver).values()) == [False, "2mid", "2ab", 0.0, math.inf, 0.05, 1.0]
    assert " ".join(vars(solver)) == "is_multi rk multistep s_churn s_t_max s_t_min s_noise"
    assert vars(times) == {
        "nfe": 50,
        "t_min": 0.002,
        "t_max": 80.0,
        "order": 7.0,
        "is_forward": False,
    }
    assert (whole.solver, whole.timestamps, whole.sample_clean) == (solver, times, True)
    x = 70 * normal(*SHAPE)
    torch.manual_seed(7)
    expected = loop(blobs, x, "1euler", 5, 2.0, 0.1, 30.0, 1.1, levels=karras(5, 0.01, 70.0, 5.0))
    torch.manual_seed(7)
    got = Sampler(None)(blobs, x, 5, 0.01, 70, 5, 2, 0.1, 30, 1.1, "1euler")
    close(got, expected)


# ------------------------------------------------------------------ diagnosis and errors


@torch.no_grad()
def under_no_grad(x, sigma):
    return 0.5 * x


@pytest.mark.parametrize("memory", ["store", "checkpoint"])
@pytest.mark.parametrize("denoiser", [under_no_grad, lambda x, sigma: 0.5 * x.detach()])
def test_a_denoiser_that_lets_no_gradient_through_is_diagnosed(denoiser, memory):
    x = 80 * normal(*SHAPE)
    with pytest.warns(gs.GradientWarning, match="detaches at step 0"):
        Sampler()(denoiser, x, 4, allow_grad=True, memory=memory)
    Sampler()(denoiser, x, 4)


X = 80 * normal(*SHAPE)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"solver_option": "2abs"},
            ValueError,
            r"solver_option must be one of 1euler, 2ab, .*'2ab'",
        ),
        ({"solver_option": 2}, TypeError, "solver_option must be one of 1euler, 2ab, 2heun_edm"),
        ({"x_sigma_max": X.long()}, ValueError, "x_sigma_max must have a floating-point dtype"),
        ({"x_sigma_max": [1.0]}, TypeError, "x_sigma_max must be a torch.Tensor, got list"),
        ({"num_steps": 0}, ValueError, r"num_steps \(nfe\) of 2ab must be at least 1, got 0"),
        (
            {"num_steps": 2, "solver_option": "3kutta_naive"},
            ValueError,
            r"num_steps \(nfe\) of 3kutta_naive must be at least 3, got 2",
        ),
        ({"num_steps": 3.0}, TypeError, "num_steps .* must be an int, got float"),
        ({"sigma_min": 0.0}, ValueError, r"sigma_min \(t_min\) must be positive, got 0"),
        ({"sigma_max": 0.001}, ValueError, r"sigma_max .* must be above sigma_min .* = 0.002"),
        ({"rho": 0}, ValueError, r"rho \(ts_order\) must be positive"),
        ({"S_churn": -1}, ValueError, r"S_churn \(s_churn\) must be a finite number of at least"),
        ({"S_noise": "1"}, TypeError, r"S_noise \(s_noise\) must be a real number, got str"),
        ({"allow_grad": 1}, TypeError, "allow_grad must be True, False or None, got int"),
        ({"learn_noise": "yes"}, TypeError, "learn_noise must be True, False or None, got str"),
        ({"noise": "sincos"}, TypeError, "noise must be a gradsampler.noise object or None"),
        (
            {"noise": ROLL, "learnable_step_noise": True},
            ValueError,
            "noise must be None with learn_noise or learnable_step_noise, got SignedRoll",
        ),
        ({"noise": gs.noise.Given([X])}, ValueError, "noise=Given: tensors must hold one tensor"),
        ({"memory": "disk"}, ValueError, "memory must be one of auto, checkpoint"),
    ],
)
def test_bad_arguments_are_named_before_any_model_call(arguments, error, message):
    def never(x, sigma):
        raise AssertionError("the model was called")

    arguments = {"x_sigma_max": X, "num_steps": 6, "S_churn": 3, **arguments}
    with pytest.raises(error, match=message):
        Sampler()(never, **arguments)


def test_bad_configurations_are_named(monkeypatch):
    with pytest.raises(ValueError, match=r"solver.rk must be one of 1euler, 2heun_edm, .*'3kutta'"):
        Sampler(SamplerConfig(SolverConfig(rk="3kutta")))._forward_impl(blobs, X)
    with pytest.raises(ValueError, match=r"solver.multistep must be one of 2ab, got '3ab'"):
        Sampler(SamplerConfig(SolverConfig(True, multistep="3ab")))._forward_impl(blobs, X)
    with pytest.raises(ValueError, match="noise must be None with learn_noise"):
        Sampler(SamplerConfig(noise=ROLL, learn_noise=True))(blobs, X, 4)
    with pytest.raises(TypeError, match=r"x0_fn: the output must be a torch\.Tensor, got tuple"):
        Sampler()(lambda x, sigma: (x,), X, 4)
    for levels in ([1.0], [1.0, 2.0], [1.0, 0.0], [[2.0, 1.0]], [math.nan, 1.0]):
        with pytest.raises(ValueError, match="sigmas_L must hold"):
            cosmos.differential_equation_solver(blobs, torch.tensor(levels), SolverConfig())
    monkeypatch.setenv("LEARNABLE_STEP_NOISE", "yes")
    with pytest.raises(ValueError, match="LEARNABLE_STEP_NOISE must be 0 or 1, got 'yes'"):
        Sampler()(blobs, X, 4)


# ------------------------------------------------------------------ the gradient-flow check


@pytest.mark.parametrize("mode", ["off", "sincos"])
@pytest.mark.parametrize("option", OPTIONS)
def test_the_founding_check_passes_in_both_modes(option, mode):
    """1x2x2x8x8 zeros, the denoiser 0.7x + 0.1, few levels from 5 to 0.5, ascent by Adam."""
    cfg = SamplerConfig(
        SolverConfig(option == "2ab", option, option, s_churn=1.0),
        SolverTimestampConfig(nfe=4 * ORDERS.get(option, 2), t_min=0.5, t_max=5.0, order=3.0),
        sample_clean=False,
        allow_grad=True,
        **SWITCHES[mode],
    )
    sampler = Sampler(cfg)
    x_sigma_max = torch.zeros(1, 2, 2, 8, 8)
    output = sampler._forward_impl(gradient_flow.affine_denoiser, x_sigma_max, cfg)
    assert output.requires_grad
    assert sampler.z0.requires_grad
    loss = output.square().mean()
    (-loss).backward()

    z0 = torch.zeros(1, 2, 2, 8, 8, dtype=torch.float64, requires_grad=True)
    levels = karras(4, 0.5, 5.0, 3.0)
    expected = loop(
        gradient_flow.affine_denoiser,
        5 * z0,
        option,
        S_churn=1.0,
        S_min=0.05,
        draw=noise_of(mode, z0),
        levels=levels,
        clean=False,
    )
    (dz0,) = torch.autograd.grad(-expected.square().mean(), z0)
    close(output.detach(), expected.detach())
    close(sampler.z0.grad, dz0)
    assert dz0.abs().min() > 0
    torch.optim.Adam([sampler.z0], lr=0.01).step()
    moved = sampler._forward_impl(gradient_flow.affine_denoiser, 5 * sampler.z0.detach(), cfg)
    assert moved.square().mean() > loss


@pytest.mark.parametrize("noise", [gs.noise.Off(), gs.noise.SinCos()], ids=["mode 1", "mode 2"])
def test_the_packages_check_runs_through_the_drop_in(monkeypatch, noise):
    used = []

    def through(denoiser, z0, sigmas, *, noise, churn, memory, **_):
        used.append(noise)
        return Sampler()(
            denoiser,
            80 * z0,
            len(sigmas) - 1,
            S_churn=churn.s_churn,
            allow_grad=True,
            learn_noise=True,
            learnable_step_noise=isinstance(noise, gs.noise.SinCos),
            memory=memory,
        )

    monkeypatch.setattr(gradient_flow, "sample", through)
    z0 = torch.zeros(1, 2, 2, 8, 8, requires_grad=True)
    settings = {"noise": noise, "churn": gs.Churn(0.8), "memory": "checkpoint"}
    report = gs.check(gradient_flow.affine_denoiser, z0, gs.schedules.karras(4), **settings)
    assert report.passed, report
    assert len(report.lines) == 6
    assert set(used) == {noise}
    broken = gs.check(under_no_grad, z0, gs.schedules.karras(4), **settings)
    assert not broken.passed
    assert "a denoiser that detaches, at step 0 of 4" in broken.broken


# ------------------------------------------------------------------ documents and the example


def blocks(name):
    text = (ROOT / "docs" / name).read_text()
    return text, re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def test_the_documents_snippets_run():
    text, (old, new, setup, *more) = blocks("cosmos.md")
    (imported,) = ast.parse(old).body
    (replacement,) = ast.parse(new).body
    assert imported.module.endswith("imaginaire.modules.res_sampler")
    assert replacement.module == "gradsampler.integrations.cosmos"
    names = [alias.name for alias in imported.names]
    assert names == [alias.name for alias in replacement.names]
    assert old in setup  # the set-up as it stands, with the line to be changed
    space = {}
    exec(setup.replace(old, new), space)
    torch.manual_seed(0)
    noise = torch.randn(1, 16, 2, 8, 8)
    torch.testing.assert_close(
        space["video"], loop(space["x0_fn"], 80 * noise, num_steps=35), rtol=1e-5, atol=1e-6
    )
    for code in more:
        exec(code, space)
    assert space["z0"].grad.any()
    for option in OPTIONS:
        assert f"`{option}`" in text


def test_what_the_comparison_of_modes_says_is_so():
    text, codes = blocks("seed-mechanisms.md")
    for code in codes:
        exec(code, {})
    rows = re.findall(r"^\| `(\w+)` \|((?: -?[\d.]+ \|){4})$", text, re.MULTILINE)
    modes = {"randn_like": "drawn", "Off": "off", "SinCos": "sincos", "SignedRoll": "roll"}
    assert [modes[name] for name, _ in rows] == MODES
    z0 = normal(64, 1024)
    for name, numbers in rows:
        draw = noise_of(modes[name], z0)
        torch.manual_seed(7)
        n = torch.stack(
            [torch.randn_like(z0) if draw is None else draw(i, 36, z0) for i in range(36)]
        )
        spread = n.std().item()
        got = [(n * z0).mean().item() / (spread * z0.std().item()) if spread else 0.0, spread]
        for churn in (1.0, 5.0):
            x = Sampler()(Gaussian().denoise, 80 * z0, 36, S_churn=churn, **SWITCHES[modes[name]])
            got.append(x.std().item() / Gaussian().std)
        wanted = [float(number) for number in numbers.replace("|", "").split()]
        assert got == pytest.approx(wanted, abs=0.006)


def test_the_example_writes_its_picture(tmp_path, capsys, monkeypatch):
    path = ROOT / "examples" / "cosmos_diverge.py"
    spec = importlib.util.spec_from_file_location("cosmos_diverge", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    picture = tmp_path / "diverge.png"
    arguments = ["cosmos_diverge.py", "--steps=6", "--iterations=3", f"--out={picture}"]
    monkeypatch.setattr(sys, "argv", arguments)
    module.main()
    lines = capsys.readouterr().out.splitlines()
    differences = [
        float(m[1]) for line in lines if (m := re.search(r"difference ([\d.e+-]+)", line))
    ]
    assert len(differences) == 4
    assert differences == sorted(differences)
    assert differences[-1] > 10 * differences[0]
    assert picture.read_bytes().startswith(b"\x89PNG")
