# SPDX-License-Identifier: Apache-2.0
"""Exponential predictor-corrector methods: UniPC and the SA-Solver.

A step is predicted from past predictions D. The model's D at the predicted state then corrects the
state before the next step, at no further evaluation: with other weights, and one point more.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, NamedTuple

from gradsampler import _checks
from gradsampler.elementary import Coefficient, exp, expm1, sqrt
from gradsampler.engine.program import Affine, Denoised, Recorder
from gradsampler.solvers.adams import check_order
from gradsampler.solvers.base import Churn, Sweep
from gradsampler.solvers.exponential import (
    at_an_end,
    earlier,
    first_order,
    phi,
    reverse_sde_step,
)
from gradsampler.solvers.interpolation import adams, combined, halved

Weights = Callable[[list[Coefficient], Coefficient], list[Coefficient]]  # of nodes and z


class Predicted(NamedTuple):
    """The share of past D in a predicted state: ``scale`` times a weighted sum."""

    points: list[Denoised]  # the latest first
    nodes: list[Coefficient]  # their lambda from the start of the step, in steps
    z: Coefficient
    scale: Coefficient
    weights: list[Coefficient]  # of as many points as the prediction uses

    @classmethod
    def of(
        cls,
        run: Recorder,
        points: list[Denoised],
        order: int,
        t: Coefficient,
        eta: Coefficient,
        weights: Weights,
    ) -> "Predicted":
        """The prediction of a step from the latest point to t, by ``order`` of the points."""
        half_log_snr = run.coordinates.half_log_snr
        now = half_log_snr(points[0].sigma)
        h = half_log_snr(t) - now
        nodes = [(half_log_snr(p.sigma) - now) / h for p in points]
        z = -(1 + eta) * h
        return cls(points, nodes, z, -z * run.coordinates.alpha(t), weights(nodes[:order], z))

    @property
    def sum(self) -> Affine:
        """That share."""
        points = self.points[: len(self.weights)]
        return self.scale * combined(self.weights, (p.value for p in points))

    def correction(self, denoised: Affine, count: int, weights: Weights) -> Affine:
        """What the D at the predicted state and ``count`` of the points change of it."""
        w = weights([*self.nodes[:count], 1.0], self.z)
        values = [*(p.value for p in self.points[:count]), denoised]
        return self.scale * combined(w, values) - self.sum


@dataclass(frozen=True)
class UniPC(Sweep):
    """UniPC, multistep, predicting data (Zhao et al. 2023, arXiv 2302.04867, algorithms 5 and 6).

    The last steps are of lower order. Where churn injects noise, nothing is corrected.

    Args:
        order: 1 to 3, of the predictor; the corrector's is one more.
        variant: "bh1" or "bh2", the paper's B(h); they differ where two points are used.
        lower_order_final: whether the last steps are of lower order.
    """

    flow = True
    order: int = 3
    variant: str = "bh1"
    lower_order_final: bool = True

    def __post_init__(self) -> None:
        check_order("uni_pc", self.order, 3)
        _checks.choice("uni_pc: variant", self.variant, ("bh1", "bh2"))

    @property
    def ode_order(self) -> int:  # type: ignore[override]
        return min(self.order + 1, 2) if self.lower_order_final else self.order + 1

    def weights(self, nodes: list[Coefficient], z: Coefficient) -> list[Coefficient]:
        """Of the points at ``nodes``, as `adams` but for two."""
        if len(nodes) == 2:
            return halved(nodes, z, 1.0 if self.variant == "bh1" else phi(1, z))
        return adams(nodes, z)

    def steps(
        self, run: Recorder, x: Affine, levels: Sequence[Coefficient], churn: Churn
    ) -> Affine:
        start, predicted = run.step, None
        for i, (level, t) in enumerate(pairwise(levels)):
            run.step = start + i
            noise, s = churn.raised(run, level)
            x, denoised = run.denoise(x + noise, s)
            if predicted is not None and s is level:
                x = x + predicted.correction(denoised, len(predicted.weights), self.weights)
            predicted = None
            if at_an_end(run, s, t):
                x = first_order(x, denoised, s, t)
                continue
            order = min(self.order, len(levels) - 1 - i) if self.lower_order_final else self.order
            points = [run.predictions[-1], *earlier(run, s, order - 1)]
            predicted = Predicted.of(run, points, order, t, 0.0, self.weights)
            x = (t / s) * x + predicted.sum
        return x


@dataclass(frozen=True)
class SASolver(Sweep):
    """SA-Solver, the stochastic Adams method (Xue et al. 2023, arXiv 2309.05019, equations 14, 17).

    To level 0 the last steps are of lower order, and the last one returns D.

    Args:
        eta: the paper's tau^2, in the units of the other SDE solvers; 0 is an ODE solver.
        s_noise: factor of the injected noise.
        s_tmin, s_tmax: noise is injected at levels in (s_tmin, s_tmax].
        predictor_order: 1 to 4.
        corrector_order: 0 to 4, counting the point at the predicted state; 0 does not correct.
        pece: evaluates the model at the corrected state as well.
        simple_order_2: simplified weights of two points (appendix D), as diffusers has them.
    """

    stochastic: ClassVar[bool] = True
    flow = True
    eta: float = 1.0
    s_noise: float = 1.0
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    predictor_order: int = 3
    corrector_order: int = 4
    pece: bool = False
    simple_order_2: bool = False

    def __post_init__(self) -> None:
        _checks.finite("sa_solver: eta", self.eta, 0.0)
        _checks.finite("sa_solver: s_noise", self.s_noise, 0.0)
        _checks.finite("sa_solver: s_tmin", self.s_tmin, 0.0)
        if not self.s_tmax >= self.s_tmin:
            _checks.fail("sa_solver: s_tmax", f"be at least s_tmin = {self.s_tmin}", self.s_tmax)
        check_order("sa_solver", self.predictor_order)
        if _checks.integer("sa_solver: corrector_order", self.corrector_order, 0) > 4:
            _checks.fail("sa_solver: corrector_order", "be at most 4", self.corrector_order)

    @property
    def ode_order(self) -> int:  # type: ignore[override]
        return max(self.predictor_order, min(self.corrector_order, self.predictor_order + 1))

    @property
    def weak_order(self) -> int:  # type: ignore[override]
        return min(self.ode_order, 2)

    def weights(self, nodes: list[Coefficient], z: Coefficient) -> list[Coefficient]:
        """Of the points at ``nodes``."""
        simple = self.simple_order_2 and len(nodes) == 2
        return halved(nodes, z, 1.0) if simple else adams(nodes, z)

    def steps(
        self, run: Recorder, x: Affine, levels: Sequence[Coefficient], churn: Churn
    ) -> Affine:
        start, last = run.step, len(levels) - 2
        points: list[Denoised] = []
        predicted: Predicted | None = None
        for i, (s, t) in enumerate(pairwise(levels)):
            run.step = start + i
            x, denoised = run.denoise(x, s)
            left = last - i if levels[-1] == 0 else last + 5  # steps after this one
            order = min(self.corrector_order, left + 1)
            if predicted is not None and order > 0 and (t != 0 or self.pece):
                x = x + predicted.correction(denoised, order - 1, self.weights)
                if self.pece:
                    x, denoised = run.denoise(x, s)
            points = [run.predictions[-1], *points][:5]
            predicted = None
            eta = self.eta if self.s_tmin < t <= self.s_tmax else 0.0
            if at_an_end(run, s, t):
                points = []
                x = reverse_sde_step(run, x, denoised, s, t, eta, self.s_noise)
                continue
            order = max(min(self.predictor_order, left), 1)
            predicted = Predicted.of(run, points, order, t, eta, self.weights)
            half_log_snr = run.coordinates.half_log_snr
            h = half_log_snr(t) - half_log_snr(s)
            x = t / s * exp(-eta * h) * x + predicted.sum
            if eta > 0:
                x = x + self.s_noise * t * sqrt(-expm1(-2 * eta * h)) * run.noise()
        return x
