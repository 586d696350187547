# SPDX-License-Identifier: Apache-2.0
"""The table of coefficients of a scheduler, read off its own ``step``.

A scheduler that is affine maps unit vectors to the columns of its matrix. So its steps are made once
more on vectors in place of images: state i is the unit vector e_(x, i), model output b of turn i is
e_(d, i, b), and draw k of turn i is e_(n, i, k). What a step returns is a row of the table.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradsampler.integrations.diffusers import parts
from gradsampler.integrations.diffusers.glue import Glue
from gradsampler.integrations.diffusers.rehearsal import (
    Draw,
    Refused,
    Rehearsal,
    Returned,
    StepCall,
    Turn,
    same,
)

__all__ = ["Row", "Table", "Vector", "read"]

Vector = tuple[str, int, int]  # kind "x" | "d" | "n" | "?", turn, number within the turn
Tag = Vector | Returned

_LIMIT = 1e-5  # of the sum of a row's terms; tables are float32 upstream
_SCALES = (0.0, 1e-2, 1.0, 1e3)  # of the samples of the probe


@dataclass(frozen=True)
class Row:
    """A tensor as a combination of states, outputs and draws."""

    coefficients: dict[Vector, Tensor]  # 0-d float64; may carry a gradient to the levels


@dataclass(frozen=True)
class Table:
    """A whole run: what the turns read, and how states follow."""

    states: list[set[str]]  # by turn, the local variables that hold its state
    outputs: list[list[str]]  # by turn, the parameters of its last step that come from the models
    rows: list[Row]  # of state i + 1; the last is the run's result
    draws: dict[tuple[int, int], list[Draw]]  # by turn and number, all that are made, in order
    results: set[str]  # the local variables that hold the result


@dataclass(frozen=True)
class _Marked:
    """A step call whose tensors are named."""

    call: StepCall
    tags: dict[str, Tag]  # by parameter
    position: tuple[int, int]  # turn, number within it


def read(rehearsal: Rehearsal, scheduler: Any, glue: Glue, results: set[str] | None) -> Table:
    """Reads the table off.

    Args:
        rehearsal: the dry run.
        scheduler: as it was before the first turn.
        glue: sees the draws.
        results: the names that what follows the loop reads; None asks for what the last step
            returns first.

    Raises:
        Refused: where the run is not affine, saying why.
    """
    try:
        return _read(rehearsal, scheduler, glue, results)
    except Refused:
        raise
    except Exception as error:
        raise Refused(
            f"{type(scheduler).__name__} cannot step on vectors: {type(error).__name__}: {error}"
        ) from error


def _read(rehearsal: Rehearsal, scheduler: Any, glue: Glue, results: set[str] | None) -> Table:
    marker = _Marker(rehearsal)
    marked = [marker.marked(i, turn) for i, turn in enumerate(rehearsal.turns)]
    final, result_names = marker.result(results)
    sources = [*marker.states[1:], final]
    steps = [each for calls in marked for each in calls]
    replayed = _Replay(steps, scheduler, glue, rehearsal)
    vectors = replayed.basis(sources)
    rows = _rows(vectors, replayed.index)
    replayed.probe(sources, rows)
    draws = {
        (i, k): group
        for i, calls in enumerate(marked)
        for k, group in enumerate(_groups(calls[-1], replayed.drawn[i]))
    }
    outputs = [_parameters(calls[-1]) for calls in marked]
    return Table(marker.names, outputs, rows, draws, result_names)


def _parameters(last: _Marked) -> list[str]:
    """The parameters of a step that take the outputs, in their order."""
    first: dict[Tag, str] = {}
    for name, tag in last.tags.items():
        if tag[0] == "d":
            first.setdefault(tag, name)
    return [first[tag] for tag in sorted(first, key=lambda tag: tag[2])]


class _Marker:
    """Names the tensors of a dry run."""

    def __init__(self, rehearsal: Rehearsal) -> None:
        self._rehearsal = rehearsal
        self._known: list[tuple[Tag, Tensor]] = []
        self.states: list[Returned | None] = []  # by turn, what its state is; None is the start
        self.names: list[set[str]] = []
        self.outputs: list[list[Tensor]] = []

    def marked(self, i: int, turn: Turn) -> list[_Marked]:
        if not turn.calls:
            raise Refused(f"turn {i} does not step the scheduler")
        *others, last = turn.calls
        state = last.arguments.get("sample")
        if not isinstance(state, Tensor):
            raise Refused("its scheduler takes no argument `sample`")
        names = {name for name, x in turn.names.items() if same(x, state)}
        source = next((tag for tag, x in self._known if same(state, x)), None)
        if i == 0:
            source = None
        if not names or (i > 0 and not isinstance(source, Returned)):
            raise Refused(
                f"before turn {i} the pipeline changes the state that the scheduler returned"
            )
        self.states.append(source)  # type: ignore[arg-type]
        self.names.append(names)
        self.outputs.append([])
        # Only what came from the turn before can be read, so no more has to be remembered.
        known = [(tag, x) for tag, x in self._known if tag[0] == i - 1]
        self._known = []
        marked = []
        for k, call in enumerate((*others, last)):
            tags = {
                name: self._tag(i, x, state, known, stray=call is not last)
                for name, x in call.arguments.items()
                if isinstance(x, Tensor) and x.dtype.is_floating_point and x.ndim > 1
            }
            marked.append(_Marked(call, tags, (i, k)))
            self._known += [(Returned(i, k, p), x) for p, x in enumerate(call.returned)]
        return marked

    def _tag(
        self, i: int, x: Tensor, state: Tensor, known: list[tuple[Tag, Tensor]], *, stray: bool
    ) -> Tag:
        if same(x, state):
            return ("x", i, 0)
        for tag, y in (*self._known, *known):
            if same(x, y):
                return tag
        if stray:
            return ("?", i, id(x))
        if x.shape != state.shape:
            raise Refused(
                f"its scheduler steps with a tensor of shape {list(x.shape)} beside a state of "
                f"shape {list(state.shape)}"
            )
        outputs = self.outputs[i]
        for b, y in enumerate(outputs):
            if same(x, y):
                return ("d", i, b)
        outputs.append(x)
        return ("d", i, len(outputs) - 1)

    def result(self, names: set[str] | None) -> tuple[Returned, set[str]]:
        """What the run ends with, and the names that it is bound to."""
        last = [(tag, x) for tag, x in self._known if isinstance(tag, Returned)]
        call = max(tag.call for tag, _ in last)
        last = [(tag, x) for tag, x in last if tag.call == call]
        if names is None:
            return last[0][0], set()
        bound = {
            name: tag
            for name in names
            for tag, x in last
            if same(self._rehearsal.names.get(name), x)
        }
        if not bound:
            raise Refused("after its loop the pipeline reads no tensor that the scheduler returned")
        others = {
            name
            for name in names - bound.keys()
            if isinstance(x := self._rehearsal.names.get(name), Tensor)
            and x is not self._rehearsal.turns[0].names.get(name)
        }
        if others:
            raise Refused(f"after its loop the pipeline reads {', '.join(sorted(others))}")
        tags = set(bound.values())
        values = [dict(last)[tag] for tag in tags]
        if any(not same(values[0], x) for x in values):
            raise Refused(f"after its loop the pipeline reads {' and '.join(sorted(bound))}")
        return tags.pop(), set(bound)


class _Replay:
    """Makes the steps of a dry run once more, on other tensors."""

    def __init__(
        self, steps: list[_Marked], scheduler: Any, glue: Glue, rehearsal: Rehearsal
    ) -> None:
        self._steps, self._scheduler, self._glue = steps, scheduler, glue
        self._ndim = rehearsal.turns[0].calls[-1].arguments["sample"].ndim
        self.index: dict[Vector, int] = {}
        self.drawn: dict[int, int] = {}  # by turn, how many draws its last step makes

    def basis(self, sources: list[Any]) -> list[Tensor]:
        """The rows of ``sources`` as dense vectors."""
        outputs = sum(1 for step in self._steps for tag in step.tags.values() if tag[0] == "d")
        size = 3 * len(self._steps) + outputs + 8 * len({s.position[0] for s in self._steps})
        shape = (1, size, *[1] * (self._ndim - 2))

        def unit(vector: Vector) -> Tensor:
            number = self.index.setdefault(vector, len(self.index))
            if number >= size:
                raise Refused("its scheduler draws too often")
            x = torch.zeros(size, dtype=torch.float64)
            x[number] = 1
            return x.view(shape)

        learned = any(isinstance(x, Tensor) and x.requires_grad for x in vars(self._scheduler).values())
        with torch.set_grad_enabled(learned):
            returned = self._run(unit)
            return [returned[source].reshape(-1).to(torch.float64) for source in sources]

    def probe(self, sources: list[Any], rows: list[Row]) -> None:
        """Compares the table with the steps on random numbers, some of them large."""
        generator = torch.Generator().manual_seed(1)
        shape = (len(_SCALES), *[4] * (self._ndim - 1))
        scale = torch.tensor(_SCALES, dtype=torch.float64).view(-1, *[1] * (self._ndim - 1))
        known: dict[Vector, Tensor] = {}

        def random(vector: Vector) -> Tensor:
            if vector not in known:
                noise = torch.randn(shape, generator=generator, dtype=torch.float64)
                known[vector] = scale * noise
            return known[vector]

        with torch.no_grad():
            returned = self._run(random)
            for i, (source, row) in enumerate(zip(sources, rows, strict=True)):
                terms = [c * known[vector] for vector, c in row.coefficients.items()]
                total = torch.stack(terms).sum(0)
                size = torch.stack(terms).abs().sum(0) + scale
                wrong = (returned[source] - total).abs() > _LIMIT * size
                if bool(wrong.any()) or not bool(torch.isfinite(returned[source]).all()):
                    raise Refused(_not_affine(self._scheduler, i))

    def _run(self, given: Callable[[Vector], Tensor]) -> dict[Returned, Tensor]:
        scheduler = parts.plain(self._scheduler)
        returned: dict[Returned, Tensor] = {}
        for step in self._steps:
            (i, k), number = step.position, 0

            def draw(shape: tuple[int, ...], kwargs: dict[str, Any], i: int = i) -> Tensor:
                nonlocal number
                x = given(("n", i, number))
                if shape != tuple(x.shape):
                    raise Refused(f"its scheduler draws noise of another shape at turn {i}")
                number += 1
                return x

            def tensor(tag: Tag) -> Tensor:
                return returned[tag] if isinstance(tag, Returned) else given(tag)

            for name, value in step.call.attributes.items():
                setattr(scheduler, name, value)
            arguments = {**step.call.arguments, "return_dict": False}
            if "generator" in arguments:
                arguments["generator"] = None
            arguments |= {name: tensor(tag) for name, tag in step.tags.items()}
            with self._glue, self._glue.drawing(draw):
                result = scheduler.step(**arguments)
            self.drawn[i] = number
            for p, x in enumerate(y for y in result if isinstance(y, Tensor)):
                returned[Returned(i, k, p)] = x
        return returned


def _rows(vectors: list[Tensor], index: Mapping[Vector, int]) -> list[Row]:
    """The rows without the vectors that no row of their distance in time reads."""
    values = torch.stack([v.detach() for v in vectors])
    if not bool(torch.isfinite(values).all()):
        i = int((~torch.isfinite(values)).any(1).nonzero()[0])
        raise Refused(f"the scheduler's numbers at turn {i} are not finite")
    read: set[tuple[str, int, int]] = set()
    for i, row in enumerate(values):
        for (kind, turn, k), number in index.items():
            if row[number] != 0:
                if kind == "?":
                    raise Refused("the scheduler keeps what an earlier step of the turn was given")
                read.add((kind, i - turn, k))
    rows = []
    for i, vector in enumerate(vectors):
        kept = {
            v: vector[number]
            for v, number in index.items()
            if (v[0], i - v[1], v[2]) in read and (vector.requires_grad or values[i, number] != 0)
        }
        rows.append(Row(kept))
    return rows


def _groups(last: _Marked, count: int) -> list[list[Draw]]:
    """The draws of a step, put together to ``count`` noises: a list of generators draws by sample."""
    raw = last.call.draws
    if not count:
        return []
    if len(raw) % count:
        raise Refused("its scheduler draws another number of times with the generator that it has")
    each = len(raw) // count
    return [raw[k * each : (k + 1) * each] for k in range(count)]


def _not_affine(scheduler: Any, turn: int) -> str:
    config = scheduler.config
    name = type(scheduler).__name__
    for flag, what in (
        ("thresholding", "thresholds the predicted sample"),
        ("clip_sample", "clamps the predicted sample"),
    ):
        if config.get(flag):
            return (
                f"{name} has {flag}=True, which {what}; "
                f"{name}.from_config(pipe.scheduler.config, {flag}=False) does not"
            )
    if str(config.get("variance_type", "")).startswith("learned"):
        return f"{name} has a learned variance, which is not affine"
    return f"the step of {name} is not affine at turn {turn}"

