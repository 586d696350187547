# SPDX-License-Identifier: Apache-2.0
"""Multistep sampling from a consistency model."""

from dataclasses import dataclass

from gradsampler import _checks
from gradsampler.elementary import Coefficient, sqrt, square
from gradsampler.engine.program import Affine, Recorder
from gradsampler.solvers.base import Solver, check_amounts


@dataclass(frozen=True)
class Consistency(Solver):
    """Adds new noise of the next level to each prediction of a consistency model.

    Song et al. 2023, arXiv 2303.01469, algorithm 1; with sigma_min = 0 the sampler of latent
    consistency models (Luo et al. 2023, arXiv 2310.04378).

    It solves no differential equation, and does not converge with more steps. It is for networks
    whose prediction is a sample.

    Args:
        sigma_min: the level that the predictions have, in VE coordinates.
        s_noise: factor of the injected noise.
    """

    stochastic = True
    sigma_min: float = 0.0
    s_noise: Coefficient = 1.0

    def __post_init__(self) -> None:
        _checks.finite("lcm: sigma_min", self.sigma_min, 0.0)
        check_amounts(self, "lcm", "s_noise")

    @property
    def flow(self) -> bool:
        return self.sigma_min == 0

    def step(self, run: Recorder, x: Affine, s: Coefficient, t: Coefficient) -> Affine:
        _, denoised = run.denoise(x, s)
        if t <= self.sigma_min:
            return run.coordinates.alpha(t) * denoised
        up = sqrt(square(t) - square(self.sigma_min))
        return run.coordinates.alpha(t) * denoised + self.s_noise * up * run.noise()
