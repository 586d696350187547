# SPDX-License-Identifier: Apache-2.0
"""ER-SDE-Solver: exponential methods for a family of reverse SDEs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from gradsampler import _checks
from gradsampler.elementary import Coefficient, exp, log, sqrt, square
from gradsampler.engine.program import Affine, Recorder
from gradsampler.solvers.adams import check_order
from gradsampler.solvers.base import Solver
from gradsampler.solvers.exponential import at_an_end, earlier, reverse_sde_step
from gradsampler.solvers.interpolation import integral


def er_sde_5(rho: Coefficient) -> Coefficient:
    """The paper's choice of phi, ``rho * (e^(rho^0.3) + 10)``."""
    return rho * (exp(exp(0.3 * log(rho))) + 10)


@dataclass(frozen=True)
class ERSDE(Solver):
    """ER-SDE-Solver-3, or 2 or 1 (Cui et al. 2023, arXiv 2309.06169, equations 14 to 16).

    It works in rho = sigma/alpha. The integrals over 1/phi are exact to about 1e-12, where the
    authors' code and ComfyUI's sum 200 terms.

    Args:
        order: number of predictions, 1 to 3.
        s_noise: factor of the injected noise.
        phi: makes the SDE of the family: rho is the ODE, rho^2 the usual reverse SDE. It has to
            rise faster than rho, and to take floats and 0-d tensors.
    """

    stochastic: ClassVar[bool] = True
    flow = True
    order: int = 3
    s_noise: float = 1.0
    phi: Callable[[Coefficient], Coefficient] = er_sde_5

    def __post_init__(self) -> None:
        check_order("er_sde", self.order, 3)
        _checks.finite("er_sde: s_noise", self.s_noise, 0.0)
        if not callable(self.phi):
            _checks.fail_type("er_sde: phi", "be callable as phi(rho)", self.phi)

    @property
    def ode_order(self) -> int:  # type: ignore[override]
        return min(self.order, 2)

    @property
    def weak_order(self) -> int:  # type: ignore[override]
        return self.ode_order

    def step(self, run: Recorder, x: Affine, s: Coefficient, t: Coefficient) -> Affine:
        x, denoised = run.denoise(x, s)
        if at_an_end(run, s, t):
            return reverse_sde_step(run, x, denoised, s, t, 1.0, self.s_noise)

        def rho(sigma: Coefficient) -> Coefficient:
            return sigma / run.coordinates.alpha(sigma)

        alpha = run.coordinates.alpha
        start, end = rho(s), rho(t)
        ratio = self.phi(end) / self.phi(start)
        out = alpha(t) / alpha(s) * ratio * x + alpha(t) * (1 - ratio) * denoised
        past = earlier(run, s, self.order - 1)
        if past:
            h = end - start
            weight = h - self.phi(end) * integral(lambda u: 1 / self.phi(u), start, end)
            change = (denoised - past[0].value) / (start - rho(past[0].sigma))
            out = out + alpha(t) * weight * change
        if len(past) > 1:
            moment = integral(lambda u: (u - start) / self.phi(u), start, end)
            weight = square(h) / 2 - self.phi(end) * moment
            before = rho(past[1].sigma)
            curvature = change - (past[0].value - past[1].value) / (rho(past[0].sigma) - before)
            out = out + alpha(t) * weight * (2 / (start - before)) * curvature
        variance = square(end) - square(start * ratio)
        if variance > 0:
            out = out + self.s_noise * alpha(t) * sqrt(variance) * run.noise()
        return out
