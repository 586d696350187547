# SPDX-License-Identifier: Apache-2.0
"""DDIM and DDPM, written in VE coordinates: x = x_vp * sqrt(1 + sigma^2).

With abar = 1/(1 + sigma^2) dividing the VP update by sqrt(abar) of its target level gives a VE
update whose coefficients depend on the two levels alone.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradsampler import _checks
from gradsampler.engine.program import Affine, Recorder
from gradsampler.solvers.base import Solver


@dataclass(frozen=True)
class DDIM(Solver):
    """DDIM (Song, Meng and Ermon 2021, arXiv 2010.02502, equations 12 and 16).

    Args:
        eta: 0 is deterministic, 1 has the variance of DDPM.
        s_noise: factor of the injected noise.
    """

    stochastic: ClassVar[bool] = True
    eta: float = 0.0
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        if _checks.finite("ddim: eta", self.eta, 0.0) > 1:
            _checks.fail("ddim: eta", "be at most 1", self.eta)
        _checks.finite("ddim: s_noise", self.s_noise, 0.0)

    def step(self, run: Recorder, x: Affine, s: Tensor, t: Tensor) -> Affine:
        x, denoised = run.denoise(x, s)
        epsilon = (x - denoised) / s
        if t == 0:
            return denoised
        if self.eta == 0:
            return denoised + t * epsilon
        ratio = t / s
        up = self.eta * ratio * torch.sqrt(s**2 - t**2)
        along = t * torch.sqrt(1 - self.eta**2 * (1 - ratio**2))
        return denoised + along * epsilon + self.s_noise * up * run.noise()


@dataclass(frozen=True)
class DDPM(Solver):
    """Ancestral sampling of the DDPM posterior (Ho et al. 2020, arXiv 2006.11239, equations 6, 7).

    Args:
        variance: "fixed_small" is the posterior variance, "fixed_large" is beta of the step.
        s_noise: factor of the injected noise.
    """

    stochastic: ClassVar[bool] = True
    variance: str = "fixed_small"
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        _checks.choice("ddpm: variance", self.variance, ("fixed_small", "fixed_large"))
        _checks.finite("ddpm: s_noise", self.s_noise, 0.0)

    def step(self, run: Recorder, x: Affine, s: Tensor, t: Tensor) -> Affine:
        x, denoised = run.denoise(x, s)
        if t == 0:
            return denoised
        ratio = (t / s) ** 2
        spread = torch.sqrt(s**2 - t**2)
        # In units of abar(t): beta is (s^2-t^2)(1+t^2)/(1+s^2), the posterior variance
        # (s^2-t^2)t^2/s^2.
        up = torch.sqrt(ratio if self.variance == "fixed_small" else (1 + t**2) / (1 + s**2))
        return denoised + ratio * (x - denoised) + self.s_noise * up * spread * run.noise()
