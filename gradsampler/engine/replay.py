# SPDX-License-Identifier: Apache-2.0
"""One model call made twice: recorded without keeping its activations, and replayed to be pulled
back. What the call depends on beside its arguments is captured the first time: the state of
torch's default random generators and of those that the denoiser holds, and autocast. The grad mode
is on both times, so a network that looks at it computes the same twice, and a compiled one compiles
once.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor


class RandomState:
    """The state of torch's default generators: the CPU's, then each device's of one kind.

    Args:
        device: one of the kind that counts beside the CPU.
        tensors: states saved earlier; None takes those of this moment.
        generators: more generators, of any device.
    """

    def __init__(
        self,
        device: torch.device,
        tensors: list[Tensor] | None = None,
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        self._module = None if device.type == "cpu" else torch.get_device_module(device)
        self._generators = generators
        self.tensors = self._current() if tensors is None else tensors

    def _current(self) -> list[Tensor]:
        states = [generator.get_state() for generator in self._generators]
        states.append(torch.get_rng_state())
        if self._module is not None:
            states += (self._module.get_rng_state(i) for i in range(self._module.device_count()))
        return states

    def restore(self) -> None:
        """Puts the generators into this state."""
        own, (cpu, *devices) = (
            self.tensors[: len(self._generators)],
            self.tensors[len(self._generators) :],
        )
        for generator, state in zip(self._generators, own, strict=True):
            generator.set_state(state)
        torch.set_rng_state(cpu)
        for i, state in enumerate(devices):
            self._module.set_rng_state(state, i)  # type: ignore[union-attr]

    def same(self, other: "RandomState") -> bool:
        """Whether both are the same state of the same generators."""
        return all(map(torch.equal, self.tensors, other.tensors))


class Circumstances:
    """The random state and the autocast setting at the time of its creation."""

    def __init__(
        self,
        device: torch.device,
        previous: "Circumstances | None" = None,
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        self._device, self._generators = device, generators
        self._random = RandomState(device, generators=generators)
        if previous is not None:
            self._random = _shared(self._random, previous._random)
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in {"cpu", device.type}
        ]
        self._cached = torch.is_autocast_cache_enabled()

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Restores them for the time of a with statement, and afterwards what was before."""
        before = RandomState(self._device, generators=self._generators)
        try:
            self._random.restore()
            with ExitStack() as stack:
                for kind, dtype, enabled in self._autocast:
                    stack.enter_context(torch.autocast(kind, dtype, enabled, self._cached))
                yield
        finally:
            before.restore()


def _shared(new: RandomState, old: RandomState) -> RandomState:
    """The old object where nothing was drawn: a network without dropout costs one copy a run."""
    return old if new.same(old) else new


class ReplayError(RuntimeError):
    """A model call that was made again returned something else, so its gradient would be wrong."""


# How far two calls of a kernel that adds in no fixed order may be apart, relative to the largest
# value; noise drawn anew is farther.
_ROUNDING = {
    torch.float64: 1e-6,
    torch.float32: 1e-3,
    torch.bfloat16: 2e-2,
    torch.float16: 1e-2,
}


class Sketch:
    """Sums over rows and a few elements of a call's outputs: is a second call's output the same?"""

    def __init__(self, outputs: Sequence[Tensor]) -> None:
        self._parts = [_sketched(output) for output in outputs]

    def differs(self, outputs: Sequence[Tensor]) -> Tensor:
        """A 0-d bool: whether ``outputs`` are others, beyond what rounding may do."""
        flags = []
        for part, output in zip(self._parts, outputs, strict=True):
            pairs = zip(_sketched(output), part, strict=True)
            error = torch.cat([new - old for new, old in pairs]).abs().max()
            # A NaN compares false: it is what the first call returned as well, or is seen later.
            scale = part[0].abs().max().clamp_min(1e-6)
            flags.append(error > _ROUNDING.get(output.dtype, 2e-2) * scale)
        return torch.stack(flags).any()


_ROW = 4096  # elements


def _sketched(output: Tensor) -> tuple[Tensor, Tensor]:
    """64 elements or a few more; and sums over rows, on the scale of what changes at random."""
    flat, wide = output.detach().flatten(), torch.promote_types(output.dtype, torch.float32)
    rows = flat[: len(flat) // _ROW * _ROW].view(-1, _ROW).sum(1, dtype=wide)
    rest = flat[len(rows) * _ROW :].sum(0, keepdim=True, dtype=wide)
    some = flat[:: max(1, len(flat) // 64)].to(wide, copy=True)
    return some, torch.cat([rows, rest]) / _ROW**0.5


@contextmanager
def undrawn(device: torch.device, generators: Sequence[torch.Generator]) -> Iterator[None]:
    """Raises ReplayError where a generator is drawn from in a with statement."""
    before = RandomState(device, generators=generators)
    yield
    if not before.same(RandomState(device, generators=generators)):
        raise ReplayError(
            "the backward of a model call must draw nothing, got a generator that moved; does an "
            "activation checkpoint inside the denoiser draw anew? preserve_rng_state=True replays "
            "torch's default generators; draw from others before it, and pass the noise in"
        )


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
