# SPDX-License-Identifier: Apache-2.0
"""Host time of a Triton launch without a GPU: everything runs but the driver, which does nothing.

    python -P benchmarks/launch_host.py             # prints
    python -P benchmarks/launch_host.py --append    # and appends rows

A library with the names of the driver's functions takes the place of libcuda; Triton compiles its
own launcher against it. What is missing is the driver's own share, some microseconds a launch.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

HERE, CALLS = Path(__file__).parent, 50
SOURCE = """
#include <stdint.h>
#define DOES_NOTHING(name) int name(void) { return 0; }
int cuPointerGetAttribute(uint64_t *out, int what, uint64_t pointer) { *out = pointer; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return 0; }
int cuModuleGetFunction(void **f, void *module, const char *name) { *f = (void *)1; return 0; }
int cuFuncGetAttribute(int *value, int what, void *function) { *value = 1024; return 0; }
int cuDeviceGetAttribute(int *value, int what, int device) { *value = 1 << 17; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuStreamIsCapturing(void *stream, int *is) { *is = 0; return 0; }
int cuGetErrorString(int code, const char **text) { *text = "none"; return 0; }
DOES_NOTHING(cuInit) DOES_NOTHING(cuDeviceGet) DOES_NOTHING(cuDevicePrimaryCtxRetain)
DOES_NOTHING(cuCtxSetCurrent) DOES_NOTHING(cuCtxGetDevice) DOES_NOTHING(cuCtxGetLimit)
DOES_NOTHING(cuCtxSetLimit) DOES_NOTHING(cuFuncSetAttribute) DOES_NOTHING(cuFuncSetCacheConfig)
DOES_NOTHING(cuLaunchKernelEx) DOES_NOTHING(cuModuleUnload) DOES_NOTHING(cuPointerGetAttributes)
DOES_NOTHING(cuOccupancyMaxActiveClusters) DOES_NOTHING(cuTensorMapEncodeTiled)
DOES_NOTHING(cuTensorMapEncodeIm2col)
"""


def again_with_a_driver(folder: str) -> int:
    """Builds the library and runs this script once more where it is found first."""
    library = Path(folder) / "libcuda.so.1"
    Path(folder, "driver.c").write_text(SOURCE)
    build = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O2", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([*build, "-o", library, Path(folder, "driver.c")], check=True)
    libraries = filter(None, [folder, os.environ.get("LD_LIBRARY_PATH")])
    modules = [str(HERE), str(HERE.parent / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "GRADSAMPLER_STAND_IN": folder,
        "LD_LIBRARY_PATH": ":".join(libraries),
        "TRITON_LIBCUDA_PATH": folder,
        "TRITON_CACHE_DIR": f"{folder}/cache",  # launchers linked to it are of no use to others
        "PYTHONPATH": ":".join(filter(None, modules)),
    }
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-P", __file__, *sys.argv[1:]]
    return subprocess.run(command, env=environment, check=False).returncode


def repeated(run: Callable[[], object], context: Callable[[], AbstractContextManager[Any]]) -> None:
    with context():
        for _ in range(CALLS):
            run()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--append", action="store_true", help="appends rows to results/")
    parser.add_argument("--rounds", type=int, default=40)
    arguments = parser.parse_args()

    import rows
    import timing
    import torch
    import triton
    from triton.backends.nvidia import driver as nvidia

    from gradsampler import noise
    from gradsampler.kernels import adjoint, ancestral, step
    from support.absent_gpu import TARGETS, recorded, unprepared

    class Driver(nvidia.CudaDriver):
        """Triton's own, on a device that it need not ask for."""

        def __init__(self) -> None:
            self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: 0

        def get_current_target(self):  # type: ignore[no-untyped-def]
            return TARGETS["sm_90"]

        def allocate_default_profile_scratch(self, *_):  # type: ignore[no-untyped-def]
            return None

    triton.runtime.driver.set_active(Driver())
    x, d, z0, dz0, out = (torch.randn(1, 4, 64, 64) for _ in range(5))
    draw = noise.SinCos().draw(z0, 7, 35)
    row = [1.3, 0.9, 0.6, 0.35, -1.0, -3.5]
    ops: dict[str, Callable[[], object]] = {
        "step_fwd": lambda: step.step_fwd([x, d], [0.9, 0.1], z0, draw, 0.3, out=out),
        "adjoint_step": lambda: adjoint.adjoint_step(
            [x], [0.9], d, 0.5, [0.2, 0.1], z0, draw, 0.3, dz0
        ),
        "ancestral_step_fwd": lambda: ancestral.ancestral_step_fwd(
            x, d, z0, row, clamp=(-1.0, 1.0), out=out
        ),
    }
    ways = {"prepared": nullcontext, "by Triton": unprepared, "up to the launch": recorded}
    table = []
    for name, run in ops.items():
        variants = {way: partial(repeated, run, context) for way, context in ways.items()}
        for way, spent in timing.interleaved(variants, arguments.rounds).items():
            each = tuple(t / CALLS for t in spent)
            print(f"{name:20} {way:18} {each[0] * 1e6:8.1f} us a call", flush=True)
            metric = "host time a call, the driver does nothing"
            table.append(rows.row(name, way, "1x4x64x64", "float32", metric, "s", each))
    if arguments.append:
        print(f"{len(table)} rows appended to {rows.append(table)}")


if __name__ == "__main__":
    if "GRADSAMPLER_STAND_IN" in os.environ:
        main()
    else:
        with tempfile.TemporaryDirectory() as scratch:
            sys.exit(again_with_a_driver(scratch))
