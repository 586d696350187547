# SPDX-License-Identifier: Apache-2.0
"""Runge-Kutta methods on dx/ds = (x - D)/s: Heun's, the midpoint method, Kutta's, and kin.

Those that need a slope at the next level take Euler's step to level 0, where it is undefined.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from gradsampler.elementary import Coefficient, sqrt, square
from gradsampler.engine.program import Affine, Recorder
from gradsampler.solvers.base import Churn, Solver, Sweep, check_amounts
from gradsampler.solvers.exponential import first_order


@dataclass(frozen=True)
class Heun(Solver):
    """Heun's method (Karras et al. 2022, algorithm 1)."""

    flow = True
    ode_order = 2

    def step(self, run: Recorder, x: Affine, s: Coefficient, t: Coefficient) -> Affine:
        x, denoised = run.denoise(x, s)
        slope = (x - denoised) / s
        ahead = x + (t - s) * slope
        if t == 0:
            return ahead
        ahead, denoised = run.denoise(ahead, t)
        return x + (t - s) * 0.5 * (slope + (ahead - denoised) / t)


@dataclass(frozen=True)
class Restart(Heun):
    """Heun's method over levels that may rise; it goes back up by adding noise.

    Xu et al. 2023, arXiv 2306.14878, algorithm 1. `schedules.restart` puts such levels together; on
    falling ones it is Heun's method.

    Args:
        s_noise: factor of the noise that is added on the way up.
    """

    monotone = False
    s_noise: Coefficient = 1.0

    def __post_init__(self) -> None:
        check_amounts(self, "restart", "s_noise")

    def step(self, run: Recorder, x: Affine, s: Coefficient, t: Coefficient) -> Affine:
        if t <= s:
            return super().step(run, x, s, t)
        gain = run.coordinates.alpha(t) / run.coordinates.alpha(s)
        up = sqrt(square(t) - square(gain * s))
        return gain * x + self.s_noise * up * run.noise()


@dataclass(frozen=True)
class Midpoint(Solver):
    """The explicit midpoint method, with the midpoint (s + t)/2."""

    flow = True
    ode_order = 2

    def step(self, run: Recorder, x: Affine, s: Coefficient, t: Coefficient) -> Affine:
        x, denoised = run.denoise(x, s)
        middle = (s + t) / 2
        half, denoised = run.denoise(x + (middle - s) * ((x - denoised) / s), middle)
        return x + (t - s) * ((half - denoised) / middle)


@dataclass(frozen=True)
class DPM2(Solver):
    """The midpoint method with the midpoint sqrt(s t), k-diffusion's dpm_2."""

    flow = True
    ode_order = 2

    def step(self, run: Recorder, x: Affine, s: Coefficient, t: Coefficient) -> Affine:
        x, denoised = run.denoise(x, s)
        if t == 0:
            return denoised
        return geometric_midpoint(run, x, denoised, s, t)


def geometric_midpoint(
    run: Recorder, x: Affine, denoised: Affine, s: Coefficient, t: Coefficient
) -> Affine:
    """The midpoint step from s to t > 0 with the slope at sqrt(s t)."""
    middle = sqrt(s * t)
    half, at_middle = run.denoise(x + (middle - s) * ((x - denoised) / s), middle)
    return x + (t - s) * ((half - at_middle) / middle)


@dataclass(frozen=True)
class HeunEDMx0(Solver):
    """Euler's step with the mean of the predictions at both ends (Cosmos's 2heun_edm)."""

    flow = True
    ode_order = 2

    def step(self, run: Recorder, x: Affine, s: Coefficient, t: Coefficient) -> Affine:
        x, denoised = run.denoise(x, s)
        ahead = first_order(x, denoised, s, t)
        if t == 0:
            return ahead
        _, at_t = run.denoise(ahead, t)
        return first_order(x, 0.5 * (denoised + at_t), s, t)


@dataclass(frozen=True)
class Kutta3(Solver):
    """Kutta's third-order method (Kutta 1901)."""

    flow = True
    ode_order = 3

    def step(self, run: Recorder, x: Affine, s: Coefficient, t: Coefficient) -> Affine:
        x, denoised = run.denoise(x, s)
        if t == 0:
            return denoised
        h, middle = t - s, (s + t) / 2
        first = (x - denoised) / s
        half, denoised = run.denoise(x + 0.5 * h * first, middle)
        second = (half - denoised) / middle
        end, denoised = run.denoise(x + h * (2.0 * second - first), t)
        return x + h / 6 * (first + 4.0 * second + (end - denoised) / t)


@dataclass(frozen=True)
class HeunPP2(Sweep):
    """Heun++ with slopes at this level and the two after it, as in ComfyUI.

    The later slopes are weighted by their level relative to the first one, so the method is of
    first order with a small error. The last step but one uses two slopes, and the last is Euler's.
    """

    flow = True
    ode_order = 1

    def steps(
        self, run: Recorder, x: Affine, levels: Sequence[Coefficient], churn: Churn
    ) -> Affine:
        start, last = run.step, len(levels) - 1
        for i, (s, t) in enumerate(pairwise(levels)):
            run.step = start + i
            noise, s = churn.raised(run, s)
            x, denoised = run.denoise(x + noise, s)
            slope = (x - denoised) / s
            ahead, mean = x + (t - s) * slope, Affine()
            rest: Coefficient = 1.0
            following = levels[i + 1 : min(i + 3, last)]
            for k, level in enumerate(following):
                state, denoised = run.denoise(ahead, level)
                later = (state - denoised) / level
                weight = level / ((len(following) + 1) * levels[0])
                mean, rest = mean + weight * later, rest - weight
                if k + 1 < len(following):
                    ahead = state + (following[k + 1] - level) * later
            x = x + (t - s) * (rest * slope + mean)
        return x
