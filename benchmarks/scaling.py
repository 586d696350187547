# SPDX-License-Identifier: Apache-2.0
"""How the cost of a gradient grows with the steps, the batch and the state, by memory strategy.

One of the three is varied at a time. The last part counts the weights of a video transformer with
14 billion parameters, and measures on small ones of the same make what a block keeps for backward:
`on_paper.py` calculates from these.

make bench-scaling
"""

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import memory
import rows
import timing
import torch
from torch import nn

import gradsampler as gs
from gradsampler.memory.planning.footprint import Footprint
from gradsampler.memory.planning.gauge import Live

Rows = list[dict[str, str]]
STRATEGIES = ("store", "checkpoint", "revolve:8", "reversible")
Case = tuple[int, int, int]  # batch, side of the state, steps


def cases(middle: Case = (1, 64, 32)) -> Iterator[tuple[str, Case]]:
    """What is varied, and how far."""
    batch, side, steps = middle
    yield from (("steps", (batch, side, n)) for n in (8, 16, 32, 64, 128, 256))
    yield from (("batch", (b, side, steps)) for b in (1, 2, 4, 8, 16))
    yield from (("state", (batch, s, steps)) for s in (16, 32, 64, 128, 256))


def gradient(strategy: str, case: Case) -> Callable[[], object]:
    """A gradient to z0 through a network of two convolutions."""
    batch, side, steps = case
    network, levels = memory.convolutional(16), gs.schedules.karras(steps)
    z0 = torch.randn(batch, 4, side, side, generator=torch.Generator().manual_seed(0))
    way = memory.plain
    if strategy == "reversible":
        way = memory.ours(strategy, "midpoint_reversible")
    elif strategy != "autograd":
        way = memory.ours(strategy)
    return partial(way, network, z0.requires_grad_(), levels)


def growth(table: Rows, wanted: list[tuple[str, Case]], cores: str, rounds: int) -> None:
    """Time and peak memory of every strategy in every case."""
    for axis, case in wanted:
        batch, side, steps = case
        shape = f"{axis} {batch}x4x{side}x{side} N={steps}, {cores}"
        ways = {name: gradient(name, case) for name in ("autograd", *STRATEGIES)}
        spent = timing.interleaved(ways, rounds, warmup=1)
        for name, run in ways.items():
            with Live() as live:
                run()
            peak = (float(live.peak),) * 3
            table.append(rows.row("scaling", name, shape, "float32", "time", "s", spent[name]))
            table.append(
                rows.row("scaling", name, shape, "float32", "peak live tensors", "B", peak)
            )
            print(
                f"scaling {shape:36} {name:12} {spent[name][0]:8.4f} s {live.peak / 2**20:8.2f} MiB"
            )


# A transformer for video latents, that of Wan 2.1: its sizes are the defaults of diffusers' class.


def weights(table: Rows) -> None:
    """Counts parameters; nothing is allocated."""
    from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        network = WanTransformer3DModel()
    counts = {
        "blocks": len(network.blocks),
        "width": network.config.num_attention_heads * network.config.attention_head_dim,
        "parameters of a block": sum(p.numel() for p in network.blocks[0].parameters()),
        "parameters": sum(p.numel() for p in network.parameters()),
    }
    for metric, count in counts.items():
        shape, value = "16x21x90x160", (float(count),) * 3
        table.append(rows.row("video model", "14B", shape, "bfloat16", metric, "1", value))
        print(f"video model {metric:24} {count}")


def small(heads: int, blocks: int) -> nn.Module:
    """The same with few heads and blocks."""
    from diffusers import WanTransformer3DModel
    from diffusers.utils import logging

    logging.set_verbosity_error()  # about norms in bfloat16
    torch.manual_seed(0)
    width = 128 * heads
    ratio = {"num_attention_heads": heads, "ffn_dim": width * 13824 // 5120, "text_dim": 64}
    return WanTransformer3DModel(num_layers=blocks, **ratio).to(torch.bfloat16)


def footprint(network: nn.Module, side: int) -> Footprint:
    """What a call on a latent of 2 frames and that side costs, as `gs.memory.plan` measures it."""
    text = torch.zeros(1, 1, 64, dtype=torch.bfloat16)

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = network(x, 1000 * t, text, return_dict=False)[0]
        return out

    z0, levels = torch.zeros(1, 16, 2, side, side), torch.linspace(1, 0, 3)
    options: dict[str, Any] = {"prediction": "flow", "modules": [network], "budget": "80GB"}
    return gs.memory.plan(velocity, z0, levels, **options).footprint


def activations(table: Rows, sizes: tuple[tuple[int, int], ...]) -> None:
    """Bytes a token and unit of width: what a block keeps, and what its backward needs beside."""
    for heads, side in sizes:
        width, tokens = 128 * heads, 2 * (side // 2) ** 2

        def kept(trained: bool, again: bool, heads: int = heads, side: int = side) -> Any:
            one, two = (small(heads, blocks).requires_grad_(trained) for blocks in (2, 4))
            for network in (one, two) if again else ():
                network.enable_gradient_checkpointing()
            before, after = footprint(one, side), footprint(two, side)
            return (after.activations - before.activations) / 2, after

        checkpointed, call = kept(False, True)
        found = {
            "kept by a block, trained": kept(True, False)[0],
            "kept by a block, frozen": kept(False, False)[0],
            "kept by a block with an activation checkpoint": checkpointed,
            "beside it in a block's backward, frozen": call.backward_peak - call.held,
        }
        for name, count in found.items():
            shape, value = f"{tokens} tokens of width {width}", (count / tokens / width,) * 3
            table.append(rows.row("video model", "blocks", shape, "bfloat16", name, "B", value))
            print(f"video model {shape:32} {name:48} {value[0]:.2f} bytes", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="small sizes, writes nothing")
    parser.add_argument("--cores", default="quiet cores", help="what the rows say of them")
    parser.add_argument("--only", choices=("growth", "model"), help="one part alone")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table: Rows = []
    wanted = [("steps", (1, 8, 4))] if arguments.rehearse else list(cases())
    if arguments.only in (None, "growth"):
        growth(table, wanted, arguments.cores, 1 if arguments.rehearse else 5)
    if arguments.only in (None, "model"):
        weights(table)
        activations(table, ((1, 8),) if arguments.rehearse else ((1, 32), (2, 32), (2, 48)))
    if arguments.rehearse:
        print(f"rehearsed {len(table)} rows")
    else:
        print(f"{len(table)} rows appended to {rows.append(table)}")


if __name__ == "__main__":
    main()
