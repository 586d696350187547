# SPDX-License-Identifier: Apache-2.0
"""UniPC and SA-Solver: a state predicted, then corrected by the D at the prediction."""

import math
from itertools import pairwise

import numpy as np
from scipy import integrate

from support.loops.exponential import lagrange
from support.loops.run import direct


def uni_pc(run, x, levels, order=3, variant="bh1", lower_order_final=True):
    """With the linear systems of the paper, equations (9) to (11): R(p) a(p) B(h) = phi(p)."""
    past = []  # lambda and D, the latest first
    base, used = None, None  # of the last predictor
    for i, (s, t) in enumerate(pairwise(levels)):
        clean = run.denoise(x, s)
        if base is not None:
            x = base(used, clean)
        base = None
        if t == 0 or run.pure(s):
            x = direct(x, clean, s, t)
            if t > 0:
                past = []
            continue
        past = [(run.lam(s), clean), *past][:order]
        p = min(order, len(past))
        if lower_order_final:
            p = min(p, len(levels) - 1 - i)
        h = run.lam(t) - run.lam(s)
        used = [((lam - run.lam(s)) / h, old - clean) for lam, old in past[1:p]]
        kept = t / s * x - run.alpha(t) * math.expm1(-h) * clean

        alpha = run.alpha(t)

        def base(used, ahead, h=h, kept=kept, clean=clean, alpha=alpha):
            """The state with the differences at r = used and, given D ahead, at r = 1."""
            points = used if ahead is None else [*used, (1.0, ahead - clean)]
            size = {"bh1": -h, "bh2": math.expm1(-h)}[variant]
            n = len(points)
            if n == 0:
                return kept
            if n == 1:
                a = [0.5]
            else:
                phi, vector = math.expm1(-h) / -h - 1, []
                for k in range(1, n + 1):
                    vector.append(phi * math.factorial(k) / size)
                    phi = phi / -h - 1 / math.factorial(k + 1)
                matrix = [[r ** (k - 1) for r, _ in points] for k in range(1, n + 1)]
                a = np.linalg.solve(matrix, vector)
            total = sum(float(w) / r * d for w, (r, d) in zip(a, points, strict=True))
            return kept - alpha * size * total

        x = base(used, None)
    return x


def uni_pc_bh2(run, x, levels, order=3, lower_order_final=True):
    return uni_pc(run, x, levels, order, "bh2", lower_order_final)


def sa_solver(
    run,
    x,
    levels,
    eta=1.0,
    s_noise=1.0,
    s_tmin=0.0,
    s_tmax=math.inf,
    predictor_order=3,
    corrector_order=4,
    pece=False,
    simple_order_2=False,
):
    """The integrals of equations (14) and (17) by quadrature."""
    n = len(levels) - 1
    past = []  # lambda and D
    step = None

    def integrals(nodes, start, end, c):
        if simple_order_2 and len(nodes) == 2:
            h = end - start
            other = nodes[1] if nodes[0] == start else nodes[0]
            weight = c * h * 0.5 * h / (other - start)
            total = -math.expm1(-c * h)
            return [total - weight, weight] if nodes[0] == start else [weight, total - weight]
        return [
            float(
                integrate.fixed_quad(
                    lambda u, k=k: c * np.exp(-c * (end - u)) * lagrange(nodes, k, u),
                    start,
                    end,
                    n=24,
                )[0]
            )
            for k in range(len(nodes))
        ]

    for i, (s, t) in enumerate(pairwise(levels)):
        clean = run.denoise(x, s)
        to_end = n - 1 - i if levels[-1] == 0 else 9
        count = min(corrector_order, len(past) + 1, to_end + 1)
        if step is not None and count > 0 and (t > 0 or pece):
            start, decay, before, noise, c = step
            nodes = [(run.lam(s), clean), *past][:count]
            weights = integrals([lam for lam, _ in nodes], start, run.lam(s), c)
            sums = sum(w * d for w, (_, d) in zip(weights, nodes, strict=True))
            x = decay * before + run.alpha(s) * sums + noise
            if pece:
                clean = run.denoise(x, s)
        step = None
        if t == 0:
            x = clean
            continue
        rate = eta if s_tmin < t <= s_tmax else 0.0
        if run.pure(s):
            x = run.alpha(t) * clean + t * (s_noise * run.draw() if rate > 0 else x / s)
            continue
        past = [(run.lam(s), clean), *past][:4]
        h, c = run.lam(t) - run.lam(s), 1 + rate
        nodes = past[: max(1, min(predictor_order, to_end))]
        weights = integrals([lam for lam, _ in nodes], run.lam(s), run.lam(t), c)
        sums = sum(w * d for w, (_, d) in zip(weights, nodes, strict=True))
        decay = t / s * math.exp(-rate * h)
        noise = 0.0
        if rate > 0:
            noise = t * math.sqrt(1 - math.exp(-2 * rate * h)) * s_noise * run.draw()
        step = (run.lam(s), decay, x, noise, c)
        x = decay * x + run.alpha(t) * sums + noise
    return x


def sa_solver_pece(run, x, levels, **options):
    return sa_solver(run, x, levels, pece=True, **options)


LOOPS = {
    "sa_solver": sa_solver,
    "sa_solver_pece": sa_solver_pece,
    "uni_pc": uni_pc,
    "uni_pc_bh2": uni_pc_bh2,
}
