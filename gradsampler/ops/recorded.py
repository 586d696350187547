# SPDX-License-Identifier: Apache-2.0
"""A step that autograd records, for runs that keep their graph.

Its coefficients are plain numbers, so that its gradient is the same numbers again and no operand is
kept but what the noise is made of. One node a step, without the detour by torch.library, which
costs more than the arithmetic of a small state.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradsampler import transforms
from gradsampler.contract import GIVEN, OFF, Draw
from gradsampler.ops import backends, library, reference


class Step(torch.autograd.Function):
    """``sum_k c_k x_k + s n(z0)`` by a backend."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: backends.Backend,
        factors: Sequence[float],
        draw: Draw | None,
        amount: float,
        out_dtype: torch.dtype,
        z0: Tensor | None,
        given: Tensor | None,
        *terms: Tensor,
    ) -> Tensor:
        """The state; ``given`` is the tensor of a `Draw`, which is an input of its own."""
        ctx.backend, ctx.factors, ctx.amount = backend, factors, amount
        ctx.draw = None if draw is None else draw._replace(given=None)  # autograd keeps that
        ctx.dtypes = [x.dtype for x in terms]
        ctx.save_for_backward(z0, given)
        result: Tensor = backend.step_fwd(terms, factors, z0, draw, amount, out_dtype=out_dtype)
        return result

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        """The same numbers times the cotangent, and its share of the noise."""
        _, _, _, _, _, needs_z0, needs_given, *needs = ctx.needs_input_grad
        found = zip(ctx.factors, ctx.dtypes, needs, strict=True)
        dterms = [(g * c).to(dtype) if needed else None for c, dtype, needed in found]
        dz0 = dgiven = None
        if needs_given:
            _, given = ctx.saved_tensors
            dgiven = (g * (ctx.amount * ctx.draw.weight)).to(given.dtype)
        if needs_z0:
            z0, _ = ctx.saved_tensors
            dz0 = _absorbed(ctx, g, z0)
        return None, None, None, None, None, dz0, dgiven, *dterms


def _absorbed(ctx: Any, g: Tensor, z0: Tensor) -> Tensor:
    """The cotangent of z0; by plain torch where that is differentiated again or batched."""
    if torch.is_grad_enabled() or transforms.active(g):
        compute = torch.promote_types(g.dtype, z0.dtype)
        wide = torch.promote_types(compute, torch.float32)
        with torch.enable_grad():
            n = reference.drawn(ctx.draw, z0, g, wide)
        again = torch.is_grad_enabled()
        (dz0,) = torch.autograd.grad(n, z0, (g * ctx.amount).to(wide), create_graph=again)
        return dz0
    dz0 = torch.zeros_like(z0)
    ctx.backend.step_bwd(g, [], [], z0, ctx.draw, ctx.amount, dz0=dz0, needs_terms=[])
    return dz0


def differentiable(backend: backends.Backend) -> backends.Backend:
    """The backend with a step that autograd records; plain torch is recorded as it is.

    Plain torch also serves every transform that a node of our own does not know.
    """
    if backend is backends.REFERENCE or transforms.active():
        return backends.REFERENCE

    def step_fwd(
        terms: Sequence[Tensor],
        coefs: Sequence[float | Tensor],
        z0: Tensor | None = None,
        draw: Draw | None = None,
        noise_coef: float | Tensor = 0.0,
        *,
        out_dtype: torch.dtype,
        **_: Any,
    ) -> Tensor:
        if isinstance(noise_coef, Tensor) or any(isinstance(c, Tensor) for c in coefs):
            return _learned(backend, terms, coefs, z0, draw, noise_coef, out_dtype)
        reads_z0 = draw is not None and draw.kind not in (OFF, GIVEN)
        given = None if draw is None else draw.given
        result: Tensor = Step.apply(
            backend, coefs, draw, noise_coef, out_dtype, z0 if reads_z0 else None, given, *terms
        )
        return result

    return replace(backend, step_fwd=step_fwd)


def _learned(
    backend: backends.Backend,
    terms: Sequence[Tensor],
    coefs: Sequence[float | Tensor],
    z0: Tensor | None,
    draw: Draw | None,
    noise_coef: float | Tensor,
    out_dtype: torch.dtype,
) -> Tensor:
    """The step whose numbers have gradients too, by the registered op."""
    words, numbers, given = library.lowered(draw)
    tensor = None
    if any(isinstance(c, Tensor) for c in coefs):
        device = terms[0].device
        each = [torch.as_tensor(c, dtype=torch.float64, device=device) for c in coefs]
        tensor = torch.stack(each)
    factors = [] if tensor is not None else [float(c) for c in coefs]
    amount = noise_coef if isinstance(noise_coef, Tensor) else None
    number = 0.0 if isinstance(noise_coef, Tensor) else noise_coef
    result: Tensor = library.step(
        list(terms), factors, tensor, z0, given, number, amount, words, numbers, out_dtype,
        backend.name,
    )  # fmt: skip
    return result
