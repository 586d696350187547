# SPDX-License-Identifier: Apache-2.0
"""What every backend of the fused ops must agree on; csrc/contract.h says the same to C++.

The formulas are not here: torch, Triton and C++ state them each on its own, so that they can be
held against one another.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

MAX_TERMS = 12  # of one fused step; of an adjoint step with the model's gradient counted in

OFF, SINCOS, SIGNED_ROLL, GIVEN = range(4)  # the kinds of f in a `Draw`
OF_Z0 = (SINCOS, SIGNED_ROLL)  # whose cotangent goes to z0

# The last word of a Philox counter names the use, so that no two uses share a block.
NORMALS, SIGNS, OFFSETS = range(3)

# The coefficients of an ancestral step, in their order.
ANCESTRAL = ("r1", "r2", "c1", "c2", "log_max", "log_min")


class Draw(NamedTuple):
    """One injection as plain numbers, which is all that a kernel needs to know of it.

    ``n = normal * N(normal_seed, step) + weight * f(z0)``, where ``kind`` names f. The order of
    the fields is that of the two lists in which an injection travels: `WORDS`, then `NUMBERS`.
    """

    kind: int  # OFF, SINCOS, SIGNED_ROLL or GIVEN
    step: int  # the Philox counter's third word, `philox.counter` of the step and the draw
    seed: int = 0  # signed roll: seed of the signs
    offset: int = 0  # signed roll: f[j] = sign[j] * z0[(j - offset) mod M]
    normal_seed: int = 0
    weight: float = 1.0
    gain: float = 0.0  # sincos: f = gain * z0 + amplitude * sin(rate * z0 + phase)
    rate: float = 0.0
    amplitude: float = 0.0
    phase: float = 0.0
    normal: float = 0.0  # weight of the Philox normal
    given: Tensor | None = None  # f is this tensor

    @property
    def lists(self) -> tuple[list[int], list[float]]:
        """The words, seeds as the signed integers of a schema, and the numbers."""
        (
            kind, step, seed, offset, normal_seed,
            weight, gain, rate, amplitude, phase, normal, _,
        ) = self  # fmt: skip
        words = [kind, step, signed(seed), offset, signed(normal_seed)]
        return words, [weight, gain, rate, amplitude, phase, normal]

    @classmethod
    def of(cls, words: Sequence[int], numbers: Sequence[float], given: Tensor | None) -> "Draw":
        """The injection of these lists."""
        kind, step, seed, offset, normal_seed = words
        weight, gain, rate, amplitude, phase, normal = numbers
        return cls(
            kind, step, seed % 2**64, offset, normal_seed % 2**64,
            weight, gain, rate, amplitude, phase, normal, given,
        )  # fmt: skip


WORDS = Draw._fields[: Draw._fields.index("weight")]
NUMBERS = Draw._fields[len(WORDS) : Draw._fields.index("given")]


def signed(word: int) -> int:
    """An unsigned 64-bit word as the signed integer that a schema takes."""
    return word - 2**64 if word >= 2**63 else word


class StepGrads(NamedTuple):
    """What the backward of a step returns; None where it was not asked for."""

    terms: list[Tensor | None]  # [B, *state], of the dtypes of the terms
    coefs: Tensor | None  # float64, [K] or [B, K]
    noise_coef: Tensor | None  # float64, 0-d or [B]
    given: Tensor | None  # [B, *state]


class AncestralGrads(NamedTuple):
    """What the backward of an ancestral step returns; None where it was not asked for."""

    x: Tensor | None  # [B, C, *space]
    model_output: Tensor | None  # as the model output, eps and v along dim 1
    noise: Tensor | None  # [B, C, *space]


class ReparameterizeGrads(NamedTuple):
    """What the backward of a reparameterized draw returns; None where it was not asked for."""

    mean: Tensor | None  # [B, *state]
    log_variance: Tensor | None  # as the log variance
    noise: Tensor | None  # [B, *state]
    nonzero: Tensor | None  # [B]


class FlowPairGrads(NamedTuple):
    """What the backward of a flow pair returns; None where it was not asked for."""

    x0: Tensor | None  # [B, *state]
    x1: Tensor | None  # [B, *state]
    t: Tensor | None  # [B]
