# SPDX-License-Identifier: Apache-2.0
"""What users call, beside what they would write themselves: the host's time.

`gs.ops.step` on four elements and, with its output given, on 16 Mi; `gs.sample` on a state of four
elements, by step; and a gradient through 200 steps of a tiny network, by memory strategy. Each way
is compared with its rival before it is timed. One thread but for the 16 Mi; other times are those
that the thread had a core, without what others took of it.

make bench
"""

import argparse
import math
import resource
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import rows
import timing
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradsampler as gs
from gradsampler.ops import native

Rows = list[dict[str, str]]
Run = Callable[[], Tensor]
Step = Callable[..., Tensor]
CHURN = 10.0


class Tiny(nn.Module):
    """A network whose call takes about as long as the bookkeeping around it."""

    def __init__(self, size: int = 16, width: int = 64) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = (nn.Linear(size + 1, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.layers = nn.Sequential(*layers, nn.Linear(width, size))

    def forward(self, x: Tensor, sigma: Tensor) -> Tensor:
        return self.layers(torch.cat((x, sigma[:, None]), 1))


def half(x: Tensor, sigma: Tensor) -> Tensor:
    """The denoiser that costs least, so that what is timed is what is around it."""
    return 0.5 * x


def sine(x: Tensor, sigma: Tensor) -> Tensor:
    """One that autograd saves its input for. For `half` it saves nothing, and so
    torch.utils.checkpoint never makes its call again.
    """
    return x.sin()


def euler(denoiser: Step, x: Tensor, s: float, t: float) -> Tensor:
    """One step as a user writes it."""
    denoised = denoiser(x, x.new_full((len(x),), s))
    return x + (t - s) * (x - denoised) / s


def churned(denoiser: Step, z0: Tensor, x: Tensor, s: float, t: float, i: int, n: int) -> Tensor:
    """The same after the level was raised, with the noise of `gs.noise.SinCos`."""
    raised = s * (1 + min(CHURN / n, 2**0.5 - 1))
    wave = 0.1 * torch.sin(0.1 * i * z0 + i) + 0.05 * torch.cos(0.1 * i * z0)
    noise = (1 + 0.1 * i / n) * z0 + wave
    return euler(denoiser, x + math.sqrt(raised**2 - s**2) * noise, raised, t)


def recomputed(step: Step) -> Step:
    """The step as an activation checkpoint of torch's."""
    return partial(checkpoint, step, use_reentrant=False)


def loop(denoiser: Step, z0: Tensor, levels: Tensor, *, noisy: bool, again: bool) -> Tensor:
    """The whole run by hand."""
    values, x = levels.tolist(), levels[0].item() * z0
    for i, (s, t) in enumerate(pairwise(values)):
        if noisy:
            step = recomputed(churned) if again else churned
            x = step(denoiser, z0, x, s, t, i, len(values) - 1)
        else:
            x = (recomputed(euler) if again else euler)(denoiser, x, s, t)
    return x


def ours(denoiser: Step, z0: Tensor, levels: Tensor, *, noisy: bool, **options: Any) -> Tensor:
    """The same by `gs.sample`."""
    if noisy:
        options |= {"churn": gs.Churn(CHURN), "noise": gs.noise.SinCos()}
    return gs.sample(denoiser, z0, levels, **options)


def silent(run: Run) -> Run:
    return torch.no_grad()(run)


def gradient(run: Run, wanted: list[Tensor]) -> Run:
    def differentiated() -> Tensor:
        return torch.autograd.grad(run().square().mean(), wanted)[0]

    return differentiated


def agree(ways: dict[str, Run], tolerance: float = 1e-4) -> None:
    """Refuses to time what computes something else than the first way."""
    expected, *rest = (run() for run in ways.values())
    for name, found in zip(list(ways)[1:], rest, strict=True):
        error = ((found - expected).norm() / expected.norm()).item()
        if not error < tolerance:
            raise AssertionError(f"{name} is {error:.1e} from the first")


def measured(
    table: Rows, op: str, ways: dict[str, Run], shape: str, rounds: int, per: int, clock: Any
) -> None:
    """A row of each way's time, by step, and one of its ratio to that of the first way."""
    found = timing.interleaved(ways, rounds, warmup=1, clock=clock)
    first = next(iter(ways))
    for name, spent in found.items():
        each = tuple(value / per for value in spent)
        ratio = spent[0] / found[first][0]
        metric = "time" if clock is timing.wall else "time of the thread"
        table.append(rows.row(op, name, shape, "float32", metric, "s", each))
        table.append(rows.row(op, name, shape, "float32", f"time over {first}", "1", (ratio,) * 3))
        print(f"{op:34} {name:28} {1e6 * each[0]:12.2f} us  {ratio:.3f} of {first}", flush=True)


def thread(run: Run, calls: int = 1) -> float:
    """Seconds of this thread on a core."""
    start = time.thread_time()
    for _ in range(calls):
        run()
    return time.thread_time() - start


def public_op(table: Rows, cores: str, large: int, rounds: int) -> None:
    """`gs.ops.step`, of few elements and into a large output."""
    source = gs.noise.SinCos()

    def eager(x: Tensor, d: Tensor, z0: Tensor) -> Tensor:
        i, n = 17, 50
        wave = 0.1 * torch.sin(0.1 * i * z0 + i) + 0.05 * torch.cos(0.1 * i * z0)
        return 0.3 * x - 1.2 * d + 0.7 * ((1 + 0.1 * i / n) * z0 + wave)

    x, d, z0 = (torch.randn(1, 4) for _ in range(3))
    options = (z0, source, 17, 50, 0.7)
    ways = {
        "eager": silent(lambda: eager(x, d, z0)),
        "gs.ops.step": silent(lambda: gs.ops.step([x, d], [0.3, -1.2], *options)),
    }
    agree(ways)
    calls = 200
    clock = partial(thread, calls=calls)
    measured(table, "public step, sincos", ways, f"1x4, 1 thread, {cores}", rounds, calls, clock)
    if native.available() is not None:
        return
    torch.set_num_threads(2)
    x, d, z0, out = (torch.randn(1, large) for _ in range(4))
    options, draw = (z0, source, 17, 50, 0.7), source.draw(z0, 17, 50)
    ways = {
        "raw step_fwd, out": silent(
            lambda: native.step_fwd([x, d], [0.3, -1.2], z0, draw, 0.7, out=out)
        ),
        "gs.ops.step, out": silent(lambda: gs.ops.step([x, d], [0.3, -1.2], *options, out=out)),
        "gs.ops.step": silent(lambda: gs.ops.step([x, d], [0.3, -1.2], *options)),
        "eager": silent(lambda: eager(x, d, z0)),
    }
    agree(ways)
    shape = f"1x{large}, 2 threads, {cores}"
    measured(table, "public step, sincos", ways, shape, rounds, 1, timing.wall)
    torch.set_num_threads(1)


def sampling(table: Rows, cores: str, steps: int, rounds: int) -> None:
    """`gs.sample` around a denoiser that costs nothing."""
    levels, z0 = gs.schedules.karras(steps), torch.randn(1, 4)
    asking = z0.clone().requires_grad_()
    kinds = (("ODE", half, False), ("ODE of a sine", sine, False), ("sincos and churn", half, True))
    for title, denoiser, noisy in kinds:
        run = partial(ours, denoiser, levels=levels, noisy=noisy)
        hand = partial(loop, denoiser, levels=levels, noisy=noisy)
        groups: dict[str, dict[str, Run]] = {
            "no grad": {
                "by hand": silent(lambda hand=hand: hand(z0, again=False)),
                "gs.sample": silent(lambda run=run: run(z0)),
            },
            "store, with backward": {
                "by hand": gradient(lambda hand=hand: hand(asking, again=False), [asking]),
                "gs.sample": gradient(lambda run=run: run(asking, memory="store"), [asking]),
            },
            "checkpoint, with backward": {
                "torch.utils.checkpoint": gradient(
                    lambda hand=hand: hand(asking, again=True), [asking]
                ),
                "gs.sample": gradient(lambda run=run: run(asking, memory="checkpoint"), [asking]),
            },
        }
        for name, ways in groups.items():
            agree(ways)
            shape = f"1x4 N={steps}, 1 thread, {cores}"
            measured(table, f"sample, {title}, {name}", ways, shape, rounds, steps, thread)


def large_state(table: Rows, cores: str, size: int, steps: int, rounds: int) -> None:
    """A step on a state of many elements without gradient: its time, and its page faults."""
    torch.set_num_threads(2)
    levels, z0 = gs.schedules.karras(steps), torch.randn(1, size)
    ways = {
        "by hand": silent(lambda: loop(half, z0, levels, noisy=False, again=False)),
        "gs.sample": silent(lambda: ours(half, z0, levels, noisy=False)),
    }
    agree(ways)
    shape = f"1x{size} N={steps}, 2 threads, {cores}"
    for name, run in ways.items():
        count = faults(run) / steps * resource.getpagesize() / (4 * size)
        metric = "memory faulted in, in states"
        table.append(
            rows.row("sample, ODE, no grad", name, shape, "float32", metric, "1", (count,) * 3)
        )
        print(f"{name}: {count:.2f} states faulted in by step", flush=True)
    measured(table, "sample, ODE, no grad", ways, shape, rounds, steps, timing.wall)
    torch.set_num_threads(1)


def faults(run: Run) -> int:
    """Page faults of a run, after one that does not count."""
    run()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def compiled(table: Rows, cores: str, steps: int, stretch: int, rounds: int) -> None:
    """The same gradient with several steps a graph, and the first call's time, which compiles."""
    network, levels = Tiny(), gs.schedules.karras(steps)
    z0 = torch.randn(64, 16).requires_grad_()
    wanted = [z0, *network.parameters()]
    ways = {
        "plain autograd": gradient(
            partial(loop, network, z0, levels, noisy=False, again=False), wanted
        )
    }
    shape = f"64x16 N={steps}, 1 thread, {cores}"
    for memory in ("store", "checkpoint"):
        run = partial(gs.sample, network, z0, levels, memory=memory, compile=stretch)
        name = f"{memory}, compile={stretch}"
        ways[name] = gradient(run, wanted)
        spent = (timing.wall(ways[name]),) * 3
        table.append(rows.row("first gradient", name, shape, "float32", "time", "s", spent))
        print(f"first gradient, {name}: {spent[0]:.1f} s", flush=True)
    agree(ways)
    measured(table, "gradient, tiny network", ways, shape, rounds, steps, thread)


STRATEGIES = ("store", "auto", "checkpoint", "revolve:8")


def tiny_network(table: Rows, cores: str, steps: int, rounds: int) -> None:
    """A gradient to z0 and to the parameters, over that of plain autograd."""
    network, levels = Tiny(), gs.schedules.karras(steps)
    z0 = torch.randn(64, 16).requires_grad_()
    wanted = [z0, *network.parameters()]
    hand = partial(loop, network, z0, levels, noisy=False)
    ways = {
        "plain autograd": gradient(lambda: hand(again=False), wanted),
        "torch.utils.checkpoint": gradient(lambda: hand(again=True), wanted),
    }
    for memory in STRATEGIES:
        ways[memory] = gradient(partial(gs.sample, network, z0, levels, memory=memory), wanted)
    agree(ways)
    options = {"solver": "midpoint_reversible"}
    reversible = {
        memory: gradient(partial(gs.sample, network, z0, levels, memory=memory, **options), wanted)
        for memory in ("store", "reversible")
    }
    agree(reversible, 1e-3)  # states in integers
    ways["reversible"] = reversible["reversible"]
    shape = f"64x16 N={steps}, 1 thread, {cores}"
    measured(table, "gradient, tiny network", ways, shape, rounds, steps, thread)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="small sizes, writes nothing")
    parser.add_argument("--cores", default="quiet cores", help="what the rows say of them")
    parser.add_argument(
        "--only", choices=("op", "sample", "large", "network", "compiled"), help="one part alone"
    )
    arguments = parser.parse_args()
    small, only, cores = arguments.rehearse, arguments.only, arguments.cores
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    table: Rows = []
    if only in (None, "op"):
        public_op(table, cores, 2**12 if small else 2**24, 2 if small else 15)
    if only in (None, "sample"):
        sampling(table, cores, 3 if small else 200, 1 if small else 15)
    if only in (None, "large"):
        large_state(table, cores, 2**12 if small else 2**24, 8, 1 if small else 7)
    if only in (None, "network"):
        tiny_network(table, cores, 3 if small else 200, 1 if small else 9)
    if only in (None, "compiled"):
        compiled(table, cores, 4 if small else 200, 2 if small else 20, 1 if small else 9)
    torch.set_num_threads(threads)
    if small:
        print(f"rehearsed {len(table)} rows")
    else:
        print(f"{len(table)} rows appended to {rows.append(table)}")


if __name__ == "__main__":
    main()
