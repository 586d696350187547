# SPDX-License-Identifier: Apache-2.0
"""compile=: several steps as one compiled graph, against the run that compiles nothing.

The compiler's first half and its gradients are torch's own; its second half, which writes C++, is
left out here, as it takes a minute.
"""

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

import gradsampler as gs
from support.gradients import assert_close, gradients
from support.problems import normal
from support.runs import leaf
from support.tiers import few

# Torch hides this warning of its own where warnings are no errors.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute")

SOLVERS = ("euler", "heun", "dpmpp_2m", "lms", "euler_ancestral", "dpmpp_2m_sde")
MEMORIES = ("store", "checkpoint", "auto", "revolve:2")


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that were compiled."""
    found, compiled = [], torch.compile

    def backend(graph, inputs):
        found.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(torch, "compile", lambda f, **k: compiled(f, backend=backend, **k))
    yield found
    torch._dynamo.reset()


class Network(nn.Module):
    """A denoiser with conditioning, told of the level."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    def forward(self, x, sigma, shift):
        return self.layers(x) + 0.1 * x / (1 + sigma[:, None]) + shift


def problem(steps=9):
    """A network, and all that the gradient is asked for."""
    network, z0, shift = Network(), leaf(normal(2, 3)), leaf(normal(3))
    levels = leaf(gs.schedules.karras(steps, sigma_min=0.05, sigma_max=9.0, final="zero"))
    return network, z0, levels, shift, [z0, levels, shift, *network.parameters()]


def agree(got, expected, inputs):
    assert_close(got, expected, 1e-11)
    pairs = zip(gradients(got, inputs), gradients(expected, inputs), strict=True)
    for k, (found, wanted) in enumerate(pairs):
        assert_close(found, wanted, 1e-11, f"gradient {k}")


@pytest.mark.parametrize("solver", few(SOLVERS, "euler"))
@pytest.mark.parametrize("memory", few(MEMORIES, "checkpoint"))
def test_values_and_gradients_are_those_of_the_run(solver, memory, graphs):
    network, z0, levels, shift, inputs = problem()
    options = {"solver": solver, "cond": {"shift": shift}}
    if gs.solvers.resolve(solver).stochastic:
        options["noise"] = gs.noise.SinCos()
    expected = gs.sample(network, z0, levels, memory="store", **options)
    agree(gs.sample(network, z0, levels, memory=memory, compile=3, **options), expected, inputs)
    assert len(graphs) == 1


def test_one_graph_serves_stretches_levels_and_draws(graphs):
    network, z0, _, shift, _ = problem()
    options = {"churn": gs.Churn(2.0), "cond": {"shift": shift}, "solver": "euler"}
    for update in range(3):
        levels = gs.schedules.karras(8, sigma_min=0.05, sigma_max=9.0 + update)
        given = options | {"noise": gs.noise.Philox(update)}
        x = gs.sample(network, z0, levels, compile=4, **given)
        agree(x, gs.sample(network, z0, levels, memory="store", **given), [z0, shift])
    assert len(graphs) == 1
    # Another memory strategy has the same graph, and so has a run of more stretches.
    levels, given = gs.schedules.karras(12), options | {"noise": gs.noise.Philox(7)}
    x = gs.sample(network, z0, levels, compile=4, memory="checkpoint", **given)
    agree(x, gs.sample(network, z0, levels, memory="store", **given), [z0, shift])
    assert len(graphs) == 1


@pytest.mark.thorough
def test_guidance_and_a_start_and_half_precision(graphs):
    network, z0, levels, shift, _ = problem()
    start, levels = leaf(normal(2, 3)), levels.detach()
    guided = gs.Guided(gs.EDM(network), [1.5 + 0.1 * k for k in range(9)], {"shift": -shift})
    options = {"cond": {"shift": shift}, "start": start, "solver": "dpmpp_2m"}
    expected = gs.sample(guided, z0, levels, memory="store", **options)
    found = gs.sample(guided, z0, levels, memory="checkpoint", compile=3, **options)
    agree(found, expected, [start, shift])
    narrow, z0 = Network().to(torch.bfloat16), normal(2, 3).bfloat16()
    options = {"cond": {"shift": shift.detach().bfloat16()}, "modules": [narrow]}
    with torch.no_grad():
        found = gs.sample(narrow, z0, levels, compile=3, **options)
        assert_close(found, gs.sample(narrow, z0, levels, **options), 0.02)
    assert found.dtype == torch.bfloat16


def test_what_is_left_over_is_not_compiled(graphs):
    network, z0, _, shift, _ = problem()
    levels = gs.schedules.karras(3, sigma_min=0.05, sigma_max=9.0)
    options = {"cond": {"shift": shift}}
    found = gs.sample(network, z0, levels, compile=5, **options)
    agree(found, gs.sample(network, z0, levels, memory="store", **options), [z0, shift])
    assert not graphs


def test_a_denoiser_that_cannot_be_traced(graphs):
    z0, levels = leaf(normal(2, 3)), gs.schedules.karras(4)

    def denoiser(x, sigma):
        return x * 0.5 if x.sum().item() > 0 else x * 0.4

    with pytest.raises(ValueError, match="compile must be None for a denoiser that"):
        gs.sample(denoiser, z0, levels, compile=2)


def test_an_output_of_another_shape(graphs):
    with pytest.raises(ValueError, match="shape"):
        gs.sample(lambda x, s: x[:, :1], leaf(normal(2, 3)), gs.schedules.karras(4), compile=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": 0}, "compile must be at least 1"),
        ({"compile": 2.5}, "compile must be an int"),
        ({"compile": 2, "callback": print}, "callback must be None with compile"),
        ({"compile": 2, "memory": "truncated:2"}, "memory must be a strategy for any program"),
        (
            {"compile": 2, "memory": "reversible", "solver": "midpoint_reversible"},
            "memory must be a strategy for any program",
        ),
    ],
)
def test_what_does_not_go_with_it(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        gs.sample(lambda x, s: 0.5 * x, normal(2, 3), gs.schedules.karras(4), **options)


def test_it_is_compiled_anew_where_the_denoiser_is_another_object(graphs):
    levels, z0 = gs.schedules.karras(4), normal(2, 3)
    for scale in (0.5, 0.4):
        with torch.no_grad():
            found = gs.sample(lambda x, s, scale=scale: scale * x, z0, levels, compile=2)
            expected = gs.sample(lambda x, s, scale=scale: scale * x, z0, levels)
        assert_close(found, expected, 1e-12)
    assert len(graphs) == 2
