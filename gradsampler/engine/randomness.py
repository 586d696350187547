# SPDX-License-Identifier: Apache-2.0
"""What model calls draw from random generators, and how they draw it again.

The default generators belong to the whole process, so a call that is made again may set back those
alone that the first call drew from. Where one has moved and there are other threads, it is not
known whose draw that was: then a call is watched, and made once more if it draws.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gradsampler.repetition import Generator, defaults

T = TypeVar("T")


class Move(NamedTuple):
    """A generator that was in another state after a call than before it."""

    place: int  # in the list of `Randomness`
    before: Tensor
    after: Tensor
    doubtful: bool  # another thread may have drawn, and not the call


Moves = tuple[Move, ...]


class Randomness:
    """The generators that the model calls of a run may draw from.

    Args:
        device: of the run.
        own: the generators that the denoiser holds; what moves these is a draw of the call.
    """

    def __init__(self, device: torch.device, own: Sequence[torch.Generator]) -> None:
        self._generators: list[Generator] = [*own, *defaults(device)]
        self._own = len(own)
        self._elsewhere = {_address(generator) for generator in own}
        self._drawn = False  # whether a call was seen to draw from a default generator

    def states(self) -> list[Tensor]:
        """The states of this moment."""
        return [generator.get_state() for generator in self._generators]

    def moved(self, before: list[Tensor]) -> Moves:
        """The generators that are no longer in the states ``before``."""
        pairs = enumerate(zip(before, self.states(), strict=True))
        moves = [(index, old, new) for index, (old, new) in pairs if not _same(old, new)]
        if not moves:
            return ()
        alone = len(sys._current_frames()) == 1
        return tuple(Move(*move, doubtful=not alone and move[0] >= self._own) for move in moves)

    def replay(self, moves: Moves, call: Callable[[], T]) -> T:
        """What a call returns that draws once more what was drawn between these states.

        Afterwards the generators are as they were before it.

        Raises:
            Astray: where other numbers were drawn than the first time.
        """
        if not moves:
            return call()
        known = self._drawn
        result = self._replayed(moves, call)
        if self._drawn == known:
            return result
        # It was set back at its first draw: what the call had read of the generators before that,
        # as an activation checkpoint does, was another state.
        del result
        return self._replayed(moves, call)

    def _replayed(self, moves: Moves, call: Callable[[], T]) -> T:
        now = {move.place: self._generators[move.place].get_state() for move in moves}
        replayed: list[Move] = []

        def back(moves: Sequence[Move]) -> None:
            replayed.extend(moves)
            for move in moves:
                self._generators[move.place].set_state(move.before)

        try:
            with self._counting(moves, back):
                result = call()
            astray = any(not self._at(move.place, move.before, move.after) for move in replayed)
        finally:
            for move in replayed:
                self._generators[move.place].set_state(now[move.place])
        if astray:
            raise Astray(result)
        return result

    @contextmanager
    def unmoved(self, moves: Moves) -> Iterator[None]:
        """Raises Astray where a generator that a call drew from moves within a with statement."""
        now = {move.place: self._generators[move.place].get_state() for move in moves}
        looked_at: list[Move] = []
        with self._counting(moves, looked_at.extend):
            yield
        if any(not self._at(move.place, now[move.place]) for move in looked_at):
            raise Astray

    @contextmanager
    def _counting(self, moves: Moves, count: Callable[[Sequence[Move]], object]) -> Iterator[None]:
        """Passes on at once the moves that are draws, and those in doubt where this thread draws
        from a default generator within a with statement.
        """
        count([move for move in moves if self._drawn or not move.doubtful])
        doubtful = [move for move in moves if move.doubtful and not self._drawn]
        if not doubtful:
            yield
            return
        watch = _Watch(lambda: count(doubtful), self._elsewhere)
        with watch:
            yield
        self._drawn |= watch.drawn

    def _at(self, place: int, *states: Tensor) -> bool:
        """Whether a generator is in one of these states."""
        now = self._generators[place].get_state()
        return any(_same(now, state) for state in states)


class Astray(Exception):
    """A generator is not where a call that is made again should leave it.

    Args:
        result: what the call returned.
    """

    def __init__(self, result: Any = None) -> None:
        super().__init__()
        self.result = result


class _Watch(TorchDispatchMode):
    """Looks for operators of this thread that draw from a default generator.

    Args:
        drawing: called before the first of them.
        elsewhere: addresses of generators that are no default ones.
    """

    supports_higher_order_operators = True  # torch asks: these pass like any other

    def __init__(self, drawing: Callable[[], object], elsewhere: set[int]) -> None:
        super().__init__()
        self._drawing, self._elsewhere = drawing, elsewhere
        self.drawn = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        if not self.drawn and torch.Tag.nondeterministic_seeded in getattr(func, "tags", ()):
            generators = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Generator)]
            if not any(_address(generator) in self._elsewhere for generator in generators):
                self.drawn = True
                self._drawing()
        return func(*args, **kwargs)


def _address(generator: torch.Generator) -> int:
    # An operator is handed another object for the same generator.
    address: int = generator._cdata  # type: ignore[attr-defined]
    return address


def _same(a: Tensor, b: Tensor) -> bool:
    if a.numel() == b.numel() and a.numel() % 8 == 0:  # eight bytes at a time are faster
        a, b = a.view(torch.int64), b.view(torch.int64)
    return torch.equal(a, b)
