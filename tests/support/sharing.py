# SPDX-License-Identifier: Apache-2.0
"""Training through a run on two ranks or more, against a loop by hand in one process.

A case is "wrapper/memory/target/way". The oracle calls the network plainly, knows the data of all
ranks and averages over them, as both DDP and FSDP do.
"""

import copy
import tempfile
import warnings
from contextlib import ExitStack, nullcontext
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

import gradsampler as gs
from support.problems import normal

F64 = torch.float64
LEVELS = [4.0, 2.5, 1.5, 0.8, 0.3, 0.1]
ITERATIONS, BATCH, SIZE, WIDTH = 3, 2, 5, 7  # sizes that two ranks cannot share evenly


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, h):
        return h + self.down(torch.tanh(self.up(h)))


class Net(nn.Module):
    """Two blocks for all levels, and one of two experts by level; a third is never called."""

    def __init__(self, spare=False, split=True):
        super().__init__()
        self.split = split
        self.enter, self.leave = nn.Linear(SIZE, WIDTH), nn.Linear(WIDTH, SIZE)
        self.first, self.second = Block(), Block()
        self.high, self.low = Block(), Block()
        self.spare = Block() if spare else None

    def forward(self, x, sigma, shift=None):
        h = torch.tanh(self.enter(x) + sigma[:, None] * 0.3)
        h = self.second(self.first(h))
        if self.split:
            h = self.high(h) if sigma[0] > 1 else self.low(h)
        else:
            h = self.low(self.high(h))
        out = self.leave(h)
        return out if shift is None else out + shift * out.cos()


def network(**options):
    torch.manual_seed(0)
    return Net(**options).to(F64)


class Run(nn.Module):
    """A module whose forward is the run."""

    def __init__(self, net, options):
        super().__init__()
        self.net, self.options = net, options

    def forward(self, z0, sigmas, **given):
        return gs.sample(self.net, z0, sigmas, **self.options, **given)


# ------------------------------------------------------------------ the wrappers


def ddp(net, **options):
    return DistributedDataParallel(net, **options)


def fsdp(net, mesh=None, nested=True, **options):
    mesh = mesh or init_device_mesh("cpu", (dist.get_world_size(),))
    for block in (net.first, net.second, net.high, net.low) if nested else ():
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(net, mesh=mesh, **options)


def hsdp(net, shape):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    return fsdp(net, mesh)


class Experts(nn.Module):
    """Two networks, each shared on its own, of which the level chooses one."""

    def __init__(self, wrap):
        super().__init__()
        self.high, self.low = network(split=False), network(split=False)
        with torch.no_grad():
            for p in self.low.parameters():
                p.mul_(0.9)
        self.wrap = wrap

    def wrapped(self):
        shared = copy.deepcopy(self)
        shared.high, shared.low = self.wrap(shared.high), self.wrap(shared.low)
        return shared

    def forward(self, x, sigma, shift=None):
        return (self.high if sigma[0] > 1 else self.low)(x, sigma, shift)


WRAPPERS = {
    "ddp": ddp,
    "ddp-view": lambda net: ddp(net, gradient_as_bucket_view=True),
    "ddp-static": lambda net: ddp(net, static_graph=True),
    "ddp-static-view": lambda net: ddp(net, static_graph=True, gradient_as_bucket_view=True),
    "ddp-unused": lambda net: ddp(net, find_unused_parameters=True),
    "ddp-buckets": lambda net: ddp(net, bucket_cap_mb=1e-4),
    "ddp-run": None,
    "ddp-experts": None,
    "fsdp-root": lambda net: fsdp(net, nested=False),
    "fsdp": fsdp,
    "fsdp-reshard": lambda net: fsdp(net, reshard_after_forward=True),
    "fsdp-gathered": lambda net: fsdp(net, reshard_after_forward=False),
    "fsdp-experts": None,
    "hsdp-1x2": lambda net: hsdp(net, (1, 2)),
    "hsdp-2x1": lambda net: hsdp(net, (2, 1)),
}
ON_FOUR = {"hsdp-2x2": lambda net: hsdp(net, (2, 2))}
MEMORIES = [
    "store",
    "checkpoint",
    "offload",
    "offload-folder",
    "revolve",
    "revolve-folder",
    "reversible",
    "auto",
    "truncated",
]
# From z0 or from a start; but for "parameters" all is differentiated by that there is, levels and
# conditioning included, and but for "frozen" the network too.
TARGETS = ["all", "frozen", "start", "parameters"]
# How the gradients are asked for: by one backward a step, by two whose sum counts (with the first
# not reduced), by one through two runs, by autograd.grad, or for z0 alone.
WAYS = ["once", "twice", "no_sync", "joint", "grad", "inputs", "after_no_grad"]


def memory(name, folder):
    return {
        "offload-folder": gs.memory.Offload(folder),
        "revolve": gs.memory.Revolve(2),
        "revolve-folder": gs.memory.Revolve(1, further=2, to=folder),
        "truncated": gs.memory.Truncated(2),
    }.get(name, name)


# ------------------------------------------------------------------ the loops by hand


def euler(net, z0, sigmas, start, cond):
    x = sigmas[0] * z0 if start is None else start
    for s, t in pairwise(sigmas):
        denoised = net(x, s.expand(len(x)), **cond)
        x = x + (x - denoised) / s * (t - s)
    return x


def leapfrog(net, z0, sigmas, start, cond):
    """The midpoint rule over two intervals in w = x/s, tau = 1/s; the first step is Euler's."""
    x = sigmas[0] * z0 if start is None else start
    before = None
    for s, t in pairwise(sigmas):
        denoised = net(x, s.expand(len(x)), **cond)
        if before is None:
            following = t * (x / s + (1 / t - 1 / s) * denoised)
        else:
            older, r = before
            following = t * (older / r + (1 / t - 1 / r) * denoised)
        before, x = (x, s), following
    return x


def truncated(net, z0, sigmas, start, cond):
    x = sigmas[0] * z0 if start is None else start
    for k, (s, t) in enumerate(pairwise(sigmas)):
        if k == len(sigmas) - 3:
            x = x.detach()
        denoised = net(x, s.expand(len(x)), **cond)
        x = x + (x - denoised) / s * (t - s)
    return x


LOOPS = {"reversible": leapfrog, "truncated": truncated}


class Data:
    """What one rank has in one of the runs of an iteration."""

    def __init__(self, target, rank, iteration, turn):
        seed = 100 * rank + 10 * iteration + turn
        wants = target != "parameters"
        self.z0 = normal(BATCH, SIZE, seed=seed).requires_grad_(wants)
        self.sigmas = torch.tensor(LEVELS, dtype=F64, requires_grad=wants)
        self.start = None
        if target in ("start", "frozen"):
            self.start = (4 * normal(BATCH, SIZE, seed=seed + 1000)).requires_grad_()
        self.cond = {}
        if wants:
            self.cond = {"shift": normal(BATCH, SIZE, seed=seed + 2000).requires_grad_()}
        self.goal = normal(BATCH, SIZE, seed=seed + 3000)

    def leaves(self):
        found = {"z0": self.z0, "sigmas": self.sigmas, "start": self.start, **self.cond}
        return {name: x for name, x in found.items() if x is not None and x.requires_grad}

    def loss(self, x):
        return ((x - self.goal) ** 2).mean()


def oracle_step(net, loop, datas):
    """Gradients of the parameters, the mean over ranks; those of the data of each rank."""
    net.zero_grad()
    total = 0.0
    for data in datas:
        total = total + data.loss(loop(net, data.z0, data.sigmas, data.start, data.cond))
    total.backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def full(x):
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def close(name, got, expected, tolerance=1e-12):
    if expected is None:
        assert got is None or not full(got).any(), f"{name}: a gradient where there is none"
        return
    assert got is not None, f"{name}: no gradient"
    error = (full(got) - expected).norm() / expected.norm().clamp(min=1e-3)
    assert error < tolerance, f"{name}: {error:.2e}"


# ------------------------------------------------------------------ a case


def run(case):
    wrapper, strategy, target, way = case.split("/")
    rank, ranks = dist.get_rank(), range(dist.get_world_size())
    spare = wrapper == "ddp-unused"
    plain = Experts(lambda net: net) if wrapper.endswith("-experts") else network(spare=spare)
    plain.requires_grad_(target != "frozen")
    loop = LOOPS.get(strategy, euler)
    with tempfile.TemporaryDirectory() as folder:
        options = {"memory": memory(strategy, folder)}
        if strategy == "reversible":
            options["solver"] = "midpoint_reversible"
        shared = copy.deepcopy(plain)
        if wrapper == "ddp-run":
            shared = ddp(Run(shared, options))
            sample, parameters = shared, shared.module.net.named_parameters()
        else:
            if wrapper.endswith("-experts"):
                shared.wrap = ddp if wrapper == "ddp-experts" else fsdp
                shared = shared.wrapped()
            else:
                shared = (WRAPPERS | ON_FOUR)[wrapper](shared)

            def sample(z0, sigmas, **given):
                return gs.sample(shared, z0, sigmas, **options, **given)

            parameters = shared.named_parameters()
        parameters = {name.replace("module.", ""): p for name, p in parameters}
        hooked = watch(parameters)
        ours = torch.optim.SGD(parameters.values(), lr=0.1)
        theirs = torch.optim.SGD(plain.parameters(), lr=0.1)
        warnings.filterwarnings("ignore", "memory=Truncated")  # it says what is tested here
        for iteration in range(ITERATIONS):
            turns = 2 if way in ("twice", "no_sync", "joint") else 1
            datas = [[Data(target, r, iteration, k) for k in range(turns)] for r in ranks]
            expected = mean([oracle_step(plain, loop, datas[r]) for r in ranks])
            mine = [Data(target, rank, iteration, k) for k in range(turns)]
            ours.zero_grad()
            got = differentiated(sample, shared, parameters, mine, way)
            # In one order on all ranks, which gather the shards.
            names = [name for name, p in plain.named_parameters() if p.requires_grad]
            for name in names if way != "inputs" else ():
                close(f"{name}, iteration {iteration}", got.get(name), expected.get(name))
            if way == "inputs":
                assert not got
            for data, reference in zip(mine, datas[rank], strict=True):
                for name, x in data.leaves().items():
                    close(f"{name}, iteration {iteration}", x.grad, reference.leaves()[name].grad)
            for name, p in plain.named_parameters():
                p.grad = expected.get(name)
                if name in parameters and way in ("grad", "inputs"):
                    parameters[name].grad = got.get(name)
            if way != "inputs":
                ours.step()
                theirs.step()
        if way == "once":
            calls = {hooked[name] for name in hooked if expected.get(name) is not None}
            assert calls <= {ITERATIONS}, f"hooks ran {calls} times in {ITERATIONS} backwards"


def watch(parameters):
    """How often a gradient arrived at each parameter."""
    count = dict.fromkeys(parameters, 0)

    def arrived(name):
        def hook(p):
            count[name] += 1

        return hook

    for name, p in parameters.items():
        if p.requires_grad and "spare" not in name:
            p.register_post_accumulate_grad_hook(arrived(name))
        else:
            del count[name]
    return count


def mean(by_rank):
    return {name: sum(gs[name] for gs in by_rank) / len(by_rank) for name in by_rank[0]}


def unsynced(shared):
    """Has the wrapper keep gradients to itself."""
    wrapped = [m for m in shared.modules() if isinstance(m, DistributedDataParallel)]
    with ExitStack() as stack:
        for module in wrapped:
            stack.enter_context(module.no_sync())
        return stack.pop_all() if wrapped else _Unsynced(shared)


class _Unsynced:
    def __init__(self, shared):
        self.shared = shared

    def _set(self, synced):
        for module in self.shared.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(synced)

    def __enter__(self):
        self._set(False)

    def __exit__(self, *_):
        self._set(True)


def differentiated(sample, shared, parameters, datas, way):
    """The gradients of the parameters; those of the data are left in their ``.grad``."""

    def loss(data):
        given = {} if data.start is None else {"start": data.start}
        if data.cond:
            given["cond"] = data.cond
        return data.loss(sample(data.z0, data.sigmas, **given))

    if way == "after_no_grad":
        with torch.no_grad():
            loss(datas[0])
    if way == "joint":
        (loss(datas[0]) + loss(datas[1])).backward()
    elif way == "grad":
        wanted = {name: p for name, p in parameters.items() if p.requires_grad}
        leaves = datas[0].leaves()
        inputs = [*wanted.values(), *leaves.values()]
        found = torch.autograd.grad(loss(datas[0]), inputs, allow_unused=True)
        for x, g in zip(leaves.values(), found[len(wanted) :], strict=True):
            x.grad = g
        return dict(zip(wanted, found[: len(wanted)], strict=True))
    elif way == "inputs":
        loss(datas[0]).backward(inputs=list(datas[0].leaves().values()))
    else:
        for k, data in enumerate(datas):
            with unsynced(shared) if way == "no_sync" and k == 0 else nullcontext():
                loss(data).backward()
    return {name: p.grad for name, p in parameters.items() if p.grad is not None}
