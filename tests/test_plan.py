# SPDX-License-Identifier: Apache-2.0
"""gs.memory.plan: what it predicts is what runs then take, and asking disturbs nothing.

The oracle counts the storages that are alive in a real run and its backward, by the counter with
which a plan measures one call; `test_gauge` holds that one against sizes worked out by hand.
Evaluations are held against counted calls, activations against sums of tensor sizes.
"""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradsampler as gs
from gradsampler.memory import capacity
from gradsampler.memory.planning.footprint import measured
from gradsampler.memory.planning.gauge import Live, gauge
from gradsampler.memory.planning.rehearsal import Rehearsal
from support.alive import Watched, no_collector
from support.noises import Bent
from support.problems import normal
from support.runs import leaf
from support.tiers import few

SHAPE = (1, 4, 256, 256)  # 1 MiB in float32: all that is not a state is nothing beside it
STATE = 2**20
BUDGET = 2**34


class Convolutions(nn.Module):
    """A raw network of two layers; the second keeps twice the state."""

    def __init__(self, width=8, **options):
        super().__init__()
        self.inlet = nn.Conv2d(4, width, 1, **options)
        self.outlet = nn.Conv2d(width, 4, 1, **options)
        self.calls = 0

    def forward(self, x, noise, shift=None):
        self.calls += 1
        hidden = self.inlet(x) + noise[:, None, None, None].to(x.dtype)
        return self.outlet(F.silu(hidden if shift is None else hidden + shift))


def run(denoiser, z0, sigmas, memory, others=(), after=None, **options):
    """What a run and its backward have alive at most, with a loss as users have it."""
    weights = torch.ones_like(z0)
    loss = after or (lambda x: (x * weights).sum())
    others = [x for x in others if x.requires_grad]
    with no_collector(), Live() as counter:
        x = gs.sample(denoiser, z0, sigmas, memory=memory, **options)
        torch.autograd.grad(loss(x), [z0, *others], allow_unused=True)
        return counter.peak


CASES = {
    "euler": {},
    "heun": {"solver": "heun"},
    "dpmpp_2m": {"solver": "dpmpp_2m"},
    "res_2ab": {"solver": "res_2ab", "churn": gs.Churn(10.0), "noise": gs.noise.SignedRoll(3)},
    "dpmpp_2m_sde": {"solver": "dpmpp_2m_sde"},
    "final": {"solver": "dpmpp_2m", "final_denoise": True},
    "leapfrog": {"solver": "midpoint_reversible"},
    "leapfrog-churn": {"solver": "midpoint_reversible", "churn": gs.Churn(5.0)},
    "own-noise": {"solver": "dpmpp_2m_sde", "noise": gs.noise.Mixture(Bent(), 0.5)},
    "own-noise-leapfrog": {
        "solver": "midpoint_reversible",
        "churn": gs.Churn(5.0),
        "noise": Bent(),
    },
}


def hold(plan, extra, denoiser, z0, sigmas, others=(), **options):
    """Holds the predicted peaks of a plan and of revolve with ``extra`` slots against runs."""
    for row in [*plan, *map(plan.predictor.revolve, extra)]:
        peak = run(denoiser, z0, sigmas, row.memory, others, **options)
        assert row.peak == pytest.approx(peak, rel=0.1), row.name


@pytest.mark.parametrize(
    ("case", "frozen"),
    few(
        [*((case, True) for case in CASES), ("euler", False), ("heun", False)],
        ("own-noise", True),
    ),
)
def test_peaks_of_eight_steps(case, frozen):
    network = Convolutions().requires_grad_(not frozen)
    z0, sigmas, denoiser = torch.ones(SHAPE, requires_grad=True), levels(8), gs.EDM(network)
    plan = gs.memory.plan(denoiser, z0, sigmas, budget=BUDGET, **CASES[case])
    hold(plan, [1, 3], denoiser, z0, sigmas, list(network.parameters()), **CASES[case])


POLICIES = {
    "last": gs.policies.LastSteps(3),
    "chosen": gs.policies.ChosenSteps([1, 4]),
    "random": gs.policies.RandomSteps(2, torch.Generator().manual_seed(0)),
    "input": gs.policies.DetachedInput(),
    "nothing": gs.policies.NoJacobian(),
    "scaled": gs.policies.ScaledCotangent(0.5),
    "drtune": [gs.policies.DetachedInput(), gs.policies.LastSteps(2)],
}


@pytest.mark.filterwarnings("ignore:gradient=.* is zero, since")
@pytest.mark.parametrize(
    ("policy", "case", "frozen"),
    few(
        [(p, *each) for p in POLICIES for each in (("dpmpp_2m_sde", True), ("heun", False))],
        ("chosen", "heun", False),
    ),
)
def test_peaks_and_calls_under_a_policy(policy, case, frozen):
    network = Convolutions().requires_grad_(not frozen)
    z0, sigmas, denoiser = torch.ones(SHAPE, requires_grad=True), levels(8), gs.EDM(network)
    options = {**CASES[case], "gradient": POLICIES[policy]}
    plan = gs.memory.plan(denoiser, z0, sigmas, budget=BUDGET, **options)
    exact = gs.memory.plan(denoiser, z0, sigmas, budget=BUDGET, **CASES[case])
    assert not any(row.exact for row in plan)
    for row in [*plan, plan.predictor.revolve(1)]:
        network.calls = 0
        others = list(network.parameters())
        peak = run(denoiser, z0, sigmas, row.memory, others, **options)
        # A state more or less: autograd's backward is not that of the program.
        assert row.peak == pytest.approx(peak, rel=0.1, abs=1.1 * STATE), row.name
        assert row.evaluations == network.calls / len(plan.predictor.program.evaluations), row.name
    store, whole = plan.rows[0], exact.rows[0]
    if policy != "scaled" and (frozen or policy != "input"):
        assert store.peak < 0.8 * whole.peak
        assert store.factor < 1


def test_a_plan_leaves_the_generator_of_a_policy_where_it_was():
    generator = torch.Generator().manual_seed(0)
    policy = [gs.policies.RandomSteps(2, generator), gs.policies.DetachedInput()]
    before = generator.get_state()
    some_plan(2**20, gradient=policy)
    assert torch.equal(generator.get_state(), before)


def test_a_run_from_the_last_steps_is_not_undone():
    z0, last = torch.zeros(2, 4096), gs.policies.LastSteps(3)
    options = {"solver": "midpoint_reversible", "budget": 2**30}
    rows = gs.memory.plan(lambda x, s: x.tanh(), z0, levels(8), gradient=last, **options)
    assert "reversible" not in [row.name for row in rows]


@pytest.mark.thorough
def test_a_graph_that_is_held_beside_a_decoder_is_no_saving():
    """Revolve keeps the last call's graph from the run; with two states less it is no gain."""
    network, decoder = Convolutions(width=64).requires_grad_(False), Decoder(False)
    z0, denoiser = torch.ones(SHAPE, requires_grad=True), gs.EDM(network)

    def after(x):
        return sum(decoder(x).square().mean() for _ in range(6))

    options = {"budget": BUDGET, "after": after}
    plan = gs.memory.plan(denoiser, z0, levels(8), **options)
    assert [row.name for row in plan] == ["store", "checkpoint"]
    peaks = [
        run(denoiser, z0, levels(8), memory, after=after) for memory in ("checkpoint", "revolve:1")
    ]
    assert peaks[0] < peaks[1]


@pytest.mark.thorough
@pytest.mark.parametrize("case", ["euler", "res_2ab", "leapfrog"])
def test_peaks_of_many_steps(case):
    network = Convolutions(width=2).requires_grad_(False)
    z0, sigmas, denoiser = torch.ones(SHAPE, requires_grad=True), levels(32), gs.EDM(network)
    plan = gs.memory.plan(denoiser, z0, sigmas, budget=BUDGET, **CASES[case])
    hold(plan, [5], denoiser, z0, sigmas, **CASES[case])


@pytest.mark.thorough
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_peaks_under_guidance(frozen):
    network, shift = Convolutions().requires_grad_(not frozen), torch.zeros(8, 1, 1)
    shift.requires_grad_(not frozen)
    z0, sigmas = torch.zeros(SHAPE, requires_grad=True), levels(8)
    denoiser = gs.Guided(gs.EDM(network), 3.0, {"shift": torch.zeros(8, 1, 1)})
    options = {"solver": "dpmpp_2m", "cond": {"shift": shift}}
    plan = gs.memory.plan(denoiser, z0, sigmas, budget=BUDGET, **options)
    hold(plan, [2], denoiser, z0, sigmas, [shift, *network.parameters()], **options)


@pytest.mark.thorough
def test_peaks_where_the_levels_are_learned():
    network, sigmas = Convolutions().requires_grad_(False), levels(8).requires_grad_()
    z0 = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).requires_grad_()
    denoiser = gs.EDM(network)
    options = {"solver": "heun", "churn": gs.Churn(5.0)}
    plan = gs.memory.plan(denoiser, z0, sigmas, budget=BUDGET, **options)
    hold(plan, [2], denoiser, z0, sigmas, [sigmas], **options)


@pytest.mark.thorough
def test_peaks_of_a_network_of_16_bits():
    network = Convolutions(dtype=torch.bfloat16).requires_grad_(False)
    z0 = torch.zeros(SHAPE, dtype=torch.bfloat16, requires_grad=True)  # the state is of 32
    plan = gs.memory.plan(gs.EDM(network), z0, levels(8), budget=BUDGET)
    assert (plan.footprint.state, plan.footprint.model_input) == (STATE, STATE // 2)
    hold(plan, [2], gs.EDM(network), z0, levels(8))


class Decoder(nn.Module):
    """Twice the size, by activations of 16 states and more."""

    def __init__(self, trained):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(4, 8, 1), nn.SiLU(), nn.Upsample(scale_factor=2), nn.Conv2d(8, 3, 1)
        ).requires_grad_(trained)

    def forward(self, x):
        return self.layers(x).tanh()


@pytest.mark.parametrize("trained", few([False, True], False))
def test_peaks_with_a_decoder_after_the_run(trained):
    network, decoder = Convolutions(width=2).requires_grad_(False), Decoder(trained)
    z0, denoiser = torch.ones(SHAPE, requires_grad=True), gs.EDM(network)

    def after(x):
        return decoder(x).square().mean()

    plan = gs.memory.plan(denoiser, z0, levels(8), budget=BUDGET, after=after)
    others = list(decoder.parameters())
    alone = gs.memory.plan(denoiser, z0, levels(8), budget=BUDGET)
    assert all(a.peak > b.peak + 10 * STATE for a, b in zip(plan, alone, strict=True))
    for row in [*plan, *map(plan.predictor.revolve, [1, 3])]:
        peak = run(denoiser, z0, levels(8), row.memory, others, after=after)
        assert row.peak == pytest.approx(peak, rel=0.1), row.name
    assert "after the run: " in str(plan)


def test_what_follows_the_run_is_left_as_it_was():
    norm, state = nn.BatchNorm1d(3), torch.get_rng_state()
    after = nn.Sequential(norm, nn.Dropout(0.5))
    z0 = leaf(normal(4, 3)).float()
    plan = gs.memory.plan(lambda x, s: x, z0, levels(2), after=lambda x: after(x).square().sum())
    assert plan.predictor.following.peak > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert norm.num_batches_tracked == 0
    assert torch.equal(norm.running_mean, torch.zeros(3))
    assert norm.weight.grad is None


@pytest.mark.parametrize(
    ("after", "error", "match"),
    [
        (lambda x: 1.0, TypeError, "after: the value that it returns must be a scalar tensor"),
        (lambda x: x, ValueError, "after: the value that it returns must have shape"),
        (lambda x: x.detach().sum(), ValueError, "after must depend on the sample"),
        (3, TypeError, "after must be callable"),
    ],
)
def test_what_is_no_loss_is_named(after, error, match):
    with pytest.raises(error, match=match):
        gs.memory.plan(lambda x, s: x, leaf(normal(2, 3)), levels(2), after=after)


@pytest.mark.thorough
def test_peaks_with_large_parameters():
    # 4 MiB of them: their gradients are summed up over the calls.
    network = Convolutions(width=8)
    network.table = nn.Parameter(torch.ones(4, *SHAPE[1:]))
    forward = network.forward

    def denoiser(x, sigma):
        return forward(x * network.table[:1], sigma)

    z0 = torch.zeros(SHAPE, requires_grad=True)
    plan = gs.memory.plan(denoiser, z0, levels(8), budget=BUDGET)
    hold(plan, [2], denoiser, z0, levels(8), list(network.parameters()))


def levels(steps):
    return gs.schedules.karras(steps, sigma_min=0.1, sigma_max=10.0)


# The footprint of a call.


def footprint(denoiser, z0, **options):
    return gs.memory.plan(denoiser, z0, levels(2), budget=0, **options).footprint


def test_activations_count_each_storage_once_and_no_parameters():
    weight, free, fixed = (normal(1000, seed=k) for k in range(3))
    weight = nn.Parameter(weight)
    free.requires_grad_()

    def denoiser(x, sigma, fixed):
        hidden = torch.tanh(x * weight)  # keeps input and weight; keeps its result
        return hidden * hidden * free * fixed  # hidden once more, its square, what is given

    got = footprint(denoiser, normal(8, 1000), cond={"fixed": fixed})
    size = 8 * 1000 * 8
    assert got.state == got.outputs[0] == size
    assert got.activations == 2 * size
    assert got.keeps_input
    assert not got.keeps_outputs
    assert got.gradients == 2 * 1000 * 8
    # Forward: those two and the output. Backward: beside these the gradient on its way.
    assert got.held == pytest.approx(3 * size, rel=0.1)
    assert got.backward_peak > got.held


def test_an_output_that_is_kept_is_not_counted_twice():
    got = footprint(lambda x, sigma: torch.tanh(x), normal(8, 1000))
    assert (got.activations, got.keeps_input, got.keeps_outputs) == (0, False, True)


def test_a_denoiser_that_checkpoints_itself_keeps_less():
    def plain(x, sigma):
        for _ in range(10):
            x = torch.tanh(x)
        return x * 2

    def thrifty(x, sigma):
        return torch.utils.checkpoint.checkpoint(plain, x, sigma, use_reentrant=False)

    much, little = (footprint(d, normal(8, 1000)) for d in (plain, thrifty))
    assert much.activations == 10 * 8 * 1000 * 8
    assert little.activations == 8 * 8  # the level
    assert little.backward_peak >= much.activations  # it has them for a moment


def test_a_denoiser_without_a_gradient_has_no_backward():
    with pytest.warns(gs.GradientWarning, match="detaches"):
        got = footprint(lambda x, sigma: torch.tanh(x.detach()), normal(8, 1000))
    assert got.activations == got.gradients == 0


def test_the_allocator_s_count_leaves_out_what_is_made_outside(monkeypatch):
    """On CUDA; its statistics are played by two numbers."""
    allocated, most = 1000, 5000

    def reset(device):
        nonlocal most
        most = allocated

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: most)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    counter = gauge(torch.device("cuda"))
    with counter:
        allocated, most = 1300, 1700
    assert (counter.live, counter.peak) == (300, 700)
    allocated = 1350  # 50 made outside
    with counter:
        allocated, most = 1150, 1500
    assert (counter.live, counter.peak) == (100, 450)


# Evaluations and times.


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_evaluations_are_those_of_the_run(solver):
    network = Convolutions(width=2)
    denoiser, z0 = gs.EDM(network), torch.zeros(1, 4, 8, 8, requires_grad=True)
    plan = gs.memory.plan(denoiser, z0, levels(20), solver=solver, budget=BUDGET)
    assert network.calls == 1
    for row in [*plan, plan.predictor.revolve(1), plan.predictor.revolve(5)]:
        network.calls = 0
        gs.sample(denoiser, z0, levels(20), solver=solver, memory=row.memory).sum().backward()
        evaluations = {"euler": 20, "heun": 40 - 1 + 1}[solver]
        assert row.evaluations == network.calls / evaluations, row.name


def test_factors_follow_from_the_times_of_one_call():
    plan = gs.memory.plan(lambda x, s: x.tanh(), torch.zeros(2, 3), levels(20), budget=BUDGET)
    forward, backward = plan.footprint.forward_seconds, plan.footprint.backward_seconds
    assert forward > 0
    assert backward > 0
    assert [row.name for row in plan] == ["store", "checkpoint", "revolve:18"]
    store, checkpoint, revolve = plan
    assert store.factor == 1.0
    assert checkpoint.factor == pytest.approx((2 * forward + backward) / (forward + backward))
    assert revolve.evaluations == 40 / 20
    # With all states the last call is not made again either, but then nothing is saved.
    assert plan.predictor.revolve(19).evaluations == 39 / 20
    # Griewank and Walther 2000: N = 20 takes 53 calls with 5 slots, 48 with 10.
    assert [plan.predictor.revolve(c).evaluations for c in (5, 10)] == [53 / 20, 48 / 20]


# What fits.


def some_plan(budget, steps=20, **options):
    z0 = torch.zeros(4, 4096)
    return gs.memory.plan(lambda x, s: x.tanh().cos(), z0, levels(steps), budget=budget, **options)


def test_revolve_takes_the_most_slots_that_fit():
    for budget in (14 * 65536, 2**20, 20 * 65536):
        plan = some_plan(budget)
        row = list(plan)[-1]
        assert row.fits
        assert row.peak <= budget < plan.predictor.revolve(row.memory.slots + 1).peak


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m", "heun"])
def test_the_row_of_revolve_saves_memory_with_the_fewest_calls(solver):
    z0, levels_ = torch.zeros(4, 4096), levels(20)
    plan = gs.memory.plan(lambda x, s: x.tanh().cos(), z0, levels_, solver=solver, budget=2**30)
    checkpoint, row = list(plan)[-2:]
    assert row.peak < checkpoint.peak
    assert row.memory.slots < plan.predictor.most_slots()
    saving = [
        each.evaluations
        for each in map(plan.predictor.revolve, range(1, plan.predictor.most_slots()))
        if each.peak < checkpoint.peak
    ]
    assert row.evaluations == min(saving)


def test_the_best_is_the_fastest_that_fits():
    assert some_plan(2**30).best == gs.memory.Store()
    tight = some_plan(2**20)
    assert [row.fits for row in tight] == [False, False, True]
    assert tight.best == list(tight)[-1].memory


def test_what_takes_the_same_time_yields_to_what_stands_before():
    # With N = 200 revolve(199) saves one call of 400: that is no reason to prefer it.
    plan = some_plan(2**30, steps=200)
    plan = gs.memory.Plan(plan.rows[1:], plan.budget, plan.predictor)
    assert plan.best == gs.memory.Checkpoint()


def test_where_nothing_fits_the_error_names_the_least_and_the_way_out():
    plan = some_plan("10kB")
    least = plan.predictor.revolve(1).peak
    assert not any(row.fits for row in plan)
    with pytest.raises(ValueError, match=r"budget must hold at least the .* of revolve:1") as error:
        _ = plan.best
    assert capacity.readable(least) in str(error.value)
    assert "got 9.77 KiB" in str(error.value)
    assert "gs.memory.Truncated" in str(error.value)
    assert "nothing exact fits: take a smaller batch" in str(plan)


def test_without_a_budget_it_is_what_is_free(monkeypatch):
    monkeypatch.setattr(capacity, "free", lambda device: 2**20)
    assert some_plan(None).budget == 2**20
    monkeypatch.setattr(capacity, "free", lambda device: None)
    with pytest.raises(ValueError, match="budget must be given where the free memory is not known"):
        some_plan(None)


def test_offload_is_a_row_on_a_device_with_memory_of_its_own(monkeypatch):
    predictor = some_plan(2**20).predictor
    store, checkpoint, offload, _ = predictor.rows(away=True)
    state = predictor.footprint.state
    assert offload.host == 20 * state
    assert offload.evaluations == checkpoint.evaluations == 2.0
    # At the peak checkpoint has 20 states, offload the current one and the next.
    assert checkpoint.peak - offload.peak == 18 * state
    assert offload.fits
    monkeypatch.setattr(capacity, "free", lambda device: 19 * state)
    assert not next(row for row in predictor.rows(away=True) if row.name == "offload").fits
    assert store.host == 0


COLUMNS = ["memory", "peak", "host", "evaluations", "time", "exact", "fits"]


def test_it_prints_as_a_table():
    lines = str(some_plan(2**20)).splitlines()
    assert lines[0].split() == COLUMNS
    assert [line.split()[0] for line in lines[1:4]] == ["store", "checkpoint", "revolve:4"]
    assert len({len(line) for line in lines[:4]}) == 1
    assert re.fullmatch(r"store +1.69 MiB +- +1.00 +1.00 +yes +no", lines[1])
    assert lines[4].startswith("one call: activations 64 KiB, state 64 KiB, forward ")
    assert lines[5] == "budget 1 MiB; best: revolve:4"


# What asking leaves as it was.


def test_the_random_state_and_gradients_stay():
    net = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))
    z0 = leaf(normal(4, 6, dtype=torch.float32))
    z0.grad = torch.ones_like(z0)
    seen = []
    net[0].weight.register_hook(seen.append)
    before = {name: x.clone() for name, x in net.state_dict().items()}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    with torch.no_grad():  # a plan is asked for wherever one happens to be
        gs.memory.plan(wrapped(net), z0, levels(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(z0.grad, torch.ones_like(z0))
    assert not seen
    for name, x in net.state_dict().items():
        assert torch.equal(x, before[name]), name
    assert all(p.grad is None for p in net.parameters())


def wrapped(net):
    """A denoiser whose modules can be seen."""

    class Denoiser(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, sigma):
            return self.net(x)

    return Denoiser()


def test_a_failure_leaves_all_as_it_was():
    def denoiser(x, sigma):
        torch.rand(3)
        raise KeyError("lost")

    z0, state = leaf(normal(2, 3)), torch.get_rng_state()
    with pytest.raises(KeyError):
        gs.memory.plan(denoiser, z0, levels(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert z0.grad is None
    assert (torch.ones(1) * 2).item() == 2  # no mode is left on
    x = gs.sample(lambda x, s: x.tanh(), z0, levels(3))
    assert x.requires_grad


def test_nothing_of_the_call_stays_alive():
    denoiser = Watched()
    with no_collector():
        gs.memory.plan(denoiser, leaf(normal(2, 3)), levels(3))
        assert len(denoiser.activations) == 1
        assert Watched.count(denoiser.activations) == 0
        assert Watched.count(denoiser.states) == 0


def test_autocast_holds_for_the_measured_call():
    net = nn.Sequential(nn.Linear(64, 64), nn.Tanh()).requires_grad_(False)
    z0 = torch.zeros(16, 64)
    whole = footprint(wrapped(net), z0)
    with torch.autocast("cpu", torch.bfloat16):
        half = footprint(wrapped(net), z0)
    assert (whole.output_dtype, half.output_dtype) == (torch.float32, torch.bfloat16)
    assert half.outputs[0] == whole.outputs[0] // 2


# Bad arguments, before any call.


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"budget": "8 gigs"}, ValueError, "budget must be bytes"),
        ({"budget": 1.5}, TypeError, "budget must be an int"),
        ({"budget": -1}, ValueError, "budget must be at least 0"),
        ({"solver": "huen"}, ValueError, "did you mean 'heun'"),
        ({"noise": 3}, TypeError, "noise must be a gradsampler.noise object"),
        ({"state_dtype": torch.int32}, ValueError, "state_dtype must be a floating-point dtype"),
        ({"cond": 3}, TypeError, "cond must be a dict"),
    ],
)
def test_bad_arguments(options, error, match):
    def denoiser(x, sigma):
        raise AssertionError("called")

    with pytest.raises(error, match=match):
        gs.memory.plan(denoiser, torch.zeros(2, 3), levels(3), **options)


def test_the_layers_under_it_are_there_for_others():
    """A program that is no solver's can be planned for as well."""
    from gradsampler import arguments

    z0 = torch.zeros(2, 3, requires_grad=True)
    program, model = arguments.record(lambda x, s: x.tanh(), levels(4))
    cost = Rehearsal(program, measured(arguments.trajectory(program, model, z0), z0)).revolve(2)
    assert cost.calls == 4 + 4  # Griewank and Walther 2000, with 2 slots


# The page.

PAGE = (Path(__file__).parents[1] / "docs" / "memory.md").read_text()


def test_the_page_runs_and_prints_what_it_shows(capsys):
    block, *_ = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    shown = re.search(r"^    memory .*?budget[^\n]*$", PAGE, re.MULTILINE | re.DOTALL)[0]
    names = {}
    exec(compile(block, "docs/memory.md", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    expected = [line.removeprefix("    ") for line in shown.splitlines()]
    for got, wanted in zip(printed[1:4], expected[1:4], strict=True):  # times differ
        columns = [line.split()[:5] + line.split()[6:] for line in (got, wanted)]
        assert columns[0] == columns[1]
    assert printed[0].split() == expected[0].split() == COLUMNS
    assert printed[4].split(", forward")[0] == expected[4].split(", forward")[0]
    assert printed[5] == expected[5]
    names["x"].sum().backward()
    assert names["z0"].grad.any()


def test_the_page_counts_what_comes_after_the_run():
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)[1:3]:
        exec(compile(block.replace("karras(1000)", "karras(10)"), "docs/memory.md", "exec"), names)
    assert names["plan"].predictor.following.peak > 64 * names["z0"].numel()
    assert names["z0"].grad.any()


def test_the_page_names_what_there_is():
    named = set(re.findall(r'`"(\w+)(?::\d+)?"`', PAGE)) | set(re.findall(r"`(\w+)`", PAGE))
    assert {"store", "checkpoint", "offload", "revolve", "truncated"} <= named
    assert set(gs.memory.names()) <= named | {"auto"}
    options = set(re.findall(r"--(\w+)", PAGE))
    assert options == {"denoiser", "shape", "solver", "steps", "budget", "plot", "measure"}
