# SPDX-License-Identifier: Apache-2.0
"""Programs of one method on other levels as one program, with numbers of each sample."""

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import NoReturn, TypeVar

import torch
from torch import Tensor

from gradsampler import _checks
from gradsampler.engine.program import Evaluation, Injection, Instruction, Program, Stage

Key = TypeVar("Key", bound=Hashable)
Row = tuple[int | None, ...]  # positions of a number, by program; None where it is 0


def together(programs: Sequence[Program]) -> Program:
    """One program for all samples, from those of each.

    What only some of them do, as injecting noise within a window of levels, the others do 0 times.

    Raises:
        ValueError: where they evaluate the model at other places.
    """
    joined = _Joined(programs)
    rows = zip(*(program.instructions for program in programs), strict=False)
    instructions = [joined.instruction(k, row) for k, row in enumerate(rows)]
    if len({len(program.instructions) for program in programs}) > 1:
        _refuse(len(instructions))
    first = programs[0]
    return replace(first, instructions=tuple(instructions), coefficients=joined.coefficients())


class _Joined:
    """Collects the numbers of the joint program."""

    def __init__(self, programs: Sequence[Program]) -> None:
        self._programs = programs
        self._rows: list[Row] = []

    def instruction(self, k: int, row: Sequence[Instruction]) -> Instruction:
        """The joint one of the k-th instructions."""
        stages = [i for i in row if isinstance(i, Stage)]
        evaluations = [i for i in row if isinstance(i, Evaluation)]
        if len(stages) == len(row) and len({i.writes for i in stages}) == 1:
            terms = self._union([dict(i.terms) for i in stages])
            noises = self._union(
                [{each.noise: each.coefficient for each in i.injections} for i in stages]
            )
            injections = tuple(Injection(*noise, c) for noise, c in noises)
            return Stage(stages[0].writes, terms, injections)
        if len(evaluations) == len(row) and len({(i.state, i.step) for i in evaluations}) == 1:
            writes = sorted({slot for i in evaluations for slot in i.writes})
            return Evaluation(
                evaluations[0].state,
                tuple(writes),
                c_in=self._number([i.c_in for i in evaluations]),
                c_noise=self._number([i.c_noise for i in evaluations]),
                sigma=self._number([i.sigma for i in evaluations]),
                denoised=self._union([dict(i.denoised) for i in evaluations]),
                step=evaluations[0].step,
            )
        _refuse(k)

    def coefficients(self) -> Tensor:
        """[C, B] float64."""
        columns = []
        for b, program in enumerate(self._programs):
            zero = len(program.coefficients)
            index = torch.tensor([zero if row[b] is None else row[b] for row in self._rows])
            padded = torch.cat([program.coefficients, program.coefficients.new_zeros(1)])
            columns.append(padded[index])
        return torch.stack(columns, dim=1)

    def _union(self, given: Sequence[dict[Key, int]]) -> tuple[tuple[Key, int], ...]:
        keys = dict.fromkeys(key for each in given for key in each)
        return tuple((key, self._number([each.get(key) for each in given])) for key in keys)

    def _number(self, positions: Sequence[int | None]) -> int:
        self._rows.append(tuple(positions))
        return len(self._rows) - 1


def _refuse(instruction: int) -> NoReturn:
    _checks.fail(
        "sigmas",
        "lead each sample through the same model calls",
        f"levels of which some take another course from instruction {instruction} on",
        "let all or none of the samples end at 0, or start from noise alone",
    )
