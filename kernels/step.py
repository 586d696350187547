# SPDX-License-Identifier: Apache-2.0
"""One stage of any sampler, and its transpose.

    out       = clamp(sum_k coefs[k] * terms[k]) + s * n(z0)
    model_in  = model_scale * out

    dterms[k] = coefs[k] * g'                    g' = g within the clamp, else 0
    dz0      += s * n'(z0)^T g
    dcoefs[k] = <terms[k], g'>,  ds = <n, g>

The inner products are sums of blocks, added up in a fixed order in a second pass.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradsampler.contract import GIVEN, OF_Z0, SIGNED_ROLL, SINCOS, Draw, StepGrads
from gradsampler.kernels import launch
from gradsampler.kernels.launcher import Launcher
from gradsampler.kernels.noise import (
    LAST,
    NONE,
    coefficient,
    inject,
    number,
    pull_back,
    read,
    tile,
    write,
)


@triton.jit
def combine(terms, coefs, at, sample, mask, STRIDE: tl.constexpr, COMPUTE: tl.constexpr):
    """The affine combination of the terms at the elements ``at``."""
    out = coefficient(coefs, 0, sample, STRIDE, COMPUTE) * read(terms[0], at, mask, COMPUTE)
    for k in tl.static_range(1, len(terms)):
        c = coefficient(coefs, k, sample, STRIDE, COMPUTE)
        out += c * read(terms[k], at, mask, COMPUTE)
    return out


@triton.jit
def step_fwd_tile(
    terms, coefs, source, numbers, words, noise_coef, bounds, model_scale, out, model_in,
    sample, first, size, mask,
    KIND: tl.constexpr, NORMAL: tl.constexpr, STRIDE: tl.constexpr, NOISE_STRIDE: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Forward of the elements ``first`` .. of one sample."""
    base = sample * size
    j = first + tl.arange(0, BLOCK)
    x = combine(terms, coefs, base + j, sample, mask, STRIDE, COMPUTE)
    if len(bounds) == 2:
        # Comparisons and not min and max, so that NaN stays NaN.
        low, high = number(bounds[0], COMPUTE), number(bounds[1], COMPUTE)
        x = tl.where(x < low, low, tl.where(x > high, high, x))
    if (KIND != 0) or (NORMAL != 0):
        s = coefficient(noise_coef, 0, sample, NOISE_STRIDE, COMPUTE)
        x = inject(x, s, source, numbers, words, j, base, sample, first, size, mask,
                   KIND, NORMAL, BLOCK, COMPUTE)  # fmt: skip
    write(out, base + j, x, mask)
    if model_in is not None:
        write(model_in, base + j, number(model_scale[0], COMPUTE) * x, mask)


@Launcher
@triton.jit(do_not_specialize=launch.UNSPECIALISED)
def step_fwd_kernel(
    terms, coefs, source, numbers, noise_coef, bounds, model_scale, out, model_in, size, count,
    step, seed_low, seed_high, offset, normal_low, normal_high,
    KIND: tl.constexpr, NORMAL: tl.constexpr, STRIDE: tl.constexpr, NOISE_STRIDE: tl.constexpr,
    PER_SAMPLE: tl.constexpr, MASK: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a tile of BLOCK elements."""
    sample, first = tile(count, BLOCK, PER_SAMPLE)
    words = (step, seed_low, seed_high, offset, normal_low, normal_high)
    whole = MASK == NONE
    if MASK == LAST:
        whole = first + BLOCK <= size
    if whole:
        step_fwd_tile(terms, coefs, source, numbers, words, noise_coef, bounds, model_scale,
                      out, model_in, sample, first, size, None,
                      KIND, NORMAL, STRIDE, NOISE_STRIDE, COMPUTE, BLOCK)  # fmt: skip
    else:
        step_fwd_tile(terms, coefs, source, numbers, words, noise_coef, bounds, model_scale,
                      out, model_in, sample, first, size, first + tl.arange(0, BLOCK) < size,
                      KIND, NORMAL, STRIDE, NOISE_STRIDE, COMPUTE, BLOCK)  # fmt: skip


@triton.jit
def step_bwd_tile(
    g, terms, coefs, source, numbers, words, noise_coef, bounds, dterms, dz0, partial,
    sample, first, size, mask,
    KIND: tl.constexpr, NORMAL: tl.constexpr, STRIDE: tl.constexpr, NOISE_STRIDE: tl.constexpr,
    PLACES: tl.constexpr, DCOEFS: tl.constexpr, DNOISE: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Backward of the elements ``first`` .. of one sample."""
    base = sample * size
    j = first + tl.arange(0, BLOCK)
    cot = read(g, base + j, mask, COMPUTE)
    inner = cot
    if len(bounds) == 2:
        x = combine(terms, coefs, base + j, sample, mask, STRIDE, COMPUTE)
        inside = (x >= number(bounds[0], COMPUTE)) & (x <= number(bounds[1], COMPUTE))
        inner = tl.where(inside, cot, 0.0)
    for k in tl.static_range(len(dterms)):
        c = coefficient(coefs, PLACES[k], sample, STRIDE, COMPUTE)
        write(dterms[k], base + j, c * inner, mask)
    if dz0 is not None:
        s = coefficient(noise_coef, 0, sample, NOISE_STRIDE, COMPUTE)
        pull_back(dz0, cot, s, source, numbers, words, j, base, sample, first, size, mask,
                  KIND, BLOCK, COMPUTE)  # fmt: skip
    if DCOEFS:
        for k in tl.static_range(len(terms)):
            row = partial + k * tl.num_programs(0).to(tl.int64)
            product = read(terms[k], base + j, mask, COMPUTE) * inner
            tl.store(row + tl.program_id(0), tl.sum(product, 0))
    if DNOISE:
        row = partial + DCOEFS * len(terms) * tl.num_programs(0).to(tl.int64)
        n = inject(tl.zeros([BLOCK], COMPUTE), 1.0, source, numbers, words, j, base, sample,
                   first, size, mask, KIND, NORMAL, BLOCK, COMPUTE)  # fmt: skip
        tl.store(row + tl.program_id(0), tl.sum(n * cot, 0))


@Launcher
@triton.jit(do_not_specialize=launch.UNSPECIALISED)
def step_bwd_kernel(
    g, terms, coefs, source, numbers, noise_coef, bounds, dterms, dz0, partial, size, count,
    step, seed_low, seed_high, offset, normal_low, normal_high,
    KIND: tl.constexpr, NORMAL: tl.constexpr, STRIDE: tl.constexpr, NOISE_STRIDE: tl.constexpr,
    PLACES: tl.constexpr, DCOEFS: tl.constexpr, DNOISE: tl.constexpr, PER_SAMPLE: tl.constexpr,
    MASK: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a tile of BLOCK elements; ``partial`` [rows, programs] takes its sums.

    ``dterms`` are those that are asked for, of the terms PLACES: old Tritons know no None there.
    """
    sample, first = tile(count, BLOCK, PER_SAMPLE)
    words = (step, seed_low, seed_high, offset, normal_low, normal_high)
    whole = MASK == NONE
    if MASK == LAST:
        whole = first + BLOCK <= size
    if whole:
        step_bwd_tile(g, terms, coefs, source, numbers, words, noise_coef, bounds, dterms, dz0,
                      partial, sample, first, size, None, KIND, NORMAL, STRIDE, NOISE_STRIDE,
                      PLACES, DCOEFS, DNOISE, COMPUTE, BLOCK)  # fmt: skip
    else:
        step_bwd_tile(g, terms, coefs, source, numbers, words, noise_coef, bounds, dterms, dz0,
                      partial, sample, first, size, first + tl.arange(0, BLOCK) < size, KIND,
                      NORMAL, STRIDE, NOISE_STRIDE, PLACES, DCOEFS, DNOISE, COMPUTE,
                      BLOCK)  # fmt: skip


def step_fwd(
    terms: Sequence[Tensor],
    coefs: Sequence[float] | Tensor,
    z0: Tensor | None = None,
    draw: Draw | None = None,
    noise_coef: float | Tensor = 0.0,
    *,
    clamp: tuple[float, float] | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    model_scale: float | None = None,
    model_dtype: torch.dtype | None = None,
    block: int | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """``clamp(sum_k coefs[k] * terms[k]) + noise_coef * n`` in one launch.

    Args:
        terms: 1 to `MAX_TERMS` tensors [B, *state], each of its own dtype and strides.
        coefs: K floats, passed by value, or a tensor [K] or [B, K].
        z0: [B, *state] initial noise, read where ``draw`` is a function of it.
        draw: a `Draw`, or None for no noise.
        noise_coef: a float, or a tensor of one element or [B].
        clamp: (low, high) bounds of the combination, before the noise is added.
        out: [B, *state], written in place of a new tensor; may be one of the terms, but not a z0
            that is rolled.
        out_dtype: dtype of a new result; by default that of the first term.
        model_scale: asks for the second output ``model_scale * result``.
        model_dtype: dtype of the second output; by default that of the result.
        block: elements a program, a power of two of at least 128; None for the usual.

    Returns:
        The result [B, *state], or with ``model_scale`` the pair of it and the model input.
    """
    if launch.is_zero(noise_coef):
        draw = None
    dtype = (out_dtype or terms[0].dtype) if out is None else out.dtype
    compute = launch.compute_type(dtype, *(x.dtype for x in terms), *launch.noise_dtypes(draw, z0))
    inject_ = launch.injection(draw, z0, compute)
    c, stride = launch.coefficients(coefs, compute)
    s, noise_stride = launch.scalar(noise_coef, compute)
    per_sample = inject_.kind == SIGNED_ROLL or max(stride, noise_stride) > 0
    *parts, source, result = launch.in_one_order(
        [*terms, inject_.source, out], elementwise=not (per_sample or inject_.normal)
    )
    if result is None:
        result = launch.like(parts[0], dtype)
    model_in = None if model_scale is None else launch.like(parts[0], model_dtype or dtype)
    normals = launch.normals_kind(
        inject_.normal, parts[0], per_sample, compute, dtype, launch.dtype_of(model_in)
    )
    block = block or launch.block_size(normals, compute)
    t = launch.tiling(parts[0], per_sample, block)
    if t.programs:
        with launch.on_device(result):
            step_fwd_kernel(
                t.programs, tuple(parts), c, source, inject_.numbers, s,
                launch.numbers(clamp or (), compute),
                launch.numbers(() if model_scale is None else (model_scale,), compute),
                result, model_in, t.size, t.count, *inject_.words,
                KIND=inject_.kind, NORMAL=normals,
                STRIDE=stride, NOISE_STRIDE=noise_stride, PER_SAMPLE=per_sample, MASK=t.mask,
                COMPUTE=compute, BLOCK=block,
            )  # fmt: skip
    if out is not None and result is not out:
        result = out.copy_(result)
    return result if model_in is None else (result, model_in)


def step_bwd(
    g: Tensor,
    terms: Sequence[Tensor],
    coefs: Sequence[float] | Tensor,
    z0: Tensor | None = None,
    draw: Draw | None = None,
    noise_coef: float | Tensor = 0.0,
    *,
    dz0: Tensor | None = None,
    needs_terms: Sequence[bool],
    needs_coefs: bool = False,
    needs_noise_coef: bool = False,
    needs_given: bool = False,
    clamp: tuple[float, float] | None = None,
    block: int | None = None,
) -> StepGrads:
    """The transpose of `step_fwd` in one launch, plus the second pass of the sums.

    Args:
        g: [B, *state] cotangent of the result, of any strides.
        terms: the terms of the forward; only shapes and dtypes matter without ``needs_coefs``
            and ``clamp``.
        coefs: as in the forward, like ``z0``, ``draw``, ``noise_coef`` and ``clamp``.
        dz0: [B, *state] buffer to which the cotangent of z0 is added, None if not needed.
        needs_terms: which cotangents of terms to compute.
        needs_coefs: whether to compute the gradient of the coefficients.
        needs_noise_coef: whether to compute the gradient of the amount of noise.
        needs_given: whether to compute the cotangent of the given noise.
        block: elements a program, a power of two of at least 128; None for the usual.

    Returns:
        The gradients that were asked for.
    """
    compute = launch.compute_type(
        g.dtype, *(x.dtype for x in terms), *launch.noise_dtypes(draw, z0)
    )
    inject_ = launch.injection(draw, z0, compute)
    kind = inject_.kind
    c, stride = launch.coefficients(coefs, compute)
    s, noise_stride = launch.scalar(noise_coef, compute)
    per_sample = kind == SIGNED_ROLL or max(stride, noise_stride) > 0
    normal = inject_.normal and needs_noise_coef
    pulls = dz0 is not None and kind in OF_Z0
    pulls = pulls and not launch.is_zero(noise_coef)
    reads = needs_coefs or clamp is not None
    given, dz0 = kind == GIVEN and needs_given, dz0 if pulls else None
    source = inject_.source if needs_noise_coef or (kind == SINCOS and pulls) else None
    cot, source, buffer, *parts = launch.in_one_order(
        [g, source, dz0, *(terms if reads else ())],
        elementwise=not (per_sample or normal),
    )
    dterms = [
        launch.like(cot, x.dtype) if need else None
        for x, need in zip(terms, needs_terms, strict=True)
    ]
    places = tuple(k for k, x in enumerate(dterms) if x is not None)
    dgiven = launch.like(cot, inject_.source.dtype) if given else None
    normals = launch.normals_kind(normal, cot, per_sample, compute)
    block = block or launch.block_size(normals, compute)
    t = launch.tiling(cot, per_sample, block)
    rows = len(terms) * needs_coefs + needs_noise_coef
    dtype = torch.float64 if compute == tl.float64 else torch.float32
    partial = torch.empty(rows, t.programs, dtype=dtype, device=g.device) if rows else None
    if t.programs and (rows or pulls or given or any(needs_terms)):
        with launch.on_device(g):
            step_bwd_kernel(
                t.programs, cot, tuple(parts), c, source, inject_.numbers, s,
                launch.numbers(clamp or (), compute), tuple(x for x in dterms if x is not None),
                dgiven if given else buffer, partial, t.size, t.count, *inject_.words,
                KIND=kind, NORMAL=normals,
                STRIDE=stride, NOISE_STRIDE=noise_stride, PLACES=places, DCOEFS=needs_coefs,
                DNOISE=needs_noise_coef, PER_SAMPLE=per_sample, MASK=t.mask,
                COMPUTE=compute, BLOCK=block,
            )  # fmt: skip
    if dz0 is not None and buffer is not dz0:
        dz0.copy_(buffer)
    dcoefs = dnoise = None
    if partial is not None:
        sums = launch.sum_programs(partial, t.count)
        if needs_coefs:
            dcoefs = sums[: len(terms)].t() if stride > 0 else sums[: len(terms)].sum(1)
        if needs_noise_coef:
            dnoise = sums[-1] if noise_stride > 0 else sums[-1].sum()
    return StepGrads(dterms, dcoefs, dnoise, dgiven)
