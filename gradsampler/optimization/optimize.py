# SPDX-License-Identifier: Apache-2.0
"""Optimises initial noise through a whole sampling run."""

import inspect
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from gradsampler import _checks
from gradsampler._uncompiled import uncompiled
from gradsampler.arguments import Denoiser, checked_levels
from gradsampler.engine import parts
from gradsampler.engine.observer import NonFiniteError
from gradsampler.engine.randomness import RandomState
from gradsampler.optimization.identity import Identity
from gradsampler.optimization.journal import Journal
from gradsampler.optimization.statistics import RunningStatistics
from gradsampler.parameterization import Parameterization
from gradsampler.sampling import sample

__all__ = ["OptimizeResult", "OptimizeStep", "optimize"]


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


@uncompiled
def optimize(
    denoiser: Parameterization | Denoiser,
    z0: Tensor,
    sigmas: Tensor | Sequence[float],
    loss: Callable[[Tensor], Tensor],
    *,
    steps: int = 50,
    lr: float = 0.05,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam,
    maximize: bool = False,
    regularizer: Callable[[Tensor], Tensor] | None = None,
    grad_clip: float | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    identity: Mapping[str, str] | None = None,
    progress: bool = False,
    check_finite: bool = True,
    **sample_kwargs: Any,
) -> OptimizeResult:
    """Minimises ``loss(sample(z0)) + regularizer(z0)`` over the initial noise.

    Works on a copy of z0; the caller's tensor stays as it is.

    Args:
        denoiser: as for `sample`.
        z0: [B, *state] start, requiring grad.
        sigmas: [N+1] noise levels, as for `sample`.
        loss: from the sample [B, *state] to a scalar tensor.
        steps: updates of z0.
        lr: learning rate.
        optimizer: called as optimizer([z0], lr=lr).
        maximize: ascends the loss in place of descending it; the regularizer stays a penalty.
        regularizer: from z0 to a scalar penalty, such as `regularizers.ChiNorm`.
        grad_clip: largest norm of the gradient handed to the optimizer.
        checkpoint: a file saved atomically after each step; where it exists the run goes on from
            it, and on the same machine gives the numbers of an uninterrupted run bit for bit. The
            file of a run with other arguments, weights, buffers or code of the denoiser is refused,
            with what differs; the loss alone is not looked at.
        identity: what else makes the run the same one, such as a name for the loss, which a file
            cannot hold; a checkpoint with another is refused. A text under the name of an argument
            stands in place of what is seen of it.
        progress: shows a bar with loss and gradient norm.
        check_finite: stops with NonFiniteError before a NaN or an infinity reaches z0.
        **sample_kwargs: passed on to `sample`.

    Returns:
        The noise, its sample, and the history with one entry a step.

    Raises:
        ValueError, TypeError: naming the argument that does not fit; also for a checkpoint file
            that is truncated, of another kind, or of another run.
        NonFiniteError: z0 and the checkpoint are those of the last good step.

    Example:
        >>> import torch, gradsampler as gs
        >>> z0 = torch.ones(2, 3, requires_grad=True)
        >>> levels = gs.schedules.karras(5)
        >>> found = gs.optimize(lambda x, sigma: 0.1 * x, z0, levels, lambda x: x.square().sum(),
        ...                     steps=3, solver="heun")
        >>> found.history[-1].loss < found.history[0].loss
        True
    """
    _check_arguments(z0, steps, lr, grad_clip, optimizer, loss, regularizer)
    levels = checked_levels(sigmas, flow=sample_kwargs.get("prediction") == "flow")
    noise = z0.detach().clone().requires_grad_()
    update = optimizer([noise], lr=lr)
    sample_kwargs["check_finite"] = check_finite
    history: list[OptimizeStep] = []
    journal = None
    if checkpoint is not None:
        settings = _settings(
            update,
            sample_kwargs,
            denoiser=denoiser,
            z0=z0,
            sigmas=levels,
            lr=lr,
            maximize=maximize,
            grad_clip=grad_clip,
            regularizer=regularizer,
        )
        seen = Identity(settings)
        named = {name: {"": text} for name, text in (identity or {}).items()}
        journal = Journal(checkpoint, seen.by_argument() | named)
        held = parts.reachable(settings).generators
        run = _Run(noise, update, RunningStatistics(seen), held)
        history = run.resume(journal.load())

    with tqdm(total=steps, initial=len(history), desc="optimising", disable=not progress) as bar:
        while len(history) < steps:
            start = time.perf_counter()
            value = loss(sample(denoiser, noise, sigmas, **sample_kwargs))
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
            seconds = time.perf_counter() - start
            history.append(OptimizeStep(value.item(), size, level, seconds))
            if journal is not None:
                journal.save(run.state(history))
            bar.set_postfix(loss=f"{history[-1].loss:.4g}", grad=f"{size:.3g}", refresh=False)
            bar.update()
    with torch.no_grad():
        found = sample(denoiser, noise, sigmas, **sample_kwargs)
    return OptimizeResult(noise.detach(), found, history)


def _check_arguments(
    z0: Tensor,
    steps: int,
    lr: float,
    grad_clip: float | None,
    optimizer: object,
    loss: object,
    regularizer: object,
) -> None:
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


def _settings(
    update: torch.optim.Optimizer, sample_kwargs: Mapping[str, Any], **arguments: object
) -> dict[str, object]:
    """What the numbers of an optimisation depend on, defaults of `sample` included."""
    (group, *_) = update.param_groups
    optimizer = {"type": type(update)} | {k: v for k, v in group.items() if k != "params"}
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(sample).parameters.items()
        if parameter.default is not parameter.empty
    }
    sampler = {k: v for k, v in (defaults | dict(sample_kwargs)).items() if k not in _WATCHING}
    return {**arguments, "optimizer": optimizer, **sampler}


_WATCHING = ("callback", "progress", "check_finite", "monitor")  # change no number


class _Run:
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

    def state(self, history: list[OptimizeStep]) -> dict[str, Any]:
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
