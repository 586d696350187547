# SPDX-License-Identifier: Apache-2.0
"""Keep everything."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gradsampler.engine import graph
from gradsampler.engine.program import Evaluation
from gradsampler.engine.trajectory import GradientWarning, Numbers, Trajectory
from gradsampler.memory.base import Memory
from gradsampler.ops.recorded import differentiable


@dataclass(frozen=True)
class Store(Memory):
    """Plain autograd through the whole run: N times the activations of one model call.

    The fastest, and the only strategy with a gradient of the gradient.
    """

    def run(self, trajectory: Trajectory, z0: Tensor) -> Tensor:
        coefficients = trajectory.program.coefficients
        learned = coefficients.requires_grad and torch.is_grad_enabled()
        numbers: Numbers = coefficients.to(z0.device).unbind() if learned else coefficients.tolist()
        warned = False

        def arrived(evaluation: Evaluation, g: Tensor) -> None:
            trajectory.observer.finite(evaluation, g, "the gradient")
            if evaluation is trajectory.program.evaluations[0]:
                trajectory.observer.settle()

        def evaluate(evaluation: Evaluation, x: Tensor, scaled: Tensor | None) -> Sequence[Tensor]:
            nonlocal warned
            if x.requires_grad:
                x.register_hook(lambda g: arrived(evaluation, g))
            model_input, level = trajectory.model_input(evaluation, x, scaled, numbers)
            cond = trajectory.cond.filled(trajectory.cond.tensors)
            asked = model_input.requires_grad and not warned
            since = graph.mark() if asked else 0
            outputs = trajectory.call(evaluation, model_input, level, cond)
            if asked and not graph.reaches(outputs, model_input, since):
                warned = True
                warnings.warn(GradientWarning(evaluation.step), stacklevel=2)
            return outputs

        if torch.is_grad_enabled():
            trajectory = replace(trajectory, backend=differentiable(trajectory.backend))
        return trajectory.forward(z0, numbers, evaluate)
