# SPDX-License-Identifier: Apache-2.0
"""One stage of a transposed run: the backward of a step with what surrounds it.

    lam  = sum_k a[k] * lams[k] + g_scale * g        g: what the model's own backward returned
    mu   = sum_k b[k] * lams[k] + b[K] * lam         the next cotangent of a model output
    dz0 += s * n'(z0)^T lam

The state's cotangent is read once for all that follows from it.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradsampler.contract import OF_Z0, SIGNED_ROLL, Draw
from gradsampler.kernels import launch
from gradsampler.kernels.launcher import Launcher
from gradsampler.kernels.noise import LAST, NONE, coefficient, pull_back, read, tile, write


@triton.jit
def adjoint_step_tile(
    lams, a, g, g_scale, b, source, numbers, words, noise_coef, lam, mu, dz0,
    sample, first, size, mask,
    KIND: tl.constexpr, A_STRIDE: tl.constexpr, B_STRIDE: tl.constexpr, G_STRIDE: tl.constexpr,
    NOISE_STRIDE: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The elements ``first`` .. of one sample."""
    base = sample * size
    j = first + tl.arange(0, BLOCK)
    x = tl.zeros([BLOCK], COMPUTE)
    y = tl.zeros([BLOCK], COMPUTE)
    if g is not None:
        scale = coefficient(g_scale, 0, sample, G_STRIDE, COMPUTE)
        x = scale * read(g, base + j, mask, COMPUTE)
    for k in tl.static_range(len(lams)):
        v = read(lams[k], base + j, mask, COMPUTE)
        x = x + coefficient(a, k, sample, A_STRIDE, COMPUTE) * v
        if mu is not None:
            y = y + coefficient(b, k, sample, B_STRIDE, COMPUTE) * v
    write(lam, base + j, x, mask)
    if mu is not None:
        y = y + coefficient(b, len(lams), sample, B_STRIDE, COMPUTE) * x
        write(mu, base + j, y, mask)
    if dz0 is not None:
        s = coefficient(noise_coef, 0, sample, NOISE_STRIDE, COMPUTE)
        pull_back(dz0, x, s, source, numbers, words, j, base, sample, first, size, mask,
                  KIND, BLOCK, COMPUTE)  # fmt: skip


@Launcher
@triton.jit(do_not_specialize=launch.UNSPECIALISED)
def adjoint_step_kernel(
    lams, a, g, g_scale, b, source, numbers, noise_coef, lam, mu, dz0, size, count,
    step, seed_low, seed_high, offset, normal_low, normal_high,
    KIND: tl.constexpr, A_STRIDE: tl.constexpr, B_STRIDE: tl.constexpr, G_STRIDE: tl.constexpr,
    NOISE_STRIDE: tl.constexpr, PER_SAMPLE: tl.constexpr, MASK: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a tile of BLOCK elements."""
    sample, first = tile(count, BLOCK, PER_SAMPLE)
    words = (step, seed_low, seed_high, offset, normal_low, normal_high)
    whole = MASK == NONE
    if MASK == LAST:
        whole = first + BLOCK <= size
    if whole:
        adjoint_step_tile(lams, a, g, g_scale, b, source, numbers, words, noise_coef, lam, mu,
                          dz0, sample, first, size, None, KIND, A_STRIDE, B_STRIDE, G_STRIDE,
                          NOISE_STRIDE, COMPUTE, BLOCK)  # fmt: skip
    else:
        adjoint_step_tile(lams, a, g, g_scale, b, source, numbers, words, noise_coef, lam, mu,
                          dz0, sample, first, size, first + tl.arange(0, BLOCK) < size, KIND,
                          A_STRIDE, B_STRIDE, G_STRIDE, NOISE_STRIDE, COMPUTE,
                          BLOCK)  # fmt: skip


def adjoint_step(
    lams: Sequence[Tensor],
    a: Sequence[float] | Tensor,
    g: Tensor | None,
    g_scale: float | Tensor,
    b: Sequence[float] | Tensor | None,
    z0: Tensor | None = None,
    draw: Draw | None = None,
    noise_coef: float | Tensor = 0.0,
    dz0: Tensor | None = None,
    *,
    mu_dtype: torch.dtype | None = None,
    lam_dtype: torch.dtype | None = None,
    block: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The next cotangents of a state and of a model output, and the share of z0, in one launch.

    Args:
        lams: cotangents [B, *state], each of its own dtype; with ``g`` at most `MAX_TERMS`.
        a: K floats, or a tensor [K] or [B, K].
        g: [B, *state] cotangent that the model returned for its input, or None.
        g_scale: what the model's input was scaled by: a float, or a tensor of one element or [B].
        b: K + 1 floats, or a tensor [K + 1] or [B, K + 1]; None asks for no ``mu``.
        z0: [B, *state] initial noise, read where ``draw`` is a function of it.
        draw: a `Draw`, or None for no noise; what it was given gets no cotangent here.
        noise_coef: a float, or a tensor of one element or [B].
        dz0: [B, *state] buffer to which the cotangent of z0 is added, None if not needed.
        mu_dtype: dtype of ``mu``; by default that of ``g``, without it that of ``lam``.
        lam_dtype: dtype of ``lam``; by default that of the first of ``lams``, without any ``g``'s.
        block: elements a program, a power of two of at least 128; None for the usual.

    Returns:
        ``lam`` and ``mu`` [B, *state].
    """
    first = lams[0] if lams else g
    assert first is not None
    dtype = lam_dtype or first.dtype
    compute = launch.compute_type(
        dtype, launch.dtype_of(g), *(x.dtype for x in lams), *launch.noise_dtypes(draw, z0)
    )
    inject = launch.injection(draw, z0, compute)
    if inject.kind not in OF_Z0 or launch.is_zero(noise_coef):
        dz0 = None
    ca, a_stride = launch.coefficients(a, compute)
    cb, b_stride = launch.coefficients(() if b is None else b, compute)
    cg, g_stride = launch.scalar(g_scale, compute)
    s, noise_stride = launch.scalar(noise_coef, compute)
    block = block or launch.block_size(0, compute)
    rolls = dz0 is not None and inject.kind == SIGNED_ROLL
    per_sample = rolls or max(a_stride, b_stride, g_stride, noise_stride) > 0
    g, source, buffer, *parts = launch.in_one_order(
        [g, inject.source if dz0 is not None and not rolls else None, dz0, *lams],
        elementwise=not per_sample,
    )
    order = parts[0] if parts else g
    assert order is not None
    lam = launch.like(order, dtype)
    mu = None if b is None else launch.like(order, mu_dtype or (dtype if g is None else g.dtype))
    t = launch.tiling(order, per_sample, block)
    if t.programs:
        with launch.on_device(lam):
            adjoint_step_kernel(
                t.programs, tuple(parts), ca, g, cg, cb, source, inject.numbers, s, lam, mu,
                buffer, t.size, t.count, *inject.words,
                KIND=inject.kind, A_STRIDE=a_stride, B_STRIDE=b_stride, G_STRIDE=g_stride,
                NOISE_STRIDE=noise_stride, PER_SAMPLE=per_sample, MASK=t.mask,
                COMPUTE=compute, BLOCK=block,
            )  # fmt: skip
    if dz0 is not None and buffer is not None and buffer is not dz0:
        dz0.copy_(buffer)
    return lam, mu
