# SPDX-License-Identifier: Apache-2.0
"""Penalties that keep optimised noise close to standard normal, as the denoiser expects it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsampler import _checks

__all__ = ["ChiNorm", "Probability", "Sphere"]


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


@dataclass(frozen=True)
class Probability:
    """How improbable the noise is as standard normal, by two concentration inequalities.

    The elements of a sample are put in a random order and cut into m vectors of k. For standard
    normal noise the norm M1 of their mean and the spectral norm M2 of their second moment less the
    identity exceed a value with probability at most

        log p1 = log 2 - m M1^2 / (2 k)
        log p2 = log 2 - m max(sqrt(1 + M2) - 1 - sqrt(k / m), 0)^2 / 2,

    and 0 at most (Wainwright 2019, High-dimensional statistics, example 2.11 and theorem 6.1). The
    penalty is ``-weight * mean(log p1 + log p2)`` over orders and samples: 0 for noise as it should
    be. Tang et al. 2024, "Inference-time alignment of diffusion models with direct noise
    optimization", arXiv 2405.18881, section 4.

    Args:
        weight: factor of the penalty.
        size: k, elements of a vector.
        orders: how many random orders; the same at each call, so that the penalty is a function.
        seed: of the orders.

    Example:
        >>> import torch, gradsampler as gs
        >>> penalty = gs.regularizers.Probability()
        >>> z0 = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(0))
        >>> float(penalty(z0)) < 0.1, float(penalty(1.5 * z0)) > 10
        (True, True)
    """

    weight: float = 1.0
    size: int = 4
    orders: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        _checks.finite("Probability: weight", self.weight, 0.0)
        _checks.integer("Probability: size", self.size, 1)
        _checks.integer("Probability: orders", self.orders, 1)
        _checks.integer("Probability: seed", self.seed, 0)

    def __call__(self, z0: Tensor) -> Tensor:
        """The penalty of z0 [B, *state], a 0-d tensor."""
        flat, k = z0.flatten(1), self.size
        m = flat.shape[1] // k
        if m < 2:
            _checks.fail(
                "Probability: z0", f"hold at least {2 * k} elements a sample", flat.shape[1]
            )
        generator = torch.Generator().manual_seed(self.seed)
        total = flat.new_zeros(())
        for _ in range(self.orders):
            order = torch.randperm(flat.shape[1], generator=generator)[: m * k]
            vectors = flat[:, order.to(flat.device)].view(-1, m, k)
            mean = vectors.mean(1).square().sum(1)  # M1^2
            moment = vectors.mT @ vectors / m
            spread = torch.linalg.matrix_norm(
                moment - torch.eye(k, dtype=flat.dtype, device=flat.device), ord=2
            )
            beyond = (torch.sqrt(1 + spread) - 1 - math.sqrt(k / m)).clamp_min(0)
            first = (math.log(2) - m * mean / (2 * k)).clamp_max(0)
            second = (math.log(2) - m * beyond.square() / 2).clamp_max(0)
            total = total - (first + second).mean()
        return self.weight * total / self.orders


@dataclass(frozen=True)
class Sphere:
    """The projection to the sphere of radius sqrt(d), near which standard normal noise lies.

    For ``projection=`` of an optimisation: applied to z0 after each update, as in DOODL (Wallace et
    al. 2023, arXiv 2303.13703, algorithm 1).

    Example:
        >>> import torch, gradsampler as gs
        >>> gs.regularizers.Sphere()(torch.tensor([[3.0, 4.0]])).square().mean()
        tensor(1.)
    """

    def __call__(self, z0: Tensor) -> Tensor:
        """z0 [B, *state] with each sample scaled to mean square 1."""
        flat = z0.flatten(1)
        scale = math.sqrt(flat.shape[1]) / flat.norm(dim=1)
        return z0 * scale.view(-1, *[1] * (z0.ndim - 1))
