# SPDX-License-Identifier: Apache-2.0
"""Ancestral sampling: a deterministic step to a lower level, then noise back up."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from gradsampler import _checks
from gradsampler.coordinates import FlowTime
from gradsampler.elementary import Coefficient, sqrt, square
from gradsampler.engine.program import Affine, Recorder
from gradsampler.solvers.base import Solver
from gradsampler.solvers.exponential import at_an_end, first_order, predicted_between
from gradsampler.solvers.heun import geometric_midpoint


def ancestral_levels(
    s: Coefficient, t: Coefficient, eta: Coefficient
) -> tuple[Coefficient, Coefficient | None]:
    """The level to step down to and the amount of noise to add (k-diffusion).

    ``up = min(t, eta * (t/s) * sqrt(s^2 - t^2))``, ``down = sqrt(t^2 - up^2)``; at ``t = 0`` or
    ``eta = 0`` nothing is injected and the amount is None, since roots of 0 have no gradient.
    """
    if eta == 0 or t == 0:
        return t, None
    up = eta * (t / s) * sqrt(square(s) - square(t))
    if up >= t:
        return 0 * t, t
    return sqrt(square(t) - square(up)), up


class Descent(NamedTuple):
    """A step down, and the way back up to the next level."""

    down: Coefficient  # the level to step down to
    gain: Coefficient  # of the state there
    up: Coefficient | None  # amount of noise to add, None where there is none to add

    @classmethod
    def of(cls, run: Recorder, s: Coefficient, t: Coefficient, eta: Coefficient) -> "Descent":
        """The descent of a step from s to t.

        In flow time the level goes down to ``t * (1 - eta * (1 - t/s))``, and what is left of the
        sample there is brought to ``1 - t``, as in ComfyUI.
        """
        if not isinstance(run.coordinates, FlowTime):
            down, up = ancestral_levels(s, t, eta)
            return cls(down, 1.0, up)
        if eta == 0 or t == 0:
            return cls(t, 1.0, None)
        down = t * (1 - eta * (1 - t / s))
        return cls.reaching(run, down if down > 0 else 0 * t, t)

    @classmethod
    def reaching(cls, run: Recorder, down: Coefficient, t: Coefficient) -> "Descent":
        """The descent to a level ``down`` of at most t."""
        gain = run.coordinates.alpha(t) / run.coordinates.alpha(down)
        variance = square(t) - square(gain * down)
        return cls(down, gain, sqrt(variance) if variance > 0 else None)

    def ascended(self, run: Recorder, x: Affine, s_noise: Coefficient) -> Affine:
        """The state x at the level ``down``, brought up."""
        return x if self.up is None else self.gain * x + s_noise * self.up * run.noise()


@dataclass(frozen=True)
class EulerAncestral(Solver):
    """Euler's method with ancestral noise, as in k-diffusion.

    Args:
        eta: share of ancestral noise; 0 is Euler's method.
        s_noise: factor of the injected noise.
    """

    stochastic: ClassVar[bool] = True
    flow = True
    ode_order = 1
    weak_order = 1
    eta: float = 1.0
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        _checks.finite("euler_ancestral: eta", self.eta, 0.0)
        _checks.finite("euler_ancestral: s_noise", self.s_noise, 0.0)

    def step(self, run: Recorder, x: Affine, s: Coefficient, t: Coefficient) -> Affine:
        x, denoised = run.denoise(x, s)
        descent = Descent.of(run, s, t, self.eta)
        x = x + (descent.down - s) * ((x - denoised) / s)
        return descent.ascended(run, x, self.s_noise)


@dataclass(frozen=True)
class DPM2Ancestral(Solver):
    """`DPM2` with ancestral noise, as in k-diffusion.

    Args:
        eta: share of ancestral noise; 0 is `DPM2`.
        s_noise: factor of the injected noise.
    """

    stochastic: ClassVar[bool] = True
    flow = True
    ode_order = 2
    weak_order = 1
    eta: float = 1.0
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        _checks.finite("dpm_2_ancestral: eta", self.eta, 0.0)
        _checks.finite("dpm_2_ancestral: s_noise", self.s_noise, 0.0)

    def step(self, run: Recorder, x: Affine, s: Coefficient, t: Coefficient) -> Affine:
        x, denoised = run.denoise(x, s)
        descent = Descent.of(run, s, t, self.eta)
        if descent.down == 0:
            x = first_order(x, denoised, s, descent.down)
        else:
            x = geometric_midpoint(run, x, denoised, s, descent.down)
        return descent.ascended(run, x, self.s_noise)


@dataclass(frozen=True)
class DPMpp2SAncestral(Solver):
    """DPM-Solver++(2S) (Lu et al. 2022, arXiv 2211.01095, algorithm 1) with ancestral noise.

    Args:
        eta: share of ancestral noise; 0 is DPM-Solver++(2S).
        s_noise: factor of the injected noise.
    """

    stochastic: ClassVar[bool] = True
    flow = True
    ode_order = 2
    weak_order = 1
    eta: float = 1.0
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        _checks.finite("dpmpp_2s_ancestral: eta", self.eta, 0.0)
        _checks.finite("dpmpp_2s_ancestral: s_noise", self.s_noise, 0.0)

    def step(self, run: Recorder, x: Affine, s: Coefficient, t: Coefficient) -> Affine:
        x, denoised = run.denoise(x, s)
        descent = Descent.of(run, s, t, self.eta)
        if not at_an_end(run, s, descent.down):
            _, denoised = predicted_between(run, x, denoised, s, descent.down)
        x = first_order(x, denoised, s, descent.down)
        return descent.ascended(run, x, self.s_noise)
