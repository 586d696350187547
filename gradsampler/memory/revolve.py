# SPDX-License-Identifier: Apache-2.0
"""Keep a few states, compute the rest again, with the least number of model calls."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gradsampler import _checks
from gradsampler.engine.adjoint import Adjoint, Call, Connection, Opening
from gradsampler.engine.cotangents import Gradients
from gradsampler.engine.program import Evaluation, Program, Slot
from gradsampler.engine.trajectory import Evaluate, Trajectory
from gradsampler.memory import multistage
from gradsampler.memory.base import Memory
from gradsampler.memory.checkpoint import Resident
from gradsampler.memory.files import Folder
from gradsampler.memory.host import Pinned
from gradsampler.memory.multistage import Advance, Restore, Tape
from gradsampler.memory.offload import check_target
from gradsampler.memory.snapshots import Place, Snapshot
from gradsampler.memory.store import Store


@dataclass(frozen=True)
class Revolve(Memory):
    """At most ``slots`` snapshots at a time, and the activations of one model call.

    A snapshot is what the run needs to continue from a model call: the state, and for a multistep
    solver the earlier states and outputs that it uses. One more set is the current one. The
    activations of the last call are kept from the run, so that it need not be repeated. Model calls
    of a run of N and its backward: for N = 20, 53 with 5 slots and 48 with 10; for N = 50, 172 and
    138; for N = 1000, 4636 with 10. From N - 1 slots on it is 2N - 1.

    With ``further`` slots on the host or in a folder, the number of calls is that of slots +
    further. The device holds ``slots`` snapshots, those that are written and read most often, and
    one more while it is copied back, during the model's backward (Stumm and Walther 2009,
    "Multistage approaches for optimal offline checkpointing", SIAM J. Sci. Comput. 31(3)).

    A second backward through the same run (``retain_graph=True``) runs forward once more.

    Args:
        slots: on the device, at least 1.
        further: slots in another place.
        to: that place: "cpu", which is pinned memory of the host (for a run on the CPU it is the
            same memory as that of ``slots``); or an existing folder, with files as in `Offload`.

    Raises:
        ImportError: if the package checkpoint-schedules is not installed.
        OSError: in the run or in backward, if snapshots cannot be written; in backward, if a file
            is not what was written.

    Example:
        >>> import torch, gradsampler as gs
        >>> calls, z0 = [], torch.ones(1, 2, requires_grad=True)
        >>> def denoiser(x, sigma):
        ...     calls.append(sigma)
        ...     return 0.5 * x
        >>> memory = gs.memory.Revolve(3, further=7)
        >>> gs.sample(denoiser, z0, gs.schedules.karras(50), memory=memory).sum().backward()
        >>> len(calls)
        138
    """

    slots: int = 8
    further: int = 0
    to: str | os.PathLike[str] = "cpu"

    def __post_init__(self) -> None:
        _checks.integer("Revolve: slots", self.slots, 1)
        _checks.integer("Revolve: further", self.further, 0)
        check_target("Revolve: to", self.to)
        multistage.package()

    def run(self, trajectory: Trajectory, z0: Tensor, opening: Opening | None = None) -> Tensor:
        if not torch.is_grad_enabled():
            return Store().run(trajectory, z0)
        adjoint = _Revolving(trajectory, self, z0, opening)
        return Connection.apply(adjoint, z0, trajectory.program.coefficients, *adjoint.inputs())

    def place(self, program: Program, device: torch.device) -> Place | None:
        """A new place for the further slots; None where it is that of the others."""
        if self.further == 0 or (self.to == "cpu" and device.type == "cpu"):
            return None
        if self.to == "cpu":
            return Pinned(device)
        return Folder(Path(self.to), "Revolve", self.further * _width(program))


def _width(program: Program) -> int:
    """The most tensors that a snapshot holds beside z0."""
    alive, most = 0, 0
    for instruction, dead in zip(program.instructions, program.dead, strict=True):
        if isinstance(instruction, Evaluation):
            most = max(most, alive)
            alive += len(instruction.writes)
        else:
            alive += 1
        alive -= sum(slot.kind in "xd" for slot in dead)
    return most


class _Revolving(Adjoint):
    """A run that follows a schedule, and goes on with it when backward asks for its calls."""

    repeats_all = True

    def __init__(
        self, trajectory: Trajectory, memory: Revolve, z0: Tensor, opening: Opening | None
    ) -> None:
        self._memory = memory
        self._place: Place | None = None  # of the further slots
        self._snapshots: dict[int, Snapshot] = {}  # by evaluation, in increasing order
        self._work: dict[Slot, Tensor] = {}  # what the next evaluation starts from
        self._taped: Call | None = None  # the call that backward asks for next
        instructions = trajectory.program.instructions
        self._evaluations = trajectory.program.evaluations
        self._starts = [k for k, i in enumerate(instructions) if isinstance(i, Evaluation)]
        self._starts.append(len(instructions))
        self._silent = trajectory.unobserved()
        self._schedule: Iterator[Advance | Tape | Restore] | None = None
        super().__init__(trajectory, Resident(), z0, opening)  # which stays empty

    def _run(self) -> Tensor:
        def evaluate(evaluation: Evaluation, x: Tensor, scaled: Tensor | None) -> Sequence[Tensor]:
            call = self._first(evaluation, x, scaled)
            if evaluation is self._evaluations[-1]:
                self._taped = call
            return [output.detach() for output in call.outputs]

        self._sweep(self._trajectory, evaluate)
        if self._place is not None:
            self._place.settle()
        work, self._work = self._work, {}
        self._trajectory.execute(work, self._starts[-2], self._starts[-1], self._z0, evaluate)
        self._trajectory.observer.finished()
        return work[self._trajectory.program.output]

    def _sweep(self, trajectory: Trajectory, evaluate: Evaluate) -> None:
        """Starts a schedule and follows it to the last evaluation."""
        self._work = trajectory.given(self._z0)
        trajectory.execute(self._work, 0, self._starts[0], self._z0, evaluate)
        memory, count = self._memory, len(self._evaluations)
        self._place = memory.place(self._trajectory.program, self._z0.device)
        self._schedule = multistage.schedule(count, memory.slots, memory.further)
        for action in self._schedule:
            if isinstance(action, Tape):
                return
            if isinstance(action, Advance):
                self._advance(action, trajectory, evaluate)

    def _advance(self, action: Advance, trajectory: Trajectory, evaluate: Evaluate) -> None:
        if action.snapshot:
            place = self._place if action.further else None
            given = trajectory.given(self._z0).keys()
            self._snapshots[action.start] = Snapshot(self._work, given, place)
        start, stop = self._starts[action.start], self._starts[action.stop]
        trajectory.execute(self._work, start, stop, self._z0, evaluate)

    def _tape(self, evaluation: Evaluation) -> None:
        """The call of the evaluation that has been reached, with its graph."""
        self._taped = self._repeated(evaluation, self._work[evaluation.state])
        self._work = {}

    def backward(self, lam: Tensor, kept: Sequence[Tensor], wanted: Sequence[bool]) -> Gradients:
        if self._place is not None:
            self._place.settle()
        try:
            if self._schedule is None:
                with self._circumstances.autocast():
                    self._sweep(self._silent, self._replay)
                self._tape(self._evaluations[-1])
            return super().backward(lam, kept, wanted)
        finally:
            if self._place is not None:
                self._place.close()
            self._schedule, self._taped, self._place = None, None, None
            self._snapshots.clear()
            self._work = {}

    def _replay(self, evaluation: Evaluation, x: Tensor, scaled: Tensor | None) -> list[Tensor]:
        """The outputs of an evaluation on the way to another one."""
        outputs = self._repeated(evaluation, x, scaled).outputs
        return [output.detach() for output in outputs]

    def _again(self, evaluation: Evaluation) -> Call:
        """Goes on with the schedule until it has this evaluation's call."""
        assert self._schedule is not None
        while self._taped is None:
            action = next(self._schedule)
            if isinstance(action, Restore):
                self._work = self._snapshots[action.evaluation].slots()
                if action.last:
                    self._snapshots.pop(action.evaluation).drop()
            elif isinstance(action, Tape):
                self._tape(evaluation)
            else:
                with self._circumstances.autocast():
                    self._advance(action, self._silent, self._replay)
        following = next(reversed(self._snapshots.values()), None)
        if following is not None:
            following.fetch()  # while the model's backward runs
        call, self._taped = self._taped, None
        return call

    def _skip(self, evaluation: Evaluation) -> None:
        self._again(evaluation)  # the schedule counts on it
