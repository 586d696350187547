# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels under plain nvcc: they compile, keep to registers, move 16 bytes at a time."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from support.tiers import few

SOURCES = sorted((Path(__file__).parent.parent / "csrc" / "cuda").glob("*.cu"))
NVCC = shutil.which("nvcc")
# What torch passes: only intrinsics may convert.
DEFINES = [
    "-D__CUDA_NO_HALF_OPERATORS__",
    "-D__CUDA_NO_HALF_CONVERSIONS__",
    "-D__CUDA_NO_BFLOAT16_CONVERSIONS__",
    "-D__CUDA_NO_HALF2_OPERATORS__",
]
WIDE = r"(v4\.[bfu]32|v2\.[bfu]64)"
pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH"),
    pytest.mark.skipif(not SOURCES, reason="the CUDA sources are not beside the tests"),
]


def compiled(source, *flags):
    command = [NVCC, "-std=c++20", "-O3", *DEFINES, *flags, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize("source", few(SOURCES, *SOURCES[:1]), ids=lambda p: p.name)
@pytest.mark.parametrize("arch", few(["sm_80", "sm_90", "sm_100"], "sm_90"))
def test_kernels_use_registers_alone(source, arch, tmp_path):
    report = compiled(
        source, f"-arch={arch}", "-cubin", "-Xptxas=-v", "-o", str(tmp_path / "out.cubin")
    )
    assert "warning" not in report
    frames = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report
    )
    kernels = re.findall(r"Compiling entry function '(\w+)'", report)
    assert kernels
    assert len(frames) == len(kernels)
    for kernel, frame in zip(kernels, frames, strict=True):
        assert frame == ("0", "0", "0"), (kernel, frame)


@pytest.mark.thorough
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.name)
def test_kernels_load_and_store_16_bytes(source, tmp_path):
    ptx = tmp_path / "out.ptx"
    compiled(source, "-arch=sm_90", "-ptx", "-o", str(ptx))
    text = ptx.read_text()
    assert "ld.local" not in text
    assert "st.local" not in text
    kernels = re.split(r"\.entry ", text)[1:]
    assert kernels
    for kernel in kernels:
        name = kernel.split("(", 1)[0]
        if "sum_kernel" in name:  # the second pass over the blocks' sums
            continue
        assert re.search(rf"ld\.global(\.nc)?\.{WIDE}", kernel), name
        assert re.search(rf"st\.global\.{WIDE}", kernel), name


def test_the_headers_know_no_torch():
    for path in SOURCES[0].parent.iterdir():
        assert "torch" not in path.read_text().replace("no torch", ""), path.name
