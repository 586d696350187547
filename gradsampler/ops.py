# SPDX-License-Identifier: Apache-2.0
"""The ops that runs are made of, for those who write their own loop."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsampler import _checks, backends
from gradsampler.noise import NoiseSource

__all__ = ["step"]


def step(
    terms: Sequence[Tensor],
    coefs: Sequence[float] | Tensor,
    z0: Tensor | None = None,
    noise: NoiseSource | None = None,
    step: int = 0,
    num_steps: int = 1,
    noise_coef: float | Tensor = 0.0,
    *,
    out: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """``sum_k coefs[k] * terms[k] + noise_coef * n_step(z0)``: one stage of any sampler.

    Gradients reach terms, coefs, z0, noise_coef and the tensors of a `noise.Given`.

    Args:
        terms: K >= 1 tensors [B, *state] on one device, each of its own floating dtype.
        coefs: K floats, or a tensor [K], or [B, K] for coefficients of each sample.
        z0: [B, *state] initial noise; needed with ``noise``.
        noise: a `gradsampler.noise` object, or None for none.
        step: absolute step index i of the noise, 0 <= step < num_steps.
        num_steps: N.
        noise_coef: amount of noise, a float or a 0-d tensor.
        out: [B, *state], written in place; only where no gradient is recorded.
        out_dtype: dtype of the result; by default that of the first term.
        backend: "reference", or None for the fastest present.

    Returns:
        [B, *state] of ``out_dtype``, computed in float32 at least.

    Raises:
        ValueError, TypeError: naming the argument that does not fit.

    Example:
        >>> import torch, gradsampler as gs
        >>> x, denoised = torch.full((1, 2), 4.0), torch.zeros(1, 2)
        >>> gs.ops.step([x, denoised], [0.5, 0.5])  # Euler's step to half the level
        tensor([[2., 2.]])
    """
    if isinstance(terms, Tensor) or not isinstance(terms, Sequence) or not terms:
        _checks.fail_type("step: terms", "be a non-empty list of tensors", terms)
    first = _checks.batched("step: terms[0]", terms[0])
    for k, x in enumerate(terms):
        _checks.floating(f"step: terms[{k}]", x)
        _checks.shape(f"step: terms[{k}]", x, first.shape)
        _checks.device(f"step: terms[{k}]", x, first.device)
    numbers = _coefficients(coefs, len(terms), len(first))
    if noise is not None:
        if not isinstance(noise, NoiseSource):
            _checks.fail_type("step: noise", "be a gradsampler.noise object", noise)
        if z0 is None:
            _checks.fail("step: z0", "be given with noise", None)
        _checks.shape("step: z0", _checks.floating("step: z0", z0), first.shape)
        _checks.device("step: z0", z0, first.device)
        _checks.integer("step: num_steps", num_steps, 1)
        if not 0 <= _checks.integer("step: step", step, 0) < num_steps:
            _checks.fail("step: step", f"be below num_steps = {num_steps}", step)
        noise.prepare(z0, [step])
    dtype = out_dtype or (first.dtype if out is None else out.dtype)
    result = backends.choose(backend).step(
        terms, numbers, z0, noise, step, num_steps, noise_coef, dtype
    )
    if out is None:
        return result
    if result.requires_grad:
        _checks.fail("step: out", "be None where a gradient is recorded", "a tensor")
    return _checks.shape("step: out", out, first.shape).copy_(result)


def _coefficients(
    coefs: Sequence[float] | Tensor, count: int, batch: int
) -> Sequence[float] | Sequence[Tensor]:
    if not isinstance(coefs, Tensor):
        if len(coefs) != count:
            _checks.fail("step: coefs", f"hold one number for each of {count} terms", len(coefs))
        return [_checks.finite(f"step: coefs[{k}]", c) for k, c in enumerate(coefs)]
    if tuple(_checks.floating("step: coefs", coefs).shape) not in ((count,), (batch, count)):
        _checks.fail("step: coefs", f"have shape [{count}] or [{batch}, {count}]", [*coefs.shape])
    return coefs.unbind(-1)
