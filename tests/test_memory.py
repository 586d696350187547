# SPDX-License-Identifier: Apache-2.0
"""What the memory strategies keep, and that what they give up costs no correctness.

The oracle is a loop in plain torch around the same denoiser, differentiated by autograd; the two
strategies are compared with each other only in addition to it.
"""

import re
import warnings
from contextlib import contextmanager
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

import gradsampler as gs
from support.alive import Watched, no_collector
from support.euler import euler
from support.gradients import assert_close, gradients
from support.networks import Net
from support.noises import KINDS, injections, make_noise
from support.problems import normal
from support.runs import LEVELS, SOLVERS, TYPICAL, injecting, leaf, levels
from support.strategies import STRATEGIES, memories, strategies
from support.tiers import pairs

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}  # relative, in the L2 norm
SIGMAS = levels(LEVELS)
STEPS = 6
MANY = gs.schedules.karras(STEPS, sigma_min=0.05, sigma_max=9.0)


def assert_same_gradients(output, expected, inputs, tolerance=1e-12):
    assert_close(output.detach(), expected.detach(), tolerance, "output")
    wanted = gradients(expected, inputs, retain_graph=True)
    got = gradients(output, inputs, retain_graph=True)
    for k, (g, w) in enumerate(zip(got, wanted, strict=True)):
        assert g.dtype == w.dtype
        assert_close(g, w, tolerance, f"gradient {k}")


# Agreement of the strategies.


@pairs(cheap={"solver": TYPICAL}, solver=SOLVERS, kind=KINDS, dtype=TOLERANCE)
def test_strategies_agree_on_every_target(solver, kind, dtype):
    z0, net = leaf(normal(4, 5, dtype=dtype)), Net(size=5, dtype=dtype)
    sigmas, shift = leaf(MANY), leaf(normal(5, dtype=dtype))
    options = injecting(solver) | {"solver": solver}
    count = injections(z0.detach(), sigmas.detach(), **options)
    noise, tensors = make_noise(kind, count, z0)
    inputs = [z0, shift, *net.parameters(), *tensors]
    store, checkpoint = (
        gs.sample(net, z0, sigmas, noise=noise, cond={"shift": shift}, memory=memory, **options)
        for memory in ("store", "checkpoint")
    )
    assert_same_gradients(checkpoint, store, inputs, TOLERANCE[dtype])
    # The gradient to a level is a difference of products of the size of the state over the level.
    assert_same_gradients(checkpoint, store, [sigmas], 100 * TOLERANCE[dtype])


@memories
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_against_a_loop(dtype, memory):
    z0, shift, net = leaf(normal(4, 5, dtype=dtype)), leaf(normal(5, dtype=dtype)), Net(5, dtype)
    sigmas = leaf(gs.schedules.karras(25, sigma_min=0.05, sigma_max=9.0))
    expected = euler(net, z0, sigmas, shift=shift)
    got = gs.sample(net, z0, sigmas, cond={"shift": shift}, memory=memory)
    assert got.dtype == dtype
    inputs = [z0, sigmas, shift, *net.parameters()]
    assert_same_gradients(got, expected, inputs, 10 * TOLERANCE[dtype])


def test_memory_names_and_objects():
    assert gs.memory.names() == sorted(gs.memory.names())
    assert {"auto", "checkpoint", "store"} <= set(gs.memory.names())
    z0 = leaf(normal(2, 3))
    expected = euler(Net(), z0)
    everyones = set(gs.memory.names()) - {"reversible"}  # which is for one solver alone
    for memory in [*everyones, gs.memory.Store(), gs.memory.Checkpoint()]:
        assert_same_gradients(gs.sample(Net(), z0, SIGMAS, memory=memory), expected, [z0])


# What is alive when.


def test_store_keeps_all_activations():
    denoiser, z0 = Watched(), leaf(normal(2, 3))
    with no_collector():
        x = gs.sample(denoiser, z0, MANY, memory="store")
        assert [a for a, _ in denoiser.alive] == list(range(STEPS))
        x.sum().backward()
        assert len(denoiser.activations) == STEPS
        assert Watched.count(denoiser.activations) == 0


def test_checkpoint_keeps_one_call_s_activations():
    denoiser, z0 = Watched(), leaf(normal(2, 3))
    with no_collector():
        x = gs.sample(denoiser, z0, MANY, memory="checkpoint")
        assert Watched.count(denoiser.activations) == 0
        x.sum().backward()
        assert len(denoiser.activations) == 2 * STEPS
        assert [a for a, _ in denoiser.alive] == [0] * 2 * STEPS
        assert Watched.count(denoiser.activations) == 0


def test_checkpoint_keeps_one_call_s_activations_under_guidance():
    denoiser, z0 = Watched(), leaf(normal(2, 3))
    with no_collector():
        x = gs.sample(gs.Guided(denoiser, 2.0, {}), z0, MANY, memory="checkpoint")
        x.sum().backward()
        assert [a for a, _ in denoiser.alive] == [0, 1] * 2 * STEPS  # its two branches
        assert Watched.count(denoiser.activations) == 0


def test_checkpoint_keeps_one_state_a_call():
    denoiser, z0 = Watched(), leaf(normal(2, 3))
    with no_collector():
        x = gs.sample(denoiser, z0, MANY, memory="checkpoint")
        assert [s for _, s in denoiser.alive] == list(range(STEPS))
        assert Watched.count(denoiser.states) == STEPS
        x.sum().backward()


def test_checkpoint_frees_its_states_after_backward():
    denoiser, z0 = Watched(), leaf(normal(2, 3))
    with no_collector():
        x = gs.sample(denoiser, z0, MANY, memory="checkpoint")
        x.sum().backward()
        assert x.grad_fn is not None
        assert Watched.count(denoiser.states) == 0


@memories
def test_states_go_with_the_output(memory):
    denoiser, z0 = Watched(), leaf(normal(2, 3))
    with no_collector():
        x = gs.sample(denoiser, z0, MANY, memory=memory)
        del x
        assert Watched.count(denoiser.states) == 0
        assert Watched.count(denoiser.activations) == 0


@memories
def test_output_goes_when_its_last_user_does(memory):
    z0 = leaf(normal(2, 3))
    with no_collector():
        x = gs.sample(Net(), z0, MANY, memory=memory)
        reference = StorageWeakRef(x.untyped_storage())
        x.sum().backward()
        del x
        assert reference.expired()


@memories
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_kept_without_grad_mode(mode, memory):
    denoiser, z0 = Watched(), leaf(normal(2, 3))
    with no_collector(), mode():
        x = gs.sample(denoiser, z0, MANY, memory=memory)
        assert x.grad_fn is None
        assert not x.requires_grad
        assert max(denoiser.alive) <= (1, 1)
        assert Watched.count(denoiser.states) == 0


@memories
def test_nothing_is_kept_where_nothing_requires_grad(memory):
    denoiser, z0 = Watched(), normal(2, 3)
    denoiser.weight.requires_grad_(False)
    with no_collector():
        x = gs.sample(denoiser, z0, MANY, memory=memory)
        assert not x.requires_grad
        assert Watched.count(denoiser.states) == 0
        assert Watched.count(denoiser.activations) == 0


@memories
def test_a_run_under_no_grad_gives_the_same_sample(memory):
    z0, sigmas = leaf(normal(2, 3)), leaf(MANY)
    options = {"solver": "dpmpp_2m_sde", "memory": memory}
    expected = gs.sample(Net(), z0, sigmas, **options).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = gs.sample(Net(), z0, sigmas, **options)
            assert not got.requires_grad
            assert torch.equal(got, expected)


@memories
def test_no_warning_where_no_gradient_is_asked_for(memory):
    # A denoiser under no_grad is nothing to warn of in a run without gradients.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x = gs.sample(torch.no_grad()(Net()), normal(2, 3), SIGMAS, memory=memory)
    assert not x.requires_grad


@memories
def test_initial_noise_from_inference_mode(memory):
    with torch.inference_mode():
        z0 = normal(2, 3)
    net = Net()
    expected = gradients(euler(net, z0.clone()), net.weight)
    got = gradients(gs.sample(net, z0, SIGMAS, memory=memory), net.weight)
    assert_close(got[0], expected[0])


# Which targets receive a gradient.


@memories
def test_frozen_parameters_receive_none(memory):
    net, z0 = Net(), leaf(normal(2, 3))
    net.weight.requires_grad_(False)
    gs.sample(net, z0, SIGMAS, memory=memory).sin().sum().backward()
    expected = gradients(euler(net, z0), [z0, net.bias])
    assert net.weight.grad is None
    assert_close(z0.grad, expected[0])
    assert_close(net.bias.grad, expected[1])


TARGETS = ["z0", "cond", "nested cond", "parameter", "closure", "levels", "noise"]


@memories
@pytest.mark.parametrize("target", TARGETS)
def test_single_target(target, memory):
    z0, shift, net, sigmas = normal(2, 3), normal(3, seed=1), Net(), SIGMAS.clone()
    net.requires_grad_(False)
    added = [normal(2, 3, seed=k) for k in range(3)]
    free = normal(3, seed=9)
    inputs = {
        "z0": z0,
        "cond": shift,
        "nested cond": shift,
        "parameter": net.weight,
        "closure": free,
        "levels": sigmas,
        "noise": added[1],
    }
    inputs[target].requires_grad_()

    def denoiser(x, sigma, shift):
        return net(x, sigma, shift[0]["value"]) + 0.1 * torch.cos(free * x)

    def loop():
        x, noises = sigmas[0] * z0, iter(added)
        for i in range(3):
            s, t = sigmas[i], sigmas[i + 1]
            up = t / s * torch.sqrt(s**2 - t**2)
            down = torch.sqrt(t**2 - up**2)
            d = denoiser(x, s.expand(2), [{"value": shift}])
            x = x + (down - s) * (x - d) / s + up * next(noises)
        return x

    x = gs.sample(
        denoiser,
        z0,
        sigmas,
        solver="euler_ancestral",
        noise=gs.noise.Given(added),
        cond={"shift": [{"value": shift}]},
        memory=memory,
    )
    x.sin().sum().backward()
    (expected,) = gradients(loop(), [inputs[target]])
    assert_close(inputs[target].grad, expected)
    others = [tensor for tensor in inputs.values() if tensor is not inputs[target]]
    assert all(tensor.grad is None for tensor in others)


@memories
def test_tensors_outside_the_run_s_knowledge(memory):
    # Conditioning in an object of the caller's: no dict, list or tuple leads to the tensor.
    class Prompt:
        def __init__(self):
            self.leaf = leaf(normal(3, seed=2))
            self.embedding = torch.tanh(self.leaf)

    prompt, z0 = Prompt(), leaf(normal(2, 3))

    def denoiser(x, sigma, prompt):
        return torch.tanh(x * prompt.embedding) + 0.1 * prompt.leaf

    expected = euler(denoiser, z0, prompt=prompt)
    wanted = gradients(expected, [z0, prompt.leaf], retain_graph=True)
    x = gs.sample(denoiser, z0, SIGMAS, cond={"prompt": prompt}, memory=memory)
    for g, w in zip(gradients(x, [z0, prompt.leaf]), wanted, strict=True):
        assert_close(g, w)


@memories
def test_targets_with_a_graph_of_their_own(memory):
    root = leaf(normal(3, seed=1))

    def run(sampler):
        z0 = normal(2, 3) * root.exp()
        sigmas = SIGMAS * (1 + 0.1 * root.sum().tanh())
        return sampler(Net(), z0, sigmas, root.sin())

    expected = run(lambda net, z0, sigmas, shift: euler(net, z0, sigmas, shift=shift))
    got = run(
        lambda net, z0, sigmas, shift: gs.sample(
            net, z0, sigmas, cond={"shift": shift}, memory=memory
        )
    )
    assert_same_gradients(got, expected, [root])


@memories
def test_a_denoiser_closing_over_a_module_and_a_graph(memory):
    net, root, z0 = Net(), leaf(normal(3, seed=1)), leaf(normal(2, 3))

    def run(sampler):
        captured = torch.tanh(root * 2)  # made before the run, part of a graph outside it
        x = sampler(lambda x, s: net(x, s) * captured)
        return x + captured  # and used after it once more

    expected = run(partial(euler, z0=z0))
    got = run(partial(gs.sample, z0=z0, sigmas=SIGMAS, memory=memory))
    assert_same_gradients(got, expected, [z0, root, *net.parameters()])


@memories
def test_a_captured_tensor_made_of_z0(memory):
    net, z0 = Net(), leaf(normal(2, 3))

    def run(sampler):
        captured = 0.1 * z0 * z0
        return sampler(lambda x, s: net(x, s) + captured)

    expected = run(partial(euler, z0=z0))
    got = run(partial(gs.sample, z0=z0, sigmas=SIGMAS, memory=memory))
    assert_same_gradients(got, expected, [z0, net.weight])


@memories
def test_two_experts(memory):
    # Each level has its own network, as in Wan 2.2: neither is reached by every call.
    z0, high, low = leaf(normal(2, 3)), Net(), nn.Linear(3, 3).double()

    def denoiser(x, sigma):
        return high(x, sigma) if sigma[0] > 1 else torch.tanh(low(x))

    inputs = [z0, *high.parameters(), *low.parameters()]
    expected = euler(denoiser, z0)
    assert_same_gradients(gs.sample(denoiser, z0, SIGMAS, memory=memory), expected, inputs)


@memories
@pytest.mark.parametrize("used", [0, 1, 2])
def test_a_parameter_used_at_one_step(used, memory):
    z0, weight = normal(2, 3), leaf(normal(3, seed=1))

    def denoiser(x, sigma):
        return torch.tanh(x * weight) if sigma[0] == SIGMAS[used] else torch.tanh(x)

    expected = euler(denoiser, z0)
    assert_same_gradients(gs.sample(denoiser, z0, SIGMAS, memory=memory), expected, [weight])


class Late:
    """A denoiser that uses its weight from one call on, if at all, and counts its states."""

    def __init__(self, first=None):
        self.weight, self.first = leaf(normal(3, seed=1)), first
        self.states, self.alive = [], []

    def __call__(self, x, sigma):
        self.alive.append(Watched.count(self.states))
        self.states.append(StorageWeakRef(x.untyped_storage()))
        used = self.first is not None and sigma[0] <= MANY[self.first]
        return torch.tanh(x * self.weight) if used else torch.tanh(x)


@pytest.mark.parametrize("memory", ["checkpoint", "auto"])
def test_a_run_that_no_gradient_follows_keeps_nothing(memory):
    denoiser = Late()
    with no_collector():
        x = gs.sample(denoiser, normal(2, 3), MANY, memory=memory)
    assert not x.requires_grad
    assert len(denoiser.states) == STEPS
    assert max(denoiser.alive) <= 1  # the state before, at most
    assert Watched.count(denoiser.states) == 0


@pytest.mark.parametrize("first", [1, 4])
def test_nothing_is_kept_of_the_calls_before_the_first_with_a_gradient(first):
    denoiser, z0 = Late(first), normal(2, 3)
    (wanted,) = gradients(euler(denoiser, z0, MANY), [denoiser.weight])
    denoiser.states.clear()
    with no_collector():
        x = gs.sample(denoiser, z0, MANY, memory="checkpoint")
        assert Watched.count(denoiser.states) == STEPS - first
        (got,) = gradients(x, [denoiser.weight])
    assert len(denoiser.states) == STEPS + STEPS - first
    assert_close(got, wanted)


@strategies
@pytest.mark.parametrize("first", [0, 1, 5])
def test_a_weight_that_is_used_late(first, memory, tmp_path):
    denoiser, z0 = Late(first), normal(2, 3)
    (wanted,) = gradients(euler(denoiser, z0, MANY), [denoiser.weight])
    x = gs.sample(denoiser, z0, MANY, memory=STRATEGIES[memory](tmp_path))
    for again in (True, False):
        (got,) = gradients(x, [denoiser.weight], retain_graph=again)
        assert_close(got, wanted)


@memories
@pytest.mark.parametrize("detached", [0, 1, 4, None])
def test_a_call_that_detaches_is_seen_among_those_of_other_graphs(detached, memory):
    # Each way through the network is another one than that of the call before.
    z0, weight, calls = leaf(normal(2, 3)), leaf(normal(3, seed=1)), []

    def denoiser(x, sigma):
        step = len(calls) % STEPS
        calls.append(sigma)
        y = x.detach() if step == detached else x
        for _ in range(step % 3):
            y = y.sin() if step % 2 else y.exp() + 1
        return weight * y if step % 2 else y * weight

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gs.sample(denoiser, z0, MANY, memory=memory)
    assert [w.message.step for w in caught] == ([] if detached is None else [detached])


@memories
def test_a_denoiser_that_changes_its_level(memory):
    # Heun's method asks twice at most levels.
    z0, sigmas = leaf(normal(2, 3)), levels(LEVELS)

    def scaled(x, c):
        return torch.tanh(x) * c[:, None]

    def changing(x, sigma):
        return scaled(x, sigma.log_().sin_())

    def pure(x, sigma):
        return scaled(x, sigma.log().sin())

    expected = gs.sample(pure, z0, sigmas, solver="heun", memory="store")
    x = gs.sample(changing, z0, sigmas, solver="heun", memory=memory)
    assert_same_gradients(x, expected, [z0])


@memories
@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m", "res_2mid", "res_2mid_stable"])
def test_a_denoiser_that_ignores_its_state(solver, memory):
    # Rightly constant in x: the linear part of the solver still carries the gradient.
    z0, constant = leaf(normal(2, 3)), leaf(normal(3, seed=1))

    def denoiser(x, sigma):
        return constant.expand_as(x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gs.GradientWarning)
        x = gs.sample(denoiser, z0, SIGMAS, solver=solver, memory=memory)
    g, dconstant = torch.autograd.grad(x.sum(), [z0, constant])
    # Every consistent solver maps (x0 + s*e) along the ray, exactly where D is constant; the
    # multistep and midpoint forms above do so for any D that does not change.
    assert_close(g, torch.full_like(g, LEVELS[-1]))
    share = 1 - LEVELS[-1] / LEVELS[0]
    assert_close(dconstant, torch.full_like(dconstant, 2 * share))


@memories
def test_parameter_hooks_run_once_and_see_the_whole_gradient(memory):
    z0, net = leaf(normal(2, 3)), Net()
    (expected,) = gradients(euler(net, z0), [net.weight])
    seen = []
    handle = net.weight.register_hook(lambda g: seen.append(g.clone()) or 2 * g)
    gs.sample(net, z0, SIGMAS, memory=memory).sin().sum().backward()
    handle.remove()
    assert_close(net.weight.grad, 2 * expected)
    assert len(seen) == 1
    assert_close(seen[0], expected)


HOOKS = {"linear": lambda g: 3 * g}


@memories
@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_on_a_captured_tensor_with_a_graph(hook, memory):
    z0, root = leaf(normal(2, 3)), leaf(normal(3, seed=1))

    def run(sampler):
        captured = root * 2
        captured.register_hook(HOOKS[hook])
        return sampler(lambda x, s: torch.tanh(x * captured))

    expected = run(partial(euler, z0=z0))
    got = run(partial(gs.sample, z0=z0, sigmas=SIGMAS, memory=memory))
    assert_same_gradients(got, expected, [z0, root])


# Randomness, autocast and grad mode of the second call.


class Dropping(Net):
    """A network with dropout."""

    def forward(self, x, sigma):
        return super().forward(nn.functional.dropout(x, 0.4), sigma)


def rand_inside(x, sigma):
    return torch.tanh(x * (0.5 + torch.rand(x.shape, dtype=x.dtype)))


RANDOM = {"dropout": Dropping(), "rand": rand_inside}


@memories
@pytest.mark.parametrize("name", RANDOM)
def test_a_denoiser_that_draws(name, memory):
    denoiser, z0 = RANDOM[name], leaf(normal(2, 3))
    inputs = [z0, *(denoiser.parameters() if isinstance(denoiser, nn.Module) else ())]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        expected = euler(denoiser, z0, MANY)
        after = torch.get_rng_state()
        wanted = gradients(expected, inputs)
        torch.manual_seed(3)
        got = gs.sample(denoiser, z0, MANY, memory=memory)
        assert torch.equal(torch.get_rng_state(), after)
        torch.manual_seed(4)  # whatever was drawn between the run and its backward
        before = torch.get_rng_state()
        found = gradients(got, inputs)
        assert torch.equal(torch.get_rng_state(), before)
    assert_close(got.detach(), expected.detach())
    for g, w in zip(found, wanted, strict=True):
        assert_close(g, w)


@memories
def test_a_failing_replay_leaves_the_random_state(memory):
    z0, calls = leaf(normal(2, 3)), []

    def denoiser(x, sigma):
        calls.append(torch.rand(()))
        if len(calls) > 3:
            raise KeyError("out of luck")
        x.register_hook(fail)
        return torch.tanh(x)

    def fail(g):
        raise KeyError("out of luck")

    x = gs.sample(denoiser, z0, SIGMAS, memory=memory)
    before = torch.get_rng_state()
    with pytest.raises(KeyError):
        x.sum().backward()
    assert torch.equal(torch.get_rng_state(), before)
    assert z0.grad is None


@memories
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_denoiser_with_a_generator_of_its_own(dtype, memory):
    z0, generator = leaf(normal(4, 5, dtype=dtype)), torch.Generator()

    def denoiser(x, sigma):
        return torch.tanh(x * (0.5 + torch.rand(x.shape, dtype=x.dtype, generator=generator)))

    def run(memory):
        generator.manual_seed(3)
        return gs.sample(denoiser, z0, SIGMAS, memory=memory)

    if memory == "store" and dtype == torch.float64:
        generator.manual_seed(3)
        (expected,) = gradients(euler(denoiser, z0), [z0])
    else:  # in narrow dtypes the state's dtype is the run's own affair
        (expected,) = gradients(run("store"), [z0])
    assert_close(*gradients(run(memory), [z0]), expected, 4 * torch.finfo(dtype).eps)


@memories
@pytest.mark.parametrize("cached", [False, True], ids=["no-cache", "cache"])
def test_autocast_around_the_run_alone(cached, memory):
    class Layers(nn.Module):
        def __init__(self):
            super().__init__()
            generator = torch.Generator().manual_seed(5)
            self.weights = nn.ParameterList(
                torch.randn(8, 8, generator=generator) / 3 for _ in range(2)
            )
            self.seen = []

        def forward(self, x, sigma):
            hidden = torch.tanh(x) @ self.weights[0]
            self.seen.append((x.dtype, hidden.dtype, torch.is_autocast_enabled("cpu")))
            return (torch.tanh(hidden) @ self.weights[1]).float() * torch.cos(sigma).view(-1, 1)

    net, z0 = Layers(), leaf(normal(4, 8, dtype=torch.float32))
    context = partial(torch.autocast, "cpu", torch.bfloat16, cache_enabled=cached)
    with context():
        expected = euler(net, z0, SIGMAS)
    wanted = gradients(expected, [z0, *net.weights])
    net.seen.clear()
    with context():
        got = gs.sample(net, z0, SIGMAS, memory=memory)
    assert not torch.is_autocast_enabled("cpu")
    found = gradients(got, [z0, *net.weights])
    assert not torch.is_autocast_enabled("cpu")
    assert len(net.seen) == (6 if memory == "checkpoint" else 3)
    assert set(net.seen) == {(torch.float32, torch.bfloat16, True)}
    # Roundings of the state before it is cast to bfloat16 may differ in the last bit.
    assert_close(got.detach(), expected.detach(), 4e-3)
    assert_close(found[0], wanted[0], 8e-3)
    for g, w in zip(found[1:], wanted[1:], strict=True):
        assert_close(g, w, 8e-3)


@pytest.mark.parametrize("around", ["run", "backward", "both"])
@pytest.mark.parametrize("cached", [False, True], ids=["no-cache", "cache"])
def test_strategies_agree_under_autocast(cached, around):
    weight, z0 = leaf(normal(8, 8, dtype=torch.float32)), leaf(normal(4, 8, dtype=torch.float32))

    def context(part):
        enabled = around in (part, "both")
        return torch.autocast("cpu", torch.bfloat16, enabled=enabled, cache_enabled=cached)

    def run(memory):
        with context("run"):
            x = gs.sample(lambda x, s: torch.tanh(x @ weight).float(), z0, MANY, memory=memory)
        with context("backward"):
            return x, *gradients(x, [z0, weight])

    store, checkpoint = run("store"), run("checkpoint")
    assert_close(checkpoint[0], store[0], 1e-6)
    assert_close(checkpoint[1], store[1], 1e-6)
    # A cached cast collects the steps' gradients in bfloat16; the replay collects in float32.
    cast_once = cached and around != "backward"
    assert_close(checkpoint[2], store[2], 2e-2 if cast_once else 1e-6)


@pytest.mark.parametrize("wanted", [True, False], ids=["grad", "no-grad"])
def test_grad_mode_is_the_same_in_both_calls(wanted):
    seen = []

    def denoiser(x, sigma):
        seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled(), x.requires_grad))
        return torch.tanh(x)

    z0 = leaf(normal(2, 3))
    with torch.set_grad_enabled(wanted):
        x = gs.sample(denoiser, z0, SIGMAS, memory="checkpoint")
    if wanted:
        x.sum().backward()
        assert seen == [(True, False, True)] * 6
    else:
        assert seen == [(False, False, False)] * 3


@memories
def test_grad_mode_afterwards(memory):
    z0 = leaf(normal(2, 3))
    loss = gs.sample(Net(), z0, SIGMAS, memory=memory).sum()
    assert torch.is_grad_enabled()
    with torch.no_grad():
        gs.sample(Net(), z0, SIGMAS, memory=memory)
        assert not torch.is_grad_enabled()
        loss.backward()
        assert not torch.is_grad_enabled()


# Changes between the run and its backward: a right gradient or an error, never a wrong one.


@contextmanager
def right_or_an_error():
    try:
        yield
    except RuntimeError as error:
        if not re.search("modified by an inplace operation|must return the same", str(error)):
            raise


def change_parameter(net, shift):
    net.weight.add_(1)


def change_frozen(net, shift):
    net.frozen.add_(1)


def change_buffer(net, shift):
    net.buffer.add_(1)


def change_cond(net, shift):
    shift.add_(1)


class Scaled(Net):
    """With a frozen parameter and a buffer that the gradient depends on."""

    def __init__(self):
        super().__init__()
        self.frozen = nn.Parameter(normal(3, seed=6), requires_grad=False)
        self.register_buffer("buffer", normal(3, seed=7))

    def forward(self, x, sigma, shift):
        return super().forward(x * self.frozen * self.buffer, sigma, shift)


@memories
@pytest.mark.parametrize("change", [change_parameter, change_frozen, change_buffer, change_cond])
@pytest.mark.parametrize("learned", [True, False], ids=["learned-cond", "plain-cond"])
def test_change_in_place_before_backward_does_not_pass_silently(change, learned, memory):
    net, z0 = Scaled(), leaf(normal(2, 3))
    shift = normal(3).requires_grad_(learned)
    (expected,) = gradients(euler(net, z0, shift=shift), [z0])
    x = gs.sample(net, z0, SIGMAS, cond={"shift": shift}, memory=memory)
    with torch.no_grad():
        change(net, shift)
    with right_or_an_error():
        assert_close(*gradients(x, [z0]), expected)


@memories
def test_z0_may_change_after_backward(memory):
    # What every optimiser does.
    z0 = leaf(normal(2, 3))
    optimizer = torch.optim.SGD([z0], lr=0.1)
    reference = leaf(normal(2, 3))
    for _ in range(3):
        optimizer.zero_grad()
        gs.sample(Net(), z0, SIGMAS, memory=memory).sin().sum().backward()
        (g,) = gradients(euler(Net(), reference), [reference])
        assert_close(z0.grad, g, 1e-11)
        optimizer.step()
        with torch.no_grad():
            reference -= 0.1 * g


@memories
def test_z0_changed_before_backward_does_not_pass_silently(memory):
    z0, net = leaf(normal(2, 3)), Net()
    options = {"noise": gs.noise.SinCos(), "churn": gs.Churn(1.0), "memory": memory}
    (expected,) = gradients(gs.sample(net, z0, SIGMAS, **options), [z0])
    x = gs.sample(net, z0, SIGMAS, **options)
    with torch.no_grad():
        z0.add_(1)
    with right_or_an_error():
        assert_close(*gradients(x, [z0]), expected)


@memories
@pytest.mark.parametrize("written", ["state", "parameter"])
def test_a_callback_that_writes(written, memory):
    z0, net = leaf(normal(2, 3)), Net()

    def write(info):
        if info.step == len(SIGMAS) - 2:
            with torch.no_grad():
                (info.x if written == "state" else net.weight).zero_()

    (expected,) = gradients(euler(net, z0), [z0])
    x = gs.sample(net, z0, SIGMAS, memory=memory, callback=write)
    with right_or_an_error():
        assert_close(*gradients(x, [z0]), expected)


@memories
def test_the_output_may_change_in_place(memory):
    z0, net = leaf(normal(2, 3)), Net()
    x = gs.sample(net, z0, SIGMAS, solver="heun", memory=memory, final_denoise=True)
    y = gs.sample(net, z0, SIGMAS, solver="heun", memory=memory, final_denoise=True)
    (expected,) = torch.autograd.grad((3 * x).sum(), z0)
    y.mul_(3)
    (got,) = torch.autograd.grad(y.sum(), z0)
    assert_close(got, expected)


# Backward more than once, and of itself.


@memories
def test_backward_twice(memory):
    z0, net = leaf(normal(2, 3)), Net()
    inputs = [z0, net.weight]
    x = gs.sample(net, z0, SIGMAS, solver="euler_ancestral", memory=memory)
    first = gradients(x, inputs, retain_graph=True)
    second = gradients(x, inputs)
    assert all(map(torch.equal, first, second))
    with pytest.raises(RuntimeError, match="second time"):
        gradients(x, inputs)


@memories
def test_backward_of_two_losses(memory):
    z0, net = leaf(normal(2, 3)), Net()
    x = gs.sample(net, z0, SIGMAS, memory=memory)
    expected = euler(net, z0)
    for loss in (lambda x: x[0].sum(), lambda x: (x[1] ** 2).sum()):
        (g,) = torch.autograd.grad(loss(x), z0, retain_graph=True)
        (w,) = torch.autograd.grad(loss(expected), z0, retain_graph=True)
        assert_close(g, w)


@memories
def test_gradients_accumulate_over_runs(memory):
    z0, net = leaf(normal(2, 3)), Net()
    for k in (1, 2):
        gs.sample(net, z0, SIGMAS, memory=memory).sin().sum().backward()
        expected = gradients(euler(net, z0), [z0, net.weight])
        assert_close(z0.grad, k * expected[0])
        assert_close(net.weight.grad, k * expected[1])


@memories
def test_a_run_after_a_run(memory):
    z0, net = leaf(normal(2, 3)), Net()
    x = gs.sample(net, gs.sample(net, z0, SIGMAS, memory=memory), SIGMAS, memory=memory)
    expected = euler(net, euler(net, z0))
    assert_same_gradients(x, expected, [z0, *net.parameters()])


def test_a_run_as_the_denoiser_of_a_run():
    z0, net = leaf(normal(2, 3)), Net()
    short = levels([1.0, 0.4])
    expected = euler(lambda x, s: euler(net, x, short), z0)
    for outer in ("store", "checkpoint"):
        for inner in ("store", "checkpoint"):
            x = gs.sample(
                lambda x, s, inner=inner: gs.sample(net, x, short, memory=inner),
                z0,
                SIGMAS,
                memory=outer,
            )
            wanted = gradients(expected, [z0, net.weight], retain_graph=True)
            for g, w in zip(gradients(x, [z0, net.weight]), wanted, strict=True):
                assert_close(g, w)


@pytest.mark.parametrize("solver", ["euler", "heun", "dpmpp_2m", "euler_ancestral"])
def test_store_has_a_second_derivative(solver):
    z0, shift, net = leaf(normal(1, 3)), leaf(normal(3)), Net()

    def run(*_):
        return gs.sample(net, z0, SIGMAS, solver=solver, cond={"shift": shift}, memory="store")

    assert torch.autograd.gradgradcheck(run, (z0, shift, net.bias), eps=1e-5, atol=1e-6, rtol=1e-5)


LOSSES = {
    "linear": lambda x, z0: x.sum(),
    "curved": lambda x, z0: x.sin().sum(),
    "with-another-term": lambda x, z0: x.sin().sum() + (z0**2).sum(),
    "linear-with-another-term": lambda x, z0: x.sum() + (z0**2).sum(),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_checkpoint_refuses_a_second_derivative_in_words(loss):
    # A penalty on the gradient must not lose the run's part of it without a word.
    z0, net = leaf(normal(1, 3)), Net()
    x = gs.sample(net, z0, SIGMAS, memory="checkpoint")

    def second():
        (g,) = torch.autograd.grad(LOSSES[loss](x, z0), z0, create_graph=True)
        return torch.autograd.grad((g**2).sum(), z0)

    with pytest.raises(RuntimeError, match="store"):
        second()


@memories
def test_expanded_incoming_gradient(memory):
    z0, net = leaf(normal(2, 3)), Net()
    for loss in (
        torch.sum,
        torch.mean,
        lambda x: x[:, 0].sum(),
        lambda x: x.T.flatten()[::2].sum(),
    ):
        (g,) = torch.autograd.grad(loss(gs.sample(net, z0, SIGMAS, memory=memory)), z0)
        (w,) = torch.autograd.grad(loss(euler(net, z0)), z0)
        assert_close(g, w)


# Dtypes.


@memories
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_z0_has_a_float32_state(dtype, memory):
    z0, weight = leaf(normal(4, 5, dtype=dtype)), leaf(normal(5, seed=1, dtype=torch.float32))
    seen, states = [], []

    def denoiser(x, sigma):
        seen.append((x.dtype, sigma.dtype))
        return torch.tanh(x * weight.to(x.dtype))

    def loop():
        x = SIGMAS[0] * z0.float()
        for s, t in pairwise(SIGMAS):
            d = denoiser(x.to(dtype), s.float().expand(len(x)))
            x = (t / s) * x + (1 - t / s) * d.float()
        return x.to(dtype)

    expected = loop()
    seen.clear()
    x = gs.sample(denoiser, z0, SIGMAS, memory=memory, callback=lambda i: states.append(i.x.dtype))
    assert x.dtype == dtype
    assert set(states) == {torch.float32}
    wanted, found = gradients(expected, [z0, weight]), gradients(x, [z0, weight])
    assert set(seen) == {(dtype, torch.float32)}
    assert found[0].dtype == dtype
    assert found[1].dtype == torch.float32
    unit = torch.finfo(dtype).eps
    assert_close(x.detach(), expected.detach(), unit)
    assert_close(found[0], wanted[0], unit)
    assert_close(found[1], wanted[1], unit)


@memories
def test_half_z0_with_a_float32_network_never_rounds_between_the_steps(memory):
    z0, net = leaf(normal(4, 5, dtype=torch.bfloat16)), Net(5, torch.float32)
    x = gs.sample(net, z0, MANY, memory=memory)
    exact = euler(Net(5), z0.double(), MANY)
    assert x.dtype == torch.bfloat16
    assert torch.equal(x, exact.to(torch.bfloat16))
    (g,) = torch.autograd.grad(x.float().sum(), z0)
    (w,) = torch.autograd.grad(exact.sum(), z0)
    assert g.dtype == torch.bfloat16
    torch.testing.assert_close(g, w.to(torch.bfloat16), rtol=2**-7, atol=0)


@memories
def test_float64_state_of_a_float32_run(memory):
    z0, states, seen = leaf(normal(4, 5, dtype=torch.float32)), [], []

    def denoiser(x, sigma):
        seen.append((x.dtype, sigma.dtype))
        return 0.3 * x

    x = gs.sample(
        denoiser,
        z0,
        SIGMAS,
        memory=memory,
        state_dtype=torch.float64,
        callback=lambda info: states.append(info.x.dtype),
    )
    (g,) = torch.autograd.grad(x.sum(), z0)
    assert x.dtype == g.dtype == torch.float32
    assert set(states) == {torch.float64}
    assert set(seen) == {(torch.float32, torch.float32)}
    assert_close(x.detach(), euler(lambda x, s: 0.3 * x, z0.detach().double()), 1e-6)


@memories
def test_network_dtype_decides_the_call(memory):
    z0, net, seen = leaf(normal(2, 3, dtype=torch.float32)), Net(), []
    net.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    x = gs.sample(net, z0, SIGMAS, memory=memory)
    (g,) = torch.autograd.grad(x.sum(), z0)
    assert x.dtype == g.dtype == torch.float32
    assert set(seen) == {torch.float64}


@memories
def test_gradients_of_narrow_targets_keep_their_dtype(memory):
    z0 = leaf(normal(2, 3))
    shift, weight = leaf(normal(3, dtype=torch.float32)), leaf(normal(3, dtype=torch.bfloat16))
    sigmas, amount = leaf(SIGMAS.float()), leaf(normal(2, 3, dtype=torch.float16))

    def denoiser(x, sigma, shift):
        return torch.tanh(x * weight + shift) * sigma.cos().view(-1, 1)

    x = gs.sample(
        denoiser,
        z0,
        sigmas,
        solver="euler_ancestral",
        cond={"shift": shift},
        noise=gs.noise.Given([amount, amount * 2, -amount]),
        memory=memory,
    )
    x.sum().backward()
    for target in (z0, shift, weight, sigmas, amount):
        assert target.grad.dtype == target.dtype
        assert target.grad.isfinite().all()


@memories
def test_cond_that_is_no_floating_tensor(memory):
    z0, table = leaf(normal(2, 3)), leaf(normal(5, 3, seed=1))
    cond = {
        "label": torch.tensor([1, 4]),
        "mask": torch.tensor([True, False]),
        "name": "text",
        "more": None,
        "pair": (torch.tensor(3), 0.5),
    }

    def denoiser(x, sigma, label, mask, name, more, pair):
        assert (name, more, pair[1]) == ("text", None, 0.5)
        assert isinstance(pair, tuple)
        assert label.dtype == torch.int64
        return torch.tanh(x * table[label]) * mask.view(-1, 1) + pair[0] * 0.1

    expected = euler(denoiser, z0, **cond)
    got = gs.sample(denoiser, z0, SIGMAS, cond=cond, memory=memory)
    assert_same_gradients(got, expected, [z0, table])
