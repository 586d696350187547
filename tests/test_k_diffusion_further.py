# SPDX-License-Identifier: Apache-2.0
"""The drop-in's samplers beyond k-diffusion's own: ComfyUI's, the web UI's, and log-likelihoods.

The methods are held against loops from the papers elsewhere; here it is that each name stands for
its method, with its arguments, its noises in order and what a noise sampler is asked for.
"""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch

import gradsampler as gs
import gradsampler.integrations.k_diffusion as K
from gradsampler import noise as noises
from gradsampler import solvers
from gradsampler.integrations.k_diffusion.restart import restarted
from gradsampler.memory.planning.gauge import Live
from support.problems import Gaussian, Mixture, normal
from support.tiers import few

MIXTURE = Mixture(6)
GAUSSIAN = Gaussian(0.3, 0.5)
Z0 = normal(2, 2, 3, seed=1)
WEIGHTS = normal(2, 2, 3, seed=5)
NOISES = [normal(2, 2, 3, seed=20 + k) for k in range(40)]
SIGMAS = torch.tensor([8.0, 3.0, 1.4, 0.6, 0.2, 0.0], dtype=torch.float64)
AMOUNTS = {"eta": 0.6, "s_noise": 0.9}


def square_ratio(rho):
    return rho * rho


# Name in the drop-in, its options, and the solver.
CASES = [
    ("heunpp2", {}, solvers.HeunPP2()),
    ("ddpm", {}, solvers.DDPM()),
    ("lcm", {"s_noise": 0.9}, solvers.Consistency(s_noise=0.9)),
    ("ipndm", {"max_order": 3}, solvers.IPNDM(order=3)),
    ("ipndm_v", {}, solvers.IPNDMv()),
    ("deis", {"max_order": 2}, solvers.DEIS(order=2)),
    ("deis", {"deis_mode": "rhoab"}, solvers.DEIS(variable="rho")),
    ("res_multistep", {}, solvers.ResMultistep(eta=0.0)),
    ("res_multistep_ancestral", AMOUNTS, solvers.ResMultistep(**AMOUNTS)),
    ("gradient_estimation", {"ge_gamma": 1.5}, solvers.GradientEstimation(gamma=1.5)),
    ("er_sde", {"s_noise": 0.9, "max_stage": 2}, solvers.ERSDE(order=2, s_noise=0.9)),
    ("er_sde", {"noise_scaler": square_ratio}, solvers.ERSDE(phi=square_ratio)),
    ("seeds_2", {**AMOUNTS, "r": 0.4}, solvers.Seeds2(**AMOUNTS, r=0.4)),
    ("seeds_3", AMOUNTS, solvers.Seeds3(**AMOUNTS)),
    ("dpmpp_2m_sde_heun", AMOUNTS, solvers.DPMpp2MSDE(**AMOUNTS, variant="heun")),
]
GUIDED = [
    ("euler_cfg_pp", {}, solvers.EulerCFGpp()),
    ("euler_ancestral_cfg_pp", AMOUNTS, solvers.EulerCFGpp(**AMOUNTS)),
    ("dpmpp_2m_cfg_pp", {}, solvers.DPMpp2MCFGpp()),
    ("dpmpp_2s_ancestral_cfg_pp", AMOUNTS, solvers.DPMpp2SAncestralCFGpp(**AMOUNTS)),
    ("gradient_estimation_cfg_pp", {}, solvers.GradientEstimationCFGpp()),
    ("gradient_estimation", {"cfg_pp": True}, solvers.GradientEstimationCFGpp()),
    ("res_multistep_cfg_pp", {}, solvers.ResMultistepCFGpp(eta=0.0)),
    ("res_multistep_ancestral_cfg_pp", AMOUNTS, solvers.ResMultistepCFGpp(**AMOUNTS)),
]


def guided():
    def network(x, sigma, shift):
        return MIXTURE.denoise(x - shift, sigma)

    return gs.Guided(network, 1.7, {"shift": 0.0})


def gradients(x, *wanted):
    return torch.autograd.grad((x * WEIGHTS).sum(), wanted)


@pytest.mark.parametrize(
    ("name", "options", "solver"),
    CASES + GUIDED,
    ids=[f"{name}-{list(options)}" for name, options, _ in CASES + GUIDED],
)
def test_a_name_stands_for_its_method(name, options, solver):
    plain = (name, options, solver) in CASES
    model, cond = (MIXTURE.denoise, {}) if plain else (guided(), {"shift": 0.2})
    x, sigmas = (8 * Z0).requires_grad_(), SIGMAS.clone().requires_grad_()
    program = solver.program(SIGMAS, model, started=True)
    given = noises.Given(NOISES[: len(program.noises)]) if program.noises else None
    expected = gs.sample(model, Z0, sigmas, start=x, solver=solver, noise=given, cond=cond)
    supply, more = iter(NOISES), {}
    if program.noises:
        more = {"noise_sampler": lambda sigma, sigma_next: next(supply)}
    got = getattr(K, f"sample_{name}")(model, x, sigmas, cond, **options, **more)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for one, other in zip(gradients(got, x, sigmas), gradients(expected, x, sigmas), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name, *_ in GUIDED])
def test_cfg_pp_asks_for_guidance(name):
    function = partial(getattr(K, f"sample_{name}"), MIXTURE.denoise, 8 * Z0, SIGMAS)
    with pytest.raises(ValueError, match=r"model must be a gradsampler\.Guided"):
        function(**({"cfg_pp": True} if name == "gradient_estimation" else {}))


def test_a_method_in_two_stages_asks_for_the_noise_between_them():
    """SEEDS-3 at the thirds of a step in log sigma: from each to the next."""
    asked = []

    def sampler(sigma, sigma_next):
        asked.append((sigma.item(), sigma_next.item()))
        return NOISES[len(asked)]

    K.sample_seeds_3(MIXTURE.denoise, 8 * Z0, SIGMAS[:2], noise_sampler=sampler)
    levels = [8.0, 8.0 ** (2 / 3) * 3.0 ** (1 / 3), 8.0 ** (1 / 3) * 3.0 ** (2 / 3), 3.0]
    assert asked == [(pytest.approx(s), pytest.approx(t)) for s, t in pairwise(levels)]


# Restart.


def restart_loop(x, steps, model):
    """Heun's steps down the pairs of levels, with noise where one begins above the last."""
    supply, last = iter(NOISES), math.inf
    for s, t in steps:
        if last < s:
            x = x + next(supply) * 0.9 * (s**2 - last**2) ** 0.5
        d = (x - model(x, s)) / s
        ahead = x + (t - s) * d
        if t > 0:
            ahead = x + (t - s) * (d + (ahead - model(ahead, t)) / t) / 2
        x, last = ahead, t
    return x


def test_restart_against_a_loop():
    """From 0.6 twice up to 3 again, down over 3 levels even in sigma^(1/7)."""
    middle = ((3 ** (1 / 7) + 0.6 ** (1 / 7)) / 2) ** 7
    down = [(3.0, middle), (middle, 0.6)]
    steps = [*pairwise([8.0, 3.0, 1.4, 0.6]), *down, *down, (0.6, 0.2), (0.2, 0.0)]
    x = (8 * Z0).requires_grad_()
    expected = restart_loop(x, steps, MIXTURE.denoise)
    supply, told = iter(NOISES), []
    got = K.restart_sampler(
        MIXTURE.denoise,
        x,
        SIGMAS,
        callback=told.append,
        s_noise=0.9,
        restart_list={0.55: [3, 2, 2.9]},
        noise_sampler=lambda s, t: next(supply),
    )
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)  # the ramp is float32
    for one, other in zip(gradients(got, x), gradients(expected, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert [info["i"] for info in told] == list(range(len(steps)))
    for info, (s, t) in zip(told, steps, strict=True):
        assert info["sigma_hat"].item() == pytest.approx(s, rel=1e-6)
        assert info["sigma"].item() == pytest.approx(t, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(
    ("steps", "count", "restarts"), [(12, 12, 0), (20, 11, 1), (35, 26, 1), (40, 20, 2)]
)
def test_the_web_ui_chooses_by_the_number_of_steps(steps, count, restarts):
    """From 20 on nine of them go to a restart, from 36 on a half goes to two."""
    sigmas = K.sampling.get_sigmas_karras(steps, 0.03, 14.6)
    levels = restarted(sigmas, None)
    ups = (levels[1:] > levels[:-1]).sum().item()
    again = {0: 0, 1: 9, 2: steps // 4}[restarts]
    assert ups == restarts
    assert len(levels) - 1 - ups == count + restarts * again == steps
    assert (levels[0], levels[-1]) == (sigmas[0], 0)
    x = K.restart_sampler(GAUSSIAN.denoise, 14.6 * Z0, sigmas)
    assert torch.isfinite(x).all()


# Log-likelihood.


@pytest.fixture
def torchdiffeq():
    return pytest.importorskip("torchdiffeq")


@pytest.mark.parametrize("memory", few(["store", "checkpoint"], "store"))
def test_the_likelihood_of_gaussian_data(torchdiffeq, memory):
    """Its Jacobian is diagonal, for which Hutchinson's estimate is exact; so is the gradient."""
    x = (0.3 + 0.5 * normal(3, 2, 2, seed=4)).requires_grad_()
    std = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)

    def denoise(x, sigma, mean):
        square = sigma.view(-1, 1, 1) ** 2
        return (std**2 * x + square * mean) / (std**2 + square)

    mean = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    found, info = K.log_likelihood(denoise, x, 0.1, 80.0, {"mean": mean}, 1e-9, 1e-9, memory=memory)
    variance = std**2 + 0.1**2
    # At level 80 x is taken for noise of that level, and is N(mean, std^2 + 80^2).
    noise = mean + (x - mean) * ((std**2 + 80.0**2) / variance) ** 0.5
    growth = 2 * torch.log((std**2 + 80.0**2) / variance)
    prior = (-0.5 * (noise / 80) ** 2 - math.log(80 * math.sqrt(2 * math.pi))).sum((1, 2))
    expected = prior + growth
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    exact = torch.distributions.Normal(mean, variance**0.5).log_prob(x).sum((1, 2))
    torch.testing.assert_close(found, exact, rtol=0, atol=0.05)  # 0.3 is not 0, at level 80
    assert info["fevals"] > 20
    for one, other in zip(
        torch.autograd.grad(found.sum(), [x, std, mean]),
        torch.autograd.grad(expected.sum(), [x, std, mean]),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("memory", "dtype"),
    few(
        [(m, d) for m in ("checkpoint", "revolve:2") for d in (torch.float64, torch.float32)],
        ("checkpoint", torch.float32),
    ),
)
def test_a_likelihood_in_bounded_memory(torchdiffeq, memory, dtype):
    """As that of plain autograd through torchdiffeq's steps, which keeps all evaluations. Its
    gradient has a share of the choice of the first step as well, of the size of its tolerance.
    """
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    network.to(dtype)
    shift = torch.ones(4, dtype=dtype, requires_grad=True)

    def denoise(x, sigma, shift):
        return network(x / (1 + sigma[:, None] ** 2).sqrt()) * shift

    def found(memory):
        x = normal(3, 4, seed=4).to(dtype).requires_grad_()
        torch.manual_seed(1)
        result, info = K.log_likelihood(denoise, x, 0.1, 10.0, {"shift": shift}, memory=memory)
        named = [x, shift, *network.parameters()]
        return result, info["fevals"], torch.autograd.grad(result.sum(), named, allow_unused=True)

    whole, count, wanted = found("store")
    ours, more, gradients = found(memory)
    assert ours.dtype == dtype
    assert more > count
    rtol = 1e-9 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(ours, whole, rtol=rtol, atol=rtol)
    for a, b in zip(gradients, wanted, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.norm().item())


@pytest.mark.thorough
def test_a_likelihood_keeps_one_step(torchdiffeq):
    x = normal(64, 32, seed=4).requires_grad_()

    def peak(memory):
        with Live() as counter:
            result, _ = K.log_likelihood(GAUSSIAN.denoise, x, 0.1, 80.0, memory=memory)
            torch.autograd.grad(result.sum(), x)
            return counter.peak

    assert peak("checkpoint") < 0.5 * peak("store")


def test_ends_of_a_likelihood_that_learn_need_store(torchdiffeq):
    end = torch.tensor(0.1, requires_grad=True)
    with pytest.raises(ValueError, match="memory must be 'store' for ends that require a gradient"):
        K.log_likelihood(GAUSSIAN.denoise, normal(2, 3), end, 20.0, memory="checkpoint")


def test_a_likelihood_without_gradient(torchdiffeq):
    x = normal(2, 3).requires_grad_()
    with torch.no_grad():
        found, _ = K.log_likelihood(GAUSSIAN.denoise, x, 0.1, 20.0)
    assert found.shape == (2,)
    assert not found.requires_grad


def test_without_torchdiffeq_the_message_names_the_way_out(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match="pip install torchdiffeq"):
        K.log_likelihood(GAUSSIAN.denoise, normal(2, 3), 0.1, 20.0)
