# SPDX-License-Identifier: Apache-2.0
"""Any step map x' = F(x, i) as a program, so that every memory strategy runs it.

A method that is affine in the model's outputs is a `Solver`. A step that is not, such as one that
clamps the prediction, is a single evaluation here: its output is the next state, which the stage
after it copies.
"""

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from gradsampler import _checks
from gradsampler._uncompiled import uncompiled
from gradsampler.elementary import Coefficient
from gradsampler.engine.monitor import Monitor
from gradsampler.engine.observer import StepInfo
from gradsampler.engine.program import Program, Recorder
from gradsampler.engine.trajectory import GradientWarning, version
from gradsampler.layout import Layout
from gradsampler.memory import Memory, resolve
from gradsampler.parameterization import Parameterization, Preconditioning
from gradsampler.sampling import Gradient, integrate

__all__ = ["StepMap", "Watch", "depends", "iterate", "program"]

Step = Callable[..., Any]


class StepMap(Parameterization):
    """A step map in the place of a denoiser: what it predicts is the next state.

    Args:
        step: callable (x [B, *state], i, **cond) -> [B, *state].
    """

    def __init__(self, step: Step) -> None:
        if not callable(step):
            _checks.fail_type("step", "be callable as step(state, i, **cond)", step)
        self.network = step
        self.index = 0

    def at(self, step: int) -> Self:
        bound = copy.copy(self)
        bound.index = step
        return bound

    def preconditioning(self, sigma: Coefficient) -> Preconditioning:
        return Preconditioning(0.0, (1.0,), 1.0, 0.0)

    def outputs(self, x: Tensor, noise: Tensor, cond: Mapping[str, Any]) -> tuple[Tensor, ...]:
        return (self.network(x, self.index, **cond),)


class TreeMap(StepMap):
    """A step map on pytrees, whose floating tensors are the row that a program has for a state.

    What else is in a tree is kept by step, since a step may be called again.
    """

    keeps_shape = False  # a history may grow

    def __init__(self, step: Step, first: Layout) -> None:
        super().__init__(step)
        self.layouts = [first]  # of the state before each step, and of the last
        self._versions = [_versions(first)]

    def outputs(self, x: Tensor, noise: Tensor, cond: Mapping[str, Any]) -> tuple[Tensor, ...]:
        i, given = self.index, self.layouts[self.index]
        if _versions(given) != self._versions[i]:
            raise RuntimeError(
                f"step: what it gets at step {i} must stay as it is, got a change in place of a "
                "tensor of integers; give it a clone"
            )
        name = f"step: the state that it returns at step {i}"
        state = self.network(given.state(x), i, **cond)
        following = Layout.of(name, state)
        start = self.layouts[0].dtype
        if torch.promote_types(start, following.dtype) != start:
            hint = "start with a tensor of that dtype"
            _checks.fail(name, f"hold tensors that {start} holds", str(following.dtype), hint)
        if len(self.layouts) == i + 1:
            self.layouts.append(following)
            self._versions.append(_versions(following))
        return (following.row(state),)


def _versions(layout: Layout) -> list[int]:
    return [version(x) for x in layout.leaves if isinstance(x, Tensor)]


def program(step_map: StepMap, num_steps: int) -> Program:
    """The program that applies the step map for i = 0 .. num_steps - 1."""
    run = Recorder(step_map, num_steps)
    x = run.z0()
    for run.step in range(num_steps):
        _, x = run.denoise(x, float(run.step))
    return run.finish(x)


@uncompiled
def iterate(
    step: Step,
    state: Any,
    num_steps: int,
    *,
    memory: str | Memory = "auto",
    gradient: Gradient = None,
    cond: Mapping[str, Any] | None = None,
    callback: Callable[[StepInfo], object] | None = None,
    progress: bool = False,
    check_finite: bool = False,
    monitor: Monitor | None = None,
    modules: Sequence[nn.Module] = (),
) -> Any:
    """Applies ``state = step(state, i)`` for i = 0 .. num_steps - 1, differentiably.

    For methods that cannot be a `Solver`, because a step is not affine in the network's prediction:
    those that clamp, learn a variance, keep a history of their own, or alternate between video and
    audio. Gradients reach the floating tensors of the state, those in ``cond``, and the parameters
    and other leaves that the step uses. Backward may call the step again, in any order of i: its
    result must depend only on its arguments and on torch's random generators.

    Args:
        step: callable (state, i, **cond) -> state, i a Python int.
        state: a tensor [B, *state] of a floating dtype; or a pytree (nested lists, tuples, dicts,
            and what is registered with torch.utils._pytree) that holds floating tensors of any
            shape on one device. Tensors of integers and other leaves are passed on without a
            gradient. A step may return another structure, such as a history that grows. Between
            steps, floating tensors are float32 at least.
        num_steps: at least 1.
        memory: a name of `memory.names()`, or a `gradsampler.memory` object.
        gradient: as for `sample`; a step map has no share of the state around it, so that
            `DetachedInput` leaves what reaches parameters and ``cond`` in the last step alone.
        cond: passed on to the step as keyword arguments.
        callback: called after each step with a `StepInfo`, whose ``sigma`` is i, ``x`` the state
            before the step and ``denoised`` the state after it.
        progress: shows a bar.
        check_finite: raises if a state or a gradient is not finite (reads back at each call).
        monitor: a `Monitor`, which records the gradient.
        modules: the nn.Modules that the step calls, so that their buffers and generators are known.

    Returns:
        What the last step returned; a lone tensor in the dtype of the start.

    Raises:
        ValueError, TypeError: naming the argument that does not fit, before any step.
        NonFiniteError: with ``check_finite``, naming the step.

    Example:
        >>> import torch, gradsampler as gs
        >>> x = torch.tensor([[3.0, 0.5]], requires_grad=True)
        >>> y = gs.iterate(lambda x, i: (x + i).clamp(-2, 2), x, 3, memory="checkpoint")
        >>> y, torch.autograd.grad(y.sum(), x)[0]
        (tensor([[2., 2.]], grad_fn=<ConnectionBackward>), tensor([[0., 0.]]))

        A method that looks back, and has nothing to look back at in the first step:

        >>> def step(state, i):
        ...     slope = -state["x"]
        ...     before = slope if state["slope"] is None else state["slope"]
        ...     return {"x": state["x"] + 0.1 * (1.5 * slope - 0.5 * before), "slope": slope}
        >>> end = gs.iterate(step, {"x": torch.ones(3, requires_grad=True), "slope": None}, 10)
        >>> [round(x, 4) for x in end["x"].tolist()]  # e^-1 is 0.3679
        [0.3675, 0.3675, 0.3675]
    """
    if not resolve(memory).any_program:
        _checks.fail(
            "memory",
            "be a strategy for any step map",
            f"{memory!r}, which has to undo the steps",
            "take memory='checkpoint'",
        )

    def run(step_map: StepMap, z0: Tensor, told: Callable[[StepInfo], object] | None) -> Tensor:
        return integrate(
            program(step_map, _checks.integer("num_steps", num_steps, 1)),
            step_map,
            z0,
            memory=memory,
            gradient=gradient,
            cond=cond,
            callback=told,
            progress=progress,
            check_finite=check_finite,
            monitor=monitor,
            modules=modules,
        )

    if isinstance(state, Tensor):
        return run(StepMap(step), _checks.batched("state", state), callback)
    layout = Layout.of("state", state)
    tree_map = TreeMap(step, layout)
    told = None if callback is None else partial(_told, callback, tree_map.layouts)
    row = run(tree_map, layout.row(state), told)
    return tree_map.layouts[-1].state(row)


def _told(callback: Callable[[StepInfo], object], layouts: list[Layout], info: StepInfo) -> None:
    """Tells a callback of a step with the states as pytrees."""
    before, after = layouts[info.step], layouts[info.step + 1]
    callback(info._replace(x=before.state(info.x), denoised=after.state(info.denoised)))


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
