# SPDX-License-Identifier: Apache-2.0
"""Every solver against its published algorithm, written out here as a plain loop over tensors.

The loops know nothing of programs and stages: levels are Python floats, states float64 tensors,
and a loop calls the denoiser where the paper does.
"""

import math
import re
from collections.abc import Callable
from decimal import Decimal, localcontext
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

import gradsampler as gs
import support.loops
from gradsampler import noise as noises
from gradsampler import solvers
from gradsampler.solvers.exponential import phi1, phi2
from support.noises import SOURCES
from support.problems import Mixture, normal
from support.tiers import few, pairs


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Thousands of small operations: a second thread would only be waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Step(NamedTuple):
    """What a step of a loop works with."""

    denoise: Callable[[Tensor, float], Tensor]
    s: float
    t: float
    past: list[tuple[float, Tensor]]  # (level, D) at the start of each earlier step
    draw: Callable[[], Tensor]  # the next noise


def euler(at, x):
    slope = (x - at.denoise(x, at.s)) / at.s
    return x + slope * (at.t - at.s)


def heun(at, x):
    h = at.t - at.s
    first = (x - at.denoise(x, at.s)) / at.s
    if at.t == 0:
        return x + h * first
    ahead = x + h * first
    second = (ahead - at.denoise(ahead, at.t)) / at.t
    return x + h * (first + second) / 2


def midpoint(at, x):
    m = (at.s + at.t) / 2
    half = x + (m - at.s) * (x - at.denoise(x, at.s)) / at.s
    return x + (at.t - at.s) * (half - at.denoise(half, m)) / m


def towards(x, clean, s, t):
    """The step from s to t that is exact for a constant D."""
    return (t * x + (s - t) * clean) / s


def dpmpp_2m(at, x):
    clean = at.denoise(x, at.s)
    used = clean
    if at.past and at.t > 0:
        before, old = at.past[-1]
        r = math.log(before / at.s) / math.log(at.s / at.t)
        used = (1 + 1 / (2 * r)) * clean - old / (2 * r)
    at.past.append((at.s, clean))
    return towards(x, used, at.s, at.t)


def refined(x, s, m, t, clean, at_m):
    """The second-order exponential step of arXiv 2308.02157 with points s and m."""
    h = math.log(s / t)
    c2 = math.log(s / m) / h
    one = math.expm1(-h) / -h
    two = (one - 1) / -h
    return math.exp(-h) * x + h * ((one - two / c2) * clean + two / c2 * at_m)


def res_2ab(at, x):
    clean = at.denoise(x, at.s)
    if at.past and at.t > 0:
        m, at_m = at.past[-1]
        out = refined(x, at.s, m, at.t, clean, at_m)
    else:
        out = towards(x, clean, at.s, at.t)
    at.past.append((at.s, clean))
    return out


def res_2mid(at, x):
    clean = at.denoise(x, at.s)
    if at.t == 0:
        return clean
    m = math.sqrt(at.s * at.t)
    at_m = at.denoise(towards(x, clean, at.s, m), m)
    return refined(x, at.s, m, at.t, clean, at_m)


def res_2mid_stable(at, x):
    clean = at.denoise(x, at.s)
    if at.t == 0:
        return clean
    m = math.sqrt(at.s * at.t)
    return towards(x, at.denoise(towards(x, clean, at.s, m), m), at.s, at.t)


def euler_ancestral(at, x, eta=1.0, s_noise=1.0):
    clean = at.denoise(x, at.s)
    up = min(at.t, eta * math.sqrt(at.t**2 * (at.s**2 - at.t**2) / at.s**2))
    down = math.sqrt(at.t**2 - up**2)
    x = x + (x - clean) / at.s * (down - at.s)
    return x + at.draw() * s_noise * up if up > 0 else x


def dpmpp_2m_sde(at, x, eta=1.0, s_noise=1.0, variant="midpoint"):
    clean = at.denoise(x, at.s)
    if at.t == 0:
        return clean
    h = math.log(at.s / at.t)
    factor = 1 - math.exp(-h - eta * h)
    out = at.t / at.s * math.exp(-eta * h) * x + factor * clean
    if at.past:
        before, old = at.past[-1]
        r = math.log(before / at.s) / h
        weight = factor / 2 if variant == "midpoint" else 1 - factor / (h + eta * h)
        out = out + weight / r * (clean - old)
    at.past.append((at.s, clean))
    if eta > 0:
        out = out + at.draw() * at.t * math.sqrt(1 - math.exp(-2 * eta * h)) * s_noise
    return out


# DDIM and DDPM live in VP coordinates: x_vp = x / sqrt(1 + s^2), abar = 1 / (1 + s^2).


def vp_ddim(x_vp, clean, abar, abar_prev, eta, noise):
    epsilon = (x_vp / math.sqrt(abar) - clean) / math.sqrt(1 / abar - 1)
    sigma = eta * math.sqrt((1 - abar_prev) / (1 - abar)) * math.sqrt(1 - abar / abar_prev)
    mean = math.sqrt(abar_prev) * clean + math.sqrt(1 - abar_prev - sigma**2) * epsilon
    return mean + sigma * noise


def vp_ddpm(x_vp, clean, abar, abar_prev, variance, noise):
    beta = 1 - abar / abar_prev
    mean = (
        beta * math.sqrt(abar_prev) / (1 - abar) * clean
        + (1 - abar_prev) * math.sqrt(1 - beta) / (1 - abar) * x_vp
    )
    posterior = beta * (1 - abar_prev) / (1 - abar)
    return mean + math.sqrt({"fixed_small": posterior, "fixed_large": beta}[variance]) * noise


def in_vp(update, at, x, option, stochastic, s_noise):
    clean = at.denoise(x, at.s)
    abar, abar_prev = 1 / (1 + at.s**2), 1 / (1 + at.t**2)
    noise = s_noise * at.draw() if stochastic and at.t > 0 else 0.0
    if at.t == 0 and update is vp_ddpm:
        return clean
    x_vp = update(x * math.sqrt(abar), clean, abar, abar_prev, option, noise)
    return x_vp / math.sqrt(abar_prev)


def ddim(at, x, eta=0.0, s_noise=1.0):
    return in_vp(vp_ddim, at, x, eta, eta > 0, s_noise)


def ddpm(at, x, variance="fixed_small", s_noise=1.0):
    return in_vp(vp_ddpm, at, x, variance, True, s_noise)


def midpoint_reversible(at, x, eta=0.0, s_noise=1.0):
    """w[i+1] = w[i-1] + e[i-1] + e[i] + c[i] D: x = A w without churn's noise, A is the product of
    the one-step ratios, and e what an interval injects, over A.
    """
    clean = at.denoise(x, at.s)
    up = min(at.t, eta * at.t / at.s * math.sqrt(at.s**2 - at.t**2))
    late = at.draw() * s_noise * up if up > 0 else 0.0
    ratio = math.sqrt(at.t**2 - up**2) / at.s
    if ratio == 0:
        at.past.clear()
        return clean + late
    first = not at.past
    last_ratio, w_before, e_before, a, w = (1.0, 0.0, 0.0, 1.0, x) if first else at.past[-1]
    ahead = a * ratio
    e = x / a - w + late / ahead
    slope = (1 - last_ratio) / a + (1 - ratio) / ahead
    w_ahead = (w if first else w_before + e_before) + e + slope * clean
    at.past.append((ratio, w, e, ahead, w_ahead))
    return ahead * w_ahead


LOOPS = {
    "ddim": ddim,
    "ddpm": ddpm,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "midpoint": midpoint,
    "midpoint_reversible": midpoint_reversible,
    "res_2ab": res_2ab,
    "res_2mid": res_2mid,
    "res_2mid_stable": res_2mid_stable,
}


def run_loop(step, denoise, z0, levels, noise=(), churn=None, **options):
    """The whole run; ``churn`` is (s_churn, s_tmin, s_tmax, s_noise) as k-diffusion has it."""
    supply = iter(noise)
    past = []
    x = z0 * levels[0]
    n = len(levels) - 1
    for s, t in pairwise(levels):
        if churn is not None:
            s_churn, s_tmin, s_tmax, s_noise = churn
            gamma = min(s_churn / n, math.sqrt(2) - 1) if s_tmin <= s <= s_tmax else 0.0
            if gamma > 0:
                hat = s * (1 + gamma)
                x = x + next(supply) * s_noise * math.sqrt(hat**2 - s**2)
                s = hat
        x = step(Step(denoise, s, t, past, lambda: next(supply)), x, **options)
    return x


SHAPE = (3, 2, 3)
MIXTURE = Mixture(6)
Z0 = normal(*SHAPE, seed=1)
NOISES = [normal(*SHAPE, seed=20 + k) for k in range(8)]

LEVELS = {
    "to-sigma_min": [10.0, 4.0, 1.5, 0.9, 0.31, 0.1],
    "to-zero": [10.0, 4.0, 1.5, 0.9, 0.31, 0.0],
    "one-step": [5.0, 1.0],
    "one-step-to-zero": [5.0, 0.0],
}

CHURNS = {
    "no-churn": None,
    "churn": (1.1, 0.0, math.inf, 1.0),
    "churn-capped": (40.0, 0.0, math.inf, 0.7),
    "churn-window-closed-at-both-ends": (1.1, 0.9, 4.0, 1.003),
}

# Options of the stochastic solvers; the bare name stands for the defaults.
STOCHASTIC = {
    "ddim": {},
    "ddim-eta0.5": {"eta": 0.5},
    "ddim-eta1": {"eta": 1.0, "s_noise": 0.8},
    "ddpm": {},
    "ddpm-large": {"variance": "fixed_large"},
    "ddpm-s_noise": {"s_noise": 1.3},
    "dpmpp_2m_sde": {},
    "dpmpp_2m_sde-eta0": {"eta": 0.0},
    "dpmpp_2m_sde-eta0.5": {"eta": 0.5, "s_noise": 0.8},
    "dpmpp_2m_sde-heun": {"variant": "heun"},
    "dpmpp_2m_sde-heun-eta0.5": {"variant": "heun", "eta": 0.5},
    "euler_ancestral": {},
    "euler_ancestral-eta0": {"eta": 0.0},
    "euler_ancestral-eta0.5": {"eta": 0.5, "s_noise": 0.8},
    "euler_ancestral-eta1.7-clamps": {"eta": 1.7},
    "midpoint_reversible-eta0.5": {"eta": 0.5, "s_noise": 0.8},
    "midpoint_reversible-eta1.7-clamps": {"eta": 1.7},
}

DETERMINISTIC = sorted(name for name in LOOPS if not solvers.resolve(name).stochastic)


class Case(NamedTuple):
    """A solver with its options, as the library and as the loops take it."""

    solver: str
    options: dict
    churn: tuple | None = None

    def solve(self):
        cls = type(solvers.resolve(self.solver))
        return cls(**self.options)

    def loop(self, denoise, levels, z0=Z0, noise=NOISES):
        return run_loop(LOOPS[self.solver], denoise, z0, levels, noise, self.churn, **self.options)

    def drawn(self, levels):
        """How many noises the loop takes."""
        count = 0

        def supply():
            nonlocal count
            for x in NOISES:
                count += 1
                yield x

        self.loop(MIXTURE.denoise, levels, noise=supply())
        return count

    def sample(self, denoiser, levels, z0=Z0, noise=NOISES, **kwargs):
        used = noise[: self.drawn(f64(levels).tolist())]
        return gs.sample(
            denoiser,
            z0,
            f64(levels),
            solver=self.solve(),
            churn=None if self.churn is None else gs.Churn(*self.churn),
            noise=noises.Given(used) if used else None,
            **kwargs,
        )


CASES = {
    **{f"{name}-{id_}": Case(name, {}, c) for name in DETERMINISTIC for id_, c in CHURNS.items()},
    **{name: Case(name.partition("-")[0], options) for name, options in STOCHASTIC.items()},
}

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
every_schedule = pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)


def f64(levels):
    return torch.as_tensor(levels, dtype=torch.float64)


def error(got, expected):
    """The largest deviation relative to the largest element."""
    assert got.shape == expected.shape
    return ((got - expected).abs().max() / expected.abs().max()).item()


def noted(denoise, calls):
    """The denoiser, noting down where it was called."""

    def called(x, sigma):
        calls.append((x.detach(), f64(sigma).flatten()[0].item()))
        return denoise(x, sigma)

    return called


def ours(names):
    """The names whose solvers are the library's own, not registered by a test."""
    home = solvers.__name__
    return {name for name in names if type(solvers.resolve(name)).__module__.startswith(home)}


def test_every_solver_has_a_loop():
    assert ours(solvers.names()) == set(LOOPS) | set(support.loops.LOOPS)


@every_schedule
@every_case
def test_agrees_with_the_loop(case, levels):
    calls, loop_calls = [], []
    got = case.sample(noted(MIXTURE.denoise, calls), levels)
    expected = case.loop(noted(MIXTURE.denoise, loop_calls), levels)
    assert error(got, expected) <= 1e-10
    assert len(calls) == len(loop_calls)
    for (x, sigma), (x_loop, sigma_loop) in zip(calls, loop_calls, strict=True):
        assert error(x, x_loop) <= 1e-10
        assert sigma == pytest.approx(sigma_loop, rel=1e-13)


def test_levels_in_a_list_are_taken_to_float64_like_a_tensors():
    levels = LEVELS["to-sigma_min"]
    from_list = gs.sample(MIXTURE.denoise, Z0, levels)
    assert torch.equal(from_list, gs.sample(MIXTURE.denoise, Z0, f64(levels)))


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
@every_case
def test_agrees_whatever_the_denoiser_predicts(case, prediction):
    model = {"epsilon": MIXTURE.epsilon, "v": MIXTURE.v}[prediction]
    got = case.sample(model, LEVELS["to-zero"], prediction=prediction)
    assert error(got, case.loop(MIXTURE.denoise, LEVELS["to-zero"])) <= 1e-10


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=id_) for id_, case in CASES.items() if not case.options]
)
def test_the_defaults_of_a_name_are_those_of_the_loop(case):
    levels = LEVELS["to-zero"]
    used = NOISES[: case.drawn(levels)]
    churn = None if case.churn is None else gs.Churn(*case.churn)
    given = noises.Given(used) if used else None
    got = gs.sample(MIXTURE.denoise, Z0, f64(levels), solver=case.solver, churn=churn, noise=given)
    assert error(got, case.loop(MIXTURE.denoise, levels)) <= 1e-10


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m_sde", "euler_ancestral"])
def test_eta_and_s_noise_reach_the_solver(name):
    case = Case(name, {"eta": 0.5, "s_noise": 0.8})
    levels = LEVELS["to-zero"]
    given = noises.Given(NOISES[:4])
    got = gs.sample(
        MIXTURE.denoise, Z0, f64(levels), solver=name, eta=0.5, s_noise=0.8, noise=given
    )
    assert error(got, case.loop(MIXTURE.denoise, levels)) <= 1e-10


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m_sde", "euler_ancestral", "ddpm"])
def test_without_noise_a_stochastic_solver_drops_its_noise_only(name):
    levels = LEVELS["to-zero"]
    case = Case(name, {} if name == "ddpm" else {"eta": 1.0})
    quiet = [torch.zeros_like(Z0)] * 8
    got = gs.sample(MIXTURE.denoise, Z0, f64(levels), solver=case.solve(), noise=noises.Off())
    assert error(got, case.loop(MIXTURE.denoise, levels, noise=quiet)) <= 1e-10


# In flow time a loop follows the velocity, and D appears nowhere.


def flow_euler(velocity, x, s, t, past):
    return x + (t - s) * velocity(x, s)


def flow_heun(velocity, x, s, t, past):
    first = velocity(x, s)
    ahead = x + (t - s) * first
    return ahead if t == 0 else x + (t - s) / 2 * (first + velocity(ahead, t))


def flow_midpoint_reversible(velocity, x, s, t, past):
    """Two intervals at once with the velocity in between, in x / t."""
    slope = velocity(x, s)
    ahead = x + (t - s) * slope
    if past and t > 0:
        # D / t^2 is minus the derivative of x / t: x / t - x / s = D (1 / t - 1 / s).
        before, x_before = past[-1]
        ahead = t * (x_before / before + (x - s * slope) * (1 / t - 1 / before))
    past.append((s, x))
    return ahead


def flow_midpoint(velocity, x, s, t, past):
    m = (s + t) / 2
    return x + (t - s) * velocity(x + (m - s) * velocity(x, s), m)


FLOW_LOOPS = {
    "euler": flow_euler,
    "heun": flow_heun,
    "midpoint": flow_midpoint,
    "midpoint_reversible": flow_midpoint_reversible,
}
TIMES = {
    "even": [1.0, 0.75, 0.5, 0.25, 0.0],
    "shifted": [1.0, 0.9, 0.75, 0.5, 0.0],
    "to-t_min": [1.0, 0.6, 0.3, 0.05],
}


def test_every_solver_of_flow_time_has_a_loop():
    assert ours(solvers.names(flow=True)) <= set(FLOW_LOOPS) | set(support.loops.LOOPS)


@pytest.mark.parametrize("times", TIMES.values(), ids=TIMES)
@pytest.mark.parametrize("name", FLOW_LOOPS)
def test_agrees_with_the_loop_in_flow_time(name, times):
    x, past = Z0, []
    for s, t in pairwise(times):
        x = FLOW_LOOPS[name](MIXTURE.velocity, x, s, t, past)
    got = gs.sample(MIXTURE.velocity, Z0, f64(times), solver=name, prediction="flow")
    assert error(got, x) <= 1e-10


BETAS = np.linspace(1e-3, 0.2, 100)  # its linear schedule of 100 steps
ABAR = np.cumprod(1 - BETAS)
KEPT = [3, 17, 40, 71, 99]


def vp_network(kind):
    """The mixture as a network of (x_vp, timestep); timesteps must be those that are kept."""

    def network(x_vp, timestep):
        index = timestep.round().long()
        assert (timestep - index).abs().max() < 1e-9
        assert set(index.tolist()) <= set(KEPT)
        abar = torch.from_numpy(ABAR)[index].view(-1, 1, 1)
        a, b = abar.sqrt(), (1 - abar).sqrt()
        clean = MIXTURE.posterior(x_vp, a.flatten(), b.flatten())
        epsilon = (x_vp - a * clean) / b
        return {"x0": clean, "epsilon": epsilon, "v": a * epsilon - b * clean}[kind]

    return network


def vp_loop(update, option, noise, last):
    """guided-diffusion's loop over the kept timesteps, on x_vp, with an epsilon network."""
    network = vp_network("epsilon")
    x = math.sqrt(1 - ABAR[KEPT[-1]]) * Z0
    for k in reversed(range(last, len(KEPT))):
        abar = ABAR[KEPT[k]]
        abar_prev = ABAR[KEPT[k - 1]] if k else 1.0
        epsilon = network(x, torch.full((len(x),), float(KEPT[k]), dtype=torch.float64))
        clean = (x - math.sqrt(1 - abar) * epsilon) / math.sqrt(abar)
        drawn = next(noise) if k else torch.zeros_like(x)
        if k == 0 and update is vp_ddpm:
            option = "fixed_small"  # no noise at timestep 0, where the posterior has no width
        x = update(x, clean, abar, abar_prev, option, drawn)
    return x


VP_CASES = {
    "ddim": ("ddim", vp_ddim, {"eta": 0.0}),
    "ddim-eta0.5": ("ddim", vp_ddim, {"eta": 0.5}),
    "ddim-eta1": ("ddim", vp_ddim, {"eta": 1.0}),
    "ddpm-small": ("ddpm", vp_ddpm, {"variance": "fixed_small"}),
    "ddpm-large": ("ddpm", vp_ddpm, {"variance": "fixed_large"}),
}


@pytest.mark.parametrize("final", few(["zero", "sigma_min"], "zero"))
@pytest.mark.parametrize("kind", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("case", VP_CASES.values(), ids=VP_CASES)
def test_ddim_and_ddpm_are_guided_diffusions(case, kind, final):
    name, update, options = case
    last = 1 if final == "sigma_min" else 0  # stops at the level of the first kept timestep
    (option,) = options.values()
    expected = vp_loop(update, option, iter(NOISES), last)
    levels = [math.sqrt((1 - ABAR[k]) / ABAR[k]) for k in reversed(KEPT)]
    if final == "zero":
        levels.append(0.0)
    count = 0 if option == 0.0 else 4
    got = gs.sample(
        gs.VP(vp_network(kind), torch.from_numpy(ABAR), prediction=kind),
        Z0,
        f64(levels),
        solver=type(solvers.resolve(name))(**options),
        noise=noises.Given(NOISES[:count]) if count else None,
    )
    assert error(got / math.sqrt(1 + levels[-1] ** 2), expected) <= 1e-10


# Its steps work on x0 predictions, raise the level by min(s_churn/(N+1), sqrt(1.2)-1), and end in
# a denoiser call at the last level.


def cosmos_2ab(at, x):
    clean = at.denoise(x, at.s)
    out = (1 - at.t / at.s) * clean + at.t / at.s * x
    if at.past:
        m, at_m = at.past.pop()
        out = refined(x, at.s, m, at.t, clean, at_m)
    at.past.append((at.s, clean))
    return out


COSMOS = {
    "1euler": ("euler", euler),
    "2ab": ("res_2ab", cosmos_2ab),
    "2mid": ("res_2mid", res_2mid),
    "2mid_stable": ("res_2mid_stable", res_2mid_stable),
}


@pytest.mark.parametrize("s_churn", [0.0, 0.5], ids=["no-churn", "churn"])
@pytest.mark.parametrize("option", COSMOS)
def test_agrees_with_cosmos(option, s_churn):
    n, s_min, s_max = 7, 0.3, 40.0
    levels = [
        (80 ** (1 / 7) + i / n * (0.02 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(n + 1)
    ]
    name, step = COSMOS[option]
    eta = min(s_churn / (n + 1), math.sqrt(1.2) - 1)
    supply, past = iter(NOISES), []
    x = levels[0] * Z0
    count = 0
    for s, t in pairwise(levels):
        if s_churn and s_min < s < s_max:
            hat = s + eta * s
            x = x + math.sqrt(hat**2 - s**2) * 1.003 * next(supply)
            s = hat
            count += 1
        x = step(Step(MIXTURE.denoise, s, t, past, None), x)
    expected = MIXTURE.denoise(x, levels[-1])
    assert 0 < count < n or not s_churn
    got = gs.sample(
        MIXTURE.denoise,
        Z0,
        gs.schedules.karras(n, sigma_min=0.02, sigma_max=80.0),
        solver=name,
        churn=gs.Churn(eta * n, s_min, s_max, 1.003) if s_churn else None,
        noise=noises.Given(NOISES[:count]) if count else None,
        final_denoise=True,
    )
    assert error(got, expected) <= 1e-10


# One element with D(x) = (x + 1)/2 from z0 = 1. Each row's comment is the whole calculation.


@pytest.mark.parametrize(
    ("solver", "levels", "noise", "expected"),
    [
        # x=4: D=5/2, slope 3/8, x=13/4; D=17/8, slope 9/16, x=43/16; D=59/32
        pytest.param("euler", [4, 2, 1, 0], None, 59 / 32, id="euler"),
        # x=4: slope 3/8; ahead 13/4, slope 9/16; x = 4 - 2*(15/32)
        pytest.param("heun", [4, 2], None, 49 / 16, id="heun"),
        # x=4: slope 3/8, ahead 5/2: Euler to level 0
        pytest.param("heun", [4, 0], None, 5 / 2, id="heun-to-zero"),
        # x=4: slope 3/8, half 29/8: D=37/16, slope (21/16)/3 = 7/16; x = 4 - 7/8
        pytest.param("midpoint", [4, 2], None, 25 / 8, id="midpoint"),
        # x=4: slope 3/8, half 13/4: D=17/8, slope 9/16; x = 4 - 9/4
        pytest.param("midpoint", [4, 0], None, 7 / 4, id="midpoint-to-zero"),
        # x=5: D=3, slope 2/5; up = 3/5*4 = 12/5, down = 9/5; x = 5 - 16/5*2/5 + 12/5*2
        pytest.param("euler_ancestral", [5, 3], 2.0, 213 / 25, id="euler_ancestral"),
        # the same, then at x=213/25: D=119/25, and level 0 takes no noise
        pytest.param("euler_ancestral", [5, 3, 0], 2.0, 119 / 25, id="euler_ancestral-to-zero"),
        # x=5: D=3, epsilon 2/5; x = 3 + 3*2/5
        pytest.param("ddim", [5, 3], None, 21 / 5, id="ddim"),
        # up = 3/5*4 = 12/5, along = sqrt(9 - 144/25) = 9/5; x = 3 + 9/5*2/5 + 12/5*2
        pytest.param(solvers.DDIM(eta=1.0), [5, 3], 2.0, 213 / 25, id="ddim-eta1"),
        # x=5: D=3; mean = 3 + 9/25*2, variance 16*9/25; x = 93/25 + 12/5*2
        pytest.param("ddpm", [5, 3], 2.0, 213 / 25, id="ddpm"),
    ],
)
def test_numbers_worked_by_hand(solver, levels, noise, expected):
    z0 = torch.ones(1, 1, dtype=torch.float64)
    given = None if noise is None else noises.Given([noise * z0])
    got = gs.sample(
        lambda x, sigma: (x + 1) / 2, z0, [float(s) for s in levels], solver=solver, noise=given
    )
    assert got.item() == pytest.approx(expected, rel=1e-15)


SIZES = [1e-8, 1e-6, 1e-4, 1e-2, 0.1, 0.3, 0.4999, 0.5, 0.5001, 0.7, 1.0, 2.0, 5.0, 10.0]


def exact_phis(z):
    """phi1, phi2 and their derivatives at the float z, in 80 digits."""
    with localcontext() as context:
        context.prec = 80
        z = Decimal(z)
        one = (z.exp() - 1) / z
        two = (one - 1) / z
        slope = (z.exp() - one) / z  # from z*phi1 = e^z - 1
        return one, two, slope, (slope - two) / z  # from z*phi2 = phi1 - 1


@pytest.mark.parametrize("sign", [-1, 1], ids=["negative", "positive"])
@pytest.mark.parametrize("size", SIZES)
def test_phi_functions(size, sign):
    z = torch.tensor(sign * size, dtype=torch.float64, requires_grad=True)
    one, two, slope_one, slope_two = (float(x) for x in exact_phis(z.item()))
    for phi, value, slope in [(phi1, one, slope_one), (phi2, two, slope_two)]:
        got = phi(z)
        assert got.item() == pytest.approx(value, rel=1e-12, abs=0)
        (derivative,) = torch.autograd.grad(got, z)
        assert derivative.item() == pytest.approx(slope, rel=1e-12, abs=0)


def test_phi_functions_at_zero():
    z = torch.zeros((), dtype=torch.float64, requires_grad=True)
    for phi, value, slope in [(phi1, 1, 1 / 2), (phi2, 1 / 2, 1 / 6)]:
        got = phi(z)
        assert got.item() == value
        assert torch.autograd.grad(got, z)[0].item() == pytest.approx(slope, rel=1e-15)


WEIGHTS = normal(*SHAPE, seed=5)
MEMORIES = ["checkpoint", "store"]


def central_differences(loss, levels):
    """d loss / d level for every level that may move, which a final 0 may not."""
    slopes = []
    for k, s in enumerate(levels):
        if s == 0:
            continue
        values = []
        for sign in (1, -1):
            moved = list(levels)
            moved[k] = s + sign * 1e-5 * s
            values.append(loss(moved))
        slopes.append((values[0] - values[1]) / (2e-5 * s))
    return torch.tensor(slopes, dtype=torch.float64)


@pairs(name=CASES, end=["to-sigma_min", "to-zero"])
def test_gradient_to_the_levels_is_the_loops_difference_quotient(name, end):
    case, levels = CASES[name], LEVELS[end]
    # The ends of a window count as levels would cross them: move them off the levels.
    if case.churn and case.churn[2] == 4.0:
        case = case._replace(churn=(1.1, 0.8, 5.0, 1.003))

    def loop(moved):
        return (case.loop(MIXTURE.denoise, moved) * WEIGHTS).sum().item()

    expected = central_differences(loop, levels)
    for memory in MEMORIES:
        sigmas = f64(levels).requires_grad_()
        loss = (case.sample(MIXTURE.denoise, sigmas, memory=memory) * WEIGHTS).sum()
        (got,) = torch.autograd.grad(loss, sigmas)
        assert torch.isfinite(got).all(), memory
        assert error(got[: len(expected)], expected) <= 1e-7, memory


@pytest.mark.parametrize("memory", MEMORIES)
@every_case
def test_gradients_to_z0_and_to_each_noise_are_those_of_the_loop(case, memory):
    levels = LEVELS["to-zero"]
    count = case.drawn(levels)

    def gradients(run):
        z0 = Z0.clone().requires_grad_()
        noise = [x.clone().requires_grad_() for x in NOISES]
        loss = (run(z0, noise) * WEIGHTS).sum()
        return torch.autograd.grad(loss, [z0, *noise[:count]])

    got = gradients(
        lambda z0, noise: case.sample(MIXTURE.denoise, levels, z0, noise, memory=memory)
    )
    expected = gradients(lambda z0, noise: case.loop(MIXTURE.denoise, levels, z0, noise))
    for x, y in zip(got, expected, strict=True):
        assert error(x, y) <= 1e-10


WRAPPED = {
    "epsilon": (MIXTURE.epsilon, "epsilon"),
    "v": (MIXTURE.v, "v"),
    "EDM": (gs.EDM(lambda x, c: torch.tanh(x) * torch.cos(c).view(-1, 1, 1)), "x0"),
    "VP": (
        gs.VP(
            lambda x, t: torch.tanh(x) * torch.cos(t / 30).view(-1, 1, 1), torch.from_numpy(ABAR)
        ),
        "x0",
    ),
    "Flow": (gs.Flow(lambda x, t: torch.tanh(x) * torch.cos(t).view(-1, 1, 1)), "x0"),
    "Guided": (
        gs.Guided(
            lambda x, s, shift=0.0: torch.tanh(x + s.view(-1, 1, 1) - shift), 2.5, {"shift": 1.0}
        ),
        "x0",
    ),
}


@pairs(
    wrapped=WRAPPED,
    solver=["heun", "dpmpp_2m", "euler_ancestral"],
    end=["to-sigma_min", "to-zero"],
)
def test_gradient_to_the_levels_through_every_wrapper(wrapped, solver, end):
    denoiser, prediction = WRAPPED[wrapped]
    levels = LEVELS[end]
    count = sum(t > 0 for t in levels[1:]) if solver == "euler_ancestral" else 0

    def loss(sigmas, memory="store"):
        noise = noises.Given(NOISES[:count]) if count else None
        x = gs.sample(
            denoiser, Z0, sigmas, solver=solver, prediction=prediction, noise=noise, memory=memory
        )
        return (x * WEIGHTS).sum()

    with torch.no_grad():
        expected = central_differences(lambda moved: loss(f64(moved)).item(), levels)
    for memory in MEMORIES:
        sigmas = f64(levels).requires_grad_()
        (got,) = torch.autograd.grad(loss(sigmas, memory), sigmas)
        assert torch.isfinite(got).all(), memory
        assert error(got[: len(expected)], expected) <= 1e-7, memory


@pytest.mark.parametrize("name", FLOW_LOOPS)
def test_gradient_to_the_flow_times(name):
    def loss(times):
        x = gs.sample(MIXTURE.velocity, Z0, f64(times), solver=name, prediction="flow")
        return (x * WEIGHTS).sum()

    levels = [0.9, 0.6, 0.3, 0.0]
    times = torch.tensor(levels, dtype=torch.float64, requires_grad=True)
    (got,) = torch.autograd.grad(loss(times), times)
    assert torch.isfinite(got).all()
    expected = central_differences(lambda moved: loss(moved).item(), levels)
    assert error(got[: len(expected)], expected) <= 1e-7


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("name", sorted(LOOPS))
def test_gradient_to_the_levels_of_a_denoiser_that_does_not_look_at_them(name, memory):
    def blind(x, sigma):
        return torch.tanh(x) + 0.1 * x

    case, levels = Case(name, {}), LEVELS["to-zero"]
    sigmas = f64(levels).requires_grad_()
    loss = (case.sample(blind, sigmas, memory=memory) * WEIGHTS).sum()
    (got,) = torch.autograd.grad(loss, sigmas)

    def loop(moved):
        return (case.loop(blind, moved) * WEIGHTS).sum().item()

    expected = central_differences(loop, levels)
    assert error(got[: len(expected)], expected) <= 1e-7


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("prediction", ["x0", "epsilon"])
@pytest.mark.parametrize("name", sorted(LOOPS))
def test_gradient_passes_by_a_call_that_detaches(name, prediction, memory):
    """Where one model call loses the gradient, that of the others is still the loop's."""
    case = Case(name, {})
    levels = LEVELS["to-sigma_min"]

    def detaching(model):
        def denoise(x, sigma):
            lost = float(torch.as_tensor(sigma).flatten()[0]) < 2.0
            return model(x.detach() if lost else x, sigma)

        return denoise

    def clean(x, sigma):
        if prediction == "x0":
            return detaching(MIXTURE.denoise)(x, sigma)
        return x - sigma * detaching(MIXTURE.epsilon)(x, sigma)

    model = MIXTURE.denoise if prediction == "x0" else MIXTURE.epsilon
    z0 = Z0.clone().requires_grad_()
    with pytest.warns(gs.GradientWarning):
        x = case.sample(detaching(model), levels, z0, prediction=prediction, memory=memory)
    (got,) = torch.autograd.grad((x * WEIGHTS).sum(), z0)
    x = case.loop(clean, levels, z0)
    (expected,) = torch.autograd.grad((x * WEIGHTS).sum(), z0)
    assert error(got, expected) <= 1e-10


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("kind", SOURCES)
@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_2m_sde", "heun-churn"])
def test_gradient_of_a_run_with_drawn_noise_is_the_loops(name, kind, memory):
    """Also where the backward pass draws the noise again instead of having kept it."""
    case, source = CASES[name], SOURCES[kind]
    levels = LEVELS["to-zero"]
    z0 = Z0.clone().requires_grad_()
    churn = None if case.churn is None else gs.Churn(*case.churn)
    x = gs.sample(
        MIXTURE.denoise,
        z0,
        f64(levels),
        solver=case.solve(),
        churn=churn,
        noise=source,
        memory=memory,
    )
    (got,) = torch.autograd.grad((x * WEIGHTS).sum(), z0)
    drawn = [source.at(z0, i, len(levels) - 1) for i in range(len(levels) - 1)]
    expected_x = case.loop(MIXTURE.denoise, levels, z0, drawn)
    (expected,) = torch.autograd.grad((expected_x * WEIGHTS).sum(), z0)
    assert error(x, expected_x) <= 1e-10
    assert error(got, expected) <= 1e-10


@pytest.mark.parametrize("prediction", ["x0", "epsilon"])
@pytest.mark.parametrize("name", ["euler", "heun", "res_2ab", "dpmpp_2m_sde"])
def test_final_denoising_is_one_more_call_at_the_last_level(name, prediction):
    case = Case(name, {})
    levels = LEVELS["to-sigma_min"]
    model = MIXTURE.denoise if prediction == "x0" else MIXTURE.epsilon
    calls, told = [], []
    got = case.sample(
        noted(model, calls),
        levels,
        prediction=prediction,
        final_denoise=True,
        callback=told.append,
    )
    theirs = []
    x = case.loop(noted(MIXTURE.denoise, theirs), levels)
    assert error(got, MIXTURE.denoise(x, levels[-1])) <= 1e-10
    assert len(calls) == len(theirs) + 1
    assert calls[-1][1] == levels[-1]
    assert error(calls[-1][0], x) <= 1e-10
    assert [info.step for info in told] == list(range(len(levels) - 1))


def test_final_denoising_carries_the_gradient_to_the_last_level():
    levels = LEVELS["to-sigma_min"]
    sigmas = torch.tensor(levels, dtype=torch.float64, requires_grad=True)
    x = gs.sample(MIXTURE.denoise, Z0, sigmas, solver="heun", final_denoise=True)
    (got,) = torch.autograd.grad((x * WEIGHTS).sum(), sigmas)

    def loop(moved):
        x = Case("heun", {}).loop(MIXTURE.denoise, moved)
        return (MIXTURE.denoise(x, moved[-1]) * WEIGHTS).sum().item()

    assert error(got, central_differences(loop, levels)) <= 1e-7


@every_case
def test_the_callback_is_told_state_level_and_prediction_of_each_step(case):
    levels = LEVELS["to-zero"]
    told, calls = [], []
    case.sample(MIXTURE.epsilon, levels, prediction="epsilon", callback=told.append)
    case.loop(noted(MIXTURE.denoise, calls), levels)
    assert [info.step for info in told] == list(range(5))
    assert {info.num_steps for info in told} == {5}
    firsts = [calls[k] for k in step_starts(case, levels)]
    for info, (x, sigma) in zip(told, firsts, strict=True):
        assert info.sigma == pytest.approx(sigma, rel=1e-13)
        assert error(info.x, x) <= 1e-10
        assert error(info.denoised, MIXTURE.denoise(x, sigma)) <= 1e-10
        assert not info.x.requires_grad


def step_starts(case, levels):
    """Positions among the loop's model calls of each step's first."""
    starts, count = [], 0
    for _, t in pairwise(levels):
        starts.append(count)
        second = case.solver in ("midpoint",) or (
            case.solver in ("heun", "res_2mid", "res_2mid_stable") and t > 0
        )
        count += 1 + second
    return starts


def test_a_solver_object_and_its_name_are_the_same_run():
    levels = LEVELS["to-zero"]
    by_name = gs.sample(MIXTURE.denoise, Z0, levels, solver="res_2ab")
    by_object = gs.sample(MIXTURE.denoise, Z0, levels, solver=solvers.Res2AB())
    assert torch.equal(by_name, by_object)


@pytest.mark.parametrize(
    ("solver", "options", "message"),
    [
        ("euler", {"eta": 1.0}, "eta must be left at its default, as Euler has no eta, got 1.0"),
        ("heun", {"s_noise": 0.5}, "s_noise must be left at its default, as Heun has no s_noise"),
        ("huen", {}, "did you mean 'heun'?"),
        ("ddim", {"eta": 1.5}, "ddim: eta must be at most 1, got 1.5"),
        ("euler_ancestral", {"eta": -0.1}, "euler_ancestral: eta must be a finite number"),
        ("dpmpp_2m_sde", {"s_noise": math.nan}, "dpmpp_2m_sde: s_noise must be a finite number"),
        ("ddim", {"churn": gs.Churn(1.0)}, "churn must be None with DDIM"),
    ],
)
def test_what_does_not_fit_a_solver_is_refused_before_any_call(solver, options, message):
    calls = []
    with pytest.raises(ValueError, match=re.escape(message)):
        gs.sample(noted(MIXTURE.denoise, calls), Z0, [2.0, 1.0], solver=solver, **options)
    assert not calls


def test_a_solver_without_a_flow_form_is_refused_in_flow_time():
    for solver in (solvers.DDPM("fixed_large"), solvers.MidpointReversible(eta=0.5)):
        with pytest.raises(ValueError, match="solver must be defined in flow time"):
            gs.sample(MIXTURE.velocity, Z0, TIMES["even"], solver=solver, prediction="flow")
