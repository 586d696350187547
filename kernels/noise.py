# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: SIM300 (constexpr parameters are written in capitals)
"""The injections of a step as device functions: their value and their transpose.

    n = normal * N(seed, step, element) + weight * f(z0)

``numbers`` holds (normal, linear, amplitude, rate, rate_low, phase, steep, ahead):
sincos is ``linear z + amplitude sin(pi (rate z + phase))`` and has the slope
``linear + steep sin(pi (rate z + ahead))``; the other kinds use ``linear`` alone.
``words`` holds those of a `Draw` behind its kind, in its order, each seed as two words of 32 bits:
(step, seed_low, seed_high, offset, normal_low, normal_high).
"""

import triton
import triton.language as tl

from gradsampler import contract
from gradsampler.kernels.philox import normals, normals_of, short_normals, signed
from gradsampler.kernels.sincos import wave, wave_short

OFF = tl.constexpr(contract.OFF)
SINCOS = tl.constexpr(contract.SINCOS)
SIGNED_ROLL = tl.constexpr(contract.SIGNED_ROLL)
GIVEN = tl.constexpr(contract.GIVEN)

BY_FOUR = tl.constexpr(1)  # normals: one block for 4 neighbours
ONE_BY_ONE = tl.constexpr(2)  # where a sample does not start at a multiple of 4
SHORT = tl.constexpr(3)  # by four, in the accuracy of 16 bits

# A mask that may end anywhere breaks the wide loads up, so only the last tile has one then.
NONE, EVERY, LAST = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def number(x, COMPUTE: tl.constexpr):
    """A scalar argument in the compute type; a float64 travels as three float32, its sum."""
    if COMPUTE == tl.float64:
        low = tl.full((), x[1], tl.float64) + tl.full((), x[2], tl.float64)
        return tl.full((), x[0], tl.float64) + low
    else:
        return tl.full((), x, tl.float32)


@triton.jit
def coefficient(coefs, k, sample, STRIDE: tl.constexpr, COMPUTE: tl.constexpr):
    """Coefficient ``k``: by value (STRIDE < 0), or loaded from a tensor [K] or [B, K]."""
    if STRIDE < 0:
        return number(coefs[k], COMPUTE)
    else:
        return tl.load(coefs + sample * STRIDE + k).to(COMPUTE)


@triton.jit
def tile(count, BLOCK: tl.constexpr, PER_SAMPLE: tl.constexpr):
    """(sample, first element) of this program, ``count`` programs a sample, as int64."""
    program = tl.program_id(0)
    if PER_SAMPLE:
        sample = program // count
        return sample.to(tl.int64), (program - sample * count).to(tl.int64) * BLOCK
    else:
        return tl.full((), 0, tl.int64), program.to(tl.int64) * BLOCK


@triton.jit
def read(pointer, at, mask, COMPUTE: tl.constexpr):
    """Loads and casts at once: half precision is never computed in."""
    if mask is None:
        return tl.load(pointer + at).to(COMPUTE)
    else:
        return tl.load(pointer + at, mask=mask, other=0.0).to(COMPUTE)


@triton.jit
def write(pointer, at, x, mask):
    """Casts to the type of ``pointer`` and stores."""
    tl.store(pointer + at, x.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def rolled(pointer, base, first, size, offset, mask, BLOCK: tl.constexpr):
    """The tile's elements at (j - offset) mod size: where they lie, before and behind the wrap."""
    # Two runs of neighbours need no arithmetic an element for their addresses.
    d = tl.arange(0, BLOCK)
    start = first - tl.full((), offset, tl.int64)
    start = tl.where(start < 0, start + size, start)
    wrap = tl.minimum(size - start, BLOCK).to(tl.int32)
    before = d < wrap
    behind = d >= wrap
    if mask is not None:
        before = before & mask
        behind = behind & mask
    low = pointer + (base + start) + d
    high = pointer + (base + start - size) + d
    return low, before, high, behind


@triton.jit
def read_rolled(low, before, high, behind, COMPUTE: tl.constexpr):
    """Loads what `rolled` points to."""
    x = tl.load(low, mask=before, other=0.0)
    return tl.load(high, mask=behind, other=x).to(COMPUTE)


@triton.jit
def inject(
    x, s, source, numbers, words, j, base, sample, first, size, mask,
    KIND: tl.constexpr, NORMAL: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """``x + s * n`` with the noise n of one tile."""
    # s multiplies the scalars and x is added to, so that each product is one fused instruction.
    if KIND != OFF:
        linear = s * number(numbers[1], COMPUTE)
    if KIND == SINCOS:
        z = read(source, base + j, mask, COMPUTE)
        if NORMAL == SHORT:
            w = wave_short(z, number(numbers[3], COMPUTE), number(numbers[5], COMPUTE))
        else:
            w = wave(z, number(numbers[3], COMPUTE), number(numbers[4], COMPUTE),
                     number(numbers[5], COMPUTE), COMPUTE)  # fmt: skip
        x = x + linear * z
        x = x + (s * number(numbers[2], COMPUTE)) * w
    if KIND == SIGNED_ROLL:
        low, before, high, behind = rolled(source, base, first, size, words[3], mask, BLOCK)
        z = read_rolled(low, before, high, behind, COMPUTE)
        z = signed(z, first, sample, words[0], words[1], words[2], BLOCK, COMPUTE)
        x = x + linear * z
    if KIND == GIVEN:
        x = x + linear * read(source, base + j, mask, COMPUTE)
    if NORMAL == BY_FOUR:
        n = normals(base + first, words[0], words[4], words[5], BLOCK, COMPUTE)
        x = x + (s * number(numbers[0], COMPUTE)) * n
    if NORMAL == SHORT:
        n = short_normals(base + first, words[0], words[4], words[5], BLOCK)
        x = x + (s * number(numbers[0], COMPUTE)) * n
    if NORMAL == ONE_BY_ONE:
        n = normals_of(base + j, words[0], words[4], words[5], COMPUTE)
        x = x + (s * number(numbers[0], COMPUTE)) * n
    return x


@triton.jit
def pull_back(
    dz0, g, s, source, numbers, words, j, base, sample, first, size, mask,
    KIND: tl.constexpr, BLOCK: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Adds the transposed Jacobian of ``s * n`` times ``g`` to ``dz0``; GIVEN stores it."""
    linear = s * number(numbers[1], COMPUTE)
    if KIND == SINCOS:
        z = read(source, base + j, mask, COMPUTE)
        w = wave(z, number(numbers[3], COMPUTE), number(numbers[4], COMPUTE),
                 number(numbers[7], COMPUTE), COMPUTE)  # fmt: skip
        slope = (s * number(numbers[6], COMPUTE)) * w + linear
        write(dz0, base + j, slope * g + read(dz0, base + j, mask, COMPUTE), mask)
    if KIND == SIGNED_ROLL:
        # Each element of dz0 belongs to one element of g, so this scatter has no races.
        low, before, high, behind = rolled(dz0, base, first, size, words[3], mask, BLOCK)
        old = read_rolled(low, before, high, behind, COMPUTE)
        pulled = signed(g, first, sample, words[0], words[1], words[2], BLOCK, COMPUTE)
        new = (linear * pulled + old).to(dz0.dtype.element_ty)
        tl.store(low, new, mask=before)
        tl.store(high, new, mask=behind)
    if KIND == GIVEN:
        write(dz0, base + j, linear * g, mask)
