# SPDX-License-Identifier: Apache-2.0
"""A pytree of tensors as one row, which is what a program has for a state."""

from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gradsampler import _checks


class Place(NamedTuple):
    """Where a floating tensor lies in the row."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Layout:
    """Where the floating tensors of a pytree lie in a row [1, E], and all that is in it beside."""

    structure: pytree.TreeSpec
    leaves: tuple[Any, ...]  # in the tree's order; a `Place` for each floating tensor
    dtype: torch.dtype  # holds each of these, float32 at least

    @classmethod
    def of(cls, argument: str, state: Any) -> "Layout":
        """The layout of a state.

        Raises:
            ValueError: naming ``argument``, for complex tensors, for ones on several devices and
                where no tensor is floating.
        """
        leaves, structure = pytree.tree_flatten(state)
        tensors = [x for x in leaves if isinstance(x, Tensor)]
        floating = [x for x in tensors if x.dtype.is_floating_point]
        if not floating:
            _checks.fail(argument, "hold a floating-point tensor", f"{len(leaves)} other leaves")
        for x in tensors:
            if x.is_complex():
                hint = "take torch.view_as_real"
                _checks.fail(argument, "hold no complex tensor", str(x.dtype), hint)
            if x.dtype.is_floating_point:
                _checks.device(f"{argument}: each tensor", x, floating[0].device)
        dtype = torch.float32
        for x in floating:
            dtype = torch.promote_types(dtype, x.dtype)
        starts = iter(accumulate((x.numel() for x in floating), initial=0))
        placed = [
            Place(next(starts), tuple(x.shape), x.dtype) if _is_floating(x) else x for x in leaves
        ]
        return cls(structure, tuple(placed), dtype)

    def row(self, state: Any) -> Tensor:
        """The floating tensors of a state that has this layout, [1, E]."""
        tensors = [x for x in pytree.tree_leaves(state) if _is_floating(x)]
        return torch.cat([x.to(self.dtype).reshape(-1) for x in tensors])[None]

    def state(self, row: Tensor) -> Any:
        """The state with the tensors of a row, views of it where they have its dtype."""

        def taken(x: Any) -> Any:
            if not isinstance(x, Place):
                return x
            return row[0].narrow(0, x.start, prod(x.shape)).view(x.shape).to(x.dtype)

        return pytree.tree_unflatten([taken(x) for x in self.leaves], self.structure)


def _is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype.is_floating_point
