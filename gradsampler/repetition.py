# SPDX-License-Identifier: Apache-2.0
"""What a repetition needs to come out the same: the states of random generators. And the error
where it comes out otherwise.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class ReplayError(RuntimeError):
    """A recomputed call returned something else than the first time: a gradient would be wrong."""


class Generator(Protocol):
    """What is asked of a torch.Generator."""

    def get_state(self) -> Tensor:
        """The state, on the CPU."""

    def set_state(self, state: Tensor) -> object:
        """Puts the generator into a state."""


class _DeviceDefault:
    """The default generator of a device that is not the CPU."""

    def __init__(self, module: Any, index: int) -> None:
        self._module, self._index = module, index

    def get_state(self) -> Tensor:
        state: Tensor = self._module.get_rng_state(self._index)
        return state

    def set_state(self, state: Tensor) -> None:
        self._module.set_rng_state(state, self._index)


def defaults(device: torch.device) -> list[Generator]:
    """Torch's default generators: the CPU's, then that of each device of one kind."""
    found: list[Generator] = [torch.default_generator]
    if device.type != "cpu":
        module = torch.get_device_module(device)
        found += [_DeviceDefault(module, i) for i in range(module.device_count())]
    return found


class RandomState:
    """The state of generators, and of torch's default ones: the CPU's, then each device's.

    Args:
        device: one of the kind that counts beside the CPU.
        tensors: states saved earlier; None takes those of this moment.
        generators: more generators, of any device.
    """

    def __init__(
        self,
        device: torch.device,
        tensors: list[Tensor] | None = None,
        generators: Sequence[torch.Generator] = (),
    ) -> None:
        self._generators = [*generators, *defaults(device)]
        self.tensors = [g.get_state() for g in self._generators] if tensors is None else tensors

    def restore(self) -> None:
        """Puts the generators into this state."""
        for generator, state in zip(self._generators, self.tensors, strict=True):
            generator.set_state(state)
