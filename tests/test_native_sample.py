# SPDX-License-Identifier: Apache-2.0
"""Whole runs on the extension and on the reference agree: samples and all gradients."""

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradsampler as gs
from gradsampler.contract import MAX_TERMS
from gradsampler.ops import backends
from support.native_devices import DEVICES
from support.noises import KINDS, injections, make_noise
from support.problems import normal
from support.runs import SOLVERS, TYPICAL
from support.tiers import pairs

pytestmark = pytest.mark.skipif(
    not backends.present("cpu"), reason=f"extension: {backends.available()['cpu']}"
)

F64, F32 = torch.float64, torch.float32
STEPS, SHAPE = 4, (3, 5, 7)


class Net(nn.Module):
    """A curved denoiser with a parameter and a condition."""

    def __init__(self, dtype):
        super().__init__()
        self.weight = nn.Parameter(0.3 * normal(7, 7, seed=8).to(dtype))

    def forward(self, x, sigma, *, shift):
        return torch.tanh(x @ self.weight + shift) / (1 + sigma.view(-1, 1, 1).to(x.dtype))


class Halves(nn.Module):
    """A network that is called in its own dtype."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, sigma):
        assert x.dtype == self.net.weight.dtype
        return self.net(x)


def gradients(solver, name, memory, dtype, backend, device):
    """A sample and its gradients to z0, levels, parameter, condition and given noises."""

    def leaf(*shape, seed):
        return normal(*shape, seed=seed).to(device, dtype).requires_grad_()

    net, z0, shift = Net(dtype).to(device), leaf(*SHAPE, seed=1), leaf(7, seed=2)
    sigmas = gs.schedules.karras(STEPS, 0.1, 5.0).requires_grad_()
    # None is for a solver with noise of its own.
    churn = None if gs.solvers.resolve(solver).stochastic else gs.Churn(2.0)
    options = {"solver": solver, "churn": churn, "eta": 0.5 if solver == "ddim" else None}
    count = injections(z0.detach(), sigmas.detach(), **options)
    source, tensors = make_noise(name, count, z0)
    x = gs.sample(
        net, z0, sigmas, noise=source, memory=memory, cond={"shift": shift}, backend=backend,
        **options,
    )  # fmt: skip
    leaves = [z0, sigmas, net.weight, shift, *tensors]
    loss = (x * leaf(*SHAPE, seed=3).detach()).sum()
    return x.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True)


@pairs(cheap={"solver": TYPICAL}, solver=SOLVERS, name=KINDS, memory=["store", "checkpoint"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_run_and_its_gradients_agree_with_the_reference(device, solver, name, memory):
    for dtype, tolerance in ((F64, 1e-12), (F32, 1e-5)):
        expected = gradients(solver, name, memory, dtype, "reference", device)
        got = gradients(solver, name, memory, dtype, device, device)
        for mine, theirs in zip(got, expected, strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                assert mine.dtype == theirs.dtype
                scale = theirs.double().norm() + 1e-300
                assert (mine.double() - theirs.double()).norm() <= tolerance * scale


@pytest.mark.parametrize("memory", ["store", "checkpoint"])
def test_a_run_is_the_same_for_any_number_of_threads(memory):
    sigmas = gs.schedules.karras(STEPS, 0.1, 5.0)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            z0 = normal(2, 40_000).to(F32).requires_grad_()
            x = gs.sample(lambda x, s: 0.5 * x, z0, sigmas, churn=gs.Churn(2.0), memory=memory)
            found.append((x.detach(), *torch.autograd.grad(x.square().sum(), z0)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", DEVICES)
def test_a_model_in_16_bits(device, dtype):
    torch.manual_seed(0)
    net = nn.Linear(7, 7).to(device, dtype)
    sigmas = gs.schedules.karras(STEPS, 0.1, 5.0)
    found = {}
    for backend in (device, "reference"):
        z0 = normal(*SHAPE).to(device, F32).requires_grad_()
        x = gs.sample(
            Halves(net), z0, sigmas, churn=gs.Churn(2.0), memory="checkpoint", backend=backend
        )
        found[backend] = (x.detach(), *torch.autograd.grad(x.square().sum(), z0))
    for mine, theirs in zip(found[device], found["reference"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0.05, atol=0.05 * theirs.abs().max().item())


@dataclass(frozen=True)
class History(gs.solvers.Solver):
    """A step on all predictions so far, the earlier ones less: one term more each step."""

    def step(self, run, x, s, t):
        x, _ = run.denoise(x, s)
        return (t / s) * x + weighted([each.value for each in run.predictions])


def weighted(predictions):
    count = len(predictions)
    first, *others = (0.6 ** (count - k) * each for k, each in enumerate(predictions))
    return sum(others, first)


class Calls(TorchDispatchMode):
    """The most tensors that a native op took, and how many ops there were."""

    def __init__(self):
        super().__init__()
        self.ops, self.most = Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "gradsampler_native":
            name = func.__name__.split(".")[0]
            terms = {"step": args[2], "adjoint_step": args[3]}[name]
            self.ops[name] += 1
            self.most[name] = max(self.most[name], len(terms))
        return func(*args, **(kwargs or {}))


def test_a_stage_of_the_most_terms_is_one_launch():
    """With the state and N predictions the last stage has N + 1 terms."""
    steps, net = MAX_TERMS - 1, Net(F64)
    sigmas = gs.schedules.karras(steps, 0.1, 5.0)
    shift = normal(7, seed=2)
    z0 = normal(*SHAPE, seed=1).requires_grad_()
    weights = normal(*SHAPE, seed=3)

    x, predictions = sigmas[0] * z0, []
    for s, t in pairwise(sigmas):
        predictions.append(net(x, s.expand(len(x)), shift=shift))
        x = (t / s) * x + weighted(predictions)
    (expected,) = torch.autograd.grad((x * weights).sum(), z0)

    with Calls() as forward:
        got = gs.sample(
            net, z0, sigmas, solver=History(), cond={"shift": shift}, memory="checkpoint",
            backend="cpu",
        )  # fmt: skip
    torch.testing.assert_close(got, x, rtol=1e-12, atol=1e-12)
    with Calls() as backward:
        (gradient,) = torch.autograd.grad((got * weights).sum(), z0)
    torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-11)
    assert forward.ops == {"step": steps + 1}
    assert forward.most == {"step": MAX_TERMS}
    assert backward.ops["adjoint_step"] == steps  # one a model call
    assert backward.most["adjoint_step"] == MAX_TERMS - 1
