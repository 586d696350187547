# SPDX-License-Identifier: Apache-2.0
"""Weights that integrate the polynomial through a few points exactly, for multistep methods."""

import math
from collections.abc import Iterable, Sequence

from gradsampler.elementary import Coefficient
from gradsampler.engine.program import Affine
from gradsampler.solvers.exponential import phi


def interpolatory(
    nodes: Sequence[Coefficient], moments: Sequence[Coefficient]
) -> list[Coefficient]:
    """Weights w with ``sum_j w[j] * nodes[j]^k = moments[k]``.

    Björck and Pereyra 1970, "Solution of Vandermonde systems of equations", Math. Comp. 24.
    """
    w = list(moments)
    for k in range(len(w) - 1):
        for i in range(len(w) - 1, k, -1):
            w[i] = w[i] - nodes[k] * w[i - 1]
    for k in reversed(range(len(w) - 1)):
        for i in range(k + 1, len(w)):
            w[i] = w[i] / (nodes[i] - nodes[i - k - 1])
        for i in range(k, len(w) - 1):
            w[i] = w[i] - w[i + 1]
    return w


def adams(nodes: Sequence[Coefficient], z: Coefficient = 0.0) -> list[Coefficient]:
    """The integrals over v from 0 to 1 of ``e^(z(1-v))`` times each Lagrange polynomial.

    With z = 0 these are the weights of Adams' methods for any spacing of the nodes, which are
    given as multiples of the step from its start; else those of the exponential methods.
    """
    moments = [math.factorial(k) * phi(k + 1, z) for k in range(len(nodes))]
    return interpolatory(nodes, moments)


def combined(weights: Iterable[Coefficient], values: Iterable[Affine]) -> Affine:
    """The sum of the products."""
    return sum((w * v for w, v in zip(weights, values, strict=True)), Affine())
