# SPDX-License-Identifier: Apache-2.0
"""The noise that a scheduler draws: asked for again, and replaced by that of another source."""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gradsampler.integrations.diffusers.glue import Glue
from gradsampler.integrations.diffusers.rehearsal import Draw, without_generator
from gradsampler.noise.sources import Cotangent, Injected, NoiseSource, name_of
from gradsampler.repetition import RandomState

__all__ = ["Drawn", "replaced"]


class Drawn(NoiseSource):
    """Draws from the pipeline's own generators, in the pipeline's order, to the same numbers.

    The state of the generators before each draw is remembered, so asking again for the same noise
    draws the same and leaves the generators where they were. Noise that the scheduler draws and
    does not use is drawn as well.

    Args:
        draws: by turn and number, all draws of the run in order.
        device: one of the kind whose default generators may be drawn from.
    """

    def __init__(self, draws: Mapping[Injected, Draw], device: torch.device) -> None:
        self._draws = draws
        self._pending = list(draws)
        self._device = device
        every = [g for draw in draws.values() for g in _listed(draw.generator)]
        self._generators = list({id(g): g for g in every}.values())
        self._before: dict[Injected, RandomState] = {}

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

    def transpose(
        self, g: Tensor, z0: Tensor, step: int, num_steps: int, draw: int = 0
    ) -> Cotangent:
        return Cotangent(None, {})

    def _now(self) -> RandomState:
        return RandomState(self._device, generators=self._generators)

    def _made(self, key: Injected, z0: Tensor) -> Tensor:
        draw = self._draws[key]
        randn: Any = importlib.import_module("diffusers.utils.torch_utils").randn_tensor
        noise: Tensor = randn(
            draw.shape, generator=draw.generator, device=draw.device, dtype=draw.dtype
        )
        return noise.to(z0).view(z0.shape)


def _listed(generator: Any) -> Sequence[torch.Generator]:
    if generator is None:
        return []
    return generator if isinstance(generator, list) else [generator]


def replaced(
    glue: Glue, own: Any, arguments: dict[str, Any], noise: NoiseSource, z0: Tensor, i: int, n: int
) -> Any:
    """Makes step ``i`` of ``n`` with noise from a source in the place of the scheduler's draws.

    Args:
        glue: sees the draws.
        own: the scheduler's step.
        arguments: of the step, by parameter.
        noise: the source.
        z0: [B, *state] what the noise is a function of.
        i, n: number of the step, and how many there are.
    """
    drawn = 0

    def draw(shape: tuple[int, ...], keywords: dict[str, Any]) -> Tensor:
        nonlocal drawn
        x = noise.at(z0, *name_of(i, n, drawn))
        drawn += 1
        return x.to(keywords.get("dtype") or x.dtype).view(shape)

    with glue.drawing(draw):
        return own(**without_generator(arguments))
