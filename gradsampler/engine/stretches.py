# SPDX-License-Identifier: Apache-2.0
"""Several steps of a run with their model calls as one compiled graph.

A run is cut into stretches of so many steps of the same form. A stretch is a map from the slots
that are alive before it to those after it; so the run is a program again, whose evaluations are
stretches and whose stages copy, and every memory strategy of any program runs it: what it keeps or
makes again is a stretch. Coefficients, levels and noises are inputs of the graph, so that it serves
all stretches of that form, of this run and of later ones.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gradsampler import _checks
from gradsampler.elementary import Coefficient
from gradsampler.engine.conditioning import Conditioning
from gradsampler.engine.observer import Observer
from gradsampler.engine.program import (
    START,
    Z0,
    Evaluation,
    Injection,
    Instruction,
    Program,
    Slot,
    Stage,
)
from gradsampler.engine.trajectory import Trajectory
from gradsampler.noise.sources import Off
from gradsampler.parameterization import Parameterization, Preconditioning


class Combine(NamedTuple):
    """A stage: places of its terms and noises, each with that of its number."""

    terms: tuple[tuple[int, int], ...]
    noises: tuple[tuple[int, int], ...]


class Call(NamedTuple):
    """A model evaluation: the places of its state and numbers, and which outputs it has."""

    state: int
    c_in: int
    level: int
    branches: tuple[int, ...]


@dataclass(frozen=True)
class Form:
    """What a stretch computes, without its numbers: stretches of one form share a graph.

    Slots are numbered: those that it starts from, then what is written, in order.
    """

    entries: int
    operations: tuple[Combine | Call, ...]
    exits: tuple[int, ...]


class Stretch(NamedTuple):
    """One stretch of a run."""

    form: Form
    numbers: tuple[int, ...]  # positions of its coefficients
    levels: tuple[int, ...]  # positions of what the model is told
    noises: tuple[Injection, ...]
    first: Evaluation  # of the run's, for messages


def carried_out(
    form: Form,
    keeps_shape: bool,
    model: Parameterization,
    entries: Sequence[Tensor],
    numbers: Tensor,  # [C] of the dtype that is computed in
    levels: Tensor,  # [E]
    noises: Sequence[Tensor],
    cond: dict[str, Any],
    dtypes: tuple[torch.dtype, torch.dtype],  # of the state and of the model's input
) -> list[Tensor]:
    """A stretch in plain torch, which a compiler follows."""
    slots, compute = list(entries), numbers.dtype
    for operation in form.operations:
        if isinstance(operation, Combine):
            total: Tensor | None = None
            pairs = [(slots[place], c) for place, c in operation.terms]
            pairs += [(noises[place], c) for place, c in operation.noises]
            for x, c in pairs:
                term = numbers[c] * x.to(compute)
                total = term if total is None else total + term
            assert total is not None
            slots.append(total.to(dtypes[0]))
            continue
        x = slots[operation.state]
        scaled = (numbers[operation.c_in] * x.to(compute)).to(dtypes[1])
        level = levels[operation.level].expand(x.shape[0])
        for output in model.chosen(scaled, level, cond, operation.branches):
            if keeps_shape and output.shape != scaled.shape:
                _checks.shape("denoiser: its output", output, scaled.shape)
            slots.append(output)
    return [slots[place].to(compute) for place in form.exits]


class Stretches(Parameterization):
    """The stretches of a run in the place of a denoiser: one returns what is alive after it.

    Args:
        trajectory: the run.
        stretches: in order.
        compiled: the form that is compiled; others are carried out as they are.
    """

    keeps_shape = False  # a history may grow

    def __init__(
        self, trajectory: Trajectory, stretches: Sequence[Stretch], compiled: Form | None
    ) -> None:
        self.network = trajectory.model  # where modules, generators and buffers are looked for
        self._trajectory, self._stretches, self._compiled = trajectory, stretches, compiled
        self._index = 0

    def modules(self) -> Any:
        yield from self._trajectory.model.modules()

    def at(self, step: int) -> "Stretches":
        bound: Stretches = object.__new__(Stretches)
        vars(bound).update(vars(self))
        bound._index = step
        return bound

    def preconditioning(self, sigma: Coefficient) -> Preconditioning:
        return Preconditioning(0.0, (1.0,), 1.0, 0.0)

    def outputs(self, x: Tensor, noise: Tensor, cond: Mapping[str, Any]) -> tuple[Tensor, ...]:
        stretch, trajectory = self._stretches[self._index], self._trajectory
        compute = torch.promote_types(trajectory.state_dtype, torch.float32)
        told = torch.promote_types(trajectory.model_dtype, torch.float32)
        coefficients = cond["coefficients"]
        noises = [
            trajectory.noise.at(cond["z0"], *trajectory.name(injection))
            for injection in stretch.noises
        ]
        arguments = (
            trajectory.model,
            self._entries(stretch, x, cond["z0"]),
            coefficients[list(stretch.numbers)].to(x.device, compute),
            coefficients[list(stretch.levels)].to(x.device, told),
            noises,
            dict(cond["cond"]),
            (trajectory.state_dtype, trajectory.model_dtype),
        )
        keeps_shape = trajectory.model.keeps_shape
        if stretch.form != self._compiled:
            return (_packed(carried_out(stretch.form, keeps_shape, *arguments)),)
        run = _graph(trajectory.model, stretch.form, keeps_shape)
        try:
            return (_packed(run(*arguments)),)
        except torch._dynamo.exc.TorchDynamoException as error:
            carried_out(stretch.form, keeps_shape, *arguments)  # which may say what is wrong
            raise ValueError(
                "compile must be None for a denoiser that torch.compile does not take as one "
                f"graph, got {str(error).strip().splitlines()[0]}"
            ) from error

    def _entries(self, stretch: Stretch, x: Tensor, z0: Tensor | None) -> list[Tensor]:
        if stretch is self._stretches[0]:
            given = {Z0: x} if self._trajectory.start is None else {Z0: z0, START: x}
            found = [given[slot] for slot in _given(self._trajectory.program)]
            return [y for y in found if y is not None]
        return [x] if stretch.form.entries == 1 else list(x.unbind(1))


def _packed(slots: Sequence[Tensor]) -> Tensor:
    """Slots [B, *state] as one tensor [B, M, *state]; one alone as it is."""
    return slots[0] if len(slots) == 1 else torch.stack(list(slots), 1)


def compiled(trajectory: Trajectory, z0: Tensor, steps: int) -> Trajectory:
    """The run as a program of stretches of ``steps`` steps, the most frequent form compiled.

    Args:
        trajectory: the run.
        z0: [B, *state] of the state's dtype.
        steps: how many steps a graph has, at least 1.
    """
    _checks.integer("compile", steps, 1)
    if trajectory.program.by_sample:
        _checks.fail("compile", "be None with levels of each sample", steps)
    model = trajectory.model
    if _network(model) is None or (model.at(0) is not model and not hasattr(model, "inner")):
        _checks.fail("compile", "be None for a denoiser that changes from step to step", steps)
    derived = trajectory.program.derived
    if ("stretches", steps) not in derived:
        derived["stretches", steps] = _cut(trajectory.program, steps)
    program, stretches, form = derived["stretches", steps]
    # As conditioning, since what a call depends on is differentiated by.
    given = {
        "cond": trajectory.cond.filled(trajectory.cond.tensors),
        "coefficients": trajectory.program.coefficients,
        "z0": z0 if trajectory.program.noises or trajectory.start is not None else None,
    }
    return replace(
        trajectory,
        program=program,
        model=Stretches(trajectory, stretches, form),
        cond=Conditioning(given),
        noise=Off(),
        model_dtype=trajectory.state_dtype,
        observer=Observer(program),
    )


def _cut(program: Program, steps: int) -> tuple[Program, list[Stretch], Form | None]:
    """The program of stretches, these, and the form that is compiled."""
    stretches = _stretches(program, steps)
    whole = Counter(s.form for s in stretches if _calls(s.form) >= steps)
    form = whole.most_common(1)[0][0] if whole else None
    return _outer(program, stretches), stretches, form


def _calls(form: Form) -> int:
    return sum(isinstance(operation, Call) for operation in form.operations)


def _stretches(program: Program, steps: int) -> list[Stretch]:
    """The program cut: what precedes the first evaluation, then runs of steps of one form."""
    positions = [k for k, i in enumerate(program.instructions) if isinstance(i, Evaluation)]
    evaluations = [program.instructions[k] for k in positions]
    starts = [
        k
        for j, k in enumerate(positions)
        if j == 0 or evaluations[j].step != evaluations[j - 1].step  # type: ignore[union-attr]
    ]
    ends = [*starts[1:], len(program.instructions)]
    parts = [(0, starts[0]), *zip(starts, ends, strict=True)]
    alive = _alive(program)
    single = [_stretch(program, alive, *part) for part in parts]
    found, k = [single[0]], 1
    while k < len(parts):
        count = 1
        while count < steps and k + count < len(parts) and single[k + count].form == single[k].form:
            count += 1
        found.append(_stretch(program, alive, parts[k][0], parts[k + count - 1][1]))
        k += count
    return found


def _stretch(program: Program, alive: Sequence[Sequence[Slot]], start: int, stop: int) -> Stretch:
    """The instructions from ``start`` to before ``stop`` as a stretch."""
    entries = alive[start]
    places: dict[Slot, int] = {slot: k for k, slot in enumerate(entries)}
    numbers: list[int] = []
    levels: list[int] = []
    noises: list[Injection] = []
    operations: list[Combine | Call] = []

    def number(position: int) -> int:
        numbers.append(position)
        return len(numbers) - 1

    for instruction in program.instructions[start:stop]:
        if isinstance(instruction, Stage):
            terms = tuple((places[slot], number(c)) for slot, c in instruction.terms)
            first = len(noises)
            noises += instruction.injections
            injected = tuple(
                (first + k, number(i.coefficient)) for k, i in enumerate(instruction.injections)
            )
            operations.append(Combine(terms, injected))
            places[instruction.writes] = len(places)
        elif isinstance(instruction, Evaluation):
            c_in = number(instruction.c_in)
            levels.append(instruction.c_noise)
            branches = tuple(slot.branch for slot in instruction.writes)
            operations.append(Call(places[instruction.state], c_in, len(levels) - 1, branches))
            for slot in instruction.writes:
                places[slot] = len(places)
    if start and {Z0, START} & set(entries):
        _checks.fail("compile", "be None for a program that reads z0 later on", "a number")
    form = Form(len(entries), tuple(operations), tuple(places[slot] for slot in alive[stop]))
    following = (i for i in program.instructions[start:] if isinstance(i, Evaluation))
    first_call = next(following, program.evaluations[-1])
    return Stretch(form, tuple(numbers), tuple(levels), tuple(noises), first_call)


def _given(program: Program) -> list[Slot]:
    """What a run of the program starts from."""
    return [slot for slot in (Z0, START) if slot in program.readers]


def _alive(program: Program) -> list[tuple[Slot, ...]]:
    """The slots that are alive before each instruction and after the last, in the order in which
    they were written.
    """
    present = dict.fromkeys(_given(program))
    found = []
    for instruction, dead in zip(program.instructions, program.dead, strict=True):
        found.append(tuple(present))
        if isinstance(instruction, Stage):
            present[instruction.writes] = None
        elif isinstance(instruction, Evaluation):
            present |= dict.fromkeys(instruction.writes)
        for slot in dead:
            present.pop(slot, None)
    return [*found, tuple(present)]


def _outer(program: Program, stretches: Sequence[Stretch]) -> Program:
    """The program whose evaluations are the stretches."""
    instructions: list[Instruction] = []
    numbers: list[float] = [1.0, 0.0]
    before = START if START in program.readers else Z0
    for k, stretch in enumerate(stretches):
        state, output = Slot("x", k), Slot("d", k)
        numbers.append(program.floats[stretch.first.sigma])
        place = len(numbers) - 1
        instructions.append(Stage(state, ((before, 0),)))
        denoised = ((output, 0),)
        instructions.append(Evaluation(state, (output,), 0, 1, place, denoised, k))
        before = output
    output = Slot("x", len(stretches))
    instructions.append(Stage(output, ((before, 0),)))
    coefficients = torch.tensor(numbers, dtype=torch.float64)
    return Program(tuple(instructions), coefficients, len(stretches), output)


def _network(model: Any) -> Any:
    """The network behind the parameterization, which graphs are kept by."""
    while hasattr(model, "inner"):
        model = model.inner
    network = getattr(model, "network", None)
    return network.__self__ if isinstance(network, MethodType) else network


_GRAPHS: "weakref.WeakKeyDictionary[Any, dict[Any, Callable[..., Any]]]" = (
    weakref.WeakKeyDictionary()
)


def _graph(model: Parameterization, form: Form, keeps_shape: bool) -> Callable[..., Any]:
    """The compiled form, kept as long as the network is."""
    network = _network(model)
    known = _GRAPHS.setdefault(network, {}) if _kept(network) else {}
    if form not in known:
        # A function of its own, since torch counts the graphs of one.
        own = FunctionType(carried_out.__code__.replace(), carried_out.__globals__, "carried_out")
        run = torch.compile(partial(own, form, keeps_shape), fullgraph=True, dynamic=False)
        known[form] = run
    return known[form]


def _kept(network: Any) -> bool:
    return isinstance(network, (nn.Module, FunctionType)) or hasattr(network, "__weakref__")
