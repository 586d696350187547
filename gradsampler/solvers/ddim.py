# SPDX-License-Identifier: Apache-2.0
"""DDIM and DDPM, in any coordinates.

Their formulas are those of VP coordinates, where alpha^2 + sigma^2 = 1. Divided by alpha of the
target level they hold in all: only the ratio of the two levels' sigma/alpha is in them.
"""

from dataclasses import dataclass
from typing import ClassVar

from gradsampler import _checks
from gradsampler.elementary import Coefficient, sqrt, square
from gradsampler.engine.program import Affine, Recorder
from gradsampler.solvers.base import Solver
from gradsampler.solvers.exponential import epsilon, renoising_step


@dataclass(frozen=True)
class DDIM(Solver):
    """DDIM (Song, Meng and Ermon 2021, arXiv 2010.02502, equations 12 and 16).

    Args:
        eta: 0 is deterministic, 1 has the variance of DDPM.
        s_noise: factor of the injected noise.
    """

    stochastic: ClassVar[bool] = True
    flow = True
    ode_order = 1
    weak_order = 1
    eta: float = 0.0
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        if _checks.finite("ddim: eta", self.eta, 0.0) > 1:
            _checks.fail("ddim: eta", "be at most 1", self.eta)
        _checks.finite("ddim: s_noise", self.s_noise, 0.0)

    def step(self, run: Recorder, x: Affine, s: Coefficient, t: Coefficient) -> Affine:
        x, denoised = run.denoise(x, s)
        return renoising_step(run, x, denoised, s, t, self.eta, self.s_noise)


@dataclass(frozen=True)
class DDPM(Solver):
    """Ancestral sampling of the DDPM posterior (Ho et al. 2020, arXiv 2006.11239, equations 6, 7).

    Args:
        variance: "fixed_small" is the posterior variance, "fixed_large" is beta of the step.
        s_noise: factor of the injected noise.
    """

    stochastic: ClassVar[bool] = True
    weak_order = 1
    variance: str = "fixed_small"
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        _checks.choice("ddpm: variance", self.variance, ("fixed_small", "fixed_large"))
        _checks.finite("ddpm: s_noise", self.s_noise, 0.0)

    @property
    def flow(self) -> bool:  # type: ignore[override]
        return self.variance == "fixed_small"  # beta is that of VP coordinates

    def step(self, run: Recorder, x: Affine, s: Coefficient, t: Coefficient) -> Affine:
        x, denoised = run.denoise(x, s)
        if t == 0:
            return denoised
        alpha = run.coordinates.alpha
        ratio = (t * alpha(s)) / (s * alpha(t))
        x = alpha(t) * denoised + t * ratio * epsilon(run, x, denoised, s)
        up = t * sqrt(1 - square(ratio))
        if self.variance == "fixed_large":
            up = up * sqrt((1 + square(t)) / (1 + square(s))) * s / t
        return x + self.s_noise * up * run.noise()
