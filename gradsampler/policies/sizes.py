# SPDX-License-Identifier: Apache-2.0
"""Gradients whose size is changed on the way."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsampler import _checks
from gradsampler.engine.policy import Policy

Numbers = float | tuple[float, ...]  # one, or one a step


@dataclass(frozen=True)
class ScaledCotangent(Policy):
    """Multiplies the cotangent of the state at each step: not the gradient of the run.

    The gradient with respect to the state at a step's first model call is multiplied by ``factor``
    before it goes on to earlier steps. A factor below 1 reduces the influence of early steps, and
    the gradients to z0 and to their noises.

    Args:
        factor: a number of at least 0, or [N], one a step.
    """

    factor: Numbers
    reshapes = True

    def __init__(self, factor: float | Sequence[float]) -> None:
        object.__setattr__(self, "factor", _numbers("ScaledCotangent: factor", factor))

    def placed(self, num_steps: int) -> "ScaledCotangent":
        return ScaledCotangent(_by_step("ScaledCotangent: factor", self.factor, num_steps))

    def passes(self, step: int, lam: Tensor) -> Tensor:
        return _at(self.factor, step) * lam


@dataclass(frozen=True)
class ClippedCotangent(Policy):
    """Bounds the norm of the cotangent of the state at each step: not the gradient of the run.

    The gradient with respect to the state at a step's first model call is scaled down to a norm of
    at most ``norm``, sample by sample, before it goes on to earlier steps. A gradient that never
    exceeds the bound is exact.

    Args:
        norm: a number of at least 0, or [N], one a step.
    """

    norm: Numbers
    reshapes = True

    def __init__(self, norm: float | Sequence[float]) -> None:
        object.__setattr__(self, "norm", _numbers("ClippedCotangent: norm", norm))

    def placed(self, num_steps: int) -> "ClippedCotangent":
        return ClippedCotangent(_by_step("ClippedCotangent: norm", self.norm, num_steps))

    def passes(self, step: int, lam: Tensor) -> Tensor:
        wide = lam.to(torch.promote_types(lam.dtype, torch.float32)).flatten(1)
        size = torch.linalg.vector_norm(wide, dim=1)
        most = _at(self.norm, step)
        factor = torch.where(size > most, most / size, torch.ones_like(size))
        return lam * factor.to(lam.dtype).view(-1, *[1] * (lam.ndim - 1))


def _numbers(name: str, given: object) -> Numbers:
    if isinstance(given, Sequence) and not isinstance(given, str):
        return tuple(_checks.finite(f"{name}[{k}]", x, 0.0) for k, x in enumerate(given))
    return _checks.finite(name, given, 0.0)


def _by_step(name: str, numbers: Numbers, num_steps: int) -> Numbers:
    if isinstance(numbers, tuple) and len(numbers) != num_steps:
        _checks.fail(name, f"hold one number a step, {num_steps}", len(numbers))
    return numbers


def _at(numbers: Numbers, step: int) -> float:
    return numbers[step] if isinstance(numbers, tuple) else numbers
