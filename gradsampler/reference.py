# SPDX-License-Identifier: Apache-2.0
"""The fused ops in plain torch: the definition of correct, on any device, differentiable."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsampler.noise import NoiseSource


def step(
    terms: Sequence[Tensor],  # K tensors [B, *state], each of its own dtype
    coefs: Sequence[float | Tensor],  # K numbers, each a float, 0-d or [B]
    z0: Tensor | None,  # [B, *state] standard normal
    noise: NoiseSource | None,
    index: int,  # i of n_i
    num_steps: int,  # N
    noise_coef: float | Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    """``out = sum_k coefs[k] * terms[k] + noise_coef * n_i(z0)``, computed in float32 at least."""
    compute = _compute(out_dtype, *terms, z0)
    out: Tensor | None = None
    for c, x in zip(coefs, terms, strict=True):
        term = _column(c, x, compute) * x.to(compute)
        out = term if out is None else out + term
    if noise is not None and z0 is not None:
        drawn = noise.at(z0.to(compute), index, num_steps)
        injected = _column(noise_coef, z0, compute) * drawn
        out = injected if out is None else out + injected
    assert out is not None
    return out.to(out_dtype)


def reparameterize(
    mean: Tensor,  # [B, *state]
    log_variance: Tensor,  # [B, *state], or broadcastable to it
    noise: Tensor,  # [B, *state] standard normal
    nonzero: Tensor | None,  # [B] factor of the noise, 0 at the last step
) -> Tensor:
    """``mean + nonzero * exp(log_variance / 2) * noise``."""
    compute = _compute(mean.dtype, log_variance, noise)
    amount = torch.exp(log_variance.to(compute) / 2)
    if nonzero is not None:
        amount = _column(nonzero, mean, compute) * amount
    return (mean.to(compute) + amount * noise.to(compute)).to(mean.dtype)


def ancestral_step(
    x: Tensor,  # [B, C, *space]
    model_output: Tensor,  # [B, C, *space], or [B, 2C, *space] with v behind epsilon
    coefs: Sequence[float | Tensor],  # r1, r2, c1, c2, log_max, log_min, each a float, 0-d or [B]
    noise: Tensor | None,  # [B, C, *space] standard normal
    nonzero: Tensor | None,  # [B] factor of the noise, 0 at the last step
    clamp: tuple[float, float] | None,  # bounds of x0
) -> Tensor:
    """The arithmetic of one ancestral step with a learned variance.

    ``x0 = clamp(r1 x - r2 eps)``, ``mean = c1 x0 + c2 x``,
    ``log_var = f log_max + (1-f) log_min`` with ``f = (v+1)/2``, and without v ``log_max``;
    ``out = mean + nonzero exp(log_var/2) noise`` (Nichol and Dhariwal 2021, arXiv 2102.09672,
    equations 9 and 15).
    """
    compute = _compute(x.dtype, model_output, noise)
    r1, r2, c1, c2, log_max, log_min = (_column(c, x, compute) for c in coefs)
    state, epsilon = x.to(compute), model_output[:, : x.shape[1]].to(compute)
    x0 = r1 * state - r2 * epsilon
    if clamp is not None:
        x0 = x0.clamp(*clamp)
    mean = c1 * x0 + c2 * state
    if noise is None:
        return mean.to(x.dtype)
    log_variance = torch.as_tensor(log_max, dtype=compute, device=x.device)
    if model_output.shape[1] != x.shape[1]:
        fraction = (model_output[:, x.shape[1] :].to(compute) + 1) / 2
        log_variance = fraction * log_max + (1 - fraction) * log_min
    return reparameterize(mean, log_variance, noise.to(compute), nonzero).to(x.dtype)


def flow_pair(
    x0: Tensor,  # [B, *state] data
    t: Tensor,  # [B] flow times, 1 is noise
    x1: Tensor,  # [B, *state] standard normal
    sigma_min: float,
) -> tuple[Tensor, Tensor]:
    """``x_t = r x0 + (1 - (1-sigma_min) r) x1`` with ``r = 1-t``; ``v = (1-sigma_min) x1 - x0``."""
    compute = _compute(x0.dtype, x1, t)
    r = _column(1 - t.to(compute), x0, compute)
    data, noise = x0.to(compute), x1.to(compute)
    x_t = r * data + (1 - (1 - sigma_min) * r) * noise
    return x_t.to(x0.dtype), ((1 - sigma_min) * noise - data).to(x0.dtype)


def _compute(dtype: torch.dtype, *tensors: Tensor | None) -> torch.dtype:
    """The widest of the dtypes, float32 at least."""
    for x in tensors:
        dtype = dtype if x is None else torch.promote_types(dtype, x.dtype)
    return torch.promote_types(dtype, torch.float32)


def _column(c: float | Tensor, x: Tensor, compute: torch.dtype) -> float | Tensor:
    """A coefficient so that it multiplies samples of ``x``: a float, 0-d, or [B] as a column."""
    if not isinstance(c, Tensor):
        return c
    c = c.to(x.device, compute)
    return c.view(-1, *[1] * (x.ndim - 1)) if c.ndim else c
