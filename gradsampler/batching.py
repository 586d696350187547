# SPDX-License-Identifier: Apache-2.0
"""The arguments of several network calls on B samples as those of one call on them all."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gradsampler import _checks


def stacked(given: Sequence[Mapping[str, Any]], batch: int) -> dict[str, Any]:
    """The keyword arguments of several calls on B samples as those of one call on them all."""
    keys = [set(each) for each in given]
    if any(each != keys[0] for each in keys):
        differing = sorted(keys[0].union(*keys) - keys[0].intersection(*keys))
        got = f"{', '.join(differing)} in some only"
        _checks.fail("Guided: the branches of a batched call", "have the same arguments", got)
    return {key: _joined(key, [each[key] for each in given], batch) for key in given[0]}


def _joined(key: str, values: Sequence[Any], batch: int) -> Any:
    name = f"Guided: {key!r} in a batched call"
    flat = [pytree.tree_flatten(value) for value in values]
    if any(structure != flat[0][1] for _, structure in flat):
        _checks.fail(name, "have the same structure in all branches", "several")
    leaves = [_one(name, each, batch) for each in zip(*(found for found, _ in flat), strict=True)]
    return pytree.tree_unflatten(leaves, flat[0][1])


def _one(name: str, leaves: Sequence[Any], batch: int) -> Any:
    first = leaves[0]
    rows = all(isinstance(x, Tensor) and x.ndim and x.shape[0] in (1, batch) for x in leaves)
    if rows and any(x.shape[0] == batch for x in leaves):
        shapes = {tuple(x.shape[1:]) for x in leaves}
        if len(shapes) > 1:
            sizes = ", ".join(str(list(x.shape)) for x in leaves)
            _checks.fail(name, "have one shape in all branches", sizes, "pad the shorter ones")
        return torch.cat([x.expand(batch, *x.shape[1:]) for x in leaves])
    if all(x is first or (not isinstance(x, Tensor) and bool(x == first)) for x in leaves):
        return first
    hint = "take batched=False, or give one row for all"
    _checks.fail(name, f"be tensors [{batch}, ...] where the branches differ", "others", hint)
