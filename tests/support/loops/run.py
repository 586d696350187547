# SPDX-License-Identifier: Apache-2.0
"""What the loops work with: levels are Python floats, states float64 tensors."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Run:
    """A denoiser, a supply of noises, and how a state is made: alpha x0 + sigma e."""

    denoiser: Callable[[Tensor, float], Tensor]
    noises: Iterator[Tensor]
    flow: bool = False
    unconditional: Callable[[Tensor, float], Tensor] | None = None  # what guidance started from
    calls: list[tuple[Tensor, float]] = field(default_factory=list)
    drawn: int = 0

    def denoise(self, x: Tensor, sigma: float) -> Tensor:
        self.calls.append((x.detach(), sigma))
        return self.denoiser(x, sigma)

    def both(self, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """The prediction and the unconditional one, which is the same without guidance."""
        clean = self.denoise(x, sigma)
        return clean, clean if self.unconditional is None else self.unconditional(x, sigma)

    def draw(self) -> Tensor:
        self.drawn += 1
        return next(self.noises)

    def alpha(self, sigma: float) -> float:
        return 1 - sigma if self.flow else 1.0

    def lam(self, sigma: float) -> float:
        """Half the logarithm of the signal-to-noise ratio."""
        return math.log(self.alpha(sigma) / sigma)

    def sigma(self, lam: float) -> float:
        return 1 / (1 + math.exp(lam)) if self.flow else math.exp(-lam)

    def pure(self, sigma: float) -> bool:
        """Noise alone: lambda is minus infinity, and methods in lambda take their limit."""
        return self.alpha(sigma) == 0


def direct(x: Tensor, clean: Tensor, s: float, t: float) -> Tensor:
    """The step from s to t that keeps the sample and the noise in x as they are predicted."""
    return (t * x + (s - t) * clean) / s
