# SPDX-License-Identifier: Apache-2.0
"""Does a model call return the same when it is made again?

An output is read once, as sums of elements with weights that all differ: so any element that
changes shows, and so do any two that change places. Sums of two calls may differ by what kernels do
that add in no fixed order; where few sums differ at all, few elements do, and that is less. A
change of the Jacobian that leaves the values as they are cannot be seen. Of an output of few
elements a copy costs less than sums, and is what is compared.
"""

import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

# How far elements of two calls may be apart, relative to the root of their mean square. Of float32
# it is what convolutions do on a GPU, where they may compute in TF32.
_ROUNDING = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 3e-3,
    torch.bfloat16: 2e-2,
}
_TERMS = 128  # elements a sum,
_SUMS = 8192  # more of them where there would be more sums than so many
_PART = 2**20  # elements in 16 bits that are widened at a time
_FEW = 2**10  # elements of an output that is copied: no more than the bookkeeping of a call


class Sketch(NamedTuple):
    """Sums over an output of a model call."""

    sums: Tensor  # [S] in float32 at least; with one element a sum, a copy of the output
    terms: int  # elements a sum
    rounding: float

    @property
    def kind(self) -> object:
        """What sketches of one output have in common."""
        return self.sums.shape, self.sums.dtype, self.sums.device, self.terms, self.rounding

    @classmethod
    def of(cls, output: Tensor, dtypes: Iterable[torch.dtype] = ()) -> "Sketch":
        """Reads an output, which was computed in its own dtype or in one of ``dtypes``."""
        if output.numel() > _FEW:
            return cls.summed(output, dtypes)
        copy = output.detach().clone(memory_format=torch.contiguous_format)
        return cls(copy, 1, _rounding(output, dtypes))

    @classmethod
    def summed(cls, output: Tensor, dtypes: Iterable[torch.dtype] = ()) -> "Sketch":
        """As `of`, with sums of any output: of a network's parts there may be many small ones."""
        count, flat = output.numel(), output.detach()
        terms, rounding = _terms(count), _rounding(output, dtypes)
        if count % terms:
            flat = pad(flat.flatten(), (0, -count % terms))
        # The elements of a sum are far apart, so that the rows are read in their order.
        rows = flat.reshape(terms, -1)
        device = rows.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return cls(_summed(rows), terms, rounding)
        return cls(_summed(rows), terms, rounding)

    @property
    def size(self) -> int:
        """Bytes that it takes."""
        return self.sums.numel() * self.sums.element_size()

    def matches(self, again: Tensor) -> bool:
        """Whether another call's output is known at once to be the same, to the bit."""
        copied = self.terms == 1 and self.sums.device.type == "cpu" and again.device.type == "cpu"
        return copied and self.sums.dtype == again.dtype and torch.equal(self.sums, again)


def _rounding(output: Tensor, dtypes: Iterable[torch.dtype]) -> float:
    return max(_ROUNDING.get(dtype, 2e-2) for dtype in (output.dtype, *dtypes))


def changed(pairs: Sequence[tuple[Sketch, Sketch]]) -> list[bool]:
    """Whether outputs are others beyond rounding, from the sketches of both calls.

    Reads back once from each device.
    """
    flags = [first.kind != again.kind for first, again in pairs]
    alike: dict[object, list[int]] = {}
    for k, (first, _) in enumerate(pairs):
        if not flags[k]:
            alike.setdefault(first.kind, []).append(k)
    for places in alike.values():
        (_, terms, rounding), _ = pairs[places[0]]
        old, new = (
            torch.stack([pair[i].sums for pair in (pairs[k] for k in places)]).flatten(1)
            for i in (0, 1)
        )
        wide = torch.promote_types(old.dtype, torch.float32)
        old = old.to(wide)
        error = (new.to(wide) - old).abs()
        # If a quarter of the sums differ, all of the elements may.
        spread = (4 * (error != 0).to(error.dtype).mean(1)).clamp(max=1)
        room = rounding * ((1 + (terms - 1) * spread) / terms).sqrt()
        # A NaN compares false: it is what the first call returned as well, or is seen later.
        found = error.amax(1) > room * old.abs().amax(1)
        for k, flag in zip(places, found.tolist(), strict=True):
            flags[k] = flag
    return flags


@cache
def _terms(count: int) -> int:
    """Elements a sum for an output of ``count``: a divisor, if there is one of about the size."""
    least = max(1, min(_TERMS, count // 16), count // _SUMS)
    return next((n for n in range(least, 4 * least) if count % n == 0), least)


def _summed(rows: Tensor) -> Tensor:
    """[S] sums over the rows [terms, S], each with a weight of its own."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    weights = _weights(rows.shape[0], wide, rows.device)
    if rows.dtype == wide:
        return torch.mv(rows.t(), weights)
    if rows.numel() <= _PART:
        return torch.mv(rows.to(wide).t(), weights)
    sums = torch.zeros(rows.shape[1], dtype=wide, device=rows.device)
    count = max(1, _PART // len(sums))
    for part, weight in zip(rows.split(count), weights.split(count), strict=True):
        sums.addmv_(part.to(wide).t(), weight)
    return sums


@cache
def _weights(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[count] different weights of 0.5 to 1.5 and of either sign.

    Their sum is about three roots of their number: so a sum over constants is as large as the
    largest of many sums over random numbers.
    """
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(count, generator=generator, device="cpu")
    positive = (count + 3 * math.sqrt(count)) / 2
    signs = torch.where(torch.arange(count, device="cpu") < positive, 1, -1)
    signs = signs[torch.randperm(count, generator=generator, device="cpu")]
    return (signs * (0.5 + (order + 0.5) / count)).to(device, dtype)
