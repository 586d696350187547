# SPDX-License-Identifier: Apache-2.0
"""The derivative of a scheduler's table with respect to its noise levels.

Autograd through a scheduler's arithmetic can fail: where the levels end in 0 a root or a logarithm
makes it NaN, and a scheduler that computes with floats on the way loses it. So it is compared with
a difference along a random direction, and where it is another, the derivative is taken by central
differences in float64. These cost a few tables, since a coefficient depends on the levels near its
own turn.
"""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["differentiable"]

Coefficients = Callable[[Tensor], Tensor]  # from levels [L] to coefficients [C]

_STEP = 1e-4  # relative to a level
_LIMIT = 1e-5  # between two derivatives along a direction
_NEAR = 4  # levels beyond those of the turns that a coefficient reads


def differentiable(
    coefficients: Coefficients, levels: Tensor, turns: Sequence[int], reach: int
) -> Tensor:
    """The coefficients at ``levels``, connected to them.

    Args:
        coefficients: from levels [L] to [C], both float64; piecewise smooth.
        levels: [L] requiring grad, at least 0. With respect to a 0 it is the one-sided derivative.
        turns: [C] the turn of each coefficient.
        reach: how many turns back a coefficient reads.

    Returns:
        [C] float64.
    """
    start = levels.detach().to(torch.float64)
    generator = torch.Generator().manual_seed(0)
    direction = start * (torch.rand(len(start), generator=generator, dtype=torch.float64) + 0.5)
    slope = _difference(coefficients, start, direction)
    weights = torch.randn(len(slope), generator=generator, dtype=torch.float64)
    autograd = _by_autograd(coefficients, levels)
    if autograd is not None:
        (pulled,) = torch.autograd.grad(autograd, levels, weights, retain_graph=True)
        finite = bool(torch.isfinite(pulled).all())
        if finite and _close(pulled.to(torch.float64) @ direction, weights @ slope):
            return autograd
    jacobian = _jacobian(coefficients, start, turns, min(len(start), reach + _NEAR))
    if not _close(weights @ (jacobian @ direction), weights @ slope):
        jacobian = _jacobian(coefficients, start, turns, len(start))
    with torch.no_grad():
        value = coefficients(start)
    return value + jacobian @ (levels.to(torch.float64) - start)


def _by_autograd(coefficients: Coefficients, levels: Tensor) -> Tensor | None:
    try:
        with torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a number that loses its gradient, which is seen
            value = coefficients(levels.to(torch.float64))
    except (RuntimeError, TypeError):  # such as a conversion to numpy
        return None
    return value if value.requires_grad else None


def _close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs() <= _LIMIT * (1 + b.abs()))


@torch.no_grad()
def _difference(coefficients: Coefficients, start: Tensor, direction: Tensor) -> Tensor:
    """The derivative along a direction [L], which is no longer than the levels: [C]."""
    step = _STEP * direction
    return (coefficients(start + step) - coefficients(start - step)) / (2 * _STEP)


@torch.no_grad()
def _beyond(coefficients: Coefficients, start: Tensor, unit: Tensor) -> Tensor:
    """The one-sided derivative along a unit vector, of second order; 0 where there is none."""
    step = _STEP * float(start[start > 0].min()) * unit
    near, far = coefficients(start + step), coefficients(start + 2 * step)
    slope = (4 * near - far - 3 * coefficients(start)) / (2 * step.sum())
    return slope.where(slope.isfinite(), 0.0)


def _jacobian(
    coefficients: Coefficients, start: Tensor, turns: Sequence[int], period: int
) -> Tensor:
    """[C, L], with all levels that are ``period`` apart varied at once."""
    jacobian = start.new_zeros(len(turns), len(start))
    rows = torch.arange(len(turns))
    last = torch.tensor(turns) + 2  # the last level that may matter
    for phase in range(period):
        chosen = (torch.arange(len(start)) % period == phase) & (start > 0)
        slope = _difference(coefficients, start, start * chosen)
        # The one level of this phase among the ``period`` that may matter.
        level = last - (last - phase) % period if period < len(start) else last * 0 + phase
        valid = (level >= 0) & (level < len(start))
        level = level.clamp(0, len(start) - 1)
        valid &= chosen[level]
        jacobian[rows[valid], level[valid]] = slope[valid] / start[level[valid]]
    for k in (start == 0).nonzero().flatten().tolist():
        unit = torch.zeros_like(start)
        unit[k] = 1
        jacobian[:, k] = _beyond(coefficients, start, unit)
    return jacobian
