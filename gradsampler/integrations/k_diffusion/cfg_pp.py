# SPDX-License-Identifier: Apache-2.0
"""Samplers with CFG++ (Chung et al. 2024, arXiv 2406.08070) under ComfyUI's names.

The model is a `gradsampler.Guided`, whose two predictions they take; ComfyUI gets them by a hook in
its model. Results and errors are as of `sample_euler`.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gradsampler import _checks
from gradsampler.elementary import Coefficient
from gradsampler.integrations.k_diffusion.run import Callback, Model, Run, Sampler
from gradsampler.memory import Memory
from gradsampler.parameterization import Parameterization
from gradsampler.solvers import (
    DPMpp2MCFGpp,
    DPMpp2SAncestralCFGpp,
    EulerCFGpp,
    GradientEstimation,
    GradientEstimationCFGpp,
    ResMultistepCFGpp,
    Solver,
)


def sample_gradient_estimation(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    ge_gamma: float = 2.0,
    cfg_pp: bool = False,
    *,
    memory: str | Memory = "auto",
) -> Tensor:
    """Gradient estimation (Permenter and Yuan 2024, arXiv 2306.04848, algorithm 2)."""
    if cfg_pp:
        _guided(model)
    solver: Solver = (GradientEstimationCFGpp if cfg_pp else GradientEstimation)(ge_gamma)
    run = Run(model, x, extra_args, callback, disable, memory, None)
    return run.along(sigmas, solver)


def sample_gradient_estimation_cfg_pp(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    ge_gamma: float = 2.0,
    *,
    memory: str | Memory = "auto",
) -> Tensor:
    """`sample_gradient_estimation` with CFG++ (Chung et al. 2024, arXiv 2406.08070)."""
    _guided(model)
    run = Run(model, x, extra_args, callback, disable, memory, None)
    return run.along(sigmas, GradientEstimationCFGpp(gamma=ge_gamma))


def sample_euler_cfg_pp(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    *,
    memory: str | Memory = "auto",
) -> Tensor:
    """Euler's method with CFG++."""
    _guided(model)
    run = Run(model, x, extra_args, callback, disable, memory, None)
    return run.along(sigmas, EulerCFGpp())


def sample_euler_ancestral_cfg_pp(
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
    """Euler's method with ancestral noise and CFG++."""
    _guided(model)
    run = Run(model, x, extra_args, callback, disable, memory, z0)
    return run.along(sigmas, EulerCFGpp(eta=eta, s_noise=s_noise), noise_sampler)


def sample_dpmpp_2m_cfg_pp(
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    disable: bool | None = None,
    *,
    memory: str | Memory = "auto",
) -> Tensor:
    """DPM-Solver++(2M) with CFG++."""
    _guided(model)
    run = Run(model, x, extra_args, callback, disable, memory, None)
    return run.along(sigmas, DPMpp2MCFGpp())


def sample_dpmpp_2s_ancestral_cfg_pp(
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
    """DPM-Solver++(2S) with ancestral noise and CFG++.

    Both parts of a step keep the noise that the prediction at its start finds; ComfyUI's takes that
    of the second evaluation, and does not converge.
    """
    solver = DPMpp2SAncestralCFGpp(eta=eta, s_noise=s_noise)
    _guided(model)
    run = Run(model, x, extra_args, callback, disable, memory, z0)
    return run.along(sigmas, solver, noise_sampler)


def sample_res_multistep_cfg_pp(
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
    """RES in two-step form with CFG++."""
    _guided(model)
    run = Run(model, x, extra_args, callback, disable, memory, z0)
    return run.along(sigmas, ResMultistepCFGpp(eta=0.0, s_noise=s_noise), noise_sampler)


def sample_res_multistep_ancestral_cfg_pp(
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
    """RES in two-step form with ancestral noise and CFG++."""
    _guided(model)
    run = Run(model, x, extra_args, callback, disable, memory, z0)
    return run.along(sigmas, ResMultistepCFGpp(eta=eta, s_noise=s_noise), noise_sampler)


def _guided(model: Model) -> None:
    if not isinstance(model, Parameterization) or model.width < 2:
        kind = type(model).__name__
        _checks.fail("model", "be a gradsampler.Guided, whose predictions CFG++ takes apart", kind)
