# SPDX-License-Identifier: Apache-2.0
"""Keep the states, compute the activations again."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsampler.engine.adjoint import Adjoint, Connection
from gradsampler.engine.trajectory import Trajectory
from gradsampler.memory.base import Memory
from gradsampler.memory.store import Store


@dataclass(frozen=True)
class Checkpoint(Memory):
    """One state a model call, and the activations of one call at a time.

    Backward calls the model once more at each state: 4/3 of the time of `Store` if the backward of
    a call costs two forwards. If the denoiser captures a tensor that has a graph of its own, a
    gradient hook on it runs once for each model call, on that call's share; pass such a tensor in
    ``cond`` to have it run once.
    """

    def run(self, trajectory: Trajectory, z0: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return Store().run(trajectory, z0)
        adjoint = Adjoint(trajectory, Resident(), z0)
        return Connection.apply(adjoint, z0, trajectory.program.coefficients, *adjoint.inputs())


class Resident:
    """States that stay where they are."""

    def __init__(self) -> None:
        self._states: list[Tensor] = []

    def save(self, index: int, x: Tensor) -> None:
        """Keeps the state of evaluation ``index``."""
        assert index == len(self._states)
        self._states.append(x)

    def load(self, index: int) -> Tensor:
        """Returns it."""
        return self._states[index]

    def release(self) -> list[Tensor]:
        """Hands the states over to autograd."""
        states, self._states = self._states, []
        return states

    def adopt(self, tensors: Sequence[Tensor]) -> None:
        """Takes them back."""
        self._states = list(tensors)
