# SPDX-License-Identifier: Apache-2.0
"""CFG++ and RES's multistep form as ComfyUI has them; ``u`` is the unconditional prediction."""

import math
from itertools import pairwise

from support.loops.exponential import ancestral, raised
from support.loops.run import direct


def noise_of(run, x, u, s):
    return (x - run.alpha(s) * u) / s


def euler_cfg_pp(run, x, levels, eta=0.0, s_noise=1.0):
    for s, t in pairwise(levels):
        clean, u = run.both(x, s)
        if t == 0:
            x = clean
            continue
        share = 1.0 if run.pure(s) else 1 - (t * run.alpha(s) / (s * run.alpha(t))) ** 2
        up = min(1.0, eta * math.sqrt(share))
        x = run.alpha(t) * clean + t * math.sqrt(1 - up**2) * noise_of(run, x, u, s)
        x = x + t * up * s_noise * run.draw() if up > 0 else x
    return x


def euler_ancestral_cfg_pp(run, x, levels, eta=1.0, s_noise=1.0):
    return euler_cfg_pp(run, x, levels, eta, s_noise)


def dpmpp_2m_cfg_pp(run, x, levels):
    past = None
    for s, t in pairwise(levels):
        clean, u = run.both(x, s)
        used = clean
        if past is not None and t > 0:
            before, old = past
            h, last = run.lam(t) - run.lam(s), run.lam(s) - run.lam(before)
            used = clean + h / (2 * last) * (clean - old)
        past = None if run.pure(s) else (s, u)
        # alpha(t) D + sigma(t) e for the plain part, and the change of D over the step
        x = run.alpha(t) * clean + t * noise_of(run, x, u, s) + (1 - t / s) * (used - clean)
    return x


def dpmpp_2s_ancestral_cfg_pp(run, x, levels, eta=1.0, s_noise=1.0):
    for s, t in pairwise(levels):
        down, gain, up = ancestral(run, s, t, eta)
        clean, u = run.both(x, s)
        mean = clean
        if down > 0 and not run.pure(s):
            m = run.sigma((run.lam(s) + run.lam(down)) / 2)
            mean = run.denoise(direct(x + run.alpha(s) * (clean - u), clean, s, m), m)
        x = direct(x + run.alpha(s) * (clean - u), mean, s, down)
        x = raised(run, x, gain, up, s_noise)
    return x


def res_multistep(run, x, levels, eta=0.0, s_noise=1.0, cfg_pp=False):
    past, reached = None, None
    for s, t in pairwise(levels):
        down, gain, up = ancestral(run, s, t, eta)
        clean, u = run.both(x, s)
        kept = x + run.alpha(s) * (clean - u) if cfg_pp else x
        if down == 0 or past is None or run.pure(s) or reached == 0:
            x = direct(kept, clean, s, down)
        else:
            before, old = past
            h = run.lam(down) - run.lam(s)
            c2 = (run.lam(before) - run.lam(reached)) / h
            one = math.expm1(-h) / -h
            two = (one - 1) / -h
            new = u if cfg_pp else clean
            change = (one - two / c2) * new + two / c2 * old
            x = down / s * kept + run.alpha(down) * h * change
        past = None if run.pure(s) else (s, u if cfg_pp else clean)
        reached = down
        x = raised(run, x, gain, up, s_noise)
    return x


def res_multistep_ancestral(run, x, levels, eta=1.0, s_noise=1.0):
    return res_multistep(run, x, levels, eta, s_noise)


def res_multistep_cfg_pp(run, x, levels, eta=0.0, s_noise=1.0):
    return res_multistep(run, x, levels, eta, s_noise, cfg_pp=True)


def res_multistep_ancestral_cfg_pp(run, x, levels, eta=1.0, s_noise=1.0):
    return res_multistep(run, x, levels, eta, s_noise, cfg_pp=True)


def gradient_estimation_cfg_pp(run, x, levels, gamma=2.0):
    before = None
    for s, t in pairwise(levels):
        clean, u = run.both(x, s)
        d = (x - u) / s
        x = direct(x + run.alpha(s) * (clean - u), clean, s, t)
        if before is not None and t > 0:
            x = x + (gamma - 1) * (t - s) * (d - before)
        before = d
    return x


LOOPS = {
    "dpmpp_2m_cfg_pp": dpmpp_2m_cfg_pp,
    "dpmpp_2s_ancestral_cfg_pp": dpmpp_2s_ancestral_cfg_pp,
    "euler_ancestral_cfg_pp": euler_ancestral_cfg_pp,
    "euler_cfg_pp": euler_cfg_pp,
    "gradient_estimation_cfg_pp": gradient_estimation_cfg_pp,
    "res_multistep": res_multistep,
    "res_multistep_ancestral": res_multistep_ancestral,
    "res_multistep_ancestral_cfg_pp": res_multistep_ancestral_cfg_pp,
    "res_multistep_cfg_pp": res_multistep_cfg_pp,
}
