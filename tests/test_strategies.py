# SPDX-License-Identifier: Apache-2.0
"""Offload, Revolve and Truncated: the same gradients, what they keep, what can go wrong.

Whole gradients are compared with plain autograd (memory="store", itself tested against loops and
differences); counts with the closed form of Griewank and Walther 2000; truncated gradients with a
loop, and with an interpreter of the program, that detach.
"""

import contextlib
import errno
import gc
import math
import os
import subprocess
import sys
import time
import weakref

import pytest
import torch
from torch import nn

import gradsampler as gs
from gradsampler.engine.program import Z0, Evaluation, Stage
from gradsampler.memory import Offload, Revolve, Truncated, files, revolve
from gradsampler.memory.host import Host, Pinned
from gradsampler.parameterization import parameterize
from support.alive import Watched, no_collector
from support.gradients import assert_close, gradients
from support.networks import Net
from support.noises import KINDS, injections, make_noise
from support.problems import normal
from support.runs import SOLVERS, TYPICAL, injecting, leaf, levels
from support.strategies import STRATEGIES
from support.tiers import few, pairs

SIGMAS = gs.schedules.karras(5, sigma_min=0.05, sigma_max=9.0)
EXACT = [name for name in STRATEGIES if name != "store"]
exact = pytest.mark.parametrize("memory", EXACT)


# Agreement with plain autograd.


@pairs(cheap={"solver": TYPICAL}, solver=SOLVERS, kind=KINDS, memory=EXACT)
def test_same_sample_and_gradients(solver, kind, memory, tmp_path):
    z0, sigmas, shift, net = leaf(normal(2, 3)), leaf(SIGMAS), leaf(normal(3)), Net()
    options = injecting(solver) | {"solver": solver, "cond": {"shift": shift}}
    count = injections(z0.detach(), SIGMAS, **injecting(solver), solver=solver)
    assert count > 0
    noise, tensors = make_noise(kind, count, z0)
    inputs = [z0, sigmas, shift, *net.parameters(), *tensors]
    expected = gs.sample(net, z0, sigmas, noise=noise, memory="store", **options)
    wanted = gradients(expected, inputs)
    x = gs.sample(net, z0, sigmas, noise=noise, memory=STRATEGIES[memory](tmp_path), **options)
    assert_close(x.detach(), expected.detach())
    for again in (True, False):
        got = gradients(x, inputs, retain_graph=again)
        for k, (g, w) in enumerate(zip(got, wanted, strict=True)):
            assert_close(g, w, what=f"gradient {k}")
    assert not os.listdir(tmp_path)
    with pytest.raises(RuntimeError, match="second time"):
        gradients(x, inputs)


@exact
def test_guidance_final_denoising_and_level_zero(memory, tmp_path):
    z0, sigmas, net = leaf(normal(2, 3)), leaf(torch.cat([SIGMAS, levels([0.0])])), Net()
    shift, scale = leaf(normal(3)), leaf(torch.tensor(2.0, dtype=torch.float64))

    def run(memory):
        guided = gs.Guided(net, scale, {"shift": torch.zeros(3, dtype=torch.float64)})
        cond = {"shift": shift}
        return gs.sample(guided, z0, sigmas[:-1], cond=cond, final_denoise=True, memory=memory)

    inputs = [z0, sigmas, shift, scale, *net.parameters()]
    wanted = gradients(run("store"), inputs)
    for g, w in zip(gradients(run(STRATEGIES[memory](tmp_path)), inputs), wanted, strict=True):
        assert_close(g, w)


@exact
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_narrow_dtypes(dtype, memory, tmp_path):
    z0 = leaf(normal(3, 5, dtype=dtype))
    options = {"solver": "dpmpp_2m", "churn": gs.Churn(0.9)}

    def run(memory):
        return gs.sample(lambda x, s: torch.tanh(x), z0, SIGMAS, memory=memory, **options)

    expected, got = (run(m) for m in ("checkpoint", STRATEGIES[memory](tmp_path)))
    assert torch.equal(got, expected)
    (wanted,), (found,) = gradients(expected, [z0]), gradients(got, [z0])
    if memory == "auto":  # where all fits autograd adds up, in another order
        assert_close(found, wanted, 1e-6)
    else:
        assert torch.equal(found, wanted)
    if dtype == torch.float32:
        assert_close(found, gradients(run("store"), [z0])[0], 1e-6)


@exact
def test_states_of_16_bits(memory, tmp_path):
    z0 = leaf(normal(3, 5, dtype=torch.bfloat16))
    first, second = (
        gradients(
            gs.sample(lambda x, s: torch.tanh(x), z0, SIGMAS, memory=m, state_dtype=torch.bfloat16),
            [z0],
        )[0]
        for m in ("checkpoint", STRATEGIES[memory](tmp_path))
    )
    assert torch.equal(first, second)


# Randomness.


@exact
@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m", "heun"])
def test_dropout(solver, memory, tmp_path):
    z0 = leaf(normal(4, 6))
    net = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.4), nn.Tanh(), nn.Dropout(0.2)).double()

    def run(memory):
        torch.manual_seed(3)
        x = gs.sample(
            lambda x, s: net(x),
            z0,
            SIGMAS,
            solver=solver,
            memory=memory,
            callback=lambda info: torch.rand(7),  # draws between the calls, in the run alone
        )
        after = torch.rand(1)
        torch.manual_seed(99)  # backward must not depend on where the generator is by then
        inputs = [z0, *net.parameters()]
        got = gradients(x, inputs, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(got, gradients(x, inputs), strict=True))
        state = torch.rand(1)
        return x.detach(), *got, after, state

    for got, expected in zip(run(STRATEGIES[memory](tmp_path)), run("store"), strict=True):
        assert_close(got, expected)


@exact
def test_autocast(memory, tmp_path):
    z0, net = leaf(normal(4, 6, dtype=torch.float32)), nn.Linear(6, 6)

    def run(memory):
        with torch.autocast("cpu", torch.bfloat16):
            x = gs.sample(lambda x, s: net(x).tanh(), z0, SIGMAS, memory=memory)
        return gradients(x, [z0])[0]  # outside

    assert torch.equal(run(STRATEGIES[memory](tmp_path)), run("checkpoint"))


@exact
def test_weights_changed_before_backward(memory, tmp_path):
    z0, net = leaf(normal(2, 3)), Net()
    x = gs.sample(net, z0, SIGMAS, memory=STRATEGIES[memory](tmp_path))
    with torch.no_grad():
        net.weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


def test_an_output_changed_before_backward():
    kept = []

    def denoiser(x, sigma):
        kept.append(torch.tanh(x))
        return kept[-1]

    x = gs.sample(denoiser, leaf(normal(2, 3)), SIGMAS, solver="dpmpp_2m", memory="revolve:4")
    with torch.no_grad():
        for output in kept[:-1]:
            output.mul_(2)
    with pytest.raises(RuntimeError, match="stay as they are"):
        x.sum().backward()


@exact
def test_callback_and_progress_see_the_run_once(memory, tmp_path, capsys):
    seen, z0 = [], leaf(normal(2, 3))
    x = gs.sample(
        Net(),
        z0,
        SIGMAS,
        solver="heun",
        memory=STRATEGIES[memory](tmp_path),
        callback=lambda info: seen.append(info.step),
        progress=True,
    )
    x.sum().backward()
    assert seen == list(range(5))
    assert "5/5" in capsys.readouterr().err


@pytest.mark.parametrize("memory", sorted(set(EXACT) - {"auto"}))  # which has it where all fits
def test_a_second_derivative_is_refused(memory, tmp_path):
    z0 = leaf(normal(2, 3))
    x = gs.sample(Net(), z0, SIGMAS, memory=STRATEGIES[memory](tmp_path))
    with pytest.raises(RuntimeError, match="store"):
        torch.autograd.grad(x.sin().sum(), z0, create_graph=True)


# Revolve: how often the model is called, and what is alive.


def least(n, s):
    """Model calls of a run of n with s snapshots: each once more for its tape, but the last."""
    s = min(s, max(n - 1, 1))
    r = next(r for r in range(n + 1) if math.comb(s + r, s) >= n)
    return n + r * n - math.comb(s + r, s + 1)


def counted(n, memory, solver="euler"):
    calls, z0 = [], leaf(normal(1, 2))

    def denoiser(x, sigma):
        calls.append(float(sigma[0]))
        return 0.5 * x

    x = gs.sample(denoiser, z0, gs.schedules.karras(n), solver=solver, memory=memory)
    forward = len(calls)
    gradients(x, [z0], retain_graph=True)
    first = len(calls)
    gradients(x, [z0])
    return forward, first, len(calls)


@pytest.mark.parametrize(
    ("n", "slots", "a_step"),
    [
        (20, 10, 2.40),
        (20, 5, 2.65),
        (35, 10, 2.66),
        (35, 5, 3.20),
        (50, 10, 2.76),
        (50, 5, 3.44),
        (100, 10, 3.22),
        (100, 5, 4.16),
    ],
)
def test_revolve_calls_the_model_as_rarely_as_possible(n, slots, a_step):
    forward, total, again = counted(n, Revolve(slots))
    assert forward == n
    assert total == least(n, slots)
    assert round(total / n, 2) == a_step
    assert again == 2 * total  # a second backward runs forward anew


@pytest.mark.parametrize("n", [1, 2, 3, 7, 12])
@pytest.mark.parametrize("slots", [1, 2, 3, 100])
def test_revolve_in_small(n, slots):
    assert counted(n, f"revolve:{slots}")[:2] == (n, least(n, slots))


def test_revolve_with_many_slots_repeats_all_but_the_last_call():
    assert counted(9, "revolve:8")[1] == 2 * 9 - 1
    forward, total, _ = counted(10, "revolve:3", "heun")
    assert (forward, total) == (20, least(20, 3))


class Distinct(Watched):
    """Counts a tensor that is seen again once."""

    @staticmethod
    def count(references):
        return len({r.cdata for r in references if not r.expired()})


@pytest.mark.parametrize("slots", [1, 3, 5])
def test_revolve_keeps_no_more_states_than_slots(slots):
    denoiser, z0 = Distinct(), leaf(normal(2, 3))
    with no_collector():
        x = gs.sample(denoiser, z0, gs.schedules.karras(24), memory=Revolve(slots))
        # Beside the snapshots the last call, whose activations are kept.
        assert Distinct.count(denoiser.states) == slots + 1
        assert Distinct.count(denoiser.activations) == 1
        x.sum().backward()
        earlier = [states for _, states in denoiser.alive]
        assert max(earlier) == slots  # and the one that the call is about
        assert max(activations for activations, _ in denoiser.alive) == 0
        assert x.grad_fn is not None
        assert Distinct.count(denoiser.states) == 0
        assert Distinct.count(denoiser.activations) == 0


# Revolve on two levels.


@pytest.mark.parametrize(("n", "slots", "further"), [(50, 3, 7), (50, 9, 1), (20, 1, 4), (5, 2, 9)])
@pytest.mark.parametrize("where", ["cpu", "folder"])
def test_further_slots_count_as_slots_do(n, slots, further, where, tmp_path):
    memory = Revolve(slots, further, "cpu" if where == "cpu" else tmp_path)
    _, total, again = counted(n, memory)
    assert total == least(n, slots + further)
    assert again == 2 * total
    assert not os.listdir(tmp_path)


class Elsewhere:
    """A place that copies at once, so that what is alive is what the device holds."""

    def __init__(self, device):
        self.puts, self.kept, self.most, self.settled = 0, 0, 0, 0

    def put(self, x):
        self.puts, self.kept = self.puts + 1, self.kept + 1
        self.most = max(self.most, self.kept)
        return Copied(self, x.tolist(), x.dtype)

    def settle(self):
        self.settled += 1

    def close(self):
        pass


class Copied:
    def __init__(self, place, values, dtype):
        self.place, self.values, self.dtype = place, values, dtype

    def fetch(self):
        pass

    def get(self):
        return torch.tensor(self.values, dtype=self.dtype)

    def drop(self):
        self.place.kept -= 1


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m"])
@pytest.mark.parametrize(("slots", "further"), [(1, 4), (3, 4), (4, 1)])
def test_the_device_holds_its_slots_alone(slots, further, solver, monkeypatch):
    places = []

    def place(self, program, device):
        places.append(Elsewhere(device))
        return places[-1]

    monkeypatch.setattr(Revolve, "place", place)
    denoiser, z0 = Distinct(), leaf(normal(2, 3))
    sigmas = gs.schedules.karras(30)
    expected = gs.sample(denoiser, z0, sigmas, solver=solver, memory="store")
    (wanted,) = gradients(expected, [z0])
    denoiser.states.clear(), denoiser.activations.clear(), denoiser.alive.clear()
    with no_collector():
        x = gs.sample(denoiser, z0, sigmas, solver=solver, memory=Revolve(slots, further))
        # Beside the snapshots the last call, whose activations are kept, and its history.
        assert Distinct.count(denoiser.states) <= slots + 1 + (solver == "dpmpp_2m")
        (got,) = gradients(x, [z0])
        assert max(states for _, states in denoiser.alive) <= slots + (solver == "dpmpp_2m")
        assert Distinct.count(denoiser.states) == 0
    assert_close(got, wanted)
    (place,) = places
    assert place.settled == 2  # as the run ends, and before the backward
    assert place.kept == 0
    # A snapshot of dpmpp_2m has the prediction before as well, except at the first call.
    assert place.most in ({2 * further, 2 * further - 1} if solver == "dpmpp_2m" else {further})


@pytest.mark.parametrize("solver", SOLVERS)
def test_how_many_tensors_a_snapshot_holds(solver):
    # What the message of a full disk multiplies by; here from the tensors that are alive.
    program = gs.solvers.resolve(solver).program(
        gs.schedules.karras(12), parameterize(Net(), "x0"), churn=None, final_denoise=False
    )
    alive, most = set(), 0
    for k, instruction in enumerate(program.instructions):
        later = {slot for i in program.instructions[k:] for slot in i.reads()} | {program.output}
        if isinstance(instruction, Evaluation):
            most = max(most, len((alive & later) - {Z0}))
            alive |= set(instruction.writes)
        else:
            alive.add(instruction.writes)
    assert revolve._width(program) == most


def two_levels(folder, denoiser=None, steps=12, **options):
    z0 = leaf(normal(2, 3))
    z0.grad = torch.ones_like(z0)
    memory, sigmas = Revolve(1, 3, folder), gs.schedules.karras(steps)
    return z0, gs.sample(denoiser or Net(), z0, sigmas, memory=memory, **options)


@pytest.mark.parametrize("how", ["flipped", "gone"])
def test_a_damaged_snapshot_is_an_error(how, tmp_path):
    z0, x = two_levels(tmp_path)
    (path,) = tmp_path.glob("*/2.state")
    path.unlink() if how == "gone" else damage(path, how)
    with pytest.raises(OSError, match=r"Revolve: .*2\.state must hold the tensor that was written"):
        x.sum().backward()
    assert torch.equal(z0.grad, torch.ones_like(z0))
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4])
def test_a_full_disk_under_snapshots(after, tmp_path, monkeypatch):
    # 3 files are written on the way forward, the others on the way back.
    real, written = files._write, []

    def write(path, x):
        if len(written) == after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path)
        return real(path, x)

    monkeypatch.setattr(files, "_write", write)
    if after < 3:
        with pytest.raises(OSError, match="No space left") as error:
            two_levels(tmp_path)
    else:
        z0, x = two_levels(tmp_path)
        with pytest.raises(OSError, match="No space left") as error:
            x.sum().backward()
        assert torch.equal(z0.grad, torch.ones_like(z0))
    assert error.value.errno == errno.ENOSPC
    assert str(tmp_path) in str(error.value)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("call", [1, 6, 12, 14, 20])
def test_a_call_that_fails_leaves_no_snapshots(call, tmp_path):
    calls, denoiser = [], Distinct()

    def failing(x, sigma):
        calls.append(sigma)
        if len(calls) == call:
            raise KeyError("no")
        return denoiser(x, sigma)

    with pytest.raises(KeyError):
        two_levels(tmp_path, failing)[1].sum().backward()
    gc.collect()
    assert not os.listdir(tmp_path)
    assert Distinct.count(denoiser.states) == 0


def test_snapshots_are_guarded_while_they_are_written(tmp_path):
    kept = []

    def denoiser(x, sigma):
        with torch.no_grad():
            for output in kept[-1:]:
                output.mul_(2)  # as one that returns the same buffer each time
        kept.append(torch.tanh(x))
        return kept[-1]

    with pytest.raises(RuntimeError, match=r"memory=Revolve: .* must stay as they are"):
        two_levels(tmp_path, denoiser, solver="dpmpp_2m")
    gc.collect()
    assert not os.listdir(tmp_path)


def test_the_order_of_copies_of_snapshots(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(torch, "get_device_module", lambda device: clock)
    place, tensors = Pinned(torch.device("cpu")), [normal(2, 3, seed=k) for k in range(5)]
    kept = []
    for x in tensors:
        clock.run.done += 1  # computes x
        kept.append(place.put(x))
        assert place._copies.leaving[-1][0].time[clock.run] == clock.run.done
        assert clock.run.seen.get(place._copies.stream, 0) == max(len(kept) - 2, 0)
    place.settle()
    assert clock.run.seen[place._copies.stream] == 5
    kept[3].fetch()
    kept[3].fetch()  # once is enough
    assert clock.run.seen[place._copies.stream] == 5  # the model may go on
    for k in (3, 3, 0):
        assert torch.equal(kept[k].get(), tensors[k])
        assert clock.run.seen[place._copies.stream] == place._copies.stream.done
    assert place._copies.stream.done == 5 + 3
    kept[1].fetch()
    place.close()  # what was fetched may go now
    assert clock.run.seen[place._copies.stream] == 9


@exact
def test_all_goes_with_the_output(memory, tmp_path):
    denoiser, z0 = Watched(), leaf(normal(2, 3))
    with no_collector():
        x = gs.sample(denoiser, z0, SIGMAS, memory=STRATEGIES[memory](tmp_path))
        del x
        assert Watched.count(denoiser.states) == 0
        assert Watched.count(denoiser.activations) == 0
        assert not os.listdir(tmp_path)


@exact
@pytest.mark.parametrize("mode", few([torch.no_grad, torch.inference_mode], torch.no_grad))
def test_nothing_is_kept_without_grad_mode(mode, memory, tmp_path):
    denoiser, z0 = Watched(), leaf(normal(2, 3))
    with no_collector(), mode():
        x = gs.sample(denoiser, z0, SIGMAS, memory=STRATEGIES[memory](tmp_path))
        assert not x.requires_grad
        assert max(denoiser.alive) <= (1, 1)
        assert not os.listdir(tmp_path)


# Offload.


def test_the_host_s_states():
    # The bookkeeping; on the CPU torch's streams do nothing.
    host, states = Host(7), [normal(2, 3, seed=k) for k in range(7)]
    for k, x in enumerate(states):
        host.save(k, x)
    kept = host.release()
    assert [x.shape for x in kept] == [(7, 2, 3)]
    for _ in range(2):
        host.adopt(kept)
        for k in reversed(range(7)):
            assert torch.equal(host.load(k), states[k])
        host.release()
    host.adopt(kept)  # and a backward that ended early
    host.load(6)
    assert host.release() == kept


class Clock:
    """A device module whose streams know which of each other's work lies behind them."""

    class Stream:
        def __init__(self, device=None):
            self.done, self.seen = 0, {}

        def now(self):
            return {**self.seen, self: self.done}

        def behind(self, times):
            self.seen |= {s: max(t, self.seen.get(s, 0)) for s, t in times.items() if s is not self}

        def wait_stream(self, other):
            self.behind(other.now())

        def wait_event(self, event):
            self.behind(event.time)

    class Event:
        def record(self, stream):
            stream.done += 1  # the copy
            self.time = stream.now()

    def __init__(self):
        self.run = self.Stream()

    def current_stream(self, device):
        return self.run

    def stream(self, stream):
        return contextlib.nullcontext()


def test_the_order_of_copies_and_work(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(torch, "get_device_module", lambda device: clock)
    host, copied = Host(6), []
    for k in range(6):
        x = normal(2, 3, seed=k)
        clock.run.done += 1  # computes x
        host.save(k, x)
        stream, event = host._copies.stream, host._copies.leaving[-1][0]
        assert event.time[clock.run] == clock.run.done  # the copy is behind
        copied.append((weakref.ref(x), event.time[stream]))
        del x
        alive = [reference() is not None for reference, _ in copied]
        assert sum(alive) <= 2
        for there, (_, time_) in zip(alive, copied, strict=True):
            assert there or clock.run.seen[stream] >= time_
    kept = host.release()
    assert clock.run.seen[stream] == 6
    assert not any(reference() is not None for reference, _ in copied)
    host.adopt(kept)
    for k in reversed(range(6)):
        before = stream.done
        x = host.load(k)
        assert torch.equal(x, normal(2, 3, seed=k))
        assert clock.run.seen[stream] == 6 + 6 - k  # up to its copy, no further
        assert stream.done == before + (2 if k == 5 else 1 if k else 0)
        if k:
            assert host._coming[k - 1][0].time[clock.run] == clock.run.done
        clock.run.done += 1  # the model's backward


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@exact
def test_states_away_from_a_gpu(memory, tmp_path):
    z0 = leaf(normal(8, 64, 256, dtype=torch.float32).cuda())
    weight = leaf(normal(256, 256, dtype=torch.float32).cuda() / 16)

    def run(memory):
        x = gs.sample(
            lambda x, s: torch.tanh(x @ weight), z0, gs.schedules.karras(40), memory=memory
        )
        return gradients(x, [z0, weight])

    wanted = run("checkpoint")
    for _ in range(3):
        for g, w in zip(run(STRATEGIES[memory](tmp_path)), wanted, strict=True):
            assert torch.equal(g, w)


def offloaded(folder, denoiser=None, z0=None):
    z0 = leaf(normal(2, 3)) if z0 is None else z0
    return z0, gs.sample(denoiser or Net(), z0, SIGMAS, memory=Offload(folder))


def test_files_are_there_between_forward_and_backward_alone(tmp_path):
    z0, x = offloaded(tmp_path)
    (folder,) = tmp_path.iterdir()
    assert sorted(f.name for f in folder.iterdir()) == [f"{k}.state" for k in range(5)]
    assert sum(f.stat().st_size for f in folder.iterdir()) == 5 * 6 * 8
    gradients(x, [z0], retain_graph=True)
    assert folder.exists()
    gradients(x, [z0])
    assert x.grad_fn is not None
    assert not folder.exists()


def test_files_stay_for_a_second_backward_under_hooks_on_saved_tensors(tmp_path):
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.clone(), lambda x: x):
        z0, x = offloaded(tmp_path)
    first = gradients(x, [z0], retain_graph=True)
    assert torch.equal(first[0], gradients(x, [z0])[0])
    del x
    assert not os.listdir(tmp_path)


def test_offload_keeps_no_state_in_memory(tmp_path):
    denoiser = Watched()
    with no_collector():
        _, x = offloaded(tmp_path, denoiser)
        assert Watched.count(denoiser.states) == 0
        x.sum().backward()
        assert max(states for _, states in denoiser.alive) <= 4  # two to be written, one under way
        assert Watched.count(denoiser.states) == 0


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[len(data) // 2] ^= 1
    path.write_bytes({"cut": data[:-1], "longer": data + b"0", "flipped": data}[how])


@pytest.mark.parametrize("how", ["flipped", "cut", "longer", "gone"])
def test_a_damaged_file_is_an_error(how, tmp_path):
    z0, x = offloaded(tmp_path)
    z0.grad = torch.ones_like(z0)
    (path,) = tmp_path.glob("*/2.state")
    if how == "gone":
        path.unlink()
    else:
        damage(path, how)
    with pytest.raises(OSError, match=r"2\.state must hold the tensor that was written"):
        x.sum().backward()
    assert torch.equal(z0.grad, torch.ones_like(z0))
    del x
    gc.collect()
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("after", [0, 1, 4])
def test_a_full_disk(after, tmp_path, monkeypatch):
    real, written = files._write, []

    def write(path, x):
        if len(written) == after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(path)
        return real(path, x)

    z0 = leaf(normal(2, 3))
    before, z0.grad = z0.detach().clone(), torch.ones_like(z0)
    monkeypatch.setattr(files, "_write", write)
    with pytest.raises(OSError, match="No space left") as error:
        offloaded(tmp_path, z0=z0)
    assert error.value.errno == errno.ENOSPC
    assert str(tmp_path) in str(error.value)
    assert "240 bytes" in str(error.value)
    assert torch.equal(z0, before)
    assert torch.equal(z0.grad, torch.ones_like(z0))
    assert not os.listdir(tmp_path)
    monkeypatch.undo()
    z0.grad = None
    offloaded(tmp_path, z0=z0)[1].sin().sum().backward()
    expected = gradients(gs.sample(Net(), z0, SIGMAS, memory="store"), [z0])
    assert_close(z0.grad, expected[0])


def test_an_unwritable_folder(tmp_path, monkeypatch):
    def mkdtemp(**_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(files.tempfile, "mkdtemp", mkdtemp)
    with pytest.raises(PermissionError, match=r"must take 240 bytes .* got Permission denied"):
        offloaded(tmp_path)


def test_a_denoiser_that_fails_leaves_no_files(tmp_path):
    calls = []

    def denoiser(x, sigma):
        calls.append(sigma)
        if len(calls) == 3:
            raise KeyError("no")
        return x / 2

    with pytest.raises(KeyError):
        offloaded(tmp_path, denoiser)
    gc.collect()
    assert not os.listdir(tmp_path)


def test_the_run_waits_for_slow_writes(tmp_path, monkeypatch):
    real, ahead = files._write, []

    def write(path, x):
        time.sleep(0.01)
        return real(path, x)

    def denoiser(x, sigma):
        ahead.append(len(calls) - len(list(tmp_path.glob("*/*.state"))))
        calls.append(sigma)
        return x / 2

    calls = []
    monkeypatch.setattr(files, "_write", write)
    z0, x = offloaded(tmp_path, denoiser)
    assert max(ahead) <= 3
    assert len(list(tmp_path.glob("*/*.state"))) == 5  # all is written when there is a sample
    gradients(x, [z0])


KILLED = """
import os, signal, sys, torch
import gradsampler as gs
calls = []
def denoiser(x, sigma):
    calls.append(sigma)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return x / 2
z0 = torch.ones(2, 3, dtype=torch.float64, requires_grad=True)
gs.sample(denoiser, z0, gs.schedules.karras(5), memory=gs.memory.Offload(sys.argv[1]))
"""


@pytest.mark.thorough
def test_files_of_a_killed_run_are_never_read(tmp_path):
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert killed.returncode == -9
    (stale,) = tmp_path.iterdir()
    left = sorted(stale.iterdir())
    assert left
    for path in left:
        path.write_bytes(b"stale")
    z0, x = offloaded(tmp_path)
    (got,) = gradients(x, [z0])
    (expected,) = gradients(gs.sample(Net(), z0, SIGMAS, memory="store"), [z0])
    assert_close(got, expected)
    assert sorted(stale.iterdir()) == left
    assert list(tmp_path.iterdir()) == [stale]
    assert {path.read_bytes() for path in left} == {b"stale"}


# Truncated.


def assert_truncated(run, loop, inputs, **tolerance):
    """The sample of the whole run, the gradient of the loop; None where nothing arrives."""
    expected, x = loop(), run()
    assert_close(x.detach(), expected.detach())
    wanted = gradients(expected, inputs, allow_unused=True)
    got = gradients(x, inputs, allow_unused=True)
    for k, (g, w) in enumerate(zip(got, wanted, strict=True)):
        none = torch.zeros_like(inputs[k])
        assert_close(none if g is None else g, none if w is None else w, what=f"gradient {k}")
    return got


@pytest.mark.parametrize("steps", [1, 2, 4, 5, 9])
def test_truncated_euler_with_churn_against_a_loop(steps):
    z0, sigmas, shift, net = leaf(normal(2, 3)), leaf(SIGMAS), leaf(normal(3)), Net()
    noise, n = gs.noise.SignedRoll(seed=2), len(SIGMAS) - 1
    gamma = min(0.9 / n, 2**0.5 - 1)

    def loop():
        x = sigmas[0] * z0
        for i in range(n):
            if 0 < i == n - steps:  # the whole run has no state that is not a function of z0
                x = x.detach()
            s, t = sigmas[i], sigmas[i + 1]
            x = x + s * (gamma * (2 + gamma)) ** 0.5 * noise.at(z0, i, n)
            s = s * (1 + gamma)
            x = x + (t - s) * (x - net(x, s.expand(2), shift)) / s
        return x

    def run():
        options = {"churn": gs.Churn(0.9), "cond": {"shift": shift}, "noise": noise}
        return gs.sample(net, z0, sigmas, memory=Truncated(steps), **options)

    got = assert_truncated(run, loop, [z0, sigmas, shift, *net.parameters()])
    assert got[0].abs().sum() > 0  # through the noise


@pytest.mark.parametrize("inner", ["store", "checkpoint", "offload", "revolve:2"])
@pytest.mark.parametrize("steps", [1, 3])
def test_truncated_multistep_against_a_loop(steps, inner):
    # dpmpp_2m: Lu et al. 2022, with the prediction before the cut as a constant.
    z0, sigmas, net, n = leaf(normal(2, 3)), leaf(SIGMAS[:-1]), Net(), len(SIGMAS) - 2

    def loop():
        x, old = sigmas[0] * z0, None
        for i in range(n):
            if i == n - steps:
                x, old = x.detach(), None if old is None else old.detach()
            s, t = sigmas[i], sigmas[i + 1]
            d = mean = net(x, s.expand(2))
            if old is not None:
                r = (sigmas[i - 1] / s).log() / (s / t).log()
                mean = (1 + 1 / (2 * r)) * d - old / (2 * r)
            x, old = (t / s) * x + (1 - t / s) * mean, d
        return x

    def run():
        with pytest.warns(UserWarning, match="the gradient to z0 is zero"):
            return gs.sample(net, z0, sigmas, solver="dpmpp_2m", memory=Truncated(steps, inner))

    got = assert_truncated(run, loop, [z0, sigmas, *net.parameters()])
    assert got[0] is None or not got[0].any()  # nothing is injected


def interpreted(program, model, z0, noise, first, shift):
    """The program in plain torch; what enters step ``first`` is detached."""
    c, slots, cut = program.coefficients, {Z0: z0}, False
    following = [*program.instructions[1:], None]
    for instruction, after in zip(program.instructions, following, strict=True):
        if isinstance(instruction, Stage):
            x = sum(c[k] * slots[slot] for slot, k in instruction.terms)
            if not cut and isinstance(after, Evaluation) and after.step >= first > 0:
                cut, x = True, x.detach()
                slots = {slot: value.detach() for slot, value in slots.items()} | {Z0: z0}
            for step, draw, k in instruction.injections:
                added = c[k] * noise.at(z0, step, program.num_steps, draw)
                x = x + (added if step >= first or first <= 0 else added.detach())
            slots[instruction.writes] = x
        else:
            x, level = slots[instruction.state], c[instruction.c_noise].expand(len(z0))
            outputs = model.outputs(c[instruction.c_in] * x, level, {"shift": shift})
            slots.update(zip(instruction.writes, outputs, strict=True))
    return slots[program.output]


@pytest.mark.filterwarnings("ignore:memory=Truncated. the gradient to z0 is zero")
@pairs(cheap={"solver": TYPICAL}, solver=SOLVERS, kind=KINDS, inner=["store", "checkpoint"])
def test_truncated_against_an_interpreter(solver, kind, inner):
    z0, sigmas, shift, net = leaf(normal(2, 3)), leaf(SIGMAS), leaf(normal(3)), Net()
    options = injecting(solver)
    count = injections(z0.detach(), SIGMAS, **options, solver=solver)
    noise, tensors = make_noise(kind, count, z0)
    method = gs.solvers.resolve(solver, options.get("eta"))
    model = parameterize(net, "x0")
    for steps in (2, 5):
        first = len(SIGMAS) - 1 - steps

        def loop(first=first):
            program = method.program(sigmas, model, churn=options.get("churn"), final_denoise=False)
            fitted = noise.prepare(z0, program.noises)
            return interpreted(program, model, z0, fitted, first, shift)

        def run(steps=steps):
            cond, memory = {"shift": shift}, Truncated(steps, inner)
            return gs.sample(
                net, z0, sigmas, solver=solver, noise=noise, cond=cond, memory=memory, **options
            )

        assert_truncated(run, loop, [z0, sigmas, shift, *net.parameters(), *tensors])


def test_truncated_says_so_and_leaves_the_sample_as_it_is():
    z0 = leaf(normal(3, 5, dtype=torch.float32))
    assert not Truncated(1).exact
    assert all(gs.memory.resolve(name).exact for name in gs.memory.names())
    for solver in SOLVERS:
        options = injecting(solver) | {"solver": solver}
        whole = gs.sample(lambda x, s: torch.tanh(x), z0, SIGMAS, memory="checkpoint", **options)
        seen = []
        x = gs.sample(
            lambda x, s: torch.tanh(x),
            z0,
            SIGMAS,
            memory="truncated:2",
            callback=lambda info, seen=seen: seen.append(info.step),
            **options,
        )
        if solver == "midpoint_reversible":  # whose stages inject the noises of two steps
            torch.testing.assert_close(x, whole, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(x, whole)
        assert seen == list(range(5))


def test_truncated_calls_and_memory():
    denoiser, z0 = Distinct(), normal(2, 3)
    with no_collector():
        x = gs.sample(denoiser, z0, SIGMAS, memory="truncated:2")
        x.sum().backward()
        assert len(denoiser.states) == 5 + 2
        assert max(activations for activations, _ in denoiser.alive) == 0
        assert max(states for _, states in denoiser.alive) <= 2


def test_truncated_with_frozen_levels_and_a_noise_of_its_own():
    class Squared(gs.noise.NoiseSource):
        def at(self, z0, step, num_steps):
            return z0**2 * (step + 1)

    z0, noise, n = leaf(normal(2, 3)), Squared(), len(SIGMAS) - 1

    def loop():
        x = SIGMAS[0] * z0
        for i in range(n):
            s, t = SIGMAS[i], SIGMAS[i + 1]
            x = x.detach() if i == n - 2 else x
            up = t / s * torch.sqrt(s**2 - t**2)
            down = torch.sqrt(t**2 - up**2)
            x = x + (down - s) * (x - torch.tanh(x)) / s + up * noise.at(z0, i, n)
        return x

    def run():
        options = {"solver": "euler_ancestral", "noise": noise}
        return gs.sample(lambda x, s: torch.tanh(x), z0, SIGMAS, memory="truncated:2", **options)

    assert_truncated(run, loop, [z0])


@pytest.mark.parametrize("inner", ["store", "checkpoint", "revolve:1", "offload"])
def test_a_run_as_the_denoiser_of_a_run(inner):
    z0, net, short = leaf(normal(2, 3)), Net(), levels([1.0, 0.6, 0.4])

    def run(outer, inner):
        def denoiser(x, sigma):
            return gs.sample(net, x, short, memory=inner)

        x = gs.sample(denoiser, z0, SIGMAS, solver="heun", memory=outer)
        return gradients(x, [z0, *net.parameters()])

    wanted = run("store", "store")
    for outer in ("store", "checkpoint", "revolve:2"):
        for g, w in zip(run(outer, inner), wanted, strict=True):
            assert_close(g, w)


# Names.


def test_names_with_numbers():
    assert gs.memory.resolve("offload") == Offload("cpu")
    assert gs.memory.resolve("revolve") == Revolve(8)
    assert gs.memory.resolve("revolve:3") == Revolve(3) == Revolve(3, further=0)
    assert gs.memory.resolve("revolve:3+20") == Revolve(3, further=20, to="cpu")
    assert gs.memory.resolve("truncated:4") == Truncated(4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gs.memory.resolve("truncated"), "did you mean 'truncated:4'"),
        (lambda: gs.memory.resolve("revolve:many"), "did you mean 'revolve:8'"),
        (lambda: gs.memory.resolve("revolve:8+"), "did you mean 'revolve:8'"),
        (lambda: gs.memory.resolve("revolve:0"), "Revolve: slots must be at least 1, got 0"),
        (lambda: Revolve(2, -1), "Revolve: further must be at least 0, got -1"),
        (lambda: Revolve(2, 3, "/no/such/folder"), "Revolve: to must .*, got '/no/such/folder'"),
        (lambda: gs.memory.resolve("store:3"), "memory must be one of auto"),
        (lambda: Truncated(0), "Truncated: steps must be at least 1, got 0"),
        (lambda: Truncated(2, "chekpoint"), "did you mean 'checkpoint'"),
        (lambda: Truncated(2, "truncated:1"), "Truncated: inner must be one of auto, checkpoint"),
        (lambda: Truncated(2, Truncated(1)), "Truncated: inner must be another strategy"),
        (lambda: Offload("/no/such/folder"), "existing folder, got '/no/such/folder'"),
    ],
)
def test_what_is_wrong_is_said(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_wrong_types():
    for make in (lambda: Offload(3), lambda: Revolve(2.0), lambda: Truncated("2")):
        with pytest.raises(TypeError, match="must be"):
            make()
