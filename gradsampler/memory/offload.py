# SPDX-License-Identifier: Apache-2.0
"""Keep the states elsewhere: in the host's memory or in files."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gradsampler import _checks
from gradsampler.engine.adjoint import Adjoint, Connection, States
from gradsampler.engine.trajectory import Trajectory
from gradsampler.memory.base import Memory
from gradsampler.memory.checkpoint import Resident
from gradsampler.memory.files import Files
from gradsampler.memory.host import Host
from gradsampler.memory.store import Store


@dataclass(frozen=True)
class Offload(Memory):
    """`Checkpoint` with the states elsewhere, copied while the model computes.

    With "cpu", the states of a run on another device lie in one block of pinned memory. States that
    are on the CPU stay where they are, as with `Checkpoint`. With a folder, each state is a file in
    a private folder within it. A thread writes and reads the files, at most two ahead of the run,
    and their bytes are verified when they are read. They are deleted with the graph: after
    backward, or when the sample is no longer referenced. Files of a killed process stay, under
    gradsampler-*, and no run reads them.

    Args:
        to: "cpu", or an existing folder.

    Raises:
        OSError: in the run, if the states cannot be written; in backward, if a file is not what
            was written.
    """

    to: str | os.PathLike[str] = "cpu"

    def __post_init__(self) -> None:
        check_target("Offload: to", self.to)

    def run(self, trajectory: Trajectory, z0: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return Store().run(trajectory, z0)
        states: States
        count = len(trajectory.recalled)
        if self.to != "cpu":
            states = Files(Path(self.to), count)
        elif z0.device.type == "cpu":
            states = Resident()
        else:
            states = Host(count)
        adjoint = Adjoint(trajectory, states, z0)
        return Connection.apply(adjoint, z0, trajectory.program.coefficients, *adjoint.inputs())


def check_target(argument: str, to: object) -> None:
    """Raises where ``to`` is neither "cpu" nor a folder."""
    if not isinstance(to, (str, os.PathLike)):
        _checks.fail_type(argument, 'be "cpu" or a folder', to)
    if to != "cpu" and not Path(to).is_dir():
        _checks.fail(argument, 'be "cpu" or an existing folder', repr(str(to)))
