# SPDX-License-Identifier: Apache-2.0
"""The memory strategies with parameters, each made for a folder."""

from functools import partial

import pytest

from gradsampler.memory import Offload, Revolve, Truncated

MEMORIES = ("store", "checkpoint")
memories = pytest.mark.parametrize("memory", MEMORIES)

STRATEGIES = {
    "store": lambda folder: "store",
    "checkpoint": lambda folder: "checkpoint",
    "offload": lambda folder: "offload",
    "folder": Offload,
    "revolve": lambda folder: "revolve:2",
    "two levels": partial(Revolve, 1, 1),
    "truncated": lambda folder: Truncated(99, "revolve:2"),
}
strategies = pytest.mark.parametrize("memory", STRATEGIES)
replaying = pytest.mark.parametrize("memory", [name for name in STRATEGIES if name != "store"])
