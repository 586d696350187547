# SPDX-License-Identifier: Apache-2.0
"""Tensors of a device in the host's memory."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gradsampler.engine.trajectory import version
from gradsampler.memory.snapshots import unchanged

_AHEAD = 2  # copies to the host that may be under way


class Copies:
    """Copies between a device and the host, on a stream of their own.

    A tensor's memory on the device is used again only behind its copy: the stream of the run waits
    for a copy before it lets go of the tensor. So the host may run ahead without the device's
    memory growing.
    """

    def __init__(self, device: torch.device, memory: str) -> None:
        self._device, self._memory = device, memory
        self._module: Any = torch.get_device_module(device)  # torch.cuda or its like
        self.stream: Any = self._module.Stream(device)
        self.leaving: deque[tuple[Any, Tensor, int]] = deque()  # end of the copy, tensor, version

    def leave(self, x: Tensor, target: Tensor) -> None:
        """Starts the copy of a tensor to the host; at most two are under way."""
        while len(self.leaving) >= _AHEAD:
            self._gone(*self.leaving.popleft())
        self.leaving.append((self._copied(target, x), x, version(x)))

    def settle(self) -> None:
        """Has the run's stream wait for what is leaving."""
        while self.leaving:
            self._gone(*self.leaving.popleft())

    def come(self, source: Tensor) -> tuple[Any, Tensor]:
        """Starts the copy of a tensor to the device; returns its end and the tensor."""
        x = torch.empty(source.shape, dtype=source.dtype, device=self._device)
        return self._copied(x, source), x

    def wait(self, event: Any) -> None:
        """Has the run's stream wait for the end of a copy."""
        self._module.current_stream(self._device).wait_event(event)

    def finish(self) -> None:
        """Has the run's stream wait for all copies."""
        self._module.current_stream(self._device).wait_stream(self.stream)
        self.leaving.clear()

    def _gone(self, event: Any, x: Tensor, before: int) -> None:
        self.wait(event)
        unchanged(self._memory, x, before)

    def _copied(self, target: Tensor, source: Tensor) -> Any:
        """Copies behind all that the run's stream was given so far; returns the end's event."""
        self.stream.wait_stream(self._module.current_stream(self._device))
        with self._module.stream(self.stream):
            target.copy_(source, non_blocking=True)
            event = self._module.Event()
            event.record(self.stream)
        return event


class Host:
    """The states of a run in one block of pinned memory.

    Backward copies one state while the model works on the one after it.

    Args:
        count: the number of states.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._block: Tensor | None = None  # [count, B, *state] on the host
        self._copies: Copies | None = None
        self._coming: dict[int, tuple[Any, Tensor]] = {}

    def save(self, index: int, x: Tensor) -> None:
        """Starts the copy of the state of evaluation ``index``."""
        if self._copies is None or self._block is None:
            self._block = _pinned((self._count, *x.shape), x)
            self._copies = Copies(x.device, "Offload")
        self._copies.leave(x, self._block[index])

    def load(self, index: int) -> Tensor:
        """Returns a state, and starts the copy of the one before it."""
        assert self._copies is not None
        assert self._block is not None
        if index not in self._coming:
            self._coming[index] = self._copies.come(self._block[index])
        event, x = self._coming.pop(index)
        self._copies.wait(event)
        if index > 0:
            self._coming[index - 1] = self._copies.come(self._block[index - 1])
        return x

    def release(self) -> list[Tensor]:
        """Hands the block over to autograd, behind the copies that are under way."""
        if self._copies is None or self._block is None:
            return []
        self._copies.settle()
        for event, _ in self._coming.values():
            self._copies.wait(event)
        self._coming.clear()
        block, self._block = self._block, None
        return [block]

    def adopt(self, tensors: Sequence[Tensor]) -> None:
        """Takes the block back."""
        (self._block,) = tensors


class Pinned:
    """Single tensors in pinned memory, which torch hands out again once they are dropped.

    Args:
        device: where the tensors come from.
    """

    def __init__(self, device: torch.device) -> None:
        self._copies = Copies(device, "Revolve")

    def put(self, x: Tensor) -> "Block":
        """Starts the copy of a tensor."""
        block = _pinned(x.shape, x)
        self._copies.leave(x, block)
        return Block(self._copies, block)

    def settle(self) -> None:
        """Has the run's stream wait for what is leaving."""
        self._copies.settle()

    def close(self) -> None:
        """Has the run's stream wait for all copies, so that their tensors may go."""
        self._copies.finish()


class Block:
    """A tensor in pinned memory, or on its way there or back."""

    def __init__(self, copies: Copies, block: Tensor) -> None:
        self._copies, self._block = copies, block
        self._coming: tuple[Any, Tensor] | None = None

    def fetch(self) -> None:
        """Starts the copy to the device."""
        if self._coming is None:
            self._coming = self._copies.come(self._block)

    def get(self) -> Tensor:
        """Returns the tensor on the device, behind its copy."""
        self.fetch()
        assert self._coming is not None
        (event, x), self._coming = self._coming, None
        self._copies.wait(event)
        return x

    def drop(self) -> None:
        """Nothing is left to do: the memory goes with this object."""


def _pinned(shape: Sequence[int], like: Tensor) -> Tensor:
    return torch.empty(tuple(shape), dtype=like.dtype, pin_memory=like.device.type != "cpu")
