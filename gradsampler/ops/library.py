# SPDX-License-Identifier: Apache-2.0
"""The ops in torch.library: schema, implementation, fake and autograd of each.

An injection travels as words and numbers, the two lists of a `Draw`, both empty where nothing is
injected. Coefficients are floats (``factors``), or a tensor that may require grad. A backward that
is itself differentiated, or batched, falls back to plain torch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gradsampler import transforms
from gradsampler.contract import Draw
from gradsampler.ops import backends, reference

_LIBRARY = torch.library.Library("gradsampler", "DEF")


def _register(
    name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Defines an op that picks its backend from its last argument.

    What is returned runs the op; under torch.func, vmap and forward mode it runs plain torch, which
    they see through, for a registered op has no derivative there.
    """
    _LIBRARY.define(f"{name}{schema}")
    _LIBRARY.impl(name, run, "CPU")
    _LIBRARY.impl(name, run, "CUDA")
    torch.library.register_fake(f"gradsampler::{name}", fake, lib=_LIBRARY)
    registered: Callable[..., Any] = getattr(torch.ops.gradsampler, name).default

    def op(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or not transforms.active():
            return registered(*arguments)
        return run(*arguments[:-1], "reference")

    return op


def _backend(name: str, x: Tensor) -> backends.Backend:
    return backends.choose(name or None, x.device)


def lowered(draw: Draw | None) -> tuple[list[int], list[float], Tensor | None]:
    """An injection as arguments of an op: words, numbers and the given tensor."""
    return ([], [], None) if draw is None else (*draw.lists, draw.given)


def _raised(words: Sequence[int], numbers: Sequence[float], given: Tensor | None) -> Draw | None:
    return Draw.of(words, numbers, given) if words else None


def _contiguous(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)


def _needed(values: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    """What a backward op returns: the gradients that were asked for, contiguous, in order."""
    pairs = zip(values, needs, strict=True)
    return [x.contiguous() for x, need in pairs if need and x is not None]


def _spread(found: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients that were asked for in their places, None in the others."""
    fresh = iter(found)
    return [next(fresh) if need else None for need in needs]


def _twice(
    run: Callable[..., Any], inputs: Sequence[Tensor | None], needs: Sequence[bool], g: Any
) -> list[Tensor]:
    """The gradients that were asked for, by plain torch, so that they have gradients too."""
    again = torch.is_grad_enabled()
    fresh = [x if x is None or x.requires_grad else x.detach().requires_grad_() for x in inputs]
    wanted = [x for x, need in zip(fresh, needs, strict=True) if need and x is not None]
    with torch.enable_grad():
        result = run(fresh)
    found = torch.autograd.grad(result, wanted, g, create_graph=again, allow_unused=True)
    pairs = zip(wanted, found, strict=True)
    return [torch.zeros_like(x) if gradient is None else gradient for x, gradient in pairs]


_STEP = (
    "Tensor[] terms, float[] factors, Tensor? coefs, Tensor? z0, Tensor? given, "
    "float noise_number, Tensor? noise_coef, int[] words, float[] numbers, "
)


def _step(
    terms: list[Tensor],
    factors: list[float],
    coefs: Tensor | None,
    z0: Tensor | None,
    given: Tensor | None,
    noise_number: float,
    noise_coef: Tensor | None,
    words: list[int],
    numbers: list[float],
    out_dtype: torch.dtype,
    backend: str,
    out: Tensor | None = None,
) -> Tensor:
    result: Tensor = _backend(backend, terms[0]).step_fwd(
        terms,
        factors if coefs is None else coefs,
        z0,
        _raised(words, numbers, given),
        noise_number if noise_coef is None else noise_coef,
        out=out,
        out_dtype=out_dtype,
    )
    return result.contiguous()


def _step_out(*arguments: Any) -> None:
    *step, out, backend = arguments
    run: Callable[..., Tensor] = _step
    run(*step, out.dtype, backend, out)


def _step_out_fake(*arguments: Any) -> None:
    return None


def _step_fake(terms: list[Tensor], *arguments: Any) -> Tensor:
    return _contiguous(terms[0], arguments[-2])


def _step_backward(
    g: Tensor,
    terms: list[Tensor],
    factors: list[float],
    coefs: Tensor | None,
    z0: Tensor | None,
    given: Tensor | None,
    noise_number: float,
    noise_coef: Tensor | None,
    words: list[int],
    numbers: list[float],
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    """Gradients of terms, coefs, z0, given and noise_coef, those that ``needs`` asks for."""
    count = len(terms)
    needs_coefs, needs_z0, needs_given, needs_noise = needs[count:]
    dz0 = None if z0 is None or not needs_z0 else torch.zeros_like(z0)
    grads = _backend(backend, g).step_bwd(
        g,
        terms,
        factors if coefs is None else coefs,
        z0,
        _raised(words, numbers, given),
        noise_number if noise_coef is None else noise_coef,
        dz0=dz0,
        needs_terms=needs[:count],
        needs_coefs=needs_coefs,
        needs_noise_coef=needs_noise,
        needs_given=needs_given,
    )
    dcoefs = grads.coefs.to(coefs.dtype) if needs_coefs and coefs is not None else None
    dnoise = None
    if needs_noise and noise_coef is not None:
        dnoise = grads.noise_coef.to(noise_coef.dtype).view(noise_coef.shape)
    return _needed([*grads.terms, dcoefs, dz0, grads.given, dnoise], needs)


def _step_backward_fake(g: Tensor, terms: list[Tensor], *arguments: Any) -> list[Tensor]:
    _, coefs, z0, given, _, noise_coef, _, _, needs, _ = arguments
    shaped = [torch.empty_like(g, dtype=x.dtype) for x in terms]
    values = [*shaped, coefs, z0, given, noise_coef]
    pairs = zip(values, needs, strict=True)
    return [_contiguous(x) for x, need in pairs if need and x is not None]


def _step_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    terms, factors, coefs, z0, given, noise_number, noise_coef, words, numbers, _, backend = inputs
    # Only the gradient of the coefficients reads the terms; else their dtypes are enough.
    learned = coefs is not None and coefs.requires_grad
    kept = terms if learned else [x.new_empty(0) for x in terms]
    ctx.save_for_backward(*kept, coefs, z0, given, noise_coef)
    ctx.rest = (factors, noise_number, words, numbers, backend)


def _step_autograd(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    needs_terms, _, needs_coefs, needs_z0, needs_given, _, needs_noise, *_ = ctx.needs_input_grad
    needs = [*needs_terms, needs_coefs, needs_z0, needs_given, needs_noise]
    *terms, coefs, z0, given, noise_coef = ctx.saved_tensors
    factors, noise_number, words, numbers, backend = ctx.rest
    if torch.is_grad_enabled() or transforms.active(g):
        whole = [x if x.numel() else x.new_zeros(g.shape) for x in terms]

        def run(inputs: list[Tensor | None]) -> Tensor:
            *parts, c, z, n, s = inputs
            rest = (z, n, noise_number, s, words, numbers, g.dtype, "reference")
            return _step([x for x in parts if x is not None], factors, c, *rest)

        found = _twice(run, [*whole, coefs, z0, given, noise_coef], needs, g)
    else:
        rest = (z0, given, noise_number, noise_coef, words, numbers, needs, backend)
        found = step_backward(g, terms, factors, coefs, *rest)
    *dterms, dcoefs, dz0, dgiven, dnoise = _spread(found, needs)
    # torch.library takes an empty list for a list of tensors, and wants it back as one.
    lists: list[Any] = [None if x else [] for x in (factors, words, numbers)]
    return dterms, lists[0], dcoefs, dz0, dgiven, None, dnoise, *lists[1:], None, None


step = _register("step", f"({_STEP}ScalarType out_dtype, str backend) -> Tensor", _step, _step_fake)
step_out = _register(
    "step_out", f"({_STEP}Tensor(a!) out, str backend) -> ()", _step_out, _step_out_fake
)
step_backward = _register(
    "step_backward",
    f"(Tensor g, {_STEP}bool[] needs, str backend) -> Tensor[]",
    _step_backward,
    _step_backward_fake,
)
torch.library.register_autograd(
    "gradsampler::step", _step_autograd, setup_context=_step_setup, lib=_LIBRARY
)


_ANCESTRAL = (
    "Tensor x, Tensor model_output, Tensor? noise, float[] factors, Tensor? coefs, "
    "Tensor? nonzero, float[] clamp, "
)


def _bounds(clamp: Sequence[float]) -> tuple[float, float] | None:
    return (clamp[0], clamp[1]) if clamp else None


def _ancestral_step(
    x: Tensor,
    model_output: Tensor,
    noise: Tensor | None,
    factors: list[float],
    coefs: Tensor | None,
    nonzero: Tensor | None,
    clamp: list[float],
    backend: str,
) -> Tensor:
    result: Tensor = _backend(backend, x).ancestral_step_fwd(
        x,
        model_output,
        noise,
        factors if coefs is None else coefs,
        nonzero=1.0 if nonzero is None else nonzero,
        clamp=_bounds(clamp),
    )
    return result.contiguous()


def _ancestral_step_fake(x: Tensor, *arguments: Any) -> Tensor:
    return _contiguous(x)


def _ancestral_step_backward(
    g: Tensor,
    x: Tensor,
    model_output: Tensor,
    noise: Tensor | None,
    factors: list[float],
    coefs: Tensor | None,
    nonzero: Tensor | None,
    clamp: list[float],
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    """Gradients of x, model_output and noise, those that ``needs`` asks for."""
    grads = _backend(backend, g).ancestral_step_bwd(
        g,
        x,
        model_output,
        noise,
        factors if coefs is None else coefs,
        nonzero=1.0 if nonzero is None else nonzero,
        clamp=_bounds(clamp),
        needs_x=needs[0],
        needs_model_output=needs[1],
        needs_noise=needs[2],
    )
    return _needed(list(grads), needs)


def _ancestral_step_backward_fake(g: Tensor, *arguments: Any) -> list[Tensor]:
    pairs = zip(arguments[:3], arguments[-2], strict=True)
    return [_contiguous(x) for x, need in pairs if need and x is not None]


def _ancestral_step_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, model_output, noise, factors, coefs, nonzero, clamp, backend = inputs
    ctx.save_for_backward(x, model_output, noise, coefs, nonzero)
    ctx.rest = (factors, clamp, backend)


def _ancestral_step_autograd(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    x, model_output, noise, coefs, nonzero = ctx.saved_tensors
    factors, clamp, backend = ctx.rest
    needs = list(ctx.needs_input_grad[:3])
    if torch.is_grad_enabled() or transforms.active(g):

        def run(inputs: list[Any]) -> Tensor:
            state, output, drawn = inputs
            rest = (factors, coefs, nonzero, clamp, "reference")
            return _ancestral_step(state, output, drawn, *rest)

        found = _twice(run, [x, model_output, noise], needs, g)
    else:
        rest = (factors, coefs, nonzero, clamp, needs, backend)
        found = ancestral_step_backward(g, x, model_output, noise, *rest)
    return *_spread(found, needs), None, None, None, None, None


ancestral_step = _register(
    "ancestral_step", f"({_ANCESTRAL}str backend) -> Tensor", _ancestral_step, _ancestral_step_fake
)
ancestral_step_backward = _register(
    "ancestral_step_backward",
    f"(Tensor g, {_ANCESTRAL}bool[] needs, str backend) -> Tensor[]",
    _ancestral_step_backward,
    _ancestral_step_backward_fake,
)
torch.library.register_autograd(
    "gradsampler::ancestral_step",
    _ancestral_step_autograd,
    setup_context=_ancestral_step_setup,
    lib=_LIBRARY,
)


_DRAWN = "Tensor mean, Tensor log_variance, Tensor noise, Tensor? nonzero, "


def _reparameterize(
    mean: Tensor, log_variance: Tensor, noise: Tensor, nonzero: Tensor | None, backend: str
) -> Tensor:
    _backend(backend, mean)  # checked like any other; plain torch serves them all
    return reference.reparameterize_fwd(mean, log_variance, noise, nonzero).contiguous()


def _reparameterize_fake(mean: Tensor, *arguments: Any) -> Tensor:
    return _contiguous(mean)


def _reparameterize_backward(
    g: Tensor,
    mean: Tensor,
    log_variance: Tensor,
    noise: Tensor,
    nonzero: Tensor | None,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    """Gradients of mean, log_variance, noise and nonzero, those that ``needs`` asks for."""
    grads = reference.reparameterize_bwd(
        g,
        mean,
        log_variance,
        noise,
        nonzero,
        needs_mean=needs[0],
        needs_log_variance=needs[1],
        needs_noise=needs[2],
        needs_nonzero=needs[3],
    )
    found = _needed(list(grads), needs)
    # An op's result may be none of its arguments: the gradient of the mean can be g as it is.
    return [x.clone() if x.data_ptr() == g.data_ptr() else x for x in found]


def _reparameterize_backward_fake(g: Tensor, *arguments: Any) -> list[Tensor]:
    pairs = zip(arguments[:4], arguments[-2], strict=True)
    return [_contiguous(x) for x, need in pairs if need and x is not None]


def _reparameterize_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.backend = backend


def _reparameterize_autograd(ctx: Any, g: Tensor) -> tuple[Any, ...]:
    needs = list(ctx.needs_input_grad[:4])
    if torch.is_grad_enabled() or transforms.active(g):

        def run(inputs: list[Any]) -> Tensor:
            mean, log_variance, noise, nonzero = inputs
            return _reparameterize(mean, log_variance, noise, nonzero, "reference")

        found = _twice(run, ctx.saved_tensors, needs, g)
    else:
        found = reparameterize_backward(g, *ctx.saved_tensors, needs, ctx.backend)
    return *_spread(found, needs), None


reparameterize = _register(
    "reparameterize", f"({_DRAWN}str backend) -> Tensor", _reparameterize, _reparameterize_fake
)
reparameterize_backward = _register(
    "reparameterize_backward",
    f"(Tensor g, {_DRAWN}bool[] needs, str backend) -> Tensor[]",
    _reparameterize_backward,
    _reparameterize_backward_fake,
)
torch.library.register_autograd(
    "gradsampler::reparameterize",
    _reparameterize_autograd,
    setup_context=_reparameterize_setup,
    lib=_LIBRARY,
)


_PAIR = "Tensor x0, Tensor t, Tensor x1, float sigma_min, "


def _flow_pair(
    x0: Tensor, t: Tensor, x1: Tensor, sigma_min: float, backend: str
) -> tuple[Tensor, Tensor]:
    x_t, v = _backend(backend, x0).flow_pair_fwd(x0, t, x1, sigma_min=sigma_min)
    return x_t.contiguous(), v.contiguous()


def _flow_pair_fake(x0: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    return _contiguous(x0), _contiguous(x0)


def _flow_pair_backward(
    gx: Tensor,
    gv: Tensor,
    x0: Tensor,
    t: Tensor,
    x1: Tensor,
    sigma_min: float,
    needs: list[bool],
    backend: str,
) -> list[Tensor]:
    """Gradients of x0, t and x1, those that ``needs`` asks for."""
    grads = _backend(backend, gx).flow_pair_bwd(
        gx,
        gv,
        x0,
        t,
        x1,
        sigma_min=sigma_min,
        needs_x0=needs[0],
        needs_t=needs[1],
        needs_x1=needs[2],
    )
    dt = None if grads.t is None else grads.t.to(t.dtype)
    return _needed([grads.x0, dt, grads.x1], needs)


def _flow_pair_backward_fake(gx: Tensor, gv: Tensor, *arguments: Any) -> list[Tensor]:
    pairs = zip(arguments[:3], arguments[-2], strict=True)
    return [_contiguous(x) for x, need in pairs if need]


def _flow_pair_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x0, t, x1, sigma_min, backend = inputs
    ctx.save_for_backward(x0, t, x1)
    ctx.rest = (sigma_min, backend)


def _flow_pair_autograd(ctx: Any, gx: Tensor, gv: Tensor) -> tuple[Any, ...]:
    sigma_min, backend = ctx.rest
    needs = list(ctx.needs_input_grad[:3])
    if torch.is_grad_enabled() or transforms.active(gx) or transforms.active(gv):

        def run(inputs: list[Any]) -> tuple[Tensor, Tensor]:
            data, time, noise = inputs
            return _flow_pair(data, time, noise, sigma_min, "reference")

        found = _twice(run, ctx.saved_tensors, needs, [gx, gv])
    else:
        found = flow_pair_backward(gx, gv, *ctx.saved_tensors, sigma_min, needs, backend)
    return *_spread(found, needs), None, None


flow_pair = _register(
    "flow_pair", f"({_PAIR}str backend) -> (Tensor, Tensor)", _flow_pair, _flow_pair_fake
)
flow_pair_backward = _register(
    "flow_pair_backward",
    f"(Tensor gx, Tensor gv, {_PAIR}bool[] needs, str backend) -> Tensor[]",
    _flow_pair_backward,
    _flow_pair_backward_fake,
)
torch.library.register_autograd(
    "gradsampler::flow_pair", _flow_pair_autograd, setup_context=_flow_pair_setup, lib=_LIBRARY
)
