# SPDX-License-Identifier: Apache-2.0
"""What a model call depends on beside its arguments, captured and restored: random generators,
buffers, and autocast. The grad mode is on both times that a call is made, so a network that looks
at it computes the same twice, and a compiled one compiles once.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import NamedTuple, TypeVar

import torch

from gradsampler.engine.agreement import Agreement
from gradsampler.engine.buffers import Buffers, Values
from gradsampler.engine.parts import Seen
from gradsampler.engine.program import Evaluation
from gradsampler.engine.randomness import Astray, Moves, Randomness
from gradsampler.repetition import ReplayError

T = TypeVar("T")


_NO_VALUES: Values = {}


class Moment(NamedTuple):
    """What was found around a first call."""

    moves: Moves  # of the generators that it drew from
    values: Values  # of buffers, before it


class Circumstances:
    """The circumstances of the model calls of a run.

    Args:
        device: of the run.
        seen: what the model calls are made of.
        agreement: with those who would wait for further calls; where there are any, what goes wrong
            in a call is kept for the end of the backward.
    """

    def __init__(
        self, device: torch.device, seen: Seen, *, agreement: Agreement | None = None
    ) -> None:
        self._randomness = Randomness(device, seen.parts.generators)
        self._buffers = Buffers(seen.parts.modules)
        self._kinds = {"cpu", device.type}
        self._autocasts = self._present_autocasts()
        self._cached = torch.is_autocast_cache_enabled()
        self._moments: dict[int, Moment] = {}  # by the call
        self._agreement = agreement or Agreement()
        self.failures: dict[int, ReplayError] = {}  # by step, the first of each

    def captured(self, evaluation: Evaluation, call: Callable[[], T]) -> T:
        """Makes the first call of an evaluation, and captures them around it."""
        values = self._buffers.before() if self._buffers else _NO_VALUES
        states = self._randomness.states()
        result = call()
        moves = self._randomness.moved(states)
        self._moments[evaluation.state.call] = Moment(moves, values)
        return result

    def finish(self) -> None:
        """Takes note that all first calls are made."""
        if self._buffers:
            self._buffers.finish()

    def again(self, evaluation: Evaluation, call: Callable[[], T]) -> T:
        """Makes a further call of an evaluation under them; afterwards all is as before it."""
        moves, values = self._moments[evaluation.state.call]
        if not moves and not self._buffers and self._present_autocasts() == self._autocasts:
            return call()

        def restored() -> T:
            with self.autocast(), self._buffers.replaced(values):
                return call()

        try:
            return self._randomness.replay(moves, restored)
        except Astray as astray:
            error = ReplayError(
                "the denoiser must draw the same numbers when it is called again, got others at "
                f"step {evaluation.step}; does another thread draw from torch's default generator? "
                "Let one of them draw from a torch.Generator of its own, or take memory='store'"
            )
            self._fail(evaluation, error)
            result: T = astray.result
            return result

    def drawing_nothing(self, evaluation: Evaluation) -> AbstractContextManager[None]:
        """Raises ReplayError where the backward of a call draws, if the call does."""
        moves, _ = self._moments[evaluation.state.call]
        return self._unmoved(evaluation, moves) if moves else nullcontext()

    @contextmanager
    def _unmoved(self, evaluation: Evaluation, moves: Moves) -> Iterator[None]:
        try:
            with self._randomness.unmoved(moves):
                yield
        except Astray:
            error = ReplayError(
                "the backward of a model call must draw nothing, got a generator that moved; does "
                "an activation checkpoint inside the denoiser draw anew, or another thread from "
                "torch's default generator? preserve_rng_state=True replays the default "
                "generators; draw from others before the checkpoint, and pass the noise in"
            )
            self._fail(evaluation, error)

    def _fail(self, evaluation: Evaluation, error: ReplayError) -> None:
        if self._agreement.alone:
            raise error from None
        self.failures.setdefault(evaluation.step, error)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Sets autocast as it was at the time of the run."""
        if self._present_autocasts() == self._autocasts:
            yield
            return
        with ExitStack() as stack:
            for kind, dtype, enabled in self._autocasts:
                stack.enter_context(torch.autocast(kind, dtype, enabled, self._cached))
            yield

    @property
    def precisions(self) -> list[torch.dtype]:
        """The dtypes that autocast has model calls compute in."""
        return [dtype for _, dtype, enabled in self._autocasts if enabled]

    def _present_autocasts(self) -> list[tuple[str, torch.dtype, bool]]:
        return [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
            for kind in self._kinds
        ]
