# SPDX-License-Identifier: Apache-2.0
"""Which cases of a matrix are run at all, and which by `make test`; the marker is `thorough`."""

from itertools import combinations, product

import pytest


def few(values, *kept):
    """The values of a costly parameter: all but ``kept`` are thorough. A tuple is several."""
    assert set(kept) <= set(values)
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=[] if value in kept else [pytest.mark.thorough],
        )
        for value in values
    ]


def pairs(**axes):
    """Parametrises by few combinations that hold each pair of values of two axes at least once.

    Those which hold each value once come first, and the others are thorough. For costly matrices
    whose axes can only disturb one another two by two.
    """
    cases, spread = covering(*map(list, axes.values()))
    params = [
        pytest.param(
            *case,
            id="-".join(str(value).removeprefix("torch.") for value in case),
            marks=[pytest.mark.thorough] if k >= spread else [],
        )
        for k, case in enumerate(cases)
    ]
    return pytest.mark.parametrize(list(axes), params)


def once(**axes):
    """Parametrises by as few combinations as hold each value once, all of them cheap.

    For axes of which another test holds the pairs.
    """
    cases, spread = covering(*map(list, axes.values()))
    return pytest.mark.parametrize(list(axes), cases[:spread])


def covering(*axes):
    """The combinations, chosen greedily, and how many of them hold each value once."""
    places = [[(i, k) for k in range(len(axis))] for i, axis in enumerate(axes)]
    parts = {case: (set(case), set(combinations(case, 2))) for case in product(*places)}
    values, both = (set().union(*found) for found in zip(*parts.values(), strict=True))
    cases, spread = [], 0
    while both:
        best = max(
            parts, key=lambda case: (len(values & parts[case][0]), len(both & parts[case][1]))
        )
        values -= parts[best][0]
        both -= parts[best][1]
        cases.append(tuple(axes[i][k] for i, k in best))
        spread = spread or (0 if values else len(cases))
    return cases, spread
