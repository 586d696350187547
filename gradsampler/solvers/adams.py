# SPDX-License-Identifier: Apache-2.0
"""Linear multistep methods on dx/ds = (x - D)/s: Adams and Bashforth 1883, and kin.

They evaluate the model once a step. Until there are enough evaluations they are of lower order.
"""

from dataclasses import dataclass
from itertools import pairwise

from gradsampler import _checks
from gradsampler.elementary import Coefficient
from gradsampler.engine.program import Affine, Denoised, Recorder
from gradsampler.solvers.base import Solver
from gradsampler.solvers.interpolation import adams, combined


def latest(run: Recorder, s: Coefficient, count: int) -> list[Denoised]:
    """The prediction at s and those before it, ``count`` in all at most, the latest first."""
    return [run.predictions[-1], *run.history(s, count - 1)]


@dataclass(frozen=True)
class LMS(Solver):
    """The Adams-Bashforth method for any spacing of the levels (k-diffusion's lms).

    Args:
        order: number of slopes, 1 to 4.
    """

    flow = True
    order: int = 4

    def __post_init__(self) -> None:
        check_order("lms", self.order)

    @property
    def ode_order(self) -> int:
        return self.order

    def step(self, run: Recorder, x: Affine, s: Coefficient, t: Coefficient) -> Affine:
        x, _ = run.denoise(x, s)
        points = latest(run, s, self.order)
        weights = adams([(p.sigma - s) / (t - s) for p in points])
        return x + (t - s) * combined(weights, (p.slope for p in points))


@dataclass(frozen=True)
class IPNDM(Solver):
    """iPNDM: Adams and Bashforth's weights of even steps, whatever the levels.

    Liu et al. 2022, arXiv 2202.09778, equation 12, started with lower orders (Zhang and Chen 2022,
    arXiv 2204.13902). The step to level 0 is Euler's.

    Args:
        order: number of slopes, 1 to 4.
    """

    flow = True
    order: int = 4

    def __post_init__(self) -> None:
        check_order("ipndm", self.order)

    @property
    def ode_order(self) -> int:
        return min(self.order, 2)

    def step(self, run: Recorder, x: Affine, s: Coefficient, t: Coefficient) -> Affine:
        x, denoised = run.denoise(x, s)
        if t == 0:
            return denoised
        points = latest(run, s, self.order)
        weights = adams([-float(k) for k in range(len(points))])
        return x + (t - s) * combined(weights, (p.slope for p in points))


@dataclass(frozen=True)
class IPNDMv(Solver):
    """iPNDM for uneven levels, with the weights that diff-sampler and ComfyUI have.

    From the third slope on these weights differ from those of Adams and Bashforth: by a bracket in
    the third, by a sign in the fourth, and the four do not quite sum to 1. So the method is of
    second order. `LMS` has Adams and Bashforth's weights. The step to level 0 is Euler's.

    Args:
        order: number of slopes, 1 to 4.
    """

    flow = True
    order: int = 4

    def __post_init__(self) -> None:
        check_order("ipndm_v", self.order)

    @property
    def ode_order(self) -> int:
        return min(self.order, 2)

    def step(self, run: Recorder, x: Affine, s: Coefficient, t: Coefficient) -> Affine:
        x, denoised = run.denoise(x, s)
        if t == 0:
            return denoised
        points = latest(run, s, self.order)
        gaps = [a.sigma - b.sigma for a, b in pairwise(points)]
        weights = divided_differences(t - s, gaps)
        return x + (t - s) * combined(weights, (p.slope for p in points))


def divided_differences(h: Coefficient, gaps: list[Coefficient]) -> list[Coefficient]:
    """The weights of `IPNDMv` for a step h after the steps ``gaps``, the latest first."""
    if not gaps:
        return [1.0]
    h1 = gaps[0]
    first = h / h1 / 2
    weights = [1 + first, -first]
    if len(gaps) > 1:
        h2 = gaps[1]
        r = h1 / h2
        second = (1 - h / (3 * (h + h1)) * (h * (h + h1)) / (h1 * (h1 + h2))) / 2
        weights = [weights[0] + second, weights[1] - (1 + r) * second, r * second]
    if len(gaps) > 2:
        h3 = gaps[2]
        mean = (1 - h / (3 * (h + h1))) / 2 + (1 - h / (2 * (h + h1))) * h / (6 * (h + h1 + h2))
        third = mean * (h * (h + h1) * (h + h1 + h2)) / (h1 * (h1 + h2) * (h1 + h2 + h3))
        q = h1 * (h1 + h2) / (h2 * (h2 + h3))
        weights = [
            weights[0] + third,
            weights[1] - (1 + r + q) * third,
            weights[2] + (r + q * (1 + h2 / h3)) * third,
            -q * r * third,
        ]
    return weights


@dataclass(frozen=True)
class GradientEstimation(Solver):
    """Euler's step along ``gamma`` times the slope minus ``gamma - 1`` times the previous one.

    Permenter and Yuan 2024, arXiv 2306.04848, algorithm 2. It is of second order at gamma = 3/2
    with even steps, and of first order with the published value of 2. The first step and the step
    to level 0 are Euler's.

    Args:
        gamma: factor of the latest slope.
    """

    flow = True
    ode_order = 1
    gamma: float = 2.0

    def __post_init__(self) -> None:
        _checks.finite("gradient_estimation: gamma", self.gamma)

    def step(self, run: Recorder, x: Affine, s: Coefficient, t: Coefficient) -> Affine:
        x, denoised = run.denoise(x, s)
        if t == 0:
            return denoised
        points = latest(run, s, 2)
        slope = points[0].slope
        if len(points) > 1:
            slope = self.gamma * slope - (self.gamma - 1) * points[1].slope
        return x + (t - s) * slope


def check_order(name: str, order: object, most: int = 4) -> None:
    """Refuses an order that is not between 1 and ``most``."""
    if _checks.integer(f"{name}: order", order, 1) > most:
        _checks.fail(f"{name}: order", f"be at most {most}", order)
