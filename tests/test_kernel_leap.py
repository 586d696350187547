# SPDX-License-Identifier: Apache-2.0
"""The Triton kernel of a leap; without a GPU in the interpreter, every output NaN at first."""

import importlib.util
import os

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("the kernels need triton", allow_module_level=True)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # triton decides when it is imported
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

from gradsampler.kernels import leap as kernel  # noqa: E402
from support.leaps import Case, Leaps  # noqa: E402
from support.tiers import few  # noqa: E402


@pytest.fixture
def leap():
    return kernel.leap


@pytest.fixture
def device():
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def truncates():
    """The interpreter cuts bfloat16 off where a GPU rounds."""
    return INTERPRETED


@pytest.fixture(autouse=True)
def _poisoned():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


class TestTriton(Leaps):
    @pytest.mark.parametrize("kind", ["sincos", "philox", "signed_roll"])
    @pytest.mark.parametrize("size", few([1, 16, 255, 257, 1024, 1040], 1, 257))
    def test_every_kind_of_mask_and_block_size(self, leap, device, kind, size):
        if kind == "signed_roll" and size == 1:
            pytest.skip("a state of one element cannot be rolled")
        case = Case(device, (1, size), kind)
        assert torch.equal(case.holds(leap, block=128), case.holds(leap, block=1024))
