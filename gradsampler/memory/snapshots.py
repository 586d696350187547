# SPDX-License-Identifier: Apache-2.0
"""What a run needs to go on from one of its model calls, on the device or elsewhere."""

from collections.abc import Container
from typing import Protocol

from torch import Tensor

from gradsampler.engine.program import Slot
from gradsampler.engine.trajectory import version


class Kept(Protocol):
    """A tensor that lies elsewhere."""

    def fetch(self) -> None:
        """Starts to bring it back, unless that is under way."""

    def get(self) -> Tensor:
        """Returns it, on its device."""

    def drop(self) -> None:
        """Forgets it."""


class Place(Protocol):
    """Where tensors are kept away from the device."""

    def put(self, x: Tensor) -> Kept:
        """Starts to take a tensor there; a few may be under way at a time."""

    def settle(self) -> None:
        """Waits until all that was put is there."""

    def close(self) -> object:
        """Forgets all."""


class Snapshot:
    """The slots that the rest of the run reads, guarded from changes in place.

    Args:
        slots: by slot, its tensor.
        given: slots that are alive all the time, so that they need no copy.
        place: where the tensors of the others go; None leaves them where they are.
    """

    def __init__(
        self, slots: dict[Slot, Tensor], given: Container[Slot], place: Place | None
    ) -> None:
        away = [] if place is None else [slot for slot in slots if slot not in given]
        self._away = {slot: place.put(slots[slot]) for slot in away if place is not None}
        self._here = {slot: (x, version(x)) for slot, x in slots.items() if slot not in away}

    def fetch(self) -> None:
        """Starts to bring back what lies elsewhere."""
        for kept in self._away.values():
            kept.fetch()

    def slots(self) -> dict[Slot, Tensor]:
        """A copy of the table; RuntimeError where a tensor was changed since."""
        for x, before in self._here.values():
            unchanged("Revolve", x, before)
        self.fetch()
        brought = {slot: kept.get() for slot, kept in self._away.items()}
        return {slot: x for slot, (x, _) in self._here.items()} | brought

    def drop(self) -> None:
        """Forgets what lies elsewhere."""
        for kept in self._away.values():
            kept.drop()


def unchanged(memory: str, x: Tensor, before: int) -> None:
    """Raises RuntimeError where a tensor has another version than ``before``."""
    if version(x) != before:
        raise RuntimeError(
            f"memory={memory}: the states and outputs of the denoiser must stay as they are until "
            "backward, got a change in place; return x.clone()"
        )
