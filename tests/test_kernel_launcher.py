# SPDX-License-Identifier: Apache-2.0
"""Prepared launches, and the variants of kernels that other Tritons are to compile."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from gradsampler.contract import SINCOS, Draw
from gradsampler.kernels import step
from support import absent_gpu, variants

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).parents[1]


def compiled(code, *arguments):
    """Runs code where Triton compiles, not interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *map(str, arguments)],
        env=environment | {"PYTHONPATH": str(ROOT / "tests")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)), ids=str)
def test_no_launch_has_none_within_a_tuple(needs):
    """Triton 3.6 does not compile it, and neither the interpreter nor newer ones tell."""
    x = torch.ones(2, 8, device=DEVICE)
    draw = Draw(SINCOS, 1, gain=1.1, rate=0.3, amplitude=0.1)
    calls = []
    with absent_gpu.seen(calls.append):
        grads = step.step_bwd(
            x, [x, x, x], [0.5, 0.25, 2.0], x, draw, 0.7, dz0=x.clone(), needs_terms=needs,
            clamp=(-9.0, 9.0),
        )  # fmt: skip
    for factor, got, need in zip([0.5, 0.25, 2.0], grads.terms, needs, strict=True):
        assert (got is not None) == need
        assert got is None or torch.equal(got, factor * x)
    (call,) = calls
    for argument in call.arguments:
        assert not isinstance(argument, tuple) or all(each is not None for each in argument)


def test_what_is_written_down_refuses_none_within_a_tuple():
    call = absent_gpu.Call("step_bwd_kernel", ((torch.ones(2), None), None), {})
    with pytest.raises(AssertionError, match=r"Triton 3\.6 compiles no None within a tuple"):
        variants.line(call)


CALLS = """
import torch
from gradsampler.contract import SIGNED_ROLL, Draw
from gradsampler.kernels import ancestral, step
from support import absent_gpu, variants
from support.absent_gpu import LAUNCHERS, Call, recorded, variant

def calls():
    '''Launches that differ by all that picks a variant, and by what does not.'''
    with recorded() as found:
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for size in (1, 16, 17, 1024):
                whole = torch.empty(2, size + 4, dtype=dtype)
                shifted = whole.view(-1)[1 : 2 * size + 1].view(2, size)
                for x in (whole[:, :size].contiguous(), shifted):
                    for index in (1, 16, 2**31 + 1):
                        draw = Draw(SIGNED_ROLL, index, seed=index, offset=index % size)
                        step.step_fwd([x, x], [0.5, 1.0 * index], x, draw, 0.7)
                        step.step_bwd(x, [x, x], [0.5, 1.0], needs_terms=[index > 1, True])
                    ancestral.ancestral_step_fwd(x, x, None if size == 1 else x, [1.0] * 6)
    return found
"""

KEYS = (
    CALLS
    + """
by_key, by_variant = {}, {}
for call in calls():
    key = call.kernel, LAUNCHERS[call.kernel].key(call.arguments, *call.options.values())
    found = variant(call)
    assert by_key.setdefault(key, found) == found, call  # else a launch would take a wrong kernel
    by_variant.setdefault(found, set()).add(key)
    assert variant(variants.call(variants.line(call))) == found, call
assert len(by_variant) > 30
# Steps, seeds and factors are no part of a key; Triton may join what keys tell apart.
assert sum(map(len, by_variant.values())) <= 1.2 * len(by_variant)
"""
)


def test_equal_keys_are_equal_variants_and_lines_keep_them():
    compiled(KEYS)


LAUNCHED = (
    CALLS
    + """
import triton

class Device(absent_gpu.AbsentDriver):
    '''Takes launches down instead of making them.'''
    class utils:
        get_device_properties = staticmethod(lambda device: {"max_shared_mem": 2**16})
        load_binary = staticmethod(lambda name, *rest: (name, name, 32, 0, 1024))

    def launcher_cls(self, source, metadata):
        return lambda *grid_and_more: launches.append((metadata.hash, *grid_and_more))

launches = []
triton.runtime.driver.set_active(Device("sm_90"))
for call in calls()[::11]:
    launcher = LAUNCHERS[call.kernel]
    for _ in range(3):
        launcher(7, *call.arguments, **call.options)
    first, second, third = launches
    launches.clear()
    # Kernel, grid, stream and function; the metadata is made anew for hooks.
    assert first[1:4] == (7, 1, 1)
    assert first[:7] == second[:7] == third[:7]
    assert [*map(id, first[10:])] == [*map(id, second[10:])]  # the very arguments, in their order
"""
)


def test_a_prepared_launch_is_the_one_that_triton_makes():
    compiled(LAUNCHED)
