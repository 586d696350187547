# SPDX-License-Identifier: Apache-2.0
"""Any step map x' = F(x, i) as a program, so that every memory strategy runs it.

A method that is affine in the model's outputs is a `Solver`. A step that is not, such as one that
clamps the prediction, is a single evaluation here: its output is the next state, which the stage
after it copies.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gradsampler import _checks
from gradsampler.elementary import Coefficient
from gradsampler.engine.observer import StepInfo
from gradsampler.engine.program import Program, Recorder
from gradsampler.engine.trajectory import GradientWarning
from gradsampler.memory import Memory, resolve
from gradsampler.parameterization import Parameterization, Preconditioning
from gradsampler.sampling import integrate

__all__ = ["StepMap", "Watch", "depends", "iterate", "program"]

Step = Callable[..., Tensor]


class StepMap(Parameterization):
    """A step map in the place of a denoiser: what it predicts is the next state.

    Args:
        step: callable (x [B, *state], i, **cond) -> [B, *state].
    """

    level_dtype = torch.float64  # holds any index

    def __init__(self, step: Step) -> None:
        if not callable(step):
            _checks.fail_type("step", "be callable as step(x, i, **cond)", step)
        self.network = step

    def preconditioning(self, sigma: Coefficient) -> Preconditioning:
        return Preconditioning(0.0, (1.0,), 1.0, sigma)

    def outputs(self, x: Tensor, noise: Tensor, cond: Mapping[str, Any]) -> tuple[Tensor, ...]:
        return (self.network(x, int(noise[0].item()), **cond),)


def program(step_map: StepMap, num_steps: int) -> Program:
    """The program that applies the step map for i = 0 .. num_steps - 1."""
    run = Recorder(step_map, num_steps)
    x = run.z0()
    for run.step in range(num_steps):
        _, x = run.denoise(x, float(run.step))
    return run.finish(x)


def iterate(
    step: Step,
    x: Tensor,
    num_steps: int,
    *,
    memory: str | Memory = "auto",
    cond: Mapping[str, Any] | None = None,
    callback: Callable[[StepInfo], object] | None = None,
    progress: bool = False,
    check_finite: bool = False,
) -> Tensor:
    """Applies ``x' = step(x, i)`` for i = 0 .. num_steps - 1, differentiably.

    Gradients reach ``x``, the tensors in ``cond``, and the parameters and other leaves that the
    step uses. Backward may call the step again, in any order of i: what it computes must depend on
    its arguments and on torch's default random generators alone.

    Args:
        step: callable (x [B, *state], i, **cond) -> [B, *state].
        x: [B, *state] start of a floating dtype; the state is float32 at least.
        num_steps: at least 1.
        memory: a name of `memory.names()`, or a `gradsampler.memory` object.
        cond: passed on to the step as keyword arguments.
        callback: called after each step with a `StepInfo`, whose ``sigma`` is i, ``x`` the state
            before the step and ``denoised`` the state after it.
        progress: shows a bar.
        check_finite: raises where a state or a gradient is not finite (reads back at each call).

    Returns:
        [B, *state] of x's dtype.

    Raises:
        ValueError, TypeError: naming the argument that does not fit, before any step.
        NonFiniteError: with ``check_finite``, naming the step.

    Example:
        >>> import torch
        >>> from gradsampler.iteration import iterate
        >>> x = torch.tensor([[3.0, 0.5]], requires_grad=True)
        >>> y = iterate(lambda x, i: (x + i).clamp(-2, 2), x, 3, memory="checkpoint")
        >>> y, torch.autograd.grad(y.sum(), x)[0]
        (tensor([[2., 2.]], grad_fn=<ConnectionBackward>), tensor([[0., 0.]]))
    """
    x = _checks.batched("x", x)
    step_map = StepMap(step)
    if not resolve(memory).any_program:
        _checks.fail(
            "memory",
            "be a strategy for any step map",
            f"{memory!r}, which has to undo the steps",
            "take memory='checkpoint'",
        )
    return integrate(
        program(step_map, _checks.integer("num_steps", num_steps, 1)),
        step_map,
        x,
        memory=memory,
        cond=cond,
        callback=callback,
        progress=progress,
        check_finite=check_finite,
    )


class Watch:
    """Warns, once a run, of a function of x through which no gradient passes.

    A run sees that of a denoiser by itself. A step map hides it, where its result depends on x by
    another path: it has the functions that it calls watched.
    """

    def __init__(self) -> None:
        self._passed: set[type[GradientWarning]] = set()
        self._warned: set[type[GradientWarning]] = set()

    def look(self, warning: type[GradientWarning], x: Tensor, y: Tensor, step: int) -> None:
        """Takes note of a call y = f(x); the graph is walked for the first one alone."""
        if warning in self._warned or not (torch.is_grad_enabled() and x.requires_grad):
            return
        if y.requires_grad and (warning in self._passed or depends(y, x)):
            self._passed.add(warning)
        else:
            self._warned.add(warning)
            warnings.warn(warning(step), stacklevel=2)


def depends(y: Tensor, x: Tensor) -> bool:
    """Whether autograd sees a path from ``y`` back to ``x``."""
    target = x.grad_fn
    pending = [node for node in (y.grad_fn,) if node is not None]
    seen = set(pending)
    while pending:
        node = pending.pop()
        if node is target or getattr(node, "variable", None) is x:
            return True
        parents = {parent for parent, _ in node.next_functions if parent is not None} - seen
        seen |= parents
        pending += parents
    return y is x
