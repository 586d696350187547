# SPDX-License-Identifier: Apache-2.0
"""In what order revolve runs, keeps and restores, step by step.

The schedule is the optimal one of Griewank and Walther 2000, "Algorithm 799: revolve", ACM TOMS
26(1), from the package checkpoint-schedules, which is imported when the first one is asked for. Its
step j is evaluation j with the stages after it.
"""

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple


class Advance(NamedTuple):
    """Go on from evaluation ``start`` to before evaluation ``stop``."""

    start: int
    stop: int
    snapshot: bool  # whether one is taken at ``start``
    further: bool  # whether it lies in one of the further slots


class Tape(NamedTuple):
    """Make the call of this evaluation with its graph: backward is about to ask for it."""

    evaluation: int


class Restore(NamedTuple):
    """Go back to the snapshot of this evaluation."""

    evaluation: int
    last: bool  # whether it is read for the last time


def package() -> ModuleType:
    """The module checkpoint_schedules; ImportError with the way out where it is not installed."""
    try:
        import checkpoint_schedules
    except ImportError as error:
        raise ImportError(
            'memory="revolve" needs the package checkpoint-schedules, which cannot be imported '
            f"({error}): install it with `pip install 'checkpoint-schedules>=1.0,<2'`, or take "
            'memory="checkpoint"'
        ) from error
    found: ModuleType = checkpoint_schedules
    return found


def missing() -> str | None:
    """Why there is no schedule here, or None."""
    try:
        package()
    except ImportError as error:
        return str(error)
    return None


def schedule(evaluations: int, slots: int, further: int = 0) -> Iterator[Advance | Tape | Restore]:
    """The actions of a run, up to its first `Tape`, and those of its backward, to a `Tape` each."""
    known = package()
    for action in known.MultistageCheckpointSchedule(evaluations, slots, further):
        if isinstance(action, known.Forward) and action.write_adj_deps:
            yield Tape(action.n0)
        elif isinstance(action, known.Forward):
            away = action.storage == known.StorageType.DISK
            yield Advance(action.n0, action.n1, action.write_ics, away)
        elif isinstance(action, (known.Copy, known.Move)):
            yield Restore(action.n, isinstance(action, known.Move))
