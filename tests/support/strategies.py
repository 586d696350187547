# SPDX-License-Identifier: Apache-2.0
"""The registered memory strategies with parameters, each made for a folder."""

from functools import partial

import pytest

import gradsampler as gs

MEMORIES = ("store", "checkpoint")
memories = pytest.mark.parametrize("memory", MEMORIES)


def made(name, folder):
    return gs.memory.typical(folder)[name]


STRATEGIES = {
    name: partial(made, name)
    for name, strategy in gs.memory.typical(".").items()
    if strategy.any_program
} | {"truncated": lambda folder: gs.memory.Truncated(99, "revolve:2")}  # which is all of the run
REPLAYING = [name for name in STRATEGIES if name not in ("auto", "store")]  # these keep the calls

strategies = pytest.mark.parametrize("memory", STRATEGIES)
replaying = pytest.mark.parametrize("memory", REPLAYING)
