# SPDX-License-Identifier: Apache-2.0
"""The table of coefficients of a scheduler, read off its own ``step``.

A scheduler that is affine maps unit vectors to the columns of its matrix. So its steps are made
once more on vectors in place of images: each state, each output of a model and each draw is a unit
vector of its own, and what a step returns is a row of the table.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gradsampler.integrations.diffusers import parts
from gradsampler.integrations.diffusers.glue import Glue
from gradsampler.integrations.diffusers.levels import differentiable
from gradsampler.integrations.diffusers.marking import Marked, Marker, Returned, Unit
from gradsampler.integrations.diffusers.rehearsal import (
    Draw,
    Refused,
    Rehearsal,
    tensors,
    without_generator,
)
from gradsampler.noise.sources import Injected

__all__ = ["Row", "Table", "read"]

Row = dict[Unit, Tensor]  # 0-d float64 coefficients; they may carry a gradient to the levels

_LIMIT = 1e-5  # of the sum of a row's terms; the tables are float32 upstream
_SCALES = (0.0, 1e-2, 1.0, 1e3)  # of the channels of the probe
_DRAWS = 4  # that a step makes at most


@dataclass(frozen=True)
class Table:
    """A whole run: what the turns read, and how the states follow."""

    states: list[set[str]]  # by turn, the local variables that hold its state
    outputs: list[list[str]]  # by turn, the parameters of its last step that models give
    rows: list[Row]  # of the states after the first; the last one is the run's result
    draws: dict[Injected, Draw]  # by turn and number, all that are made, in order
    results: set[str]  # the local variables that hold the result


def read(rehearsal: Rehearsal, scheduler: Any, glue: Glue, results: set[str] | None) -> Table:
    """Reads the table off.

    Args:
        rehearsal: the dry run.
        scheduler: as it was before the first turn.
        glue: sees the draws.
        results: the names that what follows the loop reads; None asks for the last state.

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
    if hasattr(scheduler, "noise_sampler"):
        raise Refused(f"{type(scheduler).__name__} draws its noise from a Brownian tree")
    marker = Marker(rehearsal)
    turns = [marker.marked(i, turn) for i, turn in enumerate(rehearsal.turns)]
    result, names = marker.result(results)
    steps = [step for turn in turns for step in turn]
    replay = _Replay(steps, [*marker.sources, result], scheduler, glue)
    rows = replay.rows()
    replay.probe(rows)
    draws = {
        (i, k): draw for i, turn in enumerate(turns) for k, draw in enumerate(turn[-1].call.draws)
    }
    return Table(marker.names, [turn[-1].outputs for turn in turns], rows, draws, names)


class _Replay:
    """Makes the steps of a dry run once more, on other tensors.

    Args:
        steps: in order.
        wanted: what is asked for.
        scheduler: as it was before the first step.
        glue: sees the draws.
    """

    def __init__(
        self, steps: Sequence[Marked], wanted: Sequence[Returned], scheduler: Any, glue: Glue
    ) -> None:
        self._steps, self._wanted, self._glue = steps, wanted, glue
        self._scheduler = parts.plain(scheduler)
        self._batch, *inner = steps[-1].call.arguments["sample"].shape
        self._inner = len(inner)
        self._index: dict[Unit, int] = {}

    def rows(self) -> list[Row]:
        """What is wanted as combinations of the unit vectors."""
        levels = getattr(self._scheduler, "sigmas", None)
        learned = isinstance(levels, Tensor) and levels.requires_grad
        with torch.no_grad():
            places = _read_places(torch.stack(self._vectors()), self._index, every=learned)

        def coefficients(levels: Tensor | None) -> Tensor:
            vectors = self._vectors(levels)
            return torch.stack([vectors[i][self._index[tag]] for i, tag in places])

        if levels is None or not learned:
            with torch.no_grad():
                values = coefficients(None)
        else:
            reach = max(i - tag.turn for i, tag in places)
            values = differentiable(coefficients, levels, [i for i, _ in places], reach)
        rows: list[Row] = [{} for _ in self._wanted]
        for (i, tag), value in zip(places, values, strict=True):
            rows[i][tag] = value
        return rows

    def _vectors(self, levels: Tensor | None = None) -> list[Tensor]:
        """What is wanted, dense; with other levels than the scheduler's."""
        given = {tag for step in self._steps for tag in step.tags.values()}
        size = len(given) + _DRAWS * len(self._steps)

        def unit(tag: Unit) -> Tensor:
            x = torch.zeros(size, dtype=torch.float64)
            x[self._index.setdefault(tag, len(self._index))] = 1
            return x.view(1, size, *[1] * (self._inner - 1)).repeat(self._batch, *[1] * self._inner)

        vectors = [x.flatten(1).to(torch.float64) for x in self._run(unit, levels)]
        if any(bool((x != x[:1]).any()) for x in vectors):
            raise Refused("its scheduler steps the samples of a batch differently")
        return [x[0] for x in vectors]

    def probe(self, rows: Sequence[Row]) -> None:
        """Compares the rows with the steps on random numbers, some of them large."""
        generator = torch.Generator().manual_seed(1)
        scale = torch.tensor(_SCALES, dtype=torch.float64).view(1, -1, *[1] * (self._inner - 1))
        shape = (self._batch, len(_SCALES), *[4] * (self._inner - 1))
        known: dict[Unit, Tensor] = {}

        def random(tag: Unit) -> Tensor:
            if tag not in known:
                noise = torch.randn(shape, generator=generator, dtype=torch.float64)
                known[tag] = scale * noise
            return known[tag]

        with torch.no_grad():
            for i, (x, row) in enumerate(zip(self._run(random), rows, strict=True)):
                terms = torch.stack([c * known[tag] for tag, c in row.items()])
                error = (x - terms.sum(0)).abs()
                if not bool((error <= _LIMIT * (terms.abs().sum(0) + scale)).all()):
                    raise Refused(_not_affine(self._scheduler, i))

    def _run(self, given: Callable[[Unit], Tensor], levels: Tensor | None = None) -> list[Tensor]:
        scheduler = parts.copied(self._scheduler)
        if levels is not None:
            scheduler.sigmas = levels
        returned: dict[Returned, Tensor] = {}
        for step in self._steps:
            drawn = 0

            def draw(shape: tuple[int, ...], _: dict[str, Any], i: int = step.turn) -> Tensor:
                nonlocal drawn
                x = given(Unit("n", i, drawn))
                if shape != tuple(x.shape):
                    raise Refused(f"at turn {i} its scheduler draws noise of another shape")
                drawn += 1
                return x

            # The pipeline may have set a number of the scheduler between two steps.
            vars(scheduler).update(step.call.attributes)
            arguments = without_generator({**step.call.arguments, "return_dict": False})
            for name, tag in step.tags.items():
                arguments[name] = returned[tag] if isinstance(tag, Returned) else given(tag)
            with self._glue, self._glue.drawing(draw), self._glue.wide():
                result = scheduler.step(**arguments)
            for position, x in enumerate(tensors(result)):
                returned[Returned(step.turn, step.number, position)] = x
        return [returned[tag] for tag in self._wanted]


def _read_places(values: Tensor, index: dict[Unit, int], *, every: bool) -> list[tuple[int, Unit]]:
    """The rows and units whose coefficient counts.

    With ``every`` one that is 0 counts where other rows, as far back in time, have one that is not:
    its derivative may not be 0.
    """
    if not bool(torch.isfinite(values).all()):
        turn = int((~torch.isfinite(values)).any(1).nonzero()[0])
        raise Refused(f"the scheduler's numbers at turn {turn} are not finite")
    places = []
    lags = set()
    for tag, number in index.items():
        for i in values[:, number].nonzero().flatten().tolist():
            if tag.kind == "?":
                raise Refused("the scheduler keeps what an earlier step of the turn was given")
            places.append((i, tag))
            lags.add((tag.kind, i - tag.turn, tag.number))
    if not every:
        return sorted(places, key=lambda place: place[0])
    return [
        (i, tag)
        for i in range(len(values))
        for tag in index
        if (tag.kind, i - tag.turn, tag.number) in lags
    ]


def _not_affine(scheduler: Any, turn: int) -> str:
    """Why, as far as the configuration tells."""
    config, name = scheduler.config, type(scheduler).__name__
    for flag, what in (
        ("thresholding", "thresholds the predicted sample"),
        ("clip_sample", "clamps the predicted sample"),
        ("clip_denoised", "clamps the predicted sample"),
    ):
        if config.get(flag):
            return (
                f"{name} has {flag}=True, which {what}; "
                f"{name}.from_config(pipe.scheduler.config, {flag}=False) does not"
            )
    if str(config.get("variance_type", "")).startswith("learned"):
        return f"{name} has a learned variance, which is not affine in the model's output"
    return f"the step of {name} is not affine at turn {turn}"
