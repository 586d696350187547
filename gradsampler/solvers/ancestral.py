# SPDX-License-Identifier: Apache-2.0
"""Ancestral sampling: a deterministic step to a lower level, then noise back up."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradsampler import _checks
from gradsampler.engine.program import Affine, Recorder
from gradsampler.solvers.base import Solver


def ancestral_levels(s: Tensor, t: Tensor, eta: float) -> tuple[Tensor, Tensor | None]:
    """The level to step down to and the amount of noise to add (k-diffusion).

    ``up = min(t, eta * (t/s) * sqrt(s^2 - t^2))``, ``down = sqrt(t^2 - up^2)``; at ``t = 0`` or
    ``eta = 0`` nothing is injected and the amount is None, since roots of 0 have no gradient.
    """
    if eta == 0 or t == 0:
        return t, None
    up = eta * (t / s) * torch.sqrt(s**2 - t**2)
    if up >= t:
        return torch.zeros_like(t), t
    return torch.sqrt(t**2 - up**2), up


@dataclass(frozen=True)
class EulerAncestral(Solver):
    """Euler's method with ancestral noise, as in k-diffusion.

    Args:
        eta: share of ancestral noise; 0 is Euler's method.
        s_noise: factor of the injected noise.
    """

    stochastic: ClassVar[bool] = True
    eta: float = 1.0
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        _checks.finite("euler_ancestral: eta", self.eta, 0.0)
        _checks.finite("euler_ancestral: s_noise", self.s_noise, 0.0)

    def step(self, run: Recorder, x: Affine, s: Tensor, t: Tensor) -> Affine:
        x, denoised = run.denoise(x, s)
        down, up = ancestral_levels(s, t, self.eta)
        x = x + (down - s) * ((x - denoised) / s)
        return x if up is None else x + self.s_noise * up * run.noise()
