# SPDX-License-Identifier: Apache-2.0
"""What each Triton kernel costs an element, read from its machine code; no GPU is needed.

    python -P benchmarks/kernel_budget.py --json

The launchers run on CPU tensors with the launch itself replaced: their arguments say which variant
to compile. A row gives registers, stack bytes, spills (local loads and stores), the narrowest
global load and store in bytes, static instructions and memory traffic an element, the
instructions an element that an H200 can issue while its memory delivers that traffic, the share of
these that a kernel takes, and the unit that is busiest: below a share of 1 memory is the bound.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter's kernels cannot be compiled
sys.path += [str(Path(__file__).parents[1] / "tests"), str(Path(__file__).parent)]

import issue
import torch
import triton

from gradsampler.contract import GIVEN, MAX_TERMS, OFF, SIGNED_ROLL, SINCOS, Draw
from gradsampler.kernels import adjoint, ancestral, flow_pair, launch, leap, step
from support import absent_gpu
from support.absent_gpu import TARGETS

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NUM_WARPS = 4  # Triton's default, which the launchers leave alone

# H200: the 132 multiprocessors of an H100, which issue to 128 lanes a cycle at 1.98 GHz, and the
# fastest memory of the two: 4.3 TB/s, nine tenths of 4.8. An H100's 3.35 leaves more slots a byte.
LANE_INSTRUCTIONS_A_BYTE = 132 * 128 * 1.98e9 / 4.3e12

SHAPE = (4, 16, 32, 32)
WAVE = {"gain": 1.1, "rate": 0.3, "amplitude": 0.1, "phase": 0.4}
DRAWS = {
    "off": None,
    "sincos": Draw(SINCOS, 3, **WAVE),
    "signed_roll": Draw(SIGNED_ROLL, 3, seed=1, offset=77),
    "philox": Draw(OFF, 3, normal=1.0, normal_seed=2),
    "philox+sincos": Draw(SINCOS, 3, weight=0.6, normal=0.8, **WAVE),
    "philox+signed_roll": Draw(SIGNED_ROLL, 3, weight=0.6, normal=0.8, offset=77),
    "given": Draw(GIVEN, 3),
}


@dataclass(frozen=True)
class Row:
    """One compiled variant of one kernel."""

    kernel: str
    arch: str
    dtype: str
    noise: str
    registers: int
    stack: int  # bytes a thread
    spills: int
    load_width: int  # bytes, the narrowest
    store_width: int
    instructions_per_element: float
    bytes_per_element: int
    memory_bound_below: float  # instructions an element
    shared: int = 0  # bytes of a program
    issue_share: float | None = None  # of the issue slots while memory delivers; NVIDIA alone
    busiest: str | None = None  # the unit that has the least to spare
    busiest_share: float | None = None
    triton: str = triton.__version__


def _draw(noise: str, dtype: torch.dtype) -> Draw | None:
    draw = DRAWS[noise]
    if noise == "given" and draw is not None:
        draw = draw._replace(given=torch.empty(SHAPE, dtype=dtype))
    return draw


def _step_fwd(terms: int, noise: str, dtype: torch.dtype) -> int:
    x = torch.empty(SHAPE, dtype=dtype)
    step.step_fwd([x] * terms, [0.5] * terms, x, _draw(noise, dtype), 0.7)
    return (terms + (1 if noise in ("off", "philox") else 2)) * x.itemsize


def _step_fwd_model_in(noise: str, dtype: torch.dtype) -> int:
    x = torch.empty(SHAPE)
    d = torch.empty(SHAPE, dtype=dtype)
    step.step_fwd([x, d], [0.5, 0.5], x, _draw(noise, dtype), 0.7, model_scale=0.5,
                  model_dtype=dtype)  # fmt: skip
    return 3 * x.itemsize + 2 * d.itemsize


def _step_bwd(terms: int, noise: str, dtype: torch.dtype) -> int:
    x = torch.empty(SHAPE, dtype=dtype)
    dz0 = None if noise == "off" else x
    step.step_bwd(x, [x] * terms, [0.5] * terms, x, _draw(noise, dtype), 0.7, dz0=dz0,
                  needs_terms=[True] * terms)  # fmt: skip
    return (terms + {"off": 1, "sincos": 4, "signed_roll": 3}[noise]) * x.itemsize


def _adjoint_step(terms: int, noise: str, dtype: torch.dtype) -> int:
    x, own = torch.empty(SHAPE, dtype=dtype), terms - 1  # and the model's gradient
    dz0 = None if noise == "off" else x
    adjoint.adjoint_step([x] * own, [0.5] * own, x, 0.5, [0.5] * terms, x, _draw(noise, dtype),
                         0.7, dz0)  # fmt: skip
    return (terms + {"off": 2, "sincos": 5, "signed_roll": 4}[noise]) * x.itemsize


def _leap(integers: torch.dtype, noise: str, dtype: torch.dtype) -> int:
    x, carried = torch.empty(SHAPE), torch.empty(SHAPE, dtype=integers)
    d = torch.empty(SHAPE, dtype=dtype)
    leap.leap(
        carried, [x, d], [0.5, 0.5], x, _draw(noise, dtype), 0.7, sign=1, scale=0.5,
        overflow=torch.empty(1, dtype=torch.int32), out_dtype=x.dtype, model_scale=0.5,
        model_dtype=dtype,
    )  # fmt: skip
    floats = 2 if noise in ("off", "philox") else 3
    return floats * x.itemsize + 2 * d.itemsize + 2 * carried.itemsize


def _ancestral_step_fwd(noise: str, dtype: torch.dtype) -> int:
    x = torch.empty(SHAPE, dtype=dtype)
    output = torch.empty(SHAPE[0], 2 * SHAPE[1], *SHAPE[2:], dtype=dtype)
    ancestral.ancestral_step_fwd(x, output, x, [0.5] * 6, clamp=(-1.0, 1.0))
    return 5 * x.itemsize


def _ancestral_step_bwd(noise: str, dtype: torch.dtype) -> int:
    x = torch.empty(SHAPE, dtype=dtype)
    output = torch.empty(SHAPE[0], 2 * SHAPE[1], *SHAPE[2:], dtype=dtype)
    ancestral.ancestral_step_bwd(x, x, output, x, [0.5] * 6, clamp=(-1.0, 1.0))
    return 9 * x.itemsize


def _flow_pair_fwd(noise: str, dtype: torch.dtype) -> int:
    x = torch.empty(SHAPE, dtype=dtype)
    flow_pair.flow_pair_fwd(x, torch.empty(SHAPE[0]), x if noise == "given" else None)
    return (4 if noise == "given" else 3) * x.itemsize


def _flow_pair_bwd(noise: str, dtype: torch.dtype) -> int:
    x = torch.empty(SHAPE, dtype=dtype)
    x1 = x if noise == "given" else None
    flow_pair.flow_pair_bwd(x, x, x, torch.empty(SHAPE[0]), x1, needs_t=False)
    return (4 if noise == "given" else 3) * x.itemsize


CASES: list[tuple[str, Callable[[str, torch.dtype], int], tuple[str, ...]]] = [
    ("step_fwd", partial(_step_fwd, 2), tuple(DRAWS)),
    ("step_fwd+model_in", _step_fwd_model_in, ("sincos", "signed_roll")),
    ("step_bwd", partial(_step_bwd, 2), ("off", "sincos", "signed_roll")),
    ("adjoint_step", partial(_adjoint_step, 2), ("off", "sincos", "signed_roll")),
    (f"step_fwd {MAX_TERMS} terms", partial(_step_fwd, MAX_TERMS), ("sincos", "philox+sincos")),
    (f"step_bwd {MAX_TERMS} terms", partial(_step_bwd, MAX_TERMS), ("sincos",)),
    (f"adjoint_step {MAX_TERMS} terms", partial(_adjoint_step, MAX_TERMS), ("sincos",)),
    ("leap int32", partial(_leap, torch.int32), ("off", "sincos", "signed_roll", "philox")),
    ("leap int64", partial(_leap, torch.int64), ("off", "sincos", "signed_roll", "philox")),
    ("ancestral_step_fwd", _ancestral_step_fwd, ("given",)),
    ("ancestral_step_bwd", _ancestral_step_bwd, ("given",)),
    ("flow_pair_fwd", _flow_pair_fwd, ("given", "philox")),
    ("flow_pair_bwd", _flow_pair_bwd, ("given",)),
]


def _nvidia(compiled: Any) -> tuple[int, int, int, list[str]]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])

        def dump(option: str) -> str:
            command = [str(tool), option, str(cubin)]
            return subprocess.run(command, check=True, capture_output=True, text=True).stdout

        usage, listing = dump("-res-usage"), dump("-sass")
    code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z]\S*)", listing, re.M)
    while code and code[-1].startswith(("NOP", "BRA")):
        code.pop()
    registers, stack = (int(re.findall(rf"{x}:(\d+)", usage)[-1]) for x in ("REG", "STACK"))
    return registers, stack, sum(c.startswith(("LDL", "STL")) for c in code), code


def _amd(compiled: Any) -> tuple[int, int, int, list[str]]:
    listing = compiled.asm["amdgcn"]
    body = listing[listing.index(".cfi_startproc") : listing.rindex("s_endpgm")]
    code = re.findall(r"^\s+((?:[sv]|ds|global|buffer|scratch|flat)_\w+)", body, re.M)

    def field(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s+(\d+)", listing)[-1])

    return (
        field("vgpr_count"),
        field("private_segment_fixed_size"),
        field("vgpr_spill_count") + field("sgpr_spill_count"),
        code,
    )


NVIDIA_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
AMD_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}


def _width(instruction: str) -> int:
    if "_" in instruction:
        return AMD_WIDTHS.get(instruction.split("_")[2], 2)
    fields = instruction.rstrip(";").split(".")
    return next((NVIDIA_WIDTHS[x] for x in fields if x in NVIDIA_WIDTHS), 4)


def measure(name: str, arch: str, dtype: str, noise: str, run: Callable[..., int]) -> Row:
    """Compiles one case for one architecture and reads its machine code."""
    target = TARGETS[arch]
    launch.WARP = target.warp_size
    with absent_gpu.recorded() as calls:
        traffic = run(noise, DTYPES[dtype])
    (call,) = calls
    compiled = absent_gpu.compiled(call, arch)
    registers, stack, spills, code = (_amd if target.backend == "hip" else _nvidia)(compiled)
    loads = [_width(c) for c in code if re.match(r"LDG|(global|buffer)_load", c)]
    stores = [_width(c) for c in code if re.match(r"STG|(global|buffer)_store", c)]
    elements = call.options["BLOCK"] / (NUM_WARPS * target.warp_size)
    slots = traffic * LANE_INSTRUCTIONS_A_BYTE
    row = Row(
        name, arch, dtype, noise, registers, stack, spills, min(loads, default=0), min(stores),
        round(len(code) / elements, 2), traffic, round(slots, 1), compiled.metadata.shared,
    )  # fmt: skip
    if target.backend == "hip":
        return row
    share = issue.busiest(code, elements)
    taken, most = len(code) / elements / slots, share.slots / slots
    return replace(
        row, issue_share=round(taken, 3), busiest=share.unit, busiest_share=round(most, 3)
    )


def rows(
    archs: list[str], kernels: list[str] | None = None, noises: list[str] | None = None
) -> Iterator[Row]:
    """All rows for the architectures, or those of the named kernels and noises."""
    for name, run, known in CASES:
        for arch in archs:
            for dtype in DTYPES:
                for noise in known:
                    if (not kernels or name in kernels) and (not noises or noise in noises):
                        yield measure(name, arch, dtype, noise, run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--arch", action="append", choices=TARGETS, help="default: all")
    parser.add_argument("--kernel", action="append", choices=[c[0] for c in CASES])
    parser.add_argument("--noise", action="append", choices=DRAWS)
    options = parser.parse_args()
    for row in rows(options.arch or list(TARGETS), options.kernel, options.noise):
        if options.json:
            print(json.dumps(asdict(row)), flush=True)
        else:
            print(*asdict(row).values(), sep="\t", flush=True)


if __name__ == "__main__":
    main()
