# SPDX-License-Identifier: Apache-2.0
"""Which cases of a matrix are run at all, and which by `make test`; the marker is `thorough`."""

from heapq import heapify, heapreplace
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


def pairs(cheap=None, **axes):
    """Parametrises by few combinations that hold each pair of values of two axes at least once.

    Those which hold each value once come first, and the others are thorough. For costly matrices
    whose axes can only disturb one another two by two. ``cheap`` names the values of an axis that
    stand for the others in the first ones.
    """
    first = _spread(axes, cheap or {})
    cases, _ = covering(*map(list, axes.values()))
    return _tiers(axes, first, [case for case in cases if case not in first])


def once(cheap=None, **axes):
    """Parametrises by as few combinations as hold each value once, all of them cheap.

    For axes of which another test holds the pairs. With ``cheap`` as for `pairs` only its values
    are, and the others thorough.
    """
    first = _spread(axes, cheap or {})
    rest = _spread(axes, {}) if cheap else []
    return _tiers(axes, first, [case for case in rest if case not in first])


def _spread(axes, cheap):
    """As few combinations as hold each value once, of the values that ``cheap`` has of an axis."""
    assert all(set(values) <= set(axes[name]) for name, values in cheap.items())
    cases, spread = covering(*(list(cheap.get(name, values)) for name, values in axes.items()))
    return cases[:spread]


def _tiers(axes, cheap, thorough):
    marks = [[]] * len(cheap) + [[pytest.mark.thorough]] * len(thorough)
    params = [
        pytest.param(
            *case,
            id="-".join(map(_named, case)),
            marks=mark,
        )
        for case, mark in zip([*cheap, *thorough], marks, strict=True)
    ]
    return pytest.mark.parametrize(list(axes), params)


def _named(value):
    return getattr(value, "__name__", str(value).removeprefix("torch."))


def covering(*axes):
    """The combinations, chosen greedily, and how many of them hold each value once."""
    places = [[(i, k) for k in range(len(axis))] for i, axis in enumerate(axes)]
    parts = {case: (set(case), set(combinations(case, 2))) for case in product(*places)}
    values, both = (set().union(*found) for found in zip(*parts.values(), strict=True))
    cases, spread = [], 0
    # What a case adds only ever falls, so a gain of earlier is a bound: most need no new look.
    bounds = [(-len(own), -len(two), case) for case, (own, two) in parts.items()]
    heapify(bounds)
    while both:
        *bound, case = bounds[0]
        own, two = parts[case]
        gain = [-len(values & own), -len(both & two)]
        if gain > bound:
            heapreplace(bounds, (*gain, case))
            continue
        values -= own
        both -= two
        cases.append(tuple(axes[i][k] for i, k in case))
        spread = spread or (0 if values else len(cases))
    return cases, spread
