# SPDX-License-Identifier: Apache-2.0
"""A pipeline's run as a step map: one turn of its loop from state and history to the next ones.

The history of a scheduler is whatever it keeps from one step to the next. A dry run tells where: in
which attributes, and in which local variables of the pipeline, tensors change.
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
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


class Carried:
    """The tensors that go from turn to turn, and one flat tensor that holds them.

    Args:
        head: where the loop begins.
        rehearsal: the dry run.
        tail: whether the pipeline goes on after the loop; else the last state is the result.

    Raises:
        Refused: where one of them changes its shape along the run, or there is no last state.
    """

    def __init__(self, head: Head, rehearsal: Rehearsal, *, tail: bool) -> None:
        first = rehearsal.turns[0].scheduler
        boundaries = [(turn.names, turn.scheduler) for turn in rehearsal.turns]
        boundaries.append((rehearsal.names, rehearsal.scheduler))
        constant = dict(_tensors(head.names, first))
        alive = [
            {
                place: x
                for place, x in _tensors(names, scheduler)
                if i == len(rehearsal.turns) or place.owner != "names" or place.name in head.names
            }
            for i, (names, scheduler) in enumerate(boundaries)
        ]
        changing = {
            place for each in alive for place, x in each.items() if x is not constant.get(place)
        }
        self._like: dict[Place, Tensor] = {}
        self.alive: list[list[Place]] = []  # by boundary, the places that hold a tensor
        for each in alive:
            self.alive.append([place for place in each if place in changing])
            for place in self.alive[-1]:
                like = self._like.setdefault(place, each[place])
                if like.shape != each[place].shape:
                    raise Refused(f"{place.name} changes its shape along the run")
        self._result = _holding(alive[-1], rehearsal)
        if self._result is None and not tail:
            raise Refused("the pipeline changes what the last step returned")
        self._sizes = [x.numel() for x in self._like.values()]
        self.dtype = torch.float32
        for x in self._like.values():
            self.dtype = torch.promote_types(self.dtype, x.dtype)

    def packed(self, names: Names, scheduler: Mapping[str, Any], boundary: int) -> Tensor:
        """All of them as one tensor [1, M]; zeros where one does not exist yet."""
        found = dict(_tensors(names, scheduler))
        alive = set(self.alive[boundary])
        flat = [
            (found[place] if place in alive else torch.zeros_like(x)).to(self.dtype).reshape(-1)
            for place, x in self._like.items()
        ]
        return torch.cat(flat)[None]

    def unpacked(self, x: Tensor, boundary: int) -> dict[Place, Tensor]:
        """Those that exist at a boundary between two turns."""
        alive = set(self.alive[boundary])
        pieces = zip(self._like.items(), x[0].split(self._sizes), strict=True)
        return {
            place: piece.view(like.shape).to(like.dtype, copy=True)  # may be changed in place
            for (place, like), piece in pieces
            if place in alive
        }

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
    """One turn of the loop as a function of the packed state."""

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
        self._reached = -1
        self._made: dict[str, Any] = {}  # objects that the scheduler made in this run

    def __call__(
        self,
        x: Tensor,
        i: int,
        names: Mapping[str, Any],
        attributes: Mapping[str, Any],
        z0: Tensor | None = None,
    ) -> Tensor:
        session, turn = self._session, self._rehearsal.turns[i]
        tensors = self._carried.unpacked(x, i)
        first = self._rehearsal.turns[0].scheduler
        rehearsed = parts.made(first, turn.scheduler)
        objects = {name: x for name, x in self._made.items() if name in rehearsed}
        scheduler = _filled(turn.scheduler, tensors, "scheduler") | objects
        parts.restored(session.scheduler, scheduler)
        session.put(attributes)
        session.live = i > self._reached
        self._reached = max(i, self._reached)
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
        return self._carried.packed(after, vars(session.scheduler), i + 1)


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
    x = iterate(
        _Map(session, loop, rehearsal, carried, noise),
        carried.packed(first.names, first.scheduler, 0),
        count,
        memory=memory,
        cond=cond,
    )
    tensors = carried.unpacked(x, count)
    return _filled(rehearsal.names, tensors, "names"), carried.result(tensors)
