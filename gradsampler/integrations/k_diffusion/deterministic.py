# SPDX-License-Identifier: Apache-2.0
"""k-diffusion's samplers that inject no noise of their own."""

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gradsampler.elementary import Coefficient
from gradsampler.integrations.k_diffusion.draws import churn
from gradsampler.integrations.k_diffusion.run import Callback, Model, Run, Sampler
from gradsampler.memory import Memory
from gradsampler.solvers import DPM2, LMS, DPMpp2M, Euler, Heun


def sample_euler(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: Coefficient = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: Coefficient = 1.0,
    *,
    noise_sampler: Sampler = None,
    memory: str | Memory = "auto",
    z0: Tensor | None = None,
) -> Tensor:
    """Euler's method with churn (Karras et al. 2022, arXiv 2206.00364, algorithm 2).

    Its gradients, as those of all samplers here, reach x, the parameters and other leaves of the
    model, the tensors in ``extra_args``, and ``sigmas``, a final 0 included. It follows the grad
    mode in force.

    Args:
        model: callable (x [B, *state], sigma [B], **extra_args) -> denoised [B, *state]; or a
            network wrapped by gradsampler, as `gradsampler.VP` or `gradsampler.Guided`.
        x: [B, *state] the state at ``sigmas[0]``, of a floating dtype.
        sigmas: [N+1] levels, or [N+1, B] for each sample its own, positive but for a last one of
            0; falling, for `sample_euler`, `sample_heun` and `sample_dpm_2` also rising. Taken to
            float64.
        extra_args: keyword arguments of the model.
        callback: called once a step with a dict: x and denoised of the step's first model call, its
            number i, and the levels sigma and sigma_hat, before and after churn.
        disable: hides the progress bar; None hides it where stderr is no terminal.
        s_churn, s_tmin, s_tmax, s_noise: how much noise is added before a step, at levels in
            [s_tmin, s_tmax], and its factor; s_churn and s_noise may be 0-d tensors that learn.
        noise_sampler: beside k-diffusion's arguments: what is added. None draws
            ``torch.randn_like(x)`` as k-diffusion does; a function (sigma, sigma_next) -> noise
            [B, *state] is called once a noise; a `gradsampler.noise` object such as SignedRoll
            makes it of z0, so that its gradient reaches x.
        memory: what is kept for backward, as for `gradsampler.sample`.
        z0: [B, *state] what such an object makes its noise of; None is ``x / sigmas[0]``, right
            where the run starts from noise.

    Returns:
        [B, *state] of x's dtype, the state at ``sigmas[-1]``.

    Raises:
        ValueError, TypeError: naming the argument that does not fit, before any model call.

    Example:
        >>> import torch
        >>> x = torch.full((1, 3), 9.0, requires_grad=True)
        >>> sigmas = torch.tensor([9.0, 3.0, 0.0], requires_grad=True)
        >>> sample = sample_euler(lambda x, sigma: x / 2, x, sigmas)
        >>> dx, dsigmas = torch.autograd.grad(sample.sum(), [x, sigmas])
        >>> bool(dx.isfinite().all() & dsigmas.isfinite().all())
        True
    """
    churned = churn(sigmas, s_churn, s_tmin, s_tmax, s_noise, noise_sampler)
    run = Run(model, x, extra_args, callback, disable, memory, z0)
    return run.along(sigmas, Euler(), noise_sampler, churn=churned)


def sample_heun(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: Coefficient = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: Coefficient = 1.0,
    *,
    noise_sampler: Sampler = None,
    memory: str | Memory = "auto",
    z0: Tensor | None = None,
) -> Tensor:
    """Heun's method with churn (Karras et al. 2022, arXiv 2206.00364, algorithm 2).

    Arguments, result and errors are those of `sample_euler`.
    """
    churned = churn(sigmas, s_churn, s_tmin, s_tmax, s_noise, noise_sampler)
    run = Run(model, x, extra_args, callback, disable, memory, z0)
    return run.along(sigmas, Heun(), noise_sampler, churn=churned)


def sample_dpm_2(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_churn: Coefficient = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: Coefficient = 1.0,
    *,
    noise_sampler: Sampler = None,
    memory: str | Memory = "auto",
    z0: Tensor | None = None,
) -> Tensor:
    """The midpoint method in log sigma with churn, after DPM-Solver-2 (arXiv 2206.00927).

    Arguments, result and errors are those of `sample_euler`.
    """
    churned = churn(sigmas, s_churn, s_tmin, s_tmax, s_noise, noise_sampler)
    run = Run(model, x, extra_args, callback, disable, memory, z0)
    return run.along(sigmas, DPM2(), noise_sampler, churn=churned)


def sample_lms(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    order: int = 4,
    *,
    memory: str | Memory = "auto",
) -> Tensor:
    """The linear multistep method of Adams and Bashforth, of an order of 1 to 4.

    k-diffusion's takes its coefficients by quadrature from detached levels, so that its gradient to
    sigmas is another than that of its samples. Here it is the right one.

    Arguments, result and errors are those of `sample_euler`.
    """
    run = Run(model, x, extra_args, callback, disable, memory, None)
    return run.along(sigmas, LMS(order=order))


def sample_dpmpp_2m(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    *,
    memory: str | Memory = "auto",
) -> Tensor:
    """DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

    Arguments, result and errors are those of `sample_euler`.
    """
    run = Run(model, x, extra_args, callback, disable, memory, None)
    return run.along(sigmas, DPMpp2M())
