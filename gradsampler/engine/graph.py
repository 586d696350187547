# SPDX-License-Identifier: Apache-2.0
"""The autograd graph of a model call: what it leads to, and hooks on it."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Variable


def without_hooks(leaves: Sequence[Tensor]) -> AbstractContextManager[None]:
    """Silences the tensors' gradient hooks, which are to see the sum over all calls, once."""
    hooked = [hooks for x in leaves if (hooks := x._backward_hooks)]
    return _silenced(hooked) if hooked else nullcontext()


@contextmanager
def _silenced(hooked: Sequence[dict[int, Any]]) -> Iterator[None]:
    saved = [dict(hooks) for hooks in hooked]
    try:
        for hooks in hooked:
            hooks.clear()
        yield
    finally:
        for hooks, was in zip(hooked, saved, strict=True):
            hooks.update(was)


def pulled(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    *,
    retain: bool,
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` of outputs and cotangents that fit, without its checks of these."""
    found: tuple[Tensor | None, ...] = Variable._execution_engine.run_backward(
        tuple(outputs),
        tuple(cotangents),
        retain,
        False,
        tuple(inputs),
        allow_unreachable=True,
        accumulate_grad=False,
    )
    return found


def input_of(x: Tensor, *, differentiated: bool = True) -> Tensor:
    """What a call gets for ``x``: apart from the graph before it and, as in a loop of one's own, no
    leaf where it is differentiated by. Hooks that torch sets on the inputs of modules, as
    `torch.utils.flop_counter` does, fail in `torch.autograd.grad` on leaves.
    """
    if not differentiated:
        return x.detach()
    leaf = x.detach().requires_grad_()
    if leaf.layout != torch.strided:  # of which there are no views
        return leaf
    if torch.is_grad_enabled():
        return leaf.view_as(leaf)
    with torch.enable_grad():
        return leaf.view_as(leaf)


def leaf_of(x: Tensor) -> Tensor:
    """The leaf behind a tensor of `input_of`."""
    return x if x._base is None else x._base


def wanted(node: Any) -> tuple[bool, ...]:
    """Which gradients of a node's tensors, in their order, the backward pass at work is after.

    ``ctx.needs_input_grad`` has those that it could be asked for: with `torch.autograd.grad` on z0
    also those of the parameters, which cost as much as that of z0.
    """
    return tuple(after is not None and _goes_on_to(after) for after, _ in node.next_functions)


def _goes_on_to(node: Any) -> bool:
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # so it answers of a leaf that `torch.autograd.grad` was given
        return True


class Reached(NamedTuple):
    """What the graph of a model call leads to."""

    leaves: dict[int, Tensor]  # leaf tensors that require grad, by id
    outer: bool  # passes through operations made before the call


def mark() -> int:
    """A number that every autograd node made from now on in this thread exceeds."""
    following: int = torch._C._autograd._get_sequence_nr()
    return following - 1


class Way:
    """A way from the outputs of model calls to their inputs; what it was in the call before is
    tried first, as most calls build the same graph.
    """

    def __init__(self) -> None:
        self._turns: list[int] = []  # positions among a node's parents, the first output's first

    def leads(self, outputs: Sequence[Tensor], x: Tensor, since: int) -> bool:
        """Whether the graph built since the number ``since`` of `mark` leads from outputs to x."""
        return self._led(outputs[0], x) or self._found(outputs, x, since)

    def _led(self, output: Tensor, x: Tensor) -> bool:
        node: Any = output.grad_fn
        for turn in self._turns:
            parents = () if node is None else node.next_functions
            if turn >= len(parents):
                return False
            node = parents[turn][0]
        return node is not None and _is_of(node, x)

    def _found(self, outputs: Sequence[Tensor], x: Tensor, since: int) -> bool:
        self._turns = []
        pending: list[Any] = [output.grad_fn for output in outputs if output.grad_fn is not None]
        ways = {node: (node, -1) for node in pending}  # from which node, by which turn
        first = outputs[0].grad_fn
        while pending:
            node = pending.pop()
            if _is_of(node, x):
                while ways[node][1] >= 0:
                    node, turn = ways[node]
                    self._turns.insert(0, turn)
                self._turns = self._turns if node is first else []
                return True
            if node._sequence_nr() <= since:
                continue
            # The last is looked at first, and the way to an input is mostly the first of them.
            for turn, (parent, _) in reversed([*enumerate(node.next_functions)]):
                if parent is not None and parent not in ways:
                    ways[parent] = node, turn
                    pending.append(parent)
        return any(output is x for output in outputs)


def _is_of(node: Any, x: Tensor) -> bool:
    """Whether a node is where cotangents of ``x`` arrive."""
    target = x.grad_fn
    return getattr(node, "variable", None) is x if target is None else node is target


def reached(outputs: Sequence[Tensor], since: int, until: Sequence[Tensor] = ()) -> Reached:
    """Walks the graph of ``outputs``, built since the number ``since`` of `mark`, to ``until``."""
    pending = [x.grad_fn for x in outputs if x.grad_fn is not None]
    leaves = {id(x): x for x in outputs if x.requires_grad and x.grad_fn is None}
    seen, outer = {*pending, *(x.grad_fn for x in until if x.grad_fn is not None)}, False
    while pending:
        node = pending.pop()
        if type(node).__name__ == "AccumulateGrad":
            variable: Tensor = node.variable  # type: ignore[attr-defined]
            leaves[id(variable)] = variable
            continue
        if not outer and node._sequence_nr() <= since:
            outer = True
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                pending.append(parent)
    return Reached(leaves, outer)
