# SPDX-License-Identifier: Apache-2.0
"""Heun's method and the explicit midpoint method."""

from dataclasses import dataclass

from torch import Tensor

from gradsampler.engine.program import Affine, Recorder
from gradsampler.solvers.base import Solver


@dataclass(frozen=True)
class Heun(Solver):
    """Heun's method on dx/ds = (x - D)/s (Karras et al. 2022, algorithm 1).

    A step to level 0, where the second slope is undefined, is Euler's.
    """

    flow = True

    def step(self, run: Recorder, x: Affine, s: Tensor, t: Tensor) -> Affine:
        x, denoised = run.denoise(x, s)
        slope = (x - denoised) / s
        ahead = x + (t - s) * slope
        if t == 0:
            return ahead
        ahead, denoised = run.denoise(ahead, t)
        return x + (t - s) * 0.5 * (slope + (ahead - denoised) / t)


@dataclass(frozen=True)
class Midpoint(Solver):
    """The explicit midpoint method on dx/ds = (x - D)/s, with the midpoint (s + t)/2."""

    flow = True

    def step(self, run: Recorder, x: Affine, s: Tensor, t: Tensor) -> Affine:
        x, denoised = run.denoise(x, s)
        middle = (s + t) / 2
        half, denoised = run.denoise(x + (middle - s) * ((x - denoised) / s), middle)
        return x + (t - s) * ((half - denoised) / middle)
