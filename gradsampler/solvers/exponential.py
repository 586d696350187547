# SPDX-License-Identifier: Apache-2.0
"""What exponential integrators share: their functions, and their first-order step.

They solve ``d(x/sigma)/dlambda = alpha/sigma * D`` in half the log-SNR, lambda, with the decay of
the state exact (Lu et al. 2022, arXiv 2211.01095, equation 8). Where lambda is infinite, at level 0
and where a state is noise alone, each of their steps has the first-order one as its limit.
"""

import math
from collections.abc import Callable

from gradsampler.elementary import Coefficient, as_float, exp, expm1, sqrt, square
from gradsampler.engine.program import Affine, Denoised, Recorder

# Below this the closed forms cancel; the Taylor series is then exact to rounding.
_NEAR_ZERO = 0.5
_ORDER = 18


def phi(k: int, z: Coefficient) -> Coefficient:
    """phi_k(z) = sum of z^n / (n+k)! over n, for k >= 1, to full accuracy also near 0.

    ``phi_1(z) = (e^z - 1)/z`` and ``phi_{k+1}(z) = (phi_k(z) - 1/k!)/z``.
    """
    if abs(as_float(z)) <= _NEAR_ZERO:
        return _series(z, k)
    found = expm1(z) / z
    for n in range(1, k):
        found = (found - 1 / math.factorial(n)) / z
    return found


def phi1(z: Coefficient) -> Coefficient:
    """(e^z - 1)/z."""
    return phi(1, z)


def phi2(z: Coefficient) -> Coefficient:
    """(phi1(z) - 1)/z."""
    return phi(2, z)


def _series(z: Coefficient, k: int) -> Coefficient:
    """Taylor series of phi_k by Horner's rule."""
    total = 0 * z + 1 / math.factorial(_ORDER + k)
    for n in reversed(range(_ORDER)):
        total = total * z + 1 / math.factorial(n + k)
    return total


def at_an_end(run: Recorder, s: Coefficient, t: Coefficient) -> bool:
    """Whether lambda is infinite at s, where the state is noise alone, or at t = 0."""
    return bool(t == 0) or bool(run.coordinates.alpha(s) == 0)


def earlier(run: Recorder, s: Coefficient, count: int) -> list[Denoised]:
    """`Recorder.history` without a prediction at an infinite lambda."""
    return [p for p in run.history(s, count) if run.coordinates.alpha(p.sigma) != 0]


def epsilon(run: Recorder, x: Affine, denoised: Affine, s: Coefficient) -> Affine:
    """The noise in the state x at level s, if D is the sample in it."""
    return (x - run.coordinates.alpha(s) * denoised) / s


def first_order(x: Affine, denoised: Affine, s: Coefficient, t: Coefficient) -> Affine:
    """The exponential Euler step, exact where D is constant; also right at t = 0."""
    return (t / s) * x + (1 - t / s) * denoised


def predicted_between(
    run: Recorder, x: Affine, denoised: Affine, s: Coefficient, t: Coefficient
) -> tuple[Coefficient, Affine]:
    """The level m halfway in half log-SNR, sqrt(s t) in VE coordinates, and D at the state that an
    exponential Euler step reaches there.
    """
    half_log_snr = run.coordinates.half_log_snr
    m = run.coordinates.level((half_log_snr(s) + half_log_snr(t)) / 2)
    _, at_m = run.denoise(first_order(x, denoised, s, m), m)
    return m, at_m


def reverse_sde_step(
    run: Recorder,
    x: Affine,
    denoised: Affine,
    s: Coefficient,
    t: Coefficient,
    eta: Coefficient,
    s_noise: Coefficient,
) -> Affine:
    """The exponential Euler step of ``dx = -(1+eta)(x - D) dlambda + sqrt(2 eta) sigma dW`` in VE
    coordinates, in any (arXiv 2211.01095, equation 18). eta = 1 is the reverse SDE, 0 the ODE.
    """
    alpha = run.coordinates.alpha
    if eta == 0 or t == 0:
        return first_order(x, denoised, s, t)
    if alpha(s) == 0:
        return alpha(t) * denoised + s_noise * t * run.noise()
    h = run.coordinates.half_log_snr(t) - run.coordinates.half_log_snr(s)
    x = t / s * exp(-eta * h) * x - alpha(t) * expm1(-(1 + eta) * h) * denoised
    return x + s_noise * t * sqrt(-expm1(-2 * eta * h)) * run.noise()


def renoising_step(
    run: Recorder,
    x: Affine,
    denoised: Affine,
    s: Coefficient,
    t: Coefficient,
    eta: Coefficient,
    s_noise: Coefficient,
    noise: Callable[[], Affine] | None = None,
) -> Affine:
    """DDIM's step, with a share of the noise drawn anew (arXiv 2010.02502, equations 12 and 16).

    In VE coordinates it is the ancestral step of k-diffusion; an eta above 1 acts as far as there
    is noise to draw. ``noise`` draws it, by default as a noise of its own.
    """
    noise = noise or run.noise
    alpha = run.coordinates.alpha
    if t == 0:
        return denoised
    x, clean = epsilon(run, x, denoised, s), alpha(t) * denoised
    if eta == 0:
        return clean + t * x
    fresh = eta * sqrt(1 - square((t * alpha(s)) / (s * alpha(t))))
    if fresh >= 1:
        return clean + s_noise * t * noise()
    return clean + t * sqrt(1 - square(fresh)) * x + s_noise * t * fresh * noise()
