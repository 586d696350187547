# SPDX-License-Identifier: Apache-2.0
"""DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095), multistep, ODE and SDE, as in k-diffusion."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradsampler import _checks
from gradsampler.engine.program import Affine, Recorder
from gradsampler.solvers.base import Solver, half_log_snr


@dataclass(frozen=True)
class DPMpp2M(Solver):
    """DPM-Solver++(2M) (algorithm 2); first order on the first step and on a step to level 0."""

    def step(self, run: Recorder, x: Affine, s: Tensor, t: Tensor) -> Affine:
        x, denoised = run.denoise(x, s)
        last = run.before(s)
        if last is not None and t != 0:
            now = half_log_snr(s)
            r = (now - half_log_snr(last.sigma)) / (half_log_snr(t) - now)
            denoised = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * last.value
        return (t / s) * x + (1 - t / s) * denoised


@dataclass(frozen=True)
class DPMpp2MSDE(Solver):
    """SDE-DPM-Solver++(2M) (arXiv 2211.01095, equation 18 and appendix).

    Args:
        eta: 1 is the reverse SDE, 0 the ODE.
        s_noise: factor of the injected noise.
        variant: "midpoint" or "heun", k-diffusion's solver_type.
    """

    stochastic: ClassVar[bool] = True
    eta: float = 1.0
    s_noise: float = 1.0
    variant: str = "midpoint"

    def __post_init__(self) -> None:
        _checks.finite("dpmpp_2m_sde: eta", self.eta, 0.0)
        _checks.finite("dpmpp_2m_sde: s_noise", self.s_noise, 0.0)
        _checks.choice("dpmpp_2m_sde: variant", self.variant, ("midpoint", "heun"))

    def step(self, run: Recorder, x: Affine, s: Tensor, t: Tensor) -> Affine:
        x, denoised = run.denoise(x, s)
        if t == 0:
            return denoised
        now = half_log_snr(s)
        h = half_log_snr(t) - now
        decay = (1 + self.eta) * h
        weight = -torch.expm1(-decay)
        x = torch.exp(-decay) * x + weight * denoised
        last = run.before(s)
        if last is not None:
            r = (now - half_log_snr(last.sigma)) / h
            correction = weight / 2 if self.variant == "midpoint" else 1 - weight / decay
            x = x + correction / r * (denoised - last.value)
        if self.eta > 0:
            amount = t * torch.sqrt(-torch.expm1(-2 * self.eta * h))
            x = x + self.s_noise * amount * run.noise()
        return x
