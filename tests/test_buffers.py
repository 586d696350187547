# SPDX-License-Identifier: Apache-2.0
"""Denoisers that change their buffers: changed once a run, whatever the strategy.

The oracle is a loop in plain torch around a copy of the same network.
"""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional

import gradsampler as gs
from gradsampler.memory import Reversible, Revolve, Truncated, capacity
from support.compiling import compiling
from support.gradients import assert_close, gradients
from support.problems import normal
from support.runs import leaf
from support.strategies import STRATEGIES
from support.tiers import few, pairs

SIGMAS = gs.schedules.karras(6, sigma_min=0.05, sigma_max=9.0)
CALLS = len(SIGMAS) - 1
MEMORIES = STRATEGIES | {
    "two levels of files": lambda folder: Revolve(1, 1, folder),
    "the last steps": lambda folder: Truncated(2),
    "auto without room": lambda folder: "auto",
}
memories = pytest.mark.parametrize("memory", MEMORIES)


@pytest.fixture
def strategy(memory, tmp_path, monkeypatch):
    if memory == "auto without room":
        monkeypatch.setattr(capacity, "free", lambda device: 3000)
    return MEMORIES[memory](tmp_path)


def euler(denoiser, z0, steps_back=CALLS):
    x = SIGMAS[0] * z0
    for k, (s, t) in enumerate(pairwise(SIGMAS)):
        x = x.detach() if 0 < k == CALLS - steps_back else x
        x = x + (t - s) * (x - denoiser(x, s.expand(len(x)))) / s
    return x


def linear():
    torch.manual_seed(1)
    return nn.Linear(4, 4).double()


class Normalised(nn.Module):
    """Batch statistics normalise; running ones are kept for later."""

    def __init__(self, norm):
        super().__init__()
        self.linear, self.norm = linear(), norm.double()

    def forward(self, x, sigma):
        return torch.tanh(self.norm(self.linear(x)))


class Instances(Normalised):
    def __init__(self):
        super().__init__(nn.InstanceNorm1d(2, affine=True, track_running_stats=True))

    def forward(self, x, sigma):
        return torch.tanh(self.norm(self.linear(x).unflatten(1, (2, 2)))).flatten(1)


class Uncounted(nn.Module):
    """Batch normalisation by its function: torch counts no change in place."""

    def __init__(self):
        super().__init__()
        self.linear = linear()
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(4, dtype=torch.float64))

    def forward(self, x, sigma):
        h = self.linear(x)
        return torch.tanh(functional.batch_norm(h, self.mean, self.variance, training=True))


class Averaged(nn.Module):
    """Divides by a running scale that follows the calls, and so depends on how many there were."""

    def __init__(self, in_place):
        super().__init__()
        self.linear, self.in_place = linear(), in_place
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("table", torch.arange(4, dtype=torch.float64), persistent=False)
        self.register_buffer("late", None)

    def forward(self, x, sigma):
        y = torch.tanh(self.linear(x) / self.scale.clone()) + 0.1 * self.table / (1 + self.count)
        with torch.no_grad():
            scale = 0.7 * self.scale + 0.3 * x.square().mean().sqrt()
            if self.in_place:
                self.scale.copy_(scale)
                self.count.add_(1)
            else:
                self.scale, self.count = scale, self.count + 1
                self.late = scale.clone() if self.late is None else self.late + 1
        return y


class Seldom(nn.Module):
    """Changes its buffer in one call alone."""

    def __init__(self, call):
        super().__init__()
        self.linear, self.call, self.made = linear(), call, 0
        self.register_buffer("scale", torch.ones(4, dtype=torch.float64))

    def forward(self, x, sigma):
        y = torch.tanh(self.linear(x) * self.scale.clone())
        if sigma[0] == SIGMAS[self.call]:
            self.scale.mul_(2)
        return y


class Tied(nn.Module):
    """Two modules share a buffer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Averaged(True), Averaged(True)
        self.second.scale = self.first.scale

    def forward(self, x, sigma):
        return self.second(self.first(x, sigma), sigma)


NETWORKS = {
    "batch norm": lambda: Normalised(nn.BatchNorm1d(4)),
    "cumulative": lambda: Normalised(nn.BatchNorm1d(4, momentum=None)),
    "instance norm": Instances,
    "uncounted": Uncounted,
    "average in place": lambda: Averaged(True),
    "average anew": lambda: Averaged(False),
    "average in eval mode": lambda: Averaged(True).eval(),
    "first call": lambda: Seldom(0),
    "fourth call": lambda: Seldom(3),
    "last call": lambda: Seldom(CALLS - 1),
    "tied": Tied,
}


def start(memory):
    """The initial noise, and how many steps a gradient goes back: to it only if these are all."""
    last = memory == "the last steps"
    return (normal(8, 4), 2) if last else (leaf(normal(8, 4)), CALLS)


def state(net):
    return {name: x.clone() for name, x in net.named_buffers()}


def joined(x, inputs):
    """All gradients as one vector: that of a bias before a norm is zero up to rounding."""
    options = {"retain_graph": True, "materialize_grads": True}
    return torch.cat([g.flatten() for g in gradients(x, inputs, **options)])


def assert_same_state(net, expected):
    got = state(net)
    assert got.keys() == expected.keys()
    for name, x in expected.items():
        assert_close(got[name], x, 1e-12, name)


@pairs(network=NETWORKS, memory=MEMORIES)
def test_buffers_are_changed_once_a_run(network, memory, strategy):
    net, (z0, steps) = NETWORKS[network](), start(memory)
    loop = copy.deepcopy(net)
    inputs, others = ([x for x in (z0, *n.parameters()) if x.requires_grad] for n in (net, loop))
    expected = euler(loop, z0, steps)
    wanted = joined(expected, others)
    x = gs.sample(lambda x, s: net(x, s), z0, SIGMAS, memory=strategy)
    assert_close(x.detach(), expected.detach())
    assert_same_state(net, state(loop))
    for _ in range(1 if memory == "store" else 2):
        assert_close(joined(x, inputs), wanted, 1e-10)
        assert_same_state(net, state(loop))


def test_buffers_of_a_reversible_run():
    net, z0 = Averaged(True), leaf(normal(8, 4))
    loop = copy.deepcopy(net)
    options = {"solver": "midpoint_reversible"}
    expected = gs.sample(loop, z0, SIGMAS, memory="store", **options)
    x = gs.sample(net, z0, SIGMAS, memory=Reversible(), **options)
    assert_same_state(net, state(loop))
    (wanted,) = gradients(expected, [z0])
    for _ in range(2):
        (got,) = gradients(x, [z0], retain_graph=True)
        assert_close(got, wanted, 1e-6)
        assert_same_state(net, state(loop))


@memories
def test_what_is_done_with_the_network_in_between_stays(memory, strategy):
    # The network makes calls of its own in a callback and before the backward.
    net, (z0, steps) = Averaged(True), start(memory)
    loop, other = copy.deepcopy(net), normal(8, 4, seed=3)

    def between(info):
        net(other, None)

    def stepping(x, sigma):
        if sigma[0] != SIGMAS[0]:
            loop(other, None)
        return loop(x, sigma)

    expected = euler(stepping, z0, steps)
    loop(other, None)
    x = gs.sample(net, z0, SIGMAS, memory=strategy, callback=between)
    net(other, None)
    loop(other, None)
    assert_same_state(net, state(loop))
    before = net.scale
    (wanted,) = torch.autograd.grad(expected.sin().sum(), loop.linear.weight)
    (got,) = torch.autograd.grad(x.sin().sum(), net.linear.weight)
    assert_close(got, wanted)
    assert_same_state(net, state(loop))
    assert net.scale is before  # the very tensor, for whoever holds it


@pytest.mark.parametrize("memory", few(MEMORIES, "checkpoint"))
@compiling
def test_buffers_of_a_compiled_network(memory, strategy):
    net, (z0, steps) = Normalised(nn.BatchNorm1d(4)), start(memory)
    loop = copy.deepcopy(net)
    expected = euler(loop, z0, steps)
    counter = CompileCounterWithBackend("aot_eager")
    x = gs.sample(torch.compile(net, backend=counter), z0, SIGMAS, memory=strategy)
    inputs = [net.linear.weight, net.norm.weight]
    got = gradients(x, inputs)
    for a, b in zip(got, gradients(expected, [loop.linear.weight, loop.norm.weight]), strict=True):
        assert_close(a, b)
    assert_same_state(net, state(loop))
    # The calls before the last steps are compiled without a gradient to their state.
    assert counter.frame_count == (1 if steps == CALLS else 2)


def test_a_failing_replay_puts_the_buffers_back():
    net, z0 = Averaged(True), leaf(normal(8, 4))
    calls = []

    def denoiser(x, sigma):
        calls.append(sigma)
        y = net(x, sigma)
        if len(calls) > CALLS + 2:
            raise KeyError("out of luck")
        return y

    x = gs.sample(denoiser, z0, SIGMAS, memory="checkpoint")
    before = state(net)
    with pytest.raises(KeyError):
        x.sum().backward()
    assert_same_state(net, before)


def test_a_buffer_with_a_gradient_is_an_error():
    class Remembering(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros((), dtype=torch.float64))

        def forward(self, x, sigma):
            self.mean = 0.5 * self.mean + 0.5 * x.mean()
            return torch.tanh(x - self.mean)

    net, z0 = Remembering(), leaf(normal(8, 4))
    with pytest.raises(
        ValueError, match=r"Remembering\.mean must carry no gradient.*memory='store'"
    ):
        gs.sample(net, z0, SIGMAS, memory="checkpoint")
    net.mean = torch.zeros_like(net.mean)
    expected = euler(copy.deepcopy(net), z0)
    assert_close(
        *gradients(gs.sample(net, z0, SIGMAS, memory="store"), [z0]), *gradients(expected, [z0])
    )


def test_a_large_buffer_that_changes_in_the_first_call_is_an_error(monkeypatch):
    monkeypatch.setattr(
        "gradsampler.engine.buffers._ROOM", 24
    )  # a scalar of each, and the table not
    net, z0 = Seldom(0), leaf(normal(8, 4))
    x = gs.sample(net, z0, SIGMAS, memory="checkpoint")
    with pytest.raises(gs.ReplayError, match=r"Seldom\.scale.*32 bytes.*memory='store'"):
        x.sum().backward()
    assert z0.grad is None
