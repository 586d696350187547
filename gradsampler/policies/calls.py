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
    """The gradient through the model calls of chosen steps alone: not that of the run.

    What the network returns in the other steps is a constant, so backward does not call it there;
    the states are not: what the solver makes of a state around the network is differentiated in
    every step, as the share of it that preconditioning adds to the output.

    Args:
        steps: which, from 0; negative ones count from the end. A final denoising is of step N.
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
    """`ChosenSteps`, drawn anew for each run without replacement: not the gradient of the run.

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

    It reaches z0, the start and the levels around the network, without a model call in backward;
    parameters and conditioning receive none. So the Jacobian is left out as in score distillation
    (Poole et al. 2022, "DreamFusion", arXiv 2209.14988, eq. 3).
    """

    def pulls(self, step: int) -> bool:
        return False


@dataclass(frozen=True)
class DetachedInput(Policy):
    """The gradient with the network's inputs as constants: not that of the run.

    What the network returns is differentiated by parameters, conditioning and the level that it is
    told, not by the state: the cotangent passes around the network, so it cannot explode in its
    Jacobians (Wu et al. 2024, "Deep reward supervisions for tuning text-to-image diffusion models",
    DRTune, arXiv 2405.00760). With steps chosen as well, as there: ``[DetachedInput(),
    ChosenSteps([...])]``.
    """

    def enters(self, step: int) -> bool:
        return False
