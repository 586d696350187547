# SPDX-License-Identifier: Apache-2.0
"""Philox4x32-10 and what is drawn from it, one element at a time.

Python integers and float64 ``math``, which share no code with the package; `test_philox` holds them
to the published answers.
"""

import itertools
import math
import struct

import numpy as np
import pytest
import torch

ONES = 0xFFFFFFFF

# (relative, absolute) error against the float64 oracle. In float32 the angle alone is off by half
# an ulp of 2 pi, 4e-7, times a radius of at most 6.8; 16-bit results add half an ulp of their own.
TOLERANCE = {
    torch.float64: (1e-14, 1e-14),
    torch.float32: (1e-6, 4e-6),
    torch.float16: (5e-4, 4e-6),
    torch.bfloat16: (4e-3, 4e-6),
}
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in TOLERANCE]


def philox_block(counter, seed):
    """Philox4x32-10 of Salmon et al. (2011), the key bumped before each round but the first."""
    words, key = list(counter), [seed % 2**32, seed // 2**32]
    for k in range(10):
        if k:
            key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
        high0, low0 = divmod(0xD2511F53 * words[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * words[2], 2**32)
        words = [high1 ^ words[1] ^ key[0], low1, high0 ^ words[3] ^ key[1], low0]
    return words


def float32(x):
    """``x`` rounded once to float32."""
    return struct.unpack("f", struct.pack("f", x))[0]


def box_muller(words):
    """The four normals of a block: u and w by float32 arithmetic, everything else in float64."""
    normals = []
    for radius_word, angle_word in (words[:2], words[2:]):
        u = float32(float32(radius_word * 2.0**-32) + 2.0**-33)
        w = float32(angle_word * 2.0**-32)
        radius = math.sqrt(-2.0 * math.log(u))
        normals += [radius * math.cos(2 * math.pi * w), radius * math.sin(2 * math.pi * w)]
    return normals


def scalar_normals(count, step, seed):
    """Normals of the elements 0 .. count-1 from the blocks (element // 4, 0, step, 0)."""
    blocks = [box_muller(philox_block((k, 0, step, 0), seed)) for k in range(-(-count // 4))]
    return np.array(list(itertools.chain.from_iterable(blocks))[:count], dtype=np.float64)


def scalar_sign(j, sample, step, seed):
    """Bit j mod 32 of word (j mod 128) // 32 of the block (j // 128, sample, step, 1)."""
    word = philox_block((j // 128, sample, step, 1), seed)[j % 128 // 32]
    return -1 if (word >> (j % 32)) % 2 else 1


def scalar_offset(size, step, seed):
    """The first two words of the block (0, 0, step, 2) as one 64-bit number, into 1 .. size-1."""
    words = philox_block((0, 0, step, 2), seed)
    return 1 + (words[0] + 2**32 * words[1]) % (size - 1)


def correlation(x, y):
    return float(np.corrcoef(np.ravel(x), np.ravel(y))[0, 1])
