# SPDX-License-Identifier: Apache-2.0
"""The adaptive solver: its steps against k-diffusion's, its gradient against a loop's over them."""

import json
import math
import re

import pytest
import torch

import gradsampler as gs
from gradsampler import noise as noises
from gradsampler import solvers
from gradsampler.adaptation import adapted
from gradsampler.solvers import DPMAdaptive
from support import k_diffusion_table as recorded
from support.loops.run import Run
from support.loops.stochastic import dpm_single
from support.problems import Mixture, normal

ROWS = [row for row in json.loads(recorded.FILE.read_text()) if row["function"] == "dpm_adaptive"]
MIXTURE = Mixture(6)
Z0 = normal(2, 2, 3, seed=1)
WEIGHTS = normal(2, 2, 3, seed=5)


class Recorded(noises.NoiseSource):
    """The noises of the table, in order."""

    def at(self, z0, step, num_steps):
        return recorded.NOISES[step]


@pytest.mark.parametrize("row", ROWS, ids=[str(row["options"]) for row in ROWS])
def test_agrees_with_k_diffusion_in_steps_and_sample(row):
    solver = DPMAdaptive(**row["options"])
    noise = Recorded() if solver.eta else None
    got = gs.sample(recorded.denoise, recorded.Z0, row["levels"], solver=solver, noise=noise)
    expected = torch.tensor(row["result"], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    levels = adapted(solver, recorded.denoise, recorded.Z0, row["levels"], noise=noise)
    assert levels[1:].tolist() == pytest.approx(row["accepted"], rel=1e-9)


def test_steps_that_are_too_coarse_are_rejected():
    """A first step of 3 in half log-SNR is more than the tolerance allows."""
    (row,) = [row for row in ROWS if row["options"].get("h_init") == 3.0]
    assert row["accepted"][0] > row["levels"][0] * math.exp(-3.0)


CASES = {
    "order3": {},
    "order2": {"order": 2},
    "fine": {"rtol": 1e-3, "atol": 1e-3, "h_init": 1.0},
    "eta": {"eta": 0.6, "s_noise": 0.9},
}


@pytest.mark.parametrize("flow", [False, True], ids=["ve", "flow"])
@pytest.mark.parametrize("final", [0.05, 0.0])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_the_run_and_its_gradient_are_those_of_the_accepted_steps(options, final, flow):
    given = [0.9, 0.5, 0.06, final] if flow else [8.0, 1.0, 0.06, final]
    model = MIXTURE.velocity if flow else MIXTURE.denoise
    solver, noise = DPMAdaptive(**options), noises.Philox(seed=3)
    more = {"prediction": "flow" if flow else "x0"}
    if solver.stochastic:
        more["noise"] = noise
    z0, sigmas = Z0.clone().requires_grad_(), torch.tensor(given, dtype=torch.float64)
    levels = adapted(solver, model, z0, sigmas, **more)
    assert levels[0] == given[0]
    assert levels[-1] == final
    x = gs.sample(model, z0, sigmas.requires_grad_(), solver=solver, **more)
    gradients = torch.autograd.grad((x * WEIGHTS).sum(), [z0, sigmas])

    def clean(x, s):
        return (
            x - s * MIXTURE.velocity(x, torch.tensor(s, dtype=torch.float64))
            if flow
            else MIXTURE.denoise(x, s)
        )

    def loop(z0, values):
        count = len(values) - 1
        run = Run(clean, iter([noise.at(Z0, k, count) for k in range(count)]), flow)
        return dpm_single(run, values[0] * z0, values, **options)

    fixed = Z0.clone().requires_grad_()
    expected = loop(fixed, levels.tolist())
    torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-10)
    (dz0,) = torch.autograd.grad((expected * WEIGHTS).sum(), fixed)
    torch.testing.assert_close(gradients[0], dz0, rtol=1e-9, atol=1e-9)
    ends = []
    for sign in (1, -1):
        moved = levels.tolist()
        moved[0] *= 1 + sign * 1e-5
        ends.append((loop(Z0, moved) * WEIGHTS).sum().item())
    slope = (ends[0] - ends[1]) / (2e-5 * given[0])
    assert gradients[1][0].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)
    assert torch.isfinite(gradients[1]).all()
    assert not gradients[1][1:-2].any()  # levels between are not looked at


@pytest.mark.parametrize("memory", ["store", "checkpoint", "revolve:3"])
def test_every_strategy_runs_it(memory):
    z0 = Z0.clone().requires_grad_()
    x = gs.sample(MIXTURE.denoise, z0, [8.0, 0.05], solver="dpm_adaptive", memory=memory)
    (got,) = torch.autograd.grad((x * WEIGHTS).sum(), z0)
    plain = Z0.clone().requires_grad_()
    levels = adapted(DPMAdaptive(), MIXTURE.denoise, plain, [8.0, 0.05])
    run = Run(MIXTURE.denoise, iter(()))
    y = dpm_single(run, 8.0 * plain, levels.tolist())
    (expected,) = torch.autograd.grad((y * WEIGHTS).sum(), plain)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_finer_tolerances_converge():
    """To a run of fixed steps of another method."""
    exact = gs.sample(
        MIXTURE.denoise, Z0, gs.schedules.karras(400, 0.05, 8.0), solver=solvers.LMS()
    )
    errors = []
    for tolerance in (3e-2, 3e-3, 3e-4):
        solver = DPMAdaptive(rtol=tolerance, atol=tolerance)
        x = gs.sample(MIXTURE.denoise, Z0, [8.0, 0.05], solver=solver)
        errors.append((x - exact).abs().max().item())
    assert errors[2] < errors[1] / 5 < errors[0] / 25


def test_a_denoiser_that_draws_sees_the_same_randomness_as_without_the_search():
    def noisy(x, sigma):
        return 0.5 * x + 0.01 * torch.randn_like(x)

    torch.manual_seed(0)
    solver = DPMAdaptive()
    levels = adapted(solver, noisy, Z0, [8.0, 0.05])
    first = gs.sample(noisy, Z0, [8.0, 0.05], solver=solver)
    torch.manual_seed(0)
    program, model = gs.arguments.record(noisy, levels, solver=solver)
    assert torch.equal(first, gs.integrate(program, model, Z0))


def test_conditioning_and_wrapped_networks_reach_the_search():
    def network(x, level, shift):
        return torch.tanh(x - shift)

    model = gs.Guided(gs.EDM(network), 1.5, {"shift": 0.0})
    x = gs.sample(model, Z0.float(), [8.0, 0.05], solver="dpm_adaptive", cond={"shift": 1.0})
    assert x.dtype == torch.float32
    assert torch.isfinite(x).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"churn": gs.Churn(1.0)}, "churn must be None with DPMAdaptive, which chooses its levels"),
        (
            {"solver": DPMAdaptive(eta=0.5), "noise": noises.SinCos()},
            "noise must not depend on the number of steps, which DPMAdaptive finds in the run",
        ),
        (
            {"solver": DPMAdaptive(eta=0.5), "noise": noises.Given([Z0])},
            "noise must not depend on the number of steps",
        ),
        (
            {"sigmas": [1.0, 0.5], "prediction": "flow"},
            "sigmas[0] must be below 1 with DPMAdaptive",
        ),
        ({"sigmas": [1.0, 2.0]}, "sigmas must decrease strictly"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_call(options, message):
    calls = []

    def denoiser(x, sigma):
        calls.append(x)
        return x

    arguments = {"sigmas": [8.0, 0.05], "solver": "dpm_adaptive", **options}
    with pytest.raises(ValueError, match=re.escape(message)):
        gs.sample(denoiser, Z0, **arguments)
    assert not calls


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 4}, "dpm_adaptive: order must be 2 or 3, got 4"),
        ({"rtol": 0.0}, "dpm_adaptive: rtol must be positive, got 0.0"),
        ({"h_init": -0.1}, "dpm_adaptive: h_init must be a finite number"),
        ({"icoeff": math.nan}, "dpm_adaptive: icoeff must be a finite number"),
        ({"eta": -1.0}, "dpm_adaptive: eta must be a finite number"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        DPMAdaptive(**options)


def test_a_denoiser_that_returns_infinity_ends_the_search():
    with pytest.raises(gs.NonFiniteError, match="dpm_adaptive: the state between the levels 8 and"):
        gs.sample(lambda x, s: x / 0.0, Z0, [8.0, 0.05], solver="dpm_adaptive")


def test_a_denoiser_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="must have shape"):
        gs.sample(lambda x, s: x[:, :1], Z0, [8.0, 0.05], solver="dpm_adaptive")


def test_one_positive_level_is_one_step_to_zero():
    x = gs.sample(MIXTURE.denoise, Z0, [8.0, 0.0], solver="dpm_adaptive")
    torch.testing.assert_close(x, MIXTURE.denoise(8.0 * Z0, 8.0))


def test_levels_are_chosen_from_the_state_that_is_given():
    """From elsewhere other levels; from sigmas[0] z0, given as a state, those of no start."""
    levels, solver = [20.0, 0.05], DPMAdaptive()
    usual = adapted(solver, MIXTURE.denoise, Z0, levels)
    assert torch.equal(adapted(solver, MIXTURE.denoise, Z0, levels, start=20.0 * Z0), usual)
    start = 3.0 * normal(*Z0.shape, seed=8)
    chosen = adapted(solver, MIXTURE.denoise, Z0, levels, start=start)
    assert chosen.tolist() == adapted(solver, MIXTURE.denoise, start / 20.0, levels).tolist()
    assert chosen.tolist() != usual.tolist()
    x = gs.sample(MIXTURE.denoise, Z0, levels, solver=solver, start=start)
    expected = gs.sample(MIXTURE.denoise, start / 20.0, levels, solver=solver)
    torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-12)


def test_a_start_of_another_shape_is_refused_before_any_call():
    def never(x, sigma):
        raise AssertionError("called")

    with pytest.raises(ValueError, match="start must have shape"):
        gs.sample(never, Z0, [20.0, 0.05], solver=DPMAdaptive(), start=Z0[:1])
