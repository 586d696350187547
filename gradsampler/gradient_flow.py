# SPDX-License-Identifier: Apache-2.0
"""Does the gradient of a loss arrive at z0, which link broke, and is it the right gradient?"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradsampler import _checks, comparisons, policies
from gradsampler.arguments import Denoiser
from gradsampler.comparisons import Difference, Witness
from gradsampler.differences import Comparison
from gradsampler.engine import parts
from gradsampler.engine.observer import NonFiniteError
from gradsampler.engine.trajectory import GradientWarning, Trajectory
from gradsampler.memory import Memory, resolve
from gradsampler.noise.sources import name_of
from gradsampler.parameterization import Parameterization
from gradsampler.repetition import RandomState, ReplayError
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
    call along a random direction of its input, is computed twice: by autograd, and as a difference
    quotient with the step of least error (`differences`). If they differ by more than the
    denoiser's rounding explains, the backward of the denoiser is wrong, and the report says at
    which steps. A direction takes about as long as 40 runs.

    Args:
        denoiser, sigmas, sample_kwargs: as for `sample`; ``check_finite`` is on by default.
        z0: [B, *state] start, which ought to require grad.
        loss: from the sample [B, *state] to a scalar tensor; by default the mean squared
            difference from ones.
        directions: random directions; 0 compares nothing.
        also: "cond" and "parameters" to compare these derivatives too; the parameters are all
            that the denoiser uses and that require grad.
        seed: of the directions.
        lr: learning rate of the update whose size is reported, one step of Adam up the loss.

    Returns:
        The report. A broken link is reported, and does not raise an exception.

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
    broken = _broken_before(z0, run.trajectory)
    try:
        x, detached = run.differentiable()
    except NonFiniteError as error:
        return Report(["forward: failed"], [*broken, str(error)])
    num_steps, source = run.trajectory.program.num_steps, type(run.trajectory.noise).__name__
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
    except (NonFiniteError, ReplayError) as error:
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
        broken += _wrong(report.differences, num_steps, run.known)
    elif directions:
        lines.append("differences: not taken, as the gradient is broken before")
    return report


class _Sight(Memory):
    """Sees the trajectory of a run, and calls no model."""

    trajectory: Trajectory

    def run(self, trajectory: Trajectory, z0: Tensor) -> Tensor:
        self.trajectory = trajectory
        return z0


class _Run:
    """The runs that a check makes: with gradient, without, and from points beside."""

    def __init__(
        self, denoiser: Any, z0: Tensor, sigmas: Any, sample_kwargs: dict[str, Any]
    ) -> None:
        self._denoiser, self._z0, self._sigmas, self._kwargs = denoiser, z0, sigmas, sample_kwargs
        sight = _Sight()
        self._quietly(z0, memory=sight)
        self.trajectory = sight.trajectory
        self.known = "though each model call's is right"
        if not resolve(sample_kwargs.get("memory", "auto")).exact:
            self.known = "which memory= says not to be"
        if not policies.resolve(sample_kwargs.get("gradient")).exact:
            self.known = "which gradient= says not to be"
        self._parts = parts.reachable(denoiser, sample_kwargs.get("cond"))
        self._random = self._present()

    def _present(self) -> RandomState:
        return RandomState(self._z0.device, generators=self._parts.generators)

    def _sample(self, z0: Tensor, **changes: Any) -> Tensor:
        return sample(self._denoiser, z0, self._sigmas, **(self._kwargs | changes))

    def _quietly(self, z0: Tensor, **changes: Any) -> Tensor:
        """A run that nobody watches, and without the warnings that the first one gives."""
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return self._sample(
                z0, **({"callback": None, "progress": False, "monitor": None} | changes)
            )

    def differentiable(self) -> tuple[Tensor, list[int]]:
        """The sample, and the steps at which the denoiser detaches."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", GradientWarning)
            x = self._sample(self._z0)
        found = [w.message for w in caught]
        for w in found:
            if not isinstance(w, GradientWarning):
                warnings.warn(w, stacklevel=3)
        return x, [w.step for w in found if isinstance(w, GradientWarning)]

    def differences(
        self,
        cotangent: Tensor,
        gradient: Tensor,
        loss: Callable[[Tensor], Tensor],
        also: Sequence[str],
        generator: torch.Generator,
    ) -> list[Difference]:
        """The differences along one direction each: of the calls, of the noises, of the run."""
        with self._restored():
            witness = Witness()
            self._quietly(self._z0, memory=witness)
            found: list[Difference] = []
            leaves: dict[int, Tensor] = {}
            for call in witness.calls:
                differences, used = comparisons.of_call(witness, call, also, generator)
                found += differences
                leaves |= {id(leaf): leaf for leaf in used}
            found += comparisons.of_noises(witness, generator)
        cond = self.trajectory.cond
        floating = [c for c in cond.tensors if c.is_floating_point()]
        inputs: dict[str, Sequence[Tensor]] = {"z0": [self._z0]}
        inputs |= {
            of: x
            for of, x in (("cond", floating), ("parameters", [*leaves.values()]))
            if of in also
        }
        gradients: dict[str, Sequence[Tensor | None]] = {"z0": [gradient]}
        if len(inputs) > 1:
            gradients |= self._gradients(inputs, loss)
        precision = max(difference.comparison.precision for difference in found)

        def run(moved: dict[str, Sequence[Tensor]]) -> Tensor:
            ((of, values),) = moved.items()
            with self._restored():
                if of == "z0":
                    return self._quietly(values[0])
                if of == "cond":
                    return self._quietly(self._z0, cond=self._filled(values))
                with comparisons.replaced(inputs[of], values):
                    return self._quietly(self._z0)

        return comparisons.of_run(run, inputs, cotangent, gradients, precision, generator) + found

    def _gradients(
        self, inputs: dict[str, Sequence[Tensor]], loss: Callable[[Tensor], Tensor]
    ) -> dict[str, Sequence[Tensor | None]]:
        """Autograd's gradients to what else is compared, by a run of their own."""
        cond = [c.detach().requires_grad_() for c in inputs.get("cond", ())]
        leaves = [*inputs.get("parameters", ())]
        with self._restored(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = loss(self._sample(self._z0, cond=self._filled(cond) if cond else None))
            wanted = [*cond, *leaves]
            found = torch.autograd.grad(value, wanted, allow_unused=True) if wanted else ()
        return {"cond": found[: len(cond)], "parameters": found[len(cond) :]}

    def _filled(self, floating: Sequence[Tensor]) -> dict[str, Any]:
        """The conditioning with other values in its floating tensors."""
        cond = self.trajectory.cond
        return cond.filled(comparisons.filled(cond.tensors, floating))

    @contextmanager
    def _restored(self) -> Iterator[None]:
        """Draws as the first run did, and leaves generators and buffers as they are."""
        now = self._present()
        buffers = [
            (module, name, x, x.clone())
            for module in self._parts.modules
            for name, x in module.named_buffers(recurse=False)
        ]
        self._random.restore()
        try:
            yield
        finally:
            now.restore()
            for module, name, x, value in buffers:
                with torch.no_grad():
                    module._buffers[name] = x.copy_(value)


def _told(differences: Sequence[Difference]) -> str:
    """The line that says how far autograd and the differences are apart."""
    parts = []
    for each in differences:
        if each.step is None:
            c = each.comparison
            parts.append(
                f"along {each.of} autograd {c.autograd:.6g}, central difference "
                f"{c.difference:.6g}, {_off(c)}"
            )
    for of in dict.fromkeys(each.of for each in differences if each.step is not None):
        calls = [each.comparison for each in differences if each.of == of and each.step is not None]
        worst = max(calls, key=lambda c: c.error / c.tolerance)
        kind = "noises" if of == "noise" else f"model calls along {of}"
        parts.append(f"{len(calls)} {kind}, the worst {_off(worst)}")
    return "differences: " + "; ".join(parts)


def _off(c: Comparison) -> str:
    unseen = ", too much to judge" if c.blind else ""
    return f"off by {c.error:.1e} where rounding explains {c.tolerance:.1e}{unseen}"


def _wrong(differences: Sequence[Difference], num_steps: int, known: str) -> list[str]:
    """The links that the differences show to be broken; ``known`` is what else is known of all."""
    broken = []
    for of, link in _LINKS.items():
        here = [each for each in differences if each.of == of and each.step is not None]
        wrong = [each for each in here if each.wrong]
        if wrong:
            steps = list({each.step: _place(each, num_steps) for each in wrong}.values())
            listed = ", ".join(steps[:3]) + (f" and {len(steps) - 3} more" * (len(steps) > 3))
            place = "at every step" if len(wrong) == len(here) else f"at step {listed}"
            worst = max(wrong, key=lambda each: each.comparison.error)
            broken.append(
                f"{link} {place}: autograd gives {worst.comparison.autograd:.6g}, the central "
                f"difference {worst.comparison.difference:.6g}, {_off(worst.comparison)}"
            )
    for each in differences:
        # In low precision the rounding of one call is carried on by the next ones.
        if each.step is None and each.wrong and not broken and each.comparison.precision < 1e-4:
            broken.append(
                f"the gradient of the run to {each.of}, {known}: it is {_off(each.comparison)}"
            )
    return broken


def _place(each: Difference, num_steps: int) -> str:
    level = "" if each.sigma is None else f" (sigma = {each.sigma:.6g})"
    return f"{each.step} of {num_steps}{level}"


_LINKS = {
    "x": "a wrong backward of the denoiser",
    "cond": "a wrong backward of the denoiser to cond",
    "parameters": "a wrong backward of the denoiser to its parameters",
    "noise": "a noise whose transpose is not that of its at",
}


def _broken_before(z0: Tensor, trajectory: Trajectory) -> list[str]:
    """The links that are seen to be broken before anything runs."""
    broken = []
    if not torch.is_grad_enabled():
        broken.append("no grad mode, the run is under torch.no_grad or set_grad_enabled(False)")
    if not z0.requires_grad:
        broken.append("z0 without requires_grad, call z0.requires_grad_() before the run")
    noise, program = trajectory.noise, trajectory.program
    if torch.is_grad_enabled() and noise.of_z0:
        start = z0.detach().clone().requires_grad_()
        injected = dict.fromkeys(injection.noise for injection in program.injections)
        names = [name_of(step, program.num_steps, draw) for step, draw in injected]
        if not all(noise.at(start, *name).requires_grad for name in names):
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
