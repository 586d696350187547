# SPDX-License-Identifier: Apache-2.0
"""Samplers as one would write them by hand, differentiated by autograd."""

from itertools import pairwise

from support.runs import LEVELS, levels

SIGMAS = levels(LEVELS)


def euler(denoiser, z0, sigmas=SIGMAS, **cond):
    """Euler's method as one would write it by hand."""
    x = sigmas[0] * z0
    for s, t in pairwise(sigmas):
        slope = (x - denoiser(x, s.to(x.dtype).expand(len(x)), **cond)) / s
        x = x + (t - s) * slope
    return x
