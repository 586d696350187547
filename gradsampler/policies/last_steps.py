# SPDX-License-Identifier: Apache-2.0
"""The gradient through the last steps alone."""

from collections.abc import Iterable
from dataclasses import dataclass

from gradsampler import _checks
from gradsampler.engine.cut import Cut
from gradsampler.engine.policy import Policy
from gradsampler.engine.program import Program, Slot


@dataclass(frozen=True)
class LastSteps(Policy):
    """The gradient through the last ``steps`` sampler steps only: not that of the run.

    The sample is the same bit for bit, or up to rounding if a stage injects the noises of two
    steps. The earlier steps keep nothing for backward. The state at which step N - steps begins is
    a constant, and so are the earlier states and model outputs that a multistep solver uses. Noise
    that is injected from that step on still carries its gradient to z0 (or to the tensors of a
    `noise.Given`). Conditioning, parameters and levels get what they get through the last steps,
    including the coefficients by which these steps combine the constants. If these steps inject no
    noise, the gradient to z0 is zero, and the run warns of it. With ``steps`` >= N it is the whole
    run, and exact.

    Truncation for reward gradients: Clark et al. 2023, "Directly fine-tuning diffusion models on
    differentiable rewards" (DRaFT-K, arXiv 2309.17400).

    Args:
        steps: how many, at least 1; a final denoising belongs to the last one.
    """

    whole = False
    steps: int

    def __post_init__(self) -> None:
        _checks.integer("LastSteps: steps", self.steps, 1)

    def cut(self, program: Program, given: Iterable[Slot]) -> Cut | None:
        return Cut.of(program, given, self.steps)
