# SPDX-License-Identifier: Apache-2.0
"""From rehearsals of a run to what each strategy will take."""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from gradsampler.engine.policy import EXACT, Policy
from gradsampler.engine.program import Z0, Program, Slot
from gradsampler.memory import capacity, multistage
from gradsampler.memory.base import Memory
from gradsampler.memory.checkpoint import Checkpoint
from gradsampler.memory.offload import Offload
from gradsampler.memory.planning.following import Following
from gradsampler.memory.planning.footprint import Footprint
from gradsampler.memory.planning.rehearsal import Cost, Rehearsal
from gradsampler.memory.reversible import Reversible
from gradsampler.memory.revolve import Revolve
from gradsampler.memory.store import Store


@dataclass(frozen=True)
class Row:
    """One strategy's prediction."""

    name: str  # as `memory=` takes it
    memory: Memory
    peak: int  # bytes on the device of z0, beyond what is there before the run
    host: int  # bytes in the host's memory, for a run on another device
    evaluations: float  # calls for each evaluation of the run, that one included
    factor: float  # time of run and backward over that of `Store` with the exact gradient
    seconds: float  # of run and backward
    fits: bool
    exact: bool  # whether it gives the gradient of the run


@dataclass(frozen=True)
class Predictor:
    """Makes rows of rehearsals of one program."""

    program: Program
    footprint: Footprint
    converted: bool
    budget: int
    integers: torch.dtype | None = None  # of a run that can be undone
    following: Following = field(default_factory=Following)
    policy: Policy = EXACT  # placed in the run
    given: tuple[Slot, ...] = (Z0,)  # what is there before its first instruction
    injected: bool = True  # whether its noises are made of z0

    def rows(self, *, away: bool) -> Iterator[Row]:
        """A row a strategy, the fastest first; ``away`` is a device other than the host."""
        yield self._row("store", Store(), self._rehearsal().store())
        if self.integers is not None and self.policy.whole:
            cost = self._rehearsal().reversible(self.integers.itemsize)
            yield self._row("reversible", Reversible(), cost)
        checkpoint = self._row("checkpoint", Checkpoint(), self._rehearsal().checkpoint())
        yield checkpoint
        if away:
            yield self._row("offload", Offload(), self._rehearsal().offload())
        if multistage.missing() is None:
            row = self.revolve(self._slots(min(self.budget, checkpoint.peak - 1)))
            if row.peak < checkpoint.peak:  # it holds the last call's graph while a decoder works
                yield row

    def _slots(self, most: int) -> int:
        """The most slots that fit ``most`` bytes and do not keep every state; at least 1."""
        # The peak grows with the slots, but for a state here and there that two snapshots share: a
        # bisection ends where one number fits and the next does not.
        counts = range(1, self.most_slots())
        fitting = bisect_right(counts, False, key=lambda slots: self.revolve(slots).peak > most)
        return max(1, fitting)

    def most_slots(self) -> int:
        """The number of slots from which on more bring nothing."""
        cut = self.policy.cut(self.program, self.given)
        program = self.program if cut is None else cut.program
        return max(1, len(program.evaluations) - 1)

    def revolve(self, slots: int) -> Row:
        """The row of revolve with a number of slots."""
        cost = self._rehearsal().revolve(slots)
        return self._row(f"revolve:{slots}", Revolve(slots), cost)

    def _rehearsal(self) -> Rehearsal:
        return Rehearsal(
            self.program,
            self.footprint,
            converted=self.converted,
            after=self.following.peak,
            policy=self.policy,
            given=self.given,
            injected=self.injected,
        )

    def _row(self, name: str, memory: Memory, cost: Cost) -> Row:
        count = len(self.program.evaluations)
        evaluations = cost.calls / count
        forward, backward = self.footprint.forward_seconds, self.footprint.backward_seconds
        step = evaluations * forward + cost.pulled / count * backward
        factor = step / (forward + backward)
        fits = cost.peak <= self.budget
        if cost.host:
            left = capacity.free(torch.device("cpu"))
            fits = fits and (left is None or cost.host <= left)
        exact = memory.exact and self.policy.exact
        seconds = count * step
        return Row(name, memory, cost.peak, cost.host, evaluations, factor, seconds, fits, exact)
