# SPDX-License-Identifier: Apache-2.0
"""Ranks that see different things, and have to do the same; and what no run can serve.

What hung before ends by the process group's time-out.
"""

import copy
import datetime
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.utils.checkpoint import checkpoint

import gradsampler as gs
from gradsampler.memory import capacity
from support.cases import Cases
from support.problems import normal
from support.sharing import F64, LEVELS, SIZE, ddp, euler, fsdp, full, network

SIGMAS = torch.tensor(LEVELS, dtype=F64)


case = CASES = Cases()
run = CASES.run


def z0(iteration=0):
    return normal(2, SIZE, seed=7 * iteration + dist.get_rank()).requires_grad_()


def counted(module):
    """Counts the calls of a module."""
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def alike(value):
    """Whether it is the same on all ranks."""
    both = [None, None]
    dist.all_gather_object(both, value)
    return both[0] == both[1]


def works_again(net, memory="checkpoint"):
    """A run after a failed one has the gradients of one process."""
    plain = network()
    with torch.no_grad():
        state = {name: full(p) for name, p in net.named_parameters()}
        plain.load_state_dict({name.removeprefix("module."): p for name, p in state.items()})
    net.zero_grad()
    gs.sample(net, z0(5), SIGMAS, memory=memory).square().sum().backward()
    total = 0
    for rank in range(2):
        start = normal(2, SIZE, seed=35 + rank)
        total = total + euler(plain, start, SIGMAS, None, {}).square().sum() / 2
    total.backward()
    expected = dict(plain.named_parameters())
    for name, p in net.named_parameters():
        g = expected[name.removeprefix("module.")].grad
        assert torch.allclose(full(p.grad), g, rtol=1e-11, atol=1e-13), name


# ------------------------------------------------------------------ decisions


def _by_free_memory(wrap, free, strategy):
    inner = network()
    inner.register_buffer("calls", torch.zeros(()))
    calls = counted(inner)
    net = wrap(inner)
    real, capacity.free = capacity.free, lambda device: free[dist.get_rank()]
    try:
        gs.sample(net, z0(), SIGMAS, memory=strategy).sum().backward()
    finally:
        capacity.free = real
    assert alike(len(calls)), "ranks have made different numbers of calls"
    return len(calls)


@case
def auto_keeps_what_the_poorest_rank_has_room_for():
    # A call keeps some kB: one rank has room for all of them, the other for one or two.
    assert 5 < _by_free_memory(fsdp, [2**30, 4000], "auto") < 10


@case
def auto_keeps_alike_under_ddp_with_buffers():
    assert 5 < _by_free_memory(ddp, [4000, 2**30], "auto") < 10


@case
def auto_revolves_with_the_slots_of_the_poorest_rank():
    assert _by_free_memory(fsdp, [2**30, 300], "auto") > 9


@case
def auto_undoes_steps_alike():
    """One rank's start asks for other integers than the other's."""
    net, start = fsdp(network()), 1e3 ** dist.get_rank() * z0().detach()
    levels = torch.tensor([4e4, *LEVELS], dtype=F64)
    calls = counted(net)
    x = gs.sample(net, start, levels, solver="midpoint_reversible")
    x.sum().backward()
    assert alike(len(calls))


# ------------------------------------------------------------------ errors


@case
def replay_error_of_one_rank_is_raised_on_all():
    inner = network()
    net, count = fsdp(inner), []

    def denoiser(x, sigma):
        count.append(1)
        odd = dist.get_rank() == 1 and len(count) == 8
        return net(x, sigma) + float(odd)

    x = gs.sample(denoiser, z0(), SIGMAS, memory="checkpoint")
    with pytest.raises(gs.ReplayError, match=r"another output at step 2") as error:
        x.sum().backward()
    assert ("on another rank" in str(error.value)) == (dist.get_rank() == 0)
    works_again(net)


@case
def generator_of_one_rank_is_an_error_on_all():
    net, generator = ddp(network()), torch.Generator().manual_seed(0)
    count = []

    def denoiser(x, sigma):
        count.append(1)
        astray = dist.get_rank() == 0 and len(count) == 7
        torch.rand((3 if astray else 2,), generator=generator)
        return net(x, sigma)

    x = gs.sample(denoiser, z0(), SIGMAS, memory="checkpoint")
    with pytest.raises(gs.ReplayError, match=r"draw the same numbers|on another rank"):
        x.sum().backward()
    works_again(net)


@case
def non_finite_value_of_one_rank_is_an_error_on_all():
    net = fsdp(network())
    count = []

    def denoiser(x, sigma):
        count.append(1)
        out = net(x, sigma)
        return out * torch.nan if dist.get_rank() == 1 and len(count) == 3 else out

    with pytest.raises(gs.NonFiniteError, match="the model's output at step 2 of 5") as error:
        gs.sample(denoiser, z0(), SIGMAS, memory="checkpoint", check_finite=True)
    assert ("on another rank" in str(error.value)) == (dist.get_rank() == 0)
    works_again(net)


@case
def non_finite_gradient_of_one_rank_is_an_error_on_all():
    net = fsdp(network())
    for memory in ("checkpoint", "store"):
        x = gs.sample(net, z0(), SIGMAS, memory=memory, check_finite=True)
        lam = torch.full_like(x, torch.inf if dist.get_rank() == 0 else 1.0)
        with pytest.raises(gs.NonFiniteError, match="the gradient at step 4"):
            x.backward(lam)
        if memory == "checkpoint":
            works_again(net)


@case
def reversible_gives_the_same_verdict_everywhere():
    net = fsdp(network())
    for call, where in ((6, "step 4"), (8, "some step")):
        count = []

        def denoiser(x, sigma, count=count, call=call):
            count.append(1)
            return net(x, sigma) + 1e-9 * float(dist.get_rank() == 1 and len(count) == call)

        options = {"solver": "midpoint_reversible", "memory": "reversible"}
        x = gs.sample(denoiser, z0(), SIGMAS, **options)
        with pytest.raises(gs.ReplayError, match=f"{where}|another output"):
            x.sum().backward()
    works_again(net)
    big = z0().detach() * (1e3 if dist.get_rank() == 1 else 1)
    wide = gs.memory.Reversible(amplitude=1e-2)
    with pytest.raises(OverflowError):
        gs.sample(
            lambda x, s: net(x, s) + 1e6 * (dist.get_rank() == 1),
            big.float().double(),
            SIGMAS,
            solver="midpoint_reversible",
            memory=wide,
            state_dtype=torch.float32,
        )


@case
def failed_backward_loses_nothing():
    """Gradients of before, flags and hooks are as they were; the next run is right."""
    for wrap in (ddp, fsdp):
        net = wrap(network())
        gs.sample(net, z0(), SIGMAS, memory="checkpoint").sum().backward()
        before = {name: full(p.grad).clone() for name, p in net.named_parameters()}
        count = []

        def denoiser(x, sigma, net=net, count=count):
            count.append(1)
            if len(count) == 8:
                raise KeyError("a failure of the user's")
            return net(x, sigma)

        x = gs.sample(denoiser, z0(1), SIGMAS, memory="checkpoint")
        with pytest.raises(KeyError):
            x.sum().backward()
        for name, p in net.named_parameters():
            assert torch.equal(full(p.grad), before[name]), name
        if wrap is ddp:
            assert net.require_backward_grad_sync
            assert net.require_forward_param_sync
        works_again(net)


@case
def a_rank_that_fails_alone_holds_the_others_no_longer_than_their_patience():
    """The group's own time-out, of two seconds here; in the run, and in its backward."""
    for call in (3, 8):
        group = dist.new_group(timeout=datetime.timedelta(seconds=2))
        inner = network()
        inner.register_buffer("calls", torch.zeros(()))
        net, count = ddp(inner, process_group=group), []

        def denoiser(x, sigma, net=net, count=count, call=call):
            count.append(1)
            if dist.get_rank() == 1 and len(count) == call:
                raise KeyError("a failure of the user's")
            return net(x, sigma)

        error = KeyError if dist.get_rank() == 1 else RuntimeError
        with pytest.raises(error):
            gs.sample(
                denoiser, z0(), SIGMAS, memory="checkpoint", check_finite=True
            ).sum().backward()
        dist.barrier()


# ------------------------------------------------------------------ what is not served


class Around(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return gs.sample(self.net, x, SIGMAS)


@case
def what_cannot_be_served_is_an_error_before_the_first_call():
    from torch.distributed._composable.replicate import replicate
    from torch.distributed._composable.replicate_with_fsdp import replicate as replicate2

    def refused(net, match):
        called = counted(net)
        with pytest.raises(ValueError, match=match):
            gs.sample(lambda x, sigma: net(x, sigma), z0(), SIGMAS)
        assert not called

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        refused(FullyShardedDataParallel(network(), device_id=torch.device("cpu")), "fully_shard")
        refused(replicate(network()), "DistributedDataParallel")
    refused(replicate2(network(), mesh=_mesh()), "DistributedDataParallel")
    outer = fully_shard(Around(fsdp(network(), nested=False)))
    with pytest.raises(ValueError, match="on the network that the run calls"):
        outer(z0())


def _mesh():
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (2,))


# ------------------------------------------------------------------ together with others


@case
def used_directly_in_the_loss():
    """The same module in the loss, called on what the run returned."""
    for wrap in (fsdp, ddp):
        plain = network()
        net = wrap(copy.deepcopy(plain))
        sigma = torch.full((2,), 0.5, dtype=F64)
        for memory in ("checkpoint", "auto", "store"):
            net.zero_grad(), plain.zero_grad()
            x = gs.sample(net, z0(), SIGMAS, memory=memory)
            (x.sin() + net(x, sigma).square()).sum().backward()
            total = 0
            for rank in range(2):
                y = euler(plain, normal(2, SIZE, seed=rank), SIGMAS, None, {})
                total = total + (y.sin() + plain(y, sigma).square()).sum() / 2
            total.backward()
            expected = dict(plain.named_parameters())
            for name, p in net.named_parameters():
                g = expected[name.removeprefix("module.")].grad
                assert (g is None) == (p.grad is None), name
                if g is not None:
                    assert torch.allclose(full(p.grad), g, rtol=1e-11, atol=1e-13), (memory, name)


class Checkpointed(nn.Module):
    """A network that checkpoints its blocks itself."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, sigma):
        net = self.net
        h = torch.tanh(net.enter(x) + sigma[:, None] * 0.3)
        for block in (net.first, net.second, net.high):
            h = checkpoint(block, h, use_reentrant=False)
        return net.leave(net.low(h))


@case
def activation_checkpoints_inside():
    plain = Checkpointed(network())
    net = copy.deepcopy(plain)
    for block in (net.net.first, net.net.second, net.net.high, net.net.low):
        fully_shard(block)
    fully_shard(net)
    for memory in ("store", "checkpoint", "auto"):
        net.zero_grad(), plain.zero_grad()
        gs.sample(net, z0(), SIGMAS, memory=memory).square().sum().backward()
        total = 0
        for rank in range(2):
            y = euler(plain, normal(2, SIZE, seed=rank), SIGMAS, None, {})
            total = total + y.square().sum() / 2
        total.backward()
        for (name, p), q in zip(net.named_parameters(), plain.parameters(), strict=True):
            assert torch.allclose(full(p.grad), q.grad, rtol=1e-11, atol=1e-13), (memory, name)


@case
def batch_normalisation_under_ddp():
    """Running statistics change in each call, and are those of rank 0 for all."""
    inner = nn.Sequential(nn.Linear(SIZE, SIZE), nn.BatchNorm1d(SIZE), nn.Tanh()).to(F64)
    for p in inner.parameters():
        nn.init.normal_(p, generator=torch.Generator().manual_seed(p.numel()))
    found = []
    for memory in ("store", "checkpoint", "auto", "revolve:2"):
        net = ddp(copy.deepcopy(inner))
        for iteration in range(2):
            x = gs.sample(lambda x, s, net=net: net(x), z0(iteration), SIGMAS, memory=memory)
            x.square().sum().backward()
        found.append([*(p.grad for p in net.parameters()), *net.module[1].buffers()])
    for other in found[1:]:
        for x, y in zip(other, found[0], strict=True):
            assert torch.allclose(x, y, rtol=1e-11, atol=1e-13)
    # In eval mode autograd saves the statistics, which must not be broadcast in between.
    net = ddp(copy.deepcopy(inner)).eval()
    for memory in ("store", "checkpoint", "auto"):
        gs.sample(lambda x, s: net(x), z0(), SIGMAS, memory=memory).sum().backward()


@case
def mixed_precision_reduces_in_its_own_dtype():
    """As far from float32 as plain autograd through all calls is."""
    from support.sharing import Net

    torch.manual_seed(0)
    exact = Net()
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=True)
    start = normal(2, SIZE, seed=dist.get_rank(), dtype=torch.float32)
    total = 0
    for rank in range(2):
        y = euler(exact, normal(2, SIZE, seed=rank, dtype=torch.float32), SIGMAS.float(), None, {})
        total = total + y.square().sum() / 2
    total.backward()
    reference = {name: p.grad for name, p in exact.named_parameters()}
    errors = {}
    for memory in ("store", "checkpoint", "auto"):
        net = fsdp(copy.deepcopy(exact), mp_policy=policy)
        net.zero_grad()
        for _ in range(2):  # the second iteration finds what the first one left
            net.zero_grad()
            with torch.no_grad():
                gs.sample(net, start, SIGMAS)
            gs.sample(net, start, SIGMAS, memory=memory).square().sum().backward()
        error = norm = 0
        for name, p in net.named_parameters():
            assert p.grad.dtype == torch.float32
            error += (full(p.grad) - reference[name]).square().sum()
            norm += reference[name].square().sum()
        errors[memory] = (error / norm).sqrt().item()
    assert errors["store"] < 0.05
    assert max(errors.values()) < 1.5 * errors["store"], errors


@case
def shards_on_the_host():
    from torch.distributed.fsdp import CPUOffloadPolicy

    net = fsdp(network(), offload_policy=CPUOffloadPolicy(pin_memory=False))
    gs.sample(net, z0(), SIGMAS, memory="checkpoint").sum().backward()
    works_again(net)


@case
def one_reduction_a_run_and_one_block_at_once():
    """As the benchmark counts them: of FSDP2 one for each group, of DDP one for its one bucket."""
    sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
    import sharding

    block, root = 4 * (64 * 256 + 256 + 256 * 64 + 64), 4 * (8 * 64 + 64 + 64 * 8 + 8)
    for memory in sharding.MEMORIES[:-1]:
        count = sharding.measure(memory, trained=True)
        assert count["reduce-scatters"] == sharding.BLOCKS + 1
        assert count["most bytes at once"] == block + root
        assert sharding.measure_copies(memory)["all-reduces"] == 1
    assert "reduce-scatters" not in sharding.measure("checkpoint", trained=False)


@case
def autocast_under_ddp():
    """As far from float32 as plain autograd through all calls is."""
    from support.sharing import Net

    torch.manual_seed(0)
    exact, errors = Net(), {}
    starts = [normal(2, SIZE, seed=rank, dtype=torch.float32) for rank in range(2)]
    total = sum(euler(exact, z, SIGMAS.float(), None, {}).square().sum() / 2 for z in starts)
    total.backward()
    reference = {name: p.grad for name, p in exact.named_parameters()}
    for memory in ("store", "checkpoint", "auto"):
        net = ddp(copy.deepcopy(exact))
        net.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            x = gs.sample(net, starts[dist.get_rank()], SIGMAS, memory=memory)
        x.square().sum().backward()
        error = sum(
            (p.grad - reference[n]).square().sum() for n, p in net.module.named_parameters()
        )
        errors[memory] = (error / sum(g.square().sum() for g in reference.values())).sqrt().item()
    assert errors["store"] < 0.05
    assert max(errors.values()) < 1.5 * errors["store"], errors


@case
def frozen_shards_keep_to_themselves():
    """Parameters that are not trained cost no reduction and get no gradient."""
    net = fsdp(network().requires_grad_(False))
    start = z0()
    gs.sample(net, start, SIGMAS, memory="checkpoint").sum().backward()
    assert start.grad.any()
    assert all(p.grad is None for p in net.parameters())
