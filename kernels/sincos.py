# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: SIM300 (constexpr parameters are written in capitals)
"""One sine in half turns, as device functions.

``sin(pi t)`` with ``t = rate * z + phase``: the nearest integer ``q`` of ``t`` is taken off and its
parity is the sign, so that a short odd polynomial on [-1/2, 1/2] is all that is left. The rate
comes in two parts (Cody and Waite 1980) because a float32 rate alone is wrong by 1e-5 of a turn at
|t| = 300. A cosine is the same sine half a unit further on.
"""

import os

import triton
import triton.language as tl
from triton.language.extra import libdevice

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def fast_sin(x):
    """The hardware's, to 5e-7 for -pi <= x <= pi."""
    if INTERPRETED:
        return tl.sin(x)
    else:
        return libdevice.fast_sinf(x)


@triton.jit
def fast_cos(x):
    """As `fast_sin`."""
    if INTERPRETED:
        return tl.cos(x)
    else:
        return libdevice.fast_cosf(x)


@triton.jit
def sin_pi(f, COMPUTE: tl.constexpr):
    """sin(pi f) for |f| <= 1/2, to 1.2e-7 in float32 and 3e-16 in float64."""
    f2 = f * f
    if COMPUTE == tl.float64:
        p = f2 * 7.697826768224190645e-7 - 2.190349707462601719e-5
        p = p * f2 + 4.662998161898393801e-4
        p = p * f2 - 7.370430505916943405e-3
        p = p * f2 + 8.214588657310289502e-2
        p = p * f2 - 5.992645293189446813e-1
        p = p * f2 + 2.550164039877300474
        p = p * f2 - 5.167712780049969608
        p = p * f2 + 3.141592653589793238
    else:
        p = f2 * 7.765591228e-2 - 5.982904113e-1
        p = p * f2 + 2.550077387
        p = p * f2 - 5.167710077
        p = p * f2 + 3.141592640
    return p * f


@triton.jit
def flip_odd(x, k, COMPUTE: tl.constexpr):
    """``x``, negated where ``k``, an integer plus 1.5 * 2^23 (2^52 in float64), is odd."""
    if COMPUTE == tl.float64:
        sign = k.to(tl.int64, bitcast=True) << 63
        return (x.to(tl.int64, bitcast=True) ^ sign).to(tl.float64, bitcast=True)
    else:
        sign = k.to(tl.int32, bitcast=True) << 31
        return (x.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)


@triton.jit
def shifted_integer(t, COMPUTE: tl.constexpr):
    """(k, -q): the integer q nearest to ``t`` in the low bits of ``k``, and its negative."""
    # Adding and taking off the magic number rounds in two full-rate instructions; the conversion
    # instruction runs at a quarter of the rate or less.
    if COMPUTE == tl.float64:
        k = t + 6755399441055744.0
        return k, 6755399441055744.0 - k
    else:
        k = t + 12582912.0
        return k, 12582912.0 - k


@triton.jit
def wave(z, rate, rate_low, phase, COMPUTE: tl.constexpr):
    """sin(pi (rate z + phase)) with the rate as the sum of its two parts, |phase| <= 1."""
    k, minus_q = shifted_integer(tl.fma(z, rate, phase), COMPUTE)
    f = tl.fma(z, rate, minus_q)
    if COMPUTE == tl.float32:
        f = tl.fma(z, rate_low, f)
    return sin_pi(flip_odd(f + phase, k, COMPUTE), COMPUTE)


@triton.jit
def wave_short(z, rate, phase):
    """`wave` for results of 16 bits: to 5e-7, and to 2e-7 of the argument."""
    t = tl.fma(z, rate, phase)
    k = t + 25165824.0  # whose last bit stands for 2: a whole period
    return fast_sin((t + (25165824.0 - k)) * 3.14159265358979)
