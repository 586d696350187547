# SPDX-License-Identifier: Apache-2.0
"""A sampling run as a table of numbers: affine stages with model evaluations between them.

    stage       x_j = sum_k c_k * slot_k + sum_i s_i * n_i(z0)
    evaluation  d_j = F(c_in * x_j, c_noise)

Only the numbers differ from solver to solver; they depend on the noise levels alone and are held
in one float64 vector, through which the gradient to the levels flows. A slot is written once, so
the gradient of the program is the transposed program, which `transpose` writes down:

    pullback    g_j       = J_F^T cot(d_j)
    stage       cot(slot) = sum of c * cot(x) over the stages that read it, and c_in * g_j
    absorption  cot(z0)  += s * n_i'(z0)^T cot(x_j)
"""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from gradsampler import transforms
from gradsampler.contract import MAX_TERMS
from gradsampler.elementary import as_float
from gradsampler.noise.sources import Injected
from gradsampler.parameterization import Coefficient, Parameterization, parameterize

__all__ = [
    "START",
    "Z0",
    "Absorption",
    "Affine",
    "Descent",
    "Evaluation",
    "Gathering",
    "Injection",
    "Launch",
    "Numbers",
    "Program",
    "Pullback",
    "Recorder",
    "Slot",
    "Stage",
    "column",
    "fused",
    "transpose",
]


class Slot(NamedTuple):
    """A tensor of the run; in the transposed program, its cotangent."""

    # "z0" | "start" a given first state | "x" state | "d" model output | "c" constant | "g" the
    # model's cotangent
    kind: str
    call: int = 0  # the evaluation that reads the state or writes the output
    branch: int = 0  # the network call within that evaluation


Z0 = Slot("z0")
START = Slot("start")
Key = TypeVar("Key", Slot, Injected)
Terms = tuple[tuple[Slot, int], ...]  # slots and the positions of their coefficients
Numbers = Sequence[float] | Sequence[Tensor]  # tensors are 0-d, for a gradient, or [B]


class Injection(NamedTuple):
    """Noise that a stage adds."""

    step: int  # absolute step index, the i of n_i
    draw: int  # which of the step's noises, 0 for the first
    coefficient: int  # position of s

    @property
    def noise(self) -> Injected:
        """What names the noise, which other stages may inject too."""
        return self.step, self.draw


@dataclass(frozen=True)
class Stage:
    """One affine combination of slots plus injected noise."""

    writes: Slot
    terms: Terms
    injections: tuple[Injection, ...] = ()

    def reads(self) -> Iterator[Slot]:
        """The slots that the stage reads."""
        return (slot for slot, _ in self.terms)


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the model on a state, at most a few network calls."""

    state: Slot
    writes: tuple[Slot, ...]  # one output a network call
    c_in: int  # positions of the numbers
    c_noise: int
    sigma: int
    denoised: Terms  # D as a combination of the state and the outputs
    step: int  # the step that it belongs to; num_steps for a final denoising

    @cached_property
    def branches(self) -> list[int]:
        """Which of the model's outputs are read."""
        return [slot.branch for slot in self.writes]

    def reads(self) -> Iterator[Slot]:
        """The slot that the model is evaluated on."""
        yield self.state


@dataclass(frozen=True)
class Pullback:
    """A transposed evaluation: from the cotangents of the outputs to that of the scaled input."""

    evaluation: Evaluation
    writes: Slot
    readers: tuple[Slot, ...]  # states computed from the outputs, for the coefficients' gradient

    def reads(self) -> Iterator[Slot]:
        """The cotangents of the outputs and of the states computed from them."""
        yield from self.evaluation.writes
        yield from self.readers


@dataclass(frozen=True)
class Absorption:
    """A transposed injection: from the cotangent of a state into that of z0."""

    state: Slot
    injection: Injection

    def reads(self) -> Iterator[Slot]:
        """The cotangent that is absorbed."""
        yield self.state


@dataclass(frozen=True)
class Descent:
    """A state's cotangent, its share of z0, and with it the first cotangent of the outputs of the
    evaluation before: one launch, and one more for each further absorption.
    """

    state: Stage
    absorptions: tuple[Absorption, ...] = ()
    output: Stage | None = None

    def reads(self) -> Iterator[Slot]:
        """The cotangents that are read."""
        yield from self.state.reads()
        if self.output is not None:
            yield from self.output.reads()


Instruction = Stage | Evaluation | Pullback | Absorption | Descent


class Gathering(NamedTuple):
    """A descent with its numbers in the place of their positions."""

    lams: tuple[Slot, ...]  # the cotangents of states that it reads
    a: list[float]
    g: Slot | None  # the model's cotangent
    g_scale: float
    b: list[float] | None  # of the cotangents, then of the new one; None without an output


class Launch(NamedTuple):
    """A stage with its numbers in the place of their positions."""

    writes: Slot
    reads: tuple[Slot, ...]
    factors: list[Any]
    injections: tuple[Injection, ...]
    amounts: list[Any]
    c_in: Any  # of the evaluation that follows; None where none does
    plain: bool  # few terms with numbers of all samples, and no noise


@dataclass(frozen=True)
class Program:
    """The instructions of a run in order, and the vector of all its numbers."""

    instructions: tuple[Instruction, ...]
    # [C] float64 on the CPU, or [C, B] for levels of each sample; carries the gradient to them
    coefficients: Tensor
    num_steps: int
    output: Slot

    @cached_property
    def floats(self) -> list[float]:
        """The coefficients, where they are those of all samples."""
        found: list[float] = self.coefficients.tolist()
        return found

    @cached_property
    def launches(self) -> list[Launch | None]:
        """`prepared` with `floats`, once for all runs of the program."""
        return self.prepared(self.floats)

    @cached_property
    def gathered(self) -> "list[Gathering | None]":
        """For each instruction of a transposed program that is a descent, what it computes."""
        numbers = [] if self.by_sample else self.floats
        found: list[Gathering | None] = []
        for descent in self.instructions:
            if not isinstance(descent, Descent):
                found.append(None)
                continue
            a = {s: numbers[c] for s, c in descent.state.terms}
            b = {s: numbers[c] for s, c in descent.output.terms} if descent.output else {}
            lams = tuple(s for s in dict.fromkeys((*a, *b)) if s.kind == "x")
            lams = tuple(s for s in lams if s != descent.state.writes)
            g = next((s for s in a if s.kind == "g"), None)
            found.append(
                Gathering(
                    lams,
                    [a.get(s, 0.0) for s in lams],
                    g,
                    0.0 if g is None else a[g],
                    [b.get(s, 0.0) for s in (*lams, descent.state.writes)]
                    if descent.output
                    else None,
                )
            )
        return found

    def prepared(self, numbers: Numbers) -> list[Launch | None]:
        """For each instruction that is a stage, what it computes."""
        following = (*self.instructions[1:], None)
        return [
            Launch(
                stage.writes,
                tuple(stage.reads()),
                [numbers[c] for _, c in stage.terms],
                stage.injections,
                [numbers[injection.coefficient] for injection in stage.injections],
                numbers[after.c_in] if isinstance(after, Evaluation) else None,
                not (self.by_sample or stage.injections) and len(stage.terms) <= MAX_TERMS,
            )
            if isinstance(stage, Stage)
            else None
            for stage, after in zip(self.instructions, following, strict=True)
        ]

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The affine stages in order."""
        return tuple(i for i in self.instructions if isinstance(i, Stage))

    @cached_property
    def evaluations(self) -> tuple[Evaluation, ...]:
        """The model evaluations in order."""
        return tuple(i for i in self.instructions if isinstance(i, Evaluation))

    @cached_property
    def injections(self) -> tuple[Injection, ...]:
        """The injections in order; a noise may be injected by more than one stage."""
        return tuple(injection for stage in self.stages for injection in stage.injections)

    @cached_property
    def noises(self) -> tuple[Injected, ...]:
        """The noises of the run, each once, in the order in which they are first injected."""
        return tuple(dict.fromkeys(injection.noise for injection in self.injections))

    @cached_property
    def first_calls(self) -> dict[Slot, int]:
        """The states that the first evaluation of each step sees, with the steps."""
        first: dict[int, Slot] = {}
        for evaluation in self.evaluations:
            if evaluation.step < self.num_steps:
                first.setdefault(evaluation.step, evaluation.state)
        return {slot: step for step, slot in first.items()}

    @cached_property
    def readers(self) -> dict[Slot, Terms]:
        """For each slot the states computed from it, with the positions of the coefficients."""
        readers: dict[Slot, Terms] = {}
        for stage in self.stages:
            for slot, coefficient in stage.terms:
                readers[slot] = (*readers.get(slot, ()), (stage.writes, coefficient))
        return readers

    @cached_property
    def transposed(self) -> "Program":
        """The program of the gradient; what lies between two model calls is one instruction, where
        the numbers are those of all samples.
        """
        return transpose(self) if self.by_sample else fused(transpose(self))

    @cached_property
    def derived(self) -> dict[Hashable, Any]:
        """What else is made of the program, kept with it."""
        return {}

    @property
    def by_sample(self) -> bool:
        """Whether each sample has numbers of its own."""
        return self.coefficients.ndim == 2

    def numbers(self, device: torch.device) -> Numbers:
        """The coefficients as floats, or by sample as tensors [B] on ``device``."""
        if not self.by_sample:
            return self.floats
        return self.coefficients.detach().to(device).unbind()

    @cached_property
    def dead(self) -> list[set[Slot]]:
        """`last_reads`, computed once."""
        return self.last_reads()

    def last_reads(self) -> list[set[Slot]]:
        """For each instruction the slots that it reads or writes and nothing after it reads."""
        needed, dead = {self.output}, []
        for instruction in reversed(self.instructions):
            reads = set(instruction.reads())
            writes = set(instruction.writes) if isinstance(instruction, Evaluation) else set()
            dead.append((reads | writes) - needed)
            needed |= reads
        return dead[::-1]


def transpose(program: Program) -> Program:
    """The transposed program: the same numbers, read backwards.

    Its slots are the cotangents of the program's slots, gathered: the cotangent of a slot is one
    stage over the cotangents of the states computed from it. So backward needs as many kernels a
    model evaluation as forward does, and keeps as few tensors alive.
    """
    readers = program.readers
    returned: dict[Slot, Terms] = {}
    backward: list[Instruction] = []
    for instruction in reversed(program.instructions):
        if isinstance(instruction, Evaluation):
            outputs = [Stage(slot, readers.get(slot, ())) for slot in instruction.writes]
            g = Slot("g", instruction.state.call)
            later = tuple({slot: None for stage in outputs for slot in stage.reads()})
            backward += [*outputs, Pullback(instruction, g, later)]
            returned[instruction.state] = ((g, instruction.c_in),)
        elif isinstance(instruction, Stage):
            slot = instruction.writes
            if slot != program.output:
                backward.append(Stage(slot, readers.get(slot, ()) + returned.get(slot, ())))
            backward += [Absorption(slot, injection) for injection in instruction.injections[::-1]]
    backward.append(Stage(Z0, readers.get(Z0, ())))
    if START in readers:
        backward.append(Stage(START, readers[START]))
    # What is given beside z0 has no cotangent of interest; its coefficients have.
    backward += [Stage(slot, terms) for slot, terms in readers.items() if slot.kind == "c"]
    return Program(tuple(backward), program.coefficients, program.num_steps, Z0)


def fused(transposed: Program) -> Program:
    """A transposed program in which what happens between two model calls is one instruction."""
    grouped: list[Instruction] = []
    for instruction in transposed.instructions:
        last = grouped[-1] if grouped else None
        if isinstance(instruction, Stage) and instruction.writes.kind == "x":
            grouped.append(Descent(instruction))
        elif isinstance(last, Descent) and isinstance(instruction, Absorption):
            grouped[-1] = Descent(last.state, (*last.absorptions, instruction))
        elif (
            isinstance(last, Descent)
            and last.output is None
            and isinstance(instruction, Stage)
            and instruction.writes.kind == "d"
        ):
            grouped[-1] = Descent(last.state, last.absorptions, instruction)
        else:
            grouped.append(instruction)
    return replace(transposed, instructions=tuple(grouped))


class Affine:
    """A linear combination of slots and of noises, as a solver writes it."""

    def __init__(
        self,
        terms: Mapping[Slot, Coefficient] = MappingProxyType({}),
        noises: Mapping[Injected, Coefficient] = MappingProxyType({}),
    ) -> None:
        self.terms = terms
        self.noises = noises

    def __add__(self, other: "Affine") -> "Affine":
        return Affine(_sum(self.terms, other.terms), _sum(self.noises, other.noises))

    def __mul__(self, factor: Coefficient) -> "Affine":
        return Affine(
            {slot: c * factor for slot, c in self.terms.items()},
            {noise: c * factor for noise, c in self.noises.items()},
        )

    __rmul__ = __mul__

    def __neg__(self) -> "Affine":
        return self * -1.0

    def __sub__(self, other: "Affine") -> "Affine":
        return self + -other

    def __truediv__(self, divisor: Coefficient) -> "Affine":
        return self * (1 / divisor)


class Denoised(NamedTuple):
    """A prediction that a solver made earlier in the run."""

    sigma: Coefficient
    value: Affine
    state: Affine  # that it was made from
    branches: tuple[Affine, ...] = ()  # the predictions that guidance combines, if it does

    @property
    def unconditional(self) -> Affine:
        """The prediction without conditioning; without guidance the prediction itself."""
        return self.branches[0] if self.branches else self.value

    @property
    def slope(self) -> Affine:
        """dx/ds = (x - D)/s there."""
        return (self.state - self.value) / self.sigma


class Recorder:
    """Records the program of a solver, whose code computes with `Affine` in place of tensors.

    Record your own loop with it, and `integrate` runs it under every memory strategy.

    Args:
        denoiser: a `Parameterization`, or a plain callable.
        num_steps: N.
        prediction: what a plain callable predicts, "x0" | "epsilon" | "v" | "flow".

    Example:
        >>> import torch, gradsampler as gs
        >>> from itertools import pairwise
        >>> denoiser, levels = lambda x, sigma: 0.5 * x, [2.0, 1.0, 0.5]
        >>> run = gs.solvers.Recorder(denoiser, num_steps=2)
        >>> x = levels[0] * run.z0()
        >>> for run.step, (s, t) in enumerate(pairwise(levels)):
        ...     x, denoised = run.denoise(x, s)
        ...     x = denoised + t / s * (x - denoised) + 0.1 * run.noise()
        >>> program = run.finish(x)
        >>> gs.integrate(program, denoiser, torch.ones(1, 3), noise=gs.noise.Off())
        tensor([[1.1250, 1.1250, 1.1250]])
    """

    def __init__(
        self,
        denoiser: Parameterization | Callable[..., Tensor],
        num_steps: int,
        prediction: str = "x0",
    ) -> None:
        model = parameterize(denoiser, prediction)
        self.num_steps = num_steps
        self.step = 0  # the current one; the solver's loop advances it
        self.predictions: list[Denoised] = []  # all so far, the latest last
        self.coordinates = model.coordinates
        self._model = model
        self._numbers: list[Coefficient] = []
        self._instructions: list[Instruction] = []
        self._evaluations = 0
        self._draws: Counter[int] = Counter()  # by step

    def z0(self) -> Affine:
        """The initial noise."""
        return Affine({Z0: 1.0})

    def start(self) -> Affine:
        """A state that the run is given, in place of one made of z0."""
        return Affine({START: 1.0})

    def noise(self) -> Affine:
        """Noise of the current step: a new draw at each call, independent of the others.

        To inject one noise at several places, keep what this returns.
        """
        draw = self._draws[self.step]
        self._draws[self.step] += 1
        return Affine(noises={(self.step, draw): 1.0})

    def denoise(self, x: Affine, sigma: Coefficient) -> tuple[Affine, Affine]:
        """Ends a stage at the state ``x`` and evaluates the model there.

        At an infinite ``sigma`` the state is noise alone, and ``x`` is what it is divided by it.
        The predictions that guidance combines are in ``predictions[-1]``.

        Returns:
            The state as a slot, to go on with in place of ``x``, and the denoised sample D.
        """
        state = self._write(x)
        call, model = state.call, self._model.at(self.step)
        infinite = math.isinf(as_float(sigma))
        maps = model.limit() if infinite else model.preconditioning(sigma)
        outputs = tuple(Slot("d", call, b) for b in range(len(maps.c_out)))
        here = Affine({state: 1.0})

        def combined(c_out: Sequence[Coefficient]) -> Affine:
            return here * maps.c_skip + Affine(dict(zip(outputs, c_out, strict=True)))

        denoised, branches = combined(maps.c_out), tuple(map(combined, maps.branches))
        self._instructions.append(
            Evaluation(
                state,
                outputs,
                c_in=self._number(maps.c_in),
                c_noise=self._number(maps.c_noise),
                sigma=self._number(sigma),
                denoised=self._terms(denoised),
                step=self.step,
            )
        )
        self._evaluations += 1
        self.predictions.append(Denoised(sigma, denoised, here, branches))
        return here, denoised

    def before(self, sigma: Coefficient) -> Denoised | None:
        """What the model predicted before the latest, for multistep methods.

        None in the first step, and where churn has raised the level ``sigma`` to that of the
        prediction or above: it would then lie on the wrong side.
        """
        return next(iter(self.history(sigma, 1)), None)

    def history(self, sigma: Coefficient, count: int) -> list[Denoised]:
        """What the model predicted before the latest, at levels that rise from ``sigma``.

        Args:
            sigma: the level of the latest.
            count: how many predictions at most.

        Returns:
            The predictions, the later first.
        """
        found: list[Denoised] = []
        for earlier in self.predictions[-2::-1][:count]:
            if not earlier.sigma > sigma * (1 + 1e-6):
                break
            found.append(earlier)
            sigma = earlier.sigma
        return found

    def finish(self, x: Affine) -> Program:
        """Ends the last stage and returns the program.

        Outputs that nothing reads, as those of a branch without weight, are not asked for.
        """
        output = self._write(x)
        stages = [i for i in self._instructions if isinstance(i, Stage)]
        read = {slot for stage in stages for slot in stage.reads()}
        instructions = tuple(
            _reduced(i, read) if isinstance(i, Evaluation) else i for i in self._instructions
        )
        return Program(instructions, _vector(self._numbers), self.num_steps, output)

    def _write(self, x: Affine) -> Slot:
        injections = tuple(Injection(*noise, self._number(c)) for noise, c in x.noises.items())
        slot = Slot("x", self._evaluations)
        self._instructions.append(Stage(slot, self._terms(x), injections))
        return slot

    def _terms(self, x: Affine) -> Terms:
        return tuple((slot, self._number(c)) for slot, c in x.terms.items() if not _absent(c))

    def _number(self, c: Coefficient) -> int:
        self._numbers.append(c)
        return len(self._numbers) - 1


def _reduced(evaluation: Evaluation, read: Set[Slot]) -> Evaluation:
    """The evaluation with those of its outputs that are read, or else with all."""
    needed = read | {slot for slot, _ in evaluation.denoised}
    kept = tuple(slot for slot in evaluation.writes if slot in needed)
    return replace(evaluation, writes=kept or evaluation.writes)


def _sum(a: Mapping[Key, Coefficient], b: Mapping[Key, Coefficient]) -> dict[Key, Coefficient]:
    total = dict(a)
    for key, c in b.items():
        total[key] = total[key] + c if key in total else c
    return total


def _vector(numbers: Sequence[Coefficient]) -> Tensor:
    """The numbers as one float64 tensor, which carries the gradient of those that are tensors."""
    if not any(isinstance(c, Tensor) for c in numbers):
        return torch.tensor(numbers, dtype=torch.float64)
    return torch.stack([torch.as_tensor(c, dtype=torch.float64) for c in numbers])


def column(c: float | Tensor, x: Tensor) -> float | Tensor:
    """A coefficient so that it multiplies x [B, *state]: one of each sample [B] as a column."""
    if isinstance(c, Tensor) and c.ndim == 1:
        return c.to(x.device).view(-1, *[1] * (x.ndim - 1))
    return c


def _absent(c: Coefficient) -> bool:
    # A zero that depends on the levels stays: its value is 0, its derivative is not.
    return bool(c == 0) and not (isinstance(c, Tensor) and transforms.followed(c))
