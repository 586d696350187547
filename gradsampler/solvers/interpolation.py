# SPDX-License-Identifier: Apache-2.0
"""Weights that integrate the polynomial through a few points exactly, for multistep methods."""

import math
from collections.abc import Callable, Iterable, Sequence

from numpy.polynomial.legendre import leggauss

from gradsampler.elementary import Coefficient, exp, log
from gradsampler.engine.program import Affine
from gradsampler.solvers.exponential import phi

_NODES, _WEIGHTS = (array.tolist() for array in leggauss(32))


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


def halved(nodes: Sequence[Coefficient], z: Coefficient, factor: Coefficient) -> list[Coefficient]:
    """`adams` for two nodes, 0 and another, with ``factor/2`` in place of phi2(z).

    UniPC and the SA-Solver publish this simplification; it is of the same order.
    """
    weight = factor / (2 * nodes[1])
    return [phi(1, z) - weight, weight]


def integral(
    f: Callable[[Coefficient], Coefficient], start: Coefficient, end: Coefficient
) -> Coefficient:
    """The integral of a smooth f between two positive numbers, by Gauss's rule in the logarithm."""
    half = log(end / start) / 2
    total: Coefficient = 0.0
    for node, weight in zip(_NODES, _WEIGHTS, strict=True):
        u = start * exp((1 + node) * half)
        total = total + weight * half * u * f(u)
    return total


def combined(weights: Iterable[Coefficient], values: Iterable[Affine]) -> Affine:
    """The sum of the products."""
    return sum((w * v for w, v in zip(weights, values, strict=True)), Affine())
