# SPDX-License-Identifier: Apache-2.0
"""The extension's 16-bit paths: torch's own rounding, ragged ends, the shorter sine."""

import math

import pytest
import torch

from gradsampler import contract, noise
from gradsampler.ops import native
from support.native_devices import DEVICES, default

pytestmark = pytest.mark.skipif(
    native.available() is not None, reason=f"extension: {native.available()}"
)

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
HALVES = pytest.mark.parametrize("dtype", [BF16, F16], ids=str)


# The CPU by each of its instruction sets, and a GPU.
PLACES = [*(("cpu", isa) for isa in native.isas()), *(("cuda", "") for d in DEVICES if d == "cuda")]


@pytest.fixture(params=PLACES, autouse=True, ids="-".join)
def _place(request):
    device, isa = request.param
    native.use_isa(isa or native.isas()[0])
    with default(device):
        yield
    native.use_isa(native.isas()[0])


def every_half(dtype):
    """All 65,536 values."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)[None]


def floats_between(dtype):
    """float32 values at, halfway between, and just beside the values of a 16-bit dtype."""
    values = every_half(dtype).float()
    values = values[values.isfinite()]
    lower = values.view(torch.int32)
    ulp = 2**16 if dtype == BF16 else 2**13
    near = [lower + k for k in (0, 1, ulp // 2 - 1, ulp // 2, ulp // 2 + 1, ulp - 1)]
    special = torch.tensor([math.inf, -math.inf, math.nan, 3.4e38, -3.4e38, 65519.9, 65520.0])
    return torch.cat([*(n.view(F32) for n in near), special])[None]


def same_bits(got, expected):
    assert got.dtype == expected.dtype
    assert torch.equal(got.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    assert torch.equal(got[numbers].view(torch.int16), expected[numbers].view(torch.int16))


@HALVES
def test_float32_is_rounded_as_torch_does(dtype):
    x = floats_between(dtype)
    same_bits(native.step_fwd([x], [1.0], out_dtype=dtype), x.to(dtype))


@HALVES
def test_sums_of_halves_are_rounded_as_torch_does(dtype):
    x = every_half(dtype)
    # The product is exact in float32; many fall halfway between two values.
    coefficient = 1 + 2.0 ** (-8 if dtype == BF16 else -11)
    same_bits(native.step_fwd([x], [coefficient]), (x.float() * coefficient).to(dtype))


def test_a_nan_of_any_payload_stays_one():
    payloads = [0x7F800001, 0x7FFFFFFF, 0x7FC00000, -1, -0x7FFFFF]
    x = torch.tensor(payloads, dtype=torch.int32).view(F32).repeat(7)[None]
    assert x.isnan().all()
    assert native.step_fwd([x], [1.0], out_dtype=BF16).isnan().all()
    noisy = contract.Draw(contract.GIVEN, 0, given=x)
    ones = torch.ones(x.shape, dtype=BF16)
    assert native.step_fwd([ones], [1.0], None, noisy, 1.0).isnan().all()


@HALVES
@pytest.mark.parametrize("name", ["off", "sincos", "roll"])
def test_any_length_at_any_address(name, dtype):
    torch.manual_seed(0)
    source = {"off": noise.Off(), "sincos": noise.SinCos(), "roll": noise.SignedRoll(3)}[name]
    whole = [torch.randn(1, 160).to(dtype) for _ in range(3)]
    for first in (0, 1):
        for size in (2, 3, 5, 15, 16, 17, 31, 33, 65, 127):
            x, d, z0 = (t[:, first : first + size] for t in whole)
            around = torch.full((1, size + 2), 7.0, dtype=dtype)
            native.step_fwd(
                [x, d], [0.5, -1.0], z0, source.draw(z0, 1, 4), 0.7, out=around[:, 1:-1]
            )
            exact = 0.5 * x.double() - d.double() + 0.7 * source.at(z0.double(), 1, 4)
            error = (around[:, 1:-1].double() - exact).abs() / (1 + exact.abs())
            assert error.max() < (2**-8 if dtype == BF16 else 2**-10)
            assert around[0, 0] == around[0, -1] == 7.0


@HALVES
@pytest.mark.parametrize("name", ["sincos", "roll"])
def test_backward_into_halves_of_any_length(name, dtype):
    torch.manual_seed(0)
    source = {"sincos": noise.SinCos(0.2, 0.9), "roll": noise.SignedRoll(3)}[name]
    for size in (2, 3, 31, 64, 1025, 2051):
        z0, g, start = (torch.randn(2, size + 1).to(dtype)[:, 1:] for _ in range(3))
        dz0 = start.clone()
        terms, *_ = native.step_bwd(
            g, [g, g], [0.5, -1.25], z0, source.draw(z0, 1, 4), 0.7, dz0=dz0,
            needs_terms=[True, True],
        )  # fmt: skip
        # Halves and quarters of g are rounded once, so torch's own product is the answer.
        same_bits(terms[0], 0.5 * g)
        same_bits(terms[1], (-1.25 * g.float()).to(dtype))
        exact = start.double() + 0.7 * source.transpose(g.double(), z0.double(), 1, 4).z0
        error = (dz0.double() - exact).abs() / (1 + exact.abs())
        assert error.max() < (2**-8 if dtype == BF16 else 2**-10)


@HALVES
@pytest.mark.parametrize("layout", ["dense", "strided"])
@pytest.mark.parametrize("rate", [0.0, 0.3, 10.0, 100.0, 1000.0])
def test_sincos_over_the_whole_range(rate, layout, dtype):
    z0 = torch.linspace(-6, 6, 20001).to(dtype)[None]
    if layout == "strided":
        z0 = z0.repeat_interleave(2, 1)[:, ::2]
    for phase in (0.0, 1.0, -3.0):
        draw = contract.Draw(contract.SINCOS, 3, rate=rate, amplitude=1.0, phase=phase)
        got = native.step_fwd([z0], [0.0], z0, draw, 1.0).double()
        exact = torch.sin(rate * z0.double() + phase)
        # The rounding of the stored result; the sine's own error is far below it.
        unit = 2.0**-8 if dtype == BF16 else 2.0**-11
        bound = unit * exact.abs() + 2e-6 + 4e-7 * (rate * z0.double().abs() + abs(phase))
        assert ((got - exact).abs() <= bound).all()


@HALVES
def test_sincos_beyond_all_phase_stays_small(dtype):
    z0 = torch.tensor([[1e35, -1e30, 2.0**33, 6e4, -5e4, math.inf, math.nan] * 5]).to(dtype)
    draw = contract.Draw(contract.SINCOS, 3, rate=100.0, amplitude=1.0, phase=0.3)
    got = native.step_fwd([z0], [0.0], z0, draw, 1.0)
    finite = z0.isfinite()
    assert (got[finite].double().abs() <= 1 + 4e-5 * z0[finite].double().abs()).all()
    assert got[~finite].isnan().all()
