# SPDX-License-Identifier: Apache-2.0
"""The training pair of flow matching: both outputs in one pass over memory.

    x_t = r x0 + (1 - keep r) x1        r = 1 - t,  keep = 1 - sigma_min
    v   = keep x1 - x0

    dx0 = r gx - gv
    dx1 = (1 - keep r) gx + keep gv
    dt  = <v, gx>

The times t are one a sample, 0 at the data x0 and 1 at the noise x1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gradsampler.contract import FlowPairGrads
from gradsampler.kernels import launch
from gradsampler.kernels.launcher import Launcher
from gradsampler.kernels.noise import BY_FOUR, NONE, SHORT, number, read, tile, write
from gradsampler.kernels.philox import normals, normals_of, short_normals


@triton.jit
def noise_end(
    x1, normal_low, normal_high, base, first, j, mask,
    NORMAL: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """x1 of a tile: loaded, or drawn at step 0 and rounded to the dtype of the data."""
    if x1 is not None:
        return read(x1, base + j, mask, COMPUTE)
    elif NORMAL == SHORT:
        n = short_normals(base + first, 0, normal_low, normal_high, BLOCK)
        return n.to(DTYPE).to(COMPUTE)
    elif NORMAL == BY_FOUR:
        n = normals(base + first, 0, normal_low, normal_high, BLOCK, COMPUTE)
        return n.to(DTYPE).to(COMPUTE)
    else:
        n = normals_of(base + j, 0, normal_low, normal_high, COMPUTE)
        return n.to(DTYPE).to(COMPUTE)


@Launcher
@triton.jit(do_not_specialize=launch.UNSPECIALISED)
def flow_pair_fwd_kernel(
    x0, x1, t, keep, normal_low, normal_high, x_t, v, size, count,
    NORMAL: tl.constexpr, MASK: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a tile of BLOCK elements of one sample."""
    sample, first = tile(count, BLOCK, True)
    base = sample * size
    j = first + tl.arange(0, BLOCK)
    mask = None if MASK == NONE else j < size
    kept = number(keep[0], COMPUTE)
    r = 1.0 - tl.load(t + sample).to(COMPUTE)
    data = read(x0, base + j, mask, COMPUTE)
    end = noise_end(x1, normal_low, normal_high, base, first, j, mask, NORMAL, COMPUTE, BLOCK,
                    x0.dtype.element_ty)  # fmt: skip
    write(x_t, base + j, r * data + (1.0 - kept * r) * end, mask)
    write(v, base + j, kept * end - data, mask)


@Launcher
@triton.jit(do_not_specialize=launch.UNSPECIALISED)
def flow_pair_bwd_kernel(
    gx, gv, x0, x1, t, keep, normal_low, normal_high, dx0, dx1, partial, size, count,
    NORMAL: tl.constexpr, MASK: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a tile of BLOCK elements; ``partial`` [programs] takes its share of dt."""
    sample, first = tile(count, BLOCK, True)
    base = sample * size
    j = first + tl.arange(0, BLOCK)
    mask = None if MASK == NONE else j < size
    kept = number(keep[0], COMPUTE)
    r = 1.0 - tl.load(t + sample).to(COMPUTE)
    along = tl.zeros([BLOCK], COMPUTE)
    if gx is not None:
        along = read(gx, base + j, mask, COMPUTE)
    across = tl.zeros([BLOCK], COMPUTE)
    if gv is not None:
        across = read(gv, base + j, mask, COMPUTE)
    if dx0 is not None:
        write(dx0, base + j, r * along - across, mask)
    if dx1 is not None:
        write(dx1, base + j, (1.0 - kept * r) * along + kept * across, mask)
    if partial is not None:
        end = noise_end(x1, normal_low, normal_high, base, first, j, mask, NORMAL, COMPUTE, BLOCK,
                        x0.dtype.element_ty)  # fmt: skip
        v = kept * end - read(x0, base + j, mask, COMPUTE)
        tl.store(partial + tl.program_id(0), tl.sum(v * along, 0))


def flow_pair_fwd(
    x0: Tensor,
    t: Tensor,
    x1: Tensor | None = None,
    *,
    seed: int = 0,
    sigma_min: float = 1e-5,
    out_dtype: torch.dtype | None = None,
    block: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Both tensors of a training pair in one launch.

    Args:
        x0: [B, *state] data.
        t: [B] times, 1 for noise.
        x1: [B, *state] standard normal; None draws the Philox normals of ``seed`` at step 0,
            computed in float32 and rounded to the dtype of ``x0``.
        seed: 64-bit seed of the drawn noise.
        sigma_min: what is left of the noise at t = 0.
        out_dtype: dtype of both results; by default that of ``x0``.
        block: elements a program, a power of two of at least 4; None for the usual.

    Returns:
        x_t and v, [B, *state].
    """
    dtype = out_dtype or x0.dtype
    compute = launch.compute_type(dtype, x0.dtype, launch.dtype_of(x1))
    normals = launch.normals_kind(x1 is None, x0, True, compute, x0.dtype)
    block = block or launch.block_size(normals, compute)
    x0, x1 = launch.in_one_order([x0, x1], False)
    x_t, v = launch.like(x0, dtype), launch.like(x0, dtype)
    tiles = launch.tiling(x0, True, block)
    if tiles.programs:
        with launch.on_device(x0):
            flow_pair_fwd_kernel(
                tiles.programs, x0, x1, t.contiguous(), launch.numbers([1.0 - sigma_min], compute),
                launch.signed(seed), launch.signed(seed >> 32), x_t, v, tiles.size, tiles.count,
                NORMAL=normals, MASK=tiles.mask,
                COMPUTE=compute, BLOCK=block,
            )  # fmt: skip
    return x_t, v


def flow_pair_bwd(
    gx: Tensor | None,
    gv: Tensor | None,
    x0: Tensor,
    t: Tensor,
    x1: Tensor | None = None,
    *,
    seed: int = 0,
    sigma_min: float = 1e-5,
    needs_x0: bool = True,
    needs_x1: bool = True,
    needs_t: bool = True,
    block: int | None = None,
) -> FlowPairGrads:
    """The transpose of `flow_pair_fwd`; noise that was drawn is drawn again.

    Args:
        gx: [B, *state] cotangent of x_t of any strides, or None for zero.
        gv: [B, *state] cotangent of v of any strides, or None for zero.
        x0: as in the forward, like ``t``, ``x1``, ``seed`` and ``sigma_min``.
        needs_x0: whether to compute dx0, in the dtype of x0; ``needs_x1`` and ``needs_t`` alike.

    Returns:
        The cotangents that were asked for.
    """
    compute = launch.compute_type(*(launch.dtype_of(x) for x in (gx, gv, x0, x1)))
    needs_x1, needs_t = needs_x1 and x1 is not None, needs_t and gx is not None
    draws = needs_t and x1 is None
    normals = launch.normals_kind(draws, x0, True, compute, x0.dtype)
    block = block or launch.block_size(normals, compute)
    x0, x1, gx, gv = launch.in_one_order([x0, x1, gx, gv], False)
    dx0 = launch.like(x0) if needs_x0 else None
    dx1 = launch.like(x1) if needs_x1 else None
    tiles = launch.tiling(x0, True, block)
    dtype = torch.float64 if compute == tl.float64 else torch.float32
    partial = torch.empty(1, tiles.programs, dtype=dtype, device=x0.device) if needs_t else None
    if tiles.programs:
        with launch.on_device(x0):
            flow_pair_bwd_kernel(
                tiles.programs, gx, gv, x0, x1, t.contiguous(),
                launch.numbers([1.0 - sigma_min], compute), launch.signed(seed),
                launch.signed(seed >> 32), dx0, dx1, partial, tiles.size, tiles.count,
                NORMAL=normals, MASK=tiles.mask,
                COMPUTE=compute, BLOCK=block,
            )  # fmt: skip
    dt = None if partial is None else launch.sum_programs(partial, tiles.count)[0]
    return FlowPairGrads(dx0, dx1, dt)
