# SPDX-License-Identifier: Apache-2.0
"""Keep everything."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradsampler import transforms
from gradsampler.engine import graph
from gradsampler.engine.program import Evaluation, Numbers
from gradsampler.engine.trajectory import GradientWarning, Trajectory
from gradsampler.memory.base import Memory
from gradsampler.memory.hooks import Hooks
from gradsampler.ops.recorded import differentiable


@dataclass(frozen=True)
class Store(Memory):
    """Plain autograd through the whole run: N times the activations of one model call.

    The fastest, and the only strategy with a gradient of the gradient, under torch.func's
    transforms, and with derivatives in forward mode.
    """

    transformable: ClassVar[bool] = True

    def run(self, trajectory: Trajectory, z0: Tensor) -> Tensor:
        coefficients = trajectory.program.coefficients
        learned = coefficients.requires_grad and torch.is_grad_enabled()
        learned = learned or (transforms.active() and transforms.followed(coefficients))
        fixed = trajectory.program.numbers(z0.device)
        numbers: Numbers = coefficients.to(z0.device).unbind() if learned else fixed
        warned = False
        cond = [_summed_wide(x) for x in trajectory.cond.tensors]

        policy, hooks = trajectory.policy, Hooks(trajectory, z0)

        def evaluate(evaluation: Evaluation, x: Tensor, scaled: Tensor | None) -> Sequence[Tensor]:
            nonlocal warned
            hooks.state(evaluation, x)
            model_input, level = trajectory.model_input(evaluation, x, scaled, numbers)
            model_input = hooks.entry(evaluation, model_input)
            asked = model_input.requires_grad and policy.pulls(evaluation.step) and not warned
            since = graph.mark() if asked else 0
            filled = trajectory.cond.filled([use() for use in cond])
            outputs = trajectory.call(evaluation, model_input, level, filled)
            if asked and not graph.reaches(outputs, model_input, since):
                warned = True
                warnings.warn(GradientWarning(evaluation.step), stacklevel=2)
            # A later step may look back at an output: the cotangents are added up before they are
            # rounded to its dtype.
            wide = [d.to(torch.promote_types(d.dtype, trajectory.state_dtype)) for d in outputs]
            return hooks.outputs(evaluation, wide)

        if torch.is_grad_enabled() or transforms.active():
            trajectory = replace(trajectory, backend=differentiable(trajectory.backend))
        x = trajectory.forward(z0, numbers, evaluate)
        hooks.ended(x)
        return x


class _Use(torch.autograd.Function):
    """A tensor as it is, whose cotangent goes to its copy in a wider dtype."""

    @staticmethod
    def forward(ctx: Any, copy: Tensor, x: Tensor) -> Tensor:
        ctx.dtype = copy.dtype
        return x.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g.to(ctx.dtype), None


def _summed_wide(x: Tensor) -> Callable[[], Tensor]:
    """Gives a tensor of 16 bits for each of its uses, whose cotangents are added up in float32."""
    if not (x.requires_grad and torch.is_grad_enabled()) or transforms.active():
        return lambda: x
    wide = torch.promote_types(x.dtype, torch.float32)
    if wide == x.dtype:
        return lambda: x
    copy = x.to(wide)
    return lambda: _Use.apply(copy, x.detach())
