# SPDX-License-Identifier: Apache-2.0
"""How many bytes a piece of work has alive, and at most, on any device."""

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Gauge(Protocol):
    """Bytes that are alive, of what was made within its with statements."""

    live: int
    peak: int  # the most since the latest with statement began

    def __enter__(self) -> object: ...
    def __exit__(self, *error: Any) -> object: ...


def gauge(device: torch.device) -> Gauge:
    """The allocator's own count on CUDA, elsewhere a count of storages."""
    return Allocated(device) if device.type == "cuda" else Live()


class Allocated:
    """By the statistics of CUDA's caching allocator, whose peak it resets."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._base = device, 0
        self.live = self.peak = 0

    def __enter__(self) -> "Allocated":
        self._base = torch.cuda.memory_allocated(self._device) - self.live
        torch.cuda.reset_peak_memory_stats(self._device)
        return self

    def __exit__(self, *_: object) -> None:
        self.live = torch.cuda.memory_allocated(self._device) - self._base
        self.peak = torch.cuda.max_memory_allocated(self._device) - self._base


class Live(TorchDispatchMode):
    """By the storages that operators return, until nobody refers to them."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()  # storages that are alive, made here or brought in

    def __enter__(self) -> "Live":
        self.peak = self.live
        super().__enter__()
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        self._note((args, kwargs), made=False)
        result = func(*args, **(kwargs or {}))
        self._note(result, made=True)
        self.peak = max(self.peak, self.live)
        return result

    def _note(self, tree: object, *, made: bool) -> None:
        for x in pytree.tree_leaves(tree):
            if not isinstance(x, Tensor):
                continue
            storage = x.untyped_storage()
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                count = storage.nbytes() if made else 0
                self.live += count
                weakref.finalize(storage, self._gone, storage._cdata, count).atexit = False

    def _gone(self, key: int, count: int) -> None:
        self._known.discard(key)
        self.live -= count
