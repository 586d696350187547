# SPDX-License-Identifier: Apache-2.0
"""The code of docs/diffusers.md runs and does what the page says."""

import re
from functools import cache

import pytest
import torch

from support import schedulers, tables
from support.pipelines import CASES

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")


@cache
def blocks():
    return re.findall(r"^```python\n(.*?)^```", tables.PAGE.read_text(), re.M | re.S)


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Runs the first blocks of the page, in a folder of their own; the names after them."""
    monkeypatch.chdir(tmp_path)

    def run(count):
        names = {"__name__": "page"}
        for block in blocks()[:count]:
            exec(compile(block, "docs/diffusers.md", "exec"), names)
        return names

    return run


def test_ten_lines_to_a_gradient(ran):
    assert len([line for line in blocks()[0].splitlines() if line.strip()]) <= 10
    names = ran(1)
    assert names["images"].shape == (8, 1, 8, 8)
    assert names["latents"].grad.norm() > 0
    assert names["scale"].grad.abs() > 0


@pytest.mark.thorough
def test_thirty_lines_to_a_reward_loop(ran, tmp_path, capsys):
    assert len([line for line in blocks()[1].splitlines() if line.strip()]) <= 30
    names = ran(4)
    history = names["history"]
    assert history[-1] > history[0] + 1
    found = names["found"]
    # The loop by hand and the call are the same search.
    assert [step.loss for step in found.history] == pytest.approx(history, rel=1e-3)
    assert torch.allclose(found.z0, names["latents"], atol=1e-3)
    assert (tmp_path / "search" / "step-0010.png").exists()
    printed = capsys.readouterr().out
    assert printed.endswith("method: program\n")


def test_the_tables_have_all_rows():
    """Each row is held to what it says by the test that measures it."""
    pipelines = [row[0].split("(")[1].rstrip(")") for row in tables.rows(tables.PIPELINES)]
    assert pipelines == list(CASES)
    found = [(row[0].strip("`"), row[1]) for row in tables.rows(tables.SCHEDULERS)]
    wanted = [(n, s.text()) for n, each in schedulers.SETUPS.items() for s in each]
    assert sorted(found) == sorted([*wanted, *schedulers.OTHER.items()])
    found = [(row[0].strip("`"), row[1]) for row in tables.rows(tables.LEVELS)]
    named = [(name, schedulers.SETUPS[name][k]) for name, k in schedulers.leveled()]
    assert found == [(name, setup.text()) for name, setup in named]
