# SPDX-License-Identifier: Apache-2.0
"""The counter of bytes, which plans, tests and benchmarks share, against sizes worked out by hand.

It is the one measure of what is alive on the CPU. That it agrees with something that shares nothing
with it is for the benchmark to show, which measures the resident memory of the process beside it.
"""

import pytest
import torch
from torch import nn

from gradsampler.memory.planning.gauge import Live
from support.alive import no_collector

X = torch.ones(10, 100, dtype=torch.float32)  # 4000 bytes


@pytest.fixture(autouse=True)
def by_references():
    with no_collector():
        yield


def test_each_storage_counts_once_until_it_goes():
    with Live() as counter:
        x = X + 1
        assert counter.live == 4000
        view, same = x.view(100, 10)[3:5].T, x.mul_(2)
        assert counter.live == 4000
        wide = x.double()
        assert counter.live == 4000 + 8000
        del x, same
        assert counter.live == 4000 + 8000  # the view has all of its storage
        del view
        assert counter.live == 8000
        del wide
        assert counter.live == 0
    assert counter.peak == 12000


def test_what_is_brought_in_does_not_count():
    x = X.clone()
    with Live() as counter:
        view = x[3:]
        assert x.add_(1) is x
        assert counter.live == 0
        made = torch.cat([view, x])
        assert counter.live == 4 * 1700
        del x, view
        assert counter.live == 4 * 1700
        del made
    assert (counter.live, counter.peak) == (0, 4 * 1700)


def test_every_tensor_of_a_list_counts():
    with Live() as counter:
        doubled = torch._foreach_mul([X, X[:5]], 2)
        least, places = X.max(1)
        assert counter.live == 4000 + 2000 + 10 * 4 + 10 * 8
        parts = doubled[0].chunk(5)  # which are views
        del doubled, least, places
        assert counter.live == 4000
        del parts
        assert counter.live == 0


def test_a_graph_keeps_its_activations_until_backward():
    weight = nn.Parameter(torch.ones(100))
    with Live() as counter:
        hidden = torch.tanh(X * weight)
        loss = (hidden * hidden).sum()
        del hidden
        assert counter.live == 4000 + 4  # of the product only what tanh saved: its result
        loss.backward()
        assert counter.live == 4 + 400  # the loss and the gradient
        del loss
        weight.grad = None
        assert counter.live == 0
    # Backward: the loss, tanh's result, a cotangent from each factor, and their sum.
    assert 4 * 4000 <= counter.peak <= 5 * 4000


def test_a_second_statement_goes_on_with_what_is_alive():
    counter = Live()
    with counter:
        x = X + 1
        del x
        kept = X.double()
    assert (counter.live, counter.peak) == (8000, 8000)
    x = X + 2  # outside
    with counter:
        assert counter.peak == 8000
        del kept
        y = x + 1
    assert (counter.live, counter.peak) == (4000, 8000)
    del y
    assert counter.live == 0
