# SPDX-License-Identifier: Apache-2.0
"""Programs whose states can be undone: each adds to the state before the last what follows from
the last one alone,

    x[j] = r * x[j-2] + f(x[j-1], outputs of the model there, noise),    r > 0.

In additive coordinates ``w[j] = x[j] / A[j]`` with ``A[j] = r * A[j-2]`` that is ``w[j] = w[j-2] +
f / A[j]``. With w in integers and the increment rounded once, a subtraction gives back the very
bits of w[j-2] (Levesque and Verlet 1993, "Molecular dynamics and time reversibility").
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from gradsampler import _checks
from gradsampler.engine.program import START, Z0, Evaluation, Program, Slot, Stage, Terms

_MARGIN = 2  # bits between the expected range and the end of the integers' range
_LEAST = 16  # bits below one with which the rounding is not seen in a sample
_USUAL = 20  # bits below one that 32-bit integers must leave


class Leap(NamedTuple):
    """How a state comes about."""

    stage: Stage
    terms: Terms  # the stage's without the state before the last
    scale: float  # A


class FixedPoint(NamedTuple):
    """Integers that count units of ``2**-bits``."""

    dtype: torch.dtype
    bits: int

    @classmethod
    def holding(cls, reach: float, dtype: torch.dtype) -> "FixedPoint":
        """The format for values up to ``reach``, as fine as it can be for states of ``dtype``."""
        above = math.ceil(math.log2(reach)) + _MARGIN
        if above + _USUAL <= 30 and dtype != torch.float64:
            return cls(torch.int32, 30 - above)
        if above + _LEAST <= 62:
            return cls(torch.int64, 62 - above)
        _checks.fail(
            "memory=Reversible",
            f"hold the states in 64 bits, {_LEAST} of them below one",
            f"a run that needs {above} bits above one, as its levels and churn contract so much",
            "take memory='checkpoint', less churn or a smaller amplitude",
        )


@dataclass(frozen=True)
class Leapfrog:
    """A program of that form."""

    leaps: tuple[Leap, ...]  # of the state of each evaluation, then of the output if it is one
    rest: Stage | None  # the output where it is another combination, of what came last

    @property
    def undone(self) -> bool:
        """Whether there is a step to undo: in runs of one or two any solver's steps are leaps."""
        return len(self.leaps) > 2

    @classmethod
    def of(cls, program: Program) -> "Leapfrog | None":
        """The program as leaps, or None where it is none."""
        if program.by_sample:
            return None
        numbers = program.floats
        stages, evaluations = program.stages, program.evaluations
        if len(stages) != len(evaluations) + 1 or not evaluations:
            return None
        leaps: list[Leap] = []
        ratios: list[float] = []
        for j, stage in enumerate(stages):
            before = Slot("x", j - 2)
            latest = _latest(evaluations[j - 1]) if j else {Z0, START}
            ratio = next((numbers[c] for slot, c in stage.terms if slot == before), 0.0)
            terms = tuple(term for term in stage.terms if term[0] != before)
            if any(slot not in latest for slot, _ in terms):
                return None
            if not ratio > 0:
                if j == len(evaluations):
                    return cls(_scaled(leaps, ratios), stage)
                if j >= 2:
                    return None
            leaps.append(Leap(stage, terms, 1.0))
            ratios.append(ratio)
        return cls(_scaled(leaps, ratios), None)

    def format(
        self, program: Program, amplitude: float, reach: float, dtype: torch.dtype
    ) -> FixedPoint:
        """Integers for states of ``dtype``: samples up to ``amplitude``, noise up to ``reach``."""
        numbers = program.floats
        levels = [numbers[evaluation.sigma] for evaluation in program.evaluations]
        levels = [*levels, levels[-1]][: len(self.leaps)]
        # At an infinite level the state is divided by it.
        sizes = (amplitude + level * reach if level < math.inf else reach for level in levels)
        largest = max(size / leap.scale for size, leap in zip(sizes, self.leaps, strict=True))
        return FixedPoint.holding(largest, dtype)


def _latest(evaluation: Evaluation) -> set[Slot]:
    return {evaluation.state, *evaluation.writes}


def _scaled(leaps: list[Leap], ratios: list[float]) -> tuple[Leap, ...]:
    """The leaps with their A: that of the first state is 1, that of the second lies between its
    neighbours'.
    """
    scales = [1.0, math.sqrt(ratios[2]) if len(ratios) > 2 else 1.0]
    for ratio in ratios[2:]:
        scales.append(ratio * scales[-2])
    return tuple(
        leap._replace(scale=scale) for leap, scale in zip(leaps, scales[: len(leaps)], strict=True)
    )
