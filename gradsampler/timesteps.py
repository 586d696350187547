# SPDX-License-Identifier: Apache-2.0
"""What a network is told of the noise level, where an upstream rounds or truncates."""

import copy
from bisect import bisect_right
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from gradsampler import _checks
from gradsampler.elementary import Coefficient, as_float


class Timesteps:
    """A table beside a formula: what a network is told at each level of a run.

    At a level of the run it is told the table's number. Between two of them, where a solver looks
    in between, it is linear in what the formula gives, and is continued so beyond the table.

    Args:
        owner: named in messages.
        values: [N] or [N+1] numbers, for the levels of a run of N steps; may require grad.
    """

    def __init__(self, owner: str, values: Tensor | Sequence[float]) -> None:
        self._owner = f"{owner}: timesteps"
        if not isinstance(values, Tensor):
            try:
                values = torch.tensor(values, dtype=torch.float64)
            except (TypeError, ValueError, RuntimeError):
                _checks.fail_type(self._owner, "be a tensor or a list of numbers", values)
        table = values.to("cpu", torch.float64)
        if table.ndim != 1 or not len(table) or not bool(torch.isfinite(table).all()):
            _checks.fail(self._owner, "be finite, of shape [N] or [N+1]", table.tolist())
        self._values: Sequence[Coefficient] = (
            table.unbind() if table.requires_grad else table.tolist()
        )
        self._points: list[tuple[Coefficient, Coefficient]] = []  # the formula's, the table's

    @property
    def first(self) -> Coefficient:
        """The number of the first level."""
        return self._values[0]

    def described(self) -> Hashable | None:
        """The numbers by value; None where they carry a gradient."""
        return None if isinstance(self._values[0], Tensor) else tuple(self._values)

    def on(self, formula: Sequence[Coefficient]) -> "Timesteps":
        """The table for a run, given the formula's numbers at its N+1 levels."""
        count = len(formula)
        if len(self._values) not in (count - 1, count):
            expected = f"hold a number for each of the {count - 1} steps or {count} levels"
            _checks.fail(self._owner, expected, f"{len(self._values)} numbers")
        placed = copy.copy(self)
        points = zip(formula, self._values, strict=False)  # the last level may have none
        placed._points = sorted(points, key=lambda point: as_float(point[0]))
        return placed

    def told(self, formula: Coefficient) -> Coefficient:
        """What the network is told where the formula gives this number."""
        points = self._points
        if not points:
            _checks.fail(self._owner, "be used in a run, to whose levels they belong", "a call")
        if len(points) == 1:
            return points[0][1]
        below = bisect_right(points, as_float(formula), key=lambda point: as_float(point[0])) - 1
        below = max(below, 0)
        here, told = points[below]  # at a level of the run exactly its number
        there, other = points[below + 1] if below + 1 < len(points) else points[below - 1]
        if as_float(here) == as_float(there):
            return told
        return told + (formula - here) * ((other - told) / (there - here))
