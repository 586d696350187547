# SPDX-License-Identifier: Apache-2.0
"""Whole runs on the extension and on the reference agree: samples and all gradients."""

import pytest
import torch
from torch import nn

import gradsampler as gs
from gradsampler.ops import backends
from support.native_devices import DEVICES
from support.problems import normal

pytestmark = pytest.mark.skipif(
    not backends.present("cpu"), reason=f"extension: {backends.available()['cpu']}"
)

F64, F32 = torch.float64, torch.float32
STEPS, SHAPE = 4, (3, 5, 7)
NOISES = {
    "off": gs.noise.Off(),
    "sincos": gs.noise.SinCos(),
    "signed_roll": gs.noise.SignedRoll(2**63 + 1),
    "philox": gs.noise.Philox(4),
    "mixture": gs.noise.Mixture(gs.noise.SignedRoll(3), 0.7, 5),
    "given": None,
}


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
    given = [leaf(*SHAPE, seed=20 + k) for k in range(STEPS)]
    source = NOISES[name] or gs.noise.Given(given)
    # None is for a solver with noise of its own.
    churn = None if gs.solvers.resolve(solver).stochastic else gs.Churn(2.0)
    x = gs.sample(
        net, z0, sigmas, solver=solver, noise=source, churn=churn, memory=memory,
        eta=0.5 if solver == "ddim" else None, cond={"shift": shift}, backend=backend,
    )  # fmt: skip
    leaves = [z0, sigmas, net.weight, shift, *given]
    loss = (x * leaf(*SHAPE, seed=3).detach()).sum()
    return x.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True)


@pytest.mark.parametrize("memory", ["store", "checkpoint"])
@pytest.mark.parametrize("name", NOISES)
@pytest.mark.parametrize("solver", gs.solvers.names())
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
