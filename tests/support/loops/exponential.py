# SPDX-License-Identifier: Apache-2.0
"""Methods in half the log-SNR, lambda, in any coordinates."""

import math
from itertools import pairwise

import numpy as np
from scipy import integrate

from support.loops.run import direct


def ancestral(run, s, t, eta):
    """(down, gain, up): k-diffusion's in VE coordinates, ComfyUI's for rectified flow."""
    if t == 0:
        return 0.0, 1.0, 0.0
    if run.flow:
        down = max(t * (1 + (t / s - 1) * eta), 0.0)
        gain = (1 - t) / (1 - down)
        return down, gain, math.sqrt(max(t**2 - down**2 * gain**2, 0.0))
    up = min(t, eta * math.sqrt(t**2 * (s**2 - t**2) / s**2))
    return math.sqrt(t**2 - up**2), 1.0, up


def raised(run, x, gain, up, s_noise):
    return gain * x + s_noise * up * run.draw() if up > 0 else x


def euler_ancestral(run, x, levels, eta=1.0, s_noise=1.0):
    for s, t in pairwise(levels):
        down, gain, up = ancestral(run, s, t, eta)
        x = raised(run, direct(x, run.denoise(x, s), s, down), gain, up, s_noise)
    return x


def dpm_2_ancestral(run, x, levels, eta=1.0, s_noise=1.0):
    for s, t in pairwise(levels):
        down, gain, up = ancestral(run, s, t, eta)
        clean = run.denoise(x, s)
        if down == 0:
            x = clean
        else:
            m = math.sqrt(s * down)
            half = x + (m - s) * (x - clean) / s
            x = x + (down - s) * (half - run.denoise(half, m)) / m
        x = raised(run, x, gain, up, s_noise)
    return x


def dpmpp_2s_ancestral(run, x, levels, eta=1.0, s_noise=1.0):
    for s, t in pairwise(levels):
        down, gain, up = ancestral(run, s, t, eta)
        clean = run.denoise(x, s)
        if down > 0 and not run.pure(s):
            m = run.sigma((run.lam(s) + run.lam(down)) / 2)
            clean = run.denoise(direct(x, clean, s, m), m)
        x = raised(run, direct(x, clean, s, down), gain, up, s_noise)
    return x


def dpmpp_2m(run, x, levels):
    past = []
    for s, t in pairwise(levels):
        clean = run.denoise(x, s)
        used = clean
        if past and t > 0:
            before, old = past[-1]
            h, last = run.lam(t) - run.lam(s), run.lam(s) - run.lam(before)
            used = clean + h / (2 * last) * (clean - old)
        if not run.pure(s):
            past.append((s, clean))
        x = direct(x, used, s, t)
    return x


def sde(run, x, s, t, eta, s_noise, integral):
    """The decayed state, alpha times an integral over D, and the noise of the step."""
    if run.pure(s):
        if eta > 0:
            return run.alpha(t) * integral + s_noise * t * run.draw()
        return t / s * x + run.alpha(t) * integral
    h = run.lam(t) - run.lam(s)
    x = t / s * math.exp(-eta * h) * x + run.alpha(t) * integral
    if eta > 0:
        x = x + s_noise * t * math.sqrt(1 - math.exp(-2 * eta * h)) * run.draw()
    return x


def dpmpp_2m_sde(run, x, levels, eta=1.0, s_noise=1.0, variant="midpoint"):
    past = []
    for s, t in pairwise(levels):
        clean = run.denoise(x, s)
        if t == 0:
            x = clean
            continue
        if run.pure(s):
            x = sde(run, x, s, t, eta, s_noise, clean)
            continue
        h = run.lam(t) - run.lam(s)
        factor = 1 - math.exp(-h - eta * h)
        integral = factor * clean
        if past:
            before, old = past[-1]
            weight = factor / 2 if variant == "midpoint" else 1 - factor / (h + eta * h)
            integral = integral + weight * h / (run.lam(s) - run.lam(before)) * (clean - old)
        past.append((s, clean))
        x = sde(run, x, s, t, eta, s_noise, integral)
    return x


def dpmpp_2m_sde_heun(run, x, levels, eta=1.0, s_noise=1.0):
    return dpmpp_2m_sde(run, x, levels, eta, s_noise, "heun")


def dpmpp_3m_sde(run, x, levels, eta=1.0, s_noise=1.0):
    past = []
    for s, t in pairwise(levels):
        clean = run.denoise(x, s)
        if t == 0 or run.pure(s):
            x = clean if t == 0 else sde(run, x, s, t, eta, s_noise, clean)
            continue
        h = run.lam(t) - run.lam(s)
        he = h * (1 + eta)
        phi_2 = math.expm1(-he) / he + 1
        phi_3 = phi_2 / he - 0.5
        integral = -math.expm1(-he) * clean
        if past:
            r0 = (run.lam(s) - run.lam(past[-1][0])) / h
            d1 = (clean - past[-1][1]) / r0
            if len(past) > 1:
                r1 = (run.lam(past[-1][0]) - run.lam(past[-2][0])) / h
                d1_1 = (past[-1][1] - past[-2][1]) / r1
                d2 = (d1 - d1_1) / (r0 + r1)
                d1 = d1 + (d1 - d1_1) * r0 / (r0 + r1)
                integral = integral - phi_3 * d2
            integral = integral + phi_2 * d1
        past.append((s, clean))
        x = sde(run, x, s, t, eta, s_noise, integral)
    return x


def refined(run, x, s, m, t, clean, at_m):
    """The second-order exponential step of arXiv 2308.02157 with points s and m."""
    h = run.lam(t) - run.lam(s)
    c2 = (run.lam(m) - run.lam(s)) / h
    one = math.expm1(-h) / -h
    two = (one - 1) / -h
    return t / s * x + run.alpha(t) * h * ((one - two / c2) * clean + two / c2 * at_m)


def res_2ab(run, x, levels):
    past = None
    for s, t in pairwise(levels):
        clean = run.denoise(x, s)
        if past is not None and t > 0:
            x = refined(run, x, s, past[0], t, clean, past[1])
        else:
            x = direct(x, clean, s, t)
        past = None if run.pure(s) else (s, clean)
    return x


def res_2mid(run, x, levels, stable=False):
    for s, t in pairwise(levels):
        clean = run.denoise(x, s)
        if t == 0 or run.pure(s):
            x = direct(x, clean, s, t)
            continue
        m = run.sigma((run.lam(s) + run.lam(t)) / 2)
        at_m = run.denoise(direct(x, clean, s, m), m)
        x = direct(x, at_m, s, t) if stable else refined(run, x, s, m, t, clean, at_m)
    return x


def res_2mid_stable(run, x, levels):
    return res_2mid(run, x, levels, stable=True)


def vp_time(rho):
    """The time of Karras's VP schedule with levels 80 at 1 and 0.002 at 0.001."""
    top, bottom = math.log(80**2 + 1), math.log(0.002**2 + 1) / 1e-3
    beta_d = 2 * (bottom - top) / (1e-3 - 1)
    beta_min = top - beta_d / 2
    return (np.sqrt(beta_min**2 + 2 * beta_d * np.log(rho**2 + 1)) - beta_min) / beta_d


def lagrange(nodes, k, u):
    others = [v for j, v in enumerate(nodes) if j != k]
    return math.prod((u - v) / (nodes[k] - v) for v in others)


def deis(run, x, levels, order=3, variable="time"):
    """Past noises as a polynomial, the integrals by quadrature."""
    of_rho = {"time": vp_time, "rho": np.asarray, "log_rho": np.log}[variable]
    past = []  # rho and noise, the latest first
    for s, t in pairwise(levels):
        clean = run.denoise(x, s)
        if t == 0 or run.pure(s):
            x = direct(x, clean, s, t)
            continue
        start, end = (level / run.alpha(level) for level in (s, t))
        past = [(start, (x - run.alpha(s) * clean) / s), *past][:order]
        nodes = [of_rho(rho) for rho, _ in past]
        x = x / run.alpha(s)
        for k, (_, noise) in enumerate(past):

            def basis(rho, k=k, nodes=nodes):
                return lagrange(nodes, k, of_rho(rho))

            x = x + float(integrate.fixed_quad(basis, start, end, n=60)[0]) * noise
        x = run.alpha(t) * x
    return x


def ddim(run, x, levels, eta=0.0, s_noise=1.0):
    """In VP coordinates, where a state is sqrt(abar) x0 + sqrt(1 - abar) e."""
    for s, t in pairwise(levels):
        clean = run.denoise(x, s)
        abar, after = (run.alpha(u) ** 2 / (run.alpha(u) ** 2 + u**2) for u in (s, t))
        noise = (x - run.alpha(s) * clean) / s
        spread = eta * math.sqrt((1 - after) / (1 - abar)) * math.sqrt(1 - abar / after)
        rest = 1 - eta**2 + eta**2 * abar * (1 - after) / (after * (1 - abar))
        x = math.sqrt(after) * clean + math.sqrt((1 - after) * rest) * noise
        if spread > 0:
            x = x + spread * s_noise * run.draw()
        x = x * math.hypot(run.alpha(t), t)
    return x


def ddpm(run, x, levels, s_noise=1.0):
    return ddim(run, x, levels, 1.0, s_noise)


LOOPS = {
    "ddim": ddim,
    "ddpm": ddpm,
    "deis": deis,
    "dpm_2_ancestral": dpm_2_ancestral,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "dpmpp_2m_sde_heun": dpmpp_2m_sde_heun,
    "dpmpp_2s_ancestral": dpmpp_2s_ancestral,
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "euler_ancestral": euler_ancestral,
    "res_2ab": res_2ab,
    "res_2mid": res_2mid,
    "res_2mid_stable": res_2mid_stable,
}
