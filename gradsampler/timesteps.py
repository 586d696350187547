# SPDX-License-Identifier: Apache-2.0
"""What a network is told of the noise level, where an upstream rounds or truncates."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from gradsampler import _checks


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
        self.values = values.to("cpu", torch.float64)
        if self.values.ndim != 1 or not bool(torch.isfinite(self.values).all()):
            _checks.fail(self._owner, "be finite, of shape [N] or [N+1]", self.values.tolist())
        self._formula: Tensor | None = None  # its numbers at the levels, ascending

    @property
    def first(self) -> Tensor:
        """The number of the first level."""
        return self.values[0]

    def on(self, formula: Sequence[Tensor]) -> "Timesteps":
        """The table for a run, given the formula's numbers at its N+1 levels."""
        count = len(formula)
        if len(self.values) not in (count - 1, count):
            expected = f"hold a number for each of the {count - 1} steps or {count} levels"
            _checks.fail(self._owner, expected, f"{len(self.values)} numbers")
        placed = copy.copy(self)
        placed._formula, order = torch.sort(torch.stack(list(formula[: len(self.values)])))
        placed.values = self.values[order]
        return placed

    def told(self, formula: Tensor) -> Tensor:
        """What the network is told where the formula gives these numbers."""
        if self._formula is None:
            _checks.fail(self._owner, "be used in a run, to whose levels they belong", "a call")
        table, values = self._formula, self.values
        if len(table) == 1:
            return values[0].expand(formula.shape)
        low = torch.searchsorted(table.detach(), formula.detach(), right=True) - 1
        low = low.clamp(0, len(table) - 2)
        run = table[low + 1] - table[low]
        slope = (values[low + 1] - values[low]) / torch.where(run == 0, 1.0, run)
        return values[low] + (formula - table[low]) * slope
