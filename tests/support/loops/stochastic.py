# SPDX-License-Identifier: Apache-2.0
"""Methods for reverse SDEs with evaluations or integrals of their own."""

import math
from itertools import pairwise

import numpy as np
from scipy import integrate

from support.loops.exponential import ancestral, raised, sde
from support.loops.run import direct


def er_sde_5(rho):
    return rho * (np.exp(rho**0.3) + 10)


def er_sde(run, x, levels, order=3, s_noise=1.0, phi=er_sde_5):
    """arXiv 2309.06169 in rho = sigma / alpha, the integrals by quadrature."""
    past = []  # rho, D and its first derivative, the latest first
    for s, t in pairwise(levels):
        clean = run.denoise(x, s)
        if t == 0 or run.pure(s):
            x = clean if t == 0 else run.alpha(t) * clean + t * s_noise * run.draw()
            continue
        a, b = s / run.alpha(s), t / run.alpha(t)
        r = phi(b) / phi(a)
        out = r * x / run.alpha(s) + (1 - r) * clean
        slope = None
        if past and order > 1:
            slope = (clean - past[0][1]) / (a - past[0][0])
            area = float(integrate.fixed_quad(lambda u: 1 / phi(u), b, a, n=60)[0])
            out = out + (b - a + area * phi(b)) * slope
            if past[0][2] is not None and order > 2:
                curve = (slope - past[0][2]) / ((a - past[1][0]) / 2)
                moment = integrate.fixed_quad(lambda u, a=a: (u - a) / phi(u), b, a, n=60)[0]
                out = out + ((b - a) ** 2 / 2 + float(moment) * phi(b)) * curve
        past = [(a, clean, slope), *past]
        out = out + math.sqrt(b**2 - a**2 * r**2) * s_noise * run.draw()
        x = run.alpha(t) * out
    return x


def seeds_2(run, x, levels, eta=1.0, s_noise=1.0, r=0.5):
    for s, t in pairwise(levels):
        clean = run.denoise(x, s)
        if t == 0 or run.pure(s):
            x = clean if t == 0 else sde(run, x, s, t, eta, s_noise, clean)
            continue
        h = run.lam(t) - run.lam(s)
        m = run.sigma(run.lam(s) + r * h)
        inner = m / s * math.exp(-r * h * eta) * x
        inner = inner + run.alpha(m) * (1 - math.exp(-r * h * (1 + eta))) * clean
        first = second = 0.0
        if eta > 0:
            first, second = run.draw(), run.draw()
        inner = inner + m * s_noise * math.sqrt(1 - math.exp(-2 * r * h * eta)) * first
        mean = clean + (run.denoise(inner, m) - clean) / (2 * r)
        noise = math.exp((r - 1) * h * eta) * math.sqrt(1 - math.exp(-2 * r * h * eta)) * first
        noise = noise + math.sqrt(1 - math.exp(2 * (r - 1) * h * eta)) * second
        x = t / s * math.exp(-h * eta) * x + run.alpha(t) * (1 - math.exp(-h * (1 + eta))) * mean
        x = x + t * s_noise * noise
    return x


def seeds_3(run, x, levels, eta=1.0, s_noise=1.0, r_1=1 / 3, r_2=2 / 3):
    for s, t in pairwise(levels):
        clean = run.denoise(x, s)
        if t == 0 or run.pure(s):
            x = clean if t == 0 else sde(run, x, s, t, eta, s_noise, clean)
            continue
        h = run.lam(t) - run.lam(s)
        m1, m2 = (run.sigma(run.lam(s) + r * h) for r in (r_1, r_2))
        zeta = [run.draw() if eta > 0 else 0.0 for _ in range(3)]

        def one(z):
            return math.expm1(z)

        def two(z):
            return (math.expm1(z) - z) / z

        def gap(r, h=h):
            return math.sqrt(1 - math.exp(-2 * r * h * eta))

        c = 1 + eta
        noise = gap(r_1) * zeta[0]
        u = m1 / s * math.exp(-r_1 * h * eta) * x - run.alpha(m1) * one(-r_1 * h * c) * clean
        d1 = run.denoise(u + m1 * s_noise * noise, m1)
        a2 = r_2 / r_1 * two(-r_2 * h * c)
        noise = math.exp((r_1 - r_2) * h * eta) * noise + gap(r_2 - r_1) * zeta[1]
        v = m2 / s * math.exp(-r_2 * h * eta) * x
        v = v - run.alpha(m2) * ((one(-r_2 * h * c) - a2) * clean + a2 * d1)
        d2 = run.denoise(v + m2 * s_noise * noise, m2)
        b3 = two(-h * c) / r_2
        noise = math.exp((r_2 - 1) * h * eta) * noise + gap(1 - r_2) * zeta[2]
        x = t / s * math.exp(-h * eta) * x
        x = x - run.alpha(t) * ((one(-h * c) - b3) * clean + b3 * d2) + t * s_noise * noise
    return x


def dpmpp_sde(run, x, levels, eta=1.0, s_noise=1.0, r=0.5, independent=False):
    """With k-diffusion's ancestral levels of sigma / alpha."""

    def levels_of(start, end):
        up = min(end, eta * math.sqrt(end**2 * (start**2 - end**2) / start**2))
        return math.sqrt(end**2 - up**2), up

    for s, t in pairwise(levels):
        clean = run.denoise(x, s)
        if t == 0:
            x = clean
            continue
        if run.pure(s):  # levels_of from infinity
            share = min(eta, 1.0)
            x = run.alpha(t) * clean + t * math.sqrt(1 - share**2) * x / s
            x = x + t * share * s_noise * run.draw() if eta > 0 else x
            continue
        m = run.sigma(run.lam(s) + r * (run.lam(t) - run.lam(s)))
        start = s / run.alpha(s)
        used, first = clean, None
        for level in (m, t):
            down, up = levels_of(start, level / run.alpha(level))
            ahead = down / start * x / run.alpha(s) + (1 - down / start) * used
            if up > 0:
                noise = run.draw()
                if first is not None and not independent:  # increments of a path over sigma
                    noise = (
                        math.sqrt((s - m) / (s - t)) * first + math.sqrt((m - t) / (s - t)) * noise
                    )
                first = noise
                ahead = ahead + up * s_noise * noise
            ahead = run.alpha(level) * ahead
            if level == m:
                used = (1 - 1 / (2 * r)) * clean + 1 / (2 * r) * run.denoise(ahead, m)
        x = ahead
    return x


def lcm(run, x, levels, sigma_min=0.0, s_noise=1.0):
    for s, t in pairwise(levels):
        x = run.alpha(t) * run.denoise(x, s)
        if t > sigma_min:
            x = x + math.sqrt(t**2 - sigma_min**2) * s_noise * run.draw()
    return x


def dpm_fast(run, x, levels, evaluations=None, eta=0.0, s_noise=1.0):
    """Algorithms 1 and 2 of arXiv 2206.00927 on noise predictions, with ancestral noise."""
    positive = [u for u in levels if u > 0]
    m = len(positive) - 1
    total = evaluations if evaluations is not None else (3 * m - 3 if m > 1 else m)
    rest = [2, 1] if total % 3 == 0 else [total % 3]
    orders = [3] * (m - len(rest)) + rest
    for order, (s, t) in zip([*orders[:m], 1], pairwise(levels), strict=False):
        down, gain, up = ancestral(run, s, t, eta)
        if up > 0 and down < positive[-1]:
            down = positive[-1]
            gain = run.alpha(t) / run.alpha(down)
            up = math.sqrt(max(t**2 - gain**2 * down**2, 0.0)) if t > down else 0.0
        clean = run.denoise(x, s)
        if order == 1 or t == 0 or run.pure(s):
            ahead = direct(x, clean, s, down)
        else:

            def noise_at(u, level):
                return (u - run.alpha(level) * run.denoise(u, level)) / level

            h = run.lam(down) - run.lam(s)
            e = (x - run.alpha(s) * clean) / s
            r1 = 1 / order
            r2 = 2 * r1

            def base(level, share, x=x, e=e, s=s, h=h):
                return run.alpha(level) / run.alpha(s) * x - level * math.expm1(share * h) * e

            s1 = run.sigma(run.lam(s) + r1 * h)
            e1 = noise_at(base(s1, r1), s1)
            if order == 2:
                ahead = base(down, 1.0) - down / (2 * r1) * math.expm1(h) * (e1 - e)
            else:
                s2 = run.sigma(run.lam(s) + r2 * h)
                u2 = base(s2, r2)
                g = r2 * h
                u2 = u2 - s2 * (r2 / r1) * (math.expm1(g) / g - 1) * (e1 - e)
                e2 = noise_at(u2, s2)
                ahead = base(down, 1.0) - down / r2 * (math.expm1(h) / h - 1) * (e2 - e)
        x = raised(run, ahead, gain, up, s_noise)
    return x


LOOPS = {
    "dpm_fast": dpm_fast,
    "dpmpp_sde": dpmpp_sde,
    "er_sde": er_sde,
    "lcm": lcm,
    "seeds_2": seeds_2,
    "seeds_3": seeds_3,
}
