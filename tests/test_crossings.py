# SPDX-License-Identifier: Apache-2.0
"""No step of a run waits for a GPU: reads back and copies are counted on the meta device."""

from types import SimpleNamespace

import pytest
import torch

import gradsampler as gs
from gradsampler import _checks
from gradsampler.engine import adjoint
from gradsampler.memory import capacity
from support.crossings import META, Crossings
from support.runs import SOLVERS, TYPICAL
from support.tiers import few

# Offload has streams of a real device.
MEMORIES = [*sorted({*gs.memory.names()} - {"offload"}), "revolve:2", "truncated:2"]


@pytest.fixture(autouse=True)
def _meta_is_a_device(monkeypatch):
    """The meta device has no generators, no autocast and no memory to ask for."""
    module = SimpleNamespace(device_count=lambda: 0)
    monkeypatch.setattr(torch, "meta", module, raising=False)
    circumstances, cpu = adjoint.Circumstances, torch.device("cpu")
    monkeypatch.setattr(adjoint, "Circumstances", lambda _, *rest: circumstances(cpu, *rest))
    monkeypatch.setattr(capacity, "free", lambda device: 2**30)
    enabled = torch.is_autocast_enabled
    monkeypatch.setattr(
        torch, "is_autocast_enabled", lambda *kind: kind != (META.type,) and enabled(*kind)
    )
    monkeypatch.setattr(_checks, "valued", lambda argument, x: None)
    crossings(2, "checkpoint")  # the weights of sketches go to a device once a process


def crossings(steps, memory="auto", solver="euler", noise=None, learned=False, **options):
    z0 = torch.empty(2, 4, 8, 8, device=META, requires_grad=True)
    shift = torch.empty(4, 1, 1, device=META, requires_grad=True)
    levels = gs.schedules.karras(steps).requires_grad_(learned)
    if memory == "reversible":
        solver = "midpoint_reversible"
    churn = None if gs.solvers.resolve(solver).stochastic else gs.Churn(1.0)
    with Crossings() as seen:
        x = gs.sample(
            lambda x, sigma, shift: 0.5 * x + sigma[:, None, None, None] * shift, z0, levels,
            solver=solver, noise=noise, churn=churn, memory=memory, cond={"shift": shift},
            backend="reference", **options,
        )  # fmt: skip
        torch.autograd.grad(x.sum(), (z0, shift, *([levels] if learned else ())))
    return seen.names


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("checked", few([False, True], False))
def test_no_memory_strategy_waits_in_a_step(memory, checked):
    found = [crossings(steps, memory, check_finite=checked) for steps in (4, 7)]
    assert found[0] == found[1]
    if memory in ("store", "auto") and not checked:
        assert found[0] == []


@pytest.mark.parametrize(
    "noise", [gs.noise.SinCos(), gs.noise.Philox(2), gs.noise.Mixture(gs.noise.SignedRoll(), 0.3)]
)
def test_no_noise_waits(noise):
    assert crossings(4, noise=noise) == crossings(7, noise=noise) == []


@pytest.mark.parametrize("solver", few(SOLVERS, *TYPICAL))
def test_no_solver_waits(solver):
    assert crossings(4, "store", solver) == crossings(7, "store", solver) == []


@pytest.mark.parametrize("memory", ["store", "checkpoint"])
def test_learned_levels_cross_once_a_run(memory):
    assert crossings(4, memory, learned=True) == crossings(7, memory, learned=True)


def test_a_value_that_is_not_finite_is_found_at_the_end(monkeypatch):
    tolist = torch.Tensor.tolist
    bad = [False] * 3 + [True] * 5  # a state and an output a step
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: bad if x.device == META else tolist(x))
    with pytest.raises(gs.NonFiniteError, match="the model's output at step 1 of 4"):
        crossings(4, check_finite=True)


def test_an_ancestral_step_takes_its_floats_by_value():
    x = torch.empty(2, 3, 4, device=META, requires_grad=True)
    with Crossings() as seen:
        y = gs.ops.ancestral_step(x, x, [1.0, 0.5, 0.3, 0.7, 0.1, 0.2], x, clamp=(-1, 1))
        torch.autograd.grad(y.sum(), x)
    assert seen.names == []
