# SPDX-License-Identifier: Apache-2.0
"""A two-step method that can be undone."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from gradsampler.elementary import Coefficient
from gradsampler.engine.program import Affine, Recorder
from gradsampler.solvers.ancestral import ancestral_levels
from gradsampler.solvers.base import Churn, Sweep, check_amounts


@dataclass(frozen=True)
class MidpointReversible(Sweep):
    """The explicit midpoint rule over two intervals (leapfrog), in additive coordinates.

    With ``w = x/s`` and ``tau = 1/s`` the equation dx/ds = (x - D)/s is dw/dtau = D. The rule

        w[i+1] = w[i-1] + (tau[i+1] - tau[i-1]) * D(x[i], s[i])

    is of second order with one model evaluation a step, and a subtraction undoes a step. So
    `memory.Reversible` keeps no states (Levesque and Verlet 1993, "Molecular dynamics and time
    reversibility", J. Stat. Phys. 72; for diffusion models BDIA, arXiv 2307.10829). Samples are
    not those of Heun's method. The state w[i-1] does not yet contain the noise that was injected
    since; it is added. The first step is Euler's, and so is a step to level 0.

    Args:
        eta: share of ancestral noise, as of `EulerAncestral`.
        s_noise: factor of that noise.
    """

    ode_order = 2
    weak_order = 1

    eta: Coefficient = 0.0
    s_noise: Coefficient = 1.0

    def __post_init__(self) -> None:
        check_amounts(self, "midpoint_reversible", "eta", "s_noise")

    # Both follow from eta here, where other solvers have a constant of the class.
    @property
    def stochastic(self) -> bool:
        return bool(self.eta > 0)

    @property
    def flow(self) -> bool:
        return bool(self.eta == 0)  # ancestral noise is that of VE coordinates

    def steps(
        self, run: Recorder, x: Affine, levels: Sequence[Coefficient], churn: Churn
    ) -> Affine:
        entered = Affine()  # noise in x that the state before the last has not seen
        last: tuple[Affine, Coefficient] | None = None  # that state, and the ratio of its levels
        for step, (s, t) in enumerate(pairwise(levels), start=run.step):
            run.step = step
            noise, s = churn.raised(run, s)
            entered = entered + noise
            state, denoised = run.denoise(x + noise, s)
            down, up = ancestral_levels(s, t, self.eta)
            ratio = down / s
            if last is None or down == 0:
                x = ratio * state + (1 - ratio) * denoised
            else:
                before, ratio_before = last
                x = ratio * (ratio_before * before + entered + (1 - ratio_before) * denoised)
                x = x + (1 - ratio) * denoised
            entered = Affine() if up is None else self.s_noise * up * run.noise()
            x = x + entered
            last = None if down == 0 else (state, ratio)
        return x
