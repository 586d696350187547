# SPDX-License-Identifier: Apache-2.0
"""What the launchers share on the host: compute type, memory order, scalars and grid."""

import math
import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from gradsampler.contract import GIVEN, OFF, SINCOS, Draw

NONE, EVERY, LAST = range(3)  # which tiles have a mask

# Integers whose values change from step to step and must not compile a kernel anew. Triton heeds
# this for arguments of their own alone, not within a tuple.
UNSPECIALISED = [
    "step", "seed_low", "seed_high", "offset", "normal_low", "normal_high", "count"
]  # fmt: skip

WARP = 32 if torch.version.hip is None else 64  # threads


def compute_type(*dtypes: torch.dtype | None) -> tl.dtype:
    """float64 if any of the dtypes is, else float32."""
    return tl.float64 if torch.float64 in dtypes else tl.float32


def normals_kind(
    normal: bool, x: Tensor, per_sample: bool, compute: tl.dtype, *dtypes: torch.dtype | None
) -> int:
    """How ``kernels.noise`` draws for tensors like ``x``: 0 not at all; 1 four by a Philox block,
    where tiles start at multiples of 4 elements, else 2; 3 as 1, in the accuracy of 16 bits.

    That does where all results have these: then ``dtypes`` are theirs, and the hardware has the
    functions.
    """
    if not normal:
        return 0
    if per_sample and x.shape[0] and x.numel() // x.shape[0] % 4:
        return 2
    known = [dtype for dtype in dtypes if dtype is not None]
    short = compute == tl.float32 and WARP == 32 and known
    return 3 if short and all(dtype.itemsize == 2 for dtype in known) else 1


def block_size(normals: int, compute: tl.dtype) -> int:
    """The usual number of elements a program, at Triton's default of 4 warps; ``normals`` as by
    `normals_kind`.
    """
    # Two 16-byte loads a thread, or one of a 16-bit dtype. Drawing normals has a fixed cost a
    # thread, which twice as many elements share, or four times as many of 16 bits; in float64 they
    # would not fit the registers.
    if compute == tl.float64:
        return 16 * WARP
    return (32, 64, 64, 128)[normals] * WARP


def dtype_of(x: Tensor | None) -> torch.dtype | None:
    """The dtype of a tensor that may be absent."""
    return None if x is None else x.dtype


def noise_dtypes(draw: Draw | None, z0: Tensor | None) -> tuple[torch.dtype | None, ...]:
    """The dtypes of the tensors that ``draw`` is made of."""
    return (dtype_of(z0), dtype_of(draw.given)) if draw is not None else ()


def float32(x: float) -> float:
    """The nearest float32."""
    return struct.unpack("f", struct.pack("f", x))[0]


def numbers(values: Sequence[float], compute: tl.dtype) -> tuple[Any, ...]:
    """Scalars as kernel arguments: floats, or for float64 triples of float32 that add up to one.

    Triton passes a Python float as float32, and compiles integers anew by their value.
    """
    if compute != tl.float64:
        return tuple(float(x) for x in values)
    triples = []
    for x in values:
        high = float32(x)
        middle = float32(x - high)
        triples.append((high, middle, float32(x - high - middle)))
    return tuple(triples)


def signed(word: int) -> int:
    """The low 32 bits as a signed integer: an argument's type must not depend on its value."""
    return ((word & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def words(draw: Draw) -> tuple[int, ...]:
    """The integers of an injection as kernel arguments, in the order of ``kernels.noise``."""
    step, offset = signed(draw.step), draw.offset
    seed = signed(draw.seed), signed(draw.seed >> 32)
    return step, *seed, offset, signed(draw.normal_seed), signed(draw.normal_seed >> 32)


def scalar(x: float | Tensor, compute: tl.dtype) -> tuple[Any, int]:
    """One coefficient as `coefficients` gives them; a tensor holds one element or [B]."""
    if isinstance(x, Tensor):
        return x.contiguous(), 0 if x.numel() == 1 else 1
    return numbers([x], compute), -1


def is_zero(x: float | Tensor) -> bool:
    """Whether an amount is zero and known to be without reading a tensor."""
    return not isinstance(x, Tensor) and x == 0


def coefficients(coefs: Sequence[float] | Tensor, compute: tl.dtype) -> tuple[Any, int]:
    """Coefficients as a kernel argument with its stride by sample, -1 if passed by value."""
    if isinstance(coefs, Tensor):
        return coefs.contiguous(), coefs.shape[-1] if coefs.ndim == 2 else 0
    return numbers(coefs, compute), -1


class Injection(NamedTuple):
    """A `Draw` as kernel arguments, see ``kernels.noise``."""

    kind: int
    normal: bool  # whether it holds Philox normals
    source: Tensor | None  # z0 or the given tensor, whichever the kernel reads
    numbers: tuple[Any, ...]
    words: tuple[int, ...]


def injection(draw: Draw | None, z0: Tensor | None, compute: tl.dtype) -> Injection:
    """The kernel's view of ``draw``; None draws nothing."""
    if draw is None:
        return Injection(OFF, False, None, (), words(Draw(OFF, 0)))
    rate = draw.rate / math.pi
    high = rate if compute == tl.float64 else float32(rate)
    values = numbers(
        [
            draw.normal,
            draw.weight * (draw.gain if draw.kind == SINCOS else 1.0),
            draw.weight * draw.amplitude,
            high,
            rate - high,
            math.remainder(draw.phase / math.pi, 2.0),
            draw.weight * draw.amplitude * draw.rate,
            math.remainder(draw.phase / math.pi + 0.5, 2.0),
        ],
        compute,
    )
    source = {OFF: None, GIVEN: draw.given}.get(draw.kind, z0)
    return Injection(draw.kind, draw.normal != 0, source, values, words(draw))


class Tiling(NamedTuple):
    """How programs divide the elements; ``size`` and ``count`` are kernel arguments."""

    size: int  # elements a sample, or of the whole tensor where samples do not matter
    count: int  # programs a sample
    programs: int
    mask: int  # NONE, EVERY or LAST of ``kernels.noise``


def tiling(x: Tensor, per_sample: bool, block: int) -> Tiling:
    """Tiles of ``block`` elements that never straddle two samples if ``per_sample``."""
    samples = x.shape[0] if per_sample else 1
    size = x.numel() // samples if samples else 0
    count = -(-size // block)
    mask = NONE if size % block == 0 else EVERY if per_sample or size % 16 == 0 else LAST
    return Tiling(size, count, count * samples, mask)


def _dense(x: Tensor) -> bool:
    span = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1:
            if stride != span:
                return False
            span *= size
    return True


def in_one_order(tensors: Sequence[Tensor | None], elementwise: bool) -> list[Tensor | None]:
    """The tensors in one dense memory order, copied only where they are not.

    Any dense order that all share will do where the kernel is elementwise; where it counts
    elements (normals, rolls, samples) the order is the contiguous one.
    """
    present = [x for x in tensors if x is not None]
    if all(x.is_contiguous() for x in present):
        return list(tensors)
    first = present[0]
    if elementwise and _dense(first) and all(x.stride() == first.stride() for x in present):
        return list(tensors)
    return [None if x is None else x.contiguous() for x in tensors]


def like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor in the memory order of ``x``, which is dense."""
    return torch.empty_like(x, dtype=dtype or x.dtype)


def sum_programs(partial: Tensor, count: int) -> Tensor:
    """[rows, samples] float64: the programs' sums added up in an order fixed by the shape."""
    rows, programs = partial.shape
    return partial.view(rows, programs // max(count, 1), count).sum(-1, dtype=torch.float64)


def on_device(x: Tensor) -> AbstractContextManager[object]:
    """Makes the device of ``x`` the current one, which is where Triton launches."""
    if x.device.type == "cpu" or x.device.index == torch.accelerator.current_device_index():
        return nullcontext()
    return torch.accelerator.device_index(x.device.index)
