# SPDX-License-Identifier: Apache-2.0
"""Runs beside other threads, which share torch's default generators with them.

The other thread draws when the denoiser asks it to, within a model call or within its backward. So
each test goes the same way every time.
"""

import queue
import threading
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import gradsampler as gs
from support import euler as by_hand
from support.compiling import compiling
from support.gradients import assert_close, gradients
from support.networks import Layers
from support.problems import normal
from support.runs import leaf
from support.strategies import REPLAYING, STRATEGIES, replaying, strategies
from support.tiers import few, pairs

SIGMAS = gs.schedules.karras(6, sigma_min=0.05, sigma_max=9.0)
euler = partial(by_hand.euler, sigmas=SIGMAS)
CALLS = len(SIGMAS) - 1


class Drawer:
    """A thread that draws from torch's default generator when it is asked to."""

    def __init__(self):
        self.numbers = []
        self._asked, self._answers = queue.Queue(), queue.Queue()
        self._thread = threading.Thread(target=self._work)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._asked.put(False)
        self._thread.join()

    def _work(self):
        while self._asked.get():
            self.numbers.append(torch.rand(()).item())
            self._answers.put(None)

    def draw(self):
        self._asked.put(True)
        self._answers.get()


@pytest.fixture
def drawer():
    with Drawer() as drawer:
        yield drawer


def run(sampler, net):
    """The sample and the gradients of a sampler of (denoiser, z0)."""
    torch.manual_seed(7)
    z0 = leaf(normal(3, Layers.size))
    x = sampler(net, z0)
    return x.detach(), *gradients(x, [z0, *net.parameters()])


def sampler(memory, folder):
    return partial(gs.sample, sigmas=SIGMAS, memory=STRATEGIES[memory](folder))


class Pulled(torch.autograd.Function):
    """The identity, whose backward calls a function."""

    @staticmethod
    def forward(ctx, x, called):
        ctx.called = called
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        ctx.called()
        return g, None


class Beside(nn.Module):
    """A denoiser during whose calls another thread draws, and during their backward."""

    def __init__(self, drawer, draws, dropout=0.0):
        super().__init__()
        self.drawer, self.draws = drawer, draws  # draws: whether it does in call k
        self.dropout, self.count = nn.Dropout(dropout), 0

    def forward(self, x, sigma):
        self.count += 1
        draws = self.draws(self.count)
        if draws:
            self.drawer.draw()
        x = self.dropout(torch.tanh(x))
        return Pulled.apply(x, self.drawer.draw) if draws else x


@pairs(when=["always", "first", "again"], memory=STRATEGIES)
def test_no_number_is_drawn_twice_beside_a_run_that_draws_nothing(when, memory, drawer, tmp_path):
    draws = {"always": lambda k: True, "first": lambda k: k <= CALLS, "again": lambda k: k > CALLS}
    net, z0 = Beside(drawer, draws[when]), leaf(normal(3, 4))
    torch.manual_seed(5)
    x = gs.sample(net, z0, SIGMAS, memory=STRATEGIES[memory](tmp_path))
    (got,) = gradients(x, [z0])
    torch.manual_seed(5)
    assert drawer.numbers == [torch.rand(()).item() for _ in drawer.numbers]
    assert drawer.numbers or (when == "again" and memory not in REPLAYING)
    (wanted,) = gradients(euler(lambda x, s: torch.tanh(x), z0), [z0])
    assert_close(got, wanted)


@pairs(around=["plain", "checkpointed"], memory=STRATEGIES)
def test_dropout_beside_a_thread_that_does_not_draw(around, memory, drawer, tmp_path):
    net = Layers(0.4)
    expected = run(euler, net)
    if around == "checkpointed":
        net.around = partial(checkpoint, use_reentrant=False)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    got = run(sampler(memory, tmp_path), net)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b)
    assert not drawer.numbers
    assert not torch.equal(torch.get_rng_state(), before)


@pairs(when=["always", "first", "again"], memory=REPLAYING)
def test_dropout_beside_a_thread_that_draws_is_an_error(when, memory, drawer, tmp_path):
    draws = {"always": lambda k: True, "first": lambda k: k <= CALLS, "again": lambda k: k > CALLS}
    net, z0 = Beside(drawer, draws[when], dropout=0.4), leaf(normal(3, 4))
    z0.grad = torch.ones_like(z0)
    x = gs.sample(net, z0, SIGMAS, memory=STRATEGIES[memory](tmp_path))
    with pytest.raises(gs.ReplayError, match=r"thread|another output"):
        x.sum().backward()
    assert torch.equal(z0.grad, torch.ones_like(z0))


@strategies
def test_a_generator_of_its_own_is_not_touched_by_another_thread(memory, drawer, tmp_path):
    net, generator = Beside(drawer, lambda k: True), torch.Generator()

    def denoiser(x, sigma):
        keep = torch.full_like(x, 0.7)
        return net(x * torch.bernoulli(keep, generator=generator), sigma)

    def quiet(x, sigma):
        keep = torch.full_like(x, 0.7)
        return torch.tanh(x * torch.bernoulli(keep, generator=generator))

    def drawn(sampling):
        generator.manual_seed(1)
        z0 = leaf(normal(3, 4))
        x = sampling(z0)
        return x.detach(), *gradients(x, [z0])

    torch.manual_seed(5)
    got = drawn(lambda z0: gs.sample(denoiser, z0, SIGMAS, memory=STRATEGIES[memory](tmp_path)))
    torch.manual_seed(5)
    assert drawer.numbers == [torch.rand(()).item() for _ in drawer.numbers]
    for a, b in zip(got, drawn(lambda z0: euler(quiet, z0)), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("memory", few(REPLAYING, "checkpoint"))
@compiling
def test_dropout_in_a_compiled_denoiser_beside_a_thread(memory, drawer, tmp_path):
    net = Layers(0.4)
    counter = CompileCounterWithBackend("aot_eager")
    got = run(sampler(memory, tmp_path), torch.compile(net, backend=counter))
    for a, b in zip(got, run(euler, net), strict=True):
        assert_close(a, b)
    assert counter.frame_count == 1


@replaying
def test_a_checkpoint_that_forgets_its_random_state_beside_a_thread(memory, drawer, tmp_path):
    net = Layers(0.4)
    net.around = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    with pytest.raises(gs.ReplayError, match="preserve_rng_state=True"):
        run(sampler(memory, tmp_path), net)
