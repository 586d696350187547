# SPDX-License-Identifier: Apache-2.0
"""The elementary functions of a number that is a float or a float64 tensor.

A recipe written with them runs on tensors, through which gradients flow, and on floats alike, and
gives the same values to the bit: those of the C library. Torch's own differ in the last digit.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Coefficient = float | Tensor  # a tensor is float64 and may carry a gradient to the levels


def exp(x: Coefficient) -> Coefficient:
    """e^x."""
    return _exact(math.exp, torch.exp(x), x) if isinstance(x, Tensor) else math.exp(x)


def expm1(x: Coefficient) -> Coefficient:
    """e^x - 1, to full accuracy also near 0."""
    return _exact(math.expm1, torch.expm1(x), x) if isinstance(x, Tensor) else math.expm1(x)


def log(x: Coefficient) -> Coefficient:
    """The natural logarithm; -inf at 0."""
    if isinstance(x, Tensor):
        return _exact(math.log, torch.log(x), x)
    return math.log(x) if x != 0 else -math.inf


def sqrt(x: Coefficient) -> Coefficient:
    """The square root."""
    return _exact(math.sqrt, torch.sqrt(x), x) if isinstance(x, Tensor) else math.sqrt(x)


def square(x: Coefficient) -> Coefficient:
    """x^2, rounded once, which a power of floats need not be."""
    return x * x


def as_float(x: Coefficient) -> float:
    """The number itself, without what it depends on."""
    return float(x.item()) if isinstance(x, Tensor) else x


def _exact(function: Callable[[float], float], y: Tensor, x: Tensor) -> Tensor:
    """``y`` with the values of ``function`` at ``x``, and its own gradient.

    The two differ by an ulp, so that their difference is a float and the sum is exact.
    """
    values = torch.tensor([_at(function, v) for v in x.flatten().tolist()], dtype=torch.float64)
    difference = values.view(x.shape).to(x.device) - y.detach()
    return y + difference if bool(torch.isfinite(difference).all()) else y


def _at(function: Callable[[float], float], x: float) -> float:
    try:
        return function(x)
    except (ValueError, OverflowError):  # log(0), sqrt(-1), exp(1e3): torch's inf or NaN stands
        return math.nan
