# SPDX-License-Identifier: Apache-2.0
"""DPM-Solver++ (Lu et al. 2022, arXiv 2211.01095), multistep, ODE and SDE, as in k-diffusion."""

from dataclasses import dataclass

from gradsampler import _checks
from gradsampler.elementary import Coefficient, sqrt
from gradsampler.engine.program import Affine, Recorder
from gradsampler.solvers.base import Solver, check_amounts
from gradsampler.solvers.exponential import (
    at_an_end,
    earlier,
    first_order,
    phi,
    renoising_step,
    reverse_sde_step,
)


@dataclass(frozen=True)
class DPMpp2M(Solver):
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2); of first order at both ends."""

    flow = True
    ode_order = 2

    def step(self, run: Recorder, x: Affine, s: Coefficient, t: Coefficient) -> Affine:
        x, denoised = run.denoise(x, s)
        if not at_an_end(run, s, t):
            for last in earlier(run, s, 1):
                half_log_snr = run.coordinates.half_log_snr
                now = half_log_snr(s)
                r = (now - half_log_snr(last.sigma)) / (half_log_snr(t) - now)
                denoised = (1 + 1 / (2 * r)) * denoised - 1 / (2 * r) * last.value
        return first_order(x, denoised, s, t)


@dataclass(frozen=True)
class DPMpp2MSDE(Solver):
    """SDE-DPM-Solver++(2M) (arXiv 2211.01095, equation 18 and appendix).

    Args:
        eta: 1 is the reverse SDE, 0 the ODE.
        s_noise: factor of the injected noise.
        variant: "midpoint" or "heun", k-diffusion's solver_type.
    """

    stochastic = True
    flow = True
    ode_order = 2
    weak_order = 2
    eta: Coefficient = 1.0
    s_noise: Coefficient = 1.0
    variant: str = "midpoint"

    def __post_init__(self) -> None:
        check_amounts(self, "dpmpp_2m_sde", "eta", "s_noise")
        _checks.choice("dpmpp_2m_sde: variant", self.variant, ("midpoint", "heun"))

    def step(self, run: Recorder, x: Affine, s: Coefficient, t: Coefficient) -> Affine:
        x, denoised = run.denoise(x, s)
        x = reverse_sde_step(run, x, denoised, s, t, self.eta, self.s_noise)
        if at_an_end(run, s, t):
            return x
        half_log_snr = run.coordinates.half_log_snr
        now = half_log_snr(s)
        h = half_log_snr(t) - now
        z = -(1 + self.eta) * h
        for last in earlier(run, s, 1):
            r = (now - half_log_snr(last.sigma)) / h
            weight = phi(1, z) / 2 if self.variant == "midpoint" else phi(2, z)
            x = x - run.coordinates.alpha(t) * z * weight / r * (denoised - last.value)
        return x


@dataclass(frozen=True)
class DPMpp3MSDE(Solver):
    """SDE-DPM-Solver++(3M) as k-diffusion has it.

    It weights the second derivative with half of what third order needs, so the method is of second
    order. diffusers' third-order multistep scheduler does the same.

    Args:
        eta: 1 is the reverse SDE, 0 the ODE.
        s_noise: factor of the injected noise.
    """

    stochastic = True
    flow = True
    ode_order = 2
    weak_order = 2
    eta: Coefficient = 1.0
    s_noise: Coefficient = 1.0

    def __post_init__(self) -> None:
        check_amounts(self, "dpmpp_3m_sde", "eta", "s_noise")

    def step(self, run: Recorder, x: Affine, s: Coefficient, t: Coefficient) -> Affine:
        x, denoised = run.denoise(x, s)
        x = reverse_sde_step(run, x, denoised, s, t, self.eta, self.s_noise)
        past = [] if at_an_end(run, s, t) else earlier(run, s, 2)
        if not past:
            return x
        half_log_snr = run.coordinates.half_log_snr
        h = half_log_snr(t) - half_log_snr(s)
        z = -(1 + self.eta) * h
        alpha = run.coordinates.alpha(t)
        r = (half_log_snr(s) - half_log_snr(past[0].sigma)) / h
        change = (denoised - past[0].value) / r
        if len(past) > 1:
            r1 = (half_log_snr(past[0].sigma) - half_log_snr(past[1].sigma)) / h
            curvature = (change - (past[0].value - past[1].value) / r1) / (r + r1)
            change = change + r * curvature
            x = x - alpha * z * phi(3, z) * curvature
        return x - alpha * z * phi(2, z) * change


@dataclass(frozen=True)
class DPMppSDE(Solver):
    """DPM-Solver++ with a noise at each of its two evaluations, as in k-diffusion.

    Args:
        eta: share of ancestral noise; 0 is DPM-Solver++(2S).
        s_noise: factor of the injected noise.
        r: where in the step, in half log-SNR, the second evaluation is.
        independent: draws the two noises of a step independently, as k-diffusion does with a
            ``noise_sampler`` of independent draws. Otherwise the noise up to the second evaluation
            is a part of that of the step, as with k-diffusion's Brownian tree; only then is the
            method of second order.
    """

    stochastic = True
    flow = True
    ode_order = 2
    weak_order = 1
    eta: Coefficient = 1.0
    s_noise: Coefficient = 1.0
    r: float = 0.5
    independent: bool = False

    def __post_init__(self) -> None:
        check_amounts(self, "dpmpp_sde", "eta", "s_noise")
        if not 0 < _checks.finite("dpmpp_sde: r", self.r) < 1:
            _checks.fail("dpmpp_sde: r", "lie between 0 and 1", self.r)

    def step(self, run: Recorder, x: Affine, s: Coefficient, t: Coefficient) -> Affine:
        x, denoised = run.denoise(x, s)
        amount = self.eta, self.s_noise
        if at_an_end(run, s, t):
            return renoising_step(run, x, denoised, s, t, *amount)
        half_log_snr = run.coordinates.half_log_snr
        inner = run.coordinates.level((1 - self.r) * half_log_snr(s) + self.r * half_log_snr(t))
        drawn: list[Affine] = []

        def path() -> Affine:
            drawn.append(run.noise())
            if len(drawn) == 1 or self.independent:
                return drawn[-1]
            share = (s - inner) / (s - t)  # of the path, in the level as its time
            return sqrt(share) * drawn[0] + sqrt(1 - share) * drawn[1]

        _, at_inner = run.denoise(renoising_step(run, x, denoised, s, inner, *amount, path), inner)
        mean = denoised + (at_inner - denoised) / (2 * self.r)
        return renoising_step(run, x, mean, s, t, *amount, path)
