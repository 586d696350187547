# SPDX-License-Identifier: Apache-2.0
"""Directional derivatives by central differences, and what they say of autograd's.

For a map F, a direction v and a cotangent w, autograd's <J^T w, v> and the quotient
<w, (F(x + h v) - F(x - h v)) / 2h> are one number. The quotient is off by c h^2 where h is large,
and by the rounding of F over h where h is small. So h runs down a ladder; quotients of neighbouring
rungs, and their extrapolation to h = 0 (Ridders 1982), say by how much each is off, and the best
is taken. Autograd has no part in that choice.

Beside a kink closer than h, as of a rectified unit, all quotients are off alike, by half the jump
of the slope. There (F(x + h v) + F(x - h v) - 2 F(x)) / 2h does not fall with h.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Comparison", "Ladder", "Point"]

_RUNGS = 5  # to begin with; each half of the one before
_MOST = 12
_CEILING = 2.0  # of h, for a direction of the size of the point


class Point(NamedTuple):
    """The map at a point on the line: what it gives, and where the point came to lie."""

    outputs: Sequence[Tensor]
    inputs: Sequence[Tensor]  # rounded to their dtypes


class Measured(NamedTuple):
    """The map on both sides of the point."""

    quotient: Tensor  # [n] of all outputs
    even: Tensor  # [n] half the difference of the quotients ahead and behind
    moves: list[Tensor]  # the direction as rounded


class Rung(NamedTuple):
    """A difference quotient, or one extrapolated from two."""

    h: float
    quotient: Tensor  # [n] of all outputs
    even: Tensor  # [n] half the difference of the quotients ahead and behind
    moved: tuple[float, ...]  # autograd's derivative along the rounded direction, by cotangent


@dataclass(frozen=True)
class Comparison:
    """Autograd's directional derivative beside the best difference quotient."""

    autograd: float
    difference: float
    uncertainty: float  # of the difference, by the ladder
    scale: float  # of derivatives along such directions, where this one happens to be small
    h: float  # the step taken, relative to the size of the point
    precision: float  # to how much of itself an output is rounded, by dtype or as measured

    @property
    def error(self) -> float:
        """The relative error of autograd's derivative."""
        return abs(self.autograd - self.difference) / self.scale if self.scale else 0.0

    @property
    def tolerance(self) -> float:
        """The relative error that rounding explains: autograd's own, and the difference's."""
        own = min(max(1e4 * self.precision, 1e-6), 1e-2)
        return own + (self.uncertainty / self.scale if self.scale else 0.0)

    @property
    def agrees(self) -> bool:
        """Whether the two are one number, to rounding."""
        return self.error <= self.tolerance

    @property
    def blind(self) -> bool:
        """Whether an error of a tenth could not be seen."""
        return self.tolerance > 0.1


class Ladder:
    """Difference quotients of a map along a line, with ever smaller steps.

    Args:
        at: from h to the map at x + h v, with v as large as x.
        precision: to how much of itself an output is rounded, as far as dtypes tell.
    """

    def __init__(self, at: Callable[[float], Point], precision: float) -> None:
        self._at, self._precision = at, precision
        # Truncation of the extrapolated quotient, h^4, is as large as rounding, precision / h.
        self._first = min(4 * precision**0.2, _CEILING / 2)
        self._here = _flat(self._at(0.0).outputs)
        self._size = _rms(self._here)
        self._start = self._measured(self._first)
        self.direction = self._start.quotient  # [n] what the outputs move by along the line

    def _measured(self, h: float) -> Measured:
        up, down = self._at(h), self._at(-h)
        ahead, behind = _flat(up.outputs), _flat(down.outputs)
        return Measured(
            (ahead - behind) / (2 * h),
            (ahead + behind - 2 * self._here) / (2 * h),
            [
                (a.double() - b.double()) / (2 * h)
                for a, b in zip(up.inputs, down.inputs, strict=True)
            ],
        )

    def compare(
        self, cotangents: Sequence[Tensor], pulled: Sequence[Sequence[Tensor | None]]
    ) -> list[Comparison]:
        """Autograd's derivatives along the line beside the quotients.

        Args:
            cotangents: each [n], for all outputs.
            pulled: for each of them autograd's gradients, one an input of the map.
        """

        def rung(h: float) -> Rung:
            quotient, even, moves = self._start if h == self._first else self._measured(h)
            return Rung(h, quotient, even, tuple(_inner(g, moves) for g in pulled))

        rungs = [rung(self._first / 2**k) for k in range(_RUNGS)]
        while True:
            found = self._estimates(rungs, cotangents)
            best = [min(choices, key=lambda choice: choice.uncertainty) for choices in found]
            highest, lowest = rungs[0].h, rungs[-1].h
            if len(rungs) == _MOST:
                return best
            # Below the best step rounding doubles with each rung.
            if any(
                choice.h == lowest and choice.uncertainty < 4 * least.uncertainty
                for least, choices in zip(best, found, strict=True)
                for choice in choices
            ):
                rungs.append(rung(lowest / 2))
            elif any(each.h >= highest / 4 for each in best) and 2 * highest <= _CEILING:
                rungs.insert(0, rung(2 * highest))
            else:
                return best

    def _estimates(self, rungs: list[Rung], cotangents: Sequence[Tensor]) -> list[list[Comparison]]:
        """For each cotangent an estimate from each two neighbours."""
        better = [
            Rung(
                b.h,
                (4 * b.quotient - a.quotient) / 3,
                b.even,
                tuple((4 * q - p) / 3 for p, q in zip(a.moved, b.moved, strict=True)),
            )
            for a, b in pairwise(rungs)
        ]
        pairs = [*pairwise(rungs), *pairwise(better)]
        spreads = [_rms(b.quotient - a.quotient) for a, b in pairs]
        kinks = [_outliers(2 * b.even - a.even) for a, b in pairs]  # 0 for what falls with h
        noise = min(s * b.h for s, (_, b) in zip(spreads, pairs, strict=True))
        precision = max(self._precision, noise / self._size if self._size else 0.0)
        found = []
        for i, w in enumerate(cotangents):
            length = float(w.norm())
            choices = []
            for spread, jumps, (a, b) in zip(spreads, kinks, pairs, strict=True):
                before, here = (float(w @ x.quotient) - x.moved[i] for x in (a, b))
                # Rounding is independent from element to element, and so hardly adds up along w.
                uncertainty = abs(here - before) + 3 * length * spread + float(w.abs() @ jumps)
                difference = here + b.moved[i]
                typical = length * _rms(b.quotient)
                scale = max(abs(difference), abs(b.moved[i]), typical)
                choices.append(
                    Comparison(b.moved[i], difference, uncertainty, scale, b.h, precision)
                )
            found.append(choices)
        return found


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x.double().flatten() for x in tensors])


def _outliers(x: Tensor) -> Tensor:
    """By how much elements exceed what is common, as kinks do and rounding does not."""
    size = x.abs()
    return (size - 8 * size.median()).clamp_min(0.0)


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt()) if x.numel() else 0.0


def _inner(gradients: Sequence[Tensor | None], moved: Sequence[Tensor]) -> float:
    pairs = [(g, v) for g, v in zip(gradients, moved, strict=True) if g is not None]
    return sum(float((g.double() * v).sum()) for g, v in pairs)
