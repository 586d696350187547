# SPDX-License-Identifier: Apache-2.0
"""The log-likelihood of samples under the probability flow ODE."""

import importlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gradsampler import _checks
from gradsampler import memory as memories
from gradsampler.elementary import Coefficient
from gradsampler.integrations.k_diffusion.levels import to_d
from gradsampler.integrations.k_diffusion.run import Model
from gradsampler.iteration import iterate
from gradsampler.memory import Memory, Store


def log_likelihood(
    model: Model,
    x: Tensor,
    sigma_min: Coefficient,
    sigma_max: Coefficient,
    extra_args: Mapping[str, Any] | None = None,
    atol: float = 1e-4,
    rtol: float = 1e-4,
    *,
    memory: str | Memory = "store",
) -> tuple[Tensor, dict[str, int]]:
    """The log-density of x, with Hutchinson's estimate of the divergence along the ODE.

    Song et al. 2021, arXiv 2011.13456, section 4.3 and appendix D.2; integrated by torchdiffeq's
    dopri5. In grad mode its gradient reaches x, the parameters and ``extra_args`` through all the
    evaluations, in each of which the model is differentiated twice. The steps that dopri5 chose are
    taken as given, but for the width of the first one, which torchdiffeq differentiates under
    "store": a difference within the tolerances.

    Args:
        model: callable (x [B, *state], sigma [B], **extra_args) -> denoised [B, *state].
        x: [B, *state] samples, of the level ``sigma_min``.
        sigma_min, sigma_max: the ends of the ODE; at the upper one x is taken for noise.
        extra_args: keyword arguments of the model.
        atol, rtol: tolerances of the integration.
        memory: "store" keeps the activations of all evaluations. Another strategy first integrates
            without a gradient to see which steps are taken, and then takes these: checkpoint keeps
            a state a step, and the seven evaluations of one.

    Returns:
        [B] log-densities in nats, and a dict with ``fevals``, the number of evaluations.

    Raises:
        ImportError: torchdiffeq is not installed.
        ValueError: an end requires a gradient, and ``memory`` is not store.

    Example:
        >>> import torch
        >>> x = torch.full((1, 2), 0.5, requires_grad=True)
        >>> found, _ = log_likelihood(lambda x, sigma: 0 * x, x, 0.5, 5.0, memory="checkpoint")
        >>> found, torch.autograd.grad(found.sum(), x)[0]  # of N(0, 0.5^2)
        (tensor([-1.4513], grad_fn=<AddBackward0>), tensor([[-2.0000, -2.0000]]))
    """
    x = _checks.batched("x", x)
    integrate, given = _torchdiffeq().odeint, dict(extra_args or {})
    strategy, graph = memories.resolve(memory), torch.is_grad_enabled()
    learned = any(isinstance(s, Tensor) and s.requires_grad for s in (sigma_min, sigma_max))
    again = graph and not isinstance(strategy, Store)
    if again and learned:
        _checks.fail("memory", "be 'store' for ends that require a gradient", repr(memory))
    ode = _Flow(model, torch.randint_like(x, 2) * 2 - 1)
    levels = torch.stack([torch.as_tensor(s).to(x) for s in (sigma_min, sigma_max)])
    options = {"atol": atol, "rtol": rtol, "method": "dopri5"}
    start = x if graph else x.detach(), x.new_zeros(len(x))
    slope, steps = ode.slope(given), list[tuple[float, float]]()  # where, and how wide
    slope.callback_accept_step = lambda t, _, size: steps.append((t.item(), size.item()))
    with torch.set_grad_enabled(graph and not again):
        states, changes = integrate(slope, start, levels, **options)
    noise, change = states[-1], changes[-1]
    if again:
        end = levels[-1].item()

        def step(state: _State, i: int, **given: Any) -> _State:
            begin, size = steps[i]
            stop = steps[i + 1][0] if i + 1 < len(steps) else end
            here = torch.tensor([begin, stop], dtype=torch.float64, device=x.device)
            fixed = {"first_step": size, "min_step": size, "max_step": size}
            found = integrate(ode.slope(given), state, here, **options, options=fixed)
            return found[0][-1], found[1][-1]

        noise, change = iterate(step, start, len(steps), memory=strategy, cond=given)
        noise, change = noise.to(x.dtype), change.to(x.dtype)
    top = levels[-1]
    prior = -0.5 * (noise / top) ** 2 - torch.log(top) - 0.5 * math.log(2 * math.pi)
    return prior.flatten(1).sum(1) + change, {"fevals": ode.evaluations}


_State = tuple[Tensor, Tensor]  # [B, *state], and [B] the change of the log-density


class _Flow:
    """The probability flow ODE with its divergence along a random direction.

    Args:
        model: the denoiser.
        direction: [B, *state] of signs.
    """

    def __init__(self, model: Model, direction: Tensor) -> None:
        self._model, self._direction = model, direction
        self.evaluations = 0

    def slope(self, given: Mapping[str, Any]) -> Any:
        """The right-hand side, for torchdiffeq, with keyword arguments of the model."""

        def slope(sigma: Tensor, state: _State) -> _State:
            self.evaluations += 1
            graph = torch.is_grad_enabled()
            with torch.enable_grad():
                here = state[0] if graph and state[0].requires_grad else state[0].detach()
                here = here if here.requires_grad else here.requires_grad_()
                here = here.view_as(here)  # hooks on modules' inputs fail on leaves
                denoised = self._model(here, sigma.to(here).expand(len(here)), **given)
                d = to_d(here, sigma, denoised)
                along = (d * self._direction).sum()
                (pulled,) = torch.autograd.grad(along, here, create_graph=graph)
                divergence = (self._direction * pulled).flatten(1).sum(1)
            return (d, divergence) if graph else (d.detach(), divergence.detach())

        return slope


def _torchdiffeq() -> Any:
    try:
        return importlib.import_module("torchdiffeq")
    except ImportError as error:
        raise ImportError(
            "log_likelihood must find the package torchdiffeq, which integrates for it as for "
            "k-diffusion; pip install torchdiffeq"
        ) from error
