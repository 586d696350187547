# SPDX-License-Identifier: Apache-2.0
"""The fused ops in plain torch: the definition of correct, on any device.

Every backend offers these functions with these arguments. Arithmetic is in float32, and in float64
where a tensor is; results are rounded once.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsampler.contract import (
    GIVEN,
    OF_Z0,
    SIGNED_ROLL,
    SINCOS,
    AncestralGrads,
    Draw,
    FlowPairGrads,
    ReparameterizeGrads,
    StepGrads,
)
from gradsampler.noise import philox
from gradsampler.noise.sources import signed_roll, signed_roll_transpose

Numbers = Sequence[float] | Tensor  # K floats, or a tensor [K] or [B, K]


def step_fwd(
    terms: Sequence[Tensor],  # K tensors [B, *state], each of its own dtype
    coefs: Numbers,
    z0: Tensor | None = None,  # [B, *state] standard normal
    draw: Draw | None = None,
    noise_coef: float | Tensor = 0.0,  # a float, 0-d or [B]
    *,
    clamp: tuple[float, float] | None = None,  # bounds of the combination, before the noise
    out: Tensor | None = None,  # [B, *state] to write into
    out_dtype: torch.dtype | None = None,  # by default that of the first term
    model_scale: float | None = None,  # asks for model_scale * result as a second output
    model_dtype: torch.dtype | None = None,  # of the second output
) -> Tensor | tuple[Tensor, Tensor]:
    """``clamp(sum_k coefs[k] * terms[k]) + noise_coef * n(z0)``."""
    like = terms[0] if terms else z0
    assert like is not None
    dtype = out.dtype if out is not None else out_dtype or like.dtype
    compute = _compute(dtype, *terms, z0, draw and draw.given)
    total = torch.zeros_like(like, dtype=compute) if not terms else None
    for c, x in zip(_each(coefs), terms, strict=True):
        term = _column(c, x, compute) * x.to(compute)
        total = term if total is None else total + term
    assert total is not None
    if clamp is not None:
        total = total.clamp(*clamp)
    if draw is not None:
        total = total + _column(noise_coef, like, compute) * drawn(draw, z0, like, compute)
    result = total.to(dtype) if out is None else out.copy_(total)
    if model_scale is None:
        return result
    return result, (model_scale * total).to(model_dtype or dtype)


def leap(
    carried: Tensor,  # [B, *state] int32 or int64, changed in place
    terms: Sequence[Tensor],  # K tensors [B, *state], each of its own dtype
    coefs: Sequence[float],
    z0: Tensor | None = None,
    draw: Draw | None = None,
    noise_coef: float = 0.0,
    *,
    sign: int,  # 1 goes forward, -1 undoes it to the bit
    scale: float,  # of the state: what a unit of ``carried`` stands for afterwards
    overflow: Tensor,  # [1] int32, set to 1 where a number leaves the range
    out_dtype: torch.dtype,
    wants_state: bool = True,
    model_scale: float | None = None,
    model_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """``carried += sign * round(sum_k coefs[k] * terms[k] + noise_coef * n(z0))``.

    Gives the state ``scale * carried``, and with ``model_scale`` that times ``model_scale``. The
    range ends a bit before the integers', so that a sum of two within it does not wrap.
    """
    compute = _compute(out_dtype, *terms, z0, draw and draw.given)
    change = step_fwd(terms, coefs, z0, draw, noise_coef, out_dtype=compute)
    assert isinstance(change, Tensor)
    limit = 2 ** (8 * carried.element_size() - 2)
    outside = ~(change.abs() <= limit)  # NaN is outside as well
    carried += sign * change.round().masked_fill(outside, 0).to(carried.dtype)
    overflow |= (outside | (carried > limit) | (carried < -limit)).any()
    if not wants_state:
        return None, None
    return fixed_point(carried, scale, out_dtype, model_scale, model_dtype)


def fixed_point(
    integers: Tensor,  # [B, *state] int32 or int64
    scale: float,
    out_dtype: torch.dtype,
    model_scale: float | None = None,
    model_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The state that the integers hold, and with ``model_scale`` the model's input.

    Every backend's `leap` gives these very bits.
    """
    compute = _compute(out_dtype)
    x = integers.to(compute).mul_(scale).to(out_dtype)
    if model_scale is None:
        return x, None
    return x, (x.to(compute) * model_scale).to(model_dtype or out_dtype)


def step_bwd(
    g: Tensor,  # [B, *state] cotangent of the result
    terms: Sequence[Tensor],  # only dtypes matter without needs_coefs and clamp
    coefs: Numbers,
    z0: Tensor | None = None,
    draw: Draw | None = None,
    noise_coef: float | Tensor = 0.0,
    *,
    dz0: Tensor | None = None,  # [B, *state] buffer that the cotangent of z0 is added to
    needs_terms: Sequence[bool],
    needs_coefs: bool = False,
    needs_noise_coef: bool = False,
    needs_given: bool = False,
    clamp: tuple[float, float] | None = None,
) -> StepGrads:
    """The transpose of `step_fwd`."""
    compute = _compute(g.dtype, *terms, z0, draw and draw.given)
    wide = inner = g.to(compute)
    if clamp is not None:
        free = step_fwd(terms, coefs, out_dtype=compute)
        assert isinstance(free, Tensor)
        inner = torch.where((free >= clamp[0]) & (free <= clamp[1]), wide, 0.0)
    dterms = [
        (_column(c, g, compute) * inner).to(x.dtype) if need else None
        for c, x, need in zip(_each(coefs), terms, needs_terms, strict=True)
    ]
    dcoefs = dnoise = dgiven = None
    if needs_coefs:
        per_sample = isinstance(coefs, Tensor) and coefs.ndim == 2
        dcoefs = torch.stack([_inner(x, inner, per_sample) for x in terms], dim=-1)
    if draw is not None:
        pulled = _column(noise_coef, g, compute) * wide
        if needs_noise_coef:
            per_sample = isinstance(noise_coef, Tensor) and noise_coef.ndim > 0
            dnoise = _inner(drawn(draw, z0, g, compute), wide, per_sample)
        if needs_given and draw.given is not None:
            dgiven = (draw.weight * pulled).to(draw.given.dtype)
        if dz0 is not None and z0 is not None:
            absorb(pulled, z0.to(compute), draw, dz0)
    return StepGrads(dterms, dcoefs, dnoise, dgiven)


def adjoint_step(
    lams: Sequence[Tensor],  # 0 to 5 cotangents [B, *state]
    a: Sequence[float],
    g: Tensor | None,  # [B, *state] what the model returned for its input
    g_scale: float,  # what that input was scaled by
    b: Sequence[float] | None,  # one more than lams; None asks for no mu
    z0: Tensor | None = None,
    draw: Draw | None = None,
    noise_coef: float = 0.0,
    dz0: Tensor | None = None,  # [B, *state] buffer that the cotangent of z0 is added to
    *,
    mu_dtype: torch.dtype | None = None,
    lam_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One model call's share of a transposed program.

    ``lam = sum_k a[k] lams[k] + g_scale g``, ``mu = sum_k b[k] lams[k] + b[K] lam``, and dz0 takes
    what passes through the noise: ``dz0 += noise_coef n'(z0)^T lam``.
    """
    inputs, numbers = (
        [*lams, *(() if g is None else (g,))],
        [*a, *(() if g is None else (g_scale,))],
    )
    compute = _compute(lam_dtype or inputs[0].dtype, *inputs)
    lam = step_fwd(inputs, numbers, out_dtype=compute)
    assert isinstance(lam, Tensor)
    mu = None
    if b is not None:
        total = step_fwd([*lams, lam], b, out_dtype=mu_dtype or inputs[-1].dtype)
        assert isinstance(total, Tensor)
        mu = total
    if draw is not None and dz0 is not None and z0 is not None:
        absorb(noise_coef * lam, z0.to(compute), draw, dz0)
    return lam.to(lam_dtype or inputs[0].dtype), mu


def drawn(draw: Draw, z0: Tensor | None, like: Tensor, compute: torch.dtype) -> Tensor:
    """The noise that ``draw`` describes, of the shape of ``like``."""
    n = torch.zeros((), dtype=compute, device=like.device)
    if draw.kind == GIVEN:
        assert draw.given is not None
        n = draw.weight * draw.given.to(compute)
    elif draw.kind in OF_Z0:
        assert z0 is not None
        z = z0.to(compute)
        if draw.kind == SINCOS:
            f = draw.gain * z + draw.amplitude * torch.sin(draw.rate * z + draw.phase)
        else:
            f = signed_roll(z, draw.seed, draw.step, draw.offset)
        n = draw.weight * f
    if draw.normal:
        normals = philox.normals(like.numel(), draw.step, draw.normal_seed, compute, like.device)
        n = n + draw.normal * normals.view(like.shape)
    return n.expand(like.shape)


def absorb(g: Tensor, z0: Tensor, draw: Draw, dz0: Tensor) -> None:
    """Adds the cotangent ``g`` of the noise, pulled back to z0, to ``dz0``."""
    if draw.kind == SINCOS:
        wave = draw.rate * draw.amplitude * torch.cos(draw.rate * z0 + draw.phase)
        dz0.add_((draw.weight * (draw.gain + wave) * g).to(dz0.dtype))
    elif draw.kind == SIGNED_ROLL:
        back = signed_roll_transpose(g, draw.seed, draw.step, draw.offset)
        dz0.add_((draw.weight * back).to(dz0.dtype))


def reparameterize_fwd(
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


def reparameterize_bwd(
    g: Tensor,
    mean: Tensor,
    log_variance: Tensor,
    noise: Tensor,
    nonzero: Tensor | None,
    *,
    needs_mean: bool = True,
    needs_log_variance: bool = True,
    needs_noise: bool = True,
    needs_nonzero: bool = False,
) -> ReparameterizeGrads:
    """The transpose of `reparameterize_fwd`."""
    compute = _compute(mean.dtype, log_variance, noise)
    wide = g.to(compute)
    deviation = torch.exp(log_variance.to(compute) / 2)
    amount = deviation if nonzero is None else _column(nonzero, mean, compute) * deviation
    dmean = wide.to(mean.dtype) if needs_mean else None
    dlog = dnoise = dnonzero = None
    if needs_log_variance:
        whole = wide * amount * noise.to(compute) / 2
        dlog = whole.sum_to_size(log_variance.shape).to(log_variance.dtype)
    if needs_noise:
        dnoise = (amount * wide).to(noise.dtype)
    if needs_nonzero and nonzero is not None:
        dnonzero = _inner((deviation * noise.to(compute)).expand_as(g), wide, True)
        dnonzero = dnonzero.to(nonzero.dtype)
    return ReparameterizeGrads(dmean, dlog, dnoise, dnonzero)


def ancestral_step_fwd(
    x: Tensor,  # [B, C, *space]
    model_output: Tensor,  # [B, C, *space], or [B, 2C, *space] with v behind epsilon
    noise: Tensor | None,  # [B, C, *space] standard normal
    coefs: Numbers,  # r1, r2, c1, c2, log_max, log_min
    *,
    nonzero: float | Tensor = 1.0,  # factor of the noise, 0 at the last step: a number or [B]
    clamp: tuple[float, float] | None = None,  # bounds of x0
) -> Tensor:
    """``x0 = clamp(r1 x - r2 eps)``, ``out = c1 x0 + c2 x + nonzero exp(log_var/2) noise``.

    ``log_var = f log_max + (1-f) log_min`` with ``f = (v+1)/2``, and without v ``log_max``.
    """
    compute = _compute(x.dtype, model_output, noise)
    r1, r2, c1, c2, _, _ = (_column(c, x, compute) for c in _each(coefs))
    state, epsilon = x.to(compute), model_output[:, : x.shape[1]].to(compute)
    x0 = r1 * state - r2 * epsilon
    if clamp is not None:
        x0 = x0.clamp(*clamp)
    mean = c1 * x0 + c2 * state
    if noise is None:
        return mean.to(x.dtype)
    amount = _column(nonzero, x, compute) * _deviation(x, model_output, coefs, compute)
    return (mean + amount * noise.to(compute)).to(x.dtype)


def ancestral_step_bwd(
    g: Tensor,
    x: Tensor,
    model_output: Tensor,
    noise: Tensor | None,
    coefs: Numbers,
    *,
    nonzero: float | Tensor = 1.0,
    clamp: tuple[float, float] | None = None,
    needs_x: bool = True,
    needs_model_output: bool = True,
    needs_noise: bool = True,
) -> AncestralGrads:
    """The transpose of `ancestral_step_fwd`."""
    compute = _compute(g.dtype, x, model_output, noise)
    r1, r2, c1, c2, log_max, log_min = (_column(c, x, compute) for c in _each(coefs))
    wide = g.to(compute)
    inner = c1 * wide
    if clamp is not None:
        x0 = r1 * x.to(compute) - r2 * model_output[:, : x.shape[1]].to(compute)
        inner = torch.where((x0 >= clamp[0]) & (x0 <= clamp[1]), inner, 0.0)
    dx = (r1 * inner + c2 * wide).to(x.dtype) if needs_x else None
    amount = _column(nonzero, x, compute) * _deviation(x, model_output, coefs, compute)
    dnoise = (amount * wide).to(noise.dtype) if needs_noise and noise is not None else None
    doutput = None
    if needs_model_output:
        parts = [-r2 * inner]
        if model_output.shape[1] != x.shape[1]:
            # d out / d v = amount * noise * (log_max - log_min) / 4
            slope = 0.0 if noise is None else amount * noise.to(compute) * (log_max - log_min) / 4
            parts.append((wide * slope).expand(x.shape))
        doutput = torch.cat(parts, dim=1).to(model_output.dtype)
    return AncestralGrads(dx, doutput, dnoise)


def _deviation(x: Tensor, model_output: Tensor, coefs: Numbers, compute: torch.dtype) -> Tensor:
    """exp(log_var / 2), broadcastable to the shape of x."""
    log_max, log_min = (_column(c, x, compute) for c in _each(coefs)[4:])
    if model_output.shape[1] == x.shape[1]:
        return torch.exp(torch.as_tensor(log_max, dtype=compute, device=x.device) / 2)
    fraction = (model_output[:, x.shape[1] :].to(compute) + 1) / 2
    return torch.exp((fraction * log_max + (1 - fraction) * log_min) / 2)


def flow_pair_fwd(
    x0: Tensor,  # [B, *state] data
    t: Tensor,  # [B] flow times, 1 is noise
    x1: Tensor,  # [B, *state] standard normal
    *,
    sigma_min: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """``x_t = r x0 + (1 - (1-sigma_min) r) x1`` with ``r = 1-t``; ``v = (1-sigma_min) x1 - x0``."""
    compute = _compute(x0.dtype, x1)
    r = _column(1 - t.to(compute), x0, compute)
    data, noise = x0.to(compute), x1.to(compute)
    x_t = r * data + (1 - (1 - sigma_min) * r) * noise
    return x_t.to(x0.dtype), ((1 - sigma_min) * noise - data).to(x0.dtype)


def flow_pair_bwd(
    gx: Tensor | None,
    gv: Tensor | None,
    x0: Tensor,
    t: Tensor,
    x1: Tensor,
    *,
    sigma_min: float = 1e-5,
    needs_x0: bool = True,
    needs_x1: bool = True,
    needs_t: bool = True,
) -> FlowPairGrads:
    """The transpose of `flow_pair_fwd`; a cotangent of None is zero."""
    compute = _compute(x0.dtype, x1, gx, gv)
    r = _column(1 - t.to(compute), x0, compute)
    wide_x = torch.zeros_like(x0, dtype=compute) if gx is None else gx.to(compute)
    wide_v = torch.zeros_like(x0, dtype=compute) if gv is None else gv.to(compute)
    keep = 1 - sigma_min
    dx0 = (r * wide_x - wide_v).to(x0.dtype) if needs_x0 else None
    dx1 = ((1 - keep * r) * wide_x + keep * wide_v).to(x1.dtype) if needs_x1 else None
    dt = None
    if needs_t:
        dt = _inner(keep * x1.to(compute) - x0.to(compute), wide_x, True).to(t.dtype)
    return FlowPairGrads(dx0, dx1, dt)


def _inner(x: Tensor, g: Tensor, per_sample: bool) -> Tensor:
    """<x, g> in float64, of all samples or of each."""
    product = (x.to(g.dtype) * g).flatten(1) if per_sample else x.to(g.dtype) * g
    return product.sum(1, dtype=torch.float64) if per_sample else product.sum(dtype=torch.float64)


def _compute(dtype: torch.dtype, *tensors: Tensor | None) -> torch.dtype:
    """float64 if the dtype or a tensor is, else float32."""
    dtypes = {dtype, *(x.dtype for x in tensors if x is not None)}
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _each(coefs: Numbers) -> Sequence[float | Tensor]:
    return list(coefs.unbind(-1)) if isinstance(coefs, Tensor) else coefs


def _column(c: float | Tensor, x: Tensor, compute: torch.dtype) -> float | Tensor:
    """A coefficient so that it multiplies samples of ``x``: a float, 0-d, or [B] as a column."""
    if not isinstance(c, Tensor):
        return c
    c = c.to(x.device, compute)
    return c.view(-1, *[1] * (x.ndim - 1)) if c.ndim else c
