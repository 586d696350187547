# SPDX-License-Identifier: Apache-2.0
"""Philox4x32-10, a counter-based random generator, in plain torch.

Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. A block of
four 32-bit words is a pure function of a 128-bit counter and a 64-bit key, so the same element
gets the same number whatever the launch shape, the backend or the sharding.

The last word of the counter names the use, as `gradsampler.contract` has it. The third one is
``step`` below: `counter` of a step's draw.
"""

import math
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from gradsampler import _checks
from gradsampler.contract import NORMALS, OFFSETS, SIGNS

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

_STEPS, _DRAWS = 2**20, 2**12  # that one word holds

Word = TypeVar("Word", int, Tensor)


def _mul_hi_lo(a: int, b: Word) -> tuple[Word, Word]:
    # The int64 product wraps, but its 64 bits are those of the unsigned product.
    product = a * b
    return (product >> 32) & _MASK, product & _MASK


def philox4x32(counter: tuple[Word, Word, Word, Word], seed: int) -> tuple[Word, ...]:
    """The ten rounds of Philox4x32 (Salmon et al. 2011, section 4.2).

    Args:
        counter: four int64 tensors of one shape, each holding 32-bit words; or four ints.
        seed: the 64-bit key; its low word is the first key word.

    Returns:
        Four int64 tensors of that shape, each holding 32-bit words; or four ints.

    Example:
        >>> import torch
        >>> zero = torch.zeros((), dtype=torch.int64)
        >>> [hex(int(w)) for w in philox4x32((zero, zero, zero, zero), 0)]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        hi0, lo0 = _mul_hi_lo(_MULTIPLIERS[0], c0)
        hi1, lo1 = _mul_hi_lo(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def counter(step: int, draw: int) -> int:
    """The 32-bit word that names draw number ``draw`` of a step; of the first it is the step.

    Raises:
        ValueError: beyond 4096 draws a step, and for steps from 2**20 on that draw twice.
    """
    if draw == 0:
        return step
    if not 0 <= step < _STEPS or not 0 < draw < _DRAWS:
        expected = f"be below {_DRAWS} in a step below {_STEPS}"
        _checks.fail("noise: the number of a draw", expected, f"{draw} in step {step}")
    return step + draw * _STEPS


def _words(index: Tensor, second: Tensor | int, step: int, use: int, seed: int) -> Tensor:
    """Blocks with counters (index, second, step, use), stacked on a last axis of four words."""
    c1 = second if isinstance(second, Tensor) else torch.full_like(index, second)
    counter = (index, c1, torch.full_like(index, step), torch.full_like(index, use))
    return torch.stack(philox4x32(counter, seed), dim=-1)


def normals(count: int, step: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Standard normals of the elements 0 .. count-1, by Box and Muller (1958).

    Element e takes block e // 4, counter (low word, high word, step, 0). Words 0 and 1 give the
    elements 0 and 1 of the block, words 2 and 3 the elements 2 and 3:
    ``r = sqrt(-2 log u)``, ``n = r cos(2 pi w)`` and ``r sin(2 pi w)``. The words are rounded to
    float32 first; then ``u = word * 2^-32 + 2^-33`` in float32, and ``w = word * 2^-32``. Fixing
    these roundings makes every backend agree to those of its logarithm, root and sine.

    Returns:
        [count] tensor of ``dtype``; computed in float64 for float64 and in float32 otherwise.
    """
    block = torch.arange((count + 3) // 4, dtype=torch.int64, device=device)
    words = _words(block & _MASK, block >> 32, step, NORMALS, seed)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    unit = words.to(torch.float32) * 2.0**-32
    radius = torch.sqrt(-2.0 * torch.log((unit[:, 0::2] + 2.0**-33).to(compute)))
    angle = (2.0 * math.pi) * unit[:, 1::2].to(compute)
    pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return pairs.reshape(-1)[:count].to(dtype)


def signs(batch: int, size: int, step: int, seed: int, device: torch.device) -> Tensor:
    """Independent random signs, [batch, size] int8 of -1 and 1.

    Element j of a sample takes bit j mod 32 of word (j mod 128) // 32 of the block with counter
    (j // 128, sample, step, 1), so that one block serves 128 neighbours; a set bit means -1.
    """
    block = torch.arange((size + 127) // 128, dtype=torch.int64, device=device)
    sample = torch.arange(batch, dtype=torch.int64, device=device)
    index, second = torch.broadcast_tensors(block[None, :], sample[:, None])
    words = _words(index, second, step, SIGNS, seed)
    bits = (words[..., None] >> torch.arange(32, device=device)) & 1
    return (1 - 2 * bits.reshape(batch, -1)[:, :size]).to(torch.int8)


@lru_cache(maxsize=2**14)
def offset(size: int, step: int, seed: int) -> int:
    """A random roll offset in 1 .. size-1 for one step, the same for every sample."""
    if size < 2:
        _checks.fail("SignedRoll: z0", "hold at least 2 elements a sample", size)
    low, high, _, _ = philox4x32((0, 0, step, OFFSETS), seed)  # of ints: no launch for a number
    return 1 + (low + (high << 32)) % (size - 1)
