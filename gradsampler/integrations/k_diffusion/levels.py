# SPDX-License-Identifier: Apache-2.0
"""k-diffusion's schedules and what its samplers do with a level.

The ends of a schedule may be 0-d tensors, which then receive gradients.
"""

import torch
from torch import Tensor

from gradsampler import _checks
from gradsampler.elementary import Coefficient, log
from gradsampler.solvers.ancestral import ancestral_levels
from gradsampler.solvers.interpolation import adams

Device = torch.device | str


def append_zero(x: Tensor) -> Tensor:
    """``x`` [N] and a 0 after it, [N+1]."""
    return torch.cat([x, x.new_zeros([1])])


def append_dims(x: Tensor, target_dims: int) -> Tensor:
    """``x`` with axes of length 1 behind its own, ``target_dims`` in all."""
    if x.ndim > target_dims:
        _checks.fail("x", f"have at most {target_dims} axes", x.ndim)
    return x[(..., *[None] * (target_dims - x.ndim))]


def get_sigmas_karras(
    n: int,
    sigma_min: Coefficient,
    sigma_max: Coefficient,
    rho: float = 7.0,
    device: Device = "cpu",
) -> Tensor:
    """Levels evenly spaced in sigma^(1/rho), then 0: Karras et al. 2022, arXiv 2206.00364, eq. 5.

    Args:
        n: number of positive levels.
        sigma_min, sigma_max: the last and the first of them.
        rho: above 0.
        device: of the result.

    Returns:
        [n + 1] of torch's default dtype.

    Example:
        >>> get_sigmas_karras(3, 1.0, 9.0, rho=2.0).tolist()
        [9.0, 4.0, 1.0, 0.0]
    """
    ramp = torch.linspace(0, 1, n)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return append_zero((high + ramp.to(_device(high)) * (low - high)) ** rho).to(device)


def get_sigmas_exponential(
    n: int, sigma_min: Coefficient, sigma_max: Coefficient, device: Device = "cpu"
) -> Tensor:
    """Levels evenly spaced in log sigma, then 0; the rest as for `get_sigmas_karras`.

    Example:
        >>> get_sigmas_exponential(3, 0.01, 100.0).round(decimals=5).tolist()[1:]
        [1.0, 0.009999999776482582, 0.0]
    """
    return append_zero(torch.exp(_even(log(sigma_max), log(sigma_min), n, device)))


def get_sigmas_polyexponential(
    n: int,
    sigma_min: Coefficient,
    sigma_max: Coefficient,
    rho: float = 1.0,
    device: Device = "cpu",
) -> Tensor:
    """Levels polynomial in log sigma, then 0; the rest as for `get_sigmas_karras`."""
    low, high = log(sigma_min), log(sigma_max)
    ramp = torch.linspace(1, 0, n, device=device) ** rho
    return append_zero(torch.exp(ramp * _at(high - low, ramp) + _at(low, ramp)))


def get_sigmas_vp(
    n: int,
    beta_d: float = 19.9,
    beta_min: float = 0.1,
    eps_s: float = 1e-3,
    device: Device = "cpu",
) -> Tensor:
    """Levels of the continuous variance-preserving process, then 0.

    ``sigma(t) = sqrt(exp(beta_d t^2/2 + beta_min t) - 1)`` at even times from 1 to eps_s: Karras et
    al. 2022, arXiv 2206.00364, table 1.
    """
    t = torch.linspace(1, eps_s, n, device=device)
    return append_zero(torch.sqrt(torch.exp(beta_d * t**2 / 2 + beta_min * t) - 1))


def to_d(x: Tensor, sigma: Tensor, denoised: Tensor) -> Tensor:
    """dx/dsigma = (x - D)/sigma, with x [B, *state] and sigma [B] or 0-d."""
    return (x - denoised) / append_dims(sigma, x.ndim)


def get_ancestral_step(
    sigma_from: Coefficient, sigma_to: Coefficient, eta: Coefficient = 1.0
) -> tuple[Coefficient, Coefficient]:
    """The level to step down to, and the amount of noise that leads back up to ``sigma_to``.

    k-diffusion's has a NaN for gradient at ``sigma_to = 0``, by the root of a 0.

    Example:
        >>> low = torch.tensor(0.0, requires_grad=True)
        >>> down, up = get_ancestral_step(torch.tensor(2.0), low)
        >>> torch.autograd.grad(down, low)[0].item(), up
        (1.0, 0.0)
    """
    down, up = ancestral_levels(sigma_from, sigma_to, eta)
    if isinstance(sigma_to, Tensor) and isinstance(down, Tensor):
        down = down.to(sigma_to)
    if isinstance(sigma_to, Tensor) and isinstance(up, Tensor):
        up = up.to(sigma_to)
    return down, 0.0 if up is None else up


def linear_multistep_coeff(order: int, t: Tensor, i: int, j: int) -> Coefficient:
    """The weight of the slope at level ``t[i - j]`` in a step of `sample_lms` from level ``t[i]``.

    The integral is exact, where k-diffusion's is a quadrature to 1e-4 of numbers without gradient.

    Args:
        order: number of slopes.
        t: [N+1] levels, a tensor or an array.
        i: the step.
        j: 0 for the slope at ``t[i]``, 1 for the one before, and so on.
    """
    if order - 1 > i:
        _checks.fail("order", f"be at most {i + 1} at step {i}", order)
    h = t[i + 1] - t[i]
    return h * adams([(t[i - k] - t[i]) / h for k in range(order)])[j]


def _even(start: Coefficient, end: Coefficient, n: int, device: Device) -> Tensor:
    if not isinstance(start, Tensor) and not isinstance(end, Tensor):
        return torch.linspace(start, end, n, device=device)
    ramp = torch.linspace(0, 1, n, device=device)
    return _at(start, ramp) + ramp * _at(end - start, ramp)


def _at(x: Coefficient, like: Tensor) -> Coefficient:
    return x.to(like) if isinstance(x, Tensor) else x


def _device(x: Coefficient) -> torch.device:
    return x.device if isinstance(x, Tensor) else torch.device("cpu")
