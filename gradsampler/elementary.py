# SPDX-License-Identifier: Apache-2.0
"""The elementary functions of a number that is a float or a 0-d tensor.

A recipe written with them runs on tensors, through which gradients flow, and on floats alike.
"""

import math

import torch
from torch import Tensor

Coefficient = float | Tensor  # a tensor is float64 and may carry a gradient to the levels


def exp(x: Coefficient) -> Coefficient:
    """e^x."""
    return torch.exp(x) if isinstance(x, Tensor) else math.exp(x)


def expm1(x: Coefficient) -> Coefficient:
    """e^x - 1, to full accuracy also near 0."""
    return torch.expm1(x) if isinstance(x, Tensor) else math.expm1(x)


def log(x: Coefficient) -> Coefficient:
    """The natural logarithm."""
    return torch.log(x) if isinstance(x, Tensor) else math.log(x)


def sqrt(x: Coefficient) -> Coefficient:
    """The square root."""
    return torch.sqrt(x) if isinstance(x, Tensor) else math.sqrt(x)


def as_float(x: Coefficient) -> float:
    """The number itself, without what it depends on."""
    return float(x.item()) if isinstance(x, Tensor) else x
