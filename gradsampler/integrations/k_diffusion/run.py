# SPDX-License-Identifier: Apache-2.0
"""One call of a sampling function, as a run."""

import sys
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradsampler import _checks, arguments
from gradsampler.engine.observer import StepInfo
from gradsampler.integrations.k_diffusion import draws
from gradsampler.integrations.k_diffusion.draws import Between, NoiseSampler
from gradsampler.integrations.k_diffusion.levels import append_dims
from gradsampler.memory import Memory
from gradsampler.noise.replayed import Replayed
from gradsampler.noise.sources import NoiseSource
from gradsampler.parameterization import Coefficient, Parameterization, Preconditioning
from gradsampler.sampling import integrate
from gradsampler.solvers import DPM2, Churn, DPMFast, Euler, Heun, Solver

Model = Parameterization | Callable[..., Tensor]
Callback = Callable[[dict[str, Any]], object]
Sampler = NoiseSource | NoiseSampler | None

_BOTH_WAYS = (Euler, Heun, DPM2, DPMFast)  # methods for levels that rise as well


class Denoiser(Parameterization):
    """A denoiser of k-diffusion, called with levels [B] in the dtype of the state, for x0."""

    def __init__(self, network: Callable[..., Tensor]) -> None:
        self.network = network

    def described(self) -> Hashable | None:
        return (Denoiser,)

    def preconditioning(self, sigma: Coefficient) -> Preconditioning:
        return Preconditioning(0.0, (1.0,), 1.0, sigma)

    def outputs(self, x: Tensor, noise: Tensor, cond: Mapping[str, Any]) -> tuple[Tensor, ...]:
        return (self.network(x, noise.to(x.dtype).contiguous(), **cond),)

    def modules(self) -> Iterator[nn.Module]:
        return iter(())  # a wrapper casts for its network; it is called in the state's own dtype


def denoiser(model: Model) -> Parameterization:
    """The model of a call; one that is wrapped by gradsampler says itself how it is read."""
    if isinstance(model, Parameterization):
        return model
    if not callable(model):
        _checks.fail_type("model", "be callable as model(x, sigma, **extra_args)", model)
    return Denoiser(model)


@dataclass
class Told:
    """Passes the steps of a run on to a callback of k-diffusion's form.

    Args:
        callback: is called with a dict of x, i, sigma, sigma_hat and denoised.
        sigmas: [N+1] the levels.
    """

    callback: Callback
    sigmas: Tensor

    def __call__(self, info: StepInfo) -> None:
        """Tells of a step; x and denoised are those of its first model call."""
        levels = self.sigmas.detach()
        self.callback(
            {
                "x": info.x,
                "i": info.step,
                "sigma": levels[info.step],
                "sigma_hat": torch.as_tensor(info.sigma, dtype=levels.dtype, device=levels.device),
                "denoised": info.denoised,
            }
        )


@dataclass(frozen=True)
class Run:
    """The arguments that all sampling functions have.

    Args:
        model: callable (x [B, *state], sigma [B], **extra_args) -> denoised, or a network wrapped
            by gradsampler.
        x: [B, *state] the state at the first level.
        extra_args: keyword arguments of the model.
        callback: called with a dict once a step.
        disable: of the progress bar; None disables it where stderr is no terminal.
        memory: as for `gradsampler.sample`.
        z0: [B, *state] what a source of noise makes its noise of; None is x over the first level.
    """

    model: Model
    x: Tensor
    extra_args: Mapping[str, Any] | None
    callback: Callback | None
    disable: bool | None
    memory: str | Memory
    z0: Tensor | None

    def along(
        self,
        sigmas: Tensor,
        solver: Solver,
        noise_sampler: Sampler = None,
        *,
        between: Between | None = None,
        churn: Churn | None = None,
        told: type[Told] = Told,
    ) -> Tensor:
        """Runs a solver over levels [N+1] or [N+1, B], from the state x at the first.

        Args:
            sigmas: may require grad.
            solver: the method.
            noise_sampler: what it injects.
            between: the levels that a function for noise is called with; None is those of the step.
            churn: raises the levels before the steps.
            told: what passes the steps on to the callback.
        """
        x = _checks.batched("x", self.x)
        _checks.floating("sigmas", sigmas)
        if self.callback is not None and not callable(self.callback):
            _checks.fail_type("callback", "be callable as callback(info), or None", self.callback)
        if self.extra_args is not None and not isinstance(self.extra_args, Mapping):
            _checks.fail_type("extra_args", "be a dict or None", self.extra_args)
        model = denoiser(self.model)
        rises = sigmas.ndim == 1 and not bool((sigmas.detach().diff() < 0).all())
        if type(solver) in _BOTH_WAYS and rises:
            levels = arguments.checked_levels(sigmas, flow=False, monotone=False)
            program = solver.program(levels, model, churn=churn, started=True)
        else:
            program, _ = arguments.record(model, sigmas, solver=solver, churn=churn, started=True)
        noise: NoiseSource | None = draws.source(noise_sampler, x, between or draws.steps(sigmas))
        if isinstance(noise, Replayed) and not program.noises:
            noise = None
        return integrate(
            program,
            model,
            self.noised(sigmas, noise),
            start=x,
            noise=noise,
            memory=self.memory,
            cond=self.extra_args,
            callback=None if self.callback is None else told(self.callback, sigmas),
            progress=sys.stderr.isatty() if self.disable is None else not self.disable,
        )

    def noised(self, sigmas: Tensor, noise: NoiseSource | None) -> Tensor:
        """What the noise is made of, [B, *state]."""
        if self.z0 is not None:
            return _checks.shape("z0", _checks.floating("z0", self.z0), self.x.shape)
        if noise is None or not noise.of_z0:
            return self.x.detach()
        return self.x / append_dims(sigmas[0].to(self.x), self.x.ndim)
