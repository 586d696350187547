# SPDX-License-Identifier: Apache-2.0
"""The thinning of matrices of cases loses no value and no pair."""

from itertools import combinations, product

import pytest

from support.tiers import covering, few, once, pairs

AXES = [list("abcdefgh"), list("uvwxyz"), list("12"), list("+-")]


@pytest.mark.parametrize("count", [2, 3, 4])
def test_every_pair_of_values_occurs(count):
    axes = AXES[:count]
    cases, spread = covering(*axes)
    assert len(cases) == len(set(cases))
    assert set(cases) <= set(product(*axes))
    for (i, first), (j, second) in combinations(enumerate(axes), 2):
        assert {(case[i], case[j]) for case in cases} == set(product(first, second))
    for i, axis in enumerate(axes):
        assert {case[i] for case in cases[:spread]} == set(axis)
    # The two longest axes alone need 48 and 8.
    assert len(cases) <= 48 * 1.2
    assert spread == 8


def test_the_rest_is_thorough():
    mark = pairs(first="abc", second="xy")
    assert mark.args[0] == ["first", "second"]
    assert [bool(case.marks) for case in mark.args[1]] == [False] * 3 + [True] * 3
    assert once(first="abc", second="xy").args[1] == mark.args[1][:3]
    marks = {case.values: [m.name for m in case.marks] for case in few(["a", ("b", 1)], "a")}
    assert marks == {("a",): [], ("b", 1): ["thorough"]}


@pytest.mark.parametrize("thinned", [pairs, once])
def test_some_values_stand_for_the_others(thinned):
    full = thinned(first="abcdef", second="xyz").args[1]
    found = thinned(first="abcdef", second="xyz", cheap={"first": "bd"}).args[1]
    near = [case.values for case in found if not case.marks]
    assert {first for first, _ in near} == {"b", "d"}
    assert {second for _, second in near} == set("xyz")
    assert len(near) == 3
    assert {case.values for case in full} <= {case.values for case in found}
    with pytest.raises(AssertionError):
        thinned(first="abc", second="xy", cheap={"first": "z"})
