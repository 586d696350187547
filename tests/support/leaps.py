# SPDX-License-Identifier: Apache-2.0
"""What a leap must do on any backend: the formula in float64, the bits of its states, its inverse.

`test_kernel_leap` and `test_native_leap` run `Leaps` on theirs.
"""

import pytest
import torch
from torch import Tensor

from gradsampler import contract, noise
from gradsampler.noise import philox
from gradsampler.ops.reference import fixed_point
from support.noises import DRAWN
from support.tiers import few, pairs

STEP, STEPS = 7, 20
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
I32, I64 = torch.int32, torch.int64
COEFS = [0.5, -1.25, 0.3, 0.7, -0.2, 1.1, -0.6, 0.35, 0.9, -0.45, 0.15, -0.8]
UNITS = 2.0**18  # of an increment of one
SCALE = 1.37 / UNITS

NOISES = DRAWN | {"given": None}
kinds = pytest.mark.parametrize("kind", NOISES)
integers = pytest.mark.parametrize("integer", [I32, I64], ids=["int32", "int64"])

# The dtypes of two terms, z0, state and model input.
DTYPES = {
    "f64": (F64, F64, F64, F64, F64),
    "f32": (F32, F32, F32, F32, F32),
    "f32 bf16": (F32, BF16, F32, F32, BF16),
    "bf16": (BF16, BF16, BF16, BF16, BF16),
    "f16": (F16, F16, F32, F16, F32),
    "f64 to f32": (F64, F32, F64, F32, F16),
    "f32 to f64": (F32, F16, F32, F64, F32),
}


class Case:
    """A leap with all that it needs, and what it must give."""

    def __init__(
        self,
        device: str,
        shape=(3, 257),
        kind="sincos",
        integer=I32,
        dtypes="f32",
        layout="dense",
        count=2,
        units=UNITS,
    ):
        generator = torch.Generator().manual_seed(0)
        first, second, z_dtype, self.state_dtype, self.model_dtype = DTYPES[dtypes]

        def make(dtype: torch.dtype) -> Tensor:
            x = torch.randn(widened(shape, layout), generator=generator, dtype=F64)
            return laid_out(x.to(device, dtype), layout)

        self.terms = [make(second if k else first) for k in range(count)]
        self.z0 = make(z_dtype)
        start = torch.randint(-(2**28), 2**28, widened(shape, layout), generator=generator)
        self.start = laid_out(start.to(device, integer), layout)
        self.coefs = [units * c for c in COEFS[:count]]
        self.amount = 0.8 * units
        self.draw = None
        if self.z0.numel():
            self.draw = draw_of(kind, self.z0)
        self.kind = kind
        wide = F64 in (first, second, z_dtype, self.state_dtype)
        self.error = (4e-16 if wide else 4e-7) * max(6, count) * units  # of the float increment

    def exact(self) -> Tensor:
        """The increment in float64, not rounded."""
        total = torch.zeros_like(self.z0, dtype=F64)
        for c, x in zip(self.coefs, self.terms, strict=True):
            total = total + c * x.double()
        z0 = self.z0.double()
        n = z0.flip(0) if self.kind == "given" else NOISES[self.kind].at(z0, STEP, STEPS)
        return total + self.amount * n

    def leap(self, leap, carried: Tensor, sign: int, overflow: Tensor | None = None, **options):
        """Calls ``leap``; backwards it is asked for no state."""
        if overflow is None:
            overflow = torch.zeros(1, dtype=I32, device=carried.device)
        settings = {
            "scale": SCALE,
            "out_dtype": self.state_dtype,
            "wants_state": sign > 0,
            "model_scale": 0.37,
            "model_dtype": self.model_dtype,
        }
        return leap(
            carried, self.terms, self.coefs, self.z0, self.draw, self.amount, sign=sign,
            overflow=overflow, **settings | options,
        )  # fmt: skip

    def holds(self, leap, truncates: bool = False, **options) -> Tensor:
        """Goes forward and back; returns the integers in between."""
        carried, start = same_layout(self.start), self.start
        overflow = torch.zeros(1, dtype=I32, device=carried.device)
        state, model = self.leap(leap, carried, 1, overflow, **options)
        there = carried.clone()
        if start.numel():
            off = (there - start).double() - self.exact()
            assert off.abs().max() <= 0.5 + self.error
        want = fixed_point(there, SCALE, self.state_dtype, 0.37, self.model_dtype)
        for got, bits in zip((state, model), want, strict=True):
            same_bits(got, bits, truncates)
        assert self.leap(leap, carried, -1, overflow, **options) == (None, None)
        assert torch.equal(carried, start)
        assert overflow.item() == 0
        return there


def widened(shape, layout):
    if layout == "strided":
        return (*shape[:-1], 2 * shape[-1])
    if layout == "transposed":
        return (*shape[:-2], shape[-1], shape[-2])
    return shape


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "strided":
        return x[..., ::2]
    if layout == "transposed":
        return x.transpose(-1, -2)
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    return x


def same_layout(x: Tensor) -> Tensor:
    """A copy with the strides of ``x``, gaps included."""
    copy = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return copy.copy_(x)


def draw_of(kind: str, z0: Tensor):
    if kind == "given":
        return contract.Draw(contract.GIVEN, STEP, given=z0.flip(0))
    return NOISES[kind].draw(z0, STEP, STEPS)


def same_bits(got: Tensor, want: Tensor, truncates: bool) -> None:
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    if truncates and BF16 in (got.dtype, want.dtype):  # twice, if the state was bfloat16 as well
        torch.testing.assert_close(got, want, rtol=2**-6, atol=0)
    else:
        assert torch.equal(got, want)


class Leaps:
    """The tests that every backend passes: fixtures give its ``leap``, the ``device`` and whether
    it ``truncates`` to bfloat16.
    """

    @integers
    @kinds
    def test_forward_is_the_formula_and_back_is_exact(self, leap, device, truncates, kind, integer):
        Case(device, kind=kind, integer=integer, dtypes="f32 bf16").holds(leap, truncates)

    @integers
    @pytest.mark.parametrize("kind", ["off", "philox+sincos"])
    @pytest.mark.parametrize("dtypes", DTYPES)
    def test_every_mix_of_dtypes(self, leap, device, truncates, dtypes, kind, integer):
        Case(device, kind=kind, integer=integer, dtypes=dtypes).holds(leap, truncates)

    @pairs(kind=NOISES, shape=[(0, 4), (3, 0), (1, 2), (3, 1, 2), (1, 255), (2, 1025), (5, 7)])
    def test_ragged_shapes(self, leap, device, kind, shape):
        Case(device, shape, kind).holds(leap)
        Case(device, shape, kind, I64, "f64").holds(leap)

    @pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
    def test_a_state_of_one_element(self, leap, device, shape):
        Case(device, shape).holds(leap)

    @integers
    @pytest.mark.parametrize("count", [1, 2, 3, 6, contract.MAX_TERMS])
    def test_any_number_of_terms(self, leap, device, count, integer):
        Case(device, count=count, integer=integer).holds(leap)
        Case(device, count=count, integer=integer, dtypes="f64").holds(leap)

    @integers
    @pytest.mark.parametrize(
        "layout", few(["transposed", "strided", "channels_last"], "transposed")
    )
    @pytest.mark.parametrize("kind", ["sincos", "mixture", "given"])
    def test_strides(self, leap, device, truncates, kind, layout, integer):
        case = Case(device, (2, 3, 37, 5), kind, integer, "f32 bf16", layout)
        there = case.holds(leap, truncates)
        # In another order the very same: a replayed model need not return the same strides.
        case.terms = [x.contiguous() for x in case.terms]
        case.leap(leap, there, -1)
        assert torch.equal(there, case.start)

    @pytest.mark.parametrize("kind", ["off", "signed_roll"])
    def test_integers_that_overlap_nothing_else_are_left_alone(self, leap, device, kind):
        case = Case(device, (2, 3, 40), kind)
        around = torch.full((2, 3, 80), 5, dtype=I32, device=device)
        around[..., ::2] = case.start
        case.leap(leap, around[..., ::2], 1)
        assert (around[..., 1::2] == 5).all()
        assert not torch.equal(around[..., ::2], case.start)

    def test_long_integers_hold_more_than_a_float(self, leap, device):
        for dtypes in ("f32", "f64"):
            case = Case(device, integer=I64, dtypes=dtypes, units=2.0**58)
            case.start = case.start << 30
            case.holds(leap)

    @integers
    @pytest.mark.parametrize("dtype", [F32, F64], ids=["f32", "f64"])
    def test_halves_go_to_the_even_number(self, leap, device, dtype, integer):
        edge = 2.0**23
        x = [
            0.0,
            0.5,
            1.5,
            2.5,
            0.49999997,
            edge - 0.5,
            edge - 1.5,
            edge,
            edge + 1,
            2 * edge + 2,
            1e-40,
        ]
        x = torch.tensor([x, [-v for v in x]], dtype=dtype, device=device)
        carried = torch.zeros(x.shape, dtype=integer, device=device)
        overflow = torch.zeros(1, dtype=I32, device=device)
        leap(carried, [x], [1.0], sign=1, scale=1.0, overflow=overflow, out_dtype=dtype)
        assert torch.equal(carried, x.cpu().double().round().to(device, integer))

    @integers
    @pytest.mark.parametrize("dtype", [F32, F64], ids=["f32", "f64"])
    def test_what_leaves_the_range_is_flagged_and_undone(self, leap, device, dtype, integer):
        limit = 2 ** (8 * integer.itemsize - 2)
        top, past = float(limit), float(limit) * (1 + 2**-20)
        cases = [  # before, increment, after, flag
            (0, top, limit, 0),
            (0, -top, -limit, 0),
            (5, past, 5, 1),
            (5, -past, 5, 1),
            (5, torch.inf, 5, 1),
            (5, -torch.inf, 5, 1),
            (5, torch.nan, 5, 1),
            (limit, 1.0, limit + 1, 1),
            (-limit, -1.0, -limit - 1, 1),
            (limit, top, -2 * limit, 1),  # wraps, and back
            (limit, -1.0, limit - 1, 0),
        ]
        for before, by, after, flag in cases:
            carried = torch.full((2, 301), 3, dtype=integer, device=device)
            x = torch.ones(2, 301, dtype=dtype, device=device)
            carried[1, 299], x[1, 299] = before, by
            start = carried.clone()
            for sign in (1, -1):
                overflow = torch.zeros(1, dtype=I32, device=device)
                leap(carried, [x], [1.0], sign=sign, scale=1.0, overflow=overflow, out_dtype=dtype)
                if sign > 0:
                    assert (carried[1, 299].item(), overflow.item()) == (after, flag), (before, by)
                    assert (carried == 4).sum() == 601
            assert torch.equal(carried, start)

    def test_a_flag_stays_up(self, leap, device):
        overflow = torch.ones(1, dtype=I32, device=device)
        case = Case(device)
        case.leap(leap, case.start, 1, overflow)
        assert overflow.item() == 1

    def test_noise_beyond_the_end_raises_no_flag(self, leap, device):
        def sizes(seed):
            return philox.normals(128, STEP, seed, F64, torch.device("cpu")).abs()

        seed = next(seed for seed in range(99) if sizes(seed)[3:].max() > 2 * sizes(seed)[:3].max())
        amount = 2**30 / (1.5 * sizes(seed)[:3].max().item())  # too much for some element behind
        carried, zero = (torch.zeros(1, 3, dtype=t, device=device) for t in (I32, F32))
        overflow = torch.zeros(1, dtype=I32, device=device)
        draw = noise.Philox(seed).draw(zero, STEP, STEPS)
        leap(carried, [zero], [1.0], zero, draw, amount, sign=1, scale=1.0, overflow=overflow,
             out_dtype=F32)  # fmt: skip
        assert overflow.item() == 0

    def test_one_double_makes_the_increment_double(self, leap, device):
        """In both directions, whatever is asked for: also a z0 that nothing is drawn from."""
        for wide in ("out", "z0", "term", "given"):
            x = torch.full((2, 9), 1 / 3, dtype=F64 if wide == "term" else F32, device=device)
            z0 = torch.ones(2, 9, dtype=F64 if wide == "z0" else F32, device=device)
            given = torch.zeros(2, 9, dtype=F64, device=device) if wide == "given" else None
            draw = None if given is None else contract.Draw(contract.GIVEN, 0, given=given)
            carried = torch.zeros(2, 9, dtype=I64, device=device)
            overflow = torch.zeros(1, dtype=I32, device=device)
            settings = {
                "out_dtype": F64 if wide == "out" else F32,
                "overflow": overflow,
                "scale": 1.0,
            }
            leap(carried, [x], [2.0**40 / 7], z0, draw, 1.0, sign=1, **settings)
            exact = (x.double() * (2.0**40 / 7)).round().to(I64)
            assert torch.equal(carried, exact)
            leap(carried, [x], [2.0**40 / 7], z0, draw, 1.0, sign=-1, wants_state=False, **settings)
            assert not carried.any()

    def test_without_a_model_input_and_without_noise(self, leap, device):
        case = Case(device, kind="off")
        state, model = case.leap(leap, case.start, 1, model_scale=None)
        assert model is None
        assert torch.equal(state, fixed_point(case.start, SCALE, F32)[0])
