# SPDX-License-Identifier: Apache-2.0
"""What the compiled kernels cost an element, without a GPU: benchmarks/kernel_budget.py."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("compiling the kernels needs triton", allow_module_level=True)

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "kernel_budget.py"

# Static instructions an element of two terms and sincos on sm_90.
LIMITS = {
    ("step_fwd", "float32"): 24,
    ("step_fwd", "bfloat16"): 28,
    ("step_bwd", "float32"): 26,
    ("step_bwd", "bfloat16"): 30,
    # No product is fused with a sum, and integers are rounded to, added and converted back.
    ("leap int32", "float32"): 54,
    ("leap int32", "bfloat16"): 60,
    ("leap int64", "float32"): 64,
    ("leap int64", "bfloat16"): 68,
}
# Two Philox blocks for every eight 16-bit elements, beside one for their signs.
ISSUE = {"philox": 0.6, "philox+sincos": 0.6, "philox+signed_roll": 0.75}


def budget(*options: str) -> list[dict]:
    command = [sys.executable, "-P", str(SCRIPT), "--json", *options]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def hopper():
    return budget("--arch", "sm_90")


VARIANTS = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from support.absent_gpu import recorded, variant
from gradsampler.kernels import leap, step
from gradsampler.contract import SIGNED_ROLL, SINCOS, Draw

x = torch.empty(2, 64)
for kind in (SINCOS, SIGNED_ROLL):
    for dtype in (torch.float32, torch.float64):
        variants = set()
        for index in (0, 1, 16, 17):
            draw = Draw(kind, index, seed=index * 2**31, offset=index or 3, normal=0.5,
                        normal_seed=index + 2**40, rate=0.1 * index, amplitude=index)
            with recorded() as calls:
                step.step_fwd([x.to(dtype)], [float(index)], x, draw, 0.5 * index + 1)
            variants.add(variant(calls[0]))
        assert len(variants) == 1, (kind, dtype)

carried, overflow = torch.empty(2, 64, dtype=torch.int64), torch.empty(1, dtype=torch.int32)
variants = set()
for sign in (1, -1):
    draw = Draw(SINCOS, sign + 1, rate=0.1, amplitude=sign)
    with recorded() as calls:
        leap.leap(carried, [x], [float(sign)], x, draw, 1.0, sign=sign, scale=sign + 2.0,
                  overflow=overflow, out_dtype=torch.float32)
    assert calls[0].options["enable_fp_fusion"] is False  # else bits might differ
    variants.add(variant(calls[0]))
assert len(variants) == 1
"""


def test_no_step_compiles_a_kernel_anew():
    command = [sys.executable, "-P", "-c", VARIANTS, str(Path(__file__).parent)]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def rolls(row: dict) -> bool:
    return "signed_roll" in row["noise"]


def widths_hold(row: dict) -> None:
    # The rolled element lies anywhere, and a time is one number for a whole sample.
    if not rolls(row) and not row["kernel"].startswith("flow_pair"):
        assert row["load_width"] == 16, row
    if not rolls(row) or "fwd" in row["kernel"] or "leap" in row["kernel"]:
        assert row["store_width"] == 16, row


@pytest.mark.thorough
def test_every_kernel_has_its_rows(hopper):
    assert {row["kernel"] for row in hopper} == {
        "step_fwd",
        "step_fwd+model_in",
        "step_bwd",
        "adjoint_step",
        "step_fwd 12 terms",
        "step_bwd 12 terms",
        "adjoint_step 12 terms",
        "leap int32",
        "leap int64",
        "ancestral_step_fwd",
        "ancestral_step_bwd",
        "flow_pair_fwd",
        "flow_pair_bwd",
    }
    assert all(row["registers"] > 0 for row in hopper)


@pytest.mark.thorough
def test_no_stack_no_spills_and_wide_accesses(hopper):
    for row in hopper:
        assert (row["stack"], row["spills"]) == (0, 0), row
        widths_hold(row)


@pytest.mark.parametrize(("kernel", "dtype"), LIMITS)
@pytest.mark.thorough
def test_sincos_stays_within_its_instructions(hopper, kernel, dtype):
    (row,) = (
        r for r in hopper if (r["kernel"], r["dtype"], r["noise"]) == (kernel, dtype, "sincos")
    )
    assert row["instructions_per_element"] <= LIMITS[kernel, dtype]


@pytest.mark.thorough
def test_kernels_are_bound_by_memory(hopper):
    for row in hopper:
        assert row["issue_share"] <= row["busiest_share"] < 1, row


@pytest.mark.thorough
def test_normals_of_16_bits_leave_slots_to_spare_and_share_no_memory(hopper):
    drawn = [r for r in hopper if r["noise"] in ISSUE and r["dtype"] == "bfloat16"]
    drawn = [r for r in drawn if "leap" not in r["kernel"]]
    assert {r["kernel"] for r in drawn} >= {"step_fwd", "flow_pair_fwd"}
    for row in drawn:
        assert row["shared"] == 0, row
        assert row["busiest_share"] < ISSUE[row["noise"]], row


@pytest.mark.parametrize("arch", ["sm_80", "sm_100", "gfx942"])
@pytest.mark.thorough
def test_other_architectures(arch):
    kernels = ["step_fwd", "step_bwd", "adjoint_step", "leap int64"]
    kernels += ["step_fwd 12 terms", "step_bwd 12 terms", "adjoint_step 12 terms"]
    options = [x for k in kernels for x in ("--kernel", k)]
    rows = budget("--arch", arch, *options, "--noise", "off", "--noise", "sincos")
    assert len(rows) == 22
    for row in rows:
        assert (row["stack"], row["spills"]) == (0, 0), row
        widths_hold(row)
