# SPDX-License-Identifier: Apache-2.0
"""The refined exponential solver (RES), arXiv 2308.02157, in lambda = -ln(sigma)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gradsampler.engine.program import Affine, Recorder
from gradsampler.solvers.base import Solver, half_log_snr
from gradsampler.solvers.exponential import phi1, phi2


def first_order(x: Affine, denoised: Affine, s: Tensor, t: Tensor) -> Affine:
    """The exponential Euler step, exact where D is constant; also right at t = 0."""
    return (t / s) * x + (1 - t / s) * denoised


def second_order(
    x: Affine, denoised: Affine, at_m: Affine, s: Tensor, m: Tensor, t: Tensor
) -> Affine:
    """The step from s to t with D known at s and at m (arXiv 2308.02157, algorithm 1)."""
    start = half_log_snr(s)
    h = half_log_snr(t) - start
    c2 = (half_log_snr(m) - start) / h
    b2 = phi2(-h) / c2
    b1 = phi1(-h) - b2
    return (t / s) * x + h * b1 * denoised + h * b2 * at_m


def predicted_between(
    run: Recorder, x: Affine, denoised: Affine, s: Tensor, t: Tensor
) -> tuple[Tensor, Affine]:
    """The level m = sqrt(s t), and D at the state that an exponential Euler step reaches there."""
    m = torch.sqrt(s * t)
    _, at_m = run.denoise(first_order(x, denoised, s, m), m)
    return m, at_m


@dataclass(frozen=True)
class Res2AB(Solver):
    """Two-step Adams-Bashforth form: the previous step's D is the second point.

    The first step, and a step to level 0, is the exponential Euler step.
    """

    def step(self, run: Recorder, x: Affine, s: Tensor, t: Tensor) -> Affine:
        x, denoised = run.denoise(x, s)
        previous = run.before(s)
        if previous is None or t == 0:
            return first_order(x, denoised, s, t)
        return second_order(x, denoised, previous.value, s, previous.sigma, t)


@dataclass(frozen=True)
class Res2Mid(Solver):
    """Single-step form with the second point at m = sqrt(s t); Euler's step to level 0."""

    def step(self, run: Recorder, x: Affine, s: Tensor, t: Tensor) -> Affine:
        x, denoised = run.denoise(x, s)
        if t == 0:
            return first_order(x, denoised, s, t)
        m, at_m = predicted_between(run, x, denoised, s, t)
        return second_order(x, denoised, at_m, s, m, t)


@dataclass(frozen=True)
class Res2MidStable(Solver):
    """The midpoint form that takes the D of m = sqrt(s t) for the whole step."""

    def step(self, run: Recorder, x: Affine, s: Tensor, t: Tensor) -> Affine:
        x, denoised = run.denoise(x, s)
        if t == 0:
            return first_order(x, denoised, s, t)
        _, at_m = predicted_between(run, x, denoised, s, t)
        return first_order(x, at_m, s, t)
