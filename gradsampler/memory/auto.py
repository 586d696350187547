# SPDX-License-Identifier: Apache-2.0
"""Keep as much as there is room for."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradsampler.engine import graph
from gradsampler.engine.adjoint import Adjoint, Call, Connection, Opening, States
from gradsampler.engine.circumstances import Circumstances
from gradsampler.engine.cotangents import Gradients
from gradsampler.engine.program import Evaluation, Slot, Stage
from gradsampler.engine.trajectory import Trajectory
from gradsampler.memory import capacity
from gradsampler.memory.base import Memory
from gradsampler.memory.checkpoint import Resident
from gradsampler.memory.host import Host
from gradsampler.memory.planning import following
from gradsampler.memory.planning.following import After
from gradsampler.memory.reversible import Reversible
from gradsampler.memory.revolve import Revolve
from gradsampler.memory.saved import Saved
from gradsampler.memory.store import Recording, Store

_USED = 0.8  # of what is free; the rest is for what follows the run, and for fragments
_STATES = 0.5  # of what is free that states or snapshots may take


@dataclass(frozen=True)
class Auto(Memory):
    """`Reversible` for a run that can be undone, else `Checkpoint`, which also stores the
    activations of as many calls as fit in memory.

    The first call of the run shows how much autograd keeps for a call, which may be nothing. If all
    N calls fit, the run goes on as with `Store`. Otherwise the activations of the last k calls are
    stored, as many as fit. The N - k calls before them are recomputed in backward from their
    states; if none fits, that takes the time of `Checkpoint`. The last calls are stored because
    backward needs them first, and has freed them when it recomputes others: the peak is k calls,
    not k + 1.

    If the states alone would take half of the free memory, they go to the host, as with `Offload`.
    If the host has no room either, or is the device of the run, it is `Revolve` with as many slots
    as fit.

    Second derivatives need `Store`.

    Args:
        after: what follows the run and needs memory too: a function from a sample [B, *state] to a
            scalar loss, as for `plan`, called once for each shape; or its bytes, an int or "2GiB".

    Raises:
        ValueError, TypeError: naming what does not fit, at the start of the run where ``after`` is
            called.
    """

    after: After | int | str | None = None
    _measured: dict[object, int] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.after is not None and not callable(self.after):
            capacity.parsed("Auto: after", self.after)

    def run(self, trajectory: Trajectory, z0: Tensor) -> Tensor:
        if Reversible().integers(trajectory, z0) is not None:
            return Reversible().run(trajectory, z0)
        if not torch.is_grad_enabled():
            return Store().run(trajectory, z0)
        count, size = len(trajectory.recalled), z0.numel() * z0.element_size()
        free, opening = capacity.free(z0.device), None
        after = 0 if free is None else self._after(z0)  # bytes
        free = None if free is None else max(0, free - after)
        if free is not None and count > 1 and _plain(trajectory, z0.device):
            begun = Begun(trajectory, z0)
            # The gradients that are alive within a call's backward take about as much as its graph.
            if begun.plain and (count + 1) * begun.kept + 4 * size <= _USED * free:
                return begun.finished()
            opening = begun.opening()
            del begun
        here = free is None or count * size <= _STATES * free
        host = None if here or z0.device.type == "cpu" else capacity.free(torch.device("cpu"))
        there = here or (host is not None and count * size <= _STATES * host)
        slots = math.inf
        if free is not None:
            snapshot = size * _snapshot(trajectory)
            # Beside its snapshots it has the last call's graph while what follows the run works.
            more = after if opening is None else min(after, opening.graph)
            slots = min(int(_STATES * free), count * size - more - 1) // snapshot
            here = here or (slots < 1 <= after and not there)  # less than checkpoint cannot be had
        # Where ranks wait for the calls of one another, the one with the least room decides.
        least = trajectory.parallel.agreement.least(here, there, slots)
        if least[0]:
            room = 0.0 if free is None else _USED * free - count * size
            return _connected(trajectory, z0, Resident(), room, opening)
        if least[1] and z0.device.type != "cpu":
            room = 0.0 if free is None else _USED * free
            return _connected(trajectory, z0, Host(count), room, opening)
        return Revolve(max(1, int(min(least[2], count)))).run(trajectory, z0, opening)

    def _after(self, z0: Tensor) -> int:
        """Bytes that what follows the run needs."""
        if self.after is None or not callable(self.after):
            return 0 if self.after is None else capacity.parsed("Auto: after", self.after)
        key = z0.shape, z0.dtype, z0.device
        if key not in self._measured:
            self._measured[key] = following.measured(self.after, z0).peak
        return self._measured[key]


def _plain(trajectory: Trajectory, device: torch.device) -> bool:
    """Whether autograd itself gives the gradients of a run, as precise as ours."""
    if trajectory.program.coefficients.requires_grad or trajectory.parallel:
        return False
    if not trajectory.policy.exact or trajectory.observer.monitored:
        return False
    if any(torch.is_autocast_enabled(kind) for kind in {"cpu", device.type}):
        return False  # autocast's copies of the weights live through all calls
    if trajectory.state_dtype not in (torch.float32, torch.float64):
        return False
    parameters = (p for m in trajectory.model.modules() for p in m.parameters())
    return not any(map(_narrow, (*parameters, *trajectory.noise.tensors)))


def _narrow(x: Tensor) -> bool:
    """Whether autograd would add up the tensor's gradient in 16 bits."""
    return x.requires_grad and x.dtype in (torch.bfloat16, torch.float16)


class Begun:
    """A run of `Store` up to its first model call, which shows what autograd keeps of one."""

    def __init__(self, trajectory: Trajectory, z0: Tensor) -> None:
        self._recording = Recording(trajectory, z0)
        self._trajectory, self._z0 = self._recording.trajectory, z0
        instructions = trajectory.program.instructions
        first = trajectory.program.evaluations[0]
        self._next = instructions.index(first) + 1
        self._circumstances = Circumstances(z0.device, trajectory.seen)
        self._slots = trajectory.given(z0)
        self._trajectory.execute(self._slots, 0, self._next - 1, z0, self._recording.evaluate)
        given = [*trajectory.given(z0).values(), *trajectory.cond.tensors]
        known = [*given, *self._recording.entries, *trajectory.buffers()]
        self._since = graph.mark()
        with Saved(known) as saved:
            self._circumstances.captured(
                first,
                lambda: self._trajectory.execute(
                    self._slots, self._next - 1, self._next, z0, self._call
                ),
            )
        self.kept = saved.total  # bytes
        self._found = graph.reached(
            self._outputs, self._since, [self._input, *self._recording.entries]
        )
        self.plain = not any(map(_narrow, self._found.leaves.values()))
        tensors = [self._input, *self._outputs]
        self._graph = saved.beside(tensors) + sum(x.numel() * x.element_size() for x in tensors)

    def _call(self, evaluation: Evaluation, x: Tensor, scaled: Tensor | None) -> list[Tensor]:
        self._input, self._outputs = self._recording.call(evaluation, x, scaled)
        return self._recording.widened(self._outputs)

    def finished(self) -> Tensor:
        """The rest of the run."""
        del self._input, self._outputs
        count = len(self._trajectory.program.instructions)
        evaluate = self._recording.evaluate
        self._trajectory.execute(self._slots, self._next, count, self._z0, evaluate)
        self._trajectory.observer.finished()
        return self._slots[self._trajectory.program.output]

    def opening(self) -> Opening:
        """The first call, for a run that goes on otherwise."""
        outputs = tuple(x.detach() for x in self._outputs)
        warned, circumstances = self._recording.warned, self._circumstances
        return Opening(outputs, self._found, warned, circumstances, self._graph)


def _connected(
    trajectory: Trajectory,
    z0: Tensor,
    states: States,
    room: float,
    opening: Opening | None = None,
) -> Tensor:
    """The run by an adjoint that keeps graphs of at most ``room`` bytes."""
    adjoint = _Keeping(trajectory, states, z0, room, opening)
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
    """An adjoint that keeps the graphs of its last calls, and the states of the others.

    Args:
        trajectory, states, z0, opening: as for `Adjoint`.
        room: bytes that graphs may take.
    """

    def __init__(
        self,
        trajectory: Trajectory,
        states: States,
        z0: Tensor,
        room: float,
        opening: Opening | None,
    ) -> None:
        self._room = room
        self._from: int | None = None  # from which on calls are kept, of those backward needs
        self._calls: dict[Slot, Call] = {}  # by the state
        if opening is not None:
            self._from = max(1, self._beyond(trajectory, opening.graph))
        super().__init__(trajectory, states, z0, opening)

    def _beyond(self, trajectory: Trajectory, graph: int) -> int:
        """The first of the calls that fit, taken to be of ``graph`` bytes."""
        # The gradients that are alive within a backward belong to tensors of the call, so they
        # take about as much as its graph at most.
        count = len(trajectory.recalled)
        fitting = min(count, max(0, int(self._room / graph - 1)))
        return count - int(trajectory.parallel.agreement.least(fitting)[0])

    def _run(self) -> Tensor:
        def evaluate(evaluation: Evaluation, x: Tensor, scaled: Tensor | None) -> Sequence[Tensor]:
            call = self._first(evaluation, x, scaled)
            k = self._index.get(evaluation.state)
            if k is None:  # backward passes over it
                pass
            elif self._from is None or k < self._from or not self._asked():
                self._save(evaluation, x)
            elif self._levels:
                self._calls[evaluation.state] = call
            else:  # only coefficients that are learned are multiplied by the state
                self._calls[evaluation.state] = call._replace(x=call.scaled)
            return [output.detach() for output in call.outputs]

        return self._trajectory.forward(self._z0, evaluate)

    def _first(self, evaluation: Evaluation, x: Tensor, scaled: Tensor | None) -> Call:
        if self._from is not None:
            return super()._first(evaluation, x, scaled)
        known = [*self._cond, *self._trajectory.constants.values(), *self._trajectory.buffers()]
        with Saved([self._z0, x, *known]) as saved:
            call = super()._first(evaluation, x, scaled)
        tensors = [call.scaled, *call.outputs]
        size = saved.beside(tensors) + sum(x.numel() * x.element_size() for x in tensors)
        self._from = self._beyond(self._trajectory, size)
        return call

    def _again(self, evaluation: Evaluation) -> Call:
        if evaluation.state not in self._calls:
            return super()._again(evaluation)
        state = evaluation.state
        return self._calls[state] if self._retains else self._calls.pop(state)

    def _skip(self, evaluation: Evaluation) -> None:
        if evaluation.state in self._calls:
            self._again(evaluation)
        else:
            super()._skip(evaluation)

    def backward(self, lam: Tensor, kept: Sequence[Tensor], wanted: Sequence[bool]) -> Gradients:
        # A second backward, with retain_graph=True in the first, finds the calls where they were.
        self._retains = torch._C._autograd._get_current_graph_task_keep_graph()
        try:
            return super().backward(lam, kept, wanted)
        finally:
            if not self._retains:
                self._calls.clear()
