# SPDX-License-Identifier: Apache-2.0
"""memory="auto": the gradients of plain autograd whatever fits, and no call more than it needs.

What is free is set by the tests. How many calls should fit is worked out from the sizes of the
denoisers below, by hand.
"""

import contextlib
import random
from itertools import count

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradsampler as gs
from gradsampler.memory import capacity
from gradsampler.memory.planning.gauge import Live
from support.alive import Watched, no_collector
from support.gradients import assert_close, gradients
from support.networks import Net
from support.noises import KINDS, injections, make_noise
from support.problems import normal
from support.runs import SOLVERS, TYPICAL, injecting, leaf
from support.tiers import pairs

STEPS = 6
SIGMAS = gs.schedules.karras(STEPS, sigma_min=0.05, sigma_max=9.0)
ROOM = {"all": 2**40, "some": None, "none": 0}


class Wide:
    """A denoiser whose call keeps 64 states of activations, and that counts its calls.

    The product keeps the input and the weight, tanh its result, the mean nothing.
    """

    def __init__(self, fails_at=None):
        self.weight = torch.linspace(-0.2, 0.3, 64, dtype=torch.float64)
        self.calls, self.fails_at = 0, fails_at

    def __call__(self, x, sigma):
        if self.calls == self.fails_at:
            raise RuntimeError("out of order")
        self.calls += 1
        return torch.tanh(x[..., None] * self.weight).mean(-1)


@pytest.fixture
def free(monkeypatch):
    """Sets what is free: a number of bytes, or None."""

    def set_to(size):
        monkeypatch.setattr(capacity, "free", lambda device: size)

    return set_to


def keeping(calls, z0, steps=STEPS):
    """What must be free for just so many calls of `Wide` to be kept: 0.8 of it, less the states,
    less one call's worth for the backward. A call: 64 states, its input, its output.
    """
    state = z0.numel() * z0.element_size()
    # The weight is in no list of known tensors, so the first call has it counted as well.
    graph = 66 * state + 64 * 8
    return int((steps * state + (calls + 1.5) * graph) / 0.8)


# Which calls are kept.


@pytest.mark.parametrize("kept", [0, 1, 4, STEPS - 1, STEPS])
def test_the_calls_that_fit_are_not_made_again(kept, free):
    z0, denoiser = leaf(normal(2, 3)), Wide()
    free(keeping(kept, z0))
    x = gs.sample(denoiser, z0, SIGMAS)
    assert denoiser.calls == STEPS
    found = gradients(x, [z0])
    assert denoiser.calls == 2 * STEPS - kept
    expected = gradients(gs.sample(Wide(), z0, SIGMAS, memory="store"), [z0])
    assert_close(found[0], expected[0])


@pytest.mark.parametrize("after", [480, "480B"])
def test_room_is_left_for_what_follows_the_run(after, free):
    z0, denoiser = leaf(normal(2, 3)), Wide()
    free(keeping(2, z0) + 480)
    gs.sample(denoiser, z0, SIGMAS, memory=gs.memory.Auto(after=after)).sum().backward()
    assert denoiser.calls == 2 * STEPS - 2


def test_a_loss_is_measured_once_for_each_shape(free):
    seen = []

    def loss(x):
        seen.append(x.shape)
        return (x[..., None] * torch.linspace(0, 1, 64, dtype=x.dtype)).tanh().sum()

    z0 = leaf(normal(2, 3))
    with Live() as counter:
        torch.autograd.grad(loss(leaf(normal(2, 3))), leaf(normal(2, 3)), allow_unused=True)
    size = counter.peak
    seen.clear()
    memory = gs.memory.Auto(after=loss)
    for _ in range(2):
        denoiser = Wide()
        free(keeping(3, z0) + size)
        gs.sample(denoiser, z0, SIGMAS, memory=memory).sum().backward()
        assert denoiser.calls == pytest.approx(2 * STEPS - 3, abs=1)
        assert seen == [z0.shape]
    gs.sample(Wide(), leaf(normal(5, 3)), SIGMAS, memory=memory)
    assert seen == [z0.shape, (5, 3)]
    with pytest.raises(ValueError, match="Auto: after must be bytes"):
        gs.memory.Auto(after="plenty")


def test_only_calls_that_a_policy_differentiates_are_kept(free):
    """Of six, those of three steps: two are kept, and the states of the others are not."""
    z0, denoiser = leaf(normal(2, 3)), Wide()
    policy = gs.policies.ChosenSteps([0, 2, 3])
    free(keeping(2, z0, steps=3))
    x = gs.sample(denoiser, z0, SIGMAS, gradient=policy)
    found = gradients(x, [z0])
    assert denoiser.calls == STEPS + 1
    expected = gs.sample(Wide(), z0, SIGMAS, memory="store", gradient=policy)
    assert_close(found[0], gradients(expected, [z0])[0])


def test_a_policy_that_differentiates_no_call_keeps_no_state(free):
    free(2**20)
    z0, denoiser = leaf(normal(2, 3)), Watched()
    for memory in ("auto", "checkpoint"):
        denoiser = Watched()
        with no_collector():
            x = gs.sample(denoiser, z0, SIGMAS, gradient=gs.policies.NoJacobian(), memory=memory)
            assert denoiser.count(denoiser.states) == 0
            assert denoiser.count(denoiser.activations) == 0
        assert gradients(x, [z0])[0].any()


@pytest.mark.parametrize("after", [0, 2000])
def test_auto_keeps_no_graph_beside_what_follows_where_that_is_no_saving(after, free, monkeypatch):
    """Half of what is free does not hold the states. Revolve would, and hold a graph as well."""
    taken = []
    run = gs.memory.Revolve.run
    monkeypatch.setattr(
        gs.memory.Revolve, "run", lambda *args: taken.append("revolve") or run(*args)
    )
    z0 = leaf(normal(2, 3))  # a state of 48 bytes, a call of 66 of them
    free(STEPS * 48 + after)
    x = gs.sample(Wide(), z0, SIGMAS, memory=gs.memory.Auto(after=after))
    found = gradients(x, [z0])
    assert taken == ([] if after else ["revolve"])
    expected = gradients(gs.sample(Wide(), z0, SIGMAS, memory="store"), [z0])
    assert_close(found[0], expected[0])


def test_more_room_than_calls_changes_nothing(free):
    z0, denoiser = leaf(normal(2, 3)), Wide()
    free(2**50)
    gs.sample(denoiser, z0, SIGMAS, solver="heun").sum().backward()
    assert denoiser.calls == 2 * STEPS - 1 + 1


def test_where_nobody_knows_what_is_free_it_is_checkpoint(free):
    z0, denoiser = leaf(normal(2, 3)), Wide()
    free(None)
    gs.sample(denoiser, z0, SIGMAS).sum().backward()
    assert denoiser.calls == 2 * STEPS


def test_the_last_calls_are_kept_and_freed_one_by_one(free):
    z0, denoiser = leaf(normal(2, 3)), Watched()
    # `Watched` keeps its hidden state twice over; two of six calls are to stay.
    state = 2 * 3 * 8
    free(int((STEPS * state + 3.4 * 3 * state) / 0.8))
    with no_collector():
        x = gs.sample(denoiser, z0, MANY := SIGMAS)
        alive = [not reference.expired() for reference in denoiser.activations]
        kept = sum(alive)
        assert 0 < kept < STEPS
        assert alive == [False] * (STEPS - kept) + [True] * kept
        x.sum().backward()
        # By the first call that is made again, none of the kept ones is left.
        assert [a for a, _ in denoiser.alive[STEPS:]] == [0] * (STEPS - kept)
        assert Watched.count(denoiser.activations) == 0
        assert len(denoiser.activations) == 2 * len(MANY[1:]) - kept


def test_with_little_room_for_states_it_is_revolve(free):
    z0, denoiser = leaf(normal(2, 3)), Wide()
    steps = 20
    free(2 * 5 * z0.numel() * 8)  # half of it holds five states
    x = gs.sample(denoiser, z0, gs.schedules.karras(steps))
    x.sum().backward()
    assert denoiser.calls == 53  # N = 20 with 5 slots, Griewank and Walther 2000


def test_revolve_makes_room_for_what_a_multistep_solver_looks_back_at(free):
    z0, denoiser = leaf(normal(2, 3)), gs.EDM(Wide())
    free(2 * 15 * z0.numel() * 8)  # a state, the state before and the output before: 15 / 3 = 5
    x = gs.sample(denoiser, z0, gs.schedules.karras(20), solver="dpmpp_2m")
    x.sum().backward()
    assert denoiser.network.calls == 53


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_states_go_to_the_host_where_only_that_has_room(monkeypatch):
    z0 = leaf(normal(2, 3).cuda())
    small, calls = 2 * (STEPS - 1) * 48, count()
    monkeypatch.setattr(capacity, "free", lambda d: small if d.type == "cuda" else 2**40)

    def denoiser(x, sigma):
        next(calls)
        return torch.tanh(x)

    found = gradients(gs.sample(denoiser, z0, SIGMAS), [z0])
    assert next(calls) == 2 * STEPS  # revolve would have made more
    expected = gradients(gs.sample(denoiser, z0, SIGMAS, memory="store"), [z0])
    assert_close(found[0], expected[0])


# A run that can be undone.


def test_a_run_that_can_be_undone_is():
    z0, net = leaf(normal(2, 3)), Net()
    options = {"solver": "midpoint_reversible", "churn": gs.Churn(1.0)}
    runs = {m: gs.sample(net, z0, SIGMAS, memory=m, **options) for m in ("auto", "reversible")}
    assert torch.equal(runs["auto"], runs["reversible"])  # in integers, so not those of store
    with torch.no_grad():
        assert torch.equal(gs.sample(net, z0, SIGMAS, **options), runs["auto"])
    found = {m: gradients(x, [z0, *net.parameters()]) for m, x in runs.items()}
    assert all(map(torch.equal, found["auto"], found["reversible"]))


def test_a_run_that_64_bits_do_not_hold_keeps_its_states():
    z0, levels = leaf(normal(2, 3)), gs.schedules.karras(100)
    options = {"solver": "midpoint_reversible", "churn": gs.Churn(40.0)}
    with pytest.raises(ValueError, match="64 bits"):
        gs.sample(Net(), z0, levels, memory="reversible", **options)
    x = gs.sample(Net(), z0, levels, **options)
    assert torch.equal(x, gs.sample(Net(), z0, levels, memory="checkpoint", **options))


# Agreement with plain autograd.


OTHERS = [name for name in SOLVERS if name != "midpoint_reversible"]


@pairs(
    cheap={"solver": [name for name in TYPICAL if name in OTHERS]},
    solver=OTHERS,
    kind=KINDS,
    room=ROOM,
)
def test_same_gradients_for_every_target(solver, kind, room, free):
    z0, sigmas, shift, net = leaf(normal(2, 3)), leaf(SIGMAS), leaf(normal(3)), Net()
    options = injecting(solver) | {"solver": solver, "cond": {"shift": shift}}
    steps = injections(z0.detach(), SIGMAS, **injecting(solver), solver=solver)
    noise, tensors = make_noise(kind, steps, z0)
    inputs = [z0, sigmas, shift, *net.parameters(), *tensors]
    expected = gs.sample(net, z0, sigmas, noise=noise, memory="store", **options)
    wanted = gradients(expected, inputs)
    # Between the states' least and enough for all of some 15 tensors a call.
    free({"all": 2**40, "some": 50 * 2 * 3 * 8 * 2, "none": 2 * 12 * 2 * 3 * 8}[room])
    x = gs.sample(net, z0, sigmas, noise=noise, **options)
    assert torch.equal(x, expected.detach())
    for again in (True, False):
        found = gradients(x, inputs, retain_graph=again)
        for k, (g, w) in enumerate(zip(found, wanted, strict=True)):
            assert_close(g, w, what=f"gradient {k}")
    with pytest.raises(RuntimeError, match="second time"):
        gradients(x, inputs)


@pytest.mark.parametrize("kept", [0, 3, STEPS - 1])
def test_kept_and_repeated_calls_agree_to_the_bit(kept, free):
    z0 = leaf(normal(2, 3))
    free(keeping(kept, z0))
    found = gradients(gs.sample(Wide(), z0, SIGMAS, churn=gs.Churn(1.0)), [z0])
    expected = gradients(
        gs.sample(Wide(), z0, SIGMAS, churn=gs.Churn(1.0), memory="checkpoint"), [z0]
    )
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize("kept", [0, 3, STEPS])
def test_a_second_backward_finds_the_calls_that_were_kept(kept, free):
    z0, denoiser = leaf(normal(2, 3)), Wide()
    free(keeping(kept, z0))
    x = gs.sample(denoiser, z0, SIGMAS)
    first = gradients(x, [z0], retain_graph=True)
    assert denoiser.calls == 2 * STEPS - kept
    second = gradients(x, [z0])
    assert denoiser.calls == 3 * STEPS - 2 * kept
    assert torch.equal(first[0], second[0])
    with pytest.raises(RuntimeError, match="second time"):
        gradients(x, [z0])


@pytest.mark.parametrize("room", [2**40, 3000, 700])
def test_dropout(room, free):
    z0 = leaf(normal(4, 6))
    net = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.4), nn.Tanh(), nn.Dropout(0.2)).double()
    free(max(room, 2 * STEPS * 192))

    def run(memory):
        torch.manual_seed(3)
        x = gs.sample(lambda x, s: net(x), z0, SIGMAS, memory=memory)
        torch.rand(11)
        return gradients(x, [z0, *net.parameters()])

    for g, w in zip(run("auto"), run("store"), strict=True):
        assert_close(g, w)


def test_a_generator_of_the_denoiser_s_own_is_no_error_where_no_call_is_made_again(free):
    z0, generator = leaf(normal(2, 3)), random.Random()

    def denoiser(x, sigma):
        return torch.tanh(x * generator.random())

    def run(memory):
        generator.seed(5)
        return gradients(gs.sample(denoiser, z0, SIGMAS, memory=memory), [z0])[0]

    free(2**40)
    assert_close(run("auto"), run("store"))
    free(2 * STEPS * 48)
    with pytest.raises(gs.ReplayError, match="generator"):
        run("auto")


def test_autocast(free):
    free(2**40)
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    z0 = leaf(normal(2, 6, dtype=torch.float32))

    def run(memory):
        with torch.autocast("cpu", torch.bfloat16):
            x = gs.sample(lambda x, s: net(x), z0, SIGMAS, memory=memory)
        return gradients(x, [z0, *net.parameters()])

    for g, w in zip(run("auto"), run("checkpoint"), strict=True):
        assert_close(g, w, 1e-6)


@pytest.mark.parametrize("steps", [1, STEPS])
def test_a_denoiser_that_checkpoints_itself(steps, free):
    free(2**40)
    z0, inner, sigmas = leaf(normal(2, 3)), Wide(), SIGMAS[-steps - 1 :]

    def denoiser(x, sigma):
        return checkpoint(inner, x, sigma, use_reentrant=False)

    found = gradients(gs.sample(denoiser, z0, sigmas), [z0])
    assert inner.calls == 2 * steps
    assert_close(found[0], gradients(gs.sample(inner, z0, sigmas, memory="store"), [z0])[0])


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, which it else hides
@pytest.mark.parametrize("kept", [3, STEPS])
def test_a_compiled_denoiser_is_compiled_once(kept, free):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    z0, inner = leaf(normal(2, 3)), Wide()
    weight = inner.weight
    denoiser = torch.compile(
        lambda x, s: torch.tanh(x[..., None] * weight).mean(-1), backend=backend
    )
    free(keeping(kept, z0))
    found = gradients(gs.sample(denoiser, z0, SIGMAS), [z0])
    assert len(compiled) == 1
    assert_close(found[0], gradients(gs.sample(inner, z0, SIGMAS, memory="store"), [z0])[0])


# Bytes, counted storage by storage.


def alive(denoiser, z0, memory, sigmas=SIGMAS):
    """States' worth of what a run leaves for its backward, and of what both take at most."""
    with Live() as live:
        gs.sample(denoiser, z0, sigmas[-2:], memory=memory).sum().backward()  # what stays is loaded
    size = z0.numel() * z0.element_size()
    before = live.live
    with live:
        x = gs.sample(denoiser, z0, sigmas, memory=memory)
        kept = live.live - before
        torch.autograd.grad(x.sum(), z0)
    return kept / size, (live.peak - before) / size


def test_where_all_fits_no_state_is_kept_beside_the_graphs(free):
    free(2**40)
    z0 = leaf(normal(4, 500))
    kept, peak = alive(lambda x, s: torch.tanh(2 * x), z0, "auto", gs.schedules.karras(30))
    # tanh keeps its result; beside them there are the output of the run and few that are in work.
    assert 30 <= kept < 32
    assert 30 <= peak < 38


def test_a_call_that_leaves_autograd_nothing_to_keep(free):
    free(2**40)
    z0 = leaf(normal(4, 500))
    kept, peak = alive(lambda x, s: 0.5 * x, z0, "auto", gs.schedules.karras(30))
    assert kept < 2
    assert peak < 8


@pytest.mark.parametrize("count", [1, 3, 5])
def test_no_state_is_kept_of_a_call_whose_graph_is(count, free):
    z0, denoiser = leaf(normal(4, 500)), Wide()
    free(keeping(count, z0))
    kept, _ = alive(denoiser, z0, "auto")
    # Of a kept call tanh's result, the input and the output; of another the state; the sample.
    exact = 66 * count + (STEPS - count) + 1
    assert exact - 1 < kept < exact + 1


# What goes wrong.


def test_a_failure_in_the_run_leaves_nothing(free):
    free(2**40)
    z0, watched = leaf(normal(2, 3)), Watched()

    def denoiser(x, sigma):
        if len(watched.activations) == 4:
            raise KeyError("lost")
        return watched(x, sigma)

    state = torch.get_rng_state()
    with no_collector():
        with contextlib.suppress(KeyError):
            gs.sample(denoiser, z0, SIGMAS)
        assert Watched.count(watched.activations) == 0
        assert Watched.count(watched.states) == 0
    assert torch.equal(state, torch.get_rng_state())


def test_a_failure_in_the_backward_leaves_a_run_that_can_be_tried_again(free):
    z0, denoiser = leaf(normal(2, 3)), Wide()
    free(keeping(2, z0))
    x = gs.sample(denoiser, z0, SIGMAS)
    denoiser.fails_at = denoiser.calls + 1  # the second of those that are made again
    with pytest.raises(RuntimeError, match="out of order"):
        gradients(x, [z0], retain_graph=True)
    denoiser.fails_at, before = None, denoiser.calls
    found = gradients(x, [z0])
    assert denoiser.calls == before + STEPS - 2
    assert_close(found[0], gradients(gs.sample(Wide(), z0, SIGMAS, memory="store"), [z0])[0])


def test_nothing_is_kept_where_nothing_is_differentiated_by(free):
    free(2**40)
    denoiser = Watched()
    denoiser.weight.requires_grad_(False)
    with no_collector():
        x = gs.sample(denoiser, normal(2, 3), SIGMAS)
        assert not x.requires_grad
        assert [a for a, _ in denoiser.alive] == [0] * STEPS


def test_a_gradient_of_the_gradient_is_refused_where_calls_are_made_again(free):
    z0 = leaf(normal(2, 3))
    free(keeping(STEPS - 1, z0))
    with pytest.raises(RuntimeError, match="memory='store' has a gradient of the gradient"):
        gradients(gs.sample(Wide(), z0, SIGMAS), [z0], create_graph=True)


def test_a_gradient_of_the_gradient_where_all_fits(free):
    """Also through the first call, whose saved tensors go through hooks."""
    free(2**40)
    z0 = leaf(normal(2, 3))

    def twice(memory):
        (g,) = gradients(gs.sample(Wide(), z0, SIGMAS, memory=memory), [z0], create_graph=True)
        return torch.autograd.grad(g.square().sum(), z0)[0]

    assert_close(twice("auto"), twice("store"))


@pytest.mark.parametrize("steps", [1, 3])
def test_activations_changed_in_place_are_noticed(steps, free):
    """Also in the first call, whose saved tensors go through hooks, and torch looks no more."""
    free(2**40)

    def denoiser(x, sigma):
        hidden = torch.tanh(x)
        out = hidden * 2.0
        hidden.add_(1.0)
        return out

    z0 = leaf(normal(2, 3))
    x = gs.sample(denoiser, z0, SIGMAS[: steps + 1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(x, [z0])


def test_weights_changed_in_place_are_noticed(free):
    free(2**40)
    z0, net = leaf(normal(2, 3)), Net()
    x = gs.sample(net, z0, SIGMAS)
    with torch.no_grad():
        net.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(x, [z0])


def test_hooks_on_leaves_see_the_sum_once(free):
    free(2**40)
    net, seen = Net(), []
    net.weight.register_hook(seen.append)
    z0 = leaf(normal(2, 3))
    gs.sample(net, z0, SIGMAS).sin().sum().backward()
    assert len(seen) == 1
    expected = gradients(gs.sample(Net(), z0, SIGMAS, memory="store"), [z0])
    assert_close(z0.grad, expected[0])


# What is free.


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 * 2**30), ("500MB", 5 * 10**8), (" 1.5 kib ", 1536), ("12", 12), ("2e3b", 2000)],
)
def test_sizes_are_read(text, size):
    assert capacity.parsed("budget", text) == size


@pytest.mark.parametrize("text", ["", "GiB", "8 XB", "-1MB", "nan", "infGB", "1MiBB", "1e300TB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="budget must be bytes, such as"):
        capacity.parsed("budget", text)


def test_sizes_are_written():
    assert [capacity.readable(n) for n in (0, 1023, 1024, 1500 * 1024, 2**31, 2**43)] == [
        "0 B", "1023 B", "1 KiB", "1.46 MiB", "2 GiB", "8.0 TiB",
    ]  # fmt: skip


def test_what_the_cpu_has_left_is_less_than_it_has():
    with open("/proc/meminfo") as file:
        total = int(file.readline().split()[1]) * 1024
    assert 0 < capacity.free(torch.device("cpu")) <= total


def test_what_a_device_has_left_counts_what_torch_holds_in_reserve(monkeypatch):
    class Module:
        mem_get_info = staticmethod(lambda device: (1000, 9000))
        memory_reserved = staticmethod(lambda device: 500)
        memory_allocated = staticmethod(lambda device: 200)

    monkeypatch.setattr(torch, "get_device_module", lambda device: Module)
    assert capacity.free(torch.device("cuda")) == 1300
    monkeypatch.delattr(Module, "mem_get_info")
    assert capacity.free(torch.device("mps")) is None


def group(folder, names, most, used, cache):
    folder.mkdir(parents=True, exist_ok=True)
    statistics = f"anon 5\n{'total_' if 'limit' in names[0] else ''}inactive_file {cache}"
    for name, value in zip((*names, "memory.stat"), (most, used, statistics), strict=True):
        (folder / name).write_text(f"{value}\n")


def test_the_limit_of_a_control_group_counts(tmp_path):
    names = ("memory.max", "memory.current")
    group(tmp_path, names, "max", 70, 0)
    group(tmp_path / "outer", names, 1000, 600, 50)
    group(tmp_path / "outer" / "inner", names, 900, 300, 0)
    listing = tmp_path / "listing"
    listing.write_text("0::/outer/inner\n")
    assert sorted(capacity._groups(listing, tmp_path)) == [450, 600]


def test_the_limit_of_an_old_control_group_counts(tmp_path):
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    group(tmp_path / "memory", names, 500, 100, 20)  # a container's path leads nowhere in it
    listing = tmp_path / "listing"
    listing.write_text("5:cpu:/\n4:memory:/machine/somewhere\n0::/\n")
    assert capacity._groups(listing, tmp_path) == [420]


def test_without_control_groups_there_is_no_limit(tmp_path):
    assert min(capacity._groups(tmp_path / "missing", tmp_path)) >= 2**62
