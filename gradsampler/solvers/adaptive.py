# SPDX-License-Identifier: Apache-2.0
"""DPM-Solver with steps of its own choice (Lu et al. 2022, arXiv 2206.00927, appendix C)."""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from gradsampler import _checks
from gradsampler.elementary import Coefficient, as_float
from gradsampler.engine.live import Live
from gradsampler.engine.observer import NonFiniteError
from gradsampler.engine.program import Affine, Recorder
from gradsampler.solvers.ancestral import Descent
from gradsampler.solvers.base import Churn, Sweep, check_amounts
from gradsampler.solvers.dpm_solver import dpm_solver, inner_change, second_order, third_order
from gradsampler.solvers.exponential import first_order


class Trial(NamedTuple):
    """A step that was tried."""

    s: float
    t: float
    error: float  # in units of the tolerance
    accepted: bool
    h: float  # of the next, in half log-SNR


Told = Callable[[Trial, Tensor, Tensor], object]  # with the state at s, and D there


class Adaptive(Sweep):
    """A method that chooses its levels during the run, between the first and the last positive one.

    `sample` first runs it without a gradient to choose the levels, and then records the accepted
    steps, whose gradient it is. Without `sample`, it uses the levels that it is given.
    """

    @abstractmethod
    def tried(
        self, run: Live, x: Tensor, levels: Sequence[float], told: Told | None = None
    ) -> list[Trial]:
        """Goes from the state x [B, *state] at the first level to the last positive one.

        ``told`` is called when a step has been judged, and before its noise is drawn.
        """


class StepSize:
    """A PID controller of the step in half log-SNR, as k-diffusion's.

    Gustafsson, Lundh and Söderlind 1988, "A PI stepsize control for the numerical solution of
    ordinary differential equations", BIT 28.
    """

    def __init__(
        self, h: float, gains: tuple[float, float, float], order: float, safety: float
    ) -> None:
        p, i, d = gains
        self.h = h
        self._powers = ((p + i + d) / order, -(p + 2 * d) / order, d / order)
        self._safety = safety
        self._inverse: list[float] = []  # of the errors: this one, and the last two accepted

    def accepts(self, error: float) -> bool:
        """Judges a step by its error, and sets the size of the next."""
        inverse = 1 / (error + 1e-8)
        self._inverse = [inverse, *(self._inverse[1:] or [inverse, inverse])]
        powers = zip(self._inverse, self._powers, strict=True)
        factor = 1 + math.atan(math.prod(base**power for base, power in powers) - 1)
        self.h *= factor
        if factor >= self._safety:
            self._inverse = [inverse, inverse, self._inverse[1]]
            return True
        return False


@dataclass(frozen=True)
class DPMAdaptive(Adaptive):
    """DPM-Solver-23, or 12, with adaptive steps, as in k-diffusion.

    Steps that are too coarse are rejected, for all samples at once. Of the levels that it is given
    it takes the first and the last positive one; to a final 0 it takes a first-order step.

    Args:
        order: 3 compares the second and the third order, 2 the first and the second.
        rtol, atol: tolerances, relative and absolute, of the difference of the two.
        h_init: first step in half log-SNR.
        pcoeff, icoeff, dcoeff: gains of the controller.
        accept_safety: the least factor of the step with which one is accepted.
        eta: share of ancestral noise; 0 injects nothing.
        s_noise: factor of the injected noise.
    """

    flow = True
    weak_order = 1
    order: int = 3
    rtol: float = 0.05
    atol: float = 0.0078
    h_init: float = 0.05
    pcoeff: float = 0.0
    icoeff: float = 1.0
    dcoeff: float = 0.0
    accept_safety: float = 0.81
    eta: Coefficient = 0.0
    s_noise: Coefficient = 1.0

    def __post_init__(self) -> None:
        if self.order not in (2, 3):
            _checks.fail("dpm_adaptive: order", "be 2 or 3", self.order)
        for name in ("rtol", "atol", "h_init"):
            if not _checks.finite(f"dpm_adaptive: {name}", getattr(self, name), 0.0) > 0:
                _checks.fail(f"dpm_adaptive: {name}", "be positive", getattr(self, name))
        for name in ("pcoeff", "icoeff", "dcoeff", "accept_safety"):
            _checks.finite(f"dpm_adaptive: {name}", getattr(self, name))
        check_amounts(self, "dpm_adaptive", "eta", "s_noise")

    @property
    def ode_order(self) -> int:
        return self.order

    @property
    def stochastic(self) -> bool:
        return bool(self.eta > 0)

    def steps(
        self, run: Recorder, x: Affine, levels: Sequence[Coefficient], churn: Churn
    ) -> Affine:
        lowest = [level for level in levels if level > 0][-1]
        for step, (s, t) in enumerate(pairwise(levels), start=run.step):
            run.step = step
            noise, s = churn.raised(run, s)
            descent = Descent.of(run, s, t, self.eta).above(run, lowest, t)
            x = dpm_solver(run, x + noise, s, descent.down, self.order)
            x = descent.ascended(run, x, self.s_noise)
        return x

    def tried(
        self, run: Live, x: Tensor, levels: Sequence[float], told: Told | None = None
    ) -> list[Trial]:
        half_log_snr, level = run.coordinates.half_log_snr, run.coordinates.level
        s, lowest = levels[0], [s for s in levels if s > 0][-1]
        if run.coordinates.alpha(s) == 0:
            _checks.fail("sigmas[0]", "be below 1 with DPMAdaptive, which steps in half log-SNR", s)
        now, end = as_float(half_log_snr(s)), as_float(half_log_snr(lowest))
        gains = self.pcoeff, self.icoeff, self.dcoeff
        size = StepSize(self.h_init, gains, 1.5 if self.eta > 0 else self.order, self.accept_safety)
        trials: list[Trial] = []
        before = x  # what the last accepted step's lower order gave
        start: tuple[Affine, Affine] | None = None  # the state at s, and D there
        while now < end - 1e-5:
            here, denoised = start = start or run.at(x, s)
            goal = min(end, now + size.h)
            t = lowest if goal == end else as_float(level(goal))
            descent = Descent.of(run, s, t, self.eta).above(run, lowest, t)
            low, high = self._both(run, here, denoised, s, descent.down)
            scale = torch.maximum(run.value(low).abs(), before.abs()) * self.rtol
            gap = run.value(low - high) / scale.clamp(min=self.atol)
            error = (gap.double().square().mean().sqrt()).item()
            if not math.isfinite(error) or not now + size.h > now:
                between = f"between the levels {s:.6g} and {t:.6g}"
                raise NonFiniteError(f"dpm_adaptive: the state {between} must be finite")
            trials.append(Trial(s, t, error, size.accepts(error), size.h))
            if told is not None:
                told(trials[-1], run.value(here), run.value(denoised))
            if trials[-1].accepted:
                before = run.value(low)
                x = run.value(descent.ascended(run, high, self.s_noise))
                run.step += 1
                s, now, start = t, goal, None
        return trials

    def _both(
        self, run: Live, x: Affine, denoised: Affine, s: float, t: Coefficient
    ) -> tuple[Affine, Affine]:
        """The states at t by the lower order and by the higher."""
        if self.order == 2:
            change = inner_change(run, x, denoised, s, t, 1 / 2)
            return first_order(x, denoised, s, t), second_order(
                run, x, denoised, change, s, t, 1 / 2
            )
        change = inner_change(run, x, denoised, s, t, 1 / 3)
        low = second_order(run, x, denoised, change, s, t, 1 / 3)
        return low, third_order(run, x, denoised, change, s, t)
