# SPDX-License-Identifier: Apache-2.0
"""The gradient through the last steps alone, as a memory strategy."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradsampler import _checks
from gradsampler.engine.trajectory import Trajectory
from gradsampler.memory import named
from gradsampler.memory.base import Memory
from gradsampler.policies.last_steps import LastSteps
from gradsampler.policies.reach import applied


@dataclass(frozen=True)
class Truncated(Memory):
    """`policies.LastSteps` under the name of a memory strategy: not the gradient of the run.

    ``Truncated(4, "revolve:2")`` is ``memory="revolve:2", gradient=LastSteps(4)``.

    Args:
        steps: how many, at least 1; a final denoising belongs to the last one.
        inner: the memory of these steps, a name of `memory.names()` or an object, but not
            `Reversible`, which needs the whole run.
    """

    steps: int
    inner: str | Memory = "checkpoint"
    exact: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _checks.integer("Truncated: steps", self.steps, 1)
        inner = named.exact("Truncated: inner", self.inner)
        if not (inner.exact and inner.any_program):
            # The last steps alone start from states that no subtraction leads back to.
            _checks.fail("Truncated: inner", "be another strategy", repr(self.inner))

    def run(self, trajectory: Trajectory, z0: Tensor) -> Tensor:
        inner = named.exact("Truncated: inner", self.inner)
        if torch.is_grad_enabled():
            trajectory = applied(LastSteps(self.steps), trajectory, z0, "memory=Truncated")
        return inner.run(trajectory, z0)
