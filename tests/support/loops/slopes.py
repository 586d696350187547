# SPDX-License-Identifier: Apache-2.0
"""Methods on dx/ds = (x - D)/s, which is the velocity in flow time."""

import math
from itertools import pairwise

import numpy as np


def slope(run, x, s):
    return (x - run.denoise(x, s)) / s


def dpm_2(run, x, levels):
    for s, t in pairwise(levels):
        d = slope(run, x, s)
        if t == 0:
            x = x - s * d
        else:
            m = math.exp((math.log(s) + math.log(t)) / 2)
            x = x + (t - s) * slope(run, x + (m - s) * d, m)
    return x


def heun_edm_x0(run, x, levels):
    for s, t in pairwise(levels):
        clean = run.denoise(x, s)
        if t > 0:
            ahead = clean + t / s * (x - clean)
            clean = (clean + run.denoise(ahead, t)) / 2
        x = clean + t / s * (x - clean)
    return x


def kutta3(run, x, levels):
    for s, t in pairwise(levels):
        h = t - s
        k1 = slope(run, x, s)
        if t == 0:
            x = x + h * k1
            continue
        k2 = slope(run, x + h / 2 * k1, s + h / 2)
        k3 = slope(run, x - h * k1 + 2 * h * k2, t)
        x = x + h * (k1 + 4 * k2 + k3) / 6
    return x


def restart(run, x, levels, s_noise=1.0):
    for s, t in pairwise(levels):
        if t > s:
            gain = run.alpha(t) / run.alpha(s)
            x = gain * x + s_noise * math.sqrt(t**2 - (gain * s) ** 2) * run.draw()
            continue
        d = slope(run, x, s)
        if t > 0:
            d = (d + slope(run, x + (t - s) * d, t)) / 2
        x = x + (t - s) * d
    return x


def heunpp2(run, x, levels):
    n, top = len(levels) - 1, levels[0]
    for i in range(n):
        s, t = levels[i], levels[i + 1]
        d = slope(run, x, s)
        if i + 1 < n:
            x2 = x + (t - s) * d
            d2 = slope(run, x2, t)
            if i + 2 == n:
                w2 = t / (2 * top)
                d = (1 - w2) * d + w2 * d2
            else:
                u = levels[i + 2]
                d3 = slope(run, x2 + (u - t) * d2, u)
                w2, w3 = t / (3 * top), u / (3 * top)
                d = (1 - w2 - w3) * d + w2 * d2 + w3 * d3
        x = x + (t - s) * d
    return x


def lms(run, x, levels, order=4):
    """Exact integrals of the Lagrange polynomials, as numpy's polynomials."""
    past = []
    for i, (s, t) in enumerate(pairwise(levels)):
        past = [slope(run, x, s), *past][:order]
        nodes = [levels[i - k] for k in range(len(past))]
        for k, d in enumerate(past):
            others = nodes[:k] + nodes[k + 1 :]
            basis = np.poly1d(others, r=True) if others else np.poly1d([1.0])
            integral = (basis / basis(nodes[k])).integ()
            x = x + (integral(t) - integral(s)) * d
    return x


def ipndm(run, x, levels, order=4):
    table = {
        1: [1],
        2: [3 / 2, -1 / 2],
        3: [23 / 12, -16 / 12, 5 / 12],
        4: [55 / 24, -59 / 24, 37 / 24, -9 / 24],
    }
    past = []
    for s, t in pairwise(levels):
        past = [slope(run, x, s), *past][:order]
        mean = (
            past[0] if t == 0 else sum(c * d for c, d in zip(table[len(past)], past, strict=True))
        )
        x = x + (t - s) * mean
    return x


def ipndm_v(run, x, levels, order=4):
    """By divided differences; ``third`` and ``fourth`` are those of diff-sampler."""
    past, nodes = [], []
    for s, t in pairwise(levels):
        past, nodes = [slope(run, x, s), *past][:order], [s, *nodes][:order]
        h = t - s
        if t == 0:
            x = x + h * past[0]
            continue
        mean = past[0]
        if len(past) > 1:
            mean = mean + h / 2 * divided(nodes[:2], past[:2])
        if len(past) > 2:
            h1, h2 = nodes[0] - nodes[1], nodes[1] - nodes[2]
            share = h**2 / (3 * h1 * (h1 + h2))  # of which the bracket should have taken a part
            third = (1 - share) / 2
            mean = mean + third * h1 * (h1 + h2) * divided(nodes[:3], past[:3])
        if len(past) > 3:
            h1, h2, h3 = (a - b for a, b in pairwise(nodes))
            share = (1 - h / (3 * (h + h1))) / 2
            share = share + (1 - h / (2 * (h + h1))) * h / (6 * (h + h1 + h2))  # should be minus
            fourth = share * h * (h + h1) * (h + h1 + h2)
            mean = mean + fourth * divided(nodes, past)
            # Its last weight has h1/h2 in the place of h2/h3, so that the four do not sum to 1.
            scaled = fourth / (h2 * (h2 + h3) * (h1 + h2 + h3))
            mean = mean + scaled * (h2 / h3 - h1 / h2) * past[3]
        x = x + h * mean
    return x


def divided(nodes, values):
    """Newton's divided difference."""
    if len(nodes) == 1:
        return values[0]
    upper, lower = divided(nodes[:-1], values[:-1]), divided(nodes[1:], values[1:])
    return (upper - lower) / (nodes[0] - nodes[-1])


def gradient_estimation(run, x, levels, gamma=2.0):
    before = None
    for s, t in pairwise(levels):
        d = slope(run, x, s)
        bar = d if before is None or t == 0 else gamma * d + (1 - gamma) * before
        x = x + (t - s) * bar
        before = d
    return x


LOOPS = {
    "dpm_2": dpm_2,
    "gradient_estimation": gradient_estimation,
    "heun_edm_x0": heun_edm_x0,
    "heunpp2": heunpp2,
    "ipndm": ipndm,
    "ipndm_v": ipndm_v,
    "kutta3": kutta3,
    "lms": lms,
    "restart": restart,
}
