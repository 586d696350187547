# SPDX-License-Identifier: Apache-2.0
"""A pipeline's run as a program: its scheduler's table, with the rest of a turn as the denoiser."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from gradsampler import arguments
from gradsampler.elementary import Coefficient
from gradsampler.engine.observer import Observer
from gradsampler.engine.program import Affine, Program, Recorder, Slot
from gradsampler.integrations.diffusers import parts
from gradsampler.integrations.diffusers.draws import Drawn
from gradsampler.integrations.diffusers.loop import Loop, Names
from gradsampler.integrations.diffusers.rehearsal import Rehearsal, bound
from gradsampler.integrations.diffusers.session import Session, lifted
from gradsampler.integrations.diffusers.table import Row, Table
from gradsampler.memory import Memory, resolve
from gradsampler.noise.sources import NoiseSource, Off
from gradsampler.parameterization import Parameterization, Preconditioning

__all__ = ["Denoiser", "recorded", "run"]


class _Stop(BaseException):
    """Leaves a turn where its last step begins, with what that step would get."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments


class Denoiser(Parameterization):
    """What a pipeline computes between two steps of its scheduler, as a function of the state.

    The level that it is asked for is the number of the turn.
    """

    def __init__(self, session: Session, loop: Loop, rehearsal: Rehearsal, table: Table) -> None:
        self._session, self._loop = session, loop
        self._rehearsal, self._table = rehearsal, table
        self._turn = 0
        self.network = self.called

    def at(self, step: int) -> "Denoiser":
        bound = copy.copy(self)
        bound._turn = step
        return bound

    def preconditioning(self, sigma: Coefficient) -> Preconditioning:
        count = len(self._table.outputs[int(sigma)])
        return Preconditioning(0.0, (1.0,) * count, 1.0, sigma)

    def outputs(self, x: Tensor, noise: Tensor, cond: Mapping[str, Any]) -> tuple[Tensor, ...]:
        return self.evaluate(x, self._turn, **cond)

    def modules(self) -> Iterator[nn.Module]:
        yield from self._session.modules

    def called(self, *args: Any, **kwargs: Any) -> Tensor:
        """The first output alone."""
        return self.evaluate(*args, **kwargs)[0]

    def evaluate(
        self, x: Tensor, i: int, names: Mapping[str, Any], attributes: Mapping[str, Any]
    ) -> tuple[Tensor, ...]:
        """What the last step of turn ``i`` takes from the models.

        Args:
            x: [B, *state] the state before the turn.
            i: number of the turn.
            names: local variables of the pipeline in the place of its own.
            attributes: attributes of the pipeline in the place of its own.
        """
        session, turn = self._session, self._rehearsal.turns[i]
        before = {**turn.names, **{name: lifted(x) for name, x in names.items()}}
        before |= {name: x.to(turn.names[name].dtype) for name in self._table.states[i]}
        parts.restored(session.scheduler, turn.scheduler)
        session.put(attributes)
        count = 0

        def step(own: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == len(turn.calls):
                raise _Stop(bound(own, args, kwargs))
            return own(*args, **kwargs)

        session.step, session.live = step, False
        try:
            with session.glue:
                self._loop.turn(before, turn.item)
        except _Stop as stop:
            outputs = tuple(stop.arguments[name] for name in self._table.outputs[i])
        finally:
            session.step, session.live = None, True
        session.advance(i)
        return outputs


def recorded(table: Table, model: Parameterization, scale: float) -> Program:
    """The program of a table, from ``scale`` times z0."""
    run = Recorder(model, len(table.rows))
    x = scale * run.z0()
    for run.step, row in enumerate(table.rows):
        run.denoise(x, float(run.step))
        x = _affine(row)
    return run.finish(x)


def _affine(row: Row) -> Affine:
    items = row.items()
    return Affine(
        {Slot(*tag): c for tag, c in items if tag.kind != "n"},
        {(tag.turn, tag.number): c for tag, c in items if tag.kind == "n"},
    )


def run(
    session: Session,
    loop: Loop,
    rehearsal: Rehearsal,
    table: Table,
    *,
    memory: str | Memory,
    noise: NoiseSource | None,
) -> tuple[Names, Tensor]:
    """Runs the program; the local variables that the loop ends with, and the state [B, *state].

    Args:
        session, loop, rehearsal, table: the call.
        memory: any strategy.
        noise: takes the place of the pipeline's draws; None keeps them.
    """
    strategy = resolve(memory)
    model = Denoiser(session, loop, rehearsal, table)
    z0, scale = session.z0(rehearsal.start), session.scale(rehearsal.start)
    program = recorded(table, model, scale)
    if noise is None:
        noise = Drawn(table.draws, z0.device) if program.injections else Off()
    trajectory = arguments.trajectory(
        program, model, z0, noise=noise, cond=session.carrying(rehearsal.turns[0].names)
    )
    # The pipeline casts what a model gets itself.
    trajectory = replace(trajectory, model_dtype=z0.dtype)
    with Observer(program) as observer:
        x = strategy.run(replace(trajectory, observer=observer), z0.to(trajectory.state_dtype))
    results = {name: x.to(rehearsal.names[name].dtype) for name in table.results}
    return {**rehearsal.names, **results}, x.to(z0.dtype)
