# SPDX-License-Identifier: Apache-2.0
"""What one injection costs whose noise no kernel draws: measured once, without a run."""

from dataclasses import dataclass

import torch
from torch import Tensor

from gradsampler.engine.trajectory import Trajectory
from gradsampler.memory.planning.gauge import gauge


@dataclass(frozen=True)
class Drawn:
    """Bytes of one noise, forward and backward; 0 where a kernel draws it."""

    noise: int = 0  # of the noise itself
    peak: int = 0  # while it is made, itself included
    kept: int = 0  # what autograd keeps of it, itself included
    pulled: int = 0  # while a cotangent is pulled back through it


def measured(trajectory: Trajectory, z0: Tensor) -> Drawn:
    """The cost of the first injection of a run from ``z0`` [B, *state] in its state dtype."""
    injection = next(iter(trajectory.program.injections), None)
    if injection is None:
        return Drawn()
    source, name = trajectory.noise, trajectory.name(injection)
    if source.draw(z0, *name) is not None:
        return Drawn()
    counter, start = gauge(z0.device), z0.detach()
    with counter:
        noise = source.at(start, *name)
    peak, size = counter.peak, counter.live
    del noise
    with counter, torch.enable_grad():
        noise = source.at(start.requires_grad_(), *name)
    kept = counter.live
    del noise
    cotangent = torch.ones_like(z0)
    with counter:
        source.transpose(cotangent, start.detach(), *name)
    return Drawn(size, peak, kept, counter.peak)
