# SPDX-License-Identifier: Apache-2.0
"""The reparameterised ancestral step of guided diffusion (Nichol and Dhariwal 2021).

    x0      = clamp(r1 x - r2 eps)              mean = c1 x0 + c2 x
    log_var = f log_max + (1 - f) log_min       f    = (v + 1) / 2, and f = 1 without v
    out     = mean + nonzero exp(log_var / 2) noise

    dx      = (c2 + c1 r1 [x0 within the clamp]) g
    deps    = -c1 r2 [x0 within the clamp] g
    dv      = nonzero exp(log_var / 2) noise (log_max - log_min) / 4 g
    dnoise  = nonzero exp(log_var / 2) g

A model that predicts x0 has r1 = 0 and r2 = -1; one that predicts log_var itself has log_max = 1
and log_min = -1.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradsampler.contract import AncestralGrads
from gradsampler.kernels import launch
from gradsampler.kernels.launcher import Launcher
from gradsampler.kernels.noise import NONE, coefficient, number, read, tile, write


@triton.jit
def deviation(
    model_output, coefs, nonzero, sample, size, j, mask,
    LEARNED: tl.constexpr, STRIDE: tl.constexpr, NONZERO_STRIDE: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """nonzero * exp(log_var / 2), and by how much log_var grows with v."""
    log_max = coefficient(coefs, 4, sample, STRIDE, COMPUTE)
    log_var, slope = log_max, log_max
    if LEARNED:
        v = read(model_output, sample * 2 * size + size + j, mask, COMPUTE)
        log_min = coefficient(coefs, 5, sample, STRIDE, COMPUTE)
        f = 0.5 * v + 0.5
        slope = 0.5 * (log_max - log_min)
        log_var = f * log_max + (1.0 - f) * log_min
    return coefficient(nonzero, 0, sample, NONZERO_STRIDE, COMPUTE) * tl.exp(0.5 * log_var), slope


@Launcher
@triton.jit(do_not_specialize=launch.UNSPECIALISED)
def ancestral_step_fwd_kernel(
    x, model_output, noise, coefs, nonzero, bounds, out, size, count,
    LEARNED: tl.constexpr, STRIDE: tl.constexpr, NONZERO_STRIDE: tl.constexpr,
    MASK: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a tile of BLOCK elements of one sample."""
    sample, first = tile(count, BLOCK, True)
    j = first + tl.arange(0, BLOCK)
    mask = None if MASK == NONE else j < size
    state = read(x, sample * size + j, mask, COMPUTE)
    eps = read(model_output, sample * (1 + LEARNED) * size + j, mask, COMPUTE)
    x0 = coefficient(coefs, 0, sample, STRIDE, COMPUTE) * state
    x0 = x0 - coefficient(coefs, 1, sample, STRIDE, COMPUTE) * eps
    if len(bounds) == 2:
        low, high = number(bounds[0], COMPUTE), number(bounds[1], COMPUTE)
        x0 = tl.where(x0 < low, low, tl.where(x0 > high, high, x0))
    y = coefficient(coefs, 2, sample, STRIDE, COMPUTE) * x0
    y = y + coefficient(coefs, 3, sample, STRIDE, COMPUTE) * state
    if noise is not None:
        sigma, _ = deviation(model_output, coefs, nonzero, sample, size, j, mask,
                             LEARNED, STRIDE, NONZERO_STRIDE, COMPUTE)  # fmt: skip
        y = y + sigma * read(noise, sample * size + j, mask, COMPUTE)
    write(out, sample * size + j, y, mask)


@Launcher
@triton.jit(do_not_specialize=launch.UNSPECIALISED)
def ancestral_step_bwd_kernel(
    g, x, model_output, noise, coefs, nonzero, bounds, dx, dmodel_output, dnoise, size, count,
    LEARNED: tl.constexpr, STRIDE: tl.constexpr, NONZERO_STRIDE: tl.constexpr,
    MASK: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a tile of BLOCK elements of one sample."""
    sample, first = tile(count, BLOCK, True)
    j = first + tl.arange(0, BLOCK)
    mask = None if MASK == NONE else j < size
    at_eps = sample * (1 + LEARNED) * size + j
    cot = read(g, sample * size + j, mask, COMPUTE)
    r1 = coefficient(coefs, 0, sample, STRIDE, COMPUTE)
    r2 = coefficient(coefs, 1, sample, STRIDE, COMPUTE)
    dx0 = coefficient(coefs, 2, sample, STRIDE, COMPUTE) * cot
    if len(bounds) == 2:
        x0 = r1 * read(x, sample * size + j, mask, COMPUTE)
        x0 = x0 - r2 * read(model_output, at_eps, mask, COMPUTE)
        inside = (x0 >= number(bounds[0], COMPUTE)) & (x0 <= number(bounds[1], COMPUTE))
        dx0 = tl.where(inside, dx0, 0.0)
    if dx is not None:
        c2 = coefficient(coefs, 3, sample, STRIDE, COMPUTE)
        write(dx, sample * size + j, r1 * dx0 + c2 * cot, mask)
    if dmodel_output is not None:
        write(dmodel_output, at_eps, -r2 * dx0, mask)
    if noise is not None:
        sigma, slope = deviation(model_output, coefs, nonzero, sample, size, j, mask,
                                 LEARNED, STRIDE, NONZERO_STRIDE, COMPUTE)  # fmt: skip
        if dnoise is not None:
            write(dnoise, sample * size + j, sigma * cot, mask)
        if LEARNED and dmodel_output is not None:
            n = read(noise, sample * size + j, mask, COMPUTE)
            write(dmodel_output, at_eps + size, 0.5 * slope * sigma * n * cot, mask)
    elif LEARNED and dmodel_output is not None:
        write(dmodel_output, at_eps + size, cot * 0, mask)


def ancestral_step_fwd(
    x: Tensor,
    model_output: Tensor,
    noise: Tensor | None,
    coefs: Sequence[float] | Tensor,
    *,
    nonzero: float | Tensor = 1.0,
    clamp: tuple[float, float] | None = None,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    block: int | None = None,
) -> Tensor:
    """One ancestral step in one launch.

    Args:
        x: [B, C, *space] state.
        model_output: [B, C, *space], or [B, 2C, *space] with v behind eps, read in place.
        noise: [B, C, *space] standard normal, or None for none.
        coefs: r1, r2, c1, c2, log_max, log_min: 6 floats, or a tensor [6] or [B, 6]. Without v
            the log variance is log_max.
        nonzero: factor of the noise, 0 at the last step: a number, or a tensor [B] of 0 and 1.
        clamp: (low, high) bounds of x0.
        out: [B, C, *space], written in place of a new tensor.
        out_dtype: dtype of a new result; by default that of ``x``.
        block: elements a program, a power of two; None for the usual.

    Returns:
        [B, C, *space] the next state.
    """
    dtype = (out_dtype or x.dtype) if out is None else out.dtype
    compute = launch.compute_type(dtype, x.dtype, model_output.dtype, launch.dtype_of(noise))
    c, stride = launch.coefficients(coefs, compute)
    factor, nonzero_stride = launch.scalar(nonzero, compute)
    learned = model_output.shape[1] == 2 * x.shape[1]
    x, model_output, noise, result = launch.in_one_order([x, model_output, noise, out], False)
    if result is None:
        result = launch.like(x, dtype)
    block = block or launch.block_size(0, compute)
    t = launch.tiling(x, True, block)
    if t.programs:
        with launch.on_device(x):
            ancestral_step_fwd_kernel(
                t.programs, x, model_output, noise, c, factor,
                launch.numbers(clamp or (), compute), result, t.size, t.count, LEARNED=learned,
                STRIDE=stride, NONZERO_STRIDE=nonzero_stride, MASK=t.mask, COMPUTE=compute,
                BLOCK=block,
            )  # fmt: skip
    return result if out is None or result is out else out.copy_(result)


def ancestral_step_bwd(
    g: Tensor,
    x: Tensor,
    model_output: Tensor,
    noise: Tensor | None,
    coefs: Sequence[float] | Tensor,
    *,
    nonzero: float | Tensor = 1.0,
    clamp: tuple[float, float] | None = None,
    needs_x: bool = True,
    needs_model_output: bool = True,
    needs_noise: bool = True,
    block: int | None = None,
) -> AncestralGrads:
    """The transpose of `ancestral_step_fwd`; ``g`` [B, C, *space] may have any strides.

    Returns:
        The cotangents that were asked for, of the shapes and dtypes of their inputs.
    """
    dtypes = (g.dtype, x.dtype, model_output.dtype, launch.dtype_of(noise))
    compute = launch.compute_type(*dtypes)
    c, stride = launch.coefficients(coefs, compute)
    factor, nonzero_stride = launch.scalar(nonzero, compute)
    learned = model_output.shape[1] == 2 * x.shape[1]
    g, x, model_output, noise = launch.in_one_order([g, x, model_output, noise], False)
    dx = launch.like(x) if needs_x else None
    dmodel_output = launch.like(model_output) if needs_model_output else None
    dnoise = launch.like(noise) if needs_noise and noise is not None else None
    block = block or launch.block_size(0, compute)
    t = launch.tiling(x, True, block)
    if t.programs:
        with launch.on_device(x):
            ancestral_step_bwd_kernel(
                t.programs, g, x, model_output, noise, c, factor,
                launch.numbers(clamp or (), compute), dx, dmodel_output, dnoise, t.size, t.count,
                LEARNED=learned, STRIDE=stride, NONZERO_STRIDE=nonzero_stride, MASK=t.mask,
                COMPUTE=compute, BLOCK=block,
            )  # fmt: skip
    return AncestralGrads(dx, dmodel_output, dnoise)
