# SPDX-License-Identifier: Apache-2.0
"""The log-likelihood of samples under the probability flow ODE."""

import importlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradsampler import _checks
from gradsampler.elementary import Coefficient
from gradsampler.integrations.k_diffusion.levels import to_d
from gradsampler.integrations.k_diffusion.run import Model


def log_likelihood(
    model: Model,
    x: Tensor,
    sigma_min: Coefficient,
    sigma_max: Coefficient,
    extra_args: Mapping[str, Any] | None = None,
    atol: float = 1e-4,
    rtol: float = 1e-4,
) -> tuple[Tensor, dict[str, int]]:
    """The log-density of x, with Hutchinson's estimate of the divergence along the ODE.

    Song et al. 2021, arXiv 2011.13456, section 4.3 and appendix D.2; integrated by torchdiffeq's
    dopri5. In grad mode its gradient reaches x, the parameters and ``extra_args`` through all the
    evaluations, whose activations plain autograd keeps, and the model is differentiated twice. The
    steps that dopri5 chose are taken as given.

    Args:
        model: callable (x [B, *state], sigma [B], **extra_args) -> denoised [B, *state].
        x: [B, *state] samples, of the level ``sigma_min``.
        sigma_min, sigma_max: the ends of the ODE; at the upper one x is taken for noise.
        extra_args: keyword arguments of the model.
        atol, rtol: tolerances of the integration.

    Returns:
        [B] log-densities in nats, and a dict with ``fevals``, the number of evaluations.

    Raises:
        ImportError: torchdiffeq is not installed.
    """
    x = _checks.batched("x", x)
    integrate = _torchdiffeq().odeint
    given = dict(extra_args or {})
    graph = torch.is_grad_enabled()
    direction = torch.randint_like(x, 2) * 2 - 1
    evaluations = 0

    def slope(sigma: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        nonlocal evaluations
        evaluations += 1
        with torch.enable_grad():
            here = state[0] if graph and state[0].requires_grad else state[0].detach()
            here = here if here.requires_grad else here.requires_grad_()
            d = to_d(here, sigma, model(here, sigma.to(here).expand(len(here)), **given))
            along = (d * direction).sum()
            (pulled,) = torch.autograd.grad(along, here, create_graph=graph)
            divergence = (direction * pulled).flatten(1).sum(1)
        return (d, divergence) if graph else (d.detach(), divergence.detach())

    start = x if graph else x.detach()
    levels = torch.stack([torch.as_tensor(s).to(x) for s in (sigma_min, sigma_max)])
    states, changes = integrate(
        slope, (start, x.new_zeros(len(x))), levels, atol=atol, rtol=rtol, method="dopri5"
    )
    noise, top = states[-1], levels[-1]
    prior = -0.5 * (noise / top) ** 2 - torch.log(top) - 0.5 * math.log(2 * math.pi)
    return prior.flatten(1).sum(1) + changes[-1], {"fevals": evaluations}


def _torchdiffeq() -> Any:
    try:
        return importlib.import_module("torchdiffeq")
    except ImportError as error:
        raise ImportError(
            "log_likelihood must find the package torchdiffeq, which integrates for it as for "
            "k-diffusion; pip install torchdiffeq"
        ) from error
