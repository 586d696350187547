# SPDX-License-Identifier: Apache-2.0
"""Denoisers that draw: the exact gradient under every strategy, or an error, never a wrong one.

The oracle is a loop in plain torch that keeps the noise it drew.
"""

import gc
import itertools
import os
import random
import types
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradsampler as gs
from gradsampler.engine.parts import reachable
from gradsampler.engine.replay import Sketch, changed
from support.euler import euler
from support.gradients import assert_close, gradients
from support.problems import normal
from support.runs import leaf
from support.strategies import REPLAYING, STRATEGIES, replaying, strategies
from support.tiers import once, pairs

SIGMAS = gs.schedules.karras(6, sigma_min=0.05, sigma_max=9.0)


# Generators that the denoiser holds, each somewhere else.

GLOBAL = torch.Generator()


def jittered(x, generator):
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    return torch.tanh(x * (1 + 0.5 * noise))


def by_global(x, sigma):
    return jittered(x, GLOBAL)


def by_inner_function(x, sigma):
    return (lambda: jittered(x, GLOBAL))()


class Holder:
    def __init__(self, generator):
        self.streams = {"noise": [generator]}

    def denoise(self, x, sigma):
        return jittered(x, self.streams["noise"][0])


class Block(nn.Module):
    def __init__(self, generator):
        super().__init__()
        self.generator = generator

    def forward(self, x):
        return jittered(x, self.generator)


class ByMethod(nn.Module):
    def forward(self, x, sigma):
        return jittered(x, GLOBAL)


class Network(nn.Module):
    def __init__(self, generator):
        super().__init__()
        self.layers = nn.Sequential(nn.Identity(), Block(generator))

    def forward(self, x, sigma):
        return self.layers(x)


SHARED = types.SimpleNamespace(generator=GLOBAL)
OTHER = types.ModuleType("other_module")
OTHER.generator = GLOBAL


def by_namespace(x, sigma):
    return jittered(x, SHARED.generator)


def by_imported_module(x, sigma):
    return jittered(x, OTHER.generator)


class Static:
    @staticmethod
    def draw(x):
        return by_global(x, None)

    def __call__(self, x, sigma):
        return self.draw(x)


class Shared:
    stream = GLOBAL

    def __call__(self, x, sigma):
        return jittered(x, self.stream)


def by_closure(g):
    return lambda x, sigma: jittered(x, g)


def by_default(g):
    def denoiser(x, sigma, generator=g):
        return jittered(x, generator)

    return denoiser


def in_place(g):
    return lambda x, s: torch.tanh(x + torch.empty_like(x).normal_(0, 0.5, generator=g))


def masked(g):
    keep = torch.full((), 0.7, dtype=torch.float64)
    return lambda x, s: torch.tanh(x * torch.bernoulli(keep.expand_as(x), generator=g))


HELD = {
    "closure": by_closure,
    "default": by_default,
    "partial": lambda g: partial(lambda x, s, generator: jittered(x, generator), generator=g),
    "method": lambda g: Holder(g).denoise,
    "module": Network,
    "global": lambda g: by_global,
    "global in a lambda": lambda g: by_inner_function,
    "global in a method": lambda g: ByMethod(),
    "global in a static method": lambda g: Static(),
    "global namespace": lambda g: by_namespace,
    "global of a module": lambda g: by_imported_module,
    "global of a class": lambda g: Shared(),
    "decorated": lambda g: torch.enable_grad()(by_closure(g)),
    "guided": lambda g: gs.Guided(Network(g), 1.0, {}),
    "wrapped": lambda g: gs.EDM(Network(g), sigma_data=1.0),
    "compiled": lambda g: torch.compile(Network(g), backend="eager"),
    "normal_": in_place,
    "bernoulli": masked,
}


@pytest.mark.parametrize("place", HELD)
def test_a_held_generator_is_found(place):
    generator = GLOBAL if place.startswith("global") else torch.Generator()
    assert reachable(HELD[place](generator)).generators == [generator]


def test_each_generator_is_found_once_and_circles_end():
    first, second = torch.Generator(), torch.Generator()
    circle = Holder(first)
    circle.itself, circle.data = [circle], list(range(10**6))
    found = reachable(
        circle, {"a": first, "b": (second,)}, None, np.ones(3), torch.ones(3)
    ).generators
    assert sorted(map(id, found)) == sorted([id(first), id(second)])


def drawn(denoiser, generator, memory=None):
    """The sample and the gradient; the generator must end where the run leaves it."""
    generator.manual_seed(3)
    z0 = leaf(normal(3, 4))
    options = {} if memory is None else {"memory": memory}
    x = gs.sample(denoiser, z0, SIGMAS, **options) if options else euler(denoiser, z0, SIGMAS)
    after = generator.get_state()
    torch.rand(3, generator=generator)  # whatever is drawn between the run and its backward
    before = generator.get_state()
    (g,) = gradients(x, [z0], retain_graph=True)
    assert torch.equal(generator.get_state(), before)
    if options:
        assert torch.equal(*gradients(x, [z0]), g)
    return x.detach(), g, after


@pytest.mark.parametrize("place", [p for p in HELD if p not in ("guided", "wrapped", "compiled")])
@strategies
def test_a_held_generator_is_replayed(place, memory, tmp_path):
    generator = GLOBAL if place.startswith("global") else torch.Generator()
    denoiser = HELD[place](generator)
    got = drawn(denoiser, generator, STRATEGIES[memory](tmp_path))
    for a, b in zip(got, drawn(denoiser, generator), strict=True):
        assert_close(a, b)


@strategies
def test_several_generators_and_dropout_at_once(memory, tmp_path):
    first, second = torch.Generator(), torch.Generator()
    blocks = nn.ModuleList([Block(first), nn.Dropout(0.3), Block(second), Block(first)])

    def denoiser(x, sigma, generator):
        for block in blocks:
            x = block(x)
        return x + torch.rand(x.shape, generator=generator, dtype=x.dtype)

    def run(sampler):
        third, z0 = torch.Generator().manual_seed(5), leaf(normal(3, 4))
        first.manual_seed(1), second.manual_seed(2), torch.manual_seed(3)
        x = sampler(third, z0)
        return x.detach(), *gradients(x, [z0])

    def through_cond(generator, z0):
        options = {"cond": {"generator": generator}, "memory": STRATEGIES[memory](tmp_path)}
        return gs.sample(denoiser, z0, SIGMAS, **options)

    wanted = run(lambda generator, z0: euler(partial(denoiser, generator=generator), z0, SIGMAS))
    for a, b in zip(run(through_cond), wanted, strict=True):
        assert_close(a, b)


def test_activation_checkpointing_of_a_step_is_wrong_where_a_run_is_right():
    # What users do today, around each step: torch.utils.checkpoint knows the default generators.
    generator = torch.Generator()
    denoiser, z0 = by_closure(generator), leaf(normal(3, 4))
    _, wanted, _ = drawn(denoiser, generator)
    generator.manual_seed(3)
    x = euler(lambda x, s: checkpoint(denoiser, x, s, use_reentrant=False), z0, SIGMAS)
    (wrong,) = gradients(x, [z0])
    assert (wrong - wanted).norm() > 0.2 * wanted.norm()
    _, right, _ = drawn(denoiser, generator, "checkpoint")
    assert_close(right, wanted)


@replaying
def test_a_failing_replay_puts_the_generator_back(memory, tmp_path):
    generator, z0, calls = torch.Generator().manual_seed(0), leaf(normal(3, 4)), []

    def denoiser(x, sigma):
        calls.append(sigma)
        if len(calls) > len(SIGMAS) - 1:
            torch.rand(3, generator=generator)
            raise KeyError("out of luck")
        return jittered(x, generator)

    x = gs.sample(denoiser, z0, SIGMAS, memory=STRATEGIES[memory](tmp_path))
    before = generator.get_state()
    with pytest.raises(KeyError):
        x.sum().backward()
    assert torch.equal(generator.get_state(), before)
    assert z0.grad is None


# Sources that nobody can see or replay.


def by_numpy():
    generator = np.random.default_rng(0)
    return lambda x, sigma: torch.tanh(x * (1 + torch.from_numpy(generator.random(x.shape))))


def by_python():
    generator = random.Random(0)
    return lambda x, sigma: torch.tanh(x * (1 + generator.random()))


def hidden():
    repeated = itertools.repeat(torch.Generator().manual_seed(0))
    return lambda x, sigma: jittered(x, next(repeated))


@once(make=[by_numpy, by_python, hidden], memory=REPLAYING)
def test_what_cannot_be_replayed_is_an_error(make, memory, tmp_path):
    z0, before = leaf(normal(4, 6)), normal(4, 6)
    z0.grad = torch.ones_like(z0)
    x = gs.sample(make(), z0, SIGMAS, memory=STRATEGIES[memory](tmp_path))
    sample = x.detach().clone()
    with pytest.raises(gs.ReplayError, match="step"):
        x.sum().backward()
    assert torch.equal(z0, before)
    assert torch.equal(z0.grad, torch.ones_like(z0))
    assert torch.equal(x, sample)
    del x
    gc.collect()
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("make", [by_numpy, by_python, hidden])
def test_store_needs_no_replay(make):
    z0 = leaf(normal(4, 6))
    (wanted,) = gradients(euler(make(), z0, SIGMAS), [z0])
    assert_close(*gradients(gs.sample(make(), z0, SIGMAS, memory="store"), [z0]), wanted)


@replaying
def test_a_checkpointed_block_that_draws_from_a_generator_is_an_error(memory, tmp_path):
    # Its noise is drawn anew in the model's backward, where no strategy has a hand in it.
    block, z0 = Block(torch.Generator().manual_seed(0)), leaf(normal(4, 6))

    def denoiser(x, sigma):
        return checkpoint(block, x, use_reentrant=False)

    x = gs.sample(denoiser, z0, SIGMAS, memory=STRATEGIES[memory](tmp_path))
    with pytest.raises(gs.ReplayError, match="must draw nothing"):
        x.sum().backward()
    assert z0.grad is None


@replaying
def test_two_elements_that_change_places_are_an_error(memory, tmp_path):
    # Far from each other, in an output of which a sample of elements would show neither.
    z0, calls = leaf(normal(2, 4, 32, 32)), []

    def denoiser(x, sigma):
        calls.append(sigma)
        y = torch.tanh(x).flatten()
        if len(calls) > len(SIGMAS) - 1:
            order = torch.arange(len(y))
            order[[1001, 6007]] = order[[6007, 1001]]
            y = y[order]
        return y.view(x.shape)

    x = gs.sample(denoiser, z0, SIGMAS, memory=STRATEGIES[memory](tmp_path))
    with pytest.raises(gs.ReplayError, match="another output at step"):
        x.sum().backward()
    assert z0.grad is None


# The comparison of a call with its replay.

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
# Far from a change, and far from rounding: the size of a change that must show in any element.
VISIBLE = {torch.float64: 1e-7, torch.float32: 0.1, torch.float16: 0.5, torch.bfloat16: 1.0}
SHAPES = [(2, 3), (4, 16), (2, 4, 64, 64), (1, 3, 97, 101), (1, 16411), (1, 4, 512, 512)]


def differs(first, again):
    (flag,) = changed([(Sketch.of(first), Sketch.of(again))])
    return flag


@pairs(dtype=DTYPES, shape=SHAPES)
def test_a_change_of_any_element_is_seen(shape, dtype):
    output = normal(*shape, dtype=dtype)
    assert not differs(output, output.clone())
    assert not differs(output.mT, output.mT)
    places = torch.randperm(output.numel(), generator=torch.Generator().manual_seed(1))[:40]
    for place in (0, -1, *places.tolist()):
        other = output.clone()
        other.view(-1)[place] += VISIBLE[dtype]
        assert differs(output, other)
        assert differs(output.mT, other.mT)


@pairs(dtype=DTYPES, shape=[s for s in SHAPES if s != (2, 3)])
def test_two_elements_that_change_places_are_seen(shape, dtype):
    output = normal(*shape, dtype=dtype)
    flat, generator = output.view(-1), torch.Generator().manual_seed(2)
    unlike = 0
    while unlike < 100:
        i, j = torch.randint(len(flat), (2,), generator=generator).tolist()
        if abs(flat[i] - flat[j]) < {torch.float16: 1.0, torch.bfloat16: 2.0}.get(dtype, 0.1):
            continue
        unlike += 1
        other = output.clone()
        other.view(-1)[[i, j]] = flat[[j, i]]
        assert differs(output, other), (i, j)


@pytest.mark.parametrize("shape", [(4, 16), (2, 4, 64, 64)], ids=str)
def test_samples_that_change_places_are_seen(shape):
    output = normal(*shape)
    assert differs(output, output.flip(0))
    assert differs(output, output.roll(1, -1))
    assert differs(output, -output)


@pairs(share=[1e-3, 0.03, 1.0], mean=[0.0, 3.0, 100.0], dtype=DTYPES)
def test_rounding_is_not_taken_for_a_change(share, mean, dtype):
    for seed in range(20):
        output = mean + normal(2, 4, 64, 64, seed=seed)
        generator = torch.Generator().manual_seed(seed)
        hit = torch.rand(output.shape, generator=generator) < share
        up = normal(2, 4, 64, 64, seed=seed + 50).sign() * torch.finfo(dtype).eps
        other = torch.where(hit, output * (1 + up), output)
        assert not differs(output.to(dtype), other.to(dtype))


def test_a_float32_output_of_16_bit_arithmetic_may_be_rounded_so():
    output = normal(2, 4, 64, 64, dtype=torch.float32)
    other = output * (1 + 0.004 * normal(2, 4, 64, 64, seed=1).sign().float())
    first, again = (Sketch.of(x, [torch.bfloat16]) for x in (output, other))
    assert changed([(first, again)]) == [False]
    assert differs(output, other)
