# SPDX-License-Identifier: Apache-2.0
"""A part of a denoiser that several processes share, as a run has to handle it.

It expects one forward and one backward a step of training. A run calls the network many times,
calls it again in backward, and pulls cotangents back call by call; so each wrapper is told when a
call is one of a run's, and sees the run as its forward.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor


class Wrapper:
    """Modules of one kind that share their work, or their weights, with other processes."""

    def groups(self) -> list[Any]:
        """The process groups whose ranks make the same calls."""
        return []

    def check(self) -> None:
        """Raises where a run cannot begin."""

    def begin(self) -> None:
        """The wrapper's own forward begins: that of the run."""

    def finish(self, x: Tensor) -> Tensor:
        """The wrapper's own forward ends with the output of the run."""
        return x

    def call(self) -> AbstractContextManager[object]:
        """For the time of a model call of a run, the first one or a repeated one."""
        return nullcontext()

    def backward(self) -> AbstractContextManager[object]:
        """For the time of a run's backward, at whose end gradients are reduced."""
        return nullcontext()

    def owner(self, leaf: Tensor) -> Tensor | None:
        """The parameter that a leaf of a call's graph stands for; None where it is not ours."""
        return None

    def catching(self, leaves: Sequence[Tensor]) -> AbstractContextManager[object]:
        """For the time of the backward of a call: takes the gradients of those that are ours."""
        return nullcontext()

    def reduced(self, owner: Tensor) -> Tensor | None:
        """The gradient of a parameter, after `backward`."""
        return None
