# SPDX-License-Identifier: Apache-2.0
"""How many bytes a piece of work has alive, and at most, on any device."""

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor
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
        # The storages that are alive, made here or brought in, by identity.
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __enter__(self) -> "Live":
        self.peak = self.live
        super().__enter__()
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        self._note((args, *kwargs.values()), made=False)
        result = func(*args, **kwargs)
        self._note(result, made=True)
        self.peak = max(self.peak, self.live)
        return result

    def _note(self, tree: object, *, made: bool) -> None:
        if isinstance(tree, (list, tuple)):
            for each in tree:
                self._note(each, made=made)
        elif isinstance(tree, Tensor):
            storage = tree.untyped_storage()
            key = storage._cdata
            if key not in self._known:
                count = storage.nbytes() if made else 0
                self.live += count
                self._known[key] = weakref.ref(storage, lambda _: self._gone(key, count))

    def _gone(self, key: int, count: int) -> None:
        del self._known[key]
        self.live -= count
