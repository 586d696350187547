# SPDX-License-Identifier: Apache-2.0
"""The guided-diffusion drop-in against upstream's arithmetic, written out as plain loops.

The oracle keeps its tables as Python floats and computes each step the long way, in float64;
nothing of it comes from the package.
"""

import enum
import inspect
import math
import re
import sys
import types
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import gradsampler as gs
from gradsampler.integrations import guided_diffusion as gd
from gradsampler.integrations.guided_diffusion import GaussianDiffusion, GuidanceWarning
from gradsampler.iteration import iterate
from support.problems import Mixture, normal

MEANS = ("epsilon", "x0", "previous_x")
VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")
STEPS, KEPT = 60, (0, 3, 11, 12, 30, 59)
BETAS = [0.001 + 0.079 * k / (STEPS - 1) for k in range(STEPS)]
SHAPE = (3, 2, 3, 3)
# What of these is there: others are named once the package has them.
NAMES = ("store", "checkpoint", "auto", "offload", "revolve:2")
MEMORIES = [name for name in NAMES if name.split(":")[0] in gs.memory.names()]

means = pytest.mark.parametrize("mean", MEANS)
variances = pytest.mark.parametrize("variance", VARIANCES)
clips = pytest.mark.parametrize("clip", [True, False], ids=["clip", "no clip"])
memories = pytest.mark.parametrize("memory", MEMORIES)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    # The tensors are tiny: threads would only wait for each other.
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)


class Tables:
    """alpha_bar and beta of the visited timesteps, as lists of Python floats."""

    def __init__(self, betas=BETAS, kept=KEPT):
        kept = range(len(betas)) if kept is None else sorted(kept)
        bar, bars = 1.0, []
        for beta in betas:
            bar *= 1 - beta
            bars.append(bar)
        self.kept = list(kept)
        self.bar = [bars[k] for k in kept]
        self.prev = [1.0, *self.bar[:-1]]
        self.beta = [1 - a / p for a, p in zip(self.bar, self.prev, strict=True)]
        self.count = len(self.kept)

    def posterior(self, t):
        """Coefficients of x_0 and x_t, and the variance."""
        a, p, beta = self.bar[t], self.prev[t], self.beta[t]
        c1 = beta * math.sqrt(p) / (1 - a)
        c2 = (1 - p) * math.sqrt(1 - beta) / (1 - a)
        return c1, c2, beta * (1 - p) / (1 - a)

    def small(self, t):
        return math.log(self.posterior(max(t, 1))[2])

    def large(self, t):
        return math.log(self.beta[t]) if t else self.small(0)


class Oracle(Tables):
    """Upstream's steps, one for one."""

    def __init__(self, model, mean="epsilon", variance="fixed_small", clip=True, **options):
        super().__init__(options.pop("betas", BETAS), options.pop("kept", KEPT))
        self.model, self.mean, self.variance, self.clip = model, mean, variance, clip
        self.denoised_fn = options.pop("denoised_fn", None)
        self.cond_fn = options.pop("cond_fn", None)
        self.kwargs = options.pop("kwargs", {})
        assert not options

    def told(self, t, x):
        return torch.full((len(x),), self.kept[t])

    def xstart_of(self, x, eps, t):
        return math.sqrt(1 / self.bar[t]) * x - math.sqrt(1 / self.bar[t] - 1) * eps

    def eps_of(self, x, xstart, t):
        return (math.sqrt(1 / self.bar[t]) * x - xstart) / math.sqrt(1 / self.bar[t] - 1)

    def moments(self, x, t):
        output = self.model(x, self.told(t, x), **self.kwargs)
        c1, c2, variance = self.posterior(t)
        if self.variance in ("learned", "learned_range"):
            output, v = output.chunk(2, dim=1)
            if self.variance == "learned":
                log_variance = v
            else:
                share = (v + 1) / 2
                log_variance = share * math.log(self.beta[t]) + (1 - share) * self.small(t)
            variance = torch.exp(log_variance)
        else:
            small = self.variance == "fixed_small"
            log_variance = torch.full_like(x, self.small(t) if small else self.large(t))
            variance = torch.full_like(x, variance if small else math.exp(self.large(t)))
        if self.mean == "epsilon":
            xstart = self.xstart_of(x, output, t)
        elif self.mean == "x0":
            xstart = output
        else:
            xstart = output / c1 - c2 / c1 * x
        if self.denoised_fn is not None:
            xstart = self.denoised_fn(xstart)
        if self.clip:
            xstart = xstart.clamp(-1, 1)
        mean = output if self.mean == "previous_x" else c1 * xstart + c2 * x
        return {
            "mean": mean,
            "variance": variance,
            "log_variance": log_variance,
            "pred_xstart": xstart,
        }

    def gradient(self, x, t):
        return self.cond_fn(x, self.told(t, x), **self.kwargs)

    def scored(self, out, x, t):
        eps = self.eps_of(x, out["pred_xstart"], t)
        eps = eps - math.sqrt(1 - self.bar[t]) * self.gradient(x, t)
        xstart = self.xstart_of(x, eps, t)
        c1, c2, _ = self.posterior(t)
        return out | {"pred_xstart": xstart, "mean": c1 * xstart + c2 * x}

    def p_sample(self, x, t, noise):
        out = self.moments(x, t)
        mean = out["mean"]
        if self.cond_fn is not None:
            mean = mean + out["variance"] * self.gradient(x, t)
        sample = mean + (t != 0) * torch.exp(0.5 * out["log_variance"]) * noise
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def ddim_sample(self, x, t, noise, eta):
        out = self.moments(x, t)
        if self.cond_fn is not None:
            out = self.scored(out, x, t)
        a, p = self.bar[t], self.prev[t]
        eps = self.eps_of(x, out["pred_xstart"], t)
        sigma = eta * math.sqrt((1 - p) / (1 - a)) * math.sqrt(1 - a / p)
        mean = out["pred_xstart"] * math.sqrt(p) + math.sqrt(1 - p - sigma**2) * eps
        return {"sample": mean + (t != 0) * sigma * noise, "pred_xstart": out["pred_xstart"]}

    def reverse(self, x, t):
        out = self.moments(x, t)
        following = [*self.bar[1:], 0.0][t]
        eps = self.eps_of(x, out["pred_xstart"], t)
        sample = out["pred_xstart"] * math.sqrt(following) + math.sqrt(1 - following) * eps
        return {"sample": sample, "pred_xstart": out["pred_xstart"]}

    def loop(self, x, noises, eta=None):
        """All steps; ``noises`` [N-1] in the order of sampling."""
        outs = []
        for i, t in enumerate(reversed(range(self.count))):
            noise = noises[i] if t else torch.zeros_like(x)
            out = self.p_sample(x, t, noise) if eta is None else self.ddim_sample(x, t, noise, eta)
            outs.append(out)
            x = out["sample"]
        return outs


class Net(nn.Module):
    """Predicts what it is asked to, in closed form, of a mixture of blobs; parameters nudge it."""

    def __init__(self, mean="epsilon", variance="fixed_small", tables=None, told=float):
        super().__init__()
        self.mean, self.variance, self.tables = mean, variance, tables or Tables()
        self.mixture = Mixture(math.prod(SHAPE[1:]), std=0.7)
        self.weight = nn.Parameter(torch.tensor([0.03, 0.4], dtype=torch.float64))
        self.shift = nn.Parameter(0.1 * normal(1, *SHAPE[1:], seed=5))
        self.told = told  # from what it is told of the time to the original timestep

    def index(self, t):
        (original,) = {round(self.told(k)) for k in t.tolist()}
        return self.tables.kept.index(original)

    def forward(self, x, t, **kwargs):
        k = self.index(t)
        a = self.tables.bar[k]
        x0 = self.mixture.posterior(x, math.sqrt(a), math.sqrt(1 - a)) + self.shift
        x0 = x0 + self.weight[0] * torch.sin(3 * x) + sum(kwargs.values())
        if self.mean == "x0":
            output = x0
        elif self.mean == "epsilon":
            output = (x - math.sqrt(a) * x0) / math.sqrt(1 - a)
        else:
            c1, c2, _ = self.tables.posterior(k)
            output = c1 * x0 + c2 * x
        if self.variance == "learned":
            output = torch.cat([output, self.weight[1] * torch.cos(x) - 4], 1)
        elif self.variance == "learned_range":
            output = torch.cat([output, self.weight[1] * torch.cos(x) + 0.1], 1)
        return output


def diffusion_of(mean="epsilon", variance="fixed_small", **options):
    options = {"use_timesteps": KEPT} | options
    return GaussianDiffusion(BETAS, mean, variance, **options)


def leaf(x):
    return x.detach().clone().requires_grad_()


def given():
    return [leaf(normal(*SHAPE, seed=10 + k)) for k in range(len(KEPT) - 1)]


def times(t, count=SHAPE[0]):
    return torch.full((count,), t)


def assert_close(got, expected, tolerance=1e-9, what=""):
    assert got.shape == expected.shape, what
    error = float((got.detach().double() - expected.detach().double()).abs().max())
    size = max(1.0, float(expected.detach().abs().max()))
    assert error <= tolerance * size, f"{what}: off by {error}"


def assert_same(got, expected, inputs, tolerance=1e-9):
    """Values, and gradients of a curved function of them."""
    assert_close(got, expected, tolerance, "value")
    wanted = torch.autograd.grad(expected.sin().sum(), inputs, retain_graph=True)
    found = torch.autograd.grad(got.sin().sum(), inputs, retain_graph=True)
    for k, (f, w) in enumerate(zip(found, wanted, strict=True)):
        assert w.abs().max() > 0
        assert_close(f, w, tolerance, f"gradient {k}")


# The tables.


def test_tables_worked_by_hand():
    # alpha_bar = 1/2, 1/3, 1/4
    tables = GaussianDiffusion([1 / 2, 1 / 3, 1 / 4])
    root = math.sqrt
    expected = {
        "alphas_cumprod": [1 / 2, 1 / 3, 1 / 4],
        "alphas_cumprod_prev": [1, 1 / 2, 1 / 3],
        "alphas_cumprod_next": [1 / 3, 1 / 4, 0],
        "sqrt_alphas_cumprod": [root(1 / 2), root(1 / 3), 1 / 2],
        "sqrt_one_minus_alphas_cumprod": [root(1 / 2), root(2 / 3), root(3) / 2],
        "sqrt_recip_alphas_cumprod": [root(2), root(3), 2],
        "sqrt_recipm1_alphas_cumprod": [1, root(2), root(3)],
        "posterior_variance": [0, 1 / 4, 2 / 9],
        "posterior_log_variance_clipped": [math.log(1 / 4), math.log(1 / 4), math.log(2 / 9)],
        "posterior_mean_coef1": [1, root(2) / 4, root(3) / 9],
        "posterior_mean_coef2": [0, root(6) / 4, 4 * root(3) / 9],
    }
    assert tables.num_timesteps == 3
    for name, values in expected.items():
        table = getattr(tables, name)
        assert isinstance(table, np.ndarray)
        assert table.dtype == np.float64
        np.testing.assert_allclose(table, values, rtol=1e-14, atol=1e-16, err_msg=name)


def test_posterior_worked_by_hand():
    x0, x = torch.full((3, 1, 2), 9.0).double(), torch.full((3, 1, 2), 36.0).double()
    diffusion = GaussianDiffusion([1 / 2, 1 / 3, 1 / 4])
    mean, variance, log_variance = diffusion.q_posterior_mean_variance(x0, x, torch.arange(3))
    assert mean.shape == variance.shape == log_variance.shape == x.shape
    means = [9, 9 * math.sqrt(2) / 4 + 9 * math.sqrt(6), math.sqrt(3) + 16 * math.sqrt(3)]
    assert_close(mean[:, 0, 1], torch.tensor(means, dtype=torch.float64), 1e-14)
    assert_close(variance[:, 0, 1], torch.tensor([0, 1 / 4, 2 / 9]).double(), 1e-7)
    logs = [math.log(1 / 4), math.log(1 / 4), math.log(2 / 9)]
    assert_close(log_variance[:, 0, 1], torch.tensor(logs, dtype=torch.float64), 1e-14)


def test_respacing_keeps_alpha_bar():
    # Of alpha_bar = 1/2, 1/3, 1/4 the outer two: betas 1/2 and 1 - (1/4)/(1/2).
    diffusion = GaussianDiffusion([1 / 2, 1 / 3, 1 / 4], use_timesteps={2, 0})
    np.testing.assert_allclose(diffusion.betas, [1 / 2, 1 / 2], rtol=1e-14)
    assert diffusion.timestep_map == [0, 2]
    assert diffusion.use_timesteps == {0, 2}
    assert diffusion.original_num_steps == 3


@pytest.mark.parametrize("kind", [list, np.array, torch.DoubleTensor], ids=str)
def test_betas_of_any_kind(kind):
    np.testing.assert_array_equal(GaussianDiffusion(kind(BETAS)).betas, BETAS)


def test_upstream_names_of_the_schedules():
    linear = [0.001 + k / 99 * (0.2 - 0.001) for k in range(100)]
    np.testing.assert_allclose(gd.get_named_beta_schedule("linear", 100), linear, rtol=1e-13)

    def bar(t):
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    cosine = [min(1 - bar((k + 1) / 50) / bar(k / 50), 0.999) for k in range(50)]
    np.testing.assert_allclose(gd.get_named_beta_schedule("cosine", 50), cosine, rtol=1e-12)
    # 300 steps in thirds: the example of upstream's docstring, with its ends.
    spaced = gd.space_timesteps(300, [10, 15, 20])
    assert isinstance(spaced, set)
    assert len(spaced) == 45
    assert {0, 99, 100, 199, 200, 299} <= spaced
    assert gd.space_timesteps(300, "10,15,20") == spaced
    assert gd.space_timesteps(100, "ddim25") == set(range(0, 100, 4))


# Values and gradients.


@clips
@variances
@means
def test_ancestral_loop(mean, variance, clip):
    net, z0, noises = Net(mean, variance), leaf(normal(*SHAPE)), given()
    oracle = Oracle(net, mean, variance, clip)
    outs = oracle.loop(z0, noises)
    predictions = torch.stack([out["pred_xstart"] for out in outs])
    if clip:  # some of it bites, some does not
        assert 0.02 < (predictions.abs() == 1).double().mean() < 0.9
    got = diffusion_of(mean, variance).p_sample_loop(
        net, SHAPE, noise=z0, clip_denoised=clip, step_noise=gs.noise.Given(noises)
    )
    assert_same(got, outs[-1]["sample"], [z0, net.weight, net.shift, *noises])


@clips
@variances
@means
def test_moments_at_every_timestep(mean, variance, clip):
    net, x = Net(mean, variance), leaf(normal(*SHAPE))
    for t in range(len(KEPT)):
        expected = Oracle(net, mean, variance, clip).moments(x, t)
        got = diffusion_of(mean, variance).p_mean_variance(net, x, times(t), clip_denoised=clip)
        assert list(got) == ["mean", "variance", "log_variance", "pred_xstart"]
        for key, value in expected.items():
            assert_close(got[key], value, 1e-11, f"{key} at {t}")


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@means
def test_ddim_loop(mean, eta):
    net, z0, noises = Net(mean, "learned_range"), leaf(normal(*SHAPE)), given()
    source = gs.noise.Given(noises) if eta else None
    for clip in (True, False):
        expected = Oracle(net, mean, "learned_range", clip).loop(z0, noises, eta)[-1]["sample"]
        got = diffusion_of(mean, "learned_range").ddim_sample_loop(
            net, SHAPE, z0, clip, eta=eta, step_noise=source
        )
        assert_same(got, expected, [z0, net.shift, *(noises if eta else [])])


@means
def test_ddim_reverse(mean):
    net, x = Net(mean), leaf(normal(*SHAPE))
    diffusion, oracle = diffusion_of(mean), Oracle(net, mean)
    for t in range(len(KEPT)):
        expected = oracle.reverse(x, t)
        got = diffusion.ddim_reverse_sample(net, x, times(t))
        assert got.keys() == expected.keys()
        assert_same(got["sample"], expected["sample"], [x, net.shift])
        assert_close(got["pred_xstart"], expected["pred_xstart"])


def test_reverse_undoes_a_step():
    # With a constant prediction the path is straight, and both ways follow it.
    diffusion, x, x0 = diffusion_of("x0"), normal(*SHAPE), normal(*SHAPE, seed=1).clamp(-1, 1)
    for t in range(1, len(KEPT)):
        down = diffusion.ddim_sample(lambda x, t: x0, x, times(t))["sample"]
        up = diffusion.ddim_reverse_sample(lambda x, t: x0, down, times(t - 1))["sample"]
        assert_close(up, x, 1e-12)


@variances
def test_float32_follows_upstreams_generator(variance):
    # The same seed gives the same numbers as before, and leaves the generator where it was.
    net = Net("epsilon", variance).float()
    net.mixture.centres = net.mixture.centres.float()

    def upstream(eta):
        torch.manual_seed(7)
        x = torch.randn(*SHAPE)
        oracle = Oracle(net, "epsilon", variance)
        for t in reversed(range(len(KEPT))):
            noise = torch.randn_like(x)
            out = (
                oracle.p_sample(x, t, noise)
                if eta is None
                else oracle.ddim_sample(x, t, noise, eta)
            )
            x = out["sample"]
        return x, torch.rand(())

    def ours(eta):
        torch.manual_seed(7)
        diffusion = diffusion_of("epsilon", variance)
        if eta is None:
            x = diffusion.p_sample_loop(net, SHAPE)
        else:
            x = diffusion.ddim_sample_loop(net, list(SHAPE), eta=eta)
        return x, torch.rand(())

    for eta in (None, 0.0, 0.7):
        with torch.no_grad():
            expected, got = upstream(eta), ours(eta)
        assert got[0].dtype == torch.float32
        assert_close(got[0], expected[0], 3e-5)
        assert torch.equal(got[1], expected[1])


# Guidance.


def attraction(x, t, target=0.3, **_):
    """The slope of -(x - target)^2 - (1 + t/100) ln(1 + x^2), a quadratic with a ripple."""
    return -2 * (x - target) - (1 + t.view(-1, 1, 1, 1) / 100) * 2 * x / (1 + x**2)


def test_condition_mean_worked_by_hand():
    # Of alpha_bar = 1/2, 1/3, 1/4 the variance of t = 1 is 1/4; log p = -(x-1)^2 has slope 2(1-x).
    diffusion = GaussianDiffusion([1 / 2, 1 / 3, 1 / 4])
    x, moments = torch.full((1, 1, 2), 3.0), {}
    moments["mean"], moments["variance"] = torch.full_like(x, 0.5), torch.full_like(x, 0.25)
    got = diffusion.condition_mean(lambda x, t: 2 * (1 - x), moments, x, torch.tensor([1]))
    assert torch.equal(got, torch.full_like(x, 0.5 + 0.25 * -4))


def test_condition_score_worked_by_hand():
    # alpha_bar = 1/4 at t = 2: x_0 moves by (3/4)/(1/2) times the slope.
    diffusion = GaussianDiffusion([1 / 2, 1 / 3, 1 / 4])
    x, x0 = torch.full((1, 1, 2), 3.0).double(), torch.full((1, 1, 2), 0.5).double()
    moments = diffusion.p_mean_variance(lambda x, t: 0 * x, x, torch.tensor([2]))
    moments["pred_xstart"] = x0
    got = diffusion.condition_score(lambda x, t: 2 * (1 - x), moments, x, torch.tensor([2]))
    assert got is not moments
    assert_close(got["pred_xstart"], torch.full_like(x, 0.5 - 6), 1e-12)
    mean = math.sqrt(3) / 9 * -5.5 + 4 * math.sqrt(3) / 9 * 3
    assert_close(got["mean"], torch.full_like(x, mean), 1e-12)
    assert torch.equal(got["log_variance"], moments["log_variance"])


@pytest.mark.parametrize("eta", [None, 0.0, 0.8])
@means
def test_guided_loop(mean, eta):
    net, z0, noises = Net(mean, "learned_range"), leaf(normal(*SHAPE)), given()
    target = leaf(torch.tensor(0.3, dtype=torch.float64))
    options = {"denoised_fn": lambda x0: 0.9 * x0.tanh(), "cond_fn": attraction}
    kwargs = {"target": target}
    oracle = Oracle(net, mean, "learned_range", kwargs=kwargs, **options)
    diffusion = diffusion_of(mean, "learned_range")
    source = gs.noise.Given(noises) if eta != 0 else None
    expected = oracle.loop(z0, noises, eta)[-1]["sample"]
    if eta is None:
        loop, more = diffusion.p_sample_loop, {}
    else:
        loop, more = diffusion.ddim_sample_loop, {"eta": eta}
    got = loop(net, SHAPE, z0, model_kwargs=kwargs, step_noise=source, **options, **more)
    inputs = [z0, target, net.shift, *(noises if eta != 0 else [])]
    assert_same(got, expected, inputs)


@means
def test_denoised_fn_alone(mean):
    # Before the clamp, as upstream has it.
    net, x = Net(mean), leaf(normal(*SHAPE))
    noise = normal(*SHAPE, seed=1)
    got = diffusion_of(mean).p_sample(
        net, x, times(2), denoised_fn=lambda x0: 3 * x0, step_noise=gs.noise.Given([noise])
    )
    expected = Oracle(net, mean, denoised_fn=lambda x0: 3 * x0).p_sample(x, 2, noise)
    assert_same(got["sample"], expected["sample"], [x])
    assert_same(got["pred_xstart"], expected["pred_xstart"], [x])
    assert got["pred_xstart"].abs().max() == 1


# Timesteps.


@pytest.mark.parametrize("kept", [None, KEPT], ids=["all", "respaced"])
@pytest.mark.parametrize("rescale", [False, True])
def test_what_model_and_guidance_are_told(rescale, kept):
    told = []

    def model(x, t):
        told.append(t)
        return 0.1 * x

    def cond_fn(x, t):
        told.append(t)
        return -x

    diffusion = diffusion_of(use_timesteps=kept, rescale_timesteps=rescale)
    x = normal(2, 1, 2)
    with torch.no_grad():
        diffusion.p_sample_loop(model, x.shape, x, cond_fn=cond_fn, step_noise=gs.noise.Off())
    visited = sorted(kept or range(STEPS), reverse=True)
    assert len(told) == 2 * len(visited)
    for k, t in enumerate(visited):
        for got in told[2 * k : 2 * k + 2]:
            assert got.shape == (2,)
            assert got.dtype == (torch.float32 if rescale else torch.int64)
            expected = t * (1000 / STEPS) if rescale else t
            assert got.tolist() == pytest.approx([expected] * 2, rel=1e-6)


def test_rescaled_run():
    net, z0, noises = Net(), leaf(normal(*SHAPE)), given()
    expected = Oracle(net).loop(z0, noises)[-1]["sample"]
    net.told = lambda t: t * STEPS / 1000
    got = diffusion_of(rescale_timesteps=True).p_sample_loop(
        net, SHAPE, z0, step_noise=gs.noise.Given(noises)
    )
    assert_same(got, expected, [z0])


@pytest.mark.parametrize("timesteps", [(4, 0, 2), (3, 0, 3)], ids=str)
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("eta", [None, 0.6])
def test_each_sample_at_its_own_timestep(eta, guided, timesteps):
    def model(x, t):
        v = torch.cos(x) * 0.5
        return torch.cat([torch.tanh(x) * (1 + t.view(-1, 1, 1, 1) / STEPS), v], 1)

    x, t = leaf(normal(*SHAPE)), torch.tensor(timesteps)
    z0, signed_roll = leaf(normal(*SHAPE, seed=3)), gs.noise.SignedRoll(1)
    options = {"cond_fn": attraction} if guided else {}
    diffusion = diffusion_of("epsilon", "learned_range")
    if eta is None:
        got = diffusion.p_sample(model, x, t, z0=z0, step_noise=signed_roll, **options)
    else:
        got = diffusion.ddim_sample(model, x, t, eta=eta, z0=z0, step_noise=signed_roll, **options)
    oracle = Oracle(model, "epsilon", "learned_range", **options)
    rows = []
    for b, k in enumerate(t.tolist()):
        noise = signed_roll.at(z0, len(KEPT) - 1 - k, len(KEPT))
        out = oracle.p_sample(x, k, noise) if eta is None else oracle.ddim_sample(x, k, noise, eta)
        rows.append(out["sample"][b])
    assert_same(got["sample"], torch.stack(rows), [x, z0])


# Noise.


def test_no_noise_at_the_last_step():
    net, x = Net("x0", "learned_range"), normal(*SHAPE)
    diffusion = diffusion_of("x0", "learned_range")
    mean = diffusion.p_mean_variance(net, x, times(0))["mean"]
    for source in (None, gs.noise.Philox(3), gs.noise.Given([]), gs.noise.SignedRoll(0)):
        for options in ({}, {"denoised_fn": lambda x0: x0}):
            out = diffusion.p_sample(net, x, times(0), step_noise=source, z0=x, **options)
            assert_close(out["sample"], mean, 1e-14)
        out = diffusion.ddim_sample(net, x, times(0), eta=1.0, step_noise=source, z0=x)
        assert_close(out["sample"], out["pred_xstart"], 1e-14)
    # Not a huge variance times 0 either.
    wild = diffusion_of("x0", "learned").p_sample(
        lambda x, t: torch.cat([x.tanh(), torch.full_like(x, 1e4)], 1), x, times(0)
    )
    assert wild["sample"].isfinite().all()


def test_noise_is_a_function_of_the_absolute_step():
    calls = []

    class Noted(gs.noise.NoiseSource):
        def at(self, z0, step, num_steps):
            calls.append((step, num_steps))
            return (1 + step) * z0.sin()

    net, z0 = Net(), leaf(normal(*SHAPE))
    noises = [(1 + i) * z0.sin() for i in range(len(KEPT) - 1)]
    expected = Oracle(net).loop(z0, noises)[-1]["sample"]
    got = diffusion_of().p_sample_loop(net, SHAPE, z0, step_noise=Noted(), memory="store")
    assert calls == [(i, len(KEPT)) for i in range(len(KEPT) - 1)]
    assert_same(got, expected, [z0])


@memories
@pytest.mark.parametrize(
    "source",
    [gs.noise.SignedRoll(2), gs.noise.SinCos(), gs.noise.Philox(1), gs.noise.Off()],
    ids=lambda s: type(s).__name__,
)
def test_sources(source, memory):
    net, z0 = Net("x0", "fixed_large"), leaf(normal(*SHAPE))
    noises = [source.at(z0, i, len(KEPT)) for i in range(len(KEPT) - 1)]
    expected = Oracle(net, "x0", "fixed_large").loop(z0, noises)[-1]["sample"]
    got = diffusion_of("x0", "fixed_large").p_sample_loop(
        net, SHAPE, noise=z0, step_noise=source, memory=memory
    )
    assert_same(got, expected, [z0, net.weight])


# Gradients.


def test_the_clamp_masks_the_gradient():
    # Predicted x_0 of 2 and 0.5: the first is clamped and passes nothing on.
    diffusion = GaussianDiffusion([1 / 2, 1 / 3, 1 / 4], "x0")
    x = leaf(torch.zeros(1, 1, 2, dtype=torch.float64))
    prediction = leaf(torch.tensor([[[2.0, 0.5]]], dtype=torch.float64))
    for memory in (None, "store", "checkpoint"):
        out = diffusion.p_sample(
            lambda x, t: prediction + 0.1 * x,
            x,
            torch.tensor([1]),
            step_noise=gs.noise.Off(),
            memory=memory,
        )
        c1, c2 = math.sqrt(2) / 4, math.sqrt(6) / 4
        assert_close(out["sample"], torch.tensor([[[c1, 0.5 * c1]]], dtype=torch.float64), 1e-14)
        dx, dprediction = torch.autograd.grad(out["sample"].sum(), [x, prediction])
        expected = torch.tensor([[[c2, c2 + 0.1 * c1]]], dtype=torch.float64)
        assert_close(dx, expected, 1e-14)
        assert_close(dprediction, torch.tensor([[[0.0, c1]]], dtype=torch.float64), 1e-14)


@memories
@pytest.mark.parametrize("eta", [None, 0.0, 0.5])
def test_memory_strategies(eta, memory):
    net, z0, noises = Net("epsilon", "learned_range"), leaf(normal(*SHAPE)), given()
    extra = leaf(0.1 * normal(*SHAPE, seed=8))
    oracle = Oracle(net, "epsilon", "learned_range", kwargs={"extra": extra})
    expected = oracle.loop(z0, noises, eta)[-1]["sample"]
    diffusion = diffusion_of("epsilon", "learned_range")
    options = {"model_kwargs": {"extra": extra}, "memory": memory}
    if eta != 0:
        options["step_noise"] = gs.noise.Given(noises)
    if eta is None:
        got = diffusion.p_sample_loop(net, SHAPE, z0, **options)
    else:
        got = diffusion.ddim_sample_loop(net, SHAPE, z0, eta=eta, **options)
    inputs = [z0, extra, net.weight, net.shift, *(noises if eta != 0 else [])]
    assert_same(got, expected, inputs)


@memories
def test_gradient_with_torchs_own_noise(memory):
    # The generator's state is put back for the second call of a step.
    net, z0 = Net("x0", "learned_range"), leaf(normal(*SHAPE))
    torch.manual_seed(3)
    noises = [torch.randn_like(z0) for _ in KEPT]
    expected = Oracle(net, "x0", "learned_range").loop(z0, noises)[-1]["sample"]
    torch.manual_seed(3)
    diffusion = diffusion_of("x0", "learned_range")
    got = diffusion.p_sample_loop(net, SHAPE, noise=z0, memory=memory)
    torch.manual_seed(4)
    assert_same(got, expected, [z0, net.weight])


@memories
@pytest.mark.parametrize("computed", [False, True])
def test_a_start_that_is_used_three_times(computed, memory):
    # It starts the state, anchors the noise, and the model sees it; computed, it has a past.
    weight, net, source = leaf(0.7 * normal(*SHAPE)), Net(), gs.noise.SignedRoll(0)

    def run(sampled):
        z0 = weight.sinh() + 0.1 if computed else weight
        return sampled(z0, lambda x, t: net(x, t) + 0.1 * torch.sin(z0))

    def loop(z0, model):
        noises = [source.at(z0, i, len(KEPT)) for i in range(len(KEPT) - 1)]
        return Oracle(model).loop(z0, noises)[-1]["sample"]

    def drop_in(z0, model):
        return diffusion_of().p_sample_loop(model, SHAPE, z0, step_noise=source, memory=memory)

    assert_same(run(drop_in), run(loop), [weight])


def test_what_is_computed_before_the_run_is_differentiated_once():
    # Not once a step: an encoder before the run would be as dear as the run itself.
    weight, net, calls = leaf(normal(*SHAPE)), Net(), []
    z0, extra = weight.sinh(), 0.1 * weight
    z0.register_hook(lambda g: calls.append("z0"))
    extra.register_hook(lambda g: calls.append("extra"))
    x = diffusion_of().p_sample_loop(
        net,
        SHAPE,
        z0,
        model_kwargs={"extra": extra},
        step_noise=gs.noise.SignedRoll(0),
        memory="checkpoint",
    )
    x.sum().backward()
    assert sorted(calls) == ["extra", "z0"]
    assert weight.grad.abs().max() > 0


@pytest.mark.parametrize("memory", [None, *MEMORIES])
@pytest.mark.parametrize("eta", [None, 0.5])
def test_single_steps_under_a_strategy(eta, memory):
    net, x, noise = Net("epsilon", "learned"), leaf(normal(*SHAPE)), leaf(normal(*SHAPE, seed=4))
    oracle, diffusion = Oracle(net, "epsilon", "learned"), diffusion_of("epsilon", "learned")
    options = {"step_noise": gs.noise.Given([noise]), "memory": memory}
    if eta is None:
        expected = oracle.p_sample(x, 3, noise)
        got = diffusion.p_sample(net, x, times(3), **options)
    else:
        expected = oracle.ddim_sample(x, 3, noise, eta)
        got = diffusion.ddim_sample(net, x, times(3), eta=eta, **options)
    assert list(got) == ["sample", "pred_xstart"]
    assert_same(got["sample"], expected["sample"], [x, noise, net.weight])
    assert_same(got["pred_xstart"], expected["pred_xstart"], [x, net.shift])


def test_half_precision_start():
    net, z0 = Net("x0").half(), normal(*SHAPE).half()
    net.mixture.centres = net.mixture.centres.half()

    def model(x, t):
        return net(x.half(), t)

    start = leaf(z0)
    got = diffusion_of("x0").p_sample_loop(model, SHAPE, start, step_noise=gs.noise.Off())
    assert got.dtype == torch.float32
    (dz0,) = torch.autograd.grad(got.sum(), start)
    assert dz0.dtype == torch.float16
    assert dz0.isfinite().all()


# The loops.


@pytest.mark.parametrize("memory", [None, "checkpoint"])
@pytest.mark.parametrize("eta", [None, 0.5])
def test_progressive(eta, memory):
    net, z0, noises = Net("x0"), leaf(normal(*SHAPE)), given()
    expected = Oracle(net, "x0").loop(z0, noises, eta)
    diffusion, options = diffusion_of("x0"), {"step_noise": gs.noise.Given(noises)}
    if eta is None:
        outs = diffusion.p_sample_loop_progressive(net, SHAPE, z0, memory=memory, **options)
        final = diffusion.p_sample_loop(net, SHAPE, z0, **options)
    else:
        options["eta"] = eta
        outs = diffusion.ddim_sample_loop_progressive(net, SHAPE, z0, memory=memory, **options)
        final = diffusion.ddim_sample_loop(net, SHAPE, z0, **options)
    assert inspect.isgenerator(outs)
    outs = list(outs)
    assert len(outs) == len(KEPT)
    for k, (got, wanted) in enumerate(zip(outs, expected, strict=True)):
        assert list(got) == ["sample", "pred_xstart"]
        assert_same(got["sample"], wanted["sample"], [z0])
        assert_close(got["pred_xstart"], wanted["pred_xstart"], what=f"prediction {k}")
    assert_close(outs[-1]["sample"], final, 1e-12)


def test_progressive_goes_on_from_what_the_caller_puts_in():
    # In-painting between steps relies on it.
    net, z0 = Net("x0"), normal(*SHAPE)
    with torch.no_grad():
        for k, out in enumerate(
            diffusion_of("x0").p_sample_loop_progressive(net, SHAPE, z0, step_noise=gs.noise.Off())
        ):
            if k == 2:
                out["sample"] = x = torch.zeros_like(z0)
            elif k > 2:
                t = len(KEPT) - 1 - k
                x = Oracle(net, "x0").p_sample(x, t, torch.zeros_like(x))["sample"]
                assert_close(out["sample"], x)


def test_under_no_grad_nothing_is_recorded():
    net, z0 = Net("x0"), leaf(normal(*SHAPE))
    diffusion = diffusion_of("x0")
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        for memory in MEMORIES:
            x = diffusion.p_sample_loop(net, SHAPE, z0, step_noise=gs.noise.Off(), memory=memory)
            assert not x.requires_grad
        outs = list(diffusion.ddim_sample_loop_progressive(net, SHAPE, z0))
        assert not outs[-1]["sample"].requires_grad
    # And the caller's choice holds: without no_grad, all is recorded.
    assert diffusion.p_sample_loop(net, SHAPE, z0, step_noise=gs.noise.Off()).requires_grad


def test_progress_bars(capsys):
    net, z0 = Net("x0"), normal(*SHAPE)
    with torch.no_grad():
        diffusion_of("x0").p_sample_loop(net, SHAPE, z0, progress=True)
        first = capsys.readouterr().err
        list(diffusion_of("x0").p_sample_loop_progressive(net, SHAPE, z0, progress=True))
        second = capsys.readouterr().err
        diffusion_of("x0").p_sample_loop(net, SHAPE, z0)
    assert "6/6" in first
    assert "6/6" in second
    assert capsys.readouterr().err == ""


def test_a_single_timestep():
    # One step of a distilled model; there is no second variance to clip with.
    x = normal(2, 1, 4)
    for variance in VARIANCES:
        diffusion = GaussianDiffusion(BETAS, "x0", variance, use_timesteps=[40])
        channels = 2 if variance.startswith("learned") else 1

        def model(x, t, channels=channels):
            return torch.cat([x.tanh()] * channels, 1)

        with torch.no_grad():
            assert_close(diffusion.p_sample_loop(model, x.shape, x), x.tanh(), 1e-12)
            assert_close(diffusion.ddim_sample_loop(model, x.shape, x), x.tanh(), 1e-12)
            moments = diffusion.p_mean_variance(model, x, times(0, 2))
        assert all(value.isfinite().all() for value in moments.values())


# Upstream's objects.


class ModelMeanType(enum.Enum):
    PREVIOUS_X = enum.auto()
    START_X = enum.auto()
    EPSILON = enum.auto()


class ModelVarType(enum.Enum):
    LEARNED = enum.auto()
    FIXED_SMALL = enum.auto()
    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()


OF_MEAN = {
    "epsilon": ModelMeanType.EPSILON,
    "x0": ModelMeanType.START_X,
    "previous_x": ModelMeanType.PREVIOUS_X,
}


def upstream(mean="epsilon", variance="fixed_small", rescale=False, kept=None, betas=BETAS):
    """What a diffusion of upstream's looks like from outside."""
    attributes = {
        "model_mean_type": OF_MEAN[mean],
        "model_var_type": ModelVarType[variance.upper()],
        "rescale_timesteps": rescale,
        "betas": np.array(Tables(betas, kept).beta),
    }
    if kept is not None:
        attributes["use_timesteps"] = set(kept)
        attributes["timestep_map"] = sorted(kept)
        attributes["original_num_steps"] = len(betas)
    return SimpleNamespace(**attributes)


@variances
@means
def test_from_upstream_reads_the_types(mean, variance):
    diffusion = gd.from_upstream(upstream(mean, variance))
    assert (diffusion.model_mean_type, diffusion.model_var_type) == (mean, variance)
    assert diffusion.num_timesteps == STEPS
    assert diffusion.timestep_map == list(range(STEPS))
    assert diffusion.rescale_timesteps is False
    direct = GaussianDiffusion(BETAS, OF_MEAN[mean], ModelVarType[variance.upper()])
    assert (direct.model_mean_type, direct.model_var_type) == (mean, variance)


def test_from_upstream_respaced():
    net, z0, noises = Net("x0", "learned_range"), leaf(normal(*SHAPE)), given()
    expected = Oracle(net, "x0", "learned_range").loop(z0, noises)[-1]["sample"]
    diffusion = gd.from_upstream(upstream("x0", "learned_range", rescale=True, kept=KEPT))
    assert diffusion.use_timesteps == set(KEPT)
    assert diffusion.original_num_steps == STEPS
    net.told = lambda t: t * STEPS / 1000
    got = diffusion.p_sample_loop(net, SHAPE, z0, step_noise=gs.noise.Given(noises))
    assert_same(got, expected, [z0])


def test_from_upstream_of_something_else():
    with pytest.raises(TypeError, match=r"diffusion must .* attribute betas, got dict"):
        gd.from_upstream({})
    odd = upstream()
    odd.model_mean_type = enum.Enum("Other", ["VELOCITY"]).VELOCITY
    with pytest.raises(ValueError, match="EPSILON, PREVIOUS_X, START_X"):
        gd.from_upstream(odd)


UPSTREAM_ARGUMENTS = {
    "q_posterior_mean_variance": "x_start x_t t",
    "p_mean_variance": "model x t clip_denoised denoised_fn model_kwargs",
    "condition_mean": "cond_fn p_mean_var x t model_kwargs",
    "condition_score": "cond_fn p_mean_var x t model_kwargs",
    "p_sample": "model x t clip_denoised denoised_fn cond_fn model_kwargs",
    "p_sample_loop": "model shape noise clip_denoised denoised_fn cond_fn model_kwargs device "
    "progress",
    "p_sample_loop_progressive": "model shape noise clip_denoised denoised_fn cond_fn model_kwargs "
    "device progress",
    "ddim_sample": "model x t clip_denoised denoised_fn cond_fn model_kwargs eta",
    "ddim_reverse_sample": "model x t clip_denoised denoised_fn model_kwargs eta",
    "ddim_sample_loop": "model shape noise clip_denoised denoised_fn cond_fn model_kwargs device "
    "progress eta",
    "ddim_sample_loop_progressive": "model shape noise clip_denoised denoised_fn cond_fn "
    "model_kwargs device progress eta",
}


@pytest.mark.parametrize("name", UPSTREAM_ARGUMENTS)
def test_signatures(name):
    parameters = list(inspect.signature(getattr(GaussianDiffusion, name)).parameters.values())[1:]
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == UPSTREAM_ARGUMENTS[name].split()
    more = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert more <= {"step_noise", "memory", "z0"}
    defaults = {"clip_denoised": True, "eta": 0.0, "progress": False}
    for p in parameters:
        if p.name in defaults:
            assert p.default == defaults[p.name]


# What is wrong is said.


@pytest.mark.parametrize("memory", MEMORIES)
def test_a_model_that_passes_no_gradient(memory):
    net, z0 = Net("x0"), leaf(normal(*SHAPE))

    def unrecorded(x, t):
        with torch.no_grad():
            return net(x, t)

    def detached(x, t):  # the parameters still receive one
        return net(x.detach(), t)

    for model in (unrecorded, detached):
        with pytest.warns(gs.GradientWarning, match="detaches at step 0") as caught:
            diffusion_of("x0").p_sample_loop(
                model, SHAPE, z0, step_noise=gs.noise.SignedRoll(0), memory=memory
            ).sum().backward()
        assert len(caught) == 1  # once a run, and not again in backward


def test_a_model_that_passes_no_gradient_in_one_step():
    net, x = Net("x0"), leaf(normal(*SHAPE))

    def late(x, t):  # detaches from its third step on
        return net(x, t).detach() if t[0] < 20 else net(x, t)

    with pytest.warns(gs.GradientWarning, match="at step 2"):
        diffusion_of("x0").p_sample_loop(late, SHAPE, x, step_noise=gs.noise.Off())
    with pytest.warns(gs.GradientWarning, match="at step 3"):
        diffusion_of("x0").p_mean_variance(lambda x, t: net(x, t).detach(), x, times(2))


@memories
def test_guidance_that_passes_no_gradient(memory):
    net, z0 = Net("x0"), leaf(normal(*SHAPE))

    def classifier_gradient(x, t):  # as upstream's classifier_sample.py has it
        with torch.enable_grad():
            x_in = x.detach().requires_grad_(True)
            return torch.autograd.grad(-(1 + x_in**2).log().sum(), x_in)[0]

    def differentiable(x, t):
        return torch.autograd.grad(-(1 + x**2).log().sum(), x, create_graph=True)[0]

    def run(cond_fn):
        return diffusion_of("x0").p_sample_loop(
            net, SHAPE, z0, cond_fn=cond_fn, step_noise=gs.noise.Off(), memory=memory
        )

    with pytest.warns(GuidanceWarning, match="create_graph=True"):
        run(classifier_gradient)
    expected = Oracle(net, "x0", cond_fn=lambda x, t: -2 * x / (1 + x**2))
    zeros = [torch.zeros_like(z0)] * (len(KEPT) - 1)
    assert_same(run(differentiable), expected.loop(z0, zeros)[-1]["sample"], [z0])


def test_inert_noise_is_said():
    net, z0 = Net("x0"), normal(*SHAPE)
    with torch.no_grad(), pytest.warns(UserWarning, match=r"SignedRoll is inert.*eta > 0"):
        diffusion_of("x0").ddim_sample_loop(net, SHAPE, z0, step_noise=gs.noise.SignedRoll(0))
    with torch.no_grad():
        diffusion_of("x0").ddim_sample_loop(net, SHAPE, z0, step_noise=gs.noise.Off())


X = torch.zeros(2, 3, 4)
T = torch.tensor([0, 1])
BAD = {
    "mean type": (
        lambda: GaussianDiffusion(BETAS, "eps"),
        r"model_mean_type must be one of epsilon, previous_x, x0, got 'eps'",
    ),
    "variance type": (
        lambda: GaussianDiffusion(BETAS, "x0", "learned_rang"),
        r"model_var_type must be one of fixed_large, fixed_small, learned, learned_range, got .*"
        r"did you mean 'learned_range'",
    ),
    "betas of 1": (lambda: GaussianDiffusion([0.5, 1.0]), r"betas\[1\] = 1"),
    "betas of NaN": (lambda: GaussianDiffusion([math.nan]), "betas must lie strictly"),
    "no betas": (lambda: GaussianDiffusion([]), r"betas must have shape \[T\]"),
    "betas with a gradient": (
        lambda: GaussianDiffusion(torch.tensor([0.5], requires_grad=True)),
        "betas must not require grad",
    ),
    "betas of words": (lambda: GaussianDiffusion(["a"]), "betas must be a sequence"),
    "timestep beyond": (lambda: diffusion_of(use_timesteps=[60]), "use_timesteps.* below 60"),
    "no timesteps": (lambda: diffusion_of(use_timesteps=[]), "use_timesteps must hold"),
    "sections": (lambda: diffusion_of(use_timesteps="ddim5"), "schedules.respace"),
    "t beyond": (lambda: diffusion_of().p_sample(Net(), X, T + 5), "t must hold .* below 6"),
    "t negative": (lambda: diffusion_of().p_sample(Net(), X, T - 1), "t must hold"),
    "t of floats": (lambda: diffusion_of().p_sample(Net(), X, T.float()), "t must have an int"),
    "t of another batch": (
        lambda: diffusion_of().p_sample(Net(), X, T[:1]),
        r"t must have shape \[2\], got \[1\]",
    ),
    "undoubled output": (
        lambda: diffusion_of(variance="learned_range").p_sample(lambda x, t: x, X, T),
        r"model: the output must have shape \[2, 6, 4\].*x has \[2, 3, 4\].*'learned_range', got "
        r"\[2, 3, 4\]; learned variances take twice the channels",
    ),
    "doubled output": (
        lambda: diffusion_of().p_sample(lambda x, t: torch.cat([x, x], 1), X, T),
        r"model: the output must have shape \[2, 3, 4\].*'fixed_small', got \[2, 6, 4\]",
    ),
    "guidance of another shape": (
        lambda: diffusion_of().p_sample(lambda x, t: x, X, T, cond_fn=lambda x, t: x[:1]),
        r"cond_fn: the result must have shape \[2, 3, 4\]",
    ),
    "prediction of another shape": (
        lambda: diffusion_of().p_sample(lambda x, t: x, X, T, denoised_fn=lambda x: x[:1]),
        r"denoised_fn: the result must have shape \[2, 3, 4\]",
    ),
    "noise of another shape": (
        lambda: diffusion_of().p_sample_loop(Net(), [2, 3], noise=X),
        r"noise must have shape \[2, 3\], got \[2, 3, 4\]",
    ),
    "shape": (lambda: diffusion_of().p_sample_loop(Net(), 3), "shape must be a tuple or a list"),
    "device": (lambda: diffusion_of().p_sample_loop(lambda x, t: x, (2, 3)), "device must be"),
    "step noise": (
        lambda: diffusion_of().p_sample_loop(Net(), X.shape, X, step_noise=X),
        "step_noise must be a gradsampler.noise object or None, got Tensor",
    ),
    "number of noises": (
        lambda: diffusion_of().p_sample_loop(Net(), X.shape, X, step_noise=gs.noise.Given([X])),
        "one tensor for each of the 5 injections",
    ),
    "no anchor": (
        lambda: diffusion_of().p_sample(Net(), X, T, step_noise=gs.noise.SignedRoll(0)),
        "z0 must be given, as SignedRoll is a function of the initial noise",
    ),
    "memory": (
        lambda: diffusion_of().p_sample_loop(Net(), X.shape, X, memory="chekpoint"),
        r"memory must be one of .*checkpoint.*store.*did you mean 'checkpoint'",
    ),
    "eta": (lambda: diffusion_of().ddim_sample(Net(), X, T, eta=1.5), "eta must be at most 1"),
    "eta of a loop": (
        lambda: diffusion_of().ddim_sample_loop_progressive(Net(), X.shape, X, eta=-1),
        "eta must be a finite number of at least 0",
    ),
    "eta backwards": (
        lambda: diffusion_of().ddim_reverse_sample(Net(), X, T, eta=0.5),
        "eta must be 0, as only the deterministic path",
    ),
    "sections that do not fit": (lambda: gd.space_timesteps(10, "11"), "respace: counts"),
    "schedule": (lambda: gd.get_named_beta_schedule("sine", 100), "one of cosine, linear"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case):
    wrong, message = BAD[case]
    with pytest.raises((ValueError, TypeError), match=message):
        wrong()


# Step maps in general.


@memories
def test_any_step_map(memory):
    x, shift, weight = leaf(normal(3, 4)), leaf(normal(4, seed=1)), leaf(normal(4, seed=2))

    def step(x, i, shift):
        return (x * torch.sigmoid(weight) + (i + 1) * shift).clamp(-2, 2).sin()

    expected = x
    for i in range(5):
        expected = step(expected, i, shift)
    got = iterate(step, x, 5, memory=memory, cond={"shift": shift})
    assert_same(got, expected, [x, shift, weight], 1e-12)


def test_what_a_callback_sees_of_a_step_map():
    seen = []
    x = torch.tensor([[1.0]])
    assert iterate(lambda x, i: x + i, x, 3, callback=seen.append).item() == 4
    assert [(info.step, info.num_steps, info.sigma) for info in seen] == [
        (0, 3, 0.0),
        (1, 3, 1.0),
        (2, 3, 2.0),
    ]
    assert [(info.x.item(), info.denoised.item()) for info in seen] == [(1, 1), (1, 2), (2, 4)]


def test_bad_step_maps():
    x = torch.ones(1, 2)
    with pytest.raises(TypeError, match="step must be callable"):
        iterate(None, x, 2)
    with pytest.raises(ValueError, match="num_steps must be at least 1"):
        iterate(lambda x, i: x, x, 0)
    with pytest.raises(ValueError, match=r"state must have shape \[B, \*state\]"):
        iterate(lambda x, i: x, torch.ones(2), 1)
    with pytest.raises(ValueError, match=r"at step 0 must have shape \[1, 2\]"):
        iterate(lambda x, i: x[:, :1], x, 1)
    with pytest.raises(gs.NonFiniteError, match="step 1 of 2"):
        iterate(lambda x, i: x / torch.tensor(1 - i), x, 2, check_finite=True)


# The documents.

DOCS = Path(__file__).parents[1] / "docs"


def code_of(page):
    return re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.S | re.M)


def stand_in(monkeypatch):
    """Modules named as upstream's, whose functions make the stand-ins above."""

    def create_gaussian_diffusion(*, steps, learn_sigma, timestep_respacing):
        variance = "learned_range" if learn_sigma else "fixed_large"
        scale = 1000 / steps
        betas = np.linspace(scale * 0.0001, scale * 0.02, steps).tolist()
        count = int(timestep_respacing)
        kept = [round(k * (steps - 1) / (count - 1)) for k in range(count)]
        return upstream("epsilon", variance, kept=kept, betas=betas)

    package = types.ModuleType("guided_diffusion")
    script_util = types.ModuleType("guided_diffusion.script_util")
    script_util.create_gaussian_diffusion = create_gaussian_diffusion
    monkeypatch.setitem(sys.modules, "guided_diffusion", package)
    monkeypatch.setitem(sys.modules, "guided_diffusion.script_util", script_util)


def run_document(page, monkeypatch):
    """Executes the blocks of a page in order; they hold their own assertions."""
    stand_in(monkeypatch)
    torch.manual_seed(0)
    names = {"__name__": "document"}
    blocks = code_of(page)
    assert len(blocks) >= 6
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    return names


def test_guided_diffusion_page(monkeypatch):
    names = run_document("guided-diffusion.md", monkeypatch)
    assert names["same"].timestep_map == names["diffusion"].timestep_map
    np.testing.assert_allclose(names["same"].betas, names["diffusion"].betas, rtol=1e-9)
    assert all(gradient.abs().sum() > 0 for gradient in names["gradients"])


def test_reparameterization_page(monkeypatch):
    run_document("reparameterization.md", monkeypatch)
