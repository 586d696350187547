# SPDX-License-Identifier: Apache-2.0
"""A program as a matrix: what its instructions say, assembled by hand with linear networks.

All numbers of the random programs are small integers, so float64 arithmetic is exact and every
comparison below is for equality.
"""

import random
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gradsampler as gs
from gradsampler import noise as noises
from gradsampler import solvers
from gradsampler.engine.program import (
    Z0,
    Absorption,
    Affine,
    Descent,
    Evaluation,
    Pullback,
    Recorder,
    Slot,
    Stage,
    fused,
    transpose,
)
from gradsampler.guidance import Guided
from gradsampler.parameterization import (
    EDM,
    Parameterization,
    Preconditioning,
    Prediction,
)
from gradsampler.solvers import Solver
from support.problems import normal

SIZE = 2  # elements of the state
F64 = torch.float64


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Thousands of small operations: a second thread would only be waited for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def f64(*values):
    return torch.tensor(values, dtype=F64)


class LinearNetworks(Parameterization):
    """Integer matrices for networks: call k of a run uses the maps of level 1 + k."""

    def __init__(self, rng: random.Random, calls: int, branches: int) -> None:
        def integers(*shape, least=-2):
            count = int(torch.Size(shape).numel())
            return f64(*(rng.randint(least, 2) for _ in range(count))).view(shape)

        self.maps = integers(calls, branches, SIZE, SIZE)
        self.c_skip = 2 * integers(calls)  # even, so that no odd weight of a state cancels
        self.c_out = integers(calls, branches)  # zeros included: an output nobody reads
        self.c_in = integers(calls, least=1)
        self.network = None

    def preconditioning(self, sigma: Tensor) -> Preconditioning:
        k = round(float(sigma)) - 1
        return Preconditioning(self.c_skip[k], tuple(self.c_out[k]), self.c_in[k], sigma)

    def outputs(self, x, noise, cond):
        return tuple((m @ x[..., None])[..., 0] for m in self.maps[round(noise[0].item()) - 1])


class RandomSolver(Solver):
    """Evaluates where it likes and combines whatever it has seen, noise included."""

    def __init__(self, rng: random.Random, num_steps: int) -> None:
        self.rng = rng
        self.num_evaluations = [rng.randint(1, 3) for _ in range(num_steps)]
        self.noisy = [rng.random() < 0.6 for _ in range(num_steps)]
        self.draws = [rng.randint(1, 3) for _ in range(num_steps)]
        self.again = [rng.random() < 0.5 for _ in range(num_steps)]

    def combination(self, slots):
        out = Affine({})
        for slot in slots:
            out = out + self.rng.randint(-1, 2) * slot
        return out

    def step(self, run, x, s, t):
        seen = [p.value for p in run.predictions[-3:]]
        for _ in range(self.num_evaluations[run.step]):
            x, denoised = run.denoise(x, torch.tensor(len(run.predictions) + 1, dtype=F64))
            new = self.rng.choice([-1, 1, 3]) * x + self.combination([*seen, denoised])
            seen += [x, denoised]
            x = new
        if self.noisy[run.step]:
            for _ in range(self.draws[run.step]):
                self.noises.append(run.noise())
                x = x + self.rng.randint(1, 2) * self.noises[-1]
            if self.again[run.step]:  # noise of an earlier step once more
                x = x + self.rng.randint(1, 2) * self.rng.choice(self.noises)
        return x

    def program(self, *args, **kwargs):
        self.noises = []
        return super().program(*args, **kwargs)


class Random(NamedTuple):
    """A random program and what it runs with."""

    program: object
    model: LinearNetworks
    solver: Solver
    levels: Tensor


def random_program(seed, num_steps, branches):
    rng = random.Random(seed)
    solver = RandomSolver(rng, num_steps)
    model = LinearNetworks(rng, sum(solver.num_evaluations), branches)
    levels = torch.arange(num_steps + 1, 0, -1, dtype=F64)
    state = rng.getstate()
    program = solver.program(levels, model)
    rng.setstate(state)  # so that the next run of the solver records the same
    return Random(program, model, solver, levels)


random_programs = given(
    st.builds(random_program, st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 2))
)
quickly = settings(derandomize=True, deadline=None, max_examples=60, database=None)


def matrix(program, model):
    """The run as a matrix [SIZE, (1 + noises) * SIZE] over z0 and the noises, in order."""
    numbers = program.coefficients.detach()
    eye = torch.eye((1 + len(program.noises)) * SIZE, dtype=F64)
    first, *rest = eye.split(SIZE)
    noise = dict(zip(program.noises, rest, strict=True))
    slots = {Z0: first}
    for instruction in program.instructions:
        if isinstance(instruction, Stage):
            value = torch.zeros(SIZE, len(eye), dtype=F64)
            for slot, c in instruction.terms:
                value = value + numbers[c] * slots[slot]
            for injection in instruction.injections:
                value = value + numbers[injection.coefficient] * noise[injection.noise]
            slots[instruction.writes] = value
        else:
            jacobians = model.maps[round(numbers[instruction.c_noise].item()) - 1]
            scaled = numbers[instruction.c_in] * slots[instruction.state]
            for slot in instruction.writes:
                slots[slot] = jacobians[slot.branch] @ scaled
    return slots[program.output]


def taken_apart(instructions):
    """The instructions with each Descent as the three that it is made of."""
    for instruction in instructions:
        if isinstance(instruction, Descent):
            yield from (instruction.state, *instruction.absorptions)
            if instruction.output is not None:
                yield instruction.output
        else:
            yield instruction


def transposed_matrix(transposed, model, output, order):
    """A transposed program as a matrix [(1 + noises) * SIZE, SIZE] over output's cotangent."""
    numbers = transposed.coefficients.detach()
    slots = {output: torch.eye(SIZE, dtype=F64)}
    absorbed = {}  # by step and draw
    for instruction in taken_apart(transposed.instructions):
        if isinstance(instruction, Stage):
            value = torch.zeros(SIZE, SIZE, dtype=F64)
            for slot, c in instruction.terms:
                value = value + numbers[c] * slots[slot]
            slots[instruction.writes] = value
        elif isinstance(instruction, Pullback):
            evaluation = instruction.evaluation
            jacobians = model.maps[round(numbers[evaluation.c_noise].item()) - 1]
            slots[instruction.writes] = sum(
                jacobians[slot.branch].mT @ slots[slot] for slot in evaluation.writes
            )
        else:
            assert isinstance(instruction, Absorption)
            noise, c = instruction.injection.noise, instruction.injection.coefficient
            pulled = numbers[c] * slots[instruction.state]
            absorbed[noise] = absorbed[noise] + pulled if noise in absorbed else pulled
    assert transposed.output == Z0
    return torch.cat([slots[Z0], *(absorbed[noise] for noise in order)])


@quickly
@random_programs
def test_the_transposed_program_is_the_transposed_matrix(case):
    forward = matrix(case.program, case.model)
    for transposed in (transpose(case.program), fused(transpose(case.program))):
        backward = transposed_matrix(
            transposed, case.model, case.program.output, case.program.noises
        )
        assert torch.equal(backward, forward.mT)


@pytest.mark.parametrize("memory", ["checkpoint", "store"])
@quickly
@random_programs
def test_a_run_and_its_gradient_are_that_matrix(memory, case):
    expected = matrix(case.program, case.model)
    width = expected.shape[1]
    basis = torch.eye(width, dtype=F64).split(SIZE, dim=1)  # row k is the k-th unit input
    z0, *given = (x.clone().requires_grad_() for x in basis)
    got = gs.sample(
        case.model,
        z0,
        case.levels,
        solver=case.solver,
        noise=noises.Given(given) if given else None,
        memory=memory,
    )
    assert torch.equal(got, expected.mT)
    lam = torch.arange(1.0, 1 + SIZE, dtype=F64)
    gradients = torch.autograd.grad(got, [z0, *given], lam.expand(width, SIZE))
    for got_rows, block in zip(gradients, expected.split(SIZE, dim=1), strict=True):
        assert torch.equal(got_rows, (lam @ block).expand(width, SIZE))


def writes(instruction):
    """The slots that an instruction writes."""
    if isinstance(instruction, Absorption):
        return ()
    if isinstance(instruction, Descent):
        parts = (instruction.state, instruction.output)
        return tuple(part.writes for part in parts if part is not None)
    return instruction.writes if isinstance(instruction, Evaluation) else (instruction.writes,)


def solver_program(name, model=None, *, final="sigma_min", requires_grad=False, **kwargs):
    levels = gs.schedules.karras(4, sigma_min=0.1, sigma_max=10.0, final=final)
    levels.requires_grad_(requires_grad)
    return solvers.resolve(name).program(levels, model or Prediction(None), **kwargs)


PROGRAMS = {
    **{name: solver_program(name) for name in solvers.names()},
    **{f"{name}-to-zero": solver_program(name, final="zero") for name in solvers.names()},
    **{f"{name}-learned": solver_program(name, requires_grad=True) for name in solvers.names()},
    "heun-churn": solver_program("heun", churn=gs.Churn(1.0)),
    "res_2ab-churn-final": solver_program("res_2ab", churn=gs.Churn(1.0), final_denoise=True),
    "heun-EDM": solver_program("heun", EDM(torch.tanh)),
    "heun-epsilon": solver_program("heun", Prediction(None, "epsilon")),
    "dpmpp_2m-guided": solver_program("dpmpp_2m", Guided(EDM(abs), 2.0, {})),
}
every_program = pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)


def assert_frees_rightly(program, start):
    """Walks through the instructions, dropping slots as the program says."""
    alive = set(start)
    for instruction, dead in zip(program.instructions, program.last_reads(), strict=True):
        own = {instruction.state.writes} if isinstance(instruction, Descent) else set()
        assert set(instruction.reads()) <= alive | own
        for slot in writes(instruction):
            assert slot not in alive
            alive.add(slot)
        assert dead <= alive
        alive -= dead
    assert alive == {program.output}


def assert_writes_once(program):
    written = [slot for instruction in program.instructions for slot in writes(instruction)]
    assert len(written) == len(set(written))


@quickly
@random_programs
def test_random_programs_write_each_slot_once(case):
    for program in (case.program, transpose(case.program), fused(transpose(case.program))):
        assert_writes_once(program)


@quickly
@random_programs
def test_random_programs_fuse_all_between_two_evaluations(case):
    stages, evaluations = case.program.stages, case.program.evaluations
    assert len(stages) == len(evaluations) + 1
    kinds = [type(instruction) for instruction in case.program.instructions]
    assert kinds == [Stage, *([Evaluation, Stage] * len(evaluations))]


@quickly
@random_programs
def test_random_programs_free_what_is_read_no_more(case):
    assert_frees_rightly(case.program, {Z0})


@quickly
@random_programs
def test_random_transposed_programs_free_what_is_read_no_more(case):
    transposed = transpose(case.program)
    for program in (transposed, fused(transposed)):
        assert_frees_rightly(program, {case.program.output})


@every_program
def test_programs_write_each_slot_once(program):
    for each in (program, transpose(program), fused(transpose(program))):
        assert_writes_once(each)


@every_program
def test_programs_fuse_all_between_two_evaluations(program):
    assert len(program.stages) == len(program.evaluations) + 1
    gathered = transpose(program).stages
    outputs = sum(len(evaluation.writes) for evaluation in program.evaluations)
    assert len(gathered) == outputs + len(program.stages)


@every_program
def test_fused_backward_does_all_between_two_model_calls_at_once(program):
    """But for the cotangents of further outputs, as guidance has them."""
    kinds = [type(instruction) for instruction in fused(transpose(program)).instructions]
    calls = [k for k, kind in enumerate(kinds) if kind is Pullback]
    branches = len(program.evaluations[0].writes)
    for k, nxt in pairwise(calls):
        assert kinds[k + 1 : nxt] == [Descent, *[Stage] * (branches - 1)]
    assert kinds[calls[-1] + 1 :] == [Descent, Stage]  # the last one is that of z0


@every_program
def test_programs_free_what_is_read_no_more(program):
    assert_frees_rightly(program, {Z0})
    for transposed in (transpose(program), fused(transpose(program))):
        assert_frees_rightly(transposed, {program.output})


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_the_output_of_a_branch_without_weight_is_freed(scale):
    """Guidance of weight 0 or 1 reads one of its two outputs only."""
    program = solver_program("euler", Guided(EDM(abs), scale, {}))
    assert_frees_rightly(program, {Z0})


def test_the_most_slots_alive_are_those_that_the_method_needs():
    """z0 and the state, an output, and for a two-step method the earlier state and output."""
    alive_at_most = {"euler": 3, "heun": 5, "dpmpp_2m": 4, "res_2ab": 4}
    for name, expected in alive_at_most.items():
        program = solver_program(name)
        alive, most = {Z0}, 0
        for instruction, dead in zip(program.instructions, program.last_reads(), strict=True):
            alive |= set(writes(instruction))
            most = max(most, len(alive))
            alive -= dead
        assert most <= expected, name


@every_program
def test_the_first_stage_reads_z0_only(program):
    first, *rest = program.stages
    assert [slot for slot, _ in first.terms] == [Z0]
    assert all(slot != Z0 for stage in rest for slot, _ in stage.terms)


def test_the_first_stage_starts_at_the_first_level_with_its_noise():
    churn = gs.Churn(1.0, s_noise=1.5)  # eta = 1/4
    program = solver_program("euler", churn=churn)
    first = program.stages[0]
    assert program.coefficients[first.terms[0][1]].item() == 10.0
    (injection,) = first.injections
    assert injection.step == 0
    amount = program.coefficients[injection.coefficient].item()
    assert amount == pytest.approx(1.5 * (12.5**2 - 10.0**2) ** 0.5, rel=1e-14)


def test_a_noise_that_is_added_twice_is_one_injection():
    class Twice(Solver):
        def step(self, run, x, s, t):
            noise = run.noise()
            return x + noise + 0.5 * noise

    program = Twice().program(f64(2, 1), Prediction(None))
    ((injection,),) = (stage.injections for stage in program.stages)
    assert program.coefficients[injection.coefficient].item() == 1.5


def test_each_call_of_noise_is_a_new_draw():
    class Twice(Solver):
        def step(self, run, x, s, t):
            return x + run.noise() + 0.5 * run.noise()

    program = Twice().program(f64(3, 2, 1), Prediction(None))
    assert program.noises == ((0, 0), (0, 1), (1, 0), (1, 1))
    amounts = [program.coefficients[i.coefficient].item() for i in program.injections]
    assert amounts == [1.0, 0.5, 1.0, 0.5]


def test_a_stage_may_inject_the_noises_of_two_steps():
    class Blind(Solver):
        def step(self, run, x, s, t):
            return 2 * x + run.noise()

    z0, *given = normal(3, 2, 4).unbind()
    x = gs.sample(lambda x, s: x, z0, [3.0, 2.0, 1.0], solver=Blind(), noise=noises.Given(given))
    torch.testing.assert_close(x, 12 * z0 + 2 * given[0] + given[1], rtol=1e-15, atol=1e-15)


@every_program
def test_coefficients_are_float64_on_the_cpu(program):
    assert program.coefficients.dtype == F64
    assert program.coefficients.device.type == "cpu"
    assert program.coefficients.ndim == 1


@pytest.mark.parametrize("final", ["sigma_min", "zero"])
@pytest.mark.parametrize("name", solvers.names())
def test_coefficients_carry_a_finite_gradient_to_the_levels(name, final):
    levels = gs.schedules.karras(5, sigma_min=0.1, sigma_max=10.0, final=final).requires_grad_()
    program = solvers.resolve(name).program(levels, Prediction(None))
    assert program.coefficients.requires_grad
    weights = normal(len(program.coefficients))
    (gradient,) = torch.autograd.grad(weights @ program.coefficients, levels)
    assert torch.isfinite(gradient).all()
    assert (gradient[:-1] != 0).all()


def test_coefficients_are_detached_where_no_level_is_learned():
    assert not any(solver_program(name).coefficients.requires_grad for name in solvers.names())


class ZeroWeight(Solver):
    """Gives its last prediction a weight that is 0 where the levels stand."""

    def step(self, run, x, s, t):
        x, denoised = run.denoise(x, s)
        return x + (s - 2 * t) * denoised


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_a_zero_that_depends_on_the_levels_stays_and_another_vanishes(learned):
    levels = f64(2, 1).requires_grad_(learned)
    program = ZeroWeight().program(levels, Prediction(None))
    slots = [slot for slot, _ in program.stages[-1].terms]
    assert slots == ([Slot("x", 0), Slot("d", 0)] if learned else [Slot("x", 0)])


def test_the_derivative_of_a_zero_coefficient_arrives():
    levels = f64(2, 1).requires_grad_()
    z0 = f64(3, 5)[None]
    x = gs.sample(lambda x, sigma: x, z0, levels, solver=ZeroWeight())
    (gradient,) = torch.autograd.grad(x.sum(), levels)
    # x = s z0 (1 + s - 2t): d/ds = z0 (1 + 2s - 2t), d/dt = -2 s z0, and z0 sums to 8
    assert gradient.tolist() == [24, -32]


def test_a_plain_x0_prediction_has_no_state_in_its_denoised():
    program = solver_program("euler")
    for evaluation in program.evaluations:
        assert [slot.kind for slot, _ in evaluation.denoised] == ["d"]


# An epsilon or a velocity is the slope itself: no x - (x - s*e) is left to cancel.


def numbers_of(program, stage):
    return {slot: program.coefficients[c].item() for slot, c in stage.terms}


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_euler_with_a_slope_as_output_adds_it(kind):
    program = solver_program("euler", Prediction(None, kind))
    levels = gs.schedules.karras(4, sigma_min=0.1, sigma_max=10.0).tolist()
    for k, (s, t) in enumerate(pairwise(levels)):
        weights = numbers_of(program, program.stages[k + 1])
        assert set(weights) == {Slot("x", k), Slot("d", k)}
        assert weights[Slot("x", k)] == 1.0
        assert weights[Slot("d", k)] == pytest.approx(t - s, rel=1e-15)


@pytest.mark.parametrize("kind", ["epsilon", "flow"])
def test_heun_with_a_slope_as_output_adds_the_mean_of_two(kind):
    program = solver_program("heun", Prediction(None, kind))
    levels = gs.schedules.karras(4, sigma_min=0.1, sigma_max=10.0).tolist()
    for k, (s, t) in enumerate(pairwise(levels)):
        start, ahead = 2 * k, 2 * k + 1
        weights = numbers_of(program, program.stages[2 * k + 2])
        assert set(weights) == {Slot("x", start), Slot("d", start), Slot("d", ahead)}
        assert weights[Slot("x", start)] == 1.0
        for call in (start, ahead):
            assert weights[Slot("d", call)] == pytest.approx((t - s) / 2, rel=1e-15)


def test_heun_with_x0_outputs_has_the_weights_of_its_formula():
    """x + h/2 (x - D)/s + h/2 (x' - D')/t with x' = x + h (x - D)/s, h = t - s."""
    program = solver_program("heun")
    levels = gs.schedules.karras(4, sigma_min=0.1, sigma_max=10.0).tolist()
    for k, (s, t) in enumerate(pairwise(levels)):
        h = t - s
        weights = numbers_of(program, program.stages[2 * k + 2])
        assert weights == {
            Slot("x", 2 * k): pytest.approx(1 + h / (2 * s), rel=1e-14),
            Slot("d", 2 * k): pytest.approx(-h / (2 * s), rel=1e-14),
            Slot("x", 2 * k + 1): pytest.approx(h / (2 * t), rel=1e-14),
            Slot("d", 2 * k + 1): pytest.approx(-h / (2 * t), rel=1e-14),
        }


def test_expressions_are_linear():
    run = Recorder(Prediction(None), 1)
    a, b = Affine({Slot("x", 1): 2.0}), Affine({Slot("x", 1): 1.0, Slot("d", 0): 4.0})
    total = (3 * a - b / 2 + run.noise()) * 2.0
    assert total.terms == {Slot("x", 1): 11.0, Slot("d", 0): -4.0}
    assert total.noises == {(0, 0): 2.0}
    assert (-total).noises == {(0, 0): -2.0}
    assert (total + total).noises == {(0, 0): 4.0}
    assert a.terms == {Slot("x", 1): 2.0}
