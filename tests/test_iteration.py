# SPDX-License-Identifier: Apache-2.0
"""Step maps on pytrees against the plain loop: values, gradients, and what a step may return."""

from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import gradsampler as gs
from support.problems import normal

MEMORIES = ["store", "checkpoint", "revolve:2", "offload", "auto"]
memories = pytest.mark.parametrize("memory", MEMORIES)
STEPS = 5


def leaf(*shape, seed=0, dtype=torch.float64):
    return normal(*shape, seed=seed, dtype=dtype).requires_grad_()


class Pair(NamedTuple):
    video: torch.Tensor
    audio: torch.Tensor


def turns(state, i, mix):
    """Video and audio that see one another, a counter, and a name that only goes along."""
    pair, count = state["pair"], state["count"]
    video = torch.tanh(pair.video + mix * pair.audio.mean()) + 0.1 * i
    audio = pair.audio * (1 + 0.1 * count[i]) + mix * video.square().mean()
    return {"pair": Pair(video, audio), "count": count + 1, "name": state["name"]}


def history(state, i):
    """A list that grows: each step looks at all before."""
    *_, last = state
    new = torch.sin(last) + 0.3 * sum(state) / len(state)
    return [*state, new]


def loop(step, state, n, **cond):
    for i in range(n):
        state = step(state, i, **cond)
    return state


def tensors(state):
    leaves = pytree.tree_leaves(state)
    return [x for x in leaves if isinstance(x, torch.Tensor) and x.dtype.is_floating_point]


def assert_same(got, expected, inputs, tolerance=1e-12):
    assert pytree.tree_structure(got) == pytree.tree_structure(expected)
    pairs = list(zip(tensors(got), tensors(expected), strict=True))
    for a, b in pairs:
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    lams = [normal(*x.shape, seed=7 + k, dtype=x.dtype) for k, x in enumerate(tensors(got))]
    found = torch.autograd.grad(tensors(got), inputs, lams)
    wanted = torch.autograd.grad(tensors(expected), inputs, lams)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@memories
def test_a_pytree_is_stepped_as_in_a_loop(memory):
    video, audio, mix = leaf(2, 3, 4), leaf(5, seed=1), leaf(seed=2)
    state = {"pair": Pair(video, audio), "count": torch.arange(STEPS), "name": "take one"}
    got = gs.iterate(turns, state, STEPS, memory=memory, cond={"mix": mix})
    expected = loop(turns, state, STEPS, mix=mix)
    assert torch.equal(got["count"], expected["count"])
    assert got["name"] == "take one"
    assert isinstance(got["pair"], Pair)
    assert_same(got, expected, [video, audio, mix])


@memories
def test_a_history_may_grow(memory):
    x = leaf(2, 3)
    assert_same(
        gs.iterate(history, [x], STEPS, memory=memory), loop(history, [x], STEPS), [x], 1e-11
    )


@memories
def test_mixed_dtypes_come_back_as_they_went(memory):
    x, y = leaf(2, 3), leaf(4, seed=1, dtype=torch.float32)

    def step(state, i):
        a, b = state
        return a.cos() + b.double().sum(), (b + a.float().mean()).tanh()

    assert_same(
        gs.iterate(step, (x, y), 3, memory=memory), loop(step, (x, y), 3), [x, y], tolerance=1e-6
    )


def test_leaves_without_gradient_are_those_of_their_step_in_backward():
    x, seen = leaf(2, 3), []

    def step(state, i):
        seen.append((i, state["k"], int(state["table"][0])))
        return {
            "x": state["x"].sin() * state["k"],
            "k": state["k"] + 1,
            "table": state["table"] * 2,
        }

    end = gs.iterate(step, {"x": x, "k": 1, "table": torch.ones(2).long()}, 3, memory="checkpoint")
    end["x"].sum().backward()
    assert seen[:3] == [(0, 1, 1), (1, 2, 2), (2, 3, 4)]
    assert sorted(seen[3:]) == seen[:3]
    assert (end["k"], end["table"].tolist()) == (4, [8, 8])


def test_the_index_is_an_int_that_no_tensor_was_read_for(monkeypatch):
    kinds, x = set(), leaf(2, 3)

    def refuse(*_):
        raise AssertionError("read back")

    def step(state, i):
        kinds.add(type(i))
        monkeypatch.setattr(torch.Tensor, "item", refuse)
        monkeypatch.setattr(torch.Tensor, "__int__", refuse)
        return state.sin() + i

    end = gs.iterate(step, x, 3, memory="checkpoint")
    monkeypatch.undo()
    assert kinds == {int}
    torch.testing.assert_close(end, loop(lambda s, i: s.sin() + i, x, 3))


def test_a_callback_sees_the_pytrees():
    seen, x = [], torch.ones(2)
    step = lambda s, i: {"x": s["x"] + i, "k": s["k"] + 1}  # noqa: E731
    gs.iterate(step, {"x": x, "k": 5}, 3, callback=seen.append)
    assert [(info.step, info.x["k"], info.denoised["k"]) for info in seen] == [
        (0, 5, 6),
        (1, 6, 7),
        (2, 7, 8),
    ]
    assert [info.denoised["x"].tolist() for info in seen] == [[1, 1], [2, 2], [4, 4]]


def test_named_modules_are_known_behind_a_lambda():
    net = nn.BatchNorm1d(3).double()
    state = {"x": leaf(4, 3)}
    end = gs.iterate(lambda s, i: {"x": net(s["x"])}, state, 2, memory="store", modules=[net])
    torch.testing.assert_close(end["x"].mean(0), torch.zeros(3).double(), rtol=0, atol=1e-12)


ERRORS = {
    "no floating tensor": (
        lambda: gs.iterate(lambda s, i: s, {"k": 3, "t": torch.ones(2).int()}, 1),
        ValueError,
        "state must hold a floating-point tensor, got 2 other leaves",
    ),
    "complex": (
        lambda: gs.iterate(lambda s, i: s, [torch.ones(2), torch.ones(2) * 1j], 1),
        ValueError,
        r"state must hold no complex tensor, got torch.complex64; take torch.view_as_real",
    ),
    "two devices": (
        lambda: gs.iterate(lambda s, i: s, [torch.ones(2), torch.ones(2, device="meta")], 1),
        ValueError,
        "state: each tensor must be on cpu, got meta",
    ),
    "wider than the start": (
        lambda: gs.iterate(lambda s, i: [s[0].double()], [torch.ones(2)], 1),
        ValueError,
        "the state that it returns at step 0 must hold tensors that torch.float32 holds",
    ),
    "nothing comes back": (
        lambda: gs.iterate(lambda s, i: None, [torch.ones(2)], 1),
        ValueError,
        "the state that it returns at step 0 must hold a floating-point tensor",
    ),
    "reversible": (
        lambda: gs.iterate(lambda s, i: s, [torch.ones(2)], 1, memory="reversible"),
        ValueError,
        "memory must be a strategy for any step map",
    ),
    "modules": (
        lambda: gs.iterate(lambda s, i: s, [torch.ones(2)], 1, modules=[3]),
        TypeError,
        "modules must be a list of nn.Modules",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_what_does_not_fit_is_refused_with_its_name(case):
    attempt, kind, message = ERRORS[case]
    with pytest.raises(kind, match=message):
        attempt()


def test_a_change_in_place_of_what_goes_along_is_found():
    def step(state, i):
        state["k"].add_(1)
        return {"x": state["x"].sin(), "k": state["k"]}

    state = {"x": leaf(2, 3), "k": torch.zeros(2).int()}
    end = gs.iterate(step, state, 3, memory="checkpoint")
    with pytest.raises(RuntimeError, match="what it gets at step 2 must stay as it is"):
        end["x"].sum().backward()
