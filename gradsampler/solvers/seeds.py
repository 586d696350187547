# SPDX-License-Identifier: Apache-2.0
"""SEEDS: Runge-Kutta methods for the reverse SDE, with as many noises a step as evaluations.

Gonzalez et al. 2023, arXiv 2305.14267, predicting data, as in ComfyUI. A step to level 0, and one
from a state that is noise alone, is the first-order step.
"""

from dataclasses import dataclass
from typing import ClassVar

from gradsampler import _checks
from gradsampler.elementary import Coefficient, exp, expm1, sqrt
from gradsampler.engine.program import Affine, Recorder
from gradsampler.solvers.base import Solver
from gradsampler.solvers.exponential import at_an_end, phi, reverse_sde_step


class Stages:
    """The states within a step of the reverse SDE, given what stands for D up to each.

    They share one Brownian path: its increments up to a state are in those after it, decayed.
    """

    def __init__(
        self,
        run: Recorder,
        x: Affine,
        s: Coefficient,
        t: Coefficient,
        eta: Coefficient,
        s_noise: Coefficient,
    ) -> None:
        half_log_snr = run.coordinates.half_log_snr
        self._run, self._x, self._s, self._t = run, x, s, t
        self._eta, self._s_noise = eta, s_noise
        self._start = half_log_snr(s)
        self._h = half_log_snr(t) - self._start
        self._reached, self._path = 0.0, Affine()

    def level(self, r: float) -> Coefficient:
        """The level at the share r of the step in half log-SNR."""
        return self._t if r == 1 else self._run.coordinates.level(self._start + r * self._h)

    def z(self, r: float) -> Coefficient:
        """Minus the decay of the state up to r, in half log-SNR."""
        return -(1 + self._eta) * r * self._h

    def at(self, r: float, denoised: Affine) -> Affine:
        """The state at r, which may not fall from one call to the next."""
        level = self.level(r)
        decay = level / self._s * exp(-self._eta * r * self._h)
        x = decay * self._x - self._run.coordinates.alpha(level) * expm1(self.z(r)) * denoised
        if self._eta == 0:
            return x
        gap = self._eta * (r - self._reached) * self._h
        self._path = exp(-gap) * self._path + sqrt(-expm1(-2 * gap)) * self._run.noise()
        self._reached = r
        return x + self._s_noise * level * self._path


@dataclass(frozen=True)
class Seeds2(Solver):
    """SEEDS-2.

    Args:
        eta: 1 is the reverse SDE, 0 the ODE.
        s_noise: factor of the injected noise.
        r: where in the step the second evaluation is.
    """

    stochastic: ClassVar[bool] = True
    flow = True
    ode_order = 2
    weak_order = 2
    eta: float = 1.0
    s_noise: float = 1.0
    r: float = 0.5

    def __post_init__(self) -> None:
        _checks.finite("seeds_2: eta", self.eta, 0.0)
        _checks.finite("seeds_2: s_noise", self.s_noise, 0.0)
        if not 0 < _checks.finite("seeds_2: r", self.r) < 1:
            _checks.fail("seeds_2: r", "lie between 0 and 1", self.r)

    def step(self, run: Recorder, x: Affine, s: Coefficient, t: Coefficient) -> Affine:
        x, denoised = run.denoise(x, s)
        if at_an_end(run, s, t):
            return reverse_sde_step(run, x, denoised, s, t, self.eta, self.s_noise)
        stage = Stages(run, x, s, t, self.eta, self.s_noise)
        _, inner = run.denoise(stage.at(self.r, denoised), stage.level(self.r))
        change = (inner - denoised) / (2 * self.r)
        return stage.at(1.0, denoised + change)


@dataclass(frozen=True)
class Seeds3(Solver):
    """SEEDS-3.

    Args:
        eta: 1 is the reverse SDE, 0 the ODE.
        s_noise: factor of the injected noise.
        r_1, r_2: where in the step the second and the third evaluation are.
    """

    stochastic: ClassVar[bool] = True
    flow = True
    ode_order = 3
    weak_order = 2
    eta: float = 1.0
    s_noise: float = 1.0
    r_1: float = 1 / 3
    r_2: float = 2 / 3

    def __post_init__(self) -> None:
        _checks.finite("seeds_3: eta", self.eta, 0.0)
        _checks.finite("seeds_3: s_noise", self.s_noise, 0.0)
        r_1, r_2 = (_checks.finite(f"seeds_3: {k}", getattr(self, k)) for k in ("r_1", "r_2"))
        if not 0 < r_1 < r_2 < 1:
            _checks.fail("seeds_3: r_1, r_2", "rise between 0 and 1", f"{r_1} and {r_2}")

    def step(self, run: Recorder, x: Affine, s: Coefficient, t: Coefficient) -> Affine:
        x, denoised = run.denoise(x, s)
        if at_an_end(run, s, t):
            return reverse_sde_step(run, x, denoised, s, t, self.eta, self.s_noise)
        stage = Stages(run, x, s, t, self.eta, self.s_noise)

        def mean(r: float, inner: float, at_inner: Affine) -> Affine:
            """The mean of D up to r, if it changes evenly from the start to ``inner``."""
            share = r / inner * phi(2, stage.z(r)) / phi(1, stage.z(r))
            return denoised + share * (at_inner - denoised)

        _, first = run.denoise(stage.at(self.r_1, denoised), stage.level(self.r_1))
        state = stage.at(self.r_2, mean(self.r_2, self.r_1, first))
        _, second = run.denoise(state, stage.level(self.r_2))
        return stage.at(1.0, mean(1.0, self.r_2, second))
