# SPDX-License-Identifier: Apache-2.0
"""DPM-Solver, single-step, predicting noise (Lu et al. 2022, arXiv 2206.00927)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from gradsampler import _checks
from gradsampler.elementary import Coefficient, expm1
from gradsampler.engine.program import Affine, Recorder
from gradsampler.solvers.ancestral import Descent
from gradsampler.solvers.base import Churn, Sweep
from gradsampler.solvers.exponential import at_an_end, epsilon, first_order, phi2


def inner_change(
    run: Recorder, x: Affine, denoised: Affine, s: Coefficient, t: Coefficient, r: float
) -> Affine:
    """How the noise changes from s to the share r of the step, where the model is evaluated."""
    half_log_snr = run.coordinates.half_log_snr
    inner = run.coordinates.level((1 - r) * half_log_snr(s) + r * half_log_snr(t))
    state, at_inner = run.denoise(first_order(x, denoised, s, inner), inner)
    return epsilon(run, state, at_inner, inner) - epsilon(run, x, denoised, s)


def second_order(
    run: Recorder,
    x: Affine,
    denoised: Affine,
    change: Affine,
    s: Coefficient,
    t: Coefficient,
    r: float,
) -> Affine:
    """The step of DPM-Solver-2 (algorithm 1) with the change of the noise up to r."""
    h = run.coordinates.half_log_snr(t) - run.coordinates.half_log_snr(s)
    return first_order(x, denoised, s, t) - t * expm1(h) / (2 * r) * change


def third_order(
    run: Recorder, x: Affine, denoised: Affine, change: Affine, s: Coefficient, t: Coefficient
) -> Affine:
    """The step of DPM-Solver-3 (algorithm 2) with the change of the noise up to a third."""
    half_log_snr = run.coordinates.half_log_snr
    h = half_log_snr(t) - half_log_snr(s)
    inner = run.coordinates.level(half_log_snr(s) + 2 / 3 * h)
    g = 2 / 3 * h
    state = first_order(x, denoised, s, inner) - inner * 2 * g * phi2(g) * change
    state, at_inner = run.denoise(state, inner)
    change = epsilon(run, state, at_inner, inner) - epsilon(run, x, denoised, s)
    return first_order(x, denoised, s, t) - t * 1.5 * h * phi2(h) * change


def dpm_solver(run: Recorder, x: Affine, s: Coefficient, t: Coefficient, order: int) -> Affine:
    """The step of DPM-Solver-1, 2 or 3."""
    x, denoised = run.denoise(x, s)
    if order == 1 or at_an_end(run, s, t):
        return first_order(x, denoised, s, t)
    r = 1 / 2 if order == 2 else 1 / 3
    change = inner_change(run, x, denoised, s, t, r)
    if order == 2:
        return second_order(run, x, denoised, change, s, t, r)
    return third_order(run, x, denoised, change, s, t)


@dataclass(frozen=True)
class DPMFast(Sweep):
    """DPM-Solver-fast (arXiv 2206.00927, section 3.4), as in k-diffusion.

    All steps are of the third order but for the last ones, which use up the evaluations that
    remain. A step to level 0 is the first-order one, and not among them. k-diffusion's function
    sets the levels itself, evenly in their logarithm, as `schedules.exponential` does.

    Args:
        evaluations: of the model in all, without one for level 0: 3N - 3, 3N - 2 or 3N - 1 in N
            steps, whose orders then end in 3, 2, 1 or in 3, 1 or in 3, 2. None is 3N - 3.
        eta: share of ancestral noise, which ends at the last level above 0; 0 injects nothing.
        s_noise: factor of the injected noise.
    """

    flow = True
    ode_order = 2
    weak_order = 1
    evaluations: int | None = None
    eta: float = 0.0
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        if self.evaluations is not None:
            _checks.integer("dpm_fast: evaluations", self.evaluations, 1)
        _checks.finite("dpm_fast: eta", self.eta, 0.0)
        _checks.finite("dpm_fast: s_noise", self.s_noise, 0.0)

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return bool(self.eta > 0)

    def orders(self, num_steps: int) -> list[int]:
        """The order of each step."""
        count = self.evaluations or max(3 * num_steps - 3, min(num_steps, 1))
        full, rest = divmod(count, 3)
        if num_steps != (full + 1 if count else 0):
            least = max(3 * num_steps - 3, 1)
            expected = f"be {least} to {3 * num_steps - 1} for {num_steps} steps above level 0"
            _checks.fail("dpm_fast: evaluations", expected, self.evaluations)
        return [3] * (full - 1) + [2, 1] if rest == 0 else [3] * full + [rest]

    def steps(
        self, run: Recorder, x: Affine, levels: Sequence[Coefficient], churn: Churn
    ) -> Affine:
        positive = [level for level in levels if level > 0]
        orders = [*self.orders(len(positive) - 1), 1]
        start = run.step
        for i, (s, t) in enumerate(pairwise(levels)):
            run.step = start + i
            noise, s = churn.raised(run, s)
            descent = Descent.of(run, s, t, self.eta)
            if descent.up is not None and descent.down < positive[-1]:
                descent = Descent.reaching(run, positive[-1], t)
            x = dpm_solver(run, x + noise, s, descent.down, orders[i])
            x = descent.ascended(run, x, self.s_noise)
        return x
