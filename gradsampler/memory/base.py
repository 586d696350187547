# SPDX-License-Identifier: Apache-2.0
"""What every memory strategy offers."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from gradsampler.engine.trajectory import Trajectory


class Memory(ABC):
    """Decides what a run keeps for its backward, and what backward recomputes."""

    exact: ClassVar[bool] = True  # gives the gradient of the run, to rounding
    any_program: ClassVar[bool] = True  # runs every solver, also what is no solver's
    transformable: ClassVar[bool] = False  # torch.func, vmap and forward mode see through it

    @abstractmethod
    def run(self, trajectory: Trajectory, z0: Tensor) -> Tensor:
        """The output [B, *state] of the trajectory from ``z0``, connected for autograd.

        Both are of the trajectory's state dtype.
        """
