# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of a step and of its transpose, against the formula in float64.

Without a GPU the interpreter runs the very same kernels on CPU tensors. Every output starts out as
NaN, so that an element that no program wrote shows.
"""

import importlib.util
import os
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    pytest.skip("the kernels need triton", allow_module_level=True)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # triton decides when it is imported
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from gradsampler import contract, noise  # noqa: E402
from gradsampler.kernels import adjoint, step  # noqa: E402
from gradsampler.kernels.philox import philox4x32, short_normals  # noqa: E402
from gradsampler.kernels.sincos import wave, wave_short  # noqa: E402
from gradsampler.noise import philox  # noqa: E402
from support.noises import DRAWN  # noqa: E402
from support.tiers import few, pairs  # noqa: E402

INTERPRETED = DEVICE == "cpu"
assert isinstance(tl.zeros, triton.JITFunction) != INTERPRETED, (
    "something imported triton before TRITON_INTERPRET=1 was set"
)

# Relative to the largest value of the oracle. The interpreter cuts bfloat16 off where a GPU rounds,
# which doubles its half ulp of 2^-9.
TOLERANCE = {
    torch.float64: 2e-14,
    torch.float32: 1e-6,
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda d: str(d)[6:])
STEP, STEPS = 7, 20
KINDS = pytest.mark.parametrize("kind", DRAWN)


@pytest.fixture(autouse=True)
def poisoned():
    # This mode fills what torch.empty returns with NaN.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).to(DEVICE)


def columns(c, x: Tensor):
    """A coefficient as a float64 that multiplies [B, *state]."""
    if not isinstance(c, Tensor):
        return c
    c = c.to(torch.float64)
    return c.view(-1, *[1] * (x.ndim - 1)) if c.ndim == 1 and c.numel() > 1 else c


def oracle(terms, coefs, z0, source, noise_coef, clamp=None) -> Tensor:
    """The formula in float64, from the rounded inputs."""
    terms = [x.double() for x in terms]
    if isinstance(coefs, Tensor):
        coefs = coefs.unbind(-1)
    out = sum(columns(c, x) * x for c, x in zip(coefs, terms, strict=True))
    if clamp is not None:
        out = out.clamp(*clamp)
    if source is not None:
        out = out + columns(noise_coef, out) * source.at(z0.double(), STEP, STEPS)
    return out


def close(got: Tensor, want: Tensor, dtype: torch.dtype | None = None, factor: float = 1.0):
    error = (got.double() - want).abs().max().item() if want.numel() else 0.0
    scale = max(want.abs().max().item(), 1.0) if want.numel() else 1.0
    assert got.shape == want.shape
    assert error <= factor * TOLERANCE[dtype or got.dtype] * scale


# ---- forward ----


@KINDS
@DTYPES
def test_forward_is_the_formula(kind, dtype):
    terms, z0 = [randn(3, 257, dtype=dtype) for _ in range(2)], randn(3, 257, dtype=dtype)
    source = DRAWN[kind]
    got = step.step_fwd(terms, [0.5, -0.25], z0, source.draw(z0, STEP, STEPS), 0.8)
    assert got.dtype == dtype
    close(got, oracle(terms, [0.5, -0.25], z0, source, 0.8))


@pairs(
    kind=DRAWN,
    shape=[(0, 4), (1, 2), (3, 1, 2), (1, 255), (2, 3, 5, 7), (1, 4096)],
    block=[128, 2048],
)
def test_ragged_shapes_and_block_sizes(kind, shape, block):
    terms, z0 = [randn(*shape)], randn(*shape)
    source = DRAWN[kind]
    draw = DRAWN[kind].draw(torch.zeros(1, *shape[1:]), STEP, STEPS)
    got = step.step_fwd(terms, [0.5], z0, draw, 0.8, block=block)
    if shape[0]:
        close(got, oracle(terms, [0.5], z0, source, 0.8))
    else:
        assert got.shape == shape


@pytest.mark.parametrize("size", [1, 16, 255, 257, 1024, 1040])
@pytest.mark.parametrize("terms", [1, contract.MAX_TERMS])
def test_every_kind_of_mask(size, terms):
    xs = [randn(1, size) for _ in range(terms)]
    coefs = [0.3 * (k + 1) for k in range(terms)]
    z0 = randn(1, size)
    for source in (noise.SinCos(), noise.Philox(1)):
        draw = source.draw(z0, STEP, STEPS)
        close(
            step.step_fwd(xs, coefs, z0, draw, 0.8, block=256), oracle(xs, coefs, z0, source, 0.8)
        )


def test_dtypes_mix():
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    terms = [randn(2, 33, dtype=d) for d in dtypes]
    z0 = randn(2, 33, dtype=torch.float16)
    draw = noise.SinCos().draw(z0, STEP, STEPS)
    want = oracle(terms, [0.5, 1.0, 2.0], z0, noise.SinCos(), 0.8)
    for out in (torch.float64, torch.float32, torch.bfloat16):
        got = step.step_fwd(terms, [0.5, 1.0, 2.0], z0, draw, 0.8, out_dtype=out)
        assert got.dtype == out
        close(got, want)
    # One float64 input makes the arithmetic float64.
    terms[0] = terms[0].double()
    got = step.step_fwd(terms, [0.5, 1.0, 2.0], z0, draw, 0.8)
    close(got, oracle(terms, [0.5, 1.0, 2.0], z0, noise.SinCos(), 0.8))


@KINDS
def test_strides(kind):
    source = DRAWN[kind]
    base = [randn(2, 6, 5, 3) for _ in range(3)]
    views = {
        "transposed": [x.transpose(1, 3) for x in base],
        "channels last": [x.contiguous(memory_format=torch.channels_last) for x in base],
        "mixed": [base[0], base[1].flip(0).contiguous(), base[2].transpose(1, 3).transpose(1, 3)],
        "sliced": [x[:, ::2] for x in base],
        "expanded": [x[:, :1].expand(-1, 4, -1, -1) for x in base],
    }  # fmt: skip
    for x, d, z0 in views.values():
        got = step.step_fwd([x, d], [0.5, -0.25], z0, source.draw(z0, STEP, STEPS), 0.8)
        want = oracle([x, d], [0.5, -0.25], z0, source, 0.8)
        close(got, want)
        # A result of other strides is written through as well.
        out = torch.full_like(want.transpose(1, 2).contiguous(), torch.nan, dtype=torch.float32)
        out = out.transpose(1, 2)
        same = step.step_fwd([x, d], [0.5, -0.25], z0, source.draw(z0, STEP, STEPS), 0.8, out=out)
        assert same is out
        close(out, want)


def test_elementwise_kernels_keep_a_shared_dense_order():
    x = randn(2, 6, 5, 3).contiguous(memory_format=torch.channels_last)
    got = step.step_fwd([x], [2.0])
    assert got.stride() == x.stride()
    assert torch.equal(got, 2 * x)


def test_out_is_written_in_place():
    x, out = randn(2, 9), torch.full((2, 9), torch.nan, device=DEVICE)
    assert step.step_fwd([x], [2.0], out=out) is out
    assert torch.equal(out, 2 * x)
    step.step_fwd([x], [2.0], out=x)  # the state may be overwritten by the next one
    assert torch.equal(out, x)


@pytest.mark.parametrize("kind", ["sincos", "signed_roll", "philox"])
@pytest.mark.parametrize("shape", few([((3, 10),), ((2, 256),)], ((3, 10),)))
def test_coefficients_as_tensors(kind, shape):
    terms, z0 = [randn(*shape), randn(*shape)], randn(*shape)
    source, draw = DRAWN[kind], DRAWN[kind].draw(z0, STEP, STEPS)
    for coefs in (randn(2), randn(shape[0], 2), randn(shape[0], 2, dtype=torch.float64)):
        for amount in (randn(), randn(1), randn(shape[0], dtype=torch.float64), 0.8):
            got = step.step_fwd(terms, coefs, z0, draw, amount)
            close(got, oracle(terms, coefs, z0, source, amount))


def test_clamp_comes_before_the_noise_and_keeps_nan():
    x, z0 = randn(2, 40), randn(2, 40)
    x[0, 3] = torch.nan
    draw = noise.SinCos().draw(z0, STEP, STEPS)
    got = step.step_fwd([x], [3.0], z0, draw, 0.8, clamp=(-1.0, 0.5))
    want = oracle([x], [3.0], z0, noise.SinCos(), 0.8, clamp=(-1.0, 0.5))
    assert got.isnan().equal(want.isnan())
    close(got.nan_to_num(), want.nan_to_num())


def test_second_output_is_the_scaled_and_cast_result():
    x, d, z0 = randn(2, 100), randn(2, 100, dtype=torch.bfloat16), randn(2, 100)
    draw = noise.SignedRoll(1).draw(z0, STEP, STEPS)
    got, model_in = step.step_fwd(
        [x, d], [0.5, 0.5], z0, draw, 0.8, model_scale=0.25, model_dtype=torch.bfloat16
    )
    want = oracle([x, d], [0.5, 0.5], z0, noise.SignedRoll(1), 0.8)
    assert model_in.dtype == torch.bfloat16
    close(got, want)
    close(model_in, 0.25 * want)


def test_given_noise():
    x, n = randn(2, 100), randn(2, 100, dtype=torch.float16)
    draw = contract.Draw(contract.GIVEN, STEP, weight=0.5, given=n)
    close(step.step_fwd([x], [0.5], None, draw, 0.8), 0.5 * x.double() + 0.4 * n.double())


# ---- backward ----


def gradients(g, terms, coefs, z0, source, noise_coef, clamp=None):
    """(dterms, dcoefs, dz0, dnoise_coef) of the oracle."""
    leaves = [x.detach().double().requires_grad_() for x in terms]
    z0 = z0.detach().double().requires_grad_()
    coefs = torch.as_tensor(coefs, dtype=torch.float64, device=DEVICE).requires_grad_()
    amount = torch.as_tensor(noise_coef, dtype=torch.float64, device=DEVICE).requires_grad_()
    out = oracle(leaves, coefs, z0, source, amount, clamp)
    found = torch.autograd.grad(out, [*leaves, coefs, z0, amount], g.double(), allow_unused=True)
    return found[: len(leaves)], *found[len(leaves) :]


@KINDS
@DTYPES
def test_backward_is_the_transpose(kind, dtype):
    terms, z0 = [randn(3, 130, dtype=dtype) for _ in range(2)], randn(3, 130, dtype=dtype)
    g, start = randn(3, 130, dtype=dtype), randn(3, 130, dtype=dtype)
    source, coefs, dz0 = DRAWN[kind], [0.5, -0.25], start.clone()
    got = step.step_bwd(
        g, terms, coefs, z0, source.draw(z0, STEP, STEPS), 0.8, dz0=dz0,
        needs_terms=[True, True], needs_coefs=True, needs_noise_coef=True,
    )  # fmt: skip
    dterms, dcoefs, want_dz0, damount = gradients(g, terms, coefs, z0, source, 0.8)
    for mine, want in zip(got.terms, dterms, strict=True):
        assert mine.dtype == dtype
        close(mine, want)
    close(dz0, start.double() + (0 if want_dz0 is None else want_dz0))
    # Sums of 390 products in the compute type.
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    close(got.coefs, dcoefs, compute, 10)
    close(got.noise_coef, damount, compute, 10)


def test_backward_of_the_most_terms():
    count = contract.MAX_TERMS
    terms, coefs = [randn(2, 130) for _ in range(count)], [0.3 * (k - 4) for k in range(count)]
    g, z0, dz0, source = (
        randn(2, 130),
        randn(2, 130),
        torch.zeros(2, 130, device=DEVICE),
        noise.SinCos(),
    )
    bounds = (-4.0, 4.0)
    got = step.step_bwd(
        g, terms, coefs, z0, source.draw(z0, STEP, STEPS), 0.8, dz0=dz0, clamp=bounds,
        needs_terms=[True] * count, needs_coefs=True, needs_noise_coef=True,
    )  # fmt: skip
    want, dcoefs, want_dz0, damount = gradients(g, terms, coefs, z0, source, 0.8, bounds)
    for mine, each in zip(got.terms, want, strict=True):
        close(mine, each)
    close(dz0, want_dz0)
    close(got.coefs, dcoefs, torch.float32, 10)
    close(got.noise_coef, damount, torch.float32, 10)


@pytest.mark.parametrize("kind", ["sincos", "signed_roll", "mixture"])
@pytest.mark.parametrize("size", [2, 16, 255, 1040])
@pytest.mark.parametrize("block", [128, 1024])
def test_backward_of_ragged_sizes(kind, size, block):
    x, z0, g = randn(2, size), randn(2, size), randn(2, size)
    dz0, source = torch.zeros_like(z0), DRAWN[kind]
    got = step.step_bwd(g, [x], [0.5], z0, source.draw(z0, STEP, STEPS), 0.8, dz0=dz0,
                        needs_terms=[True], needs_coefs=True, block=block)  # fmt: skip
    dterms, dcoefs, want_dz0, _ = gradients(g, [x], [0.5], z0, source, 0.8)
    close(got.terms[0], dterms[0])
    close(dz0, want_dz0)
    close(got.coefs, dcoefs, torch.float32, 30)


@pytest.mark.parametrize("kind", ["sincos", "signed_roll"])
@pytest.mark.parametrize("layout", ["expanded", "scalar", "transposed", "sliced"])
def test_cotangents_and_buffers_of_any_strides(kind, layout):
    x, z0 = randn(2, 6, 4), randn(2, 6, 4)
    g = {
        "expanded": randn(2, 1, 4).expand(2, 6, 4),
        "scalar": randn().expand(2, 6, 4),
        "transposed": randn(2, 4, 6).transpose(1, 2),
        "sliced": randn(2, 12, 4)[:, ::2],
    }[layout]
    buffer = randn(4, 6, 2).permute(2, 1, 0)
    start, source = buffer.clone(), DRAWN[kind]
    got = step.step_bwd(g, [x], [0.5], z0, source.draw(z0, STEP, STEPS), 0.8, dz0=buffer,
                        needs_terms=[True])  # fmt: skip
    dterms, _, dz0, _ = gradients(g, [x], [0.5], z0, source, 0.8)
    close(got.terms[0], dterms[0])
    close(buffer, start.double() + dz0)


@pytest.mark.parametrize("needs", range(16))
def test_only_what_is_needed(needs):
    first, second, coefs, amount = (bool(needs >> k & 1) for k in range(4))
    x, d, z0, g = (randn(2, 50) for _ in range(4))
    source = noise.SinCos()
    got = step.step_bwd(g, [x, d], [0.5, 0.25], z0, source.draw(z0, STEP, STEPS), 0.8,
                        needs_terms=[first, second], needs_coefs=coefs,
                        needs_noise_coef=amount)  # fmt: skip
    dterms, dcoefs, _, damount = gradients(g, [x, d], [0.5, 0.25], z0, source, 0.8)
    for need, mine, want in (
        (first, got.terms[0], dterms[0]),
        (second, got.terms[1], dterms[1]),
        (coefs, got.coefs, dcoefs),
        (amount, got.noise_coef, damount),
    ):
        assert (mine is not None) == need
        if need:
            close(mine, want, torch.float32, 5)
    assert got.given is None


@pytest.mark.parametrize("kind", ["off", "philox", "signed_roll"])
def test_gradients_of_coefficients_of_each_sample(kind):
    terms, z0, g = [randn(3, 300), randn(3, 300)], randn(3, 300), randn(3, 300)
    coefs, amount, source = randn(3, 2), randn(3), DRAWN[kind]
    draw, needs = source.draw(z0, STEP, STEPS), [True, False]
    got = step.step_bwd(g, terms, coefs, z0, draw, amount, needs_terms=needs, needs_coefs=True,
                        needs_noise_coef=True, block=128)  # fmt: skip
    dterms, dcoefs, _, damount = gradients(g, terms, coefs, z0, source, amount)
    close(got.terms[0], dterms[0])
    close(got.coefs, dcoefs, torch.float32, 10)
    close(got.noise_coef, damount, torch.float32, 10)
    again = step.step_bwd(g, terms, coefs, z0, draw, amount, needs_terms=needs, needs_coefs=True,
                          needs_noise_coef=True, block=128)  # fmt: skip
    assert torch.equal(got.coefs, again.coefs)
    assert torch.equal(got.noise_coef, again.noise_coef)


def test_clamp_masks_the_terms_and_not_the_noise():
    x, z0, g = randn(2, 60), randn(2, 60), randn(2, 60)
    x[0, 0], x[0, 1] = 0.25, 0.5  # on the bound itself, and beyond it
    dz0, source = torch.zeros_like(z0), noise.SinCos()
    got = step.step_bwd(g, [x], [2.0], z0, source.draw(z0, STEP, STEPS), 0.8, dz0=dz0,
                        needs_terms=[True], needs_coefs=True, clamp=(-0.5, 0.5))  # fmt: skip
    dterms, dcoefs, want, _ = gradients(g, [x], [2.0], z0, source, 0.8, (-0.5, 0.5))
    close(got.terms[0], dterms[0])
    close(dz0, want)
    close(got.coefs, dcoefs, torch.float32, 5)


def test_cotangent_of_given_noise():
    x, n, g = randn(2, 30), randn(2, 30, dtype=torch.float16), randn(2, 30)
    draw = contract.Draw(contract.GIVEN, STEP, weight=0.5, given=n)
    got = step.step_bwd(g, [x], [0.5], None, draw, 0.8, needs_terms=[False], needs_given=True)
    assert got.given.dtype == torch.float16
    close(got.given, 0.4 * g.double())


class Step(torch.autograd.Function):
    """The two kernels under autograd."""

    @staticmethod
    def forward(ctx, coefs, amount, z0, draw, *terms):
        ctx.draw = draw
        ctx.save_for_backward(coefs, amount, z0, *terms)
        return step.step_fwd(terms, coefs, z0, draw, amount)

    @staticmethod
    def backward(ctx, g):
        coefs, amount, z0, *terms = ctx.saved_tensors
        dz0 = torch.zeros_like(z0)
        got = step.step_bwd(g, terms, coefs, z0, ctx.draw, amount, dz0=dz0, needs_coefs=True,
                            needs_terms=[True] * len(terms), needs_noise_coef=True)  # fmt: skip
        return got.coefs, got.noise_coef, dz0, None, *got.terms


@pytest.mark.parametrize(
    ("kind", "per_sample"), few(list(product(DRAWN, (False, True))), ("sincos", False))
)
def test_gradcheck_in_float64(kind, per_sample):
    x, d, z0 = (randn(2, 3, dtype=torch.float64).requires_grad_() for _ in range(3))
    coefs = randn(*(2, 2) if per_sample else (2,), dtype=torch.float64).requires_grad_()
    amount = randn(*(2,) if per_sample else (), dtype=torch.float64).requires_grad_()
    draw = DRAWN[kind].draw(z0, STEP, STEPS)
    assert torch.autograd.gradcheck(
        lambda *a: Step.apply(*a[:3], draw, *a[3:]), (coefs, amount, z0, x, d)
    )


# ---- the fused form of a transposed run ----


@pytest.mark.parametrize("kind", ["off", "sincos", "signed_roll", "mixture"])
@DTYPES
def test_adjoint_step_is_three_steps_at_once(kind, dtype):
    lams, g = [randn(2, 301, dtype=dtype) for _ in range(2)], randn(2, 301, dtype=dtype)
    z0, start = randn(2, 301, dtype=dtype), randn(2, 301, dtype=dtype)
    dz0, source = start.clone(), DRAWN[kind]
    lam, mu = adjoint.adjoint_step(
        lams, [0.5, -1.0], g, 0.25, [2.0, 0.0, 0.75], z0, source.draw(z0, STEP, STEPS), 0.8, dz0
    )
    want = 0.5 * lams[0].double() - lams[1].double() + 0.25 * g.double()
    close(lam, want)
    close(mu, 2 * lams[0].double() + 0.75 * want)
    pulled = source.transpose(want, z0.double(), STEP, STEPS).z0
    close(dz0, start.double() + (0 if pulled is None else 0.8 * pulled))


def test_adjoint_step_of_the_most_terms():
    count, source = contract.MAX_TERMS - 1, noise.SignedRoll(2**63 + 5)
    lams, g, z0 = [randn(2, 301) for _ in range(count)], randn(2, 301), randn(2, 301)
    a, b = ([0.2 * (k - c) for k in range(count + 1)] for c in (3, 7))
    dz0 = torch.zeros(2, 301, device=DEVICE)
    draw = source.draw(z0, STEP, STEPS)
    lam, mu = adjoint.adjoint_step(lams, a[:-1], g, a[-1], b, z0, draw, 0.8, dz0)
    want = sum(c * x.double() for c, x in zip(a, [*lams, g], strict=True))
    close(lam, want)
    close(mu, sum(c * x.double() for c, x in zip(b, lams, strict=False)) + b[-1] * want)
    close(dz0, 0.8 * source.transpose(want, z0.double(), STEP, STEPS).z0)


def test_adjoint_step_without_its_options():
    x, g = randn(2, 70), randn(2, 70, dtype=torch.bfloat16)
    lam, mu = adjoint.adjoint_step([], [], g, 0.5, None, lam_dtype=torch.float32)
    assert (lam.dtype, mu) == (torch.float32, None)
    close(lam, 0.5 * g.double())
    lam, mu = adjoint.adjoint_step([x], [0.5], None, 1.0, [0.0, 2.0], mu_dtype=torch.bfloat16)
    close(lam, 0.5 * x.double())
    assert mu.dtype == torch.bfloat16
    close(mu, x.double())
    lam, mu = adjoint.adjoint_step([x], [0.5], g, 2.0, [0.0, 1.0])
    assert (lam.dtype, mu.dtype) == (torch.float32, torch.bfloat16)


def test_adjoint_step_with_strides_and_tensors():
    x, g = randn(2, 5, 6).transpose(1, 2), randn(2, 6, 1).expand(2, 6, 5)
    a, b, scale, amount = randn(2, 1), randn(2, 2), randn(2), randn(2)
    z0, buffer = randn(2, 6, 5), randn(2, 5, 6).transpose(1, 2)
    start, source = buffer.clone(), noise.SinCos()
    lam, mu = adjoint.adjoint_step(
        [x], a, g, scale, b, z0, source.draw(z0, STEP, STEPS), amount, buffer
    )
    a, b, scale, amount = (c.double()[:, None, None] for c in (a, b, scale, amount))
    want = a[..., 0] * x.double() + scale * g.double()
    close(lam, want)
    close(mu, b[..., 0] * x.double() + b[..., 1] * want)
    close(buffer, start.double() + source.transpose(amount * want, z0.double(), STEP, STEPS).z0)


# ---- device functions ----


@triton.jit
def philox_kernel(counters, keys, out):
    at = tl.arange(0, 4)
    c0 = tl.load(counters + at * 4).to(tl.uint32)
    c1 = tl.load(counters + at * 4 + 1).to(tl.uint32)
    c2 = tl.load(counters + at * 4 + 2).to(tl.uint32)
    c3 = tl.load(counters + at * 4 + 3).to(tl.uint32)
    k0 = tl.load(keys + at * 2).to(tl.uint32)
    k1 = tl.load(keys + at * 2 + 1).to(tl.uint32)
    w0, w1, w2, w3 = philox4x32(c0, c1, c2, c3, k0, k1)
    tl.store(out + at * 4, w0.to(tl.int64))
    tl.store(out + at * 4 + 1, w1.to(tl.int64))
    tl.store(out + at * 4 + 2, w2.to(tl.int64))
    tl.store(out + at * 4 + 3, w3.to(tl.int64))


def test_philox_known_answers():
    ones = 0xFFFFFFFF
    counters = [
        [0] * 4,
        [ones] * 4,
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [1, 2, 3, 4],
    ]
    keys = [[0, 0], [ones, ones], [0xA4093822, 0x299F31D0], [5, 6]]
    known = [
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ]
    out = torch.zeros(4, 4, dtype=torch.int64, device=DEVICE)
    philox_kernel[(1,)](
        torch.tensor(counters, device=DEVICE), torch.tensor(keys, device=DEVICE), out
    )
    assert out[:3].tolist() == known
    words = philox.philox4x32(tuple(torch.tensor(c) for c in counters[3]), 5 + (6 << 32))
    assert out[3].tolist() == [int(w) for w in words]


@pytest.mark.parametrize("shape", [(3, 2), (2, 129), (2, 1000)])
def test_signs_and_rolls_are_exact_for_any_block_size(shape):
    z0, zero = randn(*shape), torch.zeros(shape, device=DEVICE)
    source = noise.SignedRoll(seed=2**64 - 1)
    for index in range(3):
        draw = source.draw(z0, index, STEPS)
        for block in (128, 1024):
            got = step.step_fwd([zero], [0.0], z0, draw, 1.0, block=block)
            assert torch.equal(got, source.at(z0, index, STEPS))


def test_every_roll_wraps_right():
    z0, zero = randn(2, 300), torch.zeros(2, 300, device=DEVICE)
    signs = philox.signs(2, 300, 4, 9, torch.device(DEVICE))
    for offset in (1, 2, 127, 128, 129, 256, 298, 299):
        draw = contract.Draw(contract.SIGNED_ROLL, 4, seed=9, offset=offset)
        got = step.step_fwd([zero], [0.0], z0, draw, 1.0, block=128)
        assert torch.equal(got, signs * z0.roll(offset, 1))
        dz0 = torch.zeros_like(z0)
        step.step_bwd(z0, [zero], [0.0], z0, draw, 1.0, dz0=dz0, needs_terms=[False], block=128)
        assert torch.equal(dz0, (signs * z0).roll(-offset, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_normals_are_the_same_for_any_block_size_and_tiling(dtype):
    zero = torch.zeros(3, 333, dtype=dtype, device=DEVICE)
    want = philox.normals(999, 5, 2**40 + 1, dtype, torch.device(DEVICE)).view(3, 333)
    draw = contract.Draw(contract.OFF, 5, normal=1.0, normal_seed=2**40 + 1)
    whole, *others = [
        *(step.step_fwd([zero], [0.0], None, draw, 1.0, block=b) for b in (128, 256, 2048)),
        # Coefficients of each sample make tiles that start between two Philox blocks.
        step.step_fwd([zero], torch.zeros(3, 1, device=DEVICE), None, draw, 1.0),
    ]
    for other in others:
        assert torch.equal(whole, other)
    # The reference's float32 angle is off by 4e-7 itself, times a radius of up to 4.
    close(whole, want.double(), dtype, 4 if dtype == torch.float32 else 1)


def test_normals_are_accurate_in_float32():
    zero = torch.zeros(1, 20000, device=DEVICE)
    draw = contract.Draw(contract.OFF, 1, normal=1.0, normal_seed=3)
    got = step.step_fwd([zero], [0.0], None, draw, 1.0, block=4096)
    want = philox.normals(20000, 1, 3, torch.float64, torch.device(DEVICE))
    assert (got.double() - want).abs().max() < 1e-6
    small = want.abs() < 0.01  # where an absolute error of the logarithm would show
    assert (got.double() - want).abs()[0, small].max() < 1e-7


@triton.jit
def short_normals_kernel(out, step, k0, k1, first, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, short_normals(tl.full((), first, tl.int64), step, k0, k1, BLOCK))


@pytest.mark.parametrize(
    "first", [0, 4, 2**34 - 1024], ids=["", "half a run", "into the high word"]
)
def test_short_normals_are_those_of_the_definition(first):
    out = torch.full((2048,), torch.nan, device=DEVICE)
    short_normals_kernel[(1,)](out, 3, 7, 9, first, BLOCK=2048)
    index = torch.arange(first // 4, first // 4 + 512)
    counter = (index & 0xFFFFFFFF, index >> 32, torch.full_like(index, 3), torch.zeros_like(index))
    words = philox.philox4x32(counter, 7 + (9 << 32))
    u, angle = (torch.stack(words[k::2]).T.double() * 2.0**-32 for k in (0, 1))
    radius = torch.sqrt(-2 * torch.log(u + 2.0**-33))
    turn = 2 * np.pi * angle
    want = torch.stack([radius * torch.cos(turn), radius * torch.sin(turn)], -1).view(-1)
    error = (out.cpu().double() - want).abs()
    # The hardware's logarithm is absolutely accurate, which shows in the smallest radii alone.
    assert error.max() < 6e-4
    assert error.median() < 1e-6


@triton.jit
def short_wave_kernel(z, out, rate, phase, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, wave_short(tl.load(z + at), tl.full((), rate, tl.float32), phase))


@pytest.mark.parametrize("rate", [0.0, 3.0, 250.0])
@pytest.mark.parametrize("phase", [0.0, 0.7, -1.0])
def test_the_short_sine_has_what_16_bits_need(rate, phase):
    z = torch.linspace(-4, 4, 4096, device=DEVICE)
    out = torch.full_like(z, torch.nan)
    short_wave_kernel[(2,)](z, out, rate / np.pi, phase, BLOCK=2048)
    argument = rate * z.double() + np.pi * phase
    assert ((out.double() - torch.sin(argument)).abs() < 2e-6 + 4e-7 * argument.abs()).all()


@triton.jit
def wave_kernel(z, out, rate, rate_low, phase, COMPUTE: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    full_rate = tl.full((), rate, COMPUTE)
    low = tl.full((), rate_low, COMPUTE)
    x = wave(tl.load(z + at).to(COMPUTE), full_rate, low, tl.full((), phase, COMPUTE), COMPUTE)
    tl.store(out + at, x)


@pytest.fixture
def fused(monkeypatch):
    """Makes the interpreter's fused multiply-add round once, as every GPU does."""
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    def create_fma(self, x, y, z):
        wide = x.data.astype(np.longdouble) * y.data.astype(np.longdouble) + z.data
        return interpreter.TensorHandle(wide.astype(z.data.dtype), z.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_fma", create_fma)


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("rate", [0.0, 0.1, 3.0, 100.0, 250.0])
@pytest.mark.parametrize("phase", [0.0, 0.7, -1.0])
def test_sine_is_accurate_for_arguments_up_to_a_thousand(rate, phase):
    z = torch.linspace(-4, 4, 4096, device=DEVICE)
    turns = rate / np.pi
    high = float(np.float32(turns))
    out = torch.full_like(z, torch.nan)
    phase = float(np.float32(phase))
    wave_kernel[(2,)](z, out, high, turns - high, phase, COMPUTE=tl.float32, BLOCK=2048)
    want = torch.sin(rate * z.double() + np.pi * phase)
    assert (out.double() - want).abs().max() < 6e-7


def test_sincos_is_accurate_in_every_dtype():
    # Without a fused multiply-add the reduced argument keeps the rounding of rate * z.
    for dtype, bound in ((torch.float32, 3e-5), (torch.float64, 2e-13)):
        z0 = torch.linspace(-4, 4, 3000, dtype=dtype, device=DEVICE)[None]
        draw = contract.Draw(contract.SINCOS, 1, gain=0.0, rate=250.0, amplitude=1.0, phase=0.4)
        got = step.step_fwd([z0], [0.0], z0, draw, 1.0)
        want = torch.sin(250.0 * z0.double() + 0.4)
        assert (got.double() - want).abs().max() < bound * (4 if INTERPRETED else 1)
        dz0 = torch.zeros_like(z0)
        one = torch.ones_like(z0)
        step.step_bwd(one, [z0], [0.0], z0, draw, 1.0, dz0=dz0, needs_terms=[False])
        slope = 250.0 * torch.cos(250.0 * z0.double() + 0.4)
        assert (dz0.double() - slope).abs().max() < 250 * bound * (4 if INTERPRETED else 1)
