# SPDX-License-Identifier: Apache-2.0
"""The last steps of a program as a program over constants."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch

from gradsampler.engine.program import Z0, Evaluation, Injection, Program, Slot, Stage

__all__ = ["Cut", "noise_slot"]


@dataclass(frozen=True)
class Cut:
    """The last steps of a program as a program over constants."""

    program: Program
    names: dict[Slot, Slot]  # of the constants, by the slots and noises that they were
    start: int  # the instruction before which the constants are there
    early: tuple[Injection, ...]  # of the steps before that later stages inject

    @classmethod
    def of(cls, program: Program, given: Iterable[Slot], steps: int) -> "Cut | None":
        """The cut before the last ``steps``, or None where these are the whole run.

        Args:
            program: the whole.
            given: what is there before its first instruction.
            steps: at least 1.
        """
        first = program.num_steps - steps
        calls = [(k, i) for k, i in enumerate(program.instructions) if isinstance(i, Evaluation)]
        cut = next((k for k, call in calls if call.step >= first), calls[-1][0])
        if cut == calls[0][0]:
            return None
        entry = program.instructions[cut - 1]
        assert isinstance(entry, Stage)
        live = any(injection.step >= first for injection in entry.injections)
        start = cut - 1 if live else cut
        later = [i for i in program.instructions[start:] if isinstance(i, Stage)]
        injections = [injection for stage in later for injection in stage.injections]
        early = tuple(i for i in injections if i.step < first)
        slots = [*_alive(program, start, given), *dict.fromkeys(map(noise_slot, early))]
        tail, names = _tail(program, cut, slots, live=live)
        return cls(tail, names, start, early)


def _alive(program: Program, stop: int, given: Iterable[Slot]) -> list[Slot]:
    """The slots that are there before instruction ``stop``."""
    alive = dict.fromkeys(given)
    for instruction, dead in zip(program.instructions[:stop], program.dead, strict=False):
        if isinstance(instruction, Stage):
            alive[instruction.writes] = None
        elif isinstance(instruction, Evaluation):
            alive |= dict.fromkeys(instruction.writes)
        for slot in dead:
            del alive[slot]
    return list(alive)


def _tail(
    program: Program, cut: int, slots: Iterable[Slot], *, live: bool
) -> tuple[Program, dict[Slot, Slot]]:
    """The program from the evaluation at ``cut`` on, and what it calls the constants.

    With ``live`` noise the stage before is repeated over constants; else its state is one.
    """
    names = {slot: Slot("c", k) for k, slot in enumerate(slots)}
    numbers, count = program.coefficients, len(program.coefficients)
    entry = program.instructions[cut - 1]
    assert isinstance(entry, Stage)
    if live:
        repeated = _over(entry, names)
        fixed = torch.stack([numbers[c] for _, c in repeated.terms]).detach()
        terms = tuple((slot, count + k) for k, (slot, _) in enumerate(repeated.terms))
        start = replace(repeated, terms=terms)
    else:
        fixed = torch.ones_like(numbers[:1]).detach()
        start = Stage(entry.writes, ((names[entry.writes], count),))
    known = {slot: name for slot, name in names.items() if slot not in (Z0, entry.writes)}
    rest = [_over(i, known) if isinstance(i, Stage) else i for i in program.instructions[cut:]]
    numbers = torch.cat([numbers, fixed])
    return replace(program, instructions=(start, *rest), coefficients=numbers), names


def noise_slot(injection: Injection) -> Slot:
    """What a noise is called where it is a constant."""
    return Slot("n", *injection.noise)


def _over(stage: Stage, names: Mapping[Slot, Slot]) -> Stage:
    """The stage with constants in the place of the slots and noises that ``names`` knows."""
    terms = [(names.get(slot, slot), c) for slot, c in stage.terms]
    early = [i for i in stage.injections if noise_slot(i) in names]
    terms += [(names[noise_slot(i)], i.coefficient) for i in early]
    later = tuple(i for i in stage.injections if i not in early)
    return Stage(stage.writes, tuple(terms), later)
