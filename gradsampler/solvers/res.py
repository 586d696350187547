# SPDX-License-Identifier: Apache-2.0
"""The refined exponential solver (RES), arXiv 2308.02157, in half the log-SNR."""

from collections.abc import Sequence
from dataclasses import dataclass

from gradsampler import _checks
from gradsampler.elementary import Coefficient
from gradsampler.engine.program import Affine, Recorder
from gradsampler.solvers.ancestral import Descent
from gradsampler.solvers.base import Solver
from gradsampler.solvers.exponential import (
    at_an_end,
    earlier,
    first_order,
    phi1,
    phi2,
    predicted_between,
)


def second_order(
    run: Recorder,
    x: Affine,
    denoised: Affine,
    at_m: Affine,
    s: Coefficient,
    m: Coefficient,
    t: Coefficient,
) -> Affine:
    """The step from s to t with D known at s and at m (arXiv 2308.02157, algorithm 1)."""
    half_log_snr = run.coordinates.half_log_snr
    h = half_log_snr(t) - half_log_snr(s)
    c2 = (half_log_snr(m) - half_log_snr(s)) / h
    b2 = phi2(-h) / c2
    b1 = phi1(-h) - b2
    return (t / s) * x + run.coordinates.alpha(t) * h * (b1 * denoised + b2 * at_m)


@dataclass(frozen=True)
class Res2AB(Solver):
    """RES, two-step Adams-Bashforth form: the previous step's D is the second point.

    The first step, and a step to level 0, is the exponential Euler step.
    """

    flow = True
    ode_order = 2

    def step(self, run: Recorder, x: Affine, s: Coefficient, t: Coefficient) -> Affine:
        x, denoised = run.denoise(x, s)
        if at_an_end(run, s, t):
            return first_order(x, denoised, s, t)
        for last in earlier(run, s, 1):
            return second_order(run, x, denoised, last.value, s, last.sigma, t)
        return first_order(x, denoised, s, t)


@dataclass(frozen=True)
class Res2Mid(Solver):
    """RES, single-step form with the second point halfway in half log-SNR."""

    flow = True
    ode_order = 2

    def step(self, run: Recorder, x: Affine, s: Coefficient, t: Coefficient) -> Affine:
        x, denoised = run.denoise(x, s)
        if at_an_end(run, s, t):
            return first_order(x, denoised, s, t)
        m, at_m = predicted_between(run, x, denoised, s, t)
        return second_order(run, x, denoised, at_m, s, m, t)


@dataclass(frozen=True)
class Res2MidStable(Solver):
    """RES, single-step form that takes the D halfway for the whole step."""

    flow = True
    ode_order = 2

    def step(self, run: Recorder, x: Affine, s: Coefficient, t: Coefficient) -> Affine:
        x, denoised = run.denoise(x, s)
        if at_an_end(run, s, t):
            return first_order(x, denoised, s, t)
        _, at_m = predicted_between(run, x, denoised, s, t)
        return first_order(x, at_m, s, t)


def multistep(
    run: Recorder,
    x: Affine,
    denoised: Affine,
    past: Sequence[tuple[Coefficient, Affine]],
    s: Coefficient,
    down: Coefficient,
    eta: Coefficient,
) -> Affine | None:
    """ComfyUI's second-order step from s to ``down`` with the level and D of the step before.

    Its distance between the two predictions is that from the level of the one before to the level
    to which the step before went down. None where the step is the first-order one.
    """
    if at_an_end(run, s, down) or not past:
        return None
    before, old = past[0]
    reached = Descent.of(run, before, s, eta).down
    if reached == 0:
        return None
    half_log_snr = run.coordinates.half_log_snr
    h = half_log_snr(down) - half_log_snr(s)
    b2 = phi2(-h) * h / (half_log_snr(before) - half_log_snr(reached))
    change = (phi1(-h) - b2) * denoised + b2 * old
    return (down / s) * x + run.coordinates.alpha(down) * h * change


@dataclass(frozen=True)
class ResMultistep(Solver):
    """RES, two-step form with ancestral noise, as in ComfyUI; with eta = 0 `Res2AB`.

    Args:
        eta: share of ancestral noise.
        s_noise: factor of the injected noise.
    """

    flow = True
    ode_order = 2
    weak_order = 1
    eta: float = 0.0
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        _checks.finite("res_multistep: eta", self.eta, 0.0)
        _checks.finite("res_multistep: s_noise", self.s_noise, 0.0)

    @property
    def stochastic(self) -> bool:  # type: ignore[override]
        return bool(self.eta > 0)

    def step(self, run: Recorder, x: Affine, s: Coefficient, t: Coefficient) -> Affine:
        x, denoised = run.denoise(x, s)
        past = [(last.sigma, last.value) for last in earlier(run, s, 1)]
        descent = Descent.of(run, s, t, self.eta)
        plain = first_order(x, denoised, s, descent.down)
        x = multistep(run, x, denoised, past, s, descent.down, self.eta) or plain
        return descent.ascended(run, x, self.s_noise)
