# SPDX-License-Identifier: Apache-2.0
"""What a policy and an observer do in a backward that autograd runs."""

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from gradsampler.engine.program import Evaluation, Injection, Slot, column
from gradsampler.engine.trajectory import Trajectory


class Hooks:
    """Detaches what the policy holds constant, and hooks the rest.

    Args:
        trajectory: of which all model calls are recorded by autograd.
        z0: [B, *state] that it starts from.
    """

    def __init__(self, trajectory: Trajectory, z0: Tensor) -> None:
        program = trajectory.program
        self._trajectory, self._z0 = trajectory, z0
        self._monitored = trajectory.observer.monitored
        self._numbers = program.numbers(z0.device)
        self._first = program.first_calls
        self._last = program.evaluations[0]  # that backward comes to
        self._injections = {stage.writes: stage.injections for stage in program.stages}
        self._mu: dict[int, Tensor] = {}  # of the call that is pulled back, by its outputs
        self._g: Tensor | None = None

    def state(self, evaluation: Evaluation, x: Tensor) -> None:
        """Hooks the state that a call sees."""
        if x.requires_grad:
            x.register_hook(partial(self._arrived, evaluation))

    def entry(self, evaluation: Evaluation, x: Tensor) -> Tensor:
        """The model's input, a tensor of its own where it is looked at or held constant."""
        if not self._trajectory.policy.enters(evaluation.step):
            return x.detach()
        if not (self._monitored and x.requires_grad):
            return x
        x = x.view_as(x)
        x.register_hook(self._entered)
        return x

    def outputs(self, evaluation: Evaluation, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The outputs of a call as the rest of the run reads them."""
        if not self._trajectory.policy.pulls(evaluation.step):
            return [output.detach() for output in outputs]
        if self._monitored:
            for k, output in enumerate(outputs):
                if output.requires_grad:
                    output.register_hook(partial(self._mu.__setitem__, k))
        return list(outputs)

    def ended(self, x: Tensor) -> None:
        """Hooks what the run returns."""
        if self._monitored and x.requires_grad:
            x.register_hook(partial(self._absorbed, self._trajectory.program.output))

    def _entered(self, g: Tensor) -> None:
        self._g = g

    def _arrived(self, evaluation: Evaluation, lam: Tensor) -> Tensor:
        observer, slot = self._trajectory.observer, evaluation.state
        observer.finite(evaluation, lam, "the gradient")
        if evaluation is self._last:
            observer.settle()
        outputs = [self._mu.get(k) for k in range(len(evaluation.writes))]
        observer.pulled(evaluation, outputs, self._g)
        self._mu.clear()
        self._g = None
        observer.descended(evaluation, lam)
        if slot in self._first:
            lam = self._trajectory.policy.passes(self._first[slot], lam)
        if self._monitored:
            self._absorbed(slot, lam)
        return lam

    def _absorbed(self, slot: Slot, lam: Tensor) -> None:
        injections: Sequence[Injection] = self._injections[slot]
        for injection in injections if self._z0.requires_grad else ():
            name = self._trajectory.name(injection)
            scaled = lam.detach() * column(self._numbers[injection.coefficient], lam)
            share = self._trajectory.noise.transpose(scaled, self._z0.detach(), *name).z0
            if share is not None:
                self._trajectory.observer.absorbed(slot, injection, share)
