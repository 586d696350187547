# SPDX-License-Identifier: Apache-2.0
"""Samplers that ComfyUI has beside k-diffusion's, in the same form.

Names, arguments and defaults are its own, results and errors as of `sample_euler`. The levels are
those of x = x0 + sigma*e.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from gradsampler import _checks
from gradsampler.elementary import Coefficient
from gradsampler.integrations.k_diffusion.draws import churn, path, shares
from gradsampler.integrations.k_diffusion.run import Callback, Model, Run, Sampler
from gradsampler.memory import Memory
from gradsampler.solvers import (
    DDPM,
    DEIS,
    ERSDE,
    IPNDM,
    Consistency,
    DPMpp2MSDE,
    HeunPP2,
    IPNDMv,
    ResMultistep,
    Seeds2,
    Seeds3,
)
from gradsampler.solvers.er_sde import er_sde_5


def sample_dpmpp_2m_sde_heun(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: Coefficient = 1.0,
    s_noise: Coefficient = 1.0,
    noise_sampler: Sampler = None,
    solver_type: str = "heun",
    *,
    memory: str | Memory = "auto",
    z0: Tensor | None = None,
) -> Tensor:
    """SDE-DPM-Solver++(2M), by default in its form after Heun."""
    variant = _checks.choice("solver_type", solver_type, ("heun", "midpoint"))
    noise = path(x, sigmas) if noise_sampler is None else noise_sampler
    run = Run(model, x, extra_args, callback, disable, memory, z0)
    return run.along(sigmas, DPMpp2MSDE(eta=eta, s_noise=s_noise, variant=variant), noise)


def sample_ddpm(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    noise_sampler: Sampler = None,
    *,
    memory: str | Memory = "auto",
    z0: Tensor | None = None,
) -> Tensor:
    """Ancestral sampling of the DDPM posterior (Ho et al. 2020, arXiv 2006.11239)."""
    run = Run(model, x, extra_args, callback, disable, memory, z0)
    return run.along(sigmas, DDPM(), noise_sampler)


def sample_lcm(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    noise_sampler: Sampler = None,
    s_noise: Coefficient = 1.0,
    *,
    memory: str | Memory = "auto",
    z0: Tensor | None = None,
) -> Tensor:
    """Multistep sampling from a latent consistency model (arXiv 2310.04378)."""
    run = Run(model, x, extra_args, callback, disable, memory, z0)
    return run.along(sigmas, Consistency(s_noise=s_noise), noise_sampler)


def sample_ipndm(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    max_order: int = 4,
    *,
    memory: str | Memory = "auto",
) -> Tensor:
    """iPNDM (Liu et al. 2022, arXiv 2202.09778), with the weights of even steps."""
    run = Run(model, x, extra_args, callback, disable, memory, None)
    return run.along(sigmas, IPNDM(order=max_order))


def sample_ipndm_v(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    max_order: int = 4,
    *,
    memory: str | Memory = "auto",
) -> Tensor:
    """iPNDM for uneven levels, whose slopes of the steps before ComfyUI's detaches."""
    run = Run(model, x, extra_args, callback, disable, memory, None)
    return run.along(sigmas, IPNDMv(order=max_order))


def sample_deis(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    max_order: int = 3,
    deis_mode: str = "tab",
    *,
    memory: str | Memory = "auto",
) -> Tensor:
    """DEIS (Zhang and Chen 2022, arXiv 2204.13902).

    ComfyUI's detaches the slopes of the steps before.

    Args:
        max_order: 1 to 4.
        deis_mode: "tab" or "rhoab".
    """
    mode = _checks.choice("deis_mode", deis_mode, ("tab", "rhoab"))
    variable = {"tab": "time", "rhoab": "rho"}[mode]
    run = Run(model, x, extra_args, callback, disable, memory, None)
    return run.along(sigmas, DEIS(order=max_order, variable=variable))


def sample_res_multistep(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_noise: Coefficient = 1.0,
    noise_sampler: Sampler = None,
    *,
    memory: str | Memory = "auto",
    z0: Tensor | None = None,
) -> Tensor:
    """RES in two-step form (arXiv 2308.02157)."""
    run = Run(model, x, extra_args, callback, disable, memory, z0)
    return run.along(sigmas, ResMultistep(eta=0.0, s_noise=s_noise), noise_sampler)


def sample_res_multistep_ancestral(
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
    """RES in two-step form with ancestral noise."""
    run = Run(model, x, extra_args, callback, disable, memory, z0)
    return run.along(sigmas, ResMultistep(eta=eta, s_noise=s_noise), noise_sampler)


def sample_er_sde(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    s_noise: Coefficient = 1.0,
    noise_sampler: Sampler = None,
    noise_scaler: Callable[[Coefficient], Coefficient] | None = None,
    max_stage: int = 3,
    *,
    memory: str | Memory = "auto",
    z0: Tensor | None = None,
) -> Tensor:
    """ER-SDE-Solver (Cui et al. 2023, arXiv 2309.06169).

    Args:
        noise_scaler: of floats and 0-d tensors; None is the paper's fifth.
        max_stage: 1 to 3.
    """
    phi = er_sde_5 if noise_scaler is None else noise_scaler
    solver = ERSDE(order=max_stage, s_noise=s_noise, phi=phi)
    run = Run(model, x, extra_args, callback, disable, memory, z0)
    return run.along(sigmas, solver, noise_sampler)


def sample_seeds_2(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: Coefficient = 1.0,
    s_noise: Coefficient = 1.0,
    noise_sampler: Sampler = None,
    r: float = 0.5,
    *,
    memory: str | Memory = "auto",
    z0: Tensor | None = None,
) -> Tensor:
    """SEEDS-2 (Gonzalez et al. 2023, arXiv 2305.14267)."""
    run = Run(model, x, extra_args, callback, disable, memory, z0)
    return run.along(
        sigmas, Seeds2(eta=eta, s_noise=s_noise, r=r), noise_sampler, between=shares(sigmas, r)
    )


def sample_seeds_3(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    eta: Coefficient = 1.0,
    s_noise: Coefficient = 1.0,
    noise_sampler: Sampler = None,
    r_1: float = 1.0 / 3,
    r_2: float = 2.0 / 3,
    *,
    memory: str | Memory = "auto",
    z0: Tensor | None = None,
) -> Tensor:
    """SEEDS-3 (Gonzalez et al. 2023, arXiv 2305.14267)."""
    run = Run(model, x, extra_args, callback, disable, memory, z0)
    return run.along(
        sigmas,
        Seeds3(eta=eta, s_noise=s_noise, r_1=r_1, r_2=r_2),
        noise_sampler,
        between=shares(sigmas, r_1, r_2),
    )


def sample_heunpp2(
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
    """Heun++, with slopes at this level and the two after it, and churn."""
    churned = churn(sigmas, s_churn, s_tmin, s_tmax, s_noise, noise_sampler)
    run = Run(model, x, extra_args, callback, disable, memory, z0)
    return run.along(sigmas, HeunPP2(), noise_sampler, churn=churned)
