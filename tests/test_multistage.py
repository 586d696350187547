# SPDX-License-Identifier: Apache-2.0
"""The schedule of revolve, and the package without the one that it comes from."""

import subprocess
import sys
from math import comb

import pytest

from gradsampler.memory import multistage
from gradsampler.memory.multistage import Advance, Restore, Tape


@pytest.mark.parametrize(("evaluations", "slots"), [(1, 1), (2, 1), (9, 3), (20, 5), (50, 10)])
@pytest.mark.parametrize("further", [0, 2])
def test_every_call_is_taped_once_and_starts_from_what_is_there(evaluations, slots, further):
    kept, taped, at, calls = {}, [], 0, 0
    for action in multistage.schedule(evaluations, slots, further):
        match action:
            case Advance(start, stop, snapshot, away):
                assert start == at
                if snapshot:
                    kept[start] = away
                at, calls = stop, calls + stop - start
            case Tape(evaluation):
                assert evaluation == at
                taped.append(evaluation)
                calls += 1
            case Restore(evaluation, last):
                assert evaluation in kept
                at = evaluation
                if last:
                    del kept[evaluation]
        assert sum(not away for away in kept.values()) <= slots
        assert sum(kept.values()) <= further
    assert taped == list(reversed(range(evaluations)))
    assert not kept
    assert calls == fewest_calls(evaluations, min(slots + further, evaluations - 1))


def fewest_calls(evaluations, slots):
    """Griewank and Walther 2000, equation 3, with one call more for each that is taped."""
    if evaluations == 1:
        return 1
    repeated = next(r for r in range(evaluations) if comb(slots + r, slots) >= evaluations)
    forward = repeated * evaluations - comb(slots + repeated, repeated - 1)
    # Before its adjoint each step is made once more, with its graph.
    return forward + evaluations


WITHOUT = """
import sys
sys.modules["checkpoint_schedules"] = None  # as if it were not installed
import torch
import gradsampler as gs
import gradsampler.app.cli

z0 = torch.ones(1, 2, requires_grad=True)
levels = gs.schedules.karras(5)
calls = []

def denoiser(x, sigma):
    calls.append(sigma)
    return 0.5 * x

for memory in ("auto", "store", "checkpoint", "truncated:2"):
    gs.sample(denoiser, z0, levels, churn=gs.Churn(1.0), memory=memory).sum().backward()
print([row.name for row in gs.memory.plan(denoiser, z0, levels, budget="1GB")])
calls.clear()
for make in (lambda: gs.sample(denoiser, z0, levels, memory="revolve:2"), gs.memory.Revolve):
    try:
        make()
    except ImportError as error:
        print(error)
assert not calls
"""


def test_all_but_revolve_works_without_the_package():
    done = subprocess.run(
        [sys.executable, "-P", "-W", "error", "-c", WITHOUT],
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    names, *errors = done.stdout.splitlines()
    assert names == "['store', 'checkpoint']"
    assert len(errors) == 2
    for error in errors:
        assert 'memory="revolve" needs the package checkpoint-schedules' in error
        assert "pip install 'checkpoint-schedules>=1.0,<2'" in error
        assert 'memory="checkpoint"' in error
