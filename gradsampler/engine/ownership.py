# SPDX-License-Identifier: Apache-2.0
"""Whose is a tensor's memory? What nobody else holds may be written over.

A large tensor of the CPU that is made anew costs more in page faults than in arithmetic. A state
that dies in a step is in the hands of the run alone, unless a denoiser, a callback or autograd has
kept it, or a view of it, or its storage, or a NumPy array in its memory. All of them are counted:
references to the Python object and to the tensor behind it, and those to the storage.
"""

import sys
from typing import Any

import torch
from torch import Tensor

_LEAST = 2**20  # bytes; what is smaller comes from memory that the process has already


def large(x: Tensor) -> bool:
    """Whether tensors like this one are worth the question."""
    return x.device.type == "cpu" and x.numel() * x.element_size() >= _LEAST


def written_over(table: Any, key: Any) -> Tensor | None:
    """A new tensor in the memory of ``table[key]``, if the table alone holds that; else None.

    Args:
        table: a list or a dict, whose entry is not read after what is written.
        key: the place in it.

    Example:
        >>> import torch
        >>> table = {"x": torch.zeros(2**19)}
        >>> kept = table["x"][:3]
        >>> written_over(table, "x") is None
        True
        >>> del kept
        >>> written_over(table, "x").shape
        torch.Size([524288])
    """
    if not _plain(table[key]) or _holders(table, key) != _ALONE:
        return None
    found: Tensor = table[key].detach()  # who has a weak reference sees that the other one is gone
    return found


def _plain(x: object) -> bool:
    return type(x) is Tensor and large(x) and x.is_contiguous() and not x.requires_grad


def _holders(table: Any, key: Any) -> tuple[int, int, int, int]:
    """Counts of references to a tensor in a table, to what is behind it, and to its storage."""
    storage = table[key].untyped_storage()
    return (
        sys.getrefcount(table[key]),
        table[key]._use_count(),
        torch._C._storage_Use_Count(storage._cdata),
        sys.getrefcount(storage),
    )


# As this interpreter and this torch count.
_ALONE = _holders({0: torch.empty(1, device="cpu")}, 0)
