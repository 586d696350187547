# SPDX-License-Identifier: Apache-2.0
"""Keep a few states, compute the rest again, with the least number of model calls.

The schedule is the optimal one of Griewank and Walther 2000, "Algorithm 799: revolve", ACM TOMS
26(1), from the package checkpoint-schedules. Its step j is evaluation j with the stages after it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from checkpoint_schedules import (
    CheckpointSchedule,
    Copy,
    EndForward,
    Forward,
    Move,
    MultistageCheckpointSchedule,
    Reverse,
)
from torch import Tensor

from gradsampler import _checks
from gradsampler.adjoint import Adjoint, Call, Connection, Gradients
from gradsampler.memory.base import Memory
from gradsampler.memory.checkpoint import Resident
from gradsampler.memory.store import Store
from gradsampler.program import Z0, Evaluation, Slot
from gradsampler.trajectory import Evaluate, Trajectory, version


@dataclass(frozen=True)
class Revolve(Memory):
    """At most ``slots`` snapshots at a time, and the activations of one model call.

    A snapshot is what the run needs to go on from a model call: the state, and for a multistep
    solver the states and outputs that it looks back at. Beside the snapshots there is the one set
    that is worked on. The activations of the last call are kept from the run, which saves its
    repetition. N model calls in all cost, by slots: N = 20: 53 with 5, 48 with 10; N = 50: 172
    and 138; N = 1000: 4636 with 10. From N - 1 slots on it is 2N - 1.

    A second backward through the same run (``retain_graph=True``) runs forward once more.
    """

    slots: int = 8

    def __post_init__(self) -> None:
        _checks.integer("Revolve: slots", self.slots, 1)

    def run(self, trajectory: Trajectory, z0: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return Store().run(trajectory, z0)
        adjoint = _Revolving(trajectory, self.slots, z0)
        return Connection.apply(adjoint, z0, trajectory.program.coefficients, *adjoint.inputs())


class _Revolving(Adjoint):
    """A run that follows a schedule, and goes on with it when backward asks for its calls."""

    def __init__(self, trajectory: Trajectory, slots: int, z0: Tensor) -> None:
        self._slots = slots
        self._snapshots: dict[int, _Snapshot] = {}  # by evaluation
        self._work: dict[Slot, Tensor] = {}  # what the next evaluation starts from
        self._taped: Call | None = None  # the call that backward asks for next
        instructions = trajectory.program.instructions
        self._evaluations = trajectory.program.evaluations
        self._starts = [k for k, i in enumerate(instructions) if isinstance(i, Evaluation)]
        self._starts.append(len(instructions))
        self._silent = trajectory.unobserved()
        self._schedule: CheckpointSchedule | None = None
        super().__init__(trajectory, Resident(), z0)  # which stays empty

    def _run(self) -> Tensor:
        def evaluate(evaluation: Evaluation, x: Tensor, scaled: Tensor | None) -> Sequence[Tensor]:
            call = self._first(evaluation, x, scaled)
            if evaluation is self._evaluations[-1]:
                self._taped = call
            return [output.detach() for output in call.outputs]

        self._sweep(self._trajectory, evaluate)
        work, self._work = self._work, {}
        self._trajectory.execute(
            work, self._starts[-2], self._starts[-1], self._z0, self._numbers, evaluate
        )
        self._trajectory.observer.finished()
        return work[self._trajectory.program.output]

    def _sweep(self, trajectory: Trajectory, evaluate: Evaluate) -> None:
        """Starts a schedule and follows it to the last evaluation."""
        self._work = {Z0: self._z0, **trajectory.constants}
        trajectory.execute(self._work, 0, self._starts[0], self._z0, self._numbers, evaluate)
        self._schedule = MultistageCheckpointSchedule(len(self._evaluations), self._slots, 0)
        for action in self._schedule:
            if isinstance(action, EndForward):
                return
            if isinstance(action, Forward) and not action.write_adj_deps:
                self._advance(action, trajectory, evaluate)

    def _advance(self, action: Forward, trajectory: Trajectory, evaluate: Evaluate) -> None:
        """From evaluation n0 to before evaluation n1, with a snapshot at n0 if that is asked."""
        if action.write_ics:
            self._snapshots[action.n0] = _Snapshot(self._work)
        start, stop = self._starts[action.n0], self._starts[action.n1]
        trajectory.execute(self._work, start, stop, self._z0, self._numbers, evaluate)

    def _tape(self, evaluation: Evaluation) -> None:
        """The call of the evaluation that has been reached, with its graph."""
        with self._circumstances[evaluation].restored():
            self._taped = self._repeated(evaluation, self._work[evaluation.state])
        self._work = {}

    def backward(self, lam: Tensor, kept: Sequence[Tensor], wants_z0: bool) -> Gradients:
        try:
            if self._schedule is None:
                with self._circumstances[self._evaluations[0]].restored():
                    self._sweep(self._silent, self._replay)
                self._tape(self._evaluations[-1])
            return super().backward(lam, kept, wants_z0)
        finally:
            self._schedule, self._taped = None, None
            self._snapshots.clear()
            self._work = {}

    def _replay(self, evaluation: Evaluation, x: Tensor, scaled: Tensor | None) -> list[Tensor]:
        """The outputs of an evaluation on the way to another one."""
        with self._circumstances[evaluation].restored():
            outputs = self._repeated(evaluation, x, scaled).outputs
        return [output.detach() for output in outputs]

    def _again(self, evaluation: Evaluation) -> Call:
        """Goes on with the schedule until it has this evaluation's call."""
        assert self._schedule is not None
        for action in self._schedule:
            if isinstance(action, (Copy, Move)):
                self._work = self._snapshots[action.n].slots()
                if isinstance(action, Move):
                    del self._snapshots[action.n]
            elif isinstance(action, Forward) and action.write_adj_deps:
                self._tape(evaluation)
            elif isinstance(action, Forward):
                with self._circumstances[self._evaluations[action.n0]].restored():
                    self._advance(action, self._silent, self._replay)
            elif isinstance(action, Reverse):
                break
        call, self._taped = self._taped, None
        assert call is not None
        return call


class _Snapshot:
    """The slots that the rest of the run reads, guarded from changes in place."""

    def __init__(self, slots: dict[Slot, Tensor]) -> None:
        self._slots = dict(slots)
        self._versions = {slot: version(x) for slot, x in slots.items()}

    def slots(self) -> dict[Slot, Tensor]:
        """A copy of the table; RuntimeError where a tensor was changed since."""
        changed = [slot for slot, x in self._slots.items() if version(x) != self._versions[slot]]
        if changed:
            raise RuntimeError(
                "memory=Revolve: the states and outputs of the denoiser must stay as they are "
                "until backward, got a change in place; return x.clone()"
            )
        return dict(self._slots)
