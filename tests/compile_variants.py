# SPDX-License-Identifier: Apache-2.0
"""Compiles every variant of the kernels that a test run launched, for GPUs that are not here.

    GRADSAMPLER_VARIANTS=FOLDER python -m pytest ...        # by the interpreter, writes them down
    PYTHONPATH=tests:TRITON python -P tests/compile_variants.py FOLDER [--arch sm_90]

The Triton that compiles may be another one than that which ran the tests. It also tells whether a
prepared launch could ever take a variant for another one: equal keys must be equal to Triton.
"""

import argparse
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter's kernels cannot be compiled

import triton

from support import absent_gpu, variants
from support.absent_gpu import LAUNCHERS, Call

NVIDIA = ["sm_80", "sm_90", "sm_100"]


def distinct(lines: list[str]) -> dict[str, str]:
    """A line for each variant that Triton tells apart, by the launchers' own keys."""
    found: dict[object, str] = {}
    keys: dict[object, object] = {}
    for text in lines:
        call = variants.call(text)
        variant = absent_gpu.variant(call)
        found.setdefault(variant, text)
        key = _key(call)
        if keys.setdefault(key, variant) != variant:
            sys.exit(f"one key for two variants: {text}")
    return {text: text for text in found.values()}


def _key(call: Call) -> object:
    return call.kernel, LAUNCHERS[call.kernel].key(call.arguments, *call.options.values())


def compiled(task: tuple[str, str]) -> tuple[str, str, str]:
    """Compiles one line for one architecture; the third is what went wrong."""
    text, arch = task
    try:
        absent_gpu.compiled(variants.call(text), arch)
    except Exception as error:
        return text, arch, f"{type(error).__name__}: {error}"
    return text, arch, ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", action="append", choices=NVIDIA, help="default: all three")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    start, lines = time.perf_counter(), variants.read(options.folder)
    if not lines:
        parser.error(f"no launches were recorded in {options.folder}")
    archs = options.arch or NVIDIA
    tasks = [(text, arch) for arch in archs for text in distinct(lines)]
    with ProcessPoolExecutor(options.processes) as pool:
        failed = [each for each in pool.map(compiled, tasks, chunksize=8) if each[2]]
    for text, arch, error in failed:
        print(f"{arch} {text}\n{error}\n")
    print(
        f"triton {triton.__version__}: {len(tasks) - len(failed)} of {len(tasks)} compiled, "
        f"{len(tasks) // len(archs)} variants of {len(LAUNCHERS)} kernels for {', '.join(archs)}, "
        f"in {time.perf_counter() - start:.0f} s"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
