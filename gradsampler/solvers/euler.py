# SPDX-License-Identifier: Apache-2.0
"""Euler's method."""

from dataclasses import dataclass

from gradsampler.elementary import Coefficient
from gradsampler.engine.program import Affine, Recorder
from gradsampler.solvers.base import Solver


@dataclass(frozen=True)
class Euler(Solver):
    """Euler's method on dx/ds = (x - D)/s (Karras et al. 2022, algorithm 1 without line 6)."""

    flow = True
    ode_order = 1

    def step(self, run: Recorder, x: Affine, s: Coefficient, t: Coefficient) -> Affine:
        x, denoised = run.denoise(x, s)
        return x + (t - s) * ((x - denoised) / s)
