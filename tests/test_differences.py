# SPDX-License-Identifier: Apache-2.0
"""Central differences beside autograd: right where the derivative is known, and of a verdict that
holds for backwards that are wrong on purpose.
"""

import math
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradsampler as gs
from gradsampler.differences import Ladder, Point
from support.problems import normal

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
SIGMAS = [8.0, 2.5, 0.8, 0.2]
dtypes = pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=["float64", "float32", "bfloat16"])


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Scaled(torch.autograd.Function):
    """The identity, with a backward that is off by a factor."""

    @staticmethod
    def forward(ctx, x, factor):
        ctx.factor = factor
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return ctx.factor * g, None


# ------------------------------------------------------------------ one map


def compared(f, x, seed=0):
    """Autograd beside differences, along one direction, for two cotangents; and the exact value."""
    generator = torch.Generator().manual_seed(seed)
    v = torch.randn(x.shape, generator=generator, dtype=F64) * x.double().square().mean().sqrt()

    def at(h):
        moved = (x.double() + h * v).to(x.dtype)
        with torch.no_grad():
            return Point([f(moved)], [moved])

    ladder = Ladder(at, torch.finfo(x.dtype).eps)
    leaf = x.detach().clone().requires_grad_()
    y = f(leaf)
    crossed = torch.randn(y.numel(), generator=generator, dtype=F64)
    ws = [w / w.norm() for w in (ladder.direction, crossed)]
    pulled = [
        torch.autograd.grad(y, [leaf], w.view(y.shape).to(y.dtype), retain_graph=True) for w in ws
    ]
    return ladder.compare(ws, pulled), ws, v


def softmax(x):
    return F.softmax(3 * x, -1)


SMOOTH = {  # and J v in closed form
    "sine": (torch.sin, lambda x, v: torch.cos(x) * v),
    "cubes": (
        lambda x: x**3 - 2 * x.flip(-1) ** 2,
        lambda x, v: 3 * x**2 * v - 4 * (x * v).flip(-1),
    ),
    "softmax": (
        softmax,
        lambda x, v: 3 * softmax(x) * (v - (softmax(x) * v).sum(-1, keepdim=True)),
    ),
    "steep": (lambda x: torch.tanh(20 * x), lambda x, v: 20 / torch.cosh(20 * x) ** 2 * v),
    "linear": (lambda x: 3 * x, lambda x, v: 3 * v),
    "kinks": (lambda x: F.leaky_relu(x - 1, 0.3), lambda x, v: torch.where(x > 1, v, 0.3 * v)),
}


@pytest.mark.parametrize(("f", "tangent"), SMOOTH.values(), ids=SMOOTH)
@pytest.mark.parametrize("dtype", [F64, F32], ids=["float64", "float32"])
def test_differences_are_off_by_no_more_than_they_say(f, tangent, dtype):
    x = normal(5, 7, seed=3).to(dtype)
    for seed in range(5):
        found, ws, v = compared(f, x, seed)
        for comparison, w in zip(found, ws, strict=True):
            exact = float(w @ tangent(x.double(), v).flatten())
            rounded = 1e-6 * comparison.scale if dtype == F32 else 0.0  # of the direction itself
            assert abs(comparison.difference - exact) <= comparison.uncertainty + rounded
            assert comparison.uncertainty < (1e-8 if dtype == F64 else 2e-3) * comparison.scale
            assert comparison.agrees
            assert not comparison.blind


def test_a_kink_at_the_point_is_doubted():
    """Where the slopes ahead and behind differ, autograd's is one of them and the quotient both."""
    x = 2 + normal(1, 40).abs()
    x[0, 3] = x[0, 20] = 1.0
    (found, _), _, _ = compared(lambda x: 5 * torch.relu(x - 1), x)
    assert found.error > 1e-3
    assert found.agrees
    x[0, 3] = x[0, 20] = 1.5
    (found, _), _, _ = compared(lambda x: 5 * torch.relu(x - 1), x)
    assert found.error < 1e-10
    assert found.tolerance < 1.1e-6


def test_a_map_that_is_constant_agrees_with_no_gradient_alone():
    x = normal(3, 4)
    (_, crossed), _, _ = compared(lambda x: 0 * x + 1, x)
    assert crossed.agrees
    assert crossed.error == 0
    (_, crossed), _, _ = compared(lambda x: torch.ones_like(x) + x - x.detach(), x)
    assert not crossed.agrees


def test_a_step_that_is_too_large_or_too_small_is_passed_over():
    """The best is about where the error of a plain quotient has its minimum, by the true value."""

    def f(x):
        return torch.sin(4 * x)

    x = normal(40, seed=1).float()
    (found, _), (w, _), v = compared(f, x)
    exact = float(w @ (4 * torch.cos(4 * x.double()) * v))

    def error(h):
        up, down = (f((x.double() + s * h * v).float()).double() for s in (1, -1))
        return abs(float(w @ (up - down)) / (2 * h) - exact)

    plain = min(error(2.0**-k) for k in range(1, 22))
    assert abs(found.difference - exact) < 3 * plain
    assert abs(found.difference - exact) < 0.01 * min(error(0.5), error(2.0**-21))


def attention_network():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(16)
            self.attend = nn.MultiheadAttention(16, 2, batch_first=True)
            self.rest = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

        def forward(self, x):
            y = self.norm(x)
            x = x + self.attend(y, y, y, need_weights=False)[0]
            return x + self.rest(self.norm(x))

    return nn.Sequential(Block(), Block()), (8, 24, 16)


def convolutions():
    layers = [nn.Conv2d(2, 12, 3, padding=1), nn.GroupNorm(3, 12), nn.SiLU()]
    layers += [nn.Conv2d(12, 12, 3, padding=1), nn.GroupNorm(3, 12), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(12, 2, 3, padding=1)), (2, 2, 16, 16)


def kinks():
    return nn.Sequential(nn.Linear(16, 48), nn.ReLU(), nn.Linear(48, 16)), (64, 16)


def smooth():
    return nn.Sequential(nn.Linear(16, 48), nn.Tanh(), nn.Linear(48, 16)), (64, 16)


NETWORKS = [attention_network, convolutions, kinks, smooth]


@pytest.mark.parametrize("make", NETWORKS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_rounding_is_no_wrong_backward_and_two_per_cent_are(make, dtype):
    torch.manual_seed(0)
    network, shape = make()
    network = network.to(dtype)
    x, sharp = normal(*shape, seed=2).to(dtype), 0
    for seed in range(4):
        honest, _, _ = compared(network, x, seed)
        assert honest[0].agrees
        assert honest[1].agrees
        assert not honest[0].blind
        (off, _), _, _ = compared(lambda x: network(Scaled.apply(x, 1.02)), x, seed)
        # What can be seen is told: in low precision a step so small as kinks need is all rounding.
        assert off.agrees == (off.tolerance > off.error)
        assert off.autograd / off.difference == pytest.approx(1.02, abs=max(off.tolerance, 1e-4))
        sharp += not off.agrees
    assert sharp == 4 or (dtype in (BF16, F16) and make in (kinks, convolutions))


def test_low_precision_hidden_inside_is_seen_by_its_rounding():
    torch.manual_seed(0)
    network, shape = attention_network()
    network = network.bfloat16()

    def hiding(factor):
        return lambda x: network(Scaled.apply(x, factor).bfloat16()).to(x.dtype)

    x = normal(*shape, seed=2)
    (honest, _), _, _ = compared(hiding(1.0), x)
    assert honest.precision > 1e-4
    assert honest.agrees
    (off, _), _, _ = compared(hiding(1.02), x)
    assert not off.agrees


# ------------------------------------------------------------------ backwards that are wrong


class Network(nn.Module):
    """A denoiser of tokens [B, 24, 16] in a dtype of its own, from and to that of the state."""

    def __init__(self, dtype, wrong=lambda x, sigma: x, attend=None):
        super().__init__()
        torch.manual_seed(0)
        self.into, self.out = nn.Linear(16, 48), nn.Linear(48, 16)
        self.wrong, self.attend = wrong, attend
        self.to(dtype)

    def forward(self, x, sigma):
        y = self.wrong((x / (1 + sigma.view(-1, 1, 1)) ** 0.5).to(self.into.weight.dtype), sigma)
        if self.attend is not None:
            y = y + self.attend(y)
        return self.out(torch.tanh(self.into(y))).to(x.dtype)


def ring(x, backward_of_each_chunk, ranks=4):
    """Attention in chunks of tokens, as on so many devices, each of which sees all in turn."""
    return RingAttention.apply(x, x, x, backward_of_each_chunk, ranks)


class RingAttention(torch.autograd.Function):
    """Softmax attention whose backward goes over the chunks of keys and values, one by one.

    With ``right`` False it reads in each turn the chunk that its own device started with, and so
    passes on gradients that belong to other keys and values.
    """

    @staticmethod
    def forward(ctx, q, k, v, right, ranks):
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        lse = torch.logsumexp(scores.float() if q.dtype in (BF16, F16) else scores, -1, True)
        out = (scores - lse).exp().to(v.dtype) @ v
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.right, ctx.ranks = right, ranks
        return out

    @staticmethod
    def backward(ctx, g):
        q, k, v, out, lse = ctx.saved_tensors
        scale, ranks = 1 / math.sqrt(q.shape[-1]), ctx.ranks
        qs, ks, vs, gs_, lses = (x.chunk(ranks, 1) for x in (q, k, v, g, lse))
        deltas = (g * out).sum(-1, keepdim=True).chunk(ranks, 1)
        dq, dk, dv = ([torch.zeros_like(x) for x in parts] for parts in (qs, ks, vs))
        for rank in range(ranks):
            for turn in range(ranks):
                seen = (rank + turn) % ranks
                held = seen if ctx.right else rank
                p = (qs[rank] @ ks[held].transpose(1, 2) * scale - lses[rank]).exp().to(q.dtype)
                ds = p * (gs_[rank] @ vs[held].transpose(1, 2) - deltas[rank]) * scale
                dq[rank] += ds @ ks[held]
                dk[seen] += ds.transpose(1, 2) @ qs[rank]
                dv[seen] += p.transpose(1, 2) @ gs_[rank]
        return torch.cat(dq, 1), torch.cat(dk, 1), torch.cat(dv, 1), None, None


def mixed(x, _):
    return Mixed.apply(x)


class Mixed(torch.autograd.Function):
    """The identity, whose backward hands each sample the gradient of another."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g.roll(1, 0)


def at_one_level(x, sigma):
    return Scaled.apply(x, 1.02) if 1 < float(sigma[0]) < 5 else x


EVERYWHERE = {
    "two per cent": {"wrong": lambda x, sigma: Scaled.apply(x, 1.02)},
    "a sign": {"wrong": lambda x, sigma: Scaled.apply(x, -1.0)},
    "nothing": {"wrong": lambda x, sigma: Scaled.apply(x, 0.0)},
    "half detached": {"wrong": lambda x, sigma: 0.5 * (x + x.detach())},
    "samples mixed": {"wrong": mixed},
    "stale chunks of a ring": {"attend": lambda x: ring(x, False)},
}


def start(dtype=F32, shape=(4, 24, 16)):
    dtype = F64 if dtype == F64 else F32
    return normal(*shape, seed=1).to(dtype).requires_grad_()


@pytest.mark.parametrize("wrong", EVERYWHERE.values(), ids=EVERYWHERE)
@dtypes
def test_a_wrong_backward_is_found(wrong, dtype):
    report = gs.check(Network(dtype, **wrong), start(dtype), SIGMAS)
    assert not report.passed
    (link,) = report.broken
    assert link.startswith("a wrong backward of the denoiser at every step: autograd gives")
    assert {each.step for each in report.differences if each.wrong and each.of == "x"} == {0, 1, 2}
    assert "arrives" not in str(report)


@dtypes
def test_the_step_that_breaks_the_run_is_named(dtype):
    report = gs.check(Network(dtype, at_one_level), start(dtype), SIGMAS)
    (link,) = report.broken
    assert link.startswith("a wrong backward of the denoiser at step 1 of 3 (sigma = 2.5): ")
    (off,) = [each for each in report.differences if each.wrong and each.step is not None]
    assert (off.step, off.sigma) == (1, 2.5)
    factor = off.comparison.autograd / off.comparison.difference
    assert factor == pytest.approx(1.02, abs=0.005)
    said = re.findall(r"autograd gives (\S+), the central difference (\S+), off by (\S+) ", link)
    assert [float(x) for x in said[0]] == pytest.approx(
        [off.comparison.autograd, off.comparison.difference, off.comparison.error], rel=0.05
    )


HONEST = {
    "plain": {},
    "ring": {"attend": lambda x: ring(x, True)},
    "kinks": {"wrong": lambda x, sigma: F.leaky_relu(x, 0.2)},
}


@pytest.mark.parametrize("honest", HONEST.values(), ids=HONEST)
@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16], ids=str)
def test_where_only_rounding_differs_nothing_is_wrong(honest, dtype):
    for seed in range(2):
        report = gs.check(Network(dtype, **honest), start(dtype), SIGMAS, seed=seed)
        assert report.passed, report.broken
        assert len(report.lines) == 6
        assert not any(each.wrong for each in report.differences)
        calls = [each.comparison for each in report.differences if each.of == "x"]
        assert not any(comparison.blind for comparison in calls)
    precision = max(each.comparison.precision for each in report.differences)
    assert (precision > 1e-4) == (dtype in (BF16, F16)) or "kinks" in honest


@pytest.mark.thorough
@pytest.mark.parametrize("seed", range(24))
def test_an_honest_network_is_never_called_wrong(seed):
    for dtype in (F64, F32, BF16, F16):
        torch.manual_seed(seed)
        network, shape = NETWORKS[seed % len(NETWORKS)]()
        network = network.to(dtype)
        report = gs.check(
            lambda x, sigma: network((x / (1 + sigma[0])).to(dtype)).to(x.dtype),  # noqa: B023
            normal(*shape, seed=seed).to(F64 if dtype == F64 else F32).requires_grad_(),
            SIGMAS,
            seed=seed,
        )
        assert report.passed, (dtype, report.broken)


# ------------------------------------------------------------------ parameters and conditioning


class OffWeights(torch.autograd.Function):
    """x W, with a gradient to W that is off by a factor, and the right one to x."""

    @staticmethod
    def forward(ctx, x, w, factor):
        ctx.save_for_backward(x, w)
        ctx.factor = factor
        return x @ w

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w.T, ctx.factor * (x.flatten(0, -2).T @ g.flatten(0, -2)), None


def linear(factor):
    weight = nn.Parameter(0.3 * normal(16, 16, seed=4))  # hidden in a closure
    return lambda x, sigma: torch.tanh(OffWeights.apply(x / (1 + sigma[0]), weight, factor))


def shifted(factor):
    def denoiser(x, sigma, shift, name):
        assert name == ["kept", 1]
        return torch.tanh(x + OffWeights.apply(shift["s"], torch.eye(16).double(), 1.0) * factor)

    return denoiser


def test_parameters_are_compared_on_request():
    z0 = start(F64)
    for factor, also, passed in [(1.02, [], True), (1.02, ["parameters"], False)]:
        assert gs.check(linear(factor), z0, SIGMAS, also=also).passed == passed
    report = gs.check(linear(1.02), z0, SIGMAS, also=["parameters"])
    (link,) = report.broken
    assert link.startswith("a wrong backward of the denoiser to its parameters at every step")
    report = gs.check(linear(1.0), z0, SIGMAS, also=("parameters",))
    assert report.passed, report.broken
    assert "along parameters autograd" in report.lines[5]
    run = [each.of for each in report.differences if each.step is None]
    assert run == ["z0", "parameters"]


def test_conditioning_is_compared_on_request():
    def denoiser(factor):
        def called(x, sigma, parts, label):
            assert label.dtype == torch.int64
            return torch.tanh(x / (1 + sigma[0]) + Scaled.apply(parts[0]["c"], factor))

        return called

    cond = {"parts": [{"c": normal(16)}], "label": torch.tensor([3])}
    for factor in (1.0, 1.02):
        report = gs.check(denoiser(factor), start(F64), SIGMAS, also=["cond"], cond=cond)
        assert report.passed == (factor == 1.0), report.broken
        assert "along cond autograd" in report.lines[5]
    (link,) = report.broken
    assert link.startswith("a wrong backward of the denoiser to cond at every step")
    assert gs.check(denoiser(1.02), start(F64), SIGMAS, cond=cond).passed
    assert not cond["parts"][0]["c"].requires_grad


# ------------------------------------------------------------------ noise, and the run as a whole


class OffNoise(gs.noise.NoiseSource):
    """z0 turned round, with a transpose written by hand."""

    def __init__(self, factor):
        self.factor = factor

    def at(self, z0, step, num_steps):
        return torch.cos(z0.flip(-1) + step)

    def transpose(self, g, z0, step, num_steps):
        factor = self.factor if step == 1 else 1.0
        slope = -torch.sin(z0.flip(-1) + step)
        return gs.noise.sources.Cotangent(factor * (slope * g).flip(-1), {})


def test_a_noise_with_a_transpose_that_is_not_its_own_is_named():
    for factor in (1.0, 1.02):
        report = gs.check(
            Network(F64),
            start(F64),
            SIGMAS,
            noise=OffNoise(factor),
            churn=gs.Churn(1.0),
            memory="checkpoint",
        )
        assert report.passed == (factor == 1.0), report.broken
        assert "3 noises, the worst off by" in report.lines[5]
    (link,) = report.broken
    assert link.startswith("a noise whose transpose is not that of its at at step 1 of 3: ")


@pytest.mark.filterwarnings("ignore:.*truncated")
def test_a_gradient_that_is_not_the_run_s_says_so():
    settings = {"memory": "truncated:2", "churn": gs.Churn(1.0)}
    report = gs.check(Network(F64), start(F64), SIGMAS, **settings)
    (link,) = report.broken
    assert link.startswith("the gradient of the run to z0, which memory= says not to be: ")
    assert not any(each.wrong for each in report.differences if each.step is not None)


SETTINGS = {
    "heun": {"solver": "heun"},
    "ancestral": {"solver": "euler_ancestral"},
    "mixture": {
        "noise": gs.noise.Mixture(gs.noise.SignedRoll(2), 0.6),
        "churn": gs.Churn(1.0),
        "solver": "res_2ab",
    },
    "store": {"memory": "store"},
    "revolve": {"memory": "revolve:1"},
    "reversible": {"solver": "midpoint_reversible", "memory": "reversible"},
    "final": {"final_denoise": True},
    "loss": {"loss": lambda x: x.sin().sum()},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_right_gradient_is_right_whatever_the_run(settings):
    report = gs.check(Network(F64), start(F64), SIGMAS, directions=2, **settings)
    assert report.passed, report.broken
    runs = [each.comparison for each in report.differences if each.step is None]
    assert len(runs) == 2
    assert all(each.error < 1e-7 for each in runs)
    assert runs[0].autograd != runs[1].autograd


def wrapped():
    def network(x, level, scale=1.0):
        return 0.5 * torch.tanh(x * scale) + level.view(-1, 1, 1) * 1e-3

    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=F64), 0)
    return {
        "EDM": gs.EDM(network),
        "VP": gs.VP(network, alphas),
        "Flow": gs.Flow(network),
        "Guided": gs.Guided(gs.EDM(network), 3.0, {"scale": 0.5}),
    }


@pytest.mark.parametrize("name", wrapped())
def test_wrapped_networks_are_compared(name):
    report = gs.check(wrapped()[name], start(F64), SIGMAS)
    assert report.passed, report.broken
    assert len([each for each in report.differences if each.of == "x"]) == 3


# ------------------------------------------------------------------ what it leaves alone


def test_a_network_that_draws_and_counts_is_left_as_a_run_leaves_it():
    def network():
        torch.manual_seed(0)
        layers = [nn.Linear(16, 32), nn.BatchNorm1d(24), nn.Dropout(0.3), nn.SiLU()]
        return nn.Sequential(*layers, nn.Linear(32, 16)).double().train()

    def state(net):
        return {k: v.clone() for k, v in net.state_dict().items()}

    checked, z0 = network(), start(F64)
    kept = z0.detach().clone()
    torch.manual_seed(5)
    report = gs.check(lambda x, sigma: checked(x), z0, SIGMAS, also=["parameters"])
    after = torch.get_rng_state()
    assert report.passed, report.broken
    plain = network()
    torch.manual_seed(5)
    x = gs.sample(lambda x, sigma: plain(x), z0, SIGMAS)
    torch.autograd.grad(x.sum(), z0)
    assert torch.equal(torch.get_rng_state(), after)
    wanted = state(plain)
    assert all(torch.equal(value, wanted[name]) for name, value in state(checked).items())
    assert torch.equal(z0, kept)
    assert z0.grad is None
    assert all(p.grad is None for p in checked.parameters())


def test_a_generator_of_its_own_draws_the_same_for_every_difference():
    generator = torch.Generator().manual_seed(3)

    def denoiser(x, sigma):
        return torch.tanh(x) * (1 + 0.3 * torch.rand(x.shape, generator=generator, dtype=x.dtype))

    assert gs.check(denoiser, start(F64), SIGMAS, memory="checkpoint").passed


def test_no_differences_where_none_are_asked_for():
    calls = []

    def denoiser(x, sigma):
        calls.append(1)
        return torch.tanh(x)

    report = gs.check(denoiser, start(F64), SIGMAS, directions=0, memory="store")
    assert len(report.lines) == 5
    assert report.differences == []
    assert len(calls) == 3


def test_the_seed_is_that_of_the_directions():
    def derivatives(seed):
        report = gs.check(Network(F64), start(F64), SIGMAS, seed=seed)
        return [each.comparison.autograd for each in report.differences]

    assert derivatives(1) == derivatives(1)
    assert derivatives(1) != derivatives(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"directions": -1}, "directions must be at least 0, got -1"),
        ({"directions": 1.5}, "directions must be an int, got float"),
        ({"also": "parameters"}, "also must be a list of cond, parameters, got 'parameters'"),
        ({"also": ["weights"]}, "also must be a list of cond, parameters, got ['weights']"),
        ({"loss": 1.0}, "loss must be callable as loss(sample), got float"),
        ({"z0": torch.zeros(3)}, "z0 must have shape"),
        ({"sigmas": [1.0, 2.0]}, "sigmas must decrease strictly"),
        ({"solver": "eulr"}, "solver must be one of"),
        ({"memory": "chekpoint"}, "memory must be one of"),
    ],
    ids=lambda value: ",".join(map(str, value)) if isinstance(value, dict) else None,
)
def test_names_the_argument_that_does_not_fit(options, message):
    arguments = {"denoiser": torch.tanh, "z0": start(F64), "sigmas": SIGMAS} | options
    calls = []
    arguments["denoiser"] = lambda x, sigma: calls.append(1) or x
    with pytest.raises((ValueError, TypeError), match=f"^{re.escape(message)}"):
        gs.check(**arguments)
    assert calls == []


def test_the_page_runs():
    """docs/wrong-gradients.md: its own wrong kernel is found, at the step that it is used in."""
    page = (Path(__file__).parents[1] / "docs" / "wrong-gradients.md").read_text()
    space = {}
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(code, "wrong-gradients.md", "exec"), space)
    assert "a wrong backward of the denoiser at step 1 of 3" in str(space["report"])
    ratios = [
        (step, round(ratio, 2))
        for step, ratio in (
            (e.step, e.comparison.autograd / e.comparison.difference) for e in space["off"]
        )
    ]
    assert ratios == [(1, 1.02)] * len(ratios) != []
