# SPDX-License-Identifier: Apache-2.0
"""The noise that a pipeline draws itself, as a source of noise that can be asked again."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradsampler.engine.replay import RandomState
from gradsampler.integrations.diffusers.rehearsal import Draw
from gradsampler.noise.sources import Cotangent, NoiseSource

__all__ = ["Drawn"]


class Drawn(NoiseSource):
    """Draws from the pipeline's own generators, in the pipeline's order, to the same numbers.

    The state of the generators before each draw is remembered, so a second call with the same step
    draws the same and leaves the generators where they were. Noise that the scheduler draws and
    does not use is drawn as well.

    Args:
        draws: by turn and number, the calls of `torch.randn` that make up each noise, in order.
        device: one of the kind whose default generators may be drawn from.
    """

    def __init__(
        self, draws: Mapping[tuple[int, int], Sequence[Draw]], device: torch.device
    ) -> None:
        self._draws = draws
        self._pending = list(draws)
        self._device = device
        generators = {
            id(g): g
            for group in draws.values()
            for draw in group
            if (g := draw.kwargs.get("generator")) is not None
        }
        self._generators = list(generators.values())
        self._before: dict[tuple[int, int], RandomState] = {}

    @property
    def of_z0(self) -> bool:
        return False

    @torch.no_grad()
    def at(self, z0: Tensor, step: int, num_steps: int, draw: int = 0) -> Tensor:
        key = step, draw
        if key in self._before:
            now = self._now()
            self._before[key].restore()
            noise = self._made(key, z0)
            now.restore()
            return noise
        while True:
            pending = self._pending.pop(0)
            self._before[pending] = self._now()
            noise = self._made(pending, z0)
            if pending == key:
                return noise

    def transpose(self, g: Tensor, z0: Tensor, step: int, num_steps: int, draw: int = 0) -> Cotangent:
        return Cotangent(None, {})

    def _now(self) -> RandomState:
        return RandomState(self._device, generators=self._generators)

    def _made(self, key: tuple[int, int], z0: Tensor) -> Tensor:
        parts: list[Any] = [torch.randn(d.shape, **d.kwargs) for d in self._draws[key]]
        return torch.cat(parts).to(z0).view(z0.shape)
