# SPDX-License-Identifier: Apache-2.0
"""Keep no states: undo the steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NoReturn

import torch
from torch import Tensor

from gradsampler import _checks
from gradsampler.engine.adjoint import Adjoint, Call, Connection
from gradsampler.engine.cotangents import Gradients
from gradsampler.engine.program import Evaluation, Slot
from gradsampler.engine.trajectory import Evaluate, Trajectory
from gradsampler.memory.base import Memory
from gradsampler.memory.checkpoint import Resident
from gradsampler.memory.leapfrog import FixedPoint, Leapfrog
from gradsampler.ops.reference import fixed_point
from gradsampler.repetition import ReplayError


@dataclass(frozen=True)
class Reversible(Memory):
    """The last two states, in integers; backward undoes the steps, exact to the bit.

    Only for ``solver="midpoint_reversible"``. (In runs of one or two model calls there is nothing
    to undo, so some other solvers work too.) A state is held as an integer multiple of a small
    unit. A step adds an increment that is rounded to this unit, and the same model call in backward
    gives the same increment, so that subtracting it restores the earlier state exactly. The
    gradient is that of the run, with rounding treated as the identity, however many steps there
    are. Backward calls the model once more for each step, as with `Checkpoint`.

    The integers have 32 bits if these hold the run with 20 bits below one, and 64 bits for a longer
    range or a state in float64. The denoiser must return the same bits again; on a GPU that may
    need ``torch.use_deterministic_algorithms(True)``. Its last output is compared before anything
    is undone, and at the end the states must be those that the run started from.

    A second backward through the same run (``retain_graph=True``) runs forward once more.

    Args:
        amplitude: the largest absolute value of a clean sample, without noise, to make room for;
            some four times as much will fit.

    Raises:
        ValueError: before any model call, if the solver's steps cannot be undone, or if levels and
            churn need more than 64 bits.
        OverflowError: in the run, if a state leaves the range of the integers or is NaN.
        ReplayError: in backward, if the denoiser returns other bits.
    """

    amplitude: float = 16.0
    any_program: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not _checks.finite("Reversible: amplitude", self.amplitude) > 0:
            _checks.fail("Reversible: amplitude", "be positive", self.amplitude)

    def run(self, trajectory: Trajectory, z0: Tensor) -> Tensor:
        pair = self._pair(trajectory, z0)
        if not torch.is_grad_enabled():
            return pair.forward(z0, trajectory, _plain(trajectory))
        adjoint = _Reversing(trajectory, pair, z0)
        return Connection.apply(adjoint, z0, trajectory.program.coefficients, *adjoint.inputs())

    def integers(self, trajectory: Trajectory, z0: Tensor) -> torch.dtype | None:
        """The dtype of the integers for a run whose steps are to be undone, else None."""
        scheme = Leapfrog.of(trajectory.program)
        if scheme is None or not scheme.undone:
            return None
        try:
            return self._pair(trajectory, z0).unit.dtype
        except ValueError:  # 64 bits are too few
            return None

    def _pair(self, trajectory: Trajectory, z0: Tensor) -> "Pair":
        scheme = Leapfrog.of(trajectory.program)
        if scheme is None:
            _checks.fail(
                "memory",
                "fit the run",
                "'reversible' with steps that cannot be undone",
                "take solver='midpoint_reversible', with eta of at most 1 and no final_denoise at "
                "level 0, or memory='checkpoint'",
            )
        reach = _largest(z0)
        if trajectory.start is not None:
            first = trajectory.program.evaluations[0].sigma
            level = trajectory.program.coefficients[first].item()
            start = _largest(trajectory.start)
            reach = max(reach, start / level if level < torch.inf else start)
        reach = max(reach, 8.0) if reach < torch.inf else 8.0
        reach = trajectory.parallel.agreement.largest(reach)  # the same integers on all ranks
        unit = scheme.format(trajectory.program, self.amplitude, reach, trajectory.state_dtype)
        return Pair(trajectory, scheme, unit)


def _largest(x: Tensor) -> float:
    return x.detach().abs().max().item() if x.numel() else 0.0


def _plain(trajectory: Trajectory) -> Evaluate:
    """Evaluates the model for a run that is not differentiated."""
    cond = trajectory.cond.filled(trajectory.cond.tensors)

    def evaluate(evaluation: Evaluation, x: Tensor, scaled: Tensor | None) -> Sequence[Tensor]:
        scaled, level = trajectory.model_input(evaluation, x, scaled)
        return trajectory.call(evaluation, scaled, level, cond)

    return evaluate


class Pair:
    """The last two states of a run in integers, which go forward and back."""

    def __init__(self, trajectory: Trajectory, scheme: Leapfrog, unit: FixedPoint) -> None:
        self._trajectory = trajectory
        self._leaps, self._rest = scheme.leaps, scheme.rest
        self._evaluations = trajectory.program.evaluations
        self._numbers = trajectory.program.floats
        self.unit = unit
        self._older = self._newer = self._overflow = torch.empty(0)
        self._newest = -1  # the position of the newer state

    def forward(self, z0: Tensor, trajectory: Trajectory, evaluate: Evaluate) -> Tensor:
        """Runs from the start, seen by the observer of ``trajectory``; returns the output."""
        self._older = torch.zeros_like(z0, dtype=self.unit.dtype)
        self._newer, self._newest = torch.zeros_like(self._older), -1
        self._overflow = torch.zeros(1, dtype=torch.int32, device=z0.device)
        slots = trajectory.given(z0)
        for evaluation in self._evaluations:
            x, scaled = self._advance(slots, z0)
            slots.clear()  # before the model needs the room
            trajectory.observer.evaluating(evaluation)
            outputs = evaluate(evaluation, x, scaled)
            trajectory.observer.evaluated(evaluation, x, outputs)
            slots = {evaluation.state: x, **dict(zip(evaluation.writes, outputs, strict=True))}
            del x, scaled, outputs
        if self._rest is None:
            output, _ = self._advance(slots, z0)
        else:
            terms, injections = self._rest.terms, self._rest.injections
            output = self._trajectory.combine(terms, slots, injections, z0)
        trajectory.observer.finished()
        if self._trajectory.parallel.agreement.any(bool(self._overflow.item())):
            self._refuse()
        return output

    def state(self, j: int) -> tuple[Tensor, Tensor | None]:
        """The state of evaluation ``j``, one of the two that are there, and the model's input."""
        integers = self._newer if j == self._newest else self._older
        scale, model_scale, model_dtype = self._scales(j)
        return fixed_point(integers, scale, self._trajectory.state_dtype, model_scale, model_dtype)

    def undo(self, j: int, slots: dict[Slot, Tensor], z0: Tensor) -> None:
        """Takes back what followed from evaluation ``j``, given its state and outputs."""
        if self._newest == j + 1:
            self._leap(j + 1, self._newer, slots, z0, sign=-1)
            self._older, self._newer, self._newest = self._newer, self._older, j

    def returned(self, z0: Tensor) -> bool:
        """Undoes the first state, and tells whether nothing is left, as before the run.

        Both states count: steps map pairs one to one, so a pair that was off stays off.
        """
        self._leap(0, self._newer, self._trajectory.given(z0), z0, sign=-1)
        return not bool((self._newer | self._older).any())

    def free(self) -> None:
        """Lets go of the states."""
        self._older = self._newer = torch.empty(0)

    def _advance(self, slots: dict[Slot, Tensor], z0: Tensor) -> tuple[Tensor, Tensor | None]:
        """The next state, in the place of the state before the last, and the model's input."""
        x, scaled = self._leap(self._newest + 1, self._older, slots, z0, sign=1)
        assert x is not None
        self._older, self._newer = self._newer, self._older
        self._newest += 1
        return x, scaled

    def _leap(
        self, j: int, carried: Tensor, slots: dict[Slot, Tensor], z0: Tensor, sign: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Adds what state ``j`` adds to that before the last to ``carried``, or takes it away."""
        leap, trajectory = self._leaps[j], self._trajectory
        units = 2.0**self.unit.bits / leap.scale
        tensors = [slots[slot] for slot, _ in leap.terms]
        factors = [units * self._numbers[c] for _, c in leap.terms]
        injections = leap.stage.injections
        amounts = [units * self._numbers[injection.coefficient] for injection in injections]
        scale, model_scale, model_dtype = self._scales(j)
        return trajectory.backend.leap(
            carried,
            *trajectory.operands(tensors, factors, injections, amounts, z0),
            sign=sign,
            scale=scale,
            overflow=self._overflow,
            out_dtype=trajectory.state_dtype,
            wants_state=sign > 0,
            model_scale=model_scale,
            model_dtype=model_dtype,
        )

    def _scales(self, j: int) -> tuple[float, float | None, torch.dtype]:
        """What state ``j`` is of the integers, and the model's input of it where that differs."""
        state_dtype, model_dtype = self._trajectory.state_dtype, self._trajectory.model_dtype
        scale, c_in = self._leaps[j].scale * 2.0**-self.unit.bits, None
        if j < len(self._evaluations) and state_dtype in (torch.float32, torch.float64):
            c_in = self._numbers[self._evaluations[j].c_in]
            if c_in == 1.0 and model_dtype == state_dtype:
                c_in = None
        return scale, c_in, model_dtype

    def _refuse(self) -> NoReturn:
        bits = 8 * self._older.element_size()
        raise OverflowError(
            f"memory=Reversible: the states must be finite and fit {bits} bits, "
            f"{self.unit.bits} of them below one, got one that does not; raise its amplitude, "
            "check the denoiser, or take memory='checkpoint'"
        )


class _Reversing(Adjoint):
    """A run without states, whose backward undoes it."""

    repeats_all = True

    def __init__(self, trajectory: Trajectory, pair: Pair, z0: Tensor) -> None:
        self._pair = pair
        self._evaluations = trajectory.program.evaluations
        self._positions = {e.state: j for j, e in enumerate(self._evaluations)}
        self._silent = trajectory.unobserved()
        self._agreement = trajectory.parallel.agreement
        self._digest = torch.empty(0)  # of the last evaluation's outputs
        self._there = True  # whether the pair is at the end of the run
        super().__init__(trajectory, Resident(), z0)  # which stays empty

    def _run(self) -> Tensor:
        def evaluate(evaluation: Evaluation, x: Tensor, scaled: Tensor | None) -> Sequence[Tensor]:
            outputs = self._first(evaluation, x, scaled).outputs
            if evaluation is self._evaluations[-1]:
                self._digest = _digest(outputs)
            return [output.detach() for output in outputs]

        return self._pair.forward(self._z0, self._trajectory, evaluate)

    def backward(self, lam: Tensor, kept: Sequence[Tensor], wanted: Sequence[bool]) -> Gradients:
        with torch.no_grad():
            if not self._there:
                self._pair.forward(self._z0, self._silent, self._replay)
            self._there = False
            try:
                gradients = super().backward(lam, kept, wanted)
                if self._agreement.any(not self._pair.returned(self._z0)):
                    _differs("some step")
            finally:
                self._pair.free()
        return gradients

    def _replay(self, evaluation: Evaluation, x: Tensor, scaled: Tensor | None) -> list[Tensor]:
        """The outputs of an evaluation on the way to the end."""
        outputs = self._repeated(evaluation, x, scaled).outputs
        return [output.detach() for output in outputs]

    def _again(self, evaluation: Evaluation) -> Call:
        """Calls the model once more, and undoes what followed from its outputs."""
        j = self._positions[evaluation.state]
        x, scaled = self._pair.state(j)
        call = self._repeated(evaluation, x, scaled)
        last = evaluation is self._evaluations[-1]
        if last and self._agreement.any(bool(_digest(call.outputs) != self._digest)):
            _differs(f"step {evaluation.step}")
        outputs = [output.detach() for output in call.outputs]
        slots = {evaluation.state: x, **dict(zip(evaluation.writes, outputs, strict=True))}
        self._pair.undo(j, slots, self._z0)
        return call

    def _skip(self, evaluation: Evaluation) -> None:
        self._again(evaluation)  # no other way leads to the state before


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _digest(outputs: Sequence[Tensor]) -> Tensor:
    """One int64 that another output would hardly have as well, bit for bit."""
    total = torch.zeros((), dtype=torch.int64, device=outputs[0].device)
    for output in outputs:
        bits = output.detach().flatten().view(_INTEGERS[output.element_size()])
        for part in bits.chunk(64):  # of the whole, the wide integers would be several states
            wide = part.to(torch.int64)
            total = 31 * total + (wide * (wide + 0x5851F42D4C957F2D)).sum()
    return total


def _differs(where: str) -> NoReturn:
    raise ReplayError(
        "memory='reversible' needs a denoiser that returns the same bits when it is called again, "
        f"got others at {where}; try torch.use_deterministic_algorithms(True), or take "
        "memory='checkpoint'"
    )
