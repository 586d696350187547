# SPDX-License-Identifier: Apache-2.0
"""k-diffusion's DPM-Solver-fast and its adaptive one, which set their levels themselves."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradsampler import _checks
from gradsampler.adaptation import adapted
from gradsampler.elementary import Coefficient, as_float
from gradsampler.engine.observer import StepInfo
from gradsampler.integrations.k_diffusion import draws
from gradsampler.integrations.k_diffusion.run import Callback, Model, Run, Sampler, Told, denoiser
from gradsampler.memory import Memory
from gradsampler.noise.sources import NoiseSource
from gradsampler.solvers import DPMAdaptive, DPMFast
from gradsampler.solvers.adaptive import Trial


class Timed(Told):
    """Tells as well of the times, which are minus the logarithms of the levels."""

    def __call__(self, info: StepInfo) -> None:
        """Tells of a step."""
        sigma = self.sigmas.detach()[info.step]
        t = -sigma.log()
        self.callback(
            {
                "sigma": sigma,
                "sigma_hat": sigma,
                "x": info.x,
                "i": info.step,
                "t": t,
                "t_up": t,
                "denoised": info.denoised,
            }
        )


def sample_dpm_fast(
    model: Model,
    x: Tensor,
    sigma_min: Coefficient,
    sigma_max: Coefficient,
    n: int,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: Coefficient = 0.0,
    s_noise: Coefficient = 1.0,
    noise_sampler: Sampler = None,
    *,
    memory: str | Memory = "auto",
    z0: Tensor | None = None,
) -> Tensor:
    """DPM-Solver-fast (Lu et al. 2022, arXiv 2206.00927, section 3.4), with n evaluations.

    The other arguments, result and errors are those of `sample_euler`.

    Args:
        sigma_min, sigma_max: the last level and the first; 0-d tensors receive gradients.
        n: model evaluations, on n // 3 + 1 steps even in log sigma.
        eta, s_noise: share of ancestral noise, 0 for none, and its factor.
        callback: its dict has the times t and t_up as well, minus the logarithms of the levels.
    """
    low, high = _ends(sigma_min, sigma_max)
    steps = _checks.integer("n", n, 1) // 3 + 1
    if high < low and eta > 0:
        _checks.fail("eta", "be 0 where the levels rise", as_float(eta))
    start, end = -high.log(), -low.log()
    ramp = torch.linspace(0, 1, steps + 1).to(start)
    sigmas = torch.exp(-(start + ramp * (end - start))).to(x.device)
    run = Run(model, x, extra_args, callback, disable, memory, z0)
    solver = DPMFast(evaluations=n, eta=eta, s_noise=s_noise)
    return run.along(sigmas, solver, noise_sampler, told=Timed)


@dataclass
class Search:
    """What is known while the adaptive solver looks for its steps.

    A step is told of when the next one is judged, and the last one at the end: then the state that
    it leads to is known.
    """

    callback: Callback | None
    order: int
    levels: list[Tensor]  # those accepted, 0-d
    info: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("steps", "nfe", "n_accept", "n_reject"), 0)
    )
    pending: dict[str, Any] = field(default_factory=dict)

    def __call__(self, trial: Trial, x: Tensor, denoised: Tensor) -> None:
        """Takes note of a step that was tried from the state x."""
        self.reached(x)
        self.info["steps"] += 1
        self.info["nfe"] += self.order
        self.info["n_accept" if trial.accepted else "n_reject"] += 1
        if trial.accepted:
            self.levels.append(self.levels[0].new_tensor(trial.t))
        sigma = self.levels[-1]
        self.pending = {
            "sigma": sigma,
            "sigma_hat": sigma,
            "i": self.info["steps"] - 1,
            "t": -sigma.log(),
            "t_up": -sigma.log(),
            "denoised": denoised,
            "error": sigma.new_tensor(trial.error),
            "h": trial.h,
            **self.info,
        }

    def reached(self, x: Tensor) -> None:
        """Tells of the step that led to the state x."""
        pending, self.pending = self.pending, {}
        if self.callback is not None and pending:
            self.callback({"x": x.detach(), **pending})

    def between(self, step: int, number: int) -> tuple[Tensor, Tensor]:
        """The levels of an accepted step."""
        return self.levels[step], self.levels[step + 1]


def sample_dpm_adaptive(
    model: Model,
    x: Tensor,
    sigma_min: Coefficient,
    sigma_max: Coefficient,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    order: int = 3,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h_init: float = 0.05,
    pcoeff: float = 0.0,
    icoeff: float = 1.0,
    dcoeff: float = 0.0,
    accept_safety: float = 0.81,
    eta: Coefficient = 0.0,
    s_noise: Coefficient = 1.0,
    noise_sampler: Sampler = None,
    return_info: bool = False,
    *,
    memory: str | Memory = "auto",
    z0: Tensor | None = None,
) -> Tensor | tuple[Tensor, dict[str, int]]:
    """DPM-Solver-12 and -23 with steps of its own choice (arXiv 2206.00927, appendix C).

    The steps are found without a gradient; those accepted are then run again, and the gradient is
    theirs, with their levels taken as given but for the two ends. The other arguments, result and
    errors are those of `sample_euler` and `sample_dpm_fast`.

    Args:
        order: 2 or 3.
        rtol, atol: tolerances of the difference between the two orders.
        h_init: first step in log sigma.
        pcoeff, icoeff, dcoeff, accept_safety: of the controller of the step.
        callback: called for rejected steps as well, with error, h and the counts of the info.
        return_info: returns (sample, info), info with the counts steps, nfe, n_accept, n_reject.

    Raises:
        ValueError: sigma_max is not above sigma_min; k-diffusion's goes the other way as well.
    """
    low, high = _ends(sigma_min, sigma_max)
    if not high > low:
        _checks.fail("sigma_max", f"be above sigma_min = {low.item()}", high.item())
    solver = DPMAdaptive(
        order, rtol, atol, h_init, pcoeff, icoeff, dcoeff, accept_safety, eta, s_noise
    )
    x = _checks.batched("x", x)
    search = Search(callback, order, [high.detach()])
    noise: NoiseSource | None = None
    if solver.stochastic:
        noise = draws.source(noise_sampler, x, search.between)
    run = Run(model, x, extra_args, None, disable, memory, z0)
    levels = adapted(
        solver,
        denoiser(model),
        run.noised(torch.stack([high, low]), noise),
        torch.stack([high, low]),
        start=x,
        noise=noise,
        cond=extra_args,
        told=search,
    )
    sample = run.along(levels, solver, noise)
    search.reached(sample)
    return (sample, dict(search.info)) if return_info else sample


def _ends(sigma_min: Coefficient, sigma_max: Coefficient) -> tuple[Tensor, Tensor]:
    low, high = (
        each if isinstance(each, Tensor) else torch.tensor(each, dtype=torch.get_default_dtype())
        for each in (sigma_min, sigma_max)
    )
    for name, each in (("sigma_min", low), ("sigma_max", high)):
        if each.ndim != 0 or not each > 0:
            _checks.fail(name, "be a number above 0", each.tolist())
    return low, high.to(low) if high.dtype != low.dtype else high
