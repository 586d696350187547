# SPDX-License-Identifier: Apache-2.0
"""A pipeline's run as a step map: one turn of its loop from state and history to the next ones.

The history of a scheduler is whatever it keeps from one step to the next. A dry run tells where: in
which attributes, and in which local variables of the pipeline, tensors change.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from gradsampler.integrations.diffusers import parts
from gradsampler.integrations.diffusers.draws import replaced
from gradsampler.integrations.diffusers.loop import Head, Loop, Names
from gradsampler.integrations.diffusers.rehearsal import Refused, Rehearsal, bound, same
from gradsampler.integrations.diffusers.session import Session, lifted
from gradsampler.iteration import iterate
from gradsampler.memory import Memory
from gradsampler.noise.sources import NoiseSource

__all__ = ["Carried", "run"]


class Place(NamedTuple):
    """Where a tensor is kept: a local variable, an attribute of the scheduler, or an item of it."""

    owner: str  # "names" | "scheduler"
    name: str
    key: int | str | None = None


State = dict[str, Tensor]  # by the number of a place, in decimals


class Carried:
    """Which tensors go from turn to turn.

    Args:
        head: where the loop begins.
        rehearsal: the dry run.
        tail: the names that the pipeline reads after the loop; None where the last state is the
            result.

    Raises:
        Refused: where the last state is asked for and the pipeline changes it.
    """

    def __init__(self, head: Head, rehearsal: Rehearsal, tail: set[str] | None) -> None:
        first, count = rehearsal.turns[0].scheduler, len(rehearsal.turns)
        boundaries = [(turn.names, turn.scheduler) for turn in rehearsal.turns]
        boundaries.append((rehearsal.names, rehearsal.scheduler))
        constant = dict(_tensors(head.names, first))
        read = [head.names.keys()] * count + [head.names.keys() | (tail or set())]
        alive = [
            {
                place: x
                for place, x in _tensors(names, scheduler)
                if place.owner == "scheduler" or place.name in known
            }
            for (names, scheduler), known in zip(boundaries, read, strict=True)
        ]
        changing = {
            place: None
            for each in alive
            for place, x in each.items()
            if x is not constant.get(place)
        }
        self._places = list(changing)
        self._alive = [{place for place in each if place in changing} for each in alive]
        self._result = _holding(alive[-1], rehearsal)
        if self._result is None and tail is None:
            raise Refused("the pipeline changes what the last step returned")

    def state(self, names: Names, scheduler: Mapping[str, Any], boundary: int) -> State:
        """The tensors that there are at a boundary between two turns."""
        found = dict(_tensors(names, scheduler))
        alive = self._alive[boundary]
        return {str(k): found[place] for k, place in enumerate(self._places) if place in alive}

    def placed(self, state: State) -> dict[Place, Tensor]:
        """The tensors of a state by their places; a turn may change them."""
        return {self._places[int(k)]: x.clone() for k, x in state.items()}

    def result(self, tensors: Mapping[Place, Tensor]) -> Tensor | None:
        """What the last step returned, among the tensors after it."""
        return None if self._result is None else tensors[self._result]


def _holding(alive: Mapping[Place, Tensor], rehearsal: Rehearsal) -> Place | None:
    """Where the last step's result is kept, if the pipeline does not change it afterwards."""
    steps = rehearsal.turns[-1].calls
    for place, x in alive.items():
        if steps and place.owner == "names" and same(x, steps[-1].returned[0]):
            return place
    return None


def _tensors(names: Names, scheduler: Mapping[str, Any]) -> Iterator[tuple[Place, Tensor]]:
    """All floating tensors in local variables and in the attributes of a scheduler."""
    for owner, values in (("names", names), ("scheduler", scheduler)):
        for name, value in values.items():
            if isinstance(value, Tensor):
                items: list[tuple[Any, Any]] = [(None, value)]
            elif isinstance(value, list) and owner == "scheduler":
                items = list(enumerate(value))
            elif type(value) is dict and owner == "scheduler":
                items = list(value.items())
            else:
                continue
            for key, x in items:
                if isinstance(x, Tensor) and x.dtype.is_floating_point:
                    yield Place(owner, name, key), x


def _filled(values: Mapping[str, Any], tensors: Mapping[Place, Tensor], owner: str) -> Names:
    """A copy of ``values`` with the tensors in their places."""
    filled: dict[str, Any] = dict(values)
    for name in {place.name for place in tensors if place.owner == owner and place.key is not None}:
        filled[name] = copy.copy(filled[name])
    for place, x in tensors.items():
        if place.owner != owner:
            continue
        if place.key is None:
            filled[place.name] = x
        else:
            filled[place.name][place.key] = x
    return filled


class _Map:
    """One turn of the loop as a function of what goes from turn to turn."""

    def __init__(
        self,
        session: Session,
        loop: Loop,
        rehearsal: Rehearsal,
        carried: Carried,
        noise: NoiseSource | None,
    ) -> None:
        self._session, self._loop, self._rehearsal = session, loop, rehearsal
        self._carried, self._noise = carried, noise
        self._made: dict[str, Any] = {}  # objects that the scheduler made in this run

    def __call__(
        self,
        state: State,
        i: int,
        names: Mapping[str, Any],
        attributes: Mapping[str, Any],
        z0: Tensor | None = None,
    ) -> State:
        session, turn = self._session, self._rehearsal.turns[i]
        tensors = self._carried.placed(state)
        first = self._rehearsal.turns[0].scheduler
        rehearsed = parts.made(first, turn.scheduler)
        objects = {name: x for name, x in self._made.items() if name in rehearsed}
        scheduler = _filled(turn.scheduler, tensors, "scheduler") | objects
        parts.restored(session.scheduler, scheduler)
        session.put(attributes)
        session.live = i > session.reached
        session.reached = max(i, session.reached)
        noise, count = self._noise, len(self._rehearsal.turns)

        def step(own: Any, *args: Any, **kwargs: Any) -> Any:
            assert noise is not None
            assert z0 is not None
            return replaced(session.glue, own, bound(own, args, kwargs), noise, z0, i, count)

        try:
            session.step = None if noise is None else step
            with session.glue:
                given = {name: lifted(value) for name, value in names.items()}
                before = _filled({**turn.names, **given}, tensors, "names")
                after = self._loop.turn(before, turn.item)
            if session.live:
                self._made |= parts.made(first, vars(session.scheduler))
        finally:
            session.live, session.step = True, None
        return self._carried.state(after, vars(session.scheduler), i + 1)


def run(
    session: Session,
    loop: Loop,
    rehearsal: Rehearsal,
    carried: Carried,
    *,
    memory: str | Memory,
    noise: NoiseSource | None,
) -> tuple[Names, Tensor | None]:
    """Runs the steps; the local variables that the loop ends with, and the state [B, *state].

    There is no state where the pipeline changes what the last step returned.

    Args:
        session, loop, rehearsal, carried: the call.
        memory: any strategy for step maps.
        noise: takes the place of the scheduler's draws; None keeps them.
    """
    first, count = rehearsal.turns[0], len(rehearsal.turns)
    cond: dict[str, Any] = session.carrying(first.names)
    if noise is not None:
        cond["z0"] = z0 = session.z0(rehearsal.start)
        drawn = [(i, k) for i, turn in enumerate(rehearsal.turns) for k in range(len(turn.draws))]
        noise = noise.prepare(z0.detach(), drawn)
    state = iterate(
        _Map(session, loop, rehearsal, carried, noise),
        carried.state(first.names, first.scheduler, 0),
        count,
        memory=memory,
        cond=cond,
        modules=session.modules,
    )
    tensors = carried.placed(state)
    return _filled(rehearsal.names, tensors, "names"), carried.result(tensors)
