# SPDX-License-Identifier: Apache-2.0
"""Euler's method as one would write it by hand, differentiated by autograd."""

from itertools import pairwise

from support.runs import LEVELS, levels

SIGMAS = levels(LEVELS)


def euler(denoiser, z0, sigmas=SIGMAS, **cond):
    """The sample [B, *state] from initial noise ``z0`` over the levels ``sigmas``."""
    x = sigmas[0] * z0
    for s, t in pairwise(sigmas):
        slope = (x - denoiser(x, s.to(x.dtype).expand(len(x)), **cond)) / s
        x = x + (t - s) * slope
    return x
