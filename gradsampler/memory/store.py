# SPDX-License-Identifier: Apache-2.0
"""Keep everything."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from gradsampler import transforms
from gradsampler.engine import graph
from gradsampler.engine.program import Evaluation
from gradsampler.engine.trajectory import GradientWarning, Trajectory
from gradsampler.memory.base import Memory
from gradsampler.memory.hooks import Hooks
from gradsampler.ops.recorded import differentiable


@dataclass(frozen=True)
class Store(Memory):
    """Plain autograd through the whole run: N times the activations of one model call.

    The fastest, and the only strategy with second derivatives, torch.func's transforms and
    derivatives in forward mode.
    """

    transformable: ClassVar[bool] = True

    def run(self, trajectory: Trajectory, z0: Tensor) -> Tensor:
        recording = Recording(trajectory, z0)
        x = recording.trajectory.forward(z0, recording.evaluate)
        recording.ended(x)
        return x


class Recording:
    """The model calls of a run that autograd records, if it records at all.

    Args:
        trajectory: the run.
        z0: [B, *state] that it starts from.
    """

    def __init__(self, trajectory: Trajectory, z0: Tensor) -> None:
        coefficients = trajectory.program.coefficients
        learned = coefficients.requires_grad and torch.is_grad_enabled()
        if learned or (transforms.active() and transforms.followed(coefficients)):
            trajectory = replace(trajectory, learned=coefficients.to(z0.device).unbind())
        if torch.is_grad_enabled() or transforms.active():
            trajectory = replace(trajectory, backend=differentiable(trajectory.backend))
        self.trajectory = trajectory
        self.warned = False
        self._way = graph.Way()
        observer, policy = trajectory.observer, trajectory.policy
        hooked = observer.checks or observer.monitored or not policy.exact
        self._hooks = Hooks(trajectory, z0) if hooked else None
        self._cond = [_Shared(x) for x in trajectory.cond.tensors]

    @property
    def entries(self) -> list[Tensor]:
        """Tensors through which all ways from a call to the conditioning lead."""
        return [x.entry for x in self._cond]

    def evaluate(self, evaluation: Evaluation, x: Tensor, scaled: Tensor | None) -> list[Tensor]:
        """The model's outputs, in the state's dtype at least."""
        outputs = self.widened(self.call(evaluation, x, scaled)[1])
        return outputs if self._hooks is None else self._hooks.outputs(evaluation, outputs)

    def call(
        self, evaluation: Evaluation, x: Tensor, scaled: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The model's input and outputs."""
        trajectory = self.trajectory
        if self._hooks is not None:
            self._hooks.state(evaluation, x)
        model_input, level = trajectory.model_input(evaluation, x, scaled)
        if self._hooks is not None:
            model_input = self._hooks.entry(evaluation, model_input)
        asked = model_input.requires_grad and not self.warned
        asked = asked and trajectory.policy.pulls(evaluation.step)
        since = graph.mark() if asked else 0
        cond = trajectory.cond.filled([x.use() for x in self._cond] if self._cond else ())
        outputs = trajectory.call(evaluation, model_input, level, cond)
        if asked and not self._way.leads(outputs, model_input, since):
            self.warned = True
            warnings.warn(GradientWarning(evaluation.step), stacklevel=2)
        return model_input, outputs

    def widened(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs as later steps look back at them: so their cotangents are added up before
        they are rounded to the model's dtype.
        """
        state = self.trajectory.state_dtype
        return [
            d if d.dtype == state else d.to(torch.promote_types(d.dtype, state)) for d in outputs
        ]

    def ended(self, x: Tensor) -> None:
        """Takes note of what the run returns."""
        if self._hooks is not None:
            self._hooks.ended(x)


class _Use(torch.autograd.Function):
    """A tensor as it is, whose cotangent goes to its copy in a wider dtype."""

    @staticmethod
    def forward(ctx: Any, copy: Tensor, x: Tensor) -> Tensor:
        ctx.dtype = copy.dtype
        return x.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g.to(ctx.dtype), None


class _Shared:
    """A tensor that all model calls use.

    One of 16 bits that requires grad is given anew to each, so that its cotangents are added up in
    float32. `entry` is what the way from a call to the tensor leads through.
    """

    def __init__(self, x: Tensor) -> None:
        self._x = self.entry = x
        self._narrow = False
        if x.requires_grad and torch.is_grad_enabled() and not transforms.active():
            wide = torch.promote_types(x.dtype, torch.float32)
            self._narrow = wide != x.dtype
            if self._narrow:
                self.entry = x.to(wide)
            else:
                self.entry = x.view_as(x) if x.layout == torch.strided else x.clone()

    def use(self) -> Tensor:
        """The tensor for one call."""
        if not self._narrow:
            return self.entry
        used: Tensor = _Use.apply(self.entry, self._x.detach())
        return used
