# SPDX-License-Identifier: Apache-2.0
"""Keep as much as there is room for."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsampler.engine.adjoint import Adjoint, Call, Connection, States
from gradsampler.engine.cotangents import Gradients
from gradsampler.engine.program import Evaluation, Slot, Stage
from gradsampler.engine.trajectory import Trajectory
from gradsampler.memory import capacity
from gradsampler.memory.base import Memory
from gradsampler.memory.checkpoint import Resident
from gradsampler.memory.host import Host
from gradsampler.memory.reversible import Reversible
from gradsampler.memory.revolve import Revolve
from gradsampler.memory.saved import Saved
from gradsampler.memory.store import Store

_USED = 0.8  # of what is free; the rest is for what follows the run, and for fragments
_STATES = 0.5  # of what is free that states or snapshots may take


@dataclass(frozen=True)
class Auto(Memory):
    """`Reversible` for a run that can be undone, else `Checkpoint`, and beside it the activations
    of as many calls as fit into what is free.

    The first call of the run shows how much autograd keeps of one. Then the last k calls are
    kept whole, as many as fit, and only the N - k before them are made again in backward: the time
    of `Store` where all fit, of `Checkpoint` where none does. The last and not the first, since
    backward needs these first: they are gone when it comes to the calls that are made again, so the
    peak is k calls and not k + 1.

    Where the states alone would take half of what is free, they go to the host, as with
    `Offload`; where that has no room either, or is the device of the run, it is `Revolve` with as
    many slots as fit.

    A kept call serves one backward; a second one (``retain_graph=True``) makes all calls again.
    """

    def run(self, trajectory: Trajectory, z0: Tensor) -> Tensor:
        if Reversible().integers(trajectory, z0) is not None:
            return Reversible().run(trajectory, z0)
        if not torch.is_grad_enabled():
            return Store().run(trajectory, z0)
        count, size = len(trajectory.program.evaluations), z0.numel() * z0.element_size()
        free = capacity.free(z0.device)
        if free is None:
            return _connected(trajectory, z0, Resident(), room=0.0)
        if count * size <= _STATES * free:
            return _connected(trajectory, z0, Resident(), _USED * free - count * size)
        if z0.device.type != "cpu":
            host = capacity.free(torch.device("cpu"))
            if host is not None and count * size <= _STATES * host:
                return _connected(trajectory, z0, Host(count), _USED * free)
        slots = int(_STATES * free) // (size * _snapshot(trajectory))
        return Revolve(max(1, slots)).run(trajectory, z0)


def _connected(trajectory: Trajectory, z0: Tensor, states: States, room: float) -> Tensor:
    """The run by an adjoint that keeps graphs of at most ``room`` bytes."""
    adjoint = _Keeping(trajectory, states, z0, room)
    output: Tensor = Connection.apply(
        adjoint, z0, trajectory.program.coefficients, *adjoint.inputs()
    )
    return output


def _snapshot(trajectory: Trajectory) -> int:
    """The most slots that are alive before an evaluation: the size of a snapshot in states."""
    alive: set[Slot] = set()
    most = 1
    for instruction, dead in zip(
        trajectory.program.instructions, trajectory.program.dead, strict=True
    ):
        if isinstance(instruction, Stage):
            alive.add(instruction.writes)
        elif isinstance(instruction, Evaluation):
            most = max(most, len(alive))
            alive.update(instruction.writes)
        alive -= dead
    return most


class _Keeping(Adjoint):
    """An adjoint that keeps the graphs of its last calls.

    Args:
        trajectory, states, z0: as for `Adjoint`.
        room: bytes that graphs may take.
    """

    def __init__(self, trajectory: Trajectory, states: States, z0: Tensor, room: float) -> None:
        self._room = room
        self._from: int | None = None  # the evaluation from which on calls are kept
        self._calls: dict[Evaluation, Call] = {}
        super().__init__(trajectory, states, z0)

    def _first(self, evaluation: Evaluation, x: Tensor, scaled: Tensor | None) -> Call:
        if self._from is None:
            known = [*self._cond, *self._trajectory.constants.values(), *self._trajectory.buffers()]
            with Saved([self._z0, x, *known]) as saved:
                call = super()._first(evaluation, x, scaled)
            self._from = len(self._index) - self._fitting(call, saved)
        else:
            call = super()._first(evaluation, x, scaled)
        if self._index[evaluation] >= self._from and self._asked() and self._is_pulled(evaluation):
            self._calls[evaluation] = call
        return call

    def _fitting(self, call: Call, saved: Saved) -> int:
        """How many calls fit, taken to be like this one."""
        tensors = [call.scaled, *call.outputs]
        graph = saved.beside(tensors) + sum(x.numel() * x.element_size() for x in tensors)
        # The gradients that are alive within a backward belong to tensors of the call, so they
        # take about as much as its graph at most.
        return min(len(self._index), max(0, int(self._room / graph - 1)))

    def _again(self, evaluation: Evaluation) -> Call:
        call = self._calls.pop(evaluation, None)
        return super()._again(evaluation) if call is None else call

    def backward(self, lam: Tensor, kept: Sequence[Tensor], wants_z0: bool) -> Gradients:
        try:
            return super().backward(lam, kept, wants_z0)
        finally:
            self._calls.clear()
