# SPDX-License-Identifier: Apache-2.0
"""Multistep sampling from a consistency model."""

from dataclasses import dataclass
from typing import ClassVar

from gradsampler import _checks
from gradsampler.elementary import Coefficient, sqrt, square
from gradsampler.engine.program import Affine, Recorder
from gradsampler.solvers.base import Solver


@dataclass(frozen=True)
class Consistency(Solver):
    """The prediction of a consistency model, noised anew to the next level.

    Song et al. 2023, arXiv 2303.01469, algorithm 1; with sigma_min = 0 the sampler of latent
    consistency models (Luo et al. 2023, arXiv 2310.04378).

    It solves no differential equation, and with more steps converges to nothing: it is for networks
    whose prediction is a sample.

    Args:
        sigma_min: the level that the predictions have, in VE coordinates.
        s_noise: factor of the injected noise.
    """

    stochastic: ClassVar[bool] = True
    sigma_min: float = 0.0
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        _checks.finite("lcm: sigma_min", self.sigma_min, 0.0)
        _checks.finite("lcm: s_noise", self.s_noise, 0.0)

    @property
    def flow(self) -> bool:  # type: ignore[override]
        return self.sigma_min == 0

    def step(self, run: Recorder, x: Affine, s: Coefficient, t: Coefficient) -> Affine:
        _, denoised = run.denoise(x, s)
        if t <= self.sigma_min:
            return run.coordinates.alpha(t) * denoised
        up = sqrt(square(t) - square(self.sigma_min))
        return run.coordinates.alpha(t) * denoised + self.s_noise * up * run.noise()
