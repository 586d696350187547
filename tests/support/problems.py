# SPDX-License-Identifier: Apache-2.0
"""Data distributions whose exact denoiser, and partly whose ODE solution, is known in closed form.

In VE coordinates the state at level s is ``x = x0 + s*e``, in flow time ``x = (1-s)*x0 + s*e``.
Every ``denoise`` takes (x [B, *state], sigma [B] or 0-d) and gives E[x0 | x].
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


def column(sigma, x: Tensor) -> Tensor:
    """``sigma`` [B] or 0-d in the shape that multiplies x [B, *state]."""
    sigma = torch.as_tensor(sigma, dtype=x.dtype)
    return sigma.view(-1, *[1] * (x.ndim - 1)) if sigma.ndim else sigma


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers, the same each time and, to rounding, in each dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


class Gaussian(NamedTuple):
    """Independent data of N(mean, std^2): all is linear, and the ODE has a closed solution."""

    mean: float = 0.0
    std: float = 0.5

    def denoise(self, x: Tensor, sigma) -> Tensor:
        """``(c^2 x + s^2 mu) / (c^2 + s^2)``."""
        variance, s2 = self.std**2, column(sigma, x) ** 2
        return (variance * x + s2 * self.mean) / (variance + s2)

    def ode(self, x: Tensor, s: float, t: float) -> Tensor:
        """The solution at level t of the VE ODE through x at level s."""
        return self.mean + (x - self.mean) * (math.hypot(self.std, t) / math.hypot(self.std, s))

    def velocity(self, x: Tensor, t) -> Tensor:
        """E[e - x0 | x_t = x], also at t = 0, from the joint covariances of x_t with e and x0."""
        t = column(t, x)
        variance = ((1 - t) * self.std) ** 2 + t**2
        gain = (t - (1 - t) * self.std**2) / variance
        return gain * (x - (1 - t) * self.mean) - self.mean

    def flow_ode(self, x: Tensor, s: float, t: float) -> Tensor:
        """The solution at time t of the flow ODE through x at time s: quantiles are kept."""
        ratio = math.hypot((1 - t) * self.std, t) / math.hypot((1 - s) * self.std, s)
        return (1 - t) * self.mean + (x - (1 - s) * self.mean) * ratio


class Mixture:
    """Blobs of standard deviation ``std`` about random centres: a curved, coupled denoiser."""

    def __init__(self, size: int, blobs: int = 4, std: float = 0.6, seed: int = 0) -> None:
        self.centres = normal(blobs, size, seed=seed)
        self.std = std

    def posterior(self, x: Tensor, a, b) -> Tensor:
        """E[x0 | a*x0 + b*e = x]: each blob's own, weighted with the blob's responsibility."""
        flat = x.flatten(1)
        centres = self.centres.to(x.dtype)
        a, b = column(a, flat), column(b, flat)
        total = (a * self.std) ** 2 + b**2
        blobs = a[..., None] * centres  # [1 or B, blobs, size]
        distance = ((flat[:, None] - blobs) ** 2).sum(-1)
        share = torch.softmax(-distance / (2 * total), dim=-1)
        centre = (share[..., None] * centres).sum(1)
        return ((a * self.std**2 * flat + b**2 * centre) / total).view(x.shape)

    def denoise(self, x: Tensor, sigma) -> Tensor:
        """E[x0 | x] in VE coordinates."""
        return self.posterior(x, 1.0, sigma)

    def epsilon(self, x: Tensor, sigma) -> Tensor:
        """E[e | x] in VE coordinates."""
        return (x - self.denoise(x, sigma)) / column(sigma, x)

    def v(self, x: Tensor, sigma) -> Tensor:
        """E[a*e - b*x0 | x], a = 1/sqrt(1+s^2), b = s*a: the v of VP, x in VE coordinates."""
        s = column(sigma, x)
        return (self.epsilon(x, sigma) - s * self.denoise(x, sigma)) / torch.sqrt(1 + s**2)

    def velocity(self, x: Tensor, t) -> Tensor:
        """E[e - x0 | x_t = x] in flow time, t > 0."""
        t = torch.as_tensor(t, dtype=x.dtype)
        return (x - self.posterior(x, 1 - t, t)) / column(t, x)
