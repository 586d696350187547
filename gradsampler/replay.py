# SPDX-License-Identifier: Apache-2.0
"""One model call made twice: recorded without keeping its activations, and replayed to be pulled
back. What the call depends on beside its arguments is captured the first time: the state of
torch's default random generators and autocast. The grad mode is on both times, so a network that
looks at it computes the same twice, and a compiled one compiles once.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor


class Circumstances:
    """The random state and the autocast setting at the time of its creation."""

    def __init__(self, device: torch.device, previous: "Circumstances | None" = None) -> None:
        self._cpu = torch.get_rng_state()
        if previous is not None and torch.equal(self._cpu, previous._cpu):
            self._cpu = previous._cpu  # a network that draws nothing costs one copy a run
        self._module = None if device.type == "cpu" else torch.get_device_module(device)
        self._devices = _device_states(self._module)
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in {"cpu", device.type}
        ]
        self._cached = torch.is_autocast_cache_enabled()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Restores them for the time of a with statement, and afterwards what was before."""
        cpu, devices = torch.get_rng_state(), _device_states(self._module)
        try:
            torch.set_rng_state(self._cpu)
            _set_device_states(self._module, self._devices)
            with ExitStack() as stack:
                for kind, dtype, enabled in self._autocast:
                    stack.enter_context(torch.autocast(kind, dtype, enabled, self._cached))
                yield
        finally:
            torch.set_rng_state(cpu)
            _set_device_states(self._module, devices)


def _device_states(module: ModuleType | None) -> list[Tensor]:
    if module is None:
        return []
    return [module.get_rng_state(i) for i in range(module.device_count())]


def _set_device_states(module: ModuleType | None, states: list[Tensor]) -> None:
    for i, state in enumerate(states):
        module.set_rng_state(state, i)  # type: ignore[union-attr]


class Reached(NamedTuple):
    """What the graph of a model call leads to."""

    leaves: dict[int, Tensor]  # leaf tensors that require grad, by id
    outer: bool  # passes through operations made before the call


def mark() -> int:
    """A number that every autograd node made from now on in this thread exceeds."""
    with torch.enable_grad():
        node = torch.zeros((), requires_grad=True).clone().grad_fn
    return node._sequence_nr()  # type: ignore[union-attr]


def reached(outputs: Sequence[Tensor], since: int) -> Reached:
    """Walks the graph of ``outputs``, built since the number ``since`` of `mark`."""
    pending = [x.grad_fn for x in outputs if x.grad_fn is not None]
    leaves = {id(x): x for x in outputs if x.requires_grad and x.grad_fn is None}
    seen, outer = set(pending), False
    while pending:
        node = pending.pop()
        variable = getattr(node, "variable", None)
        if variable is not None:
            leaves[id(variable)] = variable
            continue
        outer = outer or node._sequence_nr() <= since
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                pending.append(parent)
    return Reached(leaves, outer)
