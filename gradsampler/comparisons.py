# SPDX-License-Identifier: Apache-2.0
"""Autograd's derivatives of a run, of its model calls and of its noises, beside differences."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gradsampler import _checks
from gradsampler.differences import Comparison, Ladder, Point
from gradsampler.engine import graph
from gradsampler.engine.circumstances import Circumstances
from gradsampler.engine.program import Evaluation
from gradsampler.engine.trajectory import Trajectory
from gradsampler.memory.base import Memory
from gradsampler.noise.sources import name_of

__all__ = ["Difference", "Witness", "of_call", "of_noises", "of_run"]

_ATTEMPTS = 3  # directions before a backward is called wrong; it has to be off along most


@dataclass(frozen=True)
class Difference:
    """What central differences say of one derivative.

    ``of`` is "z0", "x" (the state that a model call sees), "noise", "cond" or "parameters";
    ``step`` and ``sigma`` are those of the model call or injection, None for the whole run.
    """

    of: str
    step: int | None
    sigma: float | None
    comparison: Comparison
    wrong: bool


class Call(NamedTuple):
    """A model call as a run made it."""

    evaluation: Evaluation
    x: Tensor  # [B, *state] the model's input
    level: Tensor  # [B]


class Witness(Memory):
    """Runs without gradient, and keeps what each model call saw."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def run(self, trajectory: Trajectory, z0: Tensor) -> Tensor:
        self.trajectory, self.z0 = trajectory, z0
        self._circumstances = Circumstances(z0.device, trajectory.seen)

        def evaluate(evaluation: Evaluation, x: Tensor, scaled: Tensor | None) -> Sequence[Tensor]:
            seen, level = trajectory.model_input(evaluation, x, scaled)
            self.calls.append(Call(evaluation, seen, level))
            cond = trajectory.cond.filled(trajectory.cond.tensors)
            return self._circumstances.captured(
                evaluation, lambda: trajectory.call(evaluation, seen, level, cond)
            )

        with torch.no_grad():
            x = trajectory.forward(z0, evaluate)
        self._circumstances.finish()
        return x

    def again(self, call: Call, x: Tensor, cond: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Makes a call again, with another input and other conditioning."""
        trajectory = self.trajectory
        return self._circumstances.again(
            call.evaluation,
            lambda: trajectory.call(call.evaluation, x, call.level, trajectory.cond.filled(cond)),
        )

    def sigma(self, evaluation: Evaluation) -> float:
        """The noise level of a call, of the noisiest sample."""
        return float(self.trajectory.program.coefficients[evaluation.sigma].max())


def of_call(
    witness: Witness, call: Call, wanted: Sequence[str], generator: torch.Generator
) -> tuple[list[Difference], list[Tensor]]:
    """The derivatives of one model call by its input, and by what else is wanted.

    Returns:
        The differences, and the leaves that require grad on which the call depends.
    """
    trajectory, evaluation = witness.trajectory, call.evaluation
    given = trajectory.cond.tensors
    x = graph.input_of(call.x)
    cond = [graph.input_of(c, differentiated=c.is_floating_point()) for c in given]

    with torch.enable_grad():
        since = graph.mark()
        outputs = witness.again(call, x, cond)
    own = {id(graph.leaf_of(y)) for y in (x, *cond)}
    leaves = [y for key, y in graph.reached(outputs, since).leaves.items() if key not in own]

    def at(of: str, values: Sequence[Tensor]) -> Point:
        with torch.no_grad():
            if of == "x":
                return Point(witness.again(call, values[0], given), values)
            if of == "cond":
                return Point(witness.again(call, call.x, filled(given, values)), values)
            with replaced(leaves, values):
                return Point(witness.again(call, call.x, given), values)

    inputs = {"x": [x], "cond": [c for c in cond if c.requires_grad], "parameters": leaves}
    rounded = _precision([x, *outputs, *leaves])
    differences = []
    for of in ("x", *wanted):
        if not inputs[of]:
            continue

        def attempt(of: str = of) -> list[Comparison]:
            line = Line(inputs[of], generator)
            ladder = Ladder(lambda h: at(of, line.at(h)), rounded)
            sizes = [y.numel() for y in outputs]
            aligned = ladder.direction / ladder.direction.norm().clamp_min(1e-300)
            crossed = _randn(aligned, generator)
            cotangents, pulled = [], []
            for w in (aligned, crossed / crossed.norm()):
                parts = [
                    part.view(y.shape).to(y.dtype)
                    for part, y in zip(w.split(sizes), outputs, strict=True)
                ]
                cotangents.append(torch.cat([part.double().flatten() for part in parts]))
                pulled.append(_pulled(outputs, inputs[of], parts))
            return ladder.compare(cotangents, pulled)

        comparison, wrong = _judged(attempt)
        found = Difference(of, evaluation.step, witness.sigma(evaluation), comparison, wrong)
        differences.append(found)
    return differences, leaves


def of_noises(witness: Witness, generator: torch.Generator) -> list[Difference]:
    """The transposes of a noise source of the user's own, at each injection."""
    trajectory, z0 = witness.trajectory, witness.z0.detach()
    program, source = trajectory.program, trajectory.noise
    differences = []
    for injection in dict.fromkeys(injection.noise for injection in program.injections):
        name = name_of(injection[0], program.num_steps, injection[1])
        if not source.of_z0 or source.draw(z0, *name) is not None:
            continue

        def attempt(name: tuple[int, ...] = name) -> list[Comparison]:
            line = Line([z0], generator)

            def at(h: float) -> Point:
                with torch.no_grad():
                    values = line.at(h)
                    return Point([source.at(values[0], *name)], values)

            ladder = Ladder(at, _precision([z0]))
            aligned = ladder.direction / ladder.direction.norm().clamp_min(1e-300)
            crossed = _randn(aligned, generator)
            cotangents = [aligned, crossed / crossed.norm()]
            pulled = [
                [source.transpose(w.view(z0.shape).to(z0.dtype), z0, *name).z0] for w in cotangents
            ]
            return ladder.compare(cotangents, pulled)

        comparison, wrong = _judged(attempt)
        differences.append(Difference("noise", injection[0], None, comparison, wrong))
    return differences


def of_run(
    run: Callable[[dict[str, Sequence[Tensor]]], Tensor],
    inputs: dict[str, Sequence[Tensor]],
    cotangent: Tensor,
    gradients: dict[str, Sequence[Tensor | None]],
    precision: float,
    generator: torch.Generator,
) -> list[Difference]:
    """The derivatives of a loss by the inputs of a run.

    Args:
        run: from the inputs that differ from the given ones to the sample.
        inputs: "z0", and on request "cond" and "parameters".
        cotangent: the gradient of the loss to the sample.
        gradients: of the loss to the inputs, by autograd.
        precision: to how much of itself a prediction is rounded.
        generator: of the directions.
    """
    w = cotangent.double().flatten()
    differences = []
    for of, tensors in inputs.items():
        if not tensors:
            continue

        def attempt(of: str = of, tensors: Sequence[Tensor] = tensors) -> list[Comparison]:
            line = Line(tensors, generator)

            def at(h: float) -> Point:
                values = line.at(h)
                with torch.no_grad():
                    return Point([run({of: values})], values)

            return Ladder(at, precision).compare([w], [gradients[of]])

        comparison, wrong = _judged(attempt)
        differences.append(Difference(of, None, None, comparison, wrong))
    return differences


class Line:
    """Points x + h v on a line through tensors, v a random direction as large as they are."""

    def __init__(self, tensors: Sequence[Tensor], generator: torch.Generator) -> None:
        self._start = [x.detach() for x in tensors]
        sizes = [float(x.double().square().mean().sqrt()) for x in self._start]
        # A weight that was set to zero still has to move.
        least = 1e-2 * max(sizes, default=0.0) or 1.0
        self._direction = [
            max(size, least) * _randn(x, generator)
            for size, x in zip(sizes, self._start, strict=True)
        ]

    def at(self, h: float) -> list[Tensor]:
        """The tensors moved by h v, in their dtypes."""
        pairs = zip(self._start, self._direction, strict=True)
        return [(x.double() + h * v).to(x.dtype) for x, v in pairs]


@contextmanager
def replaced(leaves: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Lends leaves other values, for the time of a with statement; graphs of them stay valid."""
    before = [x.data for x in leaves]
    try:
        for x, value in zip(leaves, values, strict=True):
            x.data = value
        yield
    finally:
        for x, value in zip(leaves, before, strict=True):
            x.data = value


def _judged(attempt: Callable[[], list[Comparison]]) -> tuple[Comparison, bool]:
    """What to tell of comparisons along one direction, and whether they show a wrong derivative.

    Where one is off, but not by far, it has to be so along most of several directions.
    """
    first = attempt()
    k = max(range(len(first)), key=lambda i: first[i].error / first[i].tolerance)
    if first[k].agrees:
        return first[0], False
    if first[k].error > 10 * first[k].tolerance:
        return first[k], True
    further = [attempt()[k] for _ in range(_ATTEMPTS - 1)]
    off = sum(not comparison.agrees for comparison in (first[k], *further))
    return first[k], 2 * off > _ATTEMPTS


def _pulled(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    pairs = [(y, w) for y, w in zip(outputs, cotangents, strict=True) if y.requires_grad]
    if not pairs:
        return [None] * len(inputs)
    ys, ws = zip(*pairs, strict=True)
    return torch.autograd.grad(ys, inputs, ws, retain_graph=True, allow_unused=True)


def filled(given: Sequence[Tensor], floating: Sequence[Tensor]) -> list[Tensor]:
    """The given tensors, with other values for the floating ones."""
    values = iter(floating)
    return [next(values) if c.is_floating_point() else c for c in given]


def _randn(x: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device)


def _precision(tensors: Sequence[Tensor]) -> float:
    """The coarsest rounding among the dtypes in play."""
    dtypes = {x.dtype for x in tensors if x.dtype in _checks.FLOATING}
    kinds = {x.device.type for x in tensors}
    dtypes |= {torch.get_autocast_dtype(k) for k in kinds if torch.is_autocast_enabled(k)}
    return max(torch.finfo(dtype).eps for dtype in dtypes)
