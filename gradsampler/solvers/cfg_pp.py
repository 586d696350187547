# SPDX-License-Identifier: Apache-2.0
"""CFG++ (Chung et al. 2024, arXiv 2406.08070), as ComfyUI has it for several methods.

With classifier-free guidance a step goes towards the guided prediction D, but keeps the noise that
the unconditional one, U, finds in the state (algorithm 2). So it is the plain step from the state
plus alpha(s) * (D - U). Without guidance U is D, and each is the method without CFG++.
"""

from dataclasses import dataclass

from gradsampler import _checks
from gradsampler.elementary import Coefficient
from gradsampler.engine.program import Affine, Denoised, Recorder
from gradsampler.solvers.adams import latest
from gradsampler.solvers.ancestral import Descent
from gradsampler.solvers.base import Solver, check_amounts
from gradsampler.solvers.exponential import (
    at_an_end,
    earlier,
    first_order,
    predicted_between,
    renoising_step,
)
from gradsampler.solvers.res import multistep


def shifted(run: Recorder, at: Denoised) -> Affine:
    """The state in which the guided prediction finds the noise of the unconditional one."""
    return at.state + run.coordinates.alpha(at.sigma) * (at.value - at.unconditional)


@dataclass(frozen=True)
class EulerCFGpp(Solver):
    """Euler's method with CFG++; with eta > 0 and ancestral noise.

    Args:
        eta: share of ancestral noise.
        s_noise: factor of the injected noise.
    """

    flow = True
    ode_order = 1
    weak_order = 1
    eta: Coefficient = 0.0
    s_noise: Coefficient = 1.0

    def __post_init__(self) -> None:
        check_amounts(self, "euler_cfg_pp", "eta", "s_noise")

    @property
    def stochastic(self) -> bool:
        return bool(self.eta > 0)

    def step(self, run: Recorder, x: Affine, s: Coefficient, t: Coefficient) -> Affine:
        _, denoised = run.denoise(x, s)
        x = shifted(run, run.predictions[-1])
        return renoising_step(run, x, denoised, s, t, self.eta, self.s_noise)


@dataclass(frozen=True)
class DPMpp2MCFGpp(Solver):
    """DPM-Solver++(2M) with CFG++; differences of D use the previous unconditional prediction."""

    flow = True
    ode_order = 2

    def step(self, run: Recorder, x: Affine, s: Coefficient, t: Coefficient) -> Affine:
        _, denoised = run.denoise(x, s)
        x = shifted(run, run.predictions[-1])
        if not at_an_end(run, s, t):
            for last in earlier(run, s, 1):
                half_log_snr = run.coordinates.half_log_snr
                now = half_log_snr(s)
                r = (now - half_log_snr(last.sigma)) / (half_log_snr(t) - now)
                denoised = denoised + 1 / (2 * r) * (denoised - last.unconditional)
        return first_order(x, denoised, s, t)


@dataclass(frozen=True)
class DPMpp2SAncestralCFGpp(Solver):
    """DPM-Solver++(2S) with ancestral noise and CFG++.

    Both parts of a step use the unconditional prediction at its start for the noise direction.
    ComfyUI's uses that of the second evaluation for the whole step, and does not converge.

    Args:
        eta: share of ancestral noise.
        s_noise: factor of the injected noise.
    """

    stochastic = True
    flow = True
    ode_order = 2
    weak_order = 1
    eta: Coefficient = 1.0
    s_noise: Coefficient = 1.0

    def __post_init__(self) -> None:
        check_amounts(self, "dpmpp_2s_ancestral_cfg_pp", "eta", "s_noise")

    def step(self, run: Recorder, x: Affine, s: Coefficient, t: Coefficient) -> Affine:
        _, denoised = run.denoise(x, s)
        x = shifted(run, run.predictions[-1])
        descent = Descent.of(run, s, t, self.eta)
        if not at_an_end(run, s, descent.down):
            _, denoised = predicted_between(run, x, denoised, s, descent.down)
        x = first_order(x, denoised, s, descent.down)
        return descent.ascended(run, x, self.s_noise)


@dataclass(frozen=True)
class ResMultistepCFGpp(Solver):
    """`ResMultistep` with CFG++, whose past predictions are the unconditional ones.

    Args:
        eta: share of ancestral noise.
        s_noise: factor of the injected noise.
    """

    flow = True
    ode_order = 2
    weak_order = 1
    eta: Coefficient = 0.0
    s_noise: Coefficient = 1.0

    def __post_init__(self) -> None:
        check_amounts(self, "res_multistep_cfg_pp", "eta", "s_noise")

    @property
    def stochastic(self) -> bool:
        return bool(self.eta > 0)

    def step(self, run: Recorder, x: Affine, s: Coefficient, t: Coefficient) -> Affine:
        _, denoised = run.denoise(x, s)
        at = run.predictions[-1]
        past = [(last.sigma, last.unconditional) for last in earlier(run, s, 1)]
        descent = Descent.of(run, s, t, self.eta)
        x = shifted(run, at)
        guided = first_order(x, denoised, s, descent.down)
        x = multistep(run, x, at.unconditional, past, s, descent.down, self.eta) or guided
        return descent.ascended(run, x, self.s_noise)


@dataclass(frozen=True)
class GradientEstimationCFGpp(Solver):
    """`GradientEstimation` with CFG++, along the slopes of the unconditional predictions.

    Args:
        gamma: factor of the latest slope.
    """

    flow = True
    ode_order = 1
    gamma: float = 2.0

    def __post_init__(self) -> None:
        _checks.finite("gradient_estimation_cfg_pp: gamma", self.gamma)

    def step(self, run: Recorder, x: Affine, s: Coefficient, t: Coefficient) -> Affine:
        _, denoised = run.denoise(x, s)
        x = first_order(shifted(run, run.predictions[-1]), denoised, s, t)
        slopes = [(p.state - p.unconditional) / p.sigma for p in latest(run, s, 2)]
        if len(slopes) > 1 and t != 0:
            x = x + (self.gamma - 1) * (t - s) * (slopes[0] - slopes[1])
        return x
