# SPDX-License-Identifier: Apache-2.0
"""The ops that runs are made of, for those who write their own loop."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gradsampler import _checks, transforms
from gradsampler.contract import ANCESTRAL, SIGNED_ROLL, Draw
from gradsampler.noise import philox
from gradsampler.noise.sources import NoiseSource, draw_of
from gradsampler.ops import backends, library

__all__ = ["ancestral_step", "flow_pair", "reparameterize", "step"]


def step(
    terms: Sequence[Tensor],
    coefs: Sequence[float] | Tensor,
    z0: Tensor | None = None,
    noise: NoiseSource | None = None,
    step: int = 0,
    num_steps: int = 1,
    noise_coef: float | Tensor = 0.0,
    *,
    draw: int = 0,
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
        draw: which of the step's noises, 0 for the first.
        out: [B, *state], written in place; only where no gradient is recorded.
        out_dtype: dtype of the result; by default that of the first term.
        backend: a name of `backends.available()`, or None for the fastest present.

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
    factors, tensor = _coefficients("step", coefs, len(terms), len(first))
    amount = _amount(noise_coef, noise, len(first))
    injection = _injection(noise, z0, step, num_steps, draw, terms)
    dtype = _result_dtype(out, out_dtype, first)
    read = [x for x in (*terms, tensor, z0, amount) if isinstance(x, Tensor)]
    if injection is not None and injection.given is not None:
        read.append(injection.given)
    recorded = torch.is_grad_enabled() and any(x.requires_grad for x in read)
    if out is not None and (recorded or (torch.is_grad_enabled() and out.requires_grad)):
        _checks.fail("step: out", "be None where a gradient is recorded", "a tensor")
    if out is not None and any(map(transforms.followed, (*read, out))) and transforms.active():
        expected = "be None under torch.func, vmap and forward mode"
        _checks.fail("step: out", expected, "a tensor")
    written = out is not None and _written(out, read, injection)
    if not recorded and (out is None or written) and library.unwatched(read):
        result: Tensor = backends.choose(backend, first.device).step_fwd(
            terms,
            factors if tensor is None else tensor,
            z0,
            injection,
            amount,
            out=out,
            out_dtype=dtype,
        )
        return result if result.is_contiguous() or out is not None else result.contiguous()
    words, numbers, given = library.lowered(injection)
    arguments = (
        list(terms),
        factors,
        tensor,
        z0,
        given,
        0.0 if isinstance(amount, Tensor) else amount,
        amount if isinstance(amount, Tensor) else None,
        words,
        numbers,
    )
    if out is None:
        result = library.step(*arguments, dtype, backend or "")
        return result
    if written:
        library.step_out(*arguments, out, backend or "")
        return out
    return out.copy_(library.step(*arguments, dtype, backend or ""))


def reparameterize(
    mean: Tensor,
    log_variance: Tensor,
    noise: Tensor,
    *,
    nonzero: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``mean + nonzero * exp(log_variance / 2) * noise``: a draw with a gradient.

    Kingma and Welling 2014, arXiv 1312.6114, section 2.4. Gradients reach all tensors.

    Args:
        mean: [B, *state].
        log_variance: [B, *state], or broadcastable to it.
        noise: [B, *state] standard normal.
        nonzero: [B] factor of the noise, 0 for samples at their last step.
        backend: a name of `backends.available()`, or None for the fastest present.

    Returns:
        [B, *state] of mean's dtype, computed in float32 at least.

    Example:
        >>> import torch, gradsampler as gs
        >>> gs.ops.reparameterize(torch.ones(1, 2), torch.zeros(1, 2), torch.full((1, 2), 0.5))
        tensor([[1.5000, 1.5000]])
    """
    _checks.batched("reparameterize: mean", mean)
    _same("reparameterize: noise", noise, mean)
    _checks.device(
        "reparameterize: log_variance",
        _checks.floating("reparameterize: log_variance", log_variance),
        mean.device,
    )
    shape, target = log_variance.shape, mean.shape
    trailing = zip(reversed(shape), reversed(target), strict=False)
    if len(shape) > len(target) or any(size not in (1, whole) for size, whole in trailing):
        _checks.fail(
            "reparameterize: log_variance", f"be broadcastable to shape {[*target]}", [*shape]
        )
    _per_sample("reparameterize: nonzero", nonzero, mean)
    result: Tensor = library.reparameterize(mean, log_variance, noise, nonzero, backend or "")
    return result


def ancestral_step(
    x: Tensor,
    model_output: Tensor,
    coefs: Sequence[float] | Tensor,
    noise: Tensor | None,
    *,
    nonzero: Tensor | None = None,
    clamp: tuple[float, float] | None = None,
    backend: str | None = None,
) -> Tensor:
    """One ancestral step of a DDPM, learned variance and clamp included, as one op.

    ``x0 = clamp(r1 x - r2 eps)``, ``mean = c1 x0 + c2 x``, ``log_var = f log_max + (1-f) log_min``
    with ``f = (v+1)/2``, ``out = mean + nonzero exp(log_var/2) noise`` (Nichol and Dhariwal 2021,
    arXiv 2102.09672, equations 9 and 15). Gradients reach x, model_output and noise; where the
    clamp is active they are 0.

    Args:
        x: [B, C, *space] state.
        model_output: [B, C, *space], or [B, 2C, *space] with v behind eps. A network that predicts
            x0 is read with r1 = 0, r2 = -1.
        coefs: r1, r2, c1, c2, log_max, log_min: 6 floats, or a tensor [6] or [B, 6]. Without v the
            log variance is log_max.
        noise: [B, C, *space] standard normal, or None for none.
        nonzero: [B] factor of the noise, 0 for samples at their last step.
        clamp: (low, high) bounds of x0.
        backend: a name of `backends.available()`, or None for the fastest present.

    Returns:
        [B, C, *space] of x's dtype, computed in float32 at least.

    Example:
        >>> import torch, gradsampler as gs
        >>> x, eps = torch.full((1, 1, 2), 3.0), torch.ones(1, 1, 2)
        >>> gs.ops.ancestral_step(x, eps, [1.0, 1.0, 0.5, 0.5, 0.0, 0.0], None, clamp=(-1, 1))
        tensor([[[2., 2.]]])
    """
    _checks.batched("ancestral_step: x", x)
    _checks.floating("ancestral_step: model_output", model_output)
    _checks.device("ancestral_step: model_output", model_output, x.device)
    doubled = (x.shape[0], 2 * x.shape[1], *x.shape[2:])
    if tuple(model_output.shape) not in (tuple(x.shape), doubled):
        _checks.fail(
            "ancestral_step: model_output",
            f"have shape {list(x.shape)} or {list(doubled)}",
            list(model_output.shape),
        )
    if noise is not None:
        _same("ancestral_step: noise", noise, x)
    _per_sample("ancestral_step: nonzero", nonzero, x)
    if clamp is not None and not clamp[0] <= clamp[1]:
        _checks.fail("ancestral_step: clamp", "be (low, high) with low <= high", clamp)
    numbers, tensor = _coefficients("ancestral_step", coefs, len(ANCESTRAL), len(x))
    bounds = [] if clamp is None else [float(c) for c in clamp]
    result: Tensor = library.ancestral_step(
        x, model_output, noise, numbers, tensor, nonzero, bounds, backend or ""
    )
    return result


def flow_pair(
    x0: Tensor,
    t: Tensor,
    x1: Tensor | None = None,
    *,
    sigma_min: float = 1e-5,
    seed: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A flow-matching training pair: the noised sample, the noise, and the velocity to learn.

    ``x_t = r x0 + (1 - (1-sigma_min) r) x1`` with ``r = 1-t``, ``v = (1-sigma_min) x1 - x0``
    (Lipman et al. 2023, arXiv 2210.02747, equations 22 and 23, with time reversed). Gradients reach
    x0, t and x1.

    Args:
        x0: [B, *state] data.
        t: [B] flow times in [0, 1], 1 is noise.
        x1: [B, *state] standard normal, or None to draw it from ``seed``.
        sigma_min: standard deviation left at t = 0.
        seed: of `noise.Philox` at step 0; drawn in float32 and cast to x0's dtype.
        backend: a name of `backends.available()`, or None for the fastest present.

    Returns:
        x_t, x1 and v, each [B, *state] of x0's dtype, computed in float32 at least.

    Example:
        >>> import torch, gradsampler as gs
        >>> x_t, x1, v = gs.ops.flow_pair(torch.ones(1, 2), torch.zeros(1), seed=0, sigma_min=0.0)
        >>> x_t, bool(torch.equal(v, x1 - 1))
        (tensor([[1., 1.]]), True)
    """
    _checks.batched("flow_pair: x0", x0)
    _checks.shape("flow_pair: t", _checks.floating("flow_pair: t", t), (len(x0),))
    _checks.device("flow_pair: t", t, x0.device)
    _checks.finite("flow_pair: sigma_min", sigma_min, 0.0)
    if (x1 is None) == (seed is None):
        _checks.fail(
            "flow_pair: x1", "be given, or else seed", "both" if seed is not None else None
        )
    if x1 is None:
        drawn = _checks.integer("flow_pair: seed", seed, 0)
        x1 = philox.normals(x0.numel(), 0, drawn, x0.dtype, x0.device).view(x0.shape)
    _same("flow_pair: x1", x1, x0)
    x_t, v = library.flow_pair(x0, t, x1, sigma_min, backend or "")
    return x_t, x1, v


def _amount(noise_coef: object, noise: object, batch: int) -> float | Tensor:
    """The amount of noise, checked; without a noise it must be 0."""
    if isinstance(noise_coef, Tensor):
        _checks.floating("step: noise_coef", noise_coef)
        if tuple(noise_coef.shape) not in ((), (1,), (batch,)):
            _checks.fail("step: noise_coef", f"have shape [] or [{batch}]", [*noise_coef.shape])
        amount: float | Tensor = noise_coef
    else:
        amount = _checks.finite("step: noise_coef", noise_coef)
    if noise is None and (isinstance(amount, Tensor) or amount != 0):
        _checks.fail("step: noise", "be given where noise_coef is", None)
    return amount


def _injection(
    noise: object,
    z0: Tensor | None,
    step: int,
    num_steps: int,
    draw: int,
    terms: Sequence[Tensor],
) -> Draw | None:
    """The injection as numbers, its arguments checked."""
    if noise is None:
        return None
    if not isinstance(noise, NoiseSource):
        _checks.fail_type("step: noise", "be a gradsampler.noise object", noise)
    if z0 is None:
        _checks.fail("step: z0", "be given with noise", None)
    _same("step: z0", z0, terms[0])
    _checks.integer("step: num_steps", num_steps, 1)
    if not 0 <= _checks.integer("step: step", step, 0) < num_steps:
        _checks.fail("step: step", f"be below num_steps = {num_steps}", step)
    _checks.integer("step: draw", draw, 0)
    double = any(x.dtype == torch.float64 for x in (*terms, z0))
    dtype = torch.float64 if double else torch.float32
    injection = draw_of(noise, z0, step, num_steps, draw, dtype)
    if injection.given is not None:
        _same(f"step: noise={type(noise).__name__}: its tensor", injection.given, terms[0])
    return injection


def _written(out: Tensor, read: Sequence[Tensor], injection: Draw | None) -> bool:
    """Whether a kernel may write ``out`` itself: none of its elements is read for another one."""
    if torch.compiler.is_compiling() or not out.is_contiguous():
        return False
    rolled = injection is not None and injection.kind == SIGNED_ROLL
    whole = (out.data_ptr(), out.shape, out.stride(), out.dtype)
    return all(
        x.untyped_storage().data_ptr() != out.untyped_storage().data_ptr()
        or (not rolled and (x.data_ptr(), x.shape, x.stride(), x.dtype) == whole)
        for x in read
    )


def _result_dtype(out: object, out_dtype: object, first: Tensor) -> torch.dtype:
    if out is not None:
        _same("step: out", out, first)
    if out_dtype is None:
        return out.dtype if isinstance(out, Tensor) else first.dtype
    if not isinstance(out_dtype, torch.dtype):
        _checks.fail_type("step: out_dtype", "be a torch.dtype or None", out_dtype)
    if not out_dtype.is_floating_point:
        _checks.fail("step: out_dtype", "be a floating-point dtype", str(out_dtype))
    return out_dtype


def _same(argument: str, x: object, like: Tensor) -> None:
    """Checks that a tensor has the shape and device of another."""
    _checks.device(
        argument, _checks.shape(argument, _checks.floating(argument, x), like.shape), like.device
    )


def _per_sample(argument: str, x: Tensor | None, like: Tensor) -> None:
    if x is not None:
        _checks.device(argument, _checks.shape(argument, x, (len(like),)), like.device)


def _coefficients(
    op: str, coefs: Sequence[float] | Tensor, count: int, batch: int
) -> tuple[list[float], Tensor | None]:
    """Coefficients as floats, or as a tensor."""
    if not isinstance(coefs, Tensor):
        if not isinstance(coefs, Sequence):
            _checks.fail_type(f"{op}: coefs", "be a list of floats or a tensor", coefs)
        if len(coefs) != count:
            _checks.fail(f"{op}: coefs", f"hold {count} numbers", len(coefs))
        return [_checks.finite(f"{op}: coefs[{k}]", c) for k, c in enumerate(coefs)], None
    if tuple(_checks.floating(f"{op}: coefs", coefs).shape) not in ((count,), (batch, count)):
        _checks.fail(f"{op}: coefs", f"have shape [{count}] or [{batch}, {count}]", [*coefs.shape])
    return [], coefs
