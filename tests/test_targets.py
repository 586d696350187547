# SPDX-License-Identifier: Apache-2.0
"""What a run learns beside its noise: every amount, scale and schedule by central differences."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from torch.autograd import gradcheck

import gradsampler as gs
from gradsampler import solvers
from support.networks import Net
from support.noises import Counting
from support.problems import normal
from support.runs import SOLVERS, leaf
from support.tiers import covering, few

F64 = torch.float64
UPPER, FINALS = [3.0, 1.6, 0.7], [0.3, 0.0]
memories = pytest.mark.parametrize("memory", few(["store", "checkpoint"], "checkpoint"))
finals = pytest.mark.parametrize("final", few(FINALS, 0.0))
THOROUGH = [pytest.mark.thorough]

FIELDS = {
    name: {field.name for field in dataclasses.fields(solvers.resolve(name))}
    for name in solvers.names()
    if dataclasses.is_dataclass(solvers.resolve(name))
}
WITH_ETA = [name for name, known in FIELDS.items() if "eta" in known]
WITH_S_NOISE = [name for name, known in FIELDS.items() if "s_noise" in known and "eta" not in known]
CHURNED = [name for name in solvers.names() if not solvers.resolve(name).stochastic]


def network(x, sigma, shift=0.0):
    column = sigma.view(-1, *[1] * (x.ndim - 1))
    return torch.tanh(x) * 0.4 + 0.5 * x / (1 + column**2) + shift


def sampled(z0, sigmas, solver, memory, *, noise=None, **numbers):
    """A run on these levels; those that an adaptive solver chooses depend on its numbers."""
    if not isinstance(solvers.resolve(solver), solvers.Adaptive):
        return gs.sample(network, z0, sigmas, solver=solver, memory=memory, noise=noise, **numbers)
    program, model = gs.arguments.record(network, sigmas, solver=solver, **numbers)
    return gs.integrate(program, model, z0, noise=noise, memory=memory)


def number(value):
    return torch.tensor(value, dtype=F64, requires_grad=True)


def levels(final):
    return torch.tensor([*UPPER, final], dtype=F64)


def check(run, *inputs):
    """Central differences at 1e-5 err by about 1e-10, from the third derivative and rounding."""
    assert gradcheck(run, inputs, eps=1e-5, rtol=1e-6, atol=1e-8)


def churned(solver):
    """Whether its noise is churn's: it has none of its own at any eta."""
    return "eta" not in FIELDS[solver] and not solvers.resolve(solver).stochastic


def everything(solver, noise, count):
    """All that a run of that solver can learn, by name."""
    found = {
        "z0": normal(2, 3),
        "shift": normal(3, seed=4),
        "upper": torch.tensor(UPPER, dtype=F64),
    }
    found["scale"] = torch.tensor([1.5, 0.4, 1.2], dtype=F64)
    if noise == "sincos":  # z0 is in the noise then, and the run starts elsewhere
        found["start"] = normal(2, 3, seed=5)
        found |= dict(zip(SINCOS, torch.tensor([0.2, 0.3, 0.4, 0.15], dtype=F64), strict=True))
    else:
        found |= {f"given {k}": normal(2, 3, seed=20 + k) for k in range(count)}
    names = CHURN if churned(solver) else [k for k in ("eta", "s_noise") if k in FIELDS[solver]]
    found |= {name: torch.tensor(x, dtype=F64) for name, x in zip(names, (0.6, 0.9), strict=False)}
    return found


def run_of(values, net, solver, memory, final, source=None):
    given = [x for name, x in values.items() if name.startswith("given")]
    numbers = [values[name] for name in SINCOS if name in values]
    churn = gs.Churn(values[CHURN[0]], s_noise=values[CHURN[1]]) if churned(solver) else None
    return gs.sample(
        gs.Guided(gs.EDM(net), values["scale"], {"shift": 0.1}),
        values["z0"],
        torch.cat([values["upper"], torch.tensor([final], dtype=F64)]),
        start=values.get("start"),
        solver=solver,
        churn=churn,
        noise=source or (gs.noise.SinCos(*numbers) if numbers else gs.noise.Given(given)),
        cond={"shift": values["shift"]},
        memory=memory,
        **{name: values[name] for name in ("eta", "s_noise") if name in values},
    )


SINCOS = ("scale_gain", "phase_rate", "sin_amp", "cos_amp")
CHURN = ("s_churn", "s_noise of churn")
EXACT = ["store", "checkpoint", "revolve:2", "auto", "offload"]
CASES, _ = covering(SOLVERS, EXACT, FINALS, ["given", "sincos"])
CHEAP = {"heun", "dpmpp_2m_sde", "res_2mid"}


@pytest.mark.parametrize(
    ("solver", "memory", "final", "noise"),
    [
        pytest.param(*case, marks=[] if k < len(SOLVERS) and case[0] in CHEAP else THOROUGH)
        for k, case in enumerate(CASES)
    ],
)
def test_every_target_of_every_solver(solver, memory, final, noise):
    """All at once by autograd, one after another along a line by differences."""
    net, counting = Net(), Counting()
    run_of(everything(solver, "given", 0), net, solver, "store", final, counting)
    values = everything(solver, noise, counting.count)
    leaves = {name: leaf(x) for name, x in values.items()}
    weights = normal(2, 3, seed=9)
    loss = (run_of(leaves, net, solver, memory, final) * weights).sum()
    inputs = [*leaves.values(), *net.parameters()]
    gradients = torch.autograd.grad(loss, inputs)
    learned = {name: x.detach() for name, x in leaves.items()}

    def difference(name, x, direction, h=2e-5):
        ends = []
        for sign in (1, -1):
            moved = x.detach() + sign * h * direction
            changed, network = learned | {name: moved}, net
            if name in PARAMETERS:
                changed, network = learned, Net()
                network.load_state_dict(net.state_dict() | {name: moved})
            with torch.no_grad():
                ends.append((run_of(changed, network, solver, "store", final) * weights).sum())
        return (ends[0] - ends[1]) / (2 * h)

    for name, x, gradient in zip([*leaves, *PARAMETERS], inputs, gradients, strict=True):
        direction = normal(*x.shape, seed=30) if x.ndim else torch.ones((), dtype=F64)
        expected = difference(name, x, direction)
        error = ((gradient * direction).sum() - expected).abs()
        assert error <= 1e-6 * expected.abs() + 1e-8, (name, error.item(), expected.item())


PARAMETERS = [name for name, _ in Net().named_parameters()]


@memories
@finals
@pytest.mark.parametrize("solver", few(WITH_ETA, "euler_ancestral", "seeds_2"))
def test_eta_and_s_noise(solver, final, memory):
    z0 = normal(2, 3)

    def run(eta, s_noise):
        numbers = {"eta": eta, "s_noise": s_noise}
        return sampled(z0, levels(final), solver, memory, noise=gs.noise.SignedRoll(3), **numbers)

    check(run, number(0.6), number(0.9))


@memories
@finals
@pytest.mark.parametrize("solver", few(WITH_S_NOISE, "ddpm"))
def test_s_noise_alone(solver, final, memory):
    z0 = normal(2, 3)

    def run(s_noise):
        return sampled(z0, levels(final), solver, memory, s_noise=s_noise)

    check(run, number(1.0))


@memories
@finals
@pytest.mark.parametrize("solver", few(CHURNED, "heun", "uni_pc"))
def test_the_amounts_of_churn(solver, final, memory):
    z0 = normal(2, 3)

    def run(s_churn, s_noise):
        churn = gs.Churn(s_churn, s_tmin=0.5, s_noise=s_noise)
        return sampled(z0, levels(final), solver, memory, churn=churn)

    check(run, number(0.7), number(1.1))


def test_churn_at_its_cap_has_no_slope():
    s_churn = number(5.0)
    x = gs.sample(network, normal(2, 3), levels(0.0), churn=gs.Churn(s_churn), memory="checkpoint")
    assert torch.autograd.grad(x.sum(), s_churn)[0] == 0


@memories
@finals
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: gs.noise.Mixture(s, 0.7, 5)])
def test_the_four_numbers_of_sincos(wrap, final, memory):
    z0 = normal(2, 3).requires_grad_()

    def run(z0, *numbers):
        noise = wrap(gs.noise.SinCos(*numbers))
        options = {"noise": noise, "churn": gs.Churn(0.9), "memory": memory}
        return gs.sample(network, z0, levels(final), **options)

    check(run, z0, number(0.2), number(0.3), number(0.4), number(0.15))


@pytest.mark.parametrize("memory", ["store", "checkpoint", "revolve:2", "truncated:2"])
def test_numbers_that_are_not_learned_may_be_tensors(memory):
    values = (0.2, 0.3, 0.4, 0.15)
    tensors = tuple(torch.tensor(x, dtype=F64) for x in values)
    options = {"churn": gs.Churn(0.9), "memory": memory}
    got, expected = (
        gs.sample(network, normal(2, 3), levels(0.3), noise=gs.noise.SinCos(*n), **options)
        for n in (tensors, values)
    )
    assert torch.equal(got, expected)


@memories
@finals
def test_a_scale_for_each_step_and_the_levels_at_once(final, memory):
    z0, shift = normal(2, 3).requires_grad_(), normal(3, seed=4).requires_grad_()
    upper = torch.tensor(UPPER, dtype=F64, requires_grad=True)
    scale = torch.tensor([1.5, 3.0, 0.5], dtype=F64, requires_grad=True)

    def run(z0, shift, upper, scale):
        sigmas = torch.cat([upper, torch.tensor([final], dtype=F64)])
        model = gs.Guided(gs.EDM(network), scale, {"shift": 0.0})
        options = {"cond": {"shift": shift}, "solver": "heun", "memory": memory}
        return gs.sample(model, z0, sigmas, **options)

    check(run, z0, shift, upper, scale)


@pytest.mark.parametrize("solver", ["euler_ancestral", "dpmpp_2m_sde", "ddim"])
def test_learning_starts_with_a_little_noise(solver):
    with pytest.raises(ValueError, match=f"{solver}: eta must be above 0 where it is learned, got"):
        gs.sample(network, normal(2, 3), levels(0.0), solver=solver, eta=number(0.0))


def test_what_no_number_can_be_is_refused():
    with pytest.raises(ValueError, match=r"euler_ancestral: eta must have shape \[\], got \[2\]"):
        gs.solvers.EulerAncestral(eta=torch.ones(2))
    with pytest.raises(ValueError, match="euler_ancestral: s_noise must be a finite number of at"):
        gs.solvers.EulerAncestral(s_noise=torch.tensor(-1.0))
    with pytest.raises(ValueError, match="Churn: s_churn must be above 0 where it is learned"):
        gs.Churn(number(0.0))
    with pytest.raises(ValueError, match="SinCos: sin_amp must have a floating-point dtype"):
        gs.noise.SinCos(sin_amp=torch.tensor(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_numbers_of_any_dtype_are_learned(dtype):
    eta = torch.tensor(0.5, dtype=dtype, requires_grad=True)
    x = gs.sample(network, normal(2, 3), levels(0.0), solver="euler_ancestral", eta=eta)
    (gradient,) = torch.autograd.grad(x.sum(), eta)
    assert gradient.dtype == dtype
    assert gradient != 0


# Levels of each sample.


def columns(final):
    """Levels [N+1, 3] that are not multiples of one another."""
    upper = torch.tensor([[3.0, 2.5, 9.0], [1.6, 2.0, 4.0], [0.7, 0.8, 0.9]], dtype=F64)
    return torch.cat([upper, torch.full((1, 3), final, dtype=F64)])


def sampled_alone(z0, sigmas, options):
    """Each sample in a run of its own, on its own levels."""
    runs = (gs.sample(network, z0[b : b + 1], sigmas[:, b], **options) for b in range(3))
    return torch.cat(list(runs))


def assert_same(got, expected, inputs):
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    lam = normal(*got.shape, seed=7)
    found = torch.autograd.grad(got, inputs, lam)
    wanted = torch.autograd.grad(expected, inputs, lam)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


BY_SAMPLE = ["store", "checkpoint", "revolve:2", "offload", "auto"]
ALIKE = [name for name in SOLVERS if solvers.resolve(name).monotone]
RUNS = [
    *(pytest.param(name, None, "checkpoint", marks=pytest.mark.thorough) for name in ALIKE),
    *(("heun", None, memory) for memory in BY_SAMPLE),
    *(("dpmpp_2m_sde", "reference", memory) for memory in BY_SAMPLE),
]


@pytest.mark.parametrize(("solver", "backend", "memory"), RUNS)
def test_each_sample_is_that_of_a_run_on_its_levels(solver, backend, memory):
    z0, sigmas = normal(3, 2, 4).requires_grad_(), columns(0.3).requires_grad_()
    noise = gs.noise.Off() if solvers.resolve(solver).stochastic else None
    options = {"solver": solver, "noise": noise}
    got = gs.sample(network, z0, sigmas, backend=backend, memory=memory, **options)
    assert_same(got, sampled_alone(z0, sigmas, options), (z0, sigmas))


NOISES = {
    "signed_roll": gs.noise.SignedRoll(5),
    "sincos": gs.noise.SinCos(0.2, 0.3, 0.4, 0.15),
    "mixture": gs.noise.Mixture(gs.noise.SignedRoll(1), 0.6, 2),
}


@pytest.mark.parametrize("memory", [*BY_SAMPLE, "truncated:3"])
@pytest.mark.parametrize("kind", NOISES)
def test_noise_enters_by_the_amount_of_each_sample(kind, memory):
    """Churn's window holds other levels of other samples."""
    z0, sigmas = normal(3, 2, 4).requires_grad_(), columns(0.3).requires_grad_()
    noise, churn = NOISES[kind], gs.Churn(0.9, s_tmin=0.85, s_tmax=5.0)
    options = {"noise": noise, "churn": churn, "memory": memory}
    got = gs.sample(gs.EDM(network), z0, sigmas, **options)
    x, model = sigmas[0][:, None, None] * z0, gs.EDM(network)
    for i, (s, t) in enumerate(pairwise(sigmas)):
        rises = ((s >= 0.85) & (s <= 5.0)).double()
        x = x + (rises * s * math.sqrt(0.3 * 2.3))[:, None, None] * noise.at(z0, i, 3)
        s = s * (1 + 0.3 * rises)
        x = x + ((t - s) / s)[:, None, None] * (x - model(x, s))
    assert_same(got, x, (z0, sigmas))


@memories
@finals
@pytest.mark.parametrize("solver", few(["heun", "euler_ancestral", "dpmpp_2m_sde"], "heun"))
def test_levels_of_each_sample_by_central_differences(solver, final, memory):
    z0 = normal(3, 2, 2).requires_grad_()
    upper = columns(0.3)[:-1].clone().requires_grad_()
    rest = torch.full((1, 3), final, dtype=F64)

    def run(z0, upper):
        return gs.sample(network, z0, torch.cat([upper, rest]), solver=solver, memory=memory)

    check(run, z0, upper)


@pytest.mark.parametrize("memory", ["store", "checkpoint", "truncated:2"])
@pytest.mark.parametrize("learned", [False, True])
def test_equal_columns_are_the_run_on_one_of_them(learned, memory):
    z0 = normal(3, 2, 4)
    sigmas = levels(0.0)[:, None].repeat(1, 3).requires_grad_(learned)
    options = {"solver": "dpmpp_2m_sde", "memory": memory, "final_denoise": True}
    model = gs.VP(network, torch.linspace(0.99, 0.01, 30))
    got = gs.sample(model, z0, sigmas, **options)
    expected = gs.sample(model, z0, levels(0.0), **options)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_in_flow_time_and_from_a_start_of_its_own():
    """Samples that are noised to another degree, as when an image is edited region by region."""
    z0, start = normal(3, 2, 4), normal(3, 2, 4, seed=1)
    times = torch.tensor([[0.9, 0.5, 0.3], [0.4, 0.3, 0.2], [0.0, 0.0, 0.0]], dtype=F64)
    options = {"prediction": "flow", "start": start}
    got = gs.sample(network, z0, times, **options)
    x = start
    for s, t in pairwise(times):
        x = x + (t - s)[:, None, None] * network(x, s)
    torch.testing.assert_close(got, x, rtol=1e-12, atol=1e-12)


def test_a_callback_is_told_the_level_of_each_sample():
    seen = []
    gs.sample(gs.EDM(network), normal(3, 2, 4), columns(0.3), callback=seen.append)
    assert [info.sigma.tolist() for info in seen] == columns(0.3)[:-1].tolist()
    wanted = gs.EDM(network)(seen[1].x, columns(0.3)[1])
    torch.testing.assert_close(seen[1].denoised, wanted, rtol=1e-10, atol=1e-10)


def test_levels_of_each_sample_that_do_not_fit():
    z0, sigmas = normal(3, 2, 4), columns(0.3)
    with pytest.raises(ValueError, match=r"sigmas must have shape \[N\+1, 2\], got 3 columns"):
        gs.sample(network, z0[:2], sigmas)
    bent = sigmas.clone()
    bent[2, 1] = 2.2
    with pytest.raises(ValueError, match=r"sigmas\[:, 1\] must decrease strictly"):
        gs.sample(network, z0, bent)
    mixed = sigmas.clone()
    mixed[3, 2] = 0.0
    with pytest.raises(
        ValueError, match="sigmas must lead each sample through the same model call"
    ):
        gs.sample(network, z0, mixed, solver="heun")
    gs.sample(network, z0, mixed, solver="euler")  # calls the model alike
    options = {"solver": "midpoint_reversible", "memory": "reversible"}
    with pytest.raises(ValueError, match="memory must fit the run"):
        gs.sample(network, z0, sigmas, **options)
    with pytest.raises(gs.NonFiniteError, match=r"step 1 of 3 \(sigma = 4\)"):
        gs.sample(lambda x, s: x / (s.max() != 4.0), z0, sigmas, check_finite=True)


def test_what_looks_at_a_run_takes_levels_of_each_sample():
    z0, sigmas = normal(3, 2, 4), columns(0.3)
    plan = gs.memory.plan(network, z0, sigmas, budget="1GB")
    assert [row.name for row in plan] == ["store", "checkpoint", "revolve:1"]
    report = gs.check(network, z0.clone().requires_grad_(), sigmas, directions=1)
    assert report.passed, report
    assert [d.sigma for d in report.differences if d.of == "x"] == [9.0, 4.0, 0.9]
    found = gs.optimize(
        network, z0.clone().requires_grad_(), sigmas, lambda x: x.square().mean(), steps=2
    )
    assert found.history[-1].loss < found.history[0].loss
    with pytest.raises(ValueError, match=r"sigmas must have shape \[N\+1\] with DPMAdaptive"):
        gs.sample(network, z0, sigmas, solver="dpm_adaptive")
