# SPDX-License-Identifier: Apache-2.0
"""Penalties that keep optimised noise where the denoiser was trained."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsampler import _checks

__all__ = ["ChiNorm"]


@dataclass(frozen=True)
class ChiNorm:
    """Negative log-likelihood of the norm of standard normal noise, a chi distribution.

    ``weight * mean over samples of (r^2/2 - (d-1) ln r) - its least value``, r = |z0|, d the
    elements of a sample; 0 at r = sqrt(d-1). Samuel et al. 2023, arXiv 2306.08687, equation 4;
    ReNO (Eyring et al. 2024, arXiv 2406.04312) optimises with it.

    Example:
        >>> import torch, gradsampler as gs
        >>> z0 = torch.ones(1, 65) * (64 / 65) ** 0.5
        >>> abs(float(gs.regularizers.ChiNorm()(z0))) < 1e-4
        True
    """

    weight: float = 1.0

    def __post_init__(self) -> None:
        _checks.finite("ChiNorm: weight", self.weight, 0.0)

    def __call__(self, z0: Tensor) -> Tensor:
        """The penalty of z0 [B, *state], a 0-d tensor."""
        d = z0[0].numel()
        if d < 2:
            _checks.fail("ChiNorm: z0", "hold at least 2 elements a sample", d)
        energy = z0.flatten(1).square().sum(1)
        least = (d - 1) / 2 * (1 - math.log(d - 1))
        return self.weight * (energy / 2 - (d - 1) / 2 * torch.log(energy) - least).mean()
