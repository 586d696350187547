# SPDX-License-Identifier: Apache-2.0
"""The functions of exponential integrators."""

import math

import torch
from torch import Tensor

# Below this the closed forms cancel; the Taylor series is then exact to rounding.
_NEAR_ZERO = 0.5
_ORDER = 18


def phi1(z: Tensor) -> Tensor:
    """(e^z - 1)/z, for 0-d float64 z, to full accuracy also near 0."""
    return torch.expm1(z) / z if abs(z.item()) > _NEAR_ZERO else _series(z, 1)


def phi2(z: Tensor) -> Tensor:
    """(phi1(z) - 1)/z, for 0-d float64 z, to full accuracy also near 0."""
    return (phi1(z) - 1) / z if abs(z.item()) > _NEAR_ZERO else _series(z, 2)


def _series(z: Tensor, k: int) -> Tensor:
    """Taylor series of phi_k, sum of z^n / (n+k)!, by Horner's rule."""
    total = torch.full_like(z, 1 / math.factorial(_ORDER + k))
    for n in reversed(range(_ORDER)):
        total = total * z + 1 / math.factorial(n + k)
    return total
