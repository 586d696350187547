# SPDX-License-Identifier: Apache-2.0
"""DEIS: the polynomial through past noises, integrated over the noise-to-signal ratio."""

import math
from dataclasses import dataclass

from gradsampler import _checks
from gradsampler.elementary import Coefficient, log, sqrt, square
from gradsampler.engine.program import Affine, Denoised, Recorder
from gradsampler.solvers.adams import check_order
from gradsampler.solvers.base import Solver
from gradsampler.solvers.exponential import at_an_end, earlier, epsilon, first_order
from gradsampler.solvers.interpolation import adams, combined, integral, interpolatory

# The VP schedule of Karras et al. 2022, table 1, that has level 80 at time 1 and 0.002 at 0.001.
_TOP = math.log1p(80**2)
_BETA_D = 2 * (math.log1p(0.002**2) / 1e-3 - _TOP) / (1e-3 - 1)
_BETA_MIN = _TOP - _BETA_D / 2


def vp_time(rho: Coefficient) -> Coefficient:
    """The time at which that schedule has the noise-to-signal ratio rho."""
    return (sqrt(_BETA_MIN**2 + 2 * _BETA_D * log(1 + square(rho))) - _BETA_MIN) / _BETA_D


@dataclass(frozen=True)
class DEIS(Solver):
    """DEIS (Zhang and Chen 2022, arXiv 2204.13902, equations 14 and 15).

    The noise e is extrapolated as a polynomial in a variable of choice, and integrated exactly:
    ``x/alpha`` changes by the integral of e over rho = sigma/alpha. The first step, and a step to
    level 0, is of first order.

    Args:
        order: number of predictions, 1 to 4.
        variable: "time" is tAB-DEIS, in the time of a VP schedule as in ComfyUI (there the integral
            is a sum of 10000 terms); "rho" is rhoAB-DEIS; "log_rho" is diffusers'.
    """

    flow = True
    order: int = 3
    variable: str = "time"

    def __post_init__(self) -> None:
        check_order("deis", self.order)
        _checks.choice("deis: variable", self.variable, ("time", "rho", "log_rho"))

    @property
    def ode_order(self) -> int:  # type: ignore[override]
        return min(self.order, 3)

    def step(self, run: Recorder, x: Affine, s: Coefficient, t: Coefficient) -> Affine:
        x, denoised = run.denoise(x, s)
        if at_an_end(run, s, t):
            return first_order(x, denoised, s, t)
        points = [run.predictions[-1], *earlier(run, s, self.order - 1)]
        alpha = run.coordinates.alpha
        weights = self.weights(run, points, t)
        change = combined(weights, (epsilon(run, p.state, p.value, p.sigma) for p in points))
        return alpha(t) / alpha(s) * x + alpha(t) * change

    def weights(self, run: Recorder, points: list[Denoised], t: Coefficient) -> list[Coefficient]:
        """The integrals of the Lagrange polynomials over rho, from the first point to t."""

        def rho(sigma: Coefficient) -> Coefficient:
            return sigma / run.coordinates.alpha(sigma)

        start, end = rho(points[0].sigma), rho(t)
        if self.variable == "log_rho":
            h = log(start / end)
            nodes = [log(start / rho(p.sigma)) / h for p in points]
            return [-h * end * w for w in adams(nodes, h)]
        if self.variable == "rho":
            nodes = [(rho(p.sigma) - start) / (end - start) for p in points]
            return [(end - start) * w for w in adams(nodes)]
        nodes = [vp_time(rho(p.sigma)) - vp_time(start) for p in points]

        def moment(k: int) -> Coefficient:
            return integral(
                lambda u: math.prod([vp_time(u) - vp_time(start)] * k, start=1.0), start, end
            )

        return interpolatory(nodes, [moment(k) for k in range(len(points))])
