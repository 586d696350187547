# SPDX-License-Identifier: Apache-2.0
"""What a run costs under FSDP2: collectives, bytes gathered, and parameters gathered at once.

And under DistributedDataParallel: reductions of its buckets, of which this network fills one.

    torchrun --standalone --nproc-per-node 2 benchmarks/sharding.py

These are counts, the same on every machine; rows are appended to results/. With ``--rehearse``
nothing is written.
"""

import argparse
from collections import Counter
from contextlib import contextmanager

import rows
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.nn.parallel import DistributedDataParallel

import gradsampler as gs

CALLS, BLOCKS, WIDTH = 8, 3, 64
# The names of torch 2.13, and those before it.
NEW = hasattr(dist, "all_gather_single")
GATHER = "all_gather_single" if NEW else "all_gather_into_tensor"
REDUCE = "reduce_scatter_single" if NEW else "reduce_scatter_tensor"
MEMORIES = ["store", "checkpoint", "auto", "revolve:3", "reversible", "truncated:4"]


class Network(nn.Module):
    """Residual blocks of equal size, each a group of its own, between two small layers."""

    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(8, WIDTH), nn.Linear(WIDTH, 8)
        layers = (nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.blocks = nn.ModuleList(
            nn.Sequential(*(type(x)(*_sizes(x)) for x in layers)) for _ in range(BLOCKS)
        )

    def forward(self, x, sigma):
        h = self.enter(x) + sigma[:, None].log()
        for block in self.blocks:
            h = h + block(h)
        return self.leave(h)


def _sizes(layer):
    return (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else ()


def bytes_of(group):
    """Of a group's parameters, gathered."""
    return sum(p._orig_size.numel() * p.orig_dtype.itemsize for p in group.fsdp_params)


@contextmanager
def counted():
    """Counts collectives and the bytes of gathered parameters, until the end of the statement."""
    count, together = Counter(), set()
    gather, reduce = getattr(dist, GATHER), getattr(dist, REDUCE)
    there, away = FSDPParamGroup._to_unsharded, FSDPParamGroup._to_sharded

    def gathers(*args, **kwargs):
        output = kwargs.get("output", args[0] if args else None)
        count["all-gathers"] += 1
        count["bytes gathered"] += output.numel() * output.element_size()
        return gather(*args, **kwargs)

    def reduces(*args, **kwargs):
        count["reduce-scatters"] += 1
        return reduce(*args, **kwargs)

    def comes(group):
        there(group)
        together.add(group)
        now = sum(map(bytes_of, together))
        count["most bytes at once"] = max(count["most bytes at once"], now)

    def goes(group):
        away(group)
        together.discard(group)

    setattr(dist, GATHER, gathers)
    setattr(dist, REDUCE, reduces)
    FSDPParamGroup._to_unsharded, FSDPParamGroup._to_sharded = comes, goes
    try:
        yield count
    finally:
        setattr(dist, GATHER, gather)
        setattr(dist, REDUCE, reduce)
        FSDPParamGroup._to_unsharded, FSDPParamGroup._to_sharded = there, away


def solver(memory):
    """One that a strategy can run."""
    if memory.startswith("truncated"):  # its last steps inject what carries a gradient to z0
        return "euler_ancestral"
    return "midpoint_reversible" if memory == "reversible" else "euler"


def measure(memory, trained, reshard=None):
    """One run and its backward, counted."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    network = Network().requires_grad_(trained)
    for block in network.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh, reshard_after_forward=reshard)
    levels = gs.schedules.karras(CALLS, final="zero")
    z0 = torch.randn(2, 8).requires_grad_()
    with counted() as count:
        x = gs.sample(network, z0, levels, memory=memory, solver=solver(memory))
        forward = dict(count)
        x.square().sum().backward()
    count["all-gathers forward"] = forward["all-gathers"]
    return count


def measure_copies(memory):
    """One run under DistributedDataParallel and its backward."""
    torch.manual_seed(0)
    network, count = DistributedDataParallel(Network()), Counter()

    def reduces(state, bucket):
        count["all-reduces"] += 1
        return allreduce_hook(None, bucket)

    network.register_comm_hook(None, reduces)
    levels = gs.schedules.karras(CALLS, final="zero")
    z0 = torch.randn(2, 8).requires_grad_()
    gs.sample(network, z0, levels, memory=memory, solver=solver(memory)).square().sum().backward()
    return count


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rehearse", action="store_true")
    options = parser.parse_args()
    dist.init_process_group("gloo")
    shape = f"{CALLS} calls, {BLOCKS} blocks and a root, {dist.get_world_size()} ranks"
    results = []
    for trained in (True, False):
        for memory in MEMORIES:
            count = measure(memory, trained)
            variant = f"{memory}, {'trained' if trained else 'frozen'}"
            for metric, number in sorted(count.items()):
                unit = "bytes" if "bytes" in metric else "calls"
                value = (float(number),) * 3
                results.append(rows.row("fsdp2", variant, shape, "float32", metric, unit, value))
                if dist.get_rank() == 0:
                    print(f"{variant:24} {metric:20} {number}")
    for memory in MEMORIES[:-1]:  # truncated, it waits for the calls that have no gradient
        for metric, number in measure_copies(memory).items():
            value, variant = (float(number),) * 3, f"{memory}, trained"
            results.append(rows.row("ddp", variant, shape, "float32", metric, "calls", value))
            if dist.get_rank() == 0:
                print(f"{variant:24} {metric:20} {number}")
    if dist.get_rank() == 0 and not options.rehearse:
        rows.append(results)
    dist.barrier()  # nobody leaves while another still waits for it
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
