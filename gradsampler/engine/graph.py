# SPDX-License-Identifier: Apache-2.0
"""The autograd graph of a model call: what it leads to, and hooks on it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


@contextmanager
def without_hooks(leaves: Sequence[Tensor]) -> Iterator[None]:
    """Silences the tensors' gradient hooks, which are to see the sum over all calls, once."""
    hooked = [hooks for x in leaves if (hooks := x._backward_hooks)]
    saved = [dict(hooks) for hooks in hooked]
    try:
        for hooks in hooked:
            hooks.clear()
        yield
    finally:
        for hooks, was in zip(hooked, saved, strict=True):
            hooks.update(was)


class Reached(NamedTuple):
    """What the graph of a model call leads to."""

    leaves: dict[int, Tensor]  # leaf tensors that require grad, by id
    outer: bool  # passes through operations made before the call


def mark() -> int:
    """A number that every autograd node made from now on in this thread exceeds."""
    with torch.enable_grad():
        node = torch.zeros((), requires_grad=True).clone().grad_fn
    return node._sequence_nr()  # type: ignore[union-attr]


def reaches(outputs: Sequence[Tensor], x: Tensor, since: int) -> bool:
    """Whether the graph built since the number ``since`` of `mark` leads from outputs to ``x``."""
    pending = [output.grad_fn for output in outputs if output.grad_fn is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if node is x.grad_fn or getattr(node, "variable", None) is x:
            return True
        if node._sequence_nr() <= since:
            continue
        fresh = {parent for parent, _ in node.next_functions if parent is not None} - seen
        seen |= fresh
        pending += fresh
    return any(output is x for output in outputs)


def reached(outputs: Sequence[Tensor], since: int) -> Reached:
    """Walks the graph of ``outputs``, built since the number ``since`` of `mark`."""
    pending = [x.grad_fn for x in outputs if x.grad_fn is not None]
    leaves = {id(x): x for x in outputs if x.requires_grad and x.grad_fn is None}
    seen, outer = set(pending), False
    while pending:
        node = pending.pop()
        if type(node).__name__ == "AccumulateGrad":
            variable: Tensor = node.variable  # type: ignore[attr-defined]
            leaves[id(variable)] = variable
            continue
        outer = outer or node._sequence_nr() <= since
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                pending.append(parent)
    return Reached(leaves, outer)
