# SPDX-License-Identifier: Apache-2.0
"""States of a device in the host's memory."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_AHEAD = 2  # copies to the host that may be under way


class Host:
    """States in one block of pinned memory, copied on a stream of their own.

    A state's memory on the device is used again only behind its copy: the stream of the run waits
    for a copy before it lets go of the state. So the host may run ahead without the device's memory
    growing. Backward copies one state while the model works on the one after it.

    Args:
        count: the number of states.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._block: Tensor | None = None  # [count, B, *state] on the host
        self._device = torch.device("cpu")
        self._module: Any = None  # torch.cuda or its like
        self._stream: Any = None
        self._leaving: deque[tuple[Any, Tensor]] = deque()  # end of the copy, state
        self._coming: dict[int, tuple[Any, Tensor]] = {}

    def save(self, index: int, x: Tensor) -> None:
        """Starts the copy of the state of evaluation ``index``."""
        if self._block is None:
            pinned = x.device.type != "cpu"
            self._block = torch.empty((self._count, *x.shape), dtype=x.dtype, pin_memory=pinned)
            self._device, self._module = x.device, torch.get_device_module(x.device)
            self._stream = self._module.Stream(x.device)
        while len(self._leaving) >= _AHEAD:
            self._wait(self._leaving.popleft()[0])
        self._leaving.append((self._copied(self._block[index], x), x))

    def load(self, index: int) -> Tensor:
        """Returns a state, and starts the copy of the one before it."""
        if index not in self._coming:
            self._coming[index] = self._fetched(index)
        event, x = self._coming.pop(index)
        self._wait(event)
        if index > 0:
            self._coming[index - 1] = self._fetched(index - 1)
        return x

    def release(self) -> list[Tensor]:
        """Hands the block over to autograd, behind the copies that are under way."""
        for event, _ in (*self._leaving, *self._coming.values()):
            self._wait(event)
        self._leaving.clear()
        self._coming.clear()
        block, self._block = self._block, None
        return [] if block is None else [block]

    def adopt(self, tensors: Sequence[Tensor]) -> None:
        """Takes the block back."""
        (self._block,) = tensors

    def _wait(self, event: Any) -> None:
        self._module.current_stream(self._device).wait_event(event)

    def _fetched(self, index: int) -> tuple[Any, Tensor]:
        assert self._block is not None
        x = torch.empty(self._block.shape[1:], dtype=self._block.dtype, device=self._device)
        return self._copied(x, self._block[index]), x

    def _copied(self, target: Tensor, source: Tensor) -> Any:
        """Copies behind all that the run's stream was given so far; returns the end's event."""
        self._stream.wait_stream(self._module.current_stream(self._device))
        with self._module.stream(self._stream):
            target.copy_(source, non_blocking=True)
            event = self._module.Event()
            event.record(self._stream)
        return event
