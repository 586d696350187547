# SPDX-License-Identifier: Apache-2.0
"""Memory and time of a gradient through N steps, by strategy, beside what is used without us.

make bench-memory
"""

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
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
from gradsampler.memory.planning.gauge import Live

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS = (16, 64, 256, 1024)
Gradient = Callable[[nn.Module, Tensor, Tensor], Tensor]
Rows = list[dict[str, str]]


def convolutional(width: int, depth: int = 2) -> nn.Module:
    """A denoiser whose activations outweigh its state, with frozen parameters."""
    torch.manual_seed(0)
    widths = [4, *[width] * (depth - 1), 4]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.SiLU()]
    return nn.Sequential(*layers[:-1]).to(DEVICE).requires_grad_(False)


def ours(memory: Any, solver: str = "euler") -> Gradient:
    """Our run with that strategy."""

    def gradient(network: nn.Module, z0: Tensor, levels: Tensor) -> Tensor:
        denoiser = gs.EDM(lambda x, noise: network(x))
        x = gs.sample(denoiser, z0, levels, solver=solver, memory=memory)
        return gradients(x, network, z0)

    return gradient


def gradients(x: Tensor, network: nn.Module, z0: Tensor) -> Tensor:
    """The gradient of a loss to z0, and to the parameters that ask for it."""
    wanted = [p for p in network.parameters() if p.requires_grad]
    return torch.autograd.grad(x.square().mean(), [z0, *wanted])[0]


def euler(network: nn.Module, x: Tensor, s: float, t: float) -> Tensor:
    """One step as a user writes it, with the preconditioning of `gs.EDM`."""
    root = (s * s + 0.25) ** 0.5
    denoised = 0.25 / root**2 * x + 0.5 * s / root * network(x / root)
    return x + (t - s) * (x - denoised) / s


def loop(network: nn.Module, z0: Tensor, levels: Tensor, step: Callable[..., Tensor]) -> Tensor:
    x = levels[0].item() * z0
    for s, t in pairwise(levels.tolist()):
        x = step(network, x, s, t)
    return gradients(x, network, z0)


def plain(network: nn.Module, z0: Tensor, levels: Tensor) -> Tensor:
    """Autograd through a loop."""
    return loop(network, z0, levels, euler)


def per_step(network: nn.Module, z0: Tensor, levels: Tensor) -> Tensor:
    """`torch.utils.checkpoint` around each step."""
    return loop(network, z0, levels, lambda *a: checkpoint(euler, *a, use_reentrant=False))


def on_cpu(network: nn.Module, z0: Tensor, levels: Tensor) -> Tensor:
    """`torch.autograd.graph.save_on_cpu` around the loop."""
    with torch.autograd.graph.save_on_cpu(pin_memory=DEVICE == "cuda"):
        return plain(network, z0, levels)


def methods(folder: str) -> dict[str, Gradient]:
    """What is compared, by the name in the rows."""
    return {
        "autograd": plain,
        "torch.utils.checkpoint": per_step,
        "save_on_cpu": on_cpu,
        "store": ours("store"),
        "checkpoint": ours("checkpoint"),
        "offload to the host": ours("offload"),
        "offload to a folder": ours(gs.memory.Offload(folder)),
        "revolve:8": ours("revolve:8"),
        "reversible": ours("reversible", "midpoint_reversible"),
    }


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith(field))
    return int(line.split()[1]) * 1024


def peaks(gradient: Gradient, size: int, steps: int) -> dict[str, float]:
    """Peaks of one gradient beyond what was there before, in bytes."""
    network, levels = convolutional(16), gs.schedules.karras(steps)
    z0 = torch.randn(1, 4, size, size, device=DEVICE).requires_grad_()
    with Live():  # a first call loads what stays
        gradient(network, z0, gs.schedules.karras(2))
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        gradient(network, z0, levels)
        return {"allocated": float(torch.cuda.max_memory_allocated() - before)}
    with open("/proc/self/clear_refs", "w") as references:
        references.write("5")  # sets VmHWM to VmRSS
    before = resident("VmRSS")
    with Live() as live:
        gradient(network, z0, levels)
    return {"live tensors": float(live.peak), "resident": float(resident("VmHWM") - before)}


def one(name: str, size: int, steps: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        return peaks(methods(folder)[name], size, steps)


def alone(name: str, size: int, steps: int) -> dict[str, float]:
    """The same in a process of its own, whose allocator returns what is freed."""
    command = [sys.executable, "-P", __file__, "--case", name, str(size), str(steps)]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def memory(
    table: Rows,
    size: int,
    counts: tuple[int, ...],
    measure: Callable[[str, int, int], dict[str, float]] = alone,
) -> None:
    """Peak memory against the number of steps."""
    for steps in counts:
        for name in methods(tempfile.gettempdir()):
            found = measure(name, size, steps)
            for metric, value in found.items():
                shape = f"1x4x{size}x{size} N={steps}"
                table.append(
                    rows.row("memory", name, shape, "float32", f"peak {metric}", "B", (value,) * 3)
                )
            text = "  ".join(f"{value / 2**20:9.1f} MiB {key}" for key, value in found.items())
            print(f"memory N={steps:5} {name:24} {text}", flush=True)


RATIOS = {  # a limit where the time over another's is to stay below it
    ("store", "autograd"): None,
    ("checkpoint", "store"): 1.4,
    ("torch.utils.checkpoint", "autograd"): None,
    ("offload to a folder", "checkpoint"): 1.05,
    ("offload to the host", "checkpoint"): 1.05,
    ("revolve:8", "checkpoint"): None,
    ("reversible", "checkpoint, midpoint_reversible"): 1.1,
}


def times(table: Rows, size: int, steps: int, rounds: int) -> None:
    """Time of a gradient, interleaved; those of one solver are compared first.

    In the last case a call takes some twenty times as long, as that of a real network does.
    """
    cases = {
        "z0": (convolutional(16), steps),
        "z0 and parameters": (convolutional(16).requires_grad_(), steps),
        "z0, deep": (convolutional(64, depth=3), max(3, steps // 4)),
    }
    for case, (network, count) in cases.items():
        levels = gs.schedules.karras(count)
        z0 = torch.randn(1, 4, size, size, device=DEVICE).requires_grad_()
        with tempfile.TemporaryDirectory() as folder:
            every = methods(folder) | {
                "store, midpoint_reversible": ours("store", "midpoint_reversible"),
                "checkpoint, midpoint_reversible": ours("checkpoint", "midpoint_reversible"),
            }
            agree(every, network, z0, levels)
            runs = {name: partial(g, network, z0, levels) for name, g in every.items()}
            found = timing.interleaved(runs, rounds, warmup=0)
        shape = f"1x4x{size}x{size} N={count} {case}"
        for name, spent in found.items():
            table.append(rows.row("gradient", name, shape, "float32", "time", "s", spent))
            print(f"time {shape} {name:32} {spent[0]:8.3f} s", flush=True)
        for (name, over), limit in RATIOS.items():
            ratio = found[name][0] / found[over][0]
            metric = f"time over {over}"
            table.append(rows.row("gradient", name, shape, "float32", metric, "1", (ratio,) * 3))
            end = f" (limit {limit})" if limit else ""
            print(f"{shape} {name}: {metric} {ratio:.3f}{end}", flush=True)


def agree(every: dict[str, Gradient], network: nn.Module, z0: Tensor, levels: Tensor) -> None:
    """Refuses to time what gives another gradient."""
    euler = every["autograd"](network, z0, levels)
    leapfrog = every["store, midpoint_reversible"](network, z0, levels)
    for name, gradient in every.items():
        expected = leapfrog if "reversible" in name else euler
        error = (gradient(network, z0, levels) - expected).norm() / expected.norm()
        if not error < 1e-5:
            raise AssertionError(f"{name}: the gradient is {error:.1e} from the reference")


def long_run(table: Rows, size: int, steps: int) -> None:
    """A gradient that plain autograd cannot hold, checked by a directional finite difference."""
    network, levels = convolutional(4), gs.schedules.karras(steps)
    denoiser = gs.EDM(lambda x, noise: network(x))
    generator = torch.Generator().manual_seed(0)
    z0 = torch.randn(1, 4, size, size, generator=generator).to(DEVICE).requires_grad_()
    direction = torch.randn(z0.shape, generator=generator).to(DEVICE)

    def loss(z: Tensor, **kwargs: Any) -> Tensor:
        x = gs.sample(
            denoiser, z, levels, solver="midpoint_reversible", memory="reversible", **kwargs
        )
        return (x * weights).sum(dtype=torch.float64)

    start = time.perf_counter()
    weights = torch.randn(z0.shape, generator=generator).to(DEVICE)
    gradient = torch.autograd.grad(loss(z0, progress=True), z0)[0]
    spent = time.perf_counter() - start
    # The direction follows the gradient in part, so that the difference is not lost in rounding.
    direction = direction / direction.norm() + gradient / gradient.norm()
    along = (gradient.double() * direction.double()).sum().item()
    step = 1e-2 * size  # in units of one element: |z0| is about 2 * size
    with torch.no_grad():
        ahead, behind = (loss(z0 + sign * step * direction).item() for sign in (1, -1))
    difference = (ahead - behind) / (2 * step)
    error = abs(along - difference) / abs(difference)
    assert bool(gradient.isfinite().all())
    shape = f"1x4x{size}x{size} N={steps}"
    for metric, unit, value in (
        ("time", "s", spent),
        ("peak resident", "B", float(resident("VmHWM")) if DEVICE == "cpu" else 0.0),
        ("directional derivative, relative error", "1", error),
    ):
        table.append(
            rows.row("long run", "reversible", shape, "float32", metric, unit, (value,) * 3)
        )
        print(f"long run {metric:40} {value:.6g} {unit}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="small sizes, writes nothing")
    parser.add_argument("--case", nargs=3, help="one peak, as JSON: name, size, steps")
    parser.add_argument("--only", choices=("memory", "times", "long"), help="one part alone")
    arguments = parser.parse_args()
    if arguments.case:
        name, size, steps = arguments.case
        print(json.dumps(one(name, int(size), int(steps))))
        return
    small, only = arguments.rehearse, arguments.only
    table: Rows = []
    if only in (None, "memory"):
        memory(table, 16 if small else 256, (2,) if small else STEPS, one if small else alone)
    if only in (None, "times"):
        times(table, 16 if small else 256, 3 if small else 64, 1 if small else 9)
    if only in (None, "long"):
        long_run(table, 16 if small else 2048, 4 if small else 1024)
    if not small:
        print(f"{len(table)} rows appended to {rows.append(table)}")


if __name__ == "__main__":
    main()
