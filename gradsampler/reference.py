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
    compute = out_dtype
    for x in (*terms, *(() if z0 is None else (z0,))):
        compute = torch.promote_types(compute, x.dtype)
    compute = torch.promote_types(compute, torch.float32)

    def scaled(c: float | Tensor, x: Tensor) -> Tensor:
        if isinstance(c, Tensor):
            c = c.to(x.device, compute)
            c = c.view(-1, *[1] * (x.ndim - 1)) if c.ndim else c
        return c * x.to(compute)

    out: Tensor | None = None
    for c, x in zip(coefs, terms, strict=True):
        out = scaled(c, x) if out is None else out + scaled(c, x)
    if noise is not None and z0 is not None:
        injected = scaled(noise_coef, noise.at(z0.to(compute), index, num_steps))
        out = injected if out is None else out + injected
    assert out is not None
    return out.to(out_dtype)
