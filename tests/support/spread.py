# SPDX-License-Identifier: Apache-2.0
"""Runs of DTensors on two ranks, against the run of the whole in one process."""

import copy
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import gradsampler as gs
from gradsampler.memory import capacity
from support.cases import Cases
from support.problems import normal
from support.sharing import LEVELS, euler, full, leapfrog, truncated

F64 = torch.float64
SHAPE = (3, 5, 4)  # far below what any op has a block of; two ranks cannot share 3 or 5 evenly
STRATEGIES = ["store", "checkpoint", "auto", "revolve:2", "offload", "reversible", "truncated:2"]
LAYOUTS = {
    "batch": ((2,), [Shard(0)]),
    "rows": ((2,), [Shard(1)]),
    "columns": ((2,), [Shard(2)]),
    "copies": ((2,), [Replicate()]),
    "copies of batch": ((1, 2), [Replicate(), Shard(0)]),
    "rows of copies": ((2, 1), [Shard(1), Replicate()]),
    "batch in pieces": ((1, 2), [Shard(0), Shard(0)]),
}
LOOPS = {"plain": euler, "reversible": leapfrog, "truncated": truncated}
case = CASES = Cases()
run = CASES.run


class Net(nn.Module):
    """Every element of a sample sees every other one; of operations for shards of any size."""

    def __init__(self):
        super().__init__()
        self.enter = nn.Parameter(0.5 * normal(4, 6, seed=4))
        self.leave = nn.Parameter(0.5 * normal(6, 4, seed=5))

    def forward(self, x, sigma, shift):
        h = (x[..., None] * self.enter).sum(-2) + 0.3 * sigma[:, None, None]
        h = torch.tanh(h) + 0.05 * x.sum((1, 2), keepdim=True)
        return (h[..., None] * self.leave).sum(-2) + shift * x.cos()


class Problem:
    """All that a run depends on, plain; ``placed`` lays it out on a mesh."""

    def __init__(self, start=False):
        self.z0 = normal(*SHAPE).requires_grad_()
        self.shift = normal(*SHAPE, seed=1).requires_grad_()
        self.sigmas = torch.tensor(LEVELS, dtype=F64, requires_grad=True)
        self.start = (4 * normal(*SHAPE, seed=2)).requires_grad_() if start else None
        self.net = Net()

    def placed(self, mesh, placements):
        other = copy.copy(self)

        def lay(x):
            x = distribute_tensor(x.detach(), mesh, placements)
            return x.requires_grad_()

        other.z0, other.shift = lay(self.z0), lay(self.shift)
        other.start = None if self.start is None else lay(self.start)
        other.sigmas = self.sigmas.detach().requires_grad_()
        other.net = distribute_module(copy.deepcopy(self.net), mesh)
        return other

    def sample(self, **options):
        if self.start is not None:
            options["start"] = self.start
        return gs.sample(self.net, self.z0, self.sigmas, cond={"shift": self.shift}, **options)

    def gradients(self, x):
        weight = normal(*SHAPE, seed=3)
        if isinstance(x, DTensor):
            weight = distribute_tensor(weight, x.device_mesh, x.placements)
        (x.square() * weight).sum().backward()
        found = {"z0": self.z0, "shift": self.shift, "sigmas": self.sigmas, "start": self.start}
        found |= dict(self.net.named_parameters())
        return {name: full(x.grad) for name, x in found.items() if x is not None}


def compare(got, expected, tolerance=1e-12):
    assert got.keys() == expected.keys()
    for name, g in got.items():
        if expected[name] is None:  # z0, where the run starts from elsewhere
            assert g is None or not g.any()
            continue
        error = (g - expected[name]).norm() / expected[name].norm()
        assert error < tolerance, f"{name}: {error:.2e}"


@case
def gradients_are_those_of_the_loop(layout):
    """Of a loop by hand on plain tensors: z0, start, cond, levels and parameters."""
    shape, placements = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", shape)
    warnings.filterwarnings("ignore", "memory=Truncated")  # it says what is tested here
    for start in (False, True):
        expected = {}
        for name, loop in LOOPS.items():
            plain = Problem(start)
            x = loop(plain.net, plain.z0, plain.sigmas, plain.start, {"shift": plain.shift})
            expected[name] = x.detach(), plain.gradients(x)
        for memory in STRATEGIES:
            name = memory.split(":")[0]
            solver = "midpoint_reversible" if memory == "reversible" else "euler"
            spread = Problem(start).placed(mesh, placements)
            x = spread.sample(memory=memory, solver=solver)
            assert isinstance(x, DTensor)
            assert x.placements == tuple(placements)
            whole, gradients = expected.get(name, expected["plain"])
            torch.testing.assert_close(full(x.detach()), whole, rtol=1e-12, atol=1e-12)
            compare(spread.gradients(x), gradients)
            if not (start or name == "truncated"):
                assert spread.z0.grad.placements == tuple(placements)


@case
def noise_is_that_of_the_whole(layout):
    """To the bit, with a denoiser whose parts compute as the whole does."""
    shape, placements = LAYOUTS[layout]
    mesh = init_device_mesh("cpu", shape)
    for source in (None, gs.noise.Philox(3), gs.noise.Mixture(gs.noise.SignedRoll(1), 0.5)):
        for memory in ("store", "checkpoint"):
            options = {"solver": "euler_ancestral", "noise": source, "memory": memory}
            plain = normal(*SHAPE).requires_grad_()
            whole = gs.sample(lambda x, s: 0.5 * x - 0.01 * x * x, plain, LEVELS, **options)
            z0 = distribute_tensor(plain.detach(), mesh, placements).requires_grad_()
            x = gs.sample(lambda x, s: 0.5 * x - 0.01 * x * x, z0, LEVELS, **options)
            assert torch.equal(full(x.detach()), whole.detach())
            whole.square().sum().backward()
            x.square().sum().backward()
            torch.testing.assert_close(full(z0.grad), plain.grad, rtol=1e-13, atol=1e-13)


@case
def start_may_be_laid_out_otherwise():
    """Its gradient comes back in its own layout."""
    mesh = init_device_mesh("cpu", (2,))
    plain = Problem(start=True)
    x = euler(plain.net, plain.z0, plain.sigmas, plain.start, {"shift": plain.shift})
    expected = plain.gradients(x)
    for before in (Replicate(), Shard(2)):
        spread = Problem(start=True).placed(mesh, [Shard(0)])
        spread.start = distribute_tensor(plain.start.detach(), mesh, [before]).requires_grad_()
        x = spread.sample(memory="checkpoint")
        compare(spread.gradients(x), expected)
        assert spread.start.grad.placements == (before,)


@case
def sums_are_global():
    """Numbers of the noise, eta and the scale of guidance have the gradient of the whole."""
    mesh = init_device_mesh("cpu", (2,))

    def gradients(z0, zeros, memory, batched):
        numbers = [torch.tensor(c, dtype=F64, requires_grad=True) for c in (0.7, 0.1, 2.0)]
        eta, gain, scale = numbers

        def denoiser(x, sigma, shift):
            return 0.5 * torch.tanh(x + shift) + 0.01 * sigma[:, None, None] * x

        guided = gs.Guided(denoiser, scale, {"shift": zeros}, batched=batched)
        options = {"solver": "ddim", "eta": eta, "cond": {"shift": zeros + 1}, "memory": memory}
        x = gs.sample(guided, z0, LEVELS, noise=gs.noise.SinCos(scale_gain=gain), **options)
        return torch.autograd.grad(full(x).square().sum(), numbers)

    for placement in (Shard(0), Shard(1), Replicate()):
        for memory in ("store", "checkpoint"):
            for batched in (False, True):
                plain = gradients(normal(*SHAPE), torch.zeros(SHAPE, dtype=F64), memory, batched)
                z0 = distribute_tensor(normal(*SHAPE), mesh, [placement])
                zeros = distribute_tensor(torch.zeros(SHAPE, dtype=F64), mesh, [placement])
                got = gradients(z0, zeros, memory, batched)
                torch.testing.assert_close(got, plain, rtol=1e-12, atol=1e-12)


@case
def levels_of_each_sample():
    """Every sample has its own levels, and these their gradients, wherever it lies."""
    mesh = init_device_mesh("cpu", (2,))
    levels = torch.tensor(LEVELS, dtype=F64)[:, None] * torch.tensor([1.0, 0.8, 1.3], dtype=F64)
    for placement in (Shard(0), Shard(2)):
        for memory in ("store", "checkpoint"):
            found = []
            for z0 in (normal(*SHAPE), distribute_tensor(normal(*SHAPE), mesh, [placement])):
                sigmas = levels.clone().requires_grad_()
                seen = []
                x = gs.sample(
                    lambda x, s: torch.tanh(x) * 0.5 + 0.1 * s[:, None, None],
                    z0,
                    sigmas,
                    memory=memory,
                    callback=seen.append,
                )
                found.append([*torch.autograd.grad(full(x).square().sum(), sigmas), full(x)])
                found[-1] += [full(info.x) for info in seen]
            torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)


@case
def ranks_decide_alike():
    """By the memory of the poorest, by the values and the comparisons of all."""
    mesh, rank = init_device_mesh("cpu", (2,)), dist.get_rank()
    z0 = distribute_tensor(normal(*SHAPE), mesh, [Shard(1)]).requires_grad_()
    count, odd_ones = [], {}  # what rank 1 alone adds, by the number of the call

    def denoiser(x, sigma):
        count.append(1)
        mean = x.mean((1, 2), keepdim=True)  # a collective: another number of calls would hang
        own = odd_ones.get(len(count), 0.0) if rank == 1 else 0.0
        return torch.tanh(x + mean) + DTensor.from_local(torch.full((3, 1, 1), own).double(), mesh)

    real, capacity.free = capacity.free, lambda device: [2**30, 3000][rank]
    try:
        gs.sample(denoiser, z0, LEVELS).sum().backward()
    finally:
        capacity.free = real
    calls = [None, None]
    dist.all_gather_object(calls, len(count))
    assert calls[0] == calls[1] > 5

    count.clear()
    odd_ones[8] = 1.0
    x = gs.sample(denoiser, z0, LEVELS, memory="checkpoint")
    with pytest.raises(gs.ReplayError):
        x.sum().backward()
    count.clear()
    odd_ones.clear()
    odd_ones[3] = torch.nan
    with pytest.raises(gs.NonFiniteError, match="step 2 of 5"):
        gs.sample(denoiser, z0, LEVELS, check_finite=True)
    odd_ones.clear()
    large = distribute_tensor(normal(*SHAPE), mesh, [Shard(1)])
    wide = gs.memory.Reversible(amplitude=1e-2)
    with pytest.raises(OverflowError):
        gs.sample(
            lambda x, s: (
                denoiser(x, s)
                + 1e6 * DTensor.from_local(torch.full((3, 1, 1), float(rank), dtype=F64), mesh)
            ),
            large.float().requires_grad_(),
            LEVELS,
            solver="midpoint_reversible",
            memory=wide,
        )


@case
def what_cannot_be_served_is_an_error_at_the_door():
    mesh, called = init_device_mesh("cpu", (2,)), []

    def denoiser(x, sigma, **_):
        called.append(1)
        return 0.5 * x

    def refused(match, z0, error=ValueError, **options):
        with pytest.raises(error, match=match):
            gs.sample(denoiser, z0, LEVELS, **options)
        assert not called

    z0 = distribute_tensor(normal(*SHAPE), mesh, [Shard(0)])
    partial = DTensor.from_local(normal(*SHAPE), mesh, [Partial()])
    refused("z0 must be laid out by Shard and Replicate", partial)
    one = distribute_tensor(normal(1, 4), mesh, [Shard(0)])
    refused("z0 must give each rank an element at least", one)
    own = normal(1 + 2 * dist.get_rank(), 4)
    uneven = DTensor.from_local(own, mesh, [Shard(0)], shape=(4, 4), stride=(4, 1))
    refused("z0 must have parts as torch.chunk cuts", uneven)
    refused("start must be a DTensor on the mesh of z0, got Tensor", z0, start=normal(*SHAPE))
    refused("monitor must be None where z0 is a DTensor", z0, monitor=gs.Monitor())
    refused("z0 must be a plain tensor where levels are chosen", z0, solver="dpm_adaptive")
    grid = init_device_mesh("cpu", (2, 1))
    twice = distribute_tensor(normal(*SHAPE), grid, [Shard(0), Shard(1)])
    refused("z0 must be cut along one axis at most", twice, solver="euler_ancestral")
    cut = distribute_tensor(normal(*SHAPE), mesh, [Shard(1)])
    clip = gs.policies.ClippedCotangent(1.0)
    refused("gradient must leave cotangents as they are", cut, gradient=clip)
    refused("z0 must have a floating-point dtype", distribute_tensor(torch.ones(4, 4).int(), mesh))
    with pytest.raises(ValueError, match="distribute_module"):
        gs.sample(lambda x, s: x + torch.ones(3, 5, 4), z0, LEVELS)
    with pytest.raises(ValueError, match="output at step 0 must be a DTensor as its input is"):
        gs.sample(lambda x, s: x.to_local(), z0, LEVELS)
    # A layout that is cut twice has no noise, and runs without any.
    assert gs.sample(denoiser, twice, LEVELS).placements == twice.placements


@case
def torchs_convolution_of_a_cut_image_is_no_silent_error():
    """It gives a part for the whole in 2.13, and loses the gradient's layout before; a run says so.

    Where a version does better, its gradient counts.
    """
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    plain = nn.Conv2d(3, 3, 3, padding=1, dtype=F64)
    net = distribute_module(copy.deepcopy(plain), mesh)
    whole = normal(1, 3, 4, 8).requires_grad_()
    z0 = distribute_tensor(whole.detach(), mesh, [Shard(3)]).requires_grad_()

    def error():
        try:
            x = gs.sample(lambda x, s: net(x), z0, LEVELS)
            x.full_tensor().square().sum().backward()
        except (ValueError, RuntimeError) as caught:
            return str(caught)
        return None

    said = error()
    assert said is None or "examples/cut_unet.py has convolutions" in said
    if said is None:
        expected = gs.sample(lambda x, s: plain(x), whole, LEVELS)
        expected.square().sum().backward()
        torch.testing.assert_close(full(z0.grad), whole.grad, rtol=1e-12, atol=1e-12)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.up, self.down = nn.Linear(4, 8, dtype=F64), nn.Linear(8, 4, dtype=F64)

    def forward(self, x, sigma, shift):
        return self.down(torch.tanh(self.up(x))) + 0.1 * sigma[:, None, None] * shift


@case
def tensor_parallel():
    """Weights cut over the ranks, plain states; and ranks agree by the mesh of the weights."""
    mesh, plan = init_device_mesh("cpu", (2,)), {"up": ColwiseParallel(), "down": RowwiseParallel()}
    plain = Problem()
    plain.net = Layer()
    x = euler(plain.net, plain.z0, plain.sigmas, None, {"shift": plain.shift})
    expected = plain.gradients(x)
    for memory in ("store", "checkpoint", "auto", "revolve:2"):
        cut = Problem()
        cut.net = parallelize_module(Layer(), mesh, plan)
        real, capacity.free = capacity.free, lambda device: [2**30, 3000][dist.get_rank()]
        try:
            x = cut.sample(memory=memory)
            compare(cut.gradients(x), expected)
        finally:
            capacity.free = real


BY_LAYOUT = [gradients_are_those_of_the_loop, noise_is_that_of_the_whole]
for function in BY_LAYOUT:
    del CASES[function.__name__]
    for name in LAYOUTS:
        CASES[f"{function.__name__}:{name}"] = partial(function, name)
