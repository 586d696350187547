# SPDX-License-Identifier: Apache-2.0
"""The gradient through the last steps alone."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from gradsampler import _checks
from gradsampler.engine.program import Z0, Evaluation, Injection, Program, Slot, Stage
from gradsampler.engine.trajectory import Trajectory
from gradsampler.memory import named
from gradsampler.memory.base import Memory
from gradsampler.memory.store import Store


@dataclass(frozen=True)
class Truncated(Memory):
    """The gradient through the last ``steps`` sampler steps only: not that of the run.

    The sample is the same, to rounding where a stage injects the noises of two steps, and else to
    the bit. The steps before keep nothing for backward: the state in which step
    N - steps begins is a constant, and so are the earlier states and model outputs that a multistep
    solver looks back at. So the noise injected from that step on still carries its gradient to
    z0 (or to the tensors of a `noise.Given`), and conditioning, parameters and levels receive
    what they receive through the last steps; the coefficients with which these combine the
    constants count as theirs. Where these steps inject no noise, z0 receives zero, and the run
    warns of it. With ``steps`` >= N it is the whole run, and exact.

    Truncation for reward gradients: Clark et al. 2023, "Directly fine-tuning diffusion models on
    differentiable rewards" (DRaFT-K).

    Args:
        steps: how many, at least 1; a final denoising belongs to the last one.
        inner: the memory of these steps, a name of `memory.names()` or an object, but not
            `Reversible`, which needs the whole run.
    """

    steps: int
    inner: str | Memory = "checkpoint"
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _checks.integer("Truncated: steps", self.steps, 1)
        inner = named.exact("Truncated: inner", self.inner)
        if not (inner.exact and inner.any_program):
            # The last steps alone start from states that no subtraction leads back to.
            _checks.fail("Truncated: inner", "be another strategy", repr(self.inner))

    def run(self, trajectory: Trajectory, z0: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return Store().run(trajectory, z0)
        program, inner = trajectory.program, named.exact("Truncated: inner", self.inner)
        first = program.num_steps - self.steps
        calls = [(k, i) for k, i in enumerate(program.instructions) if isinstance(i, Evaluation)]
        cut = next((k for k, call in calls if call.step >= first), calls[-1][0])
        if cut == calls[0][0]:
            return inner.run(trajectory, z0)
        entry = program.instructions[cut - 1]
        assert isinstance(entry, Stage)
        live = any(injection.step >= first for injection in entry.injections)
        slots = _head(trajectory, z0, cut - 1 if live else cut)
        slots |= _early(trajectory, z0, cut - 1 if live else cut, first)
        tail, names = _tail(program, cut, slots, live=live)
        if z0.requires_grad and not tail.injections and Z0 not in tail.readers:
            warnings.warn(
                f"memory=Truncated: the gradient to z0 is zero, since the last {self.steps} steps "
                "inject no noise; take an exact memory, or noise",
                stacklevel=6,
            )
        if trajectory.start is not None and trajectory.start.requires_grad:
            warnings.warn(
                "memory=Truncated: start receives no gradient, since the steps that begin with it "
                "are not among the last ones; take an exact memory",
                stacklevel=6,
            )
        trajectory = replace(trajectory, start=None)
        constants = {names[slot]: x for slot, x in slots.items()}
        return inner.run(replace(trajectory, program=tail, constants=constants), z0)


def _head(trajectory: Trajectory, z0: Tensor, stop: int) -> dict[Slot, Tensor]:
    """Runs to before instruction ``stop``; returns the tensors that the rest of the run reads.

    Grad mode is on in each model call, as with every other strategy, and its graph is dropped.
    """
    tensors = [x.detach() for x in trajectory.cond.tensors]

    def evaluate(evaluation: Evaluation, x: Tensor, scaled: Tensor | None) -> Sequence[Tensor]:
        scaled, level = trajectory.model_input(evaluation, x, scaled)
        with torch.enable_grad():
            outputs = trajectory.call(evaluation, scaled, level, trajectory.cond.filled(tensors))
        return [output.detach() for output in outputs]

    with torch.no_grad():
        slots = {slot: x.detach() for slot, x in trajectory.given(z0).items()}
        trajectory.execute(slots, 0, stop, z0.detach(), evaluate)
    return slots


def _early(trajectory: Trajectory, z0: Tensor, start: int, first: int) -> dict[Slot, Tensor]:
    """The noises of steps before ``first`` that stages from instruction ``start`` on inject."""
    program = trajectory.program
    stages = [i for i in program.instructions[start:] if isinstance(i, Stage)]
    injections = [injection for stage in stages for injection in stage.injections]
    with torch.no_grad():
        return {
            _noise(injection): trajectory.noise.at(z0, *trajectory.name(injection)).detach()
            for injection in injections
            if injection.step < first
        }


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


def _noise(injection: Injection) -> Slot:
    return Slot("n", *injection.noise)


def _over(stage: Stage, names: Mapping[Slot, Slot]) -> Stage:
    """The stage with constants in the place of the slots and noises that ``names`` knows."""
    terms = [(names.get(slot, slot), c) for slot, c in stage.terms]
    early = [i for i in stage.injections if _noise(i) in names]
    terms += [(names[_noise(i)], i.coefficient) for i in early]
    later = tuple(i for i in stage.injections if i not in early)
    return Stage(stage.writes, tuple(terms), later)
