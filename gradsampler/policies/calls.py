# SPDX-License-Identifier: Apache-2.0
"""Gradients in which some model calls, or their inputs, are constants."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gradsampler import _checks
from gradsampler.engine.policy import Policy


@dataclass(frozen=True)
class ChosenSteps(Policy):
    """The gradient through the model calls of chosen steps only: not that of the run.

    In the other steps the network's output is treated as a constant, so backward does not call it
    there. The solver's arithmetic on the states is differentiated in every step, including the
    share of the state that preconditioning adds to the output.

    Args:
        steps: their indices from 0; negative ones count from the end. A final denoising is step N.
    """

    steps: tuple[int, ...]

    def __init__(self, steps: Sequence[int]) -> None:
        if isinstance(steps, str) or not isinstance(steps, Sequence):
            _checks.fail_type("ChosenSteps: steps", "be a list of ints", steps)
        chosen = [_checks.integer("ChosenSteps: steps", i, -sys.maxsize) for i in steps]
        object.__setattr__(self, "steps", tuple(chosen))

    def placed(self, num_steps: int) -> "ChosenSteps":
        for i in self.steps:
            if not -num_steps <= i <= num_steps:
                _checks.fail("ChosenSteps: steps", f"lie within a run of {num_steps} steps", i)
        return ChosenSteps([i % num_steps if i < 0 else i for i in self.steps])

    def pulls(self, step: int) -> bool:
        return step in self.steps


@dataclass(frozen=True)
class RandomSteps(Policy):
    """`ChosenSteps` with random steps, drawn anew for each run: not the gradient of the run.

    Args:
        count: how many, at least 1.
        generator: on the CPU, of the draw; None is torch's default one.
    """

    count: int
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        _checks.integer("RandomSteps: count", self.count, 1)
        if not isinstance(self.generator, torch.Generator | None):
            _checks.fail_type("RandomSteps: generator", "be a torch.Generator", self.generator)

    def placed(self, num_steps: int) -> ChosenSteps:
        if self.count > num_steps:
            _checks.fail("RandomSteps: count", f"be at most {num_steps}, the steps", self.count)
        drawn = torch.randperm(num_steps, generator=self.generator)[: self.count]
        return ChosenSteps(sorted(drawn.tolist()))


@dataclass(frozen=True)
class NoJacobian(Policy):
    """The gradient with the network's outputs as constants: not that of the run.

    It reaches z0, the start and the levels through the solver's arithmetic, without a model call in
    backward. Parameters and conditioning receive none. Score distillation leaves out the Jacobian
    in this way (Poole et al. 2022, "DreamFusion", arXiv 2209.14988, eq. 3).
    """

    def pulls(self, step: int) -> bool:
        return False


@dataclass(frozen=True)
class DetachedInput(Policy):
    """The gradient with the network's inputs as constants: not that of the run.

    The network's output is differentiated with respect to parameters, conditioning and the level,
    but not with respect to the state. So the gradient does not pass through the network's
    Jacobians, which may make it explode (Wu et al. 2024, "Deep reward supervisions for tuning
    text-to-image diffusion models", DRTune, arXiv 2405.00760). DRTune also chooses steps:
    ``[DetachedInput(), ChosenSteps([...])]``.
    """

    def enters(self, step: int) -> bool:
        return False
