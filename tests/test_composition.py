# SPDX-License-Identifier: Apache-2.0
"""Runs around denoisers with machinery of their own: activation checkpoints, autocast,
torch.compile, CUDA graphs, functional calls.

The oracle is a plain loop around the same network without that machinery.
"""

import re
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
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


def run(sampler, net, dtype=torch.float64):
    """The sample and the gradients of a sampler of (denoiser, z0)."""
    torch.manual_seed(7)
    z0 = leaf(normal(3, Layers.size, dtype=dtype))
    x = sampler(net, z0)
    torch.manual_seed(8)  # backward must not depend on it
    return x.detach(), *gradients(x, [z0, *net.parameters()])


def strategy(memory, folder, solver="euler"):
    return partial(gs.sample, sigmas=SIGMAS, solver=solver, memory=STRATEGIES[memory](folder))


def assert_all_close(got, expected, tolerance=1e-12):
    for k, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert_close(a, b, tolerance, f"{k}")


# The denoiser's own activation checkpoints.


@strategies
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_activation_checkpoints_inside(dropout, memory, tmp_path):
    net = Layers(dropout)
    expected = run(euler, net)
    net.around = partial(checkpoint, use_reentrant=False)
    assert_all_close(run(strategy(memory, tmp_path), net), expected)


@replaying
def test_an_activation_checkpoint_that_forgets_its_random_state_is_an_error(memory, tmp_path):
    # torch takes preserve_rng_state=False at its word: the gradient is that of another dropout.
    net = Layers(0.4)
    net.around = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    with pytest.raises(gs.ReplayError, match="preserve_rng_state=True"):
        run(strategy(memory, tmp_path), net)


@replaying
def test_a_reentrant_checkpoint_is_refused_by_torch(memory, tmp_path):
    net = Layers()
    net.around = partial(checkpoint, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        run(strategy(memory, tmp_path), net)


# Autocast.


@strategies
@pytest.mark.parametrize("where", ["around the run", "around both", "inside"])
def test_autocast(where, memory, tmp_path):
    net, mixed = Layers(dtype=torch.float32), partial(torch.autocast, "cpu", torch.bfloat16)

    def within(sampler):
        def sampled(net, z0):
            denoiser = mixed()(net) if where == "inside" else net
            with nullcontext() if where == "inside" else mixed():
                return sampler(lambda x, s: denoiser(x, s).float(), z0)

        with mixed() if where == "around both" else nullcontext():
            return run(sampled, net, torch.float32)

    got, expected = within(strategy(memory, tmp_path)), within(euler)
    assert {x.dtype for x in got} == {torch.float32}
    # The state, rounded to bfloat16 on its way in, may differ in its last bit; the casts of
    # weights collect their gradients in bfloat16 in one run, and in float32 in another.
    assert_all_close(got, expected, 2e-2)
    exact = run(euler, net, torch.float32)
    assert (got[1] - exact[1]).norm() > 1e-4 * exact[1].norm()  # there were bfloat16 numbers


# Compiled denoisers.


@pairs(
    cheap={"memory": ["auto", "store", "checkpoint"]}, solver=["euler", "heun"], memory=STRATEGIES
)
@compiling
def test_a_compiled_denoiser_is_compiled_once(solver, memory, tmp_path):
    net = Layers()
    expected = run(strategy("store", tmp_path, solver), net)
    if solver == "euler":
        assert_all_close(expected, run(euler, net))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(net, backend=counter, fullgraph=True)
    for _ in range(2):
        assert_all_close(run(strategy(memory, tmp_path, solver), compiled), expected)
    assert counter.frame_count == 1


@pytest.mark.parametrize("memory", few(REPLAYING, "checkpoint", "revolve:1+2"))
@compiling
def test_dropout_in_a_compiled_denoiser(memory, tmp_path):
    net = torch.compile(Layers(0.4), backend="aot_eager")
    assert_all_close(run(strategy(memory, tmp_path), net), run(euler, net))


@compiling
@pytest.mark.slow  # 20 s of the compiler's
def test_a_denoiser_compiled_to_machine_code(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    net = Layers(dtype=torch.float32)
    compiled, expected = torch.compile(net), run(euler, net, torch.float32)
    for memory in ("checkpoint", "revolve:1+2 to a folder"):
        assert_all_close(run(strategy(memory, tmp_path), compiled, torch.float32), expected, 1e-5)


# Compiled callers.


class Breaks:
    """Counts the graphs that a caller is broken into, and the operators that are in them."""

    def __init__(self, function):
        torch._dynamo.reset()
        self.counter = CompileCounterWithBackend("aot_eager")
        self.compiled = torch.compile(function, backend=self.counter)

    @property
    def count(self):
        return self.counter.frame_count - 1


@pytest.mark.parametrize("memory", few(["auto", "store", "checkpoint"], "auto"))
@compiling
def test_a_run_in_a_compiled_function_is_one_break_of_its_graph(memory):
    net, shift = Layers(), leaf(normal(Layers.size, seed=1))

    def image(z0):
        x = gs.sample(net, 2 * z0 + shift, SIGMAS, memory=memory)
        return torch.tanh(3 * x)

    def loop(z0):
        return torch.tanh(3 * euler(net, 2 * z0 + shift))

    breaks, z0 = Breaks(image), leaf(normal(3, Layers.size))
    inputs = [z0, shift, *net.parameters()]
    expected = loop(z0)
    for _ in range(2):
        got = breaks.compiled(z0)
        assert_close(got.detach(), expected.detach())
        wanted = gradients(expected, inputs, retain_graph=True)
        assert_all_close(gradients(got, inputs), wanted)
    assert breaks.count == 1
    assert breaks.counter.op_count == 4  # those around the call, and none of the run's


@compiling
@pytest.mark.thorough
def test_other_entries_in_a_compiled_function_are_one_break_each():
    program = gs.solvers.resolve("euler").program(
        SIGMAS, gs.parameterization.parameterize(torch.tanh, "x0")
    )

    def step(x, i):
        return torch.tanh(x) + i

    def through(call):
        return lambda z0: 2 * call(3 * z0)

    calls = {
        "iterate": lambda z0: gs.iteration.iterate(step, z0, 3),
        "integrate": lambda z0: gs.integrate(program, lambda x, s: torch.tanh(x), z0),
    }
    for call in calls.values():
        breaks, z0 = Breaks(through(call)), leaf(normal(3, 4))
        (got,) = gradients(breaks.compiled(z0), [z0])
        assert_close(got, *gradients(through(call)(z0), [z0]))
        assert breaks.count == 1


@compiling
@pytest.mark.thorough
def test_a_denoiser_that_is_compiled_in_a_compiled_function():
    net, z0 = Layers(), leaf(normal(3, Layers.size))
    counter = CompileCounterWithBackend("aot_eager")
    inner = torch.compile(net, backend=counter)
    breaks = Breaks(lambda z0: 2 * gs.sample(inner, 3 * z0, SIGMAS, memory="checkpoint"))
    (got,) = gradients(breaks.compiled(z0), [z0])
    assert_close(got, *gradients(2 * euler(net, 3 * z0), [z0]))
    assert breaks.count == counter.frame_count == 1


# Functional calls.


@strategies
def test_a_functional_call(memory, tmp_path):
    net, scale = Layers(), leaf(normal(1))
    free = {name: leaf(p) for name, p in net.named_parameters()}
    inputs = [*free.values(), scale]

    def denoiser(x, sigma):
        weights = {name: scale * p for name, p in free.items()}
        return torch.func.functional_call(net, weights, (x, sigma))

    z0 = leaf(normal(3, Layers.size))
    expected = gradients(euler(denoiser, z0), [z0, *inputs])
    got = gradients(strategy(memory, tmp_path)(denoiser, z0), [z0, *inputs])
    assert_all_close(got, expected)
    assert all(p.grad is None for p in net.parameters())


# CUDA graphs.

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def on_gpu():
    net = Layers(dtype=torch.float32).cuda().requires_grad_(False)
    return net, leaf(normal(3, Layers.size, dtype=torch.float32).cuda())


@gpu
@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m", "euler_ancestral"])
@pytest.mark.parametrize("target", [False, True], ids=["sample", "gradient"])
def test_a_run_in_a_cuda_graph(target, solver):
    # Nothing in a run reads back or copies from the host; under store the gradient neither.
    net, z0 = on_gpu()

    def whole():
        with torch.set_grad_enabled(target):
            x = gs.sample(net, z0, SIGMAS, solver=solver, memory="store")
        return (x.detach(), *(gradients(x, [z0]) if target else ()))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        whole()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        static = whole()
    for seed in (1, 2):
        with torch.no_grad():
            z0.copy_(normal(3, Layers.size, seed=seed))
        graph.replay()
        assert_all_close(static, whole(), 1e-6)


@gpu
@pytest.mark.parametrize("memory", ["checkpoint", "offload", "revolve"])
def test_a_denoiser_in_cuda_graphs(memory, tmp_path):
    # Its buffers are those of one call: a strategy that calls it again just before its backward.
    net, z0 = on_gpu()
    expected = gradients(euler(lambda x, s: net(x, s.to(x)), z0), [z0])
    inputs = (torch.zeros_like(z0).requires_grad_(), torch.ones(3, device="cuda"))
    graphed = torch.cuda.make_graphed_callables(net, inputs)
    got = gradients(strategy(memory, tmp_path)(graphed, z0), [z0])
    assert_all_close(got, expected, 1e-5)


# The page.

PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
BLOCKS = [block for block in BLOCKS[1:] if "import" in block]  # without plans, and what goes on


@pytest.mark.parametrize("k", range(len(BLOCKS)))
def test_the_page_s_code_runs(k, capsys):
    names = {"__name__": "page"}
    exec(compile(BLOCKS[k], PAGE.name, "exec"), names)
    assert names["gradient"].isfinite().all()
    assert names["gradient"].norm() > 0
    assert capsys.readouterr() == ("", "")


def test_the_page_names_files_that_are_there():
    named = re.findall(r"`(tests/\w+\.py)`", PAGE.read_text())
    assert named
    assert all((PAGE.parents[1] / name).exists() for name in named)
