# SPDX-License-Identifier: Apache-2.0
"""Which tensor is which in a dry run: a state, a model's output, or what a step returned."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from gradsampler.integrations.diffusers.rehearsal import Refused, Rehearsal, StepCall, Turn, same

__all__ = ["Marked", "Marker", "Returned", "Unit"]


class Unit(NamedTuple):
    """A tensor that follows from no other: it becomes a unit vector."""

    kind: str  # "x" state | "d" model output | "n" draw | "?" given to an earlier step of the turn
    turn: int
    number: int = 0  # within the turn


class Returned(NamedTuple):
    """A tensor that a step returned."""

    turn: int
    call: int
    position: int


Tag = Unit | Returned


@dataclass(frozen=True)
class Marked:
    """A call of a scheduler's step whose tensors have names."""

    call: StepCall
    tags: dict[str, Tag]  # by parameter
    turn: int
    number: int  # within the turn

    @property
    def outputs(self) -> list[str]:
        """The parameters that take the models' outputs, in the order of their numbers."""
        first: dict[Tag, str] = {}
        for name, tag in self.tags.items():
            if isinstance(tag, Unit) and tag.kind == "d":
                first.setdefault(tag, name)
        return list(first.values())


class Marker:
    """Goes through the turns in order and names the tensors of their steps."""

    def __init__(self, rehearsal: Rehearsal) -> None:
        self._rehearsal = rehearsal
        self._returned: dict[Returned, Tensor] = {}  # by the latest turn
        self.sources: list[Returned] = []  # of the states after the first
        self.names: list[set[str]] = []  # by turn, the local variables that hold its state

    def marked(self, i: int, turn: Turn) -> list[Marked]:
        """The steps of turn ``i``, the last of which gives the next state."""
        if not turn.calls:
            raise Refused(f"turn {i} does not step the scheduler")
        state = turn.calls[-1].arguments.get("sample")
        if not isinstance(state, Tensor):
            raise Refused("the step of its scheduler has no parameter `sample`")
        names = {name for name, x in turn.names.items() if same(x, state)}
        source = _found(state, self._returned.items())
        if not names or (i > 0 and source is None):
            raise Refused(
                f"before turn {i} the pipeline changes the state that the scheduler returned"
            )
        if i > 0 and source is not None:
            self.sources.append(source)
        self.names.append(names)
        before, self._returned = self._returned, {}
        outputs: list[Tensor] = []
        marked = []
        for k, call in enumerate(turn.calls):
            tags: dict[str, Tag] = {}
            for name, x in call.arguments.items():
                if not isinstance(x, Tensor) or not x.dtype.is_floating_point or x.ndim < 2:
                    continue
                tag = _found(x, [*self._returned.items(), *before.items()])
                if same(x, state):
                    tags[name] = Unit("x", i)
                elif tag is not None:
                    tags[name] = tag
                elif call is not turn.calls[-1]:
                    tags[name] = Unit("?", i, k * len(call.arguments) + len(tags))
                else:
                    tags[name] = Unit("d", i, _output(x, state, outputs))
            marked.append(Marked(call, tags, i, k))
            self._returned |= {Returned(i, k, p): x for p, x in enumerate(call.returned)}
        return marked

    def result(self, names: set[str] | None) -> tuple[Returned, set[str]]:
        """What the run ends with, and the local variables that hold it.

        Args:
            names: what comes after the loop reads; None for the state itself.
        """
        last = max(tag.call for tag in self._returned)
        returned = {tag: x for tag, x in self._returned.items() if tag.call == last}
        if names is None:
            return next(iter(returned)), set()
        ending, first = self._rehearsal.names, self._rehearsal.turns[0].names
        changed = {
            name: ending[name]
            for name in names
            if isinstance(ending.get(name), Tensor) and ending[name] is not first.get(name)
        }
        found = {name: _found(x, returned.items()) for name, x in changed.items()}
        unknown = sorted(name for name, tag in found.items() if tag is None)
        if unknown or not found:
            what = ", ".join(unknown) or "nothing that the scheduler returned"
            raise Refused(f"after its loop the pipeline reads {what}")
        tags = [tag for tag in found.values() if tag is not None]
        if any(not same(returned[tags[0]], returned[tag]) for tag in tags):
            raise Refused(f"after its loop the pipeline reads {' and '.join(sorted(found))}")
        return tags[0], set(found)


def _found(x: Tensor, known: Iterable[tuple[Returned, Tensor]]) -> Returned | None:
    return next((tag for tag, y in known if same(x, y)), None)


def _output(x: Tensor, state: Tensor, outputs: list[Tensor]) -> int:
    """The number of a model's output among those of the turn."""
    if x.shape != state.shape:
        raise Refused(
            f"its scheduler steps with a tensor of shape {list(x.shape)} beside a state of shape "
            f"{list(state.shape)}"
        )
    for number, y in enumerate(outputs):
        if same(x, y):
            return number
    outputs.append(x)
    return len(outputs) - 1
