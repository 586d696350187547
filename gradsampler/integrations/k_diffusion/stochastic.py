# SPDX-License-Identifier: Apache-2.0
"""k-diffusion's ancestral and SDE samplers.

Their arguments, results and errors are those of `sample_euler`, with ``eta`` the share of noise, 0
for none, and ``s_noise`` its factor; both may be 0-d tensors that receive gradients.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gradsampler import _checks
from gradsampler.elementary import Coefficient
from gradsampler.integrations.k_diffusion.draws import path, shares
from gradsampler.integrations.k_diffusion.run import Callback, Model, Run, Sampler
from gradsampler.memory import Memory
from gradsampler.noise.sources import NoiseSource
from gradsampler.solvers import (
    DPM2Ancestral,
    DPMpp2MSDE,
    DPMpp2SAncestral,
    DPMpp3MSDE,
    DPMppSDE,
    EulerAncestral,
)


def sample_euler_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: Coefficient = 1.0,
    s_noise: Coefficient = 1.0,
    noise_sampler: Sampler = None,
    *,
    memory: str | Memory = "auto",
    z0: Tensor | None = None,
) -> Tensor:
    """Euler's method with ancestral noise.

    Example:
        Noise that is made of x, so that x has the gradient through it as well.

        >>> import torch, gradsampler as gs
        >>> x = (9 * torch.randn(1, 3)).requires_grad_()
        >>> sigmas = torch.tensor([9.0, 3.0, 0.0])
        >>> noise = gs.noise.SignedRoll(seed=0)
        >>> sample = sample_euler_ancestral(lambda x, s: x / 2, x, sigmas, noise_sampler=noise)
        >>> torch.autograd.grad(sample.sum(), x)[0].shape
        torch.Size([1, 3])
    """
    run = Run(model, x, extra_args, callback, disable, memory, z0)
    return run.along(sigmas, EulerAncestral(eta=eta, s_noise=s_noise), noise_sampler)


def sample_dpm_2_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: Coefficient = 1.0,
    s_noise: Coefficient = 1.0,
    noise_sampler: Sampler = None,
    *,
    memory: str | Memory = "auto",
    z0: Tensor | None = None,
) -> Tensor:
    """The method of `sample_dpm_2` with ancestral noise."""
    run = Run(model, x, extra_args, callback, disable, memory, z0)
    return run.along(sigmas, DPM2Ancestral(eta=eta, s_noise=s_noise), noise_sampler)


def sample_dpmpp_2s_ancestral(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: Coefficient = 1.0,
    s_noise: Coefficient = 1.0,
    noise_sampler: Sampler = None,
    *,
    memory: str | Memory = "auto",
    z0: Tensor | None = None,
) -> Tensor:
    """DPM-Solver++(2S) (Lu et al. 2022, arXiv 2211.01095, algorithm 1) with ancestral noise."""
    run = Run(model, x, extra_args, callback, disable, memory, z0)
    return run.along(sigmas, DPMpp2SAncestral(eta=eta, s_noise=s_noise), noise_sampler)


def sample_dpmpp_sde(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: Coefficient = 1.0,
    s_noise: Coefficient = 1.0,
    noise_sampler: Sampler = None,
    r: float = 1 / 2,
    *,
    memory: str | Memory = "auto",
    z0: Tensor | None = None,
) -> Tensor:
    """DPM-Solver++ with a noise at each of its two evaluations.

    A function for noise is asked for that up to the second evaluation and for that of the whole
    step, as by k-diffusion, whose tree makes the one a part of the other. Of a `gradsampler.noise`
    object both are taken along one path.

    Args:
        r: where in the step, in log sigma, the second evaluation is.
        noise_sampler: None is a Brownian tree, for which torchsde has to be installed.
    """
    noise = path(x, sigmas) if noise_sampler is None else noise_sampler
    independent = not isinstance(noise, NoiseSource)
    solver = DPMppSDE(eta=eta, s_noise=s_noise, r=r, independent=independent)
    run = Run(model, x, extra_args, callback, disable, memory, z0)
    return run.along(sigmas, solver, noise, between=shares(sigmas, r, from_start=True))


def sample_dpmpp_2m_sde(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: Coefficient = 1.0,
    s_noise: Coefficient = 1.0,
    noise_sampler: Sampler = None,
    solver_type: str = "midpoint",
    *,
    memory: str | Memory = "auto",
    z0: Tensor | None = None,
) -> Tensor:
    """SDE-DPM-Solver++(2M) (arXiv 2211.01095, equation 18 and appendix).

    Args:
        solver_type: "midpoint" or "heun".
        noise_sampler: None is a Brownian tree, for which torchsde has to be installed.
    """
    variant = _checks.choice("solver_type", solver_type, ("heun", "midpoint"))
    noise = path(x, sigmas) if noise_sampler is None else noise_sampler
    run = Run(model, x, extra_args, callback, disable, memory, z0)
    return run.along(sigmas, DPMpp2MSDE(eta=eta, s_noise=s_noise, variant=variant), noise)


def sample_dpmpp_3m_sde(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: Coefficient = 1.0,
    s_noise: Coefficient = 1.0,
    noise_sampler: Sampler = None,
    *,
    memory: str | Memory = "auto",
    z0: Tensor | None = None,
) -> Tensor:
    """SDE-DPM-Solver++(3M), with k-diffusion's weights; measured, it is of second order.

    Args:
        noise_sampler: None is a Brownian tree, for which torchsde has to be installed.
    """
    noise = path(x, sigmas) if noise_sampler is None else noise_sampler
    run = Run(model, x, extra_args, callback, disable, memory, z0)
    return run.along(sigmas, DPMpp3MSDE(eta=eta, s_noise=s_noise), noise)
