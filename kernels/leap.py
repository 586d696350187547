# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: SIM300 (constexpr parameters are written in capitals)
"""One step of a run that is undone, on a state in integers.

    carried  += sign * round(sum_k coefs[k] * terms[k] + s * n(z0))
    state     = scale * carried
    model_in  = model_scale * state              of the rounded state

What one call adds another must take away to the bit, though the kernel is compiled anew without
outputs. So no product is fused with a sum but where it says so: the bits are those of the source.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradsampler.contract import SIGNED_ROLL, Draw
from gradsampler.kernels import launch
from gradsampler.kernels.launcher import Launcher
from gradsampler.kernels.noise import LAST, NONE, inject, number, read, tile, write


@triton.jit
def nearest(x, COMPUTE: tl.constexpr):
    """The integer nearest to ``x``, the even one of two; in the compute type."""
    # From there on every number of the type is an integer.
    WHOLE: tl.constexpr = 4503599627370496.0 if COMPUTE == tl.float64 else 8388608.0
    size = tl.abs(x)
    size = tl.where(size < WHOLE, (size + WHOLE) - WHOLE, size)
    return tl.where(x < 0.0, -size, size)


@triton.jit
def leap_tile(
    carried, terms, coefs, source, numbers, words, noise_coef, sign, overflow,
    scale, state, model_scale, model_in, sample, first, size, mask,
    KIND: tl.constexpr, NORMAL: tl.constexpr, COMPUTE: tl.constexpr, STATE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The elements ``first`` .. of one sample."""
    base = sample * size
    j = first + tl.arange(0, BLOCK)
    x = tl.zeros([BLOCK], COMPUTE)
    for k in tl.static_range(len(terms)):
        x = tl.fma(read(terms[k], base + j, mask, COMPUTE), number(coefs[k], COMPUTE), x)
    if (KIND != 0) or (NORMAL != 0):
        x = inject(x, number(noise_coef[0], COMPUTE), source, numbers, words, j, base, sample,
                   first, size, mask, KIND, NORMAL, BLOCK, COMPUTE)  # fmt: skip
    # A bit before the end of the integers, so that a sum of two within the range does not wrap.
    INTEGER: tl.constexpr = carried.dtype.element_ty
    LIMIT: tl.constexpr = 1 << (INTEGER.primitive_bitwidth - 2)
    inside = tl.abs(x) <= LIMIT * 1.0  # false for NaN
    change = tl.where(inside, nearest(x, COMPUTE), 0.0).to(INTEGER)
    w = tl.load(carried + base + j, mask=mask) + sign * change
    tl.store(carried + base + j, w, mask=mask)
    outside = (w > LIMIT) | (w < -LIMIT) | (inside == 0)
    if mask is not None:
        outside = outside & mask
    tl.atomic_or(overflow, 1, mask=tl.max(outside.to(tl.int32), 0) != 0, sem="relaxed")
    if state is not None:
        y = (w.to(STATE) * number(scale[0], STATE)).to(state.dtype.element_ty)
        tl.store(state + base + j, y, mask=mask)
        if model_in is not None:
            write(model_in, base + j, y.to(STATE) * number(model_scale[0], STATE), mask)


@Launcher
@triton.jit(do_not_specialize=[*launch.UNSPECIALISED, "sign"])
def leap_kernel(
    carried, terms, coefs, source, numbers, noise_coef, sign, overflow, scale, state, model_scale,
    model_in, size, count, step, seed_low, seed_high, offset, normal_low, normal_high,
    KIND: tl.constexpr, NORMAL: tl.constexpr, PER_SAMPLE: tl.constexpr, MASK: tl.constexpr,
    COMPUTE: tl.constexpr, STATE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a tile of BLOCK elements."""
    sample, first = tile(count, BLOCK, PER_SAMPLE)
    words = (step, seed_low, seed_high, offset, normal_low, normal_high)
    whole = MASK == NONE
    if MASK == LAST:
        whole = first + BLOCK <= size
    if whole:
        leap_tile(carried, terms, coefs, source, numbers, words, noise_coef, sign, overflow,
                  scale, state, model_scale, model_in, sample, first, size, None,
                  KIND, NORMAL, COMPUTE, STATE, BLOCK)  # fmt: skip
    else:
        leap_tile(carried, terms, coefs, source, numbers, words, noise_coef, sign, overflow,
                  scale, state, model_scale, model_in, sample, first, size,
                  first + tl.arange(0, BLOCK) < size, KIND, NORMAL, COMPUTE, STATE,
                  BLOCK)  # fmt: skip


def leap(
    carried: Tensor,
    terms: Sequence[Tensor],
    coefs: Sequence[float],
    z0: Tensor | None = None,
    draw: Draw | None = None,
    noise_coef: float = 0.0,
    *,
    sign: int,
    scale: float,
    overflow: Tensor,
    out_dtype: torch.dtype,
    wants_state: bool = True,
    model_scale: float | None = None,
    model_dtype: torch.dtype | None = None,
    block: int | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """``carried += sign * round(sum_k coefs[k] * terms[k] + noise_coef * n)`` in one launch.

    Args:
        carried: [B, *state] int32 or int64, changed in place; of any strides.
        terms: up to `MAX_TERMS` tensors [B, *state], each of its own dtype and strides.
        coefs: K floats.
        z0: [B, *state] initial noise, read where ``draw`` is a function of it.
        draw: a `Draw`, or None for no noise.
        noise_coef: the amount of noise.
        sign: 1, or -1 to undo the same call to the bit.
        scale: what a unit of ``carried`` stands for afterwards.
        overflow: [1] int32, set to 1 where a number is NaN or leaves the range.
        out_dtype: dtype of the state; with float64 the increment is computed in it as well.
        wants_state: whether to write the state.
        model_scale: asks for the second output ``model_scale * state``.
        model_dtype: dtype of the second output; by default that of the state.
        block: elements a program, a power of two of at least 128; None for the usual.

    Returns:
        The state [B, *state] and the model's input, each None where not asked for.
    """
    compute = launch.compute_type(
        out_dtype, launch.dtype_of(z0), *(x.dtype for x in terms), *launch.noise_dtypes(draw, z0)
    )
    shown = launch.compute_type(out_dtype)
    inject_ = launch.injection(None if noise_coef == 0 else draw, z0, compute)
    per_sample = inject_.kind == SIGNED_ROLL
    integers, source, *parts = launch.in_one_order(
        [carried, inject_.source, *terms], elementwise=not (per_sample or inject_.normal)
    )
    assert integers is not None
    normals = launch.normals_kind(inject_.normal, integers, per_sample, compute)
    # Integers of 64 bits beside normals take so many registers that the usual block spills.
    wide = normals and integers.dtype == torch.int64
    block = block or launch.block_size(0 if wide else normals, compute)
    t = launch.tiling(integers, per_sample, block)
    state = launch.like(integers, out_dtype) if wants_state else None
    scales = state is not None and model_scale is not None
    model_in = launch.like(integers, model_dtype or out_dtype) if scales else None
    if t.programs:
        with launch.on_device(integers):
            leap_kernel(
                t.programs, integers, tuple(parts), launch.numbers(coefs, compute), source,
                inject_.numbers, launch.numbers((noise_coef,), compute), sign, overflow,
                launch.numbers((scale,), shown), state,
                launch.numbers((1.0 if model_scale is None else model_scale,), shown),
                model_in, t.size, t.count, *inject_.words,
                KIND=inject_.kind, NORMAL=normals,
                PER_SAMPLE=per_sample, MASK=t.mask, COMPUTE=compute, STATE=shown, BLOCK=block,
                enable_fp_fusion=False,
            )  # fmt: skip
    if integers is not carried:
        carried.copy_(integers)
    return state, model_in
