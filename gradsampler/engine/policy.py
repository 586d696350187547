# SPDX-License-Identifier: Apache-2.0
"""Which derivatives the backward of a run takes."""

from collections.abc import Iterable

from torch import Tensor

from gradsampler.engine.cut import Cut
from gradsampler.engine.program import Program, Slot


class Policy:
    """Which derivatives backward takes: here all of them; subclasses leave some out.

    A policy does not change the sample. It gives the gradient of another function: of the run in
    which everything that the policy treats as a constant is detached.
    """

    @property
    def exact(self) -> bool:
        """Whether it gives the gradient of the run."""
        return False

    @property
    def whole(self) -> bool:
        """Whether backward goes through all of the run, to its beginning."""
        return True

    @property
    def reshapes(self) -> bool:
        """Whether `passes` changes anything."""
        return False

    def placed(self, num_steps: int) -> "Policy":
        """The policy in one run of so many steps; checks what it has for each."""
        return self

    def cut(self, program: Program, given: Iterable[Slot]) -> Cut | None:
        """The part of a program that is differentiated, where that is not all of it.

        Args:
            program: the whole.
            given: the slots that are there before its first instruction.
        """
        return None

    def pulls(self, step: int) -> bool:
        """Whether the model calls of a step are differentiated at all."""
        return True

    def enters(self, step: int) -> bool:
        """Whether they are differentiated by their input."""
        return True

    def passes(self, step: int, lam: Tensor) -> Tensor:
        """What goes on of the cotangent [B, *state] of the state that a step's first call sees."""
        return lam


class Exact(Policy):
    """The gradient of the run."""

    exact = True


EXACT = Exact()
