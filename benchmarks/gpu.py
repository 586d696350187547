# SPDX-License-Identifier: Apache-2.0
"""The figures that need an NVIDIA GPU, in sections; the rows of each are appended as it ends.

make bench-gpu OUT=DIR                         # all, in about eight minutes
make bench-gpu OUT=DIR SECTIONS="launch long"  # some
python benchmarks/gpu.py --rehearse            # the same code on tiny tensors, in the interpreter
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # what counts launches lies there

import gpu_kernels as kernels
import memory
import rows
import torch
from gpu_kernels import DEVICE, Rows

SECONDS = 480.0  # in all; a section that would begin later is left out
HALF = (torch.float32, torch.bfloat16)


def bandwidth(table: Rows, small: bool) -> None:
    """Every kernel against a copy on the device, torch.compile and eager."""
    for dtype in HALF:
        for size in [300] if small else [2**24, 2**26]:
            for part in (kernels.forward, kernels.backward, kernels.adjoint, kernels.leap):
                part(table, size, dtype, 2 if small else 30)


def launch(table: Rows, small: bool) -> None:
    """Host time of a launch, by every way there is."""
    kernels.launch(table, 2 if small else 500)


def crossover(table: Rows, small: bool) -> None:
    """From which size on which backend is the fastest."""
    sizes = [64, 256] if small else [2**k for k in range(10, 25, 2)]
    kernels.crossover(table, sizes, 2 if small else 100, 2 if small else 15)


def peaks(table: Rows, small: bool) -> None:
    """Peak memory against the number of steps."""
    counts = (2, 4) if small else memory.STEPS
    memory.memory(table, 8 if small else 256, counts, memory.one)


def times(table: Rows, small: bool) -> None:
    """Time of a gradient by memory strategy."""
    memory.times(table, 8 if small else 1024, 3 if small else 64, 1 if small else 5)


def long(table: Rows, small: bool) -> None:
    """1024 steps on a state of 64 MiB, the gradient checked along a direction."""
    memory.long_run(table, 16 if small else 2048, 4 if small else 1024)


# What no other figure tells comes first.
SECTIONS: dict[str, Callable[[Rows, bool], None]] = {
    each.__name__: each for each in (launch, crossover, bandwidth, peaks, times, long)
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, writes nothing")
    parser.add_argument("--out", type=Path, default=rows.RESULTS)
    arguments = parser.parse_args()
    unknown = [name for name in arguments.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"no section {', '.join(unknown)}: there are {', '.join(SECTIONS)}")
    if DEVICE == "cpu" and not arguments.rehearse:
        parser.error("no NVIDIA GPU here: only --rehearse runs")
    # Gradients are compared with one another: to 19 bits of TF32 they would not agree.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    start = time.perf_counter()
    for name in arguments.sections or SECTIONS:
        spent = time.perf_counter() - start
        if spent > SECONDS:
            print(f"section {name} is left out after {spent:.0f} s: ask for it by name")
            continue
        table: Rows = []
        SECTIONS[name](table, arguments.rehearse)
        spent = time.perf_counter() - start - spent
        where = "" if arguments.rehearse else f" appended to {rows.append(table, arguments.out)}"
        print(f"section {name}: {len(table)} rows in {spent:.0f} s{where}", flush=True)
    if arguments.rehearse:
        print("rehearsed: every part ran, and no time above means anything")


if __name__ == "__main__":
    main()
