# SPDX-License-Identifier: Apache-2.0
"""How much autograd keeps of a model call, counted while it is made."""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn


class Saved(AbstractContextManager["Saved"]):
    """Counts what autograd saves while it is on: each storage once, parameters and leaves never.

    Args:
        known: tensors that exist anyway.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        self._known = {address(x) for x in known}
        self._sizes: dict[int, int] = {}  # by address; what is saved stays where it is
        self._leaves: set[int] = set()
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def __enter__(self) -> "Saved":
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)

    @property
    def total(self) -> int:
        """Bytes that were saved."""
        return sum(self._sizes.values())

    def beside(self, tensors: Sequence[Tensor]) -> int:
        """Bytes that were saved, without those of ``tensors``."""
        others = {address(x) for x in tensors}
        return sum(n for address, n in self._sizes.items() if address not in others)

    def has(self, x: Tensor) -> bool:
        """Whether the tensor's memory is among what was saved."""
        return address(x) in self._sizes or address(x) in self._leaves

    def _pack(self, x: Tensor) -> tuple[Tensor, int]:
        source = x if x._base is None else x._base
        if isinstance(source, nn.Parameter) or (source.is_leaf and source.requires_grad):
            self._leaves.add(address(x))
        elif address(x) not in self._known:
            self._sizes[address(x)] = _storage(x).nbytes()
        # An output of its own graph would keep that alive: it goes without.
        return x.detach(), x._version


def _unpack(packed: tuple[Tensor, int]) -> Tensor:
    # With hooks torch itself no longer looks whether what it saved was changed in place.
    x, version = packed
    if x._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: a tensor of shape {list(x.shape)} that the denoiser's backward reads"
        )
    return x


def address(x: Tensor) -> int:
    """Where the tensor's memory begins."""
    return _storage(x).data_ptr()


def _storage(x: Tensor) -> torch.UntypedStorage:
    """The tensor's memory; of a DTensor that of this rank's part."""
    part: Tensor = getattr(x, "_local_tensor", x)  # which to_local would record
    return part.untyped_storage()
