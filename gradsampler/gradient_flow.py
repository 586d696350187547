# SPDX-License-Identifier: Apache-2.0
"""Does the gradient of a loss arrive at z0, which link broke, and is it the right gradient?"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradsampler import _checks, comparisons
from gradsampler.arguments import Denoiser
from gradsampler.comparisons import Difference, Witness
from gradsampler.engine.conditioning import Conditioning
from gradsampler.engine.observer import NonFiniteError
from gradsampler.engine.trajectory import GradientWarning, Trajectory
from gradsampler.memory import Memory, resolve
from gradsampler.noise.sources import name_of
from gradsampler.parameterization import Parameterization
from gradsampler.sampling import sample

__all__ = ["Report", "affine_denoiser", "check"]

ALSO = ("cond", "parameters")


@dataclass
class Report:
    """The numbered lines of one check, and the links of the gradient's path that are broken."""

    lines: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    differences: list[Difference] = field(default_factory=list)  # of the run, and by model call

    @property
    def passed(self) -> bool:
        """Whether the gradient arrives, and is the right one."""
        return not self.broken

    def __str__(self) -> str:
        numbered = [f"  {k}. {line}" for k, line in enumerate(self.lines, start=1)]
        ending = [f"  broken: {link}" for link in self.broken] or ["  the gradient arrives"]
        return "\n".join(numbered + ending)


def affine_denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    """The check's own denoiser, 0.7 x + 0.1, through which a gradient cannot vanish."""
    return 0.7 * x + 0.1


def to_ones(x: Tensor) -> Tensor:
    """The check's own loss, the mean squared difference from a sample of ones."""
    return (x - torch.ones_like(x)).square().mean()


def check(
    denoiser: Parameterization | Denoiser,
    z0: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    loss: Callable[[Tensor], Tensor] = to_ones,
    directions: int = 1,
    also: Sequence[str] = (),
    seed: int = 0,
    lr: float = 0.1,
    **sample_kwargs: Any,
) -> Report:
    """Follows the gradient of a loss through a run, and compares it with central differences.

    The directional derivative of the loss along a random direction of z0, and that of each model
    call along a random direction of its input, is taken twice: by autograd, and as a difference
    quotient whose step is the one of the least error (`differences`). Their disagreement, beyond
    what the rounding of the denoiser explains, is a wrong backward of the denoiser, and the calls
    say at which steps. A direction takes about as long as 40 runs.

    Args:
        denoiser, sigmas, sample_kwargs: as for `sample`; ``check_finite`` is on by default.
        z0: [B, *state] start, which ought to require grad.
        loss: from the sample [B, *state] to a scalar tensor; by default the mean squared
            difference from ones.
        directions: random directions; 0 compares nothing.
        also: "cond" and "parameters" to have these derivatives compared too; the parameters are
            those that require grad, wherever the denoiser has them from.
        seed: of the directions.
        lr: learning rate of the update whose size is reported, one step of Adam up the loss.

    Returns:
        The report. That a link is broken is a finding, not an exception.

    Raises:
        TypeError, ValueError: an argument does not fit.

    Example:
        >>> import torch, gradsampler as gs
        >>> z0 = torch.ones(1, 2, 8, 8, requires_grad=True)
        >>> report = gs.check(lambda x, sigma: torch.tanh(x), z0, gs.schedules.karras(4))
        >>> report.passed
        True
        >>> wrong = gs.check(lambda x, sigma: torch.tanh(x + x.detach()) / 2, z0, [2.0, 1.0])
        >>> print(wrong.broken[0].split(":")[0])
        a wrong backward of the denoiser at every step
    """
    _checks.batched("z0", z0)
    _checks.integer("directions", directions, 0)
    if isinstance(also, str) or any(each not in ALSO for each in also):
        _checks.fail("also", f"be a list of {', '.join(ALSO)}", repr(also))
    if not callable(loss):
        _checks.fail_type("loss", "be callable as loss(sample)", loss)
    run = _Run(denoiser, z0, sigmas, {"check_finite": True, **sample_kwargs})
    broken = _broken_before(z0, run.trajectory())
    try:
        x, detached = run.differentiable()
    except NonFiniteError as error:
        return Report(["forward: failed"], [*broken, str(error)])
    num_steps, source = run.trajectory().program.num_steps, type(run.trajectory().noise).__name__
    broken += [f"a denoiser that detaches, at step {step} of {num_steps}" for step in detached]
    lines = [
        f"forward: sample of shape {list(x.shape)}, requires_grad={x.requires_grad}",
        f"anchor z0: shape {list(z0.shape)}, requires_grad={z0.requires_grad}, noise {source}",
    ]
    if not x.requires_grad or not z0.requires_grad:
        lines.append("loss and backward: impossible, the sample has no path back to z0")
        return Report(lines, broken or ["the sample does not depend on z0"])
    value = loss(x)
    try:
        cotangent, gradient = torch.autograd.grad(value, [x, z0])
    except NonFiniteError as error:
        lines.append(f"loss and backward: loss {value.item():.6g}, backward failed")
        return Report(lines, [*broken, str(error)])
    if not gradient.any():
        broken.append("the gradient arrives as zeros")
    updated = _ascended(z0, gradient, lr)
    lines += [
        f"loss and backward: loss {value.item():.6g}, gradient of shape {list(gradient.shape)}",
        f"gradient: mean {gradient.mean().item():.6g}, max {gradient.max().item():.6g}, "
        f"min {gradient.min().item():.6g}",
        f"optimiser update: mean absolute difference {(updated - z0).abs().mean().item():.6g}",
    ]
    report = Report(lines, broken)
    if directions and not broken:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(directions):
            report.differences += run.differences(cotangent, gradient, loss, also, generator)
        lines.append(_told(report.differences))
        broken += _wrong(report.differences, num_steps, run.exact)
    elif directions:
        lines.append("differences: not taken, as the gradient is broken before")
    return report
