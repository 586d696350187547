# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: SIM300 (constexpr parameters are written in capitals)
"""Philox4x32-10 as device functions; ``gradsampler.noise.philox`` is the definition."""

import triton
import triton.language as tl
from triton.language.extra import libdevice

from gradsampler import contract
from gradsampler.kernels.sincos import (
    INTERPRETED,
    fast_cos,
    fast_sin,
    flip_odd,
    shifted_integer,
    sin_pi,
)

NORMALS, SIGNS = tl.constexpr(contract.NORMALS), tl.constexpr(contract.SIGNS)


@triton.jit
def fast_log2(x):
    """The hardware's, to 2.4e-7."""
    if INTERPRETED:
        return tl.log2(x)
    else:
        return libdevice.fast_log2f(x)


@triton.jit
def high_low(a, b):
    """Both words of the 64-bit product of two uint32, in one instruction on NVIDIA GPUs."""
    product = a.to(tl.uint64) * b
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Ten rounds on uint32 counters and keys; four uint32 words of the counters' shape."""
    for _ in tl.static_range(10):
        hi0, lo0 = high_low(c0, 0xD2511F53)
        hi1, lo1 = high_low(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def blocks(index, second, step, use, k0, k1):
    """The blocks with counters (index, second, step, use); ``index`` is a uint32 tensor."""
    zero = index * 0
    return philox4x32(
        index,
        zero + second.to(tl.uint32),
        zero + tl.full((), step, tl.uint32),
        zero + use,
        tl.full((), k0, tl.uint32),
        tl.full((), k1, tl.uint32),
    )


@triton.jit
def minus_two_log(u, COMPUTE: tl.constexpr):
    """-2 log(u) for 2^-33 <= u <= 1, relatively accurate up to u = 1."""
    if COMPUTE == tl.float64:
        return -2.0 * tl.log(u.to(tl.float64))
    else:
        # The hardware logarithm has an absolute error, which ruins the radius of u near 1.
        bits = u.to(tl.int32, bitcast=True)
        exponent = (bits - 0x3F3504F3) & -0x800000  # of u over sqrt(1/2), times 2^23
        x = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
        p = x * -0.17574530982 + 0.2831929402
        p = p * x - 0.2966957368
        p = p * x + 0.33176977064
        p = p * x - 0.39944099420
        p = p * x + 0.5000229536
        p = p * x - 0.6666734122
        p = p * x + 0.9999999427
        return tl.fma(x, p * x - 2.0, exponent.to(tl.float32) * -1.652591635e-7)


@triton.jit
def box_muller(a, b, COMPUTE: tl.constexpr):
    """Two normals from two words; both roundings to float32 belong to the definition."""
    u = a.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    radius = tl.sqrt(minus_two_log(u, COMPUTE))
    angle = b.to(tl.float32).to(COMPUTE)  # in units of 2^-31 half turns
    k, minus_q = shifted_integer(angle * 4.656612873077393e-10, COMPUTE)
    f = angle * 4.656612873077393e-10 + minus_q
    radius = flip_odd(radius, k, COMPUTE)
    return radius * sin_pi(0.5 - tl.abs(f), COMPUTE), radius * sin_pi(f, COMPUTE)


@triton.jit
def normals(first, step, k0, k1, BLOCK: tl.constexpr, COMPUTE: tl.constexpr):
    """[BLOCK] normals of the elements ``first`` .. ``first + BLOCK - 1``; 4 divides ``first``."""
    block = (first >> 2) + tl.arange(0, BLOCK // 4)
    high = (block >> 32).to(tl.uint32)
    w0, w1, w2, w3 = blocks(block.to(tl.uint32), high, step, NORMALS, k0, k1)
    n0, n1 = box_muller(w0, w1, COMPUTE)
    n2, n3 = box_muller(w2, w3, COMPUTE)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), [BLOCK])


@triton.jit
def box_muller_short(a, b):
    """`box_muller` for results of 16 bits, by the GPU's own functions."""
    u = a.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    # Near u = 1 the logarithm may be a last bit above zero.
    radius = tl.sqrt(tl.abs(fast_log2(u) * -1.3862943611198906))
    angle = b.to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09
    return radius * fast_cos(angle), radius * fast_sin(angle)


@triton.jit
def short_normals(first, step, k0, k1, BLOCK: tl.constexpr):
    """`normals` in the accuracy of 16 bits."""
    # Two blocks for each run of eight, which is what a thread loads and stores: nothing is handed
    # round through shared memory.
    run = (first >> 2) + 2 * tl.arange(0, BLOCK // 8)
    high = (run >> 32).to(tl.uint32)
    a0, a1, a2, a3 = blocks(run.to(tl.uint32), high, step, NORMALS, k0, k1)
    b0, b1, b2, b3 = blocks((run + 1).to(tl.uint32), high, step, NORMALS, k0, k1)
    a0, a1 = box_muller_short(a0, a1)
    a2, a3 = box_muller_short(a2, a3)
    b0, b1 = box_muller_short(b0, b1)
    b2, b3 = box_muller_short(b2, b3)
    even = tl.join(tl.join(a0, b0), tl.join(a2, b2))
    odd = tl.join(tl.join(a1, b1), tl.join(a3, b3))
    return tl.reshape(tl.join(even, odd), [BLOCK])


@triton.jit
def normals_of(element, step, k0, k1, COMPUTE: tl.constexpr):
    """Normals of any int64 ``element`` indices, each from a block of its own."""
    block = element >> 2
    high = (block >> 32).to(tl.uint32)
    w0, w1, w2, w3 = blocks(block.to(tl.uint32), high, step, NORMALS, k0, k1)
    upper = (element & 2) != 0
    n0, n1 = box_muller(tl.where(upper, w2, w0), tl.where(upper, w3, w1), COMPUTE)
    return tl.where((element & 1) != 0, n1, n0)


@triton.jit
def signed(x, first, sample, step, k0, k1, BLOCK: tl.constexpr, COMPUTE: tl.constexpr):
    """[BLOCK] ``x`` under the signs of elements ``first`` .. of a sample; 128 divides both."""
    # A block for each run of eight, which is one thread's: that takes fewer instructions than
    # computing it once for all 128 and handing it round through shared memory.
    RUNS: tl.constexpr = BLOCK // 8
    run = tl.arange(0, RUNS)
    index = (first // 128).to(tl.uint32) + (run // 16).to(tl.uint32)
    w0, w1, w2, w3 = blocks(index, sample, step, SIGNS, k0, k1)
    column = run // 4 % 4
    word = tl.where(column < 2, tl.where(column == 0, w0, w1), tl.where(column == 2, w2, w3))
    # The first of the run's eight bits goes to the top; the other seven follow by constants.
    word = word << (24 - run % 4 * 8).to(tl.uint32)
    top = word[:, None] << (7 - tl.arange(0, 8)).to(tl.uint32)[None, :]
    top = tl.reshape(top, [BLOCK]) & 0x80000000
    if COMPUTE == tl.float64:
        return (x.to(tl.uint64, bitcast=True) ^ (top.to(tl.uint64) << 32)).to(COMPUTE, bitcast=True)
    else:
        return (x.to(tl.uint32, bitcast=True) ^ top).to(COMPUTE, bitcast=True)
