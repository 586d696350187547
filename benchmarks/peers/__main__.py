# SPDX-License-Identifier: Apache-2.0
"""Time, peak memory and error of each peer's gradient, measured in one process.

On one thread: what a small network waits for its threads would hide what is compared.

make bench-peers
"""

import argparse
import gc
from importlib.metadata import PackageNotFoundError, version

import rows
import timing
import torch

from gradsampler.memory.planning.gauge import Live
from peers.ways import WAYS, Way
from peers.workloads import SMALL, WORKLOADS, Workload

Rows = list[dict[str, str]]


def error(way: Way, work: Workload) -> float:
    """Of the gradient, relative, against the loop in float64 with the noises of this way."""
    found, noises = way(work)
    exact = work.exact(noises)
    return ((found.double() - exact).norm() / exact.norm()).item()


def peak(way: Way, work: Workload) -> float:
    """Bytes of tensors that are alive at most, beyond those that were before."""
    gc.collect()
    with Live() as live:
        way(work)
    return float(live.peak)


def installed(name: str) -> bool:
    """Whether a distribution of that name is here."""
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def present(ways: dict[str, Way]) -> dict[str, Way]:
    """Those whose package is here, for a rehearsal in an environment that is not the peers'."""
    packages = ("k-diffusion", "torchdiffeq", "torchsde", "diffusers")
    absent = {name for name in packages if not installed(name)}
    for name in sorted(absent):
        print(f"left out, as it is not installed: {name}")
    return {name: way for name, way in ways.items() if name.split()[0] not in absent}


def measure(work: Workload, cores: str, ways: dict[str, Way]) -> Rows:
    """The rows of one workload; times last, interleaved."""
    found: dict[str, dict[str, tuple[str, tuple[float, float, float]]]] = {}
    for name, way in ways.items():
        off, bytes_ = error(way, work), peak(way, work)
        found[name] = {
            "gradient error": ("1", (off,) * 3),
            "peak live tensors": ("B", (bytes_,) * 3),
        }
    runs = {name: (lambda way=way: way(work)) for name, way in ways.items()}
    times = timing.interleaved(runs, work.rounds, warmup=0)
    for name, spent in times.items():
        ratios = tuple(each / times["autograd"][0] for each in spent)
        found[name] |= {"time": ("s", spent), "time over autograd": ("1", ratios)}
    table = []
    for name, metrics in found.items():
        for metric, (unit, values) in metrics.items():
            shape = f"{work.title}, {cores}"
            table.append(rows.row("peers", name, shape, "float32", metric, unit, values))
        show(work, name, {metric: values[0] for metric, (_, values) in metrics.items()})
    return table


def show(work: Workload, name: str, values: dict[str, float]) -> None:
    """One line on the terminal."""
    print(
        f"peers {work.title:50} {name:48} {values['time over autograd']:7.2f} x "
        f"{values['peak live tensors'] / 2**20:9.2f} MiB  error {values['gradient error']:.1e}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="small sizes, writes nothing")
    parser.add_argument("--cores", default="quiet cores", help="what the row says of them")
    parser.add_argument("--only", help="workloads whose title has this in it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table: Rows = []
    for work in SMALL if arguments.rehearse else WORKLOADS:
        if arguments.only is None or arguments.only in work.title:
            ways = WAYS[work.method]
            table += measure(work, arguments.cores, present(ways) if arguments.rehearse else ways)
    if not arguments.rehearse:
        print(f"{len(table)} rows appended to {rows.append(table)}")


if __name__ == "__main__":
    main()
