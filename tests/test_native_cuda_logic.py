# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels' logic where there is no GPU: the same sources, run by the CPU thread by thread.

A small stand-in for the CUDA runtime lets a C++ compiler build csrc/cuda and ops_cuda.cpp; loaded
over the CPU's own ops in a second process, they then face the tests of the CPU. What this cannot
see: races, memory spaces, alignment faults, and the device's arithmetic.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gradsampler.ops import native

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(native.available() is not None, reason=f"extension: {native.available()}"),
    pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="csrc is not beside the tests"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not on PATH"),
]

RUNTIME = """
#pragma once
#include <cstdint>
#include <cstring>
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
struct Index { unsigned x = 0; };
inline Index blockIdx, threadIdx;
struct uint4 { unsigned x, y, z, w; };
struct uint2 { unsigned x, y; };
inline uint4 make_uint4(unsigned a, unsigned b, unsigned c, unsigned d) { return {a, b, c, d}; }
inline uint2 make_uint2(unsigned a, unsigned b) { return {a, b}; }
using cudaStream_t = void*;
enum { cudaErrorInvalidConfiguration = 9 };
inline int cudaGetLastError() { return 0; }
// Threads run from the last to the first, so the first one ends with every barrier's sum.
inline double sums[16];
inline int barrier = 0;
inline double emulated_sum(double x) {
  if (threadIdx.x == 255) sums[barrier] = 0;
  return sums[barrier++] += x;
}
template <class Kernel, class... A>
void emulate(Kernel kernel, int64_t grid, A... a) {
  for (int64_t b = 0; b < grid; ++b)
    for (int t = 255; t >= 0; --t) {
      blockIdx.x = unsigned(b), threadIdx.x = unsigned(t), barrier = 0;
      kernel(a...);
    }
}
"""
HALVES = """
#pragma once
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>
struct __half { unsigned short x; };
inline float __half2float(__half h) { c10::Half v; v.x = h.x; return float(v); }
inline __half __float2half_rn(float f) { return {c10::Half(f).x}; }
inline __half __ushort_as_half(unsigned short u) { return {u}; }
inline unsigned short __half_as_ushort(__half h) { return h.x; }
struct __nv_bfloat16 { unsigned short x; };
inline __nv_bfloat16 __float2bfloat16_rn(float f) { return {c10::BFloat16(f).x}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 h) { return h.x; }
"""
RUN = """
import ctypes, sys, torch, pytest
from gradsampler.ops import native
ctypes.CDLL(sys.argv[1])
quiet = ["-q", "-p", "no:cacheprovider", "-W", "ignore", "-m", "not slow"]
sys.exit(pytest.main([*quiet, *sys.argv[2:]]))
"""


def replaced(text: str, old: str, new: str) -> str:
    assert old in text, old
    return text.replace(old, new)


def emulated_sources(folder: Path) -> list[str]:
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    (folder / "cuda_runtime.h").write_text(RUNTIME)
    (folder / "cuda_fp16.h").write_text(HALVES)
    (folder / "cuda_bf16.h").write_text('#include "cuda_fp16.h"\n')
    files = []
    launch = r"(\w+)<<<unsigned\((.*?)\), kThreads, 0, static_cast<cudaStream_t>\(stream\)>>>\("
    for path in sorted((folder / "csrc" / "cuda").glob("*.cu*")):
        text, count = re.subn(launch, r"emulate(\1, \2, ", path.read_text())
        assert count == {"step.cu": 1, "vector.cuh": 1}.get(path.name, 0)
        if path.suffix == ".cu":
            files.append(str(path.with_suffix(".cpp")))
        (path.with_suffix(".cpp") if path.suffix == ".cu" else path).write_text(text)
    vector = folder / "csrc" / "cuda" / "vector.cuh"
    text = vector.read_text()
    body = text[text.index("  __shared__ double warp_sum") : text.index("  return total;\n")]
    vector.write_text(text.replace(body, "  double total = emulated_sum(x);\n"))
    session = folder / "csrc" / "session.h"
    text = session.read_text()
    guard = "torch::stable::accelerator::DeviceGuard guard;"
    text = replaced(text, guard, "struct Guard { Guard(int) {} } guard;")
    stream = "aoti_torch_get_current_cuda_stream(like.device_index, &found)"
    session.write_text(replaced(text, stream, "0"))
    ops = folder / "csrc" / "ops_cuda.cpp"
    key = "gradsamplernative, CUDA, m"
    ops.write_text(replaced(ops.read_text(), key, "gradsamplernative, CPU, m"))
    return [*files, str(ops), *map(str, sorted((folder / "csrc" / "cpu").glob("isa*.cpp")))]


def test_the_kernels_pass_the_tests_of_the_cpu(tmp_path):
    files = emulated_sources(tmp_path)
    base = Path(torch.__file__).parent
    library = tmp_path / "emulated.so"
    flags = ["-std=c++20", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-w"]
    if "x86-64-v3" in native.isas():
        flags.append("-mfma")  # as the device has it
    flags += [f"-I{tmp_path}", f"-I{base}/include", "-DUSE_CUDA"]
    flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000"]
    libraries = [f"-L{base}/lib", "-ltorch", "-ltorch_cpu", "-lc10", "-o", str(library)]
    built = subprocess.run(
        ["g++", *flags, *files, *libraries], capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stderr[-4000:]
    tests = [
        str(Path(__file__).with_name(f"test_native_{name}.py"))
        for name in ("step", "pairs", "leap")
    ]
    done = subprocess.run(
        [sys.executable, "-P", "-c", RUN, str(library), *tests],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
