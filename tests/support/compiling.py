# SPDX-License-Identifier: Apache-2.0
"""Tests that compile."""

import pytest


def compiling(test):
    """Has a test start with an empty compiler, whose own warnings are none of ours."""
    for mark in (
        # Where torch compiles for an input with a graph, and where it loads inductor.
        pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
        pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
        pytest.mark.usefixtures("fresh_compiler"),
    ):
        test = mark(test)
    return test
