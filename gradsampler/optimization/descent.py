# SPDX-License-Identifier: Apache-2.0
"""Descends a loss over the initial noise of a run, whatever makes the run."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from gradsampler import _checks
from gradsampler.engine import parts
from gradsampler.engine.observer import NonFiniteError
from gradsampler.optimization.identity import Identity
from gradsampler.optimization.journal import Journal
from gradsampler.optimization.statistics import RunningStatistics
from gradsampler.repetition import RandomState

__all__ = ["OptimizeResult", "OptimizeStep", "check", "descend"]


class OptimizeStep(NamedTuple):
    """One line of the history: the run from the noise before the update."""

    loss: float
    gradient_norm: float  # of all of z0's gradient, before clipping
    z0_norm: float  # root mean square over samples of |z0|/sqrt(d); 1 for standard normal noise
    seconds: float


@dataclass(frozen=True)
class OptimizeResult:
    """What an optimisation found."""

    z0: Tensor  # [B, *state] optimised noise
    sample: Tensor  # [B, *state] its sample
    history: list[OptimizeStep]


def descend(
    run: Callable[[Tensor], Tensor],
    z0: Tensor,
    loss: Callable[[Tensor], Tensor],
    settings: Mapping[str, object],
    *,
    steps: int,
    lr: float,
    optimizer: Callable[..., torch.optim.Optimizer],
    maximize: bool,
    regularizer: Callable[[Tensor], Tensor] | None,
    projection: Callable[[Tensor], Tensor] | None,
    grad_clip: float | None,
    checkpoint: str | os.PathLike[str] | None,
    identity: Mapping[str, str] | None,
    progress: bool,
    check_finite: bool,
    watch: Callable[[int, Tensor], object] | None = None,
) -> OptimizeResult:
    """Minimises ``loss(run(z0)) + regularizer(z0)``; the arguments are those of `optimize`.

    Args:
        run: from the noise to what the loss sees, connected for autograd.
        settings: what the numbers depend on beside the arguments here.
        watch: called after each step with its number and what the run gave, detached.
    """
    check(z0, steps, lr, grad_clip, optimizer, loss, regularizer, projection)
    noise = z0.detach().clone().requires_grad_()
    update = optimizer([noise], lr=lr)
    history: list[OptimizeStep] = []
    journal = None
    if checkpoint is not None:
        (group, *_) = update.param_groups
        known = {
            **settings,
            "z0": z0,
            "lr": lr,
            "maximize": maximize,
            "grad_clip": grad_clip,
            "regularizer": regularizer,
            "projection": projection,
            "optimizer": {"type": type(update)} | {k: v for k, v in group.items() if k != "params"},
        }
        seen = Identity(known)
        named = {name: {"": text} for name, text in (identity or {}).items()}
        journal = Journal(checkpoint, seen.by_argument() | named)
        held = parts.reachable(known).generators
        state = _State(noise, update, RunningStatistics(seen), held)
        history = state.resume(journal.load())

    with tqdm(total=steps, initial=len(history), desc="optimising", disable=not progress) as bar:
        while len(history) < steps:
            start = time.perf_counter()
            result = run(noise)
            value = loss(result)
            _check_value("loss", value, finite=check_finite, step=len(history))
            objective = -value if maximize else value
            if regularizer is not None:
                penalty = regularizer(noise)
                if isinstance(penalty, int | float):
                    penalty = torch.tensor(float(penalty))
                _check_value("regularizer", penalty, finite=check_finite, step=len(history))
                objective = objective + penalty
            noise.grad = _gradient(value, objective, noise)
            size = float(noise.grad.norm())
            if check_finite and not bool(torch.isfinite(noise.grad).all()):
                _stop("gradient", size, len(history))
            level = float(noise.detach().square().mean().sqrt())
            if grad_clip is not None:
                torch.nn.utils.clip_grad_norm_([noise], grad_clip)
            update.step()
            if projection is not None:
                with torch.no_grad():
                    noise.copy_(projection(noise))
            seconds = time.perf_counter() - start
            history.append(OptimizeStep(value.item(), size, level, seconds))
            if watch is not None:
                watch(len(history) - 1, result.detach())
            if journal is not None:
                journal.save(state.content(history))
            bar.set_postfix(loss=f"{history[-1].loss:.4g}", grad=f"{size:.3g}", refresh=False)
            bar.update()
    with torch.no_grad():
        found = run(noise)
    return OptimizeResult(noise.detach(), found, history)


def check(
    z0: Tensor,
    steps: int,
    lr: float,
    grad_clip: float | None,
    optimizer: object,
    loss: object,
    regularizer: object,
    projection: object,
) -> None:
    """Raises ValueError or TypeError, naming the argument that does not fit."""
    if not _checks.batched("z0", z0).requires_grad:
        _checks.fail("z0", "require grad", "requires_grad=False", "call z0.requires_grad_()")
    _checks.integer("steps", steps, 1)
    if not _checks.finite("lr", lr) > 0:
        _checks.fail("lr", "be positive", lr)
    if grad_clip is not None and not _checks.finite("grad_clip", grad_clip) > 0:
        _checks.fail("grad_clip", "be positive", grad_clip)
    if not callable(optimizer):
        _checks.fail_type("optimizer", "be callable as optimizer([z0], lr=lr)", optimizer)
    if not callable(loss):
        _checks.fail_type("loss", "be callable as loss(sample)", loss)
    if regularizer is not None and not callable(regularizer):
        _checks.fail_type("regularizer", "be callable as regularizer(z0)", regularizer)
    if projection is not None and not callable(projection):
        _checks.fail_type("projection", "be callable as projection(z0)", projection)
    if not torch.is_grad_enabled():
        _checks.fail("optimize", "be called in grad mode", "torch.no_grad or inference_mode")


def _check_value(name: str, value: object, *, finite: bool, step: int) -> None:
    """Checks what the loss or the regularizer returned."""
    what = f"{name}: the value that it returns"
    if not isinstance(value, Tensor):
        _checks.fail_type(what, "be a scalar tensor", value)
    _checks.shape(what, value, ())
    if finite and not bool(torch.isfinite(value)):
        _stop(name, value.item(), step)


def _stop(name: str, value: float, step: int) -> NoReturn:
    """Stops before the optimizer sees what would spoil z0."""
    raise NonFiniteError(
        f"{name} of optimisation step {step} must be finite, got {name} {value}; a checkpoint "
        "holds the step before"
    )


def _gradient(value: Tensor, objective: Tensor, noise: Tensor) -> Tensor:
    """The gradient to the noise alone: a network that could be trained accumulates nothing."""
    hint = "`gradsampler check` says which link of a run is broken"
    if not value.requires_grad:
        _checks.fail("loss", "depend on z0", "a value without gradient", hint)
    (gradient,) = torch.autograd.grad(objective, noise, allow_unused=True)
    if gradient is None:
        _checks.fail("loss", "depend on z0", "a value whose gradient does not reach z0", hint)
    return gradient


class _State:
    """What moves in the course of an optimisation, as a state for a file."""

    def __init__(
        self,
        noise: Tensor,
        update: torch.optim.Optimizer,
        statistics: RunningStatistics,
        held: Sequence[torch.Generator],
    ) -> None:
        self._noise, self._update, self._held = noise, update, held
        self._statistics = statistics

    def content(self, history: list[OptimizeStep]) -> dict[str, Any]:
        return {
            "z0": self._noise.detach(),
            "optimizer": self._update.state_dict(),
            "history": [tuple(step) for step in history],
            "random": RandomState(self._noise.device, generators=self._held).tensors,
            "buffers": self._statistics.changed(),
        }

    def resume(self, state: dict[str, Any] | None) -> list[OptimizeStep]:
        """Puts everything where the saved run stood; returns its history."""
        if state is None:
            return []
        with torch.no_grad():
            self._noise.copy_(state["z0"])
        self._update.load_state_dict(state["optimizer"])
        self._statistics.restore(state["buffers"])
        RandomState(self._noise.device, state["random"], self._held).restore()
        return [OptimizeStep(*step) for step in state["history"]]
