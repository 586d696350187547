# SPDX-License-Identifier: Apache-2.0
"""The solver midpoint_reversible and memory="reversible", which undoes its steps.

Samples are compared with closed forms, gradients with plain autograd (memory="store", itself tested
against loops) and central differences. That an integer state comes back is seen by writing down
each of them on the way forward. The solver's own loop is in test_solvers.py.
"""

import math
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import gradsampler as gs
from gradsampler import memory as memories
from gradsampler import models
from gradsampler.integrations.cosmos import Sampler
from gradsampler.integrations.guided_diffusion import GaussianDiffusion
from gradsampler.iteration import iterate
from gradsampler.memory import Reversible, reversible
from gradsampler.memory.planning.gauge import Live
from gradsampler.repetition import ReplayError
from support.alive import no_collector
from support.gradients import assert_close, check, gradients
from support.networks import Net
from support.noises import KINDS, injections, make_noise
from support.problems import Gaussian, Mixture, normal
from support.runs import ABAR, leaf, levels
from support.tiers import few, pairs

SOLVER = "midpoint_reversible"
SIGMAS = gs.schedules.karras(7, sigma_min=0.05, sigma_max=9.0)
SHORT = torch.linspace(3.0, 0.5, 8, dtype=torch.float64)  # of a range that 32 bits hold
TIMES = torch.linspace(0.98, 0.05, 7, dtype=torch.float64)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
CHURNS = {
    "all": gs.Churn(2.0),
    "capped": gs.Churn(40.0, s_noise=0.8),
    "first-steps": gs.Churn(2.0, s_tmin=1.0),
    "last-steps": gs.Churn(2.0, s_tmax=1.0),
    "middle": gs.Churn(2.0, s_tmin=0.2, s_tmax=4.0, s_noise=1.1),
}


def run(denoiser, z0, sigmas=SIGMAS, memory="reversible", **options):
    return gs.sample(denoiser, z0, sigmas, solver=SOLVER, memory=memory, **options)


def assert_as_stored(inputs, sample, tolerance=1e-12):
    """``sample(memory)`` and its gradients are those of plain autograd."""
    expected, got = sample("store"), sample("reversible")
    assert got.dtype == expected.dtype
    assert_close(got.detach(), expected.detach(), tolerance, "sample")
    pairs = zip(gradients(got, inputs), gradients(expected, inputs), strict=True)
    for k, (g, w) in enumerate(pairs):
        assert g.dtype == w.dtype
        assert_close(g, w, tolerance, f"gradient {k}")


# The method, on closed forms.

GAUSSIAN = Gaussian(0.3, 0.5)


def error(solver, calls, *, final):
    """Largest error at the end of the VE ODE, with that many evaluations."""
    steps = calls // 2 if solver == "heun" else calls
    # Where the last step ends at level 0 it must shrink with the others.
    smallest = 2.0 / calls if final == "zero" else 0.02
    sigmas = gs.schedules.karras(steps, sigma_min=smallest, sigma_max=20.0, final=final)
    z0 = normal(64, 1)
    x = gs.sample(GAUSSIAN.denoise, z0, sigmas, solver=solver)
    return (x - GAUSSIAN.ode(20.0 * z0, 20.0, sigmas[-1].item())).abs().max().item()


@pytest.mark.parametrize("final", ["sigma_min", "zero"])
def test_second_order(final):
    errors = [error(SOLVER, calls, final=final) for calls in (64, 128, 256)]
    assert all(3.3 < a / b < 4.7 for a, b in pairwise(errors)), errors


@pytest.mark.parametrize("end", [0.02, 0.0])
def test_second_order_in_flow_time(end):
    z0, errors = normal(64, 1), []
    for steps in (64, 128, 256):
        times = torch.linspace(1, end, steps + 1, dtype=torch.float64)
        x = run(GAUSSIAN.velocity, z0, times, prediction="flow")
        errors.append((x - GAUSSIAN.flow_ode(z0, 1.0, end)).abs().max().item())
    assert all(3.3 < a / b < 4.7 for a, b in pairwise(errors)), errors


@pytest.mark.parametrize("calls", [32, 128])
def test_error_at_equal_evaluations(calls):
    ours, heun, multistep = (
        error(s, calls, final="sigma_min") for s in (SOLVER, "heun", "dpmpp_2m")
    )
    assert ours < 0.4 * heun
    assert ours < 1.5 * multistep


@pytest.mark.thorough
@pytest.mark.parametrize("calls", [32, 128])
def test_error_on_digits(calls):
    network = models.load_network().double()
    denoiser = gs.EDM(network, network.sigma_data)
    cond, z0 = {"label": torch.arange(6)}, normal(6, 1, 8, 8)

    @torch.no_grad()
    def sample(solver, calls):
        sigmas = gs.schedules.karras(calls // 2 if solver == "heun" else calls)
        return gs.sample(denoiser, z0, sigmas, solver=solver, cond=cond)

    exact = sample("heun", 600)
    ours, heun, multistep = (
        (sample(s, calls) - exact).flatten(1).norm(dim=1).median()
        for s in (SOLVER, "heun", "dpmpp_2m")
    )
    assert ours < 0.5 * heun
    assert ours < 1.5 * multistep


class Labelled(Mixture):
    """A mixture whose blobs are classes: a label asks for one of them, -1 for any."""

    def denoise_class(self, x, sigma, label):
        s = sigma.view(-1, 1)
        own = (self.std**2 * x + s**2 * self.centres[label]) / (self.std**2 + s**2)
        return torch.where((label < 0)[:, None], self.denoise(x, sigma), own)


@pytest.mark.parametrize("scale", [1.0, 3.0, 7.5, 15.0])
def test_stable_under_guidance(scale):
    problem, z0, label = Labelled(6, blobs=8), normal(64, 6, seed=5), torch.arange(64) % 8
    guided = gs.Guided(problem.denoise_class, scale, {"label": torch.full((64,), -1)})

    @torch.no_grad()
    def sample(solver, steps):
        sigmas = gs.schedules.karras(steps, sigma_min=0.02)
        return gs.sample(guided, z0, sigmas, solver=solver, cond={"label": label})

    exact = sample("heun", 300)
    for calls, allowed in ((32, 0.2), (128, 0.02)):
        x = sample(SOLVER, calls)
        # Without growth of what leapfrog adds to the solution, no sample is farther out.
        assert x.abs().max() < 1.2 * exact.abs().max()
        errors = (x - exact).norm(dim=1) / exact.norm(dim=1)
        assert errors.median() < allowed
        assert errors.max() < 5 * allowed


@pytest.mark.parametrize("kind", ["philox", "signed_roll"])
@pytest.mark.parametrize("eta", [0.0, 0.05, math.sqrt(1.2) - 1])
def test_spread_under_churn(eta, kind):
    """0.99 to 1.00 of the data's, which 10^5 numbers show to 0.002, up to Cosmos's cap."""
    churn = gs.Churn(100 * eta) if eta else None
    z0 = normal(100, 1000, seed=3, dtype=torch.float32)
    source = make_noise(kind, 100, z0)[0] if eta else None
    with torch.no_grad():
        x = run(
            Gaussian().denoise, z0, gs.schedules.karras(100), "store", churn=churn, noise=source
        )
    assert 0.988 < x.double().std() / 0.5 < 1.002


# Gradients.


@pairs(kind=KINDS, churned=CHURNS)
def test_every_target_under_churn(kind, churned):
    z0, sigmas, shift, net = leaf(normal(2, 3)), leaf(SIGMAS), leaf(normal(3)), Net()
    churn = CHURNS[churned]
    count = injections(z0.detach(), SIGMAS, solver=SOLVER, churn=churn)
    assert count > 0
    noise, tensors = make_noise(kind, count, z0)
    options = {"noise": noise, "churn": churn, "cond": {"shift": shift}}
    inputs = [z0, sigmas, shift, *net.parameters(), *tensors]
    assert_as_stored(inputs, lambda memory: run(net, z0, sigmas, memory, **options))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_target_under_ancestral_noise(dtype, kind):
    z0, shift, net = leaf(normal(2, 3, dtype=dtype)), leaf(normal(3, dtype=dtype)), Net(3, dtype)
    noise, tensors = make_noise(kind, 7, z0)
    options = {"noise": noise, "eta": 0.7, "s_noise": 1.1, "cond": {"shift": shift}}
    inputs = [z0, shift, *net.parameters(), *tensors]
    # The network takes the sine of states up to 30, which float32 rounds by 2e-6.
    tolerance = 1e-12 if dtype == torch.float64 else 4e-6
    assert_as_stored(inputs, lambda memory: run(net, z0, SIGMAS, memory, **options), tolerance)


class Bent(gs.noise.NoiseSource):
    """A source that only its own code knows."""

    def at(self, z0, step, num_steps):
        return torch.tanh(z0 * (1 + step / num_steps))


@pytest.mark.parametrize("final", [0.3, 0.0], ids=["to-sigma_min", "to-zero"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_source_of_the_users_own(dtype, final):
    z0, net = leaf(normal(2, 3, dtype=dtype)), Net(3, dtype)
    sigmas = torch.cat([SHORT, levels([final])])
    options = {"noise": Bent(), "churn": gs.Churn(1.5)}
    inputs = [z0, *net.parameters()]
    assert_as_stored(
        inputs, lambda memory: run(net, z0, sigmas, memory, **options), TOLERANCE[dtype]
    )


MODELS = {
    "epsilon": lambda net: (net, {"prediction": "epsilon"}),
    "v": lambda net: (net, {"prediction": "v"}),
    "EDM": lambda net: (gs.EDM(net), {}),
    "VP": lambda net: (gs.VP(net, ABAR, prediction="v"), {}),
    "Flow": lambda net: (gs.Flow(net), {}),
    "flow-time": lambda net: (net, {"prediction": "flow", "sigmas": TIMES}),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("final_denoise", [False, True], ids=["", "final_denoise"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_prediction(dtype, final_denoise, name):
    z0, net = leaf(normal(2, 3, dtype=dtype)), Net(3, dtype)
    denoiser, options = MODELS[name](net)
    sigmas = leaf(options.pop("sigmas", SIGMAS))
    options |= {"final_denoise": final_denoise}
    inputs = [z0, *net.parameters(), *([sigmas] if dtype == torch.float64 else [])]
    # The loss is the sine of samples up to 20: in float32 both are off from float64 by 4e-6.
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert_as_stored(inputs, lambda memory: run(denoiser, z0, sigmas, memory, **options), tolerance)


def test_guidance_and_its_scale():
    z0, shift, net = leaf(normal(2, 3)), leaf(normal(3)), Net()
    scale = leaf(torch.tensor(4.0, dtype=torch.float64))
    guided = gs.Guided(net, scale, {"shift": torch.zeros(3, dtype=torch.float64)})
    options = {"cond": {"shift": shift}, "churn": gs.Churn(1.0)}
    inputs = [z0, shift, scale, *net.parameters()]
    assert_as_stored(inputs, lambda memory: run(guided, z0, SIGMAS, memory, **options))


@pairs(final=[0.4, 0.0], kind=KINDS)
def test_central_differences(final, kind):
    z0, upper, shift, net = leaf(normal(2, 3)), leaf(SHORT[::2]), leaf(normal(3)), Net()
    noise, tensors = make_noise(kind, 4, z0)

    def sample():
        options = {"noise": noise, "churn": gs.Churn(0.9), "cond": {"shift": shift}}
        return run(net, z0, torch.cat([upper, levels([final])]), **options)

    check(sample, z0, upper, shift, net.weight, net.bias, *tensors, whole=True)


@pytest.mark.parametrize("sigmas", [SHORT, SIGMAS], ids=["32-bits", "64-bits"])
def test_of_conditioning_alone(sigmas):
    z0, shift = normal(2, 3), leaf(normal(3))
    for parameter in (net := Net()).parameters():
        parameter.requires_grad_(False)
    assert_as_stored([shift], lambda memory: run(net, z0, sigmas, memory, cond={"shift": shift}))
    assert not run(net, z0).requires_grad


@pytest.mark.parametrize("steps", [1, 2, 3])
@pytest.mark.parametrize("final", ["sigma_min", "zero"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1, 2)], ids=str)
def test_few_steps_and_elements(shape, final, steps):
    z0, net = leaf(normal(*shape)), Net(shape[-1])
    sigmas = gs.schedules.karras(steps, sigma_min=0.1, sigma_max=5.0, final=final)
    inputs = [z0, *net.parameters()]
    assert_as_stored(inputs, lambda memory: run(net, z0, sigmas, memory))


class Conv(nn.Module):
    """A network whose kernels may look at the strides."""

    def __init__(self, channels=4):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(channels, channels, 3, 3, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(weight / 6)

    def forward(self, x, sigma):
        return torch.tanh(nn.functional.conv2d(x, self.weight, padding=1))


LAYOUTS = {
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda x: x[:1].expand_as(x),
    "every-other": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["signed_roll", "philox"])
def test_strided_noise(kind, layout):
    z0 = LAYOUTS[layout](normal(2, 4, 5, 6)).detach().requires_grad_()
    plain = leaf(z0.contiguous())
    options = {"noise": make_noise(kind, 7, z0)[0], "churn": gs.Churn(1.0)}
    net = Conv()
    got, expected = run(net, z0, **options), run(net, plain, memory="store", **options)
    assert_close(got.detach(), expected.detach())
    for g, w in zip(
        gradients(got, [z0, net.weight]), gradients(expected, [plain, net.weight]), strict=True
    ):
        assert_close(g, w)


def test_narrow_states_and_networks():
    """Against float64: rounding to 8 bits in other places, so no more is to be asked."""
    z0 = normal(8, 5)
    truth = Net(5)

    def sample(dtype, state_dtype, memory):
        x0, net = leaf(z0.to(dtype)), Net(5, dtype)
        x = run(net, x0, SIGMAS, memory, state_dtype=state_dtype, churn=gs.Churn(2.0))
        return x.detach(), gradients(x, [x0])[0]

    exact = leaf(z0.to(torch.bfloat16).double())
    x = run(truth, exact, memory="store", churn=gs.Churn(2.0))
    wanted = (x.detach(), gradients(x, [exact])[0])
    for dtype, state_dtype in (
        (torch.bfloat16, None),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float64),
    ):
        ours, stored = (sample(dtype, state_dtype, m) for m in ("reversible", "store"))
        for got, other, w in zip(ours, stored, wanted, strict=True):
            assert got.dtype == other.dtype == dtype
            error, usual = ((x.double() - w).norm() / w.norm() for x in (got, other))
            assert error <= 2 * usual + 1e-6


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
@pytest.mark.thorough
def test_any_schedule_churn_and_noise(data):
    steps = data.draw(st.integers(1, 9))
    drops = data.draw(st.lists(st.floats(0.05, 1.5), min_size=steps, max_size=steps))
    top = data.draw(st.floats(0.1, 50.0))
    values = [top * math.exp(-sum(drops[:k])) for k in range(steps + 1)]
    if data.draw(st.booleans()):
        values[-1] = 0.0
    low, high = sorted(data.draw(st.tuples(st.floats(0, top), st.floats(0, top))))
    churn = gs.Churn(data.draw(st.floats(0.01, 5.0)), low, high)
    dtype = data.draw(st.sampled_from(list(TOLERANCE)))
    kind = data.draw(st.sampled_from(KINDS))
    z0, net = leaf(normal(2, 3, dtype=dtype)), Net(3, dtype)
    sigmas = levels(values)
    count = injections(z0.detach(), sigmas, solver=SOLVER, churn=churn)
    options = {"churn": churn, "noise": make_noise(kind, count, z0)[0]} if count else {}
    # A short run from a small level has 20 bits of which the state takes few.
    tolerance = 1e-11 if dtype == torch.float64 else 1e-5
    assert_as_stored([z0], lambda memory: run(net, z0, sigmas, memory, **options), tolerance)


# Exact to the bit.


class Diary:
    """Writes down each integer state on the way forward, and holds the way back against it."""

    def __init__(self, monkeypatch):
        self.before, self.after = {}, {}  # what a state was added to, and what came of it
        self.dtypes, self.undone = set(), 0
        original = reversible.Pair._leap

        def leap(pair, j, carried, slots, z0, sign):
            old = carried.clone()
            result = original(pair, j, carried, slots, z0, sign)
            self.dtypes.add(carried.dtype)
            if sign > 0:
                self.before[j], self.after[j] = old, carried.clone()
            else:
                self.undone += 1
                assert torch.equal(old, self.after[j]), f"state {j} was another on the way back"
                assert torch.equal(carried, self.before[j]), f"state {j - 2} did not come back"
            return result

        monkeypatch.setattr(reversible.Pair, "_leap", leap)


@pytest.mark.parametrize(
    ("steps", "kind"),
    few([*product((35, 100), KINDS), (1000, "philox")], *product([35], KINDS)),
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_every_integer_comes_back(dtype, steps, kind, monkeypatch):
    diary = Diary(monkeypatch)
    if dtype == torch.int64:
        sigmas, churn = gs.schedules.karras(steps), 16.0  # nearly the most that 64 bits hold
    else:
        sigmas, churn = torch.linspace(3.0, 1.0, steps + 1, dtype=torch.float64), 0.3
    z0, problem = leaf(normal(2, 6, dtype=torch.float32)), Mixture(6)
    options = {} if kind == "off" else {"churn": gs.Churn(churn)}
    x = run(problem.denoise, z0, sigmas, noise=make_noise(kind, steps, z0)[0], **options)
    (gradient,) = gradients(x, [z0])
    assert gradient.isfinite().all()
    assert diary.dtypes == {dtype}
    assert diary.undone == len(diary.after) == steps + 1
    assert all(not diary.before[j].any() for j in (0, 1))


@pytest.mark.thorough
def test_gradient_of_a_thousand_steps():
    """float32, where the inverse in floating point would be off by percents (MATH, part 7)."""
    z0, problem = leaf(normal(2, 6, dtype=torch.float32)), Mixture(6)
    options = {"churn": gs.Churn(10.0), "noise": gs.noise.SinCos()}
    x = run(problem.denoise, z0, gs.schedules.karras(1000), **options)
    wide = leaf(z0.double())
    exact = run(problem.denoise, wide, gs.schedules.karras(1000), memory="store", **options)
    assert_close(x.detach(), exact.detach(), 1e-5)
    assert_close(gradients(x, [z0])[0], gradients(exact, [wide])[0], 1e-4)


@pytest.mark.parametrize(
    ("sigmas", "z0", "bits"),
    [(SHORT, torch.float32, 32), (SHORT, torch.float64, 64), (SIGMAS, torch.float32, 64)],
    ids=["short", "short-float64", "long"],
)
def test_width_of_the_integers(sigmas, z0, bits, monkeypatch):
    diary = Diary(monkeypatch)
    run(Net(3, z0), normal(2, 3, dtype=z0), sigmas)
    assert {8 * dtype.itemsize for dtype in diary.dtypes} == {bits}


def test_samples_are_the_same_bits_in_every_mode():
    z0, net = leaf(normal(3, 5, dtype=torch.float32)), Net(5, torch.float32)
    options = {"churn": gs.Churn(2.0)}
    x = run(net, z0, **options)
    with torch.no_grad():
        assert torch.equal(run(net, z0, **options), x)
    with torch.inference_mode():
        assert torch.equal(run(net, z0, **options), x)


# What is kept.


@pytest.mark.parametrize("wrap", [lambda net: net, gs.EDM], ids=["plain", "EDM"])
def test_two_integers_are_all_that_is_kept(wrap):
    z0 = leaf(normal(1, 4096, dtype=torch.float32))
    state, found = 4 * 4096, {}  # in bytes: what is smaller, levels and sketches, is less than one
    integers = 2 * 2  # of 64 bits
    for steps in (6, 24):
        counter, seen = Live(), []

        def denoise(x, sigma, counter=counter, seen=seen):
            seen.append(counter.live // state)
            return torch.tanh(x)

        with no_collector(), counter:
            x = run(wrap(denoise), z0, gs.schedules.karras(steps), churn=gs.Churn(1.0))
            between = counter.live // state
            gradients(x, [z0])
            after = counter.live // state
        assert len(seen) == 2 * steps  # one call a step, in each direction
        # Beside the integers: what the model is called with, and the state where that is another.
        inputs = 1 if wrap is not gs.EDM else 2
        assert set(seen[1:steps]) == {integers + inputs}
        assert between == integers + 1  # the sample
        assert after == 1
        found[steps] = max(seen[steps:])
    assert found[6] == found[24]
    # Three cotangents of states and outputs, the sums of gradients, and the loss's own.
    assert found[6] <= integers + inputs + 7


def test_calls_with_retained_graph():
    z0, calls = leaf(normal(2, 3)), []

    def denoise(x, sigma):
        calls.append(sigma)
        return torch.tanh(x)

    x = run(denoise, z0)
    assert len(calls) == 7
    first = gradients(x, [z0], retain_graph=True)[0]
    assert len(calls) == 14
    second = gradients(x, [z0], retain_graph=True)[0]
    assert len(calls) == 28  # forward once more, and back
    (other,) = torch.autograd.grad(x.square().sum(), z0)
    assert torch.equal(first, second)
    stored = run(denoise, z0, memory="store")
    assert_close(first, gradients(stored, [z0], retain_graph=True)[0])
    assert_close(other, torch.autograd.grad(stored.square().sum(), z0)[0])
    with pytest.raises(RuntimeError, match="second time"):
        gradients(x, [z0])


def test_no_gradient_of_the_gradient():
    z0 = leaf(normal(2, 3))
    x = run(lambda x, sigma: torch.tanh(x), z0)
    with pytest.raises(RuntimeError, match="create_graph=True; memory='store'"):
        gradients(x, [z0], create_graph=True)


# Denoisers that are not what they were.


class Drifting:
    """Returns something else when the call at position ``which`` of the run is made again.

    It does not look at its input at positions in ``blind``, so no later state tells.
    """

    def __init__(self, steps, which, change, blind=()):
        self.steps, self.which, self.change, self.blind = steps, which, change, blind
        self.count = 0

    def __call__(self, x, sigma):
        position = self.count if self.count < self.steps else 2 * self.steps - 1 - self.count
        out = torch.tanh(x)
        if position in self.blind:
            out = 0.3 + 0 * x
        if self.count >= self.steps and position == self.which:
            out = self.change(out)
        self.count += 1
        return out


def one_ulp(out):
    changed = out.detach().clone()
    changed.view(-1)[0] = torch.nextafter(changed.view(-1)[0], torch.tensor(9.0))
    return out + (changed - out.detach())


def slightly(out):
    return out * (1 + 1e-6)


@pytest.mark.parametrize("final", ["sigma_min", "zero"])
@pytest.mark.parametrize("which", [*range(7)])
def test_a_call_that_differs_is_an_error(which, final):
    """Too little for the comparison of outputs, so it is the states that tell."""
    z0 = leaf(normal(2, 3, dtype=torch.float32))
    sigmas = gs.schedules.karras(7, sigma_min=0.05, sigma_max=9.0, final=final)
    x = run(Drifting(7, which, slightly), z0, sigmas)
    with pytest.raises(ReplayError, match="the same bits"):
        x.sum().backward()
    assert z0.grad is None


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_call_that_differs_where_the_model_is_blind_is_an_error(which):
    z0 = leaf(normal(2, 3, dtype=torch.float32))
    x = run(Drifting(7, which, slightly, blind=range(which)), z0)
    with pytest.raises(ReplayError, match="the same bits"):
        x.sum().backward()
    assert z0.grad is None


def test_one_ulp_in_the_last_call_is_an_error():
    z0, calls = leaf(normal(2, 3, dtype=torch.float32)), Drifting(7, 6, one_ulp)
    x = run(calls, z0)
    with pytest.raises(ReplayError, match="at step 6"):
        x.sum().backward()
    assert z0.grad is None
    assert calls.count == 8  # nothing was undone


def test_noise_of_a_generator_of_its_own_is_an_error():
    z0, generator = leaf(normal(2, 3)), np.random.default_rng(0)
    x = run(lambda x, s: torch.tanh(x) + 0.1 * generator.normal(), z0)
    with pytest.raises(ReplayError):
        x.sum().backward()
    assert z0.grad is None


def test_a_source_that_draws_anew_is_an_error():
    class Fresh(gs.noise.NoiseSource):
        def at(self, z0, step, num_steps):
            return torch.randn(z0.shape, dtype=z0.dtype)

    z0 = leaf(normal(2, 3))
    x = run(lambda x, s: torch.tanh(x), z0, noise=Fresh(), churn=gs.Churn(2.0))
    with pytest.raises(ReplayError, match="the same"):
        x.sum().backward()


def test_dropout_of_the_default_generator():
    z0 = leaf(normal(4, 6))
    net = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.4), nn.Tanh(), nn.Dropout(0.2)).double()

    def sample(memory):
        torch.manual_seed(3)
        x = run(
            lambda x, s: net(x), z0, memory=memory, callback=lambda info: torch.rand(7), eta=0.5
        )
        torch.rand(3)  # what is drawn afterwards has no part in it
        return x

    assert_as_stored([z0, *net.parameters()], sample)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_weights_changed_in_place(frozen):
    z0, weight = leaf(normal(2, 3)), normal(3).requires_grad_(not frozen)
    x = run(lambda x, s: torch.tanh(x * weight), z0)
    with torch.no_grad():
        weight.mul_(1 + 1e-9)
    with pytest.raises(ReplayError if frozen else RuntimeError, match=r"bits|inplace"):
        x.sum().backward()
    assert z0.grad is None


def test_initial_noise_changed_in_place():
    z0 = leaf(normal(2, 3))
    x = run(lambda x, s: torch.tanh(x), z0)
    with torch.no_grad():
        z0.add_(1)
    with pytest.raises(RuntimeError, match="inplace"):
        x.sum().backward()


def test_a_callback_that_writes_into_what_it_gets():
    z0, net = leaf(normal(2, 3)), Net()

    def scribble(info):
        info.x.zero_()
        info.denoised.zero_()

    def sample(memory):
        return run(net, z0, memory=memory, callback=scribble if memory == "reversible" else None)

    assert_as_stored([z0, *net.parameters()], sample)


# What does not fit.


@pytest.mark.parametrize("value", [1e30, math.inf, math.nan])
@pytest.mark.parametrize("sigmas", [SHORT, SIGMAS], ids=["32-bits", "64-bits"])
@pytest.mark.parametrize("when", [0, 3])
def test_states_out_of_range(when, sigmas, value):
    z0, count = leaf(normal(2, 3, dtype=torch.float32)), 0

    def denoise(x, sigma):
        nonlocal count
        count += 1
        out = torch.tanh(x)
        return out + value * (torch.arange(6).view(2, 3) == 4) if count == when + 1 else out

    for enabled in (True, False):
        count = 0
        with torch.set_grad_enabled(enabled), pytest.raises(OverflowError, match=r"fit .. bits"):
            run(denoise, z0, sigmas)
    assert z0.grad is None


def test_amplitude_is_the_range():
    z0, clean = leaf(normal(2, 3)), 5000.0

    def denoise(x, sigma):
        return clean + torch.tanh(x)

    with pytest.raises(OverflowError, match="raise its amplitude"):
        run(denoise, z0)
    got, expected = (run(denoise, z0, memory=m) for m in (Reversible(clean), "store"))
    assert_close(got.detach(), expected.detach())
    assert_close(gradients(got, [z0])[0], gradients(expected, [z0])[0], 1e-10)
    with pytest.raises(ValueError, match="be positive"):
        Reversible(0.0)
    with pytest.raises(TypeError, match="be a real number"):
        Reversible("16")


def test_a_sum_that_wraps_is_seen():
    """Two numbers within the range whose sum passes the end of the integers."""
    carried = torch.full((1, 4), 2**30, dtype=torch.int32)
    overflow = torch.zeros(1, dtype=torch.int32)
    z0 = torch.zeros(1, 4)
    gs.backends.choose(None, z0.device).leap(
        carried,
        [torch.full((1, 4), 2.0**30)],
        [1.0],
        sign=1,
        scale=1.0,
        overflow=overflow,
        out_dtype=torch.float32,
    )
    assert overflow.item() == 1


def test_too_much_churn_is_refused_before_any_call():
    calls = []
    with pytest.raises(ValueError, match=r"64 bits.*take memory='checkpoint', less churn"):
        run(calls.append, normal(2, 3), gs.schedules.karras(100), churn=gs.Churn(40.0))
    assert not calls


@pytest.mark.parametrize("cap", [math.sqrt(1.2) - 1, 0.18])
def test_churn_that_fits(cap):
    """Cosmos's cap does at any churn, and 100 steps from 80 to 0.002 hold nearly twice as much."""
    z0 = normal(2, 3, dtype=torch.float32)
    with torch.no_grad():
        x = run(Gaussian().denoise, z0, gs.schedules.karras(100), churn=gs.Churn(100 * cap))
    assert x.isfinite().all()


# Every other solver.

OTHERS = [name for name in gs.solvers.names() if name != SOLVER]


@pytest.mark.parametrize("solver", OTHERS)
def test_other_solvers_are_refused(solver):
    calls = []
    with pytest.raises(ValueError, match=r"memory must .* take solver='midpoint_reversible'"):
        gs.sample(calls.append, normal(2, 3), SIGMAS, solver=solver, memory="reversible")
    assert not calls


@pytest.mark.parametrize("solver", ["euler", "ddim"])
def test_one_step_methods_with_two_steps_undo_nothing(solver):
    """Then each call's state is one of the two that are kept, whatever the method."""
    z0, sigmas = leaf(normal(2, 3)), levels([3.0, 1.0, 0.4])

    def sample(memory):
        return gs.sample(Net(), z0, sigmas, solver=solver, memory=memory)

    assert_as_stored([z0], sample)


def test_steps_of_its_own_that_cannot_be_undone():
    z0, net = normal(2, 3), Net()
    with pytest.raises(ValueError, match="eta of at most 1"):
        run(net, z0, eta=1.7)
    with pytest.raises(ValueError, match="no final_denoise at level 0"):
        run(net, z0, torch.cat([SIGMAS, levels([0.0])]), final_denoise=True)
    assert run(net, z0, eta=1.0).isfinite().all()


@pytest.mark.parametrize("inner", ["reversible", Reversible()], ids=str)
def test_not_for_the_last_steps_alone(inner):
    with pytest.raises(ValueError, match="Truncated: inner must be another strategy"):
        memories.Truncated(2, inner)


INTEGRATIONS = {
    "iterate": lambda z0, memory: iterate(lambda x, i: x.tanh(), z0, 1, memory=memory),
    "guided_diffusion": lambda z0, memory: GaussianDiffusion([0.1, 0.2, 0.3]).p_sample_loop(
        lambda x, t: x, z0.shape, noise=z0, memory=memory
    ),
    "cosmos": lambda z0, memory: Sampler()(
        lambda x, sigma: x.tanh(), z0, 4, allow_grad=True, memory=memory
    ),
}


@pytest.mark.parametrize("name", INTEGRATIONS)
def test_integrations_refuse(name):
    with pytest.raises(ValueError, match=r"memory must .*'reversible'.*memory='checkpoint'"):
        INTEGRATIONS[name](normal(2, 3, 4, 4), "reversible")


# On every backend.


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_backends(backend):
    if not gs.backends.present(backend):
        pytest.skip(gs.backends.available()[backend])
    z0, net = leaf(normal(2, 3, dtype=torch.float32)), Net(3, torch.float32)
    options = {"churn": gs.Churn(2.0), "backend": backend}
    inputs = [z0, *net.parameters()]
    assert_as_stored(inputs, lambda memory: run(net, z0, SIGMAS, memory, **options), 1e-6)
