# SPDX-License-Identifier: Apache-2.0
"""Decisions that all ranks have to take alike, as each waits for the calls of the others."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


class Agreement:
    """The ranks that make the same model calls; alone, where there are no process groups.

    Args:
        groups: process groups, whose union all agree with one another: where they cross, as those
            of a mesh do, each in turn.
    """

    def __init__(self, groups: Sequence[Any] = ()) -> None:
        ranks: dict[frozenset[int], Any] = {}
        for group in groups:
            ranks.setdefault(frozenset(dist.get_process_group_ranks(group)), group)
        # One that lies within another has nothing to add.
        self._groups = [
            ranks[each]
            for each in sorted(ranks, key=lambda each: (-len(each), sorted(each)))
            if len(each) > 1 and not any(each < other for other in ranks)
        ]

    @property
    def alone(self) -> bool:
        """Whether there is nobody to agree with."""
        return not self._groups

    def least(self, *values: float) -> tuple[float, ...]:
        """The least of each value over all ranks: one small reduction."""
        return self._reduced(values, dist.ReduceOp.MIN)

    def sums(self, *values: float) -> tuple[float, ...]:
        """The sum of each value over all ranks."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def _reduced(self, values: tuple[float, ...], op: Any) -> tuple[float, ...]:
        if not self._groups:
            return values
        reduced = torch.tensor(values, dtype=torch.float64)
        for group in self._groups:
            there = reduced.to(_device(group))
            dist.all_reduce(there, op, group=group)
            reduced = there.cpu()
        return tuple(reduced.tolist())

    def first(self, flags: Sequence[bool]) -> int | None:
        """The place of the first flag that is set on any rank."""
        (place,) = self.least(next((k for k, flag in enumerate(flags) if flag), math.inf))
        return None if place == math.inf else int(place)

    def any(self, flag: bool) -> bool:
        """Whether it is set on any rank."""
        return self.least(-float(flag))[0] < 0

    def elsewhere(self, here: bool) -> str:
        """What a message adds for what was seen on another rank alone."""
        return "" if here else " on another rank"

    def largest(self, value: float) -> float:
        """The largest value over all ranks."""
        return -self.least(-value)[0]


def _device(group: Any) -> torch.device:
    """Where the group's backend wants what it reduces."""
    kinds = [device.type for device in group._device_types]
    if "cpu" in kinds:
        return torch.device("cpu")
    return torch.device(kinds[0], torch.get_device_module(kinds[0]).current_device())
