# SPDX-License-Identifier: Apache-2.0
"""A program recorded on plain floats is the one recorded on tensors, to the bit."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

import gradsampler as gs
from gradsampler import arguments, elementary, schedules, solvers
from gradsampler.engine.program import Stage
from gradsampler.parameterization import Prediction
from gradsampler.solvers.programs import Programs

LEVELS = schedules.karras(7, final="zero")
TIMES = schedules.flow(7, shift=3.0)
ABAR = torch.linspace(0.9999, 0.005, 100, dtype=torch.float64).square()

MODELS = {
    "x0": Prediction(lambda x, s: x, "x0"),
    "epsilon": Prediction(lambda x, s: x, "epsilon"),
    "v": Prediction(lambda x, s: x, "v"),
    "EDM": gs.EDM(lambda x, s: x, sigma_data=0.3),
    "VP v": gs.VP(lambda x, t: x, ABAR, "v"),
    "Flow": gs.Flow(lambda x, t: x),
    "Guided": gs.Guided(gs.EDM(lambda x, s: x), 7.5, {}),
}


def stated(program):
    """All that the program says, with coefficients by value and constant zeros left out."""
    numbers = program.coefficients.tolist()
    lines = []
    for instruction in program.instructions:
        if isinstance(instruction, Stage):
            terms = {slot: numbers[c] for slot, c in instruction.terms if numbers[c] != 0}
            noises = [(i.step, i.draw, numbers[i.coefficient]) for i in instruction.injections]
            lines.append((instruction.writes, terms, [n for n in noises if n[2] != 0]))
        else:
            e = instruction
            known = [numbers[k] for k in (e.c_in, e.c_noise, e.sigma)]
            denoised = {slot: numbers[c] for slot, c in e.denoised if numbers[c] != 0}
            lines.append((e.state, e.writes, e.step, known, denoised))
    return lines


def both(levels, solver, model, **options):
    method = solvers.resolve(solver, None, 1.0)
    plain = method.program(levels, model, **options)
    recorded = method.program(levels.clone().requires_grad_(), model, **options)
    assert not plain.coefficients.requires_grad
    assert recorded.coefficients.requires_grad
    return stated(plain), stated(recorded)


@pytest.mark.parametrize("solver", solvers.names())
def test_floats_and_tensors_give_the_same_bits(solver):
    plain, recorded = both(LEVELS, solver, MODELS["EDM"], final_denoise=True)
    assert plain == recorded


@pytest.mark.parametrize("solver", solvers.names(flow=True))
def test_also_in_flow_time(solver):
    plain, recorded = both(TIMES, solver, Prediction(lambda x, t: x, "flow"))
    assert plain == recorded


@pytest.mark.parametrize("model", MODELS)
def test_for_every_parameterization(model):
    churn = gs.Churn(20.0, 0.01, 50.0, 1.003)
    plain, recorded = both(LEVELS[:-1], "heun", MODELS[model], churn=churn)
    assert plain == recorded


@pytest.mark.parametrize("name", ["exp", "expm1", "log", "sqrt"])
def test_the_elementary_functions_agree_to_the_bit(name):
    """Torch's own do not: some values differ from the C library's in the last digit."""
    function, oracle = getattr(elementary, name), getattr(math, name)
    points = np.random.default_rng(0).uniform(1e-3, 5.0, 2000)
    tensor = function(torch.tensor(points))
    assert tensor.tolist() == [oracle(x) for x in points] == [function(x) for x in points]
    x = torch.tensor(points[:5], requires_grad=True)
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


def test_the_logarithm_of_zero():
    assert elementary.log(0.0) == -math.inf == elementary.log(torch.zeros(())).item()


@pytest.mark.parametrize(("name", "x"), [("log", 0.0), ("sqrt", -1.0), ("exp", 1e3)])
def test_outside_of_the_c_library_torch_decides(name, x):
    found = getattr(elementary, name)(torch.tensor(x, dtype=torch.float64))
    expected = getattr(torch, name)(torch.tensor(x, dtype=torch.float64))
    assert torch.equal(found, expected) or bool(found.isnan() & expected.isnan())


# ------------------------------------------------------------------ programs are kept


def recorded(sigmas=LEVELS, denoiser=MODELS["EDM"], **options):
    return arguments.record(denoiser, sigmas, **options)[0]


def test_equal_arguments_are_recorded_once():
    first = recorded(solver="heun", churn=gs.Churn(10.0))
    again = recorded(
        LEVELS.clone(),
        gs.EDM(lambda x, s: x, sigma_data=0.3),
        solver=solvers.resolve("heun", None, 1.0),
        churn=gs.Churn(10.0),
    )
    assert again is first


@pytest.mark.parametrize(
    "change",
    [
        {"sigmas": LEVELS * 1.5},
        {"denoiser": gs.EDM(lambda x, s: x, sigma_data=0.4)},
        {"solver": "midpoint"},
        {"churn": gs.Churn(2.0)},
        {"final_denoise": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_each_argument_counts(change):
    usual = {"solver": "heun", "churn": gs.Churn(1.0)}
    first, other = recorded(**usual), recorded(**usual | change)
    assert stated(other) != stated(first)


def test_a_gradient_to_the_levels_is_not_shared():
    one, two = (recorded(LEVELS.clone().requires_grad_()) for _ in range(2))
    assert one is not two


def test_a_parameterization_of_the_users_is_recorded_anew():
    class Scaled(gs.EDM):
        factor = 1.0

        def preconditioning(self, sigma):
            maps = super().preconditioning(sigma)
            return maps._replace(c_skip=self.factor * maps.c_skip)

    model = Scaled(lambda x, s: x, sigma_data=0.3)
    first = stated(recorded(denoiser=model))
    Scaled.factor = 2.0
    assert stated(recorded(denoiser=model)) != first


def test_few_programs_are_kept():
    programs = Programs(count=3)
    made = []

    def record(k):
        made.append(k)
        return k

    for k in (0, 1, 2, 0, 3, 0, 1):
        assert programs.get(k, lambda k=k: record(k)) == k
    assert made == [0, 1, 2, 3, 1]  # 0 was used last when 3 came, so 1 had to go


@pytest.mark.parametrize("memory", ["checkpoint", "auto"])
def test_a_program_recorded_in_inference_mode_serves_a_run_with_a_gradient(memory):
    levels = [3.0, 1.5, 0.25 if memory == "auto" else 0.125]  # which no other test has had recorded
    with torch.inference_mode():
        gs.sample(lambda x, s: 0.5 * x, torch.ones(1, 2), levels)
    z0 = torch.ones(1, 2, requires_grad=True)
    gs.sample(lambda x, s: 0.5 * x, z0, levels, memory=memory).sum().backward()
    slope = math.prod(0.5 * (1 + t / s) for s, t in pairwise(levels))
    torch.testing.assert_close(z0.grad, torch.full((1, 2), levels[0] * slope))
