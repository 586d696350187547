# SPDX-License-Identifier: Apache-2.0
"""The gradient-flow check: does the gradient of a loss arrive at z0, and if not, where it stops."""

import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradsampler import _checks, schedules
from gradsampler.arguments import Denoiser
from gradsampler.engine.observer import NonFiniteError
from gradsampler.engine.trajectory import GradientWarning
from gradsampler.noise.sources import NoiseSource
from gradsampler.sampling import sample
from gradsampler.solvers import Churn

__all__ = ["Report", "affine_denoiser", "check"]


@dataclass
class Report:
    """The numbered lines of one check, and the links of the gradient's path that are broken."""

    lines: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether the gradient arrives."""
        return not self.broken

    def __str__(self) -> str:
        numbered = [f"  {k}. {line}" for k, line in enumerate(self.lines, start=1)]
        ending = [f"  broken: {link}" for link in self.broken] or ["  the gradient arrives"]
        return "\n".join(numbered + ending)


def affine_denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    """The check's own denoiser, 0.7 x + 0.1, through which a gradient cannot vanish."""
    return 0.7 * x + 0.1


def check(
    denoiser: Denoiser,
    z0: Tensor,
    noise: NoiseSource,
    *,
    steps: int = 4,
    solver: str = "res_2ab",
    lr: float = 0.1,
) -> Report:
    """One step up the mean squared difference from a target, and what became of its gradient.

    Args:
        denoiser: callable (x [B, *state], sigma [B]) -> x0.
        z0: [B, *state] the anchor, which ought to require grad.
        noise: what churn injects before each step.
        steps: sampler steps.
        solver: name of a deterministic solver.
        lr: learning rate of the ascent, by Adam.

    Returns:
        The report. That a link is broken is a finding, not an exception.

    Example:
        >>> import torch
        >>> from gradsampler import gradient_flow, noise
        >>> z0 = torch.zeros(1, 2, 8, 8).requires_grad_()
        >>> gradient_flow.check(gradient_flow.affine_denoiser, z0, noise.SinCos()).passed
        True
    """
    _checks.batched("z0", z0)
    if not isinstance(noise, NoiseSource):
        _checks.fail_type("noise", "be a gradsampler.noise object", noise)
    broken = _broken_before(z0, noise, _checks.integer("steps", steps, 1))
    try:
        x, detached = _sampled(denoiser, z0, noise, steps, solver)
    except NonFiniteError as error:
        return Report(["forward: failed"], [*broken, str(error)])
    broken += [f"a denoiser that detaches, at step {step} of {steps}" for step in detached]
    lines = [
        f"forward: sample of shape {list(x.shape)}, requires_grad={x.requires_grad}",
        f"anchor z0: shape {list(z0.shape)}, requires_grad={z0.requires_grad}, "
        f"noise {type(noise).__name__}",
    ]
    if not x.requires_grad or not z0.requires_grad:
        lines.append("loss and backward: impossible, the sample has no path back to z0")
        return Report(lines, broken or ["the sample does not depend on z0"])
    loss = (x - torch.ones_like(x)).square().mean()
    try:
        (gradient,) = torch.autograd.grad(loss, z0)
    except NonFiniteError as error:
        lines.append(f"loss and backward: loss {loss.item():.6g}, backward failed")
        return Report(lines, [*broken, str(error)])
    if not gradient.any():
        broken.append("the gradient arrives as zeros")
    updated = _ascended(z0, gradient, lr)
    lines += [
        f"loss and backward: loss {loss.item():.6g}, gradient of shape {list(gradient.shape)}",
        f"gradient: mean {gradient.mean().item():.6g}, max {gradient.max().item():.6g}, "
        f"min {gradient.min().item():.6g}",
        f"optimiser update: mean absolute difference {(updated - z0).abs().mean().item():.6g}",
    ]
    return Report(lines, broken)


def _sampled(
    denoiser: Denoiser, z0: Tensor, noise: NoiseSource, steps: int, solver: str
) -> tuple[Tensor, list[int]]:
    """The sample, and the steps at which the denoiser detached."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", GradientWarning)
        x = sample(
            denoiser,
            z0,
            schedules.karras(steps),
            solver=solver,
            noise=noise,
            churn=Churn(0.2 * steps),
            memory="checkpoint",
            check_finite=True,
        )
    found = [w.message for w in caught]
    for w in found:
        if not isinstance(w, GradientWarning):
            warnings.warn(w, stacklevel=3)
    return x, [w.step for w in found if isinstance(w, GradientWarning)]


def _broken_before(z0: Tensor, noise: NoiseSource, steps: int) -> list[str]:
    """The links that are seen to be broken before anything runs."""
    broken = []
    if not torch.is_grad_enabled():
        broken.append("no grad mode, the run is under torch.no_grad or set_grad_enabled(False)")
    if not z0.requires_grad:
        broken.append("z0 without requires_grad, call z0.requires_grad_() before the run")
    if torch.is_grad_enabled() and noise.of_z0:
        start = z0.detach().clone().requires_grad_()
        if not all(noise.at(start, step, steps).requires_grad for step in range(steps)):
            broken.append(
                f"noise drawn without reparameterisation, {type(noise).__name__}.at passes no "
                "gradient to z0; compute it from z0, or use noise.Philox where it is independent"
            )
    return broken


def _ascended(z0: Tensor, gradient: Tensor, lr: float) -> Tensor:
    """A copy of z0 after one step of Adam up the gradient."""
    updated = z0.detach().clone().requires_grad_()
    updated.grad = gradient
    torch.optim.Adam([updated], lr=lr, maximize=True).step()
    return updated.detach()
