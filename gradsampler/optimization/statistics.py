# SPDX-License-Identifier: Apache-2.0
"""Running statistics: the buffers of networks that change in the course of an optimisation."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gradsampler.engine.trajectory import version
from gradsampler.optimization.identity import Identity


class RunningStatistics:
    """The buffers of the modules in a dict of arguments, as they are now."""

    def __init__(self, arguments: Identity) -> None:
        self._parts = {
            f"{place}.{inner}".strip("."): part
            for place, module in arguments.modules.items()
            for inner, part in module.named_modules()
        }
        self._before = {name: _state(part) for name, part in self._parts.items()}

    def changed(self) -> dict[str, Tensor]:
        """Copies of the buffers of those modules of which one was changed since, by name."""
        # A kernel that updates running statistics need not say so: a counter beside them does.
        parts = {name: x for name, x in self._parts.items() if _state(x) != self._before[name]}
        return {
            f"{name}.{each}": buffer.detach().clone()
            for name, part in parts.items()
            for each, buffer in part.named_buffers(recurse=False)
        }

    @torch.no_grad()
    def restore(self, saved: Mapping[str, Tensor]) -> None:
        """Gives buffers the values that ``changed`` returned."""
        for name, value in saved.items():
            place, _, each = name.rpartition(".")
            self._parts[place].get_buffer(each).copy_(value)


def _state(part: nn.Module) -> list[tuple[int, int]]:
    return [(id(x), version(x)) for x in part.buffers(recurse=False)]
