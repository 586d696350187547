# SPDX-License-Identifier: Apache-2.0
"""The fused ops by the native extension, or why it is not here.

The functions have the arguments of `gradsampler.ops.reference`; csrc/step_math.h has the formulas.
They allocate and never differentiate. What the extension does not know is left to the reference:
more terms than `MAX_TERMS` or none, an amount of noise for each sample, an ancestral step without
noise, and dtypes other than float64, float32, bfloat16 and float16.
"""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradsampler import _checks
from gradsampler.contract import (
    GIVEN,
    MAX_TERMS,
    OF_Z0,
    OFF,
    AncestralGrads,
    Draw,
    FlowPairGrads,
    StepGrads,
    signed,
)
from gradsampler.ops import reference
from gradsampler.ops.reference import Numbers

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # no set: hashing is slow
_module: Any = None
_raw = torch.ops.gradsampler_native


def _load() -> str | None:
    global _module
    try:
        _module = importlib.import_module("gradsampler._C")
    except ImportError as error:
        recorded = Path(__file__).parents[1] / "_native_reason.txt"
        if recorded.exists():
            return recorded.read_text(encoding="utf-8").strip()
        if isinstance(error, ModuleNotFoundError) and error.name == "gradsampler._C":
            return "gradsampler._C was not built: install with a C++ compiler present"
        return f"gradsampler._C does not load: {error}"
    return None


_reason = _load()


def available() -> str | None:
    """Why the extension cannot be used, or None if it can."""
    return _reason


def facts() -> dict[str, str]:
    """What was built and what this machine runs of it; empty without the extension."""
    return dict(_module.facts()) if _reason is None else {}


def isas() -> list[str]:
    """The instruction sets of the CPU loops that this machine runs, best first."""
    return list(_module.isas()) if _reason is None else []


def use_isa(name: str) -> None:
    """Forces the CPU loops of one instruction set, for tests."""
    _checks.choice("use_isa: name", name, isas())
    _module.use_isa(name)


def step_fwd(
    terms: Sequence[Tensor],
    coefs: Numbers,
    z0: Tensor | None = None,
    draw: Draw | None = None,
    noise_coef: float | Tensor = 0.0,
    *,
    clamp: tuple[float, float] | None = None,
    out: Tensor | None = None,  # may be a term, and z0 where nothing is rolled
    out_dtype: torch.dtype | None = None,
    model_scale: float | None = None,
    model_dtype: torch.dtype | None = None,
    model_out: Tensor | None = None,  # for the model's input
) -> Tensor | tuple[Tensor, Tensor]:
    """As `reference.step_fwd`."""
    if not _serves(terms, noise_coef, out_dtype, model_dtype):
        return reference.step_fwd(
            terms, coefs, z0, draw, noise_coef, clamp=clamp, out=out, out_dtype=out_dtype,
            model_scale=model_scale, model_dtype=model_dtype,
        )  # fmt: skip
    if out is None:
        out = _new(terms[0], out_dtype)
    model = None
    if model_scale is not None:
        model = _new(out, model_dtype) if model_out is None else model_out
    factors, tensor = _split(coefs, out)
    injected = _injected(draw, z0, noise_coef)
    _raw.step.default(
        out, model, terms, factors, tensor, *injected, clamp or (),
        1.0 if model_scale is None else model_scale,
    )  # fmt: skip
    return out if model is None else (out, model)


def step_bwd(
    g: Tensor,
    terms: Sequence[Tensor],
    coefs: Numbers,
    z0: Tensor | None = None,
    draw: Draw | None = None,
    noise_coef: float | Tensor = 0.0,
    *,
    dz0: Tensor | None = None,
    needs_terms: Sequence[bool],
    needs_coefs: bool = False,
    needs_noise_coef: bool = False,
    needs_given: bool = False,
    clamp: tuple[float, float] | None = None,
) -> StepGrads:
    """As `reference.step_bwd`."""
    if not _serves(terms or [g], noise_coef, g.dtype) or (needs_coefs and not terms):
        return reference.step_bwd(
            g, terms, coefs, z0, draw, noise_coef, dz0=dz0, needs_terms=needs_terms,
            needs_coefs=needs_coefs, needs_noise_coef=needs_noise_coef, needs_given=needs_given,
            clamp=clamp,
        )  # fmt: skip
    given, dz0 = _pulled(draw, z0, dz0)
    dgiven = None
    if needs_given and given is not None:
        dgiven = torch.zeros(g.shape, dtype=given.dtype, device=g.device)
    needs_noise_coef = needs_noise_coef and draw is not None
    if dz0 is None and dgiven is None and not needs_noise_coef:
        draw = None
    slots = [k for k, needed in enumerate(needs_terms) if needed]
    dterms = [_new(g, terms[k].dtype) for k in slots]
    read, factors, tensor = _operands(g, terms, coefs, needs_coefs or clamp is not None)
    rows = (len(g),) if tensor is not None and tensor.ndim == 2 else ()
    dcoefs = _sums(g, *rows, len(terms)) if needs_coefs else None
    dnoise = _sums(g) if needs_noise_coef else None
    injected = _injected(draw, z0, noise_coef)
    _raw.step_bwd.default(
        g, read, factors, tensor, *injected, clamp or (), dterms, slots, dcoefs, dnoise,
        dz0, dgiven,
    )  # fmt: skip
    fresh = iter(dterms)
    spread = [next(fresh) if needed else None for needed in needs_terms]
    return StepGrads(spread, dcoefs, dnoise, dgiven)


def adjoint_step(
    lams: Sequence[Tensor],
    a: Sequence[float],
    g: Tensor | None,
    g_scale: float,
    b: Sequence[float] | None,
    z0: Tensor | None = None,
    draw: Draw | None = None,
    noise_coef: float = 0.0,
    dz0: Tensor | None = None,
    *,
    mu_dtype: torch.dtype | None = None,
    lam_dtype: torch.dtype | None = None,
    lam_out: Tensor | None = None,  # may be one of lams where nothing is rolled
    mu_out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """As `reference.adjoint_step`."""
    inputs, weights = [*lams], [*a]
    if g is not None:
        inputs.append(g)
        weights.append(g_scale)
    if not _serves(inputs, noise_coef, lam_dtype, mu_dtype):
        return reference.adjoint_step(
            lams, a, g, g_scale, b, z0, draw, noise_coef, dz0, mu_dtype=mu_dtype,
            lam_dtype=lam_dtype,
        )  # fmt: skip
    dz0 = _pulled(draw, z0, dz0)[1]
    lam = _new(inputs[0], lam_dtype) if lam_out is None else lam_out
    mu = None
    if b is not None:
        mu = _new(inputs[0], mu_dtype or inputs[-1].dtype) if mu_out is None else mu_out
    injected = _injected(draw if dz0 is not None else None, z0, noise_coef)
    _raw.adjoint_step.default(lam, mu, dz0, inputs, g is not None, weights, b or (), *injected)
    return lam, mu


def leap(
    carried: Tensor,
    terms: Sequence[Tensor],
    coefs: Sequence[float],
    z0: Tensor | None = None,
    draw: Draw | None = None,
    noise_coef: float = 0.0,
    *,
    sign: int,
    scale: float,
    overflow: Tensor,
    out_dtype: torch.dtype,
    wants_state: bool = True,
    model_scale: float | None = None,
    model_dtype: torch.dtype | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """As `reference.leap`."""
    # All that the choice looks at is the same when the call is undone.
    if not _serves(terms, noise_coef, out_dtype, model_dtype):
        return reference.leap(
            carried, terms, coefs, z0, draw, noise_coef, sign=sign, scale=scale, overflow=overflow,
            out_dtype=out_dtype, wants_state=wants_state, model_scale=model_scale,
            model_dtype=model_dtype,
        )  # fmt: skip
    # In the layout of the integers, as `fixed_point` gives it: a kernel of the model may round
    # otherwise in another one.
    state = torch.empty_like(carried, dtype=out_dtype) if wants_state else None
    scales = state is not None and model_scale is not None
    model = torch.empty_like(carried, dtype=model_dtype or out_dtype) if scales else None
    floats = [*terms, z0, draw.given if draw else None]
    wide = torch.float64 in {out_dtype, *(x.dtype for x in floats if x is not None)}
    injected = _injected(draw, z0, noise_coef)
    _raw.leap.default(
        carried, state, model, overflow, terms, coefs, *injected, sign, scale,
        1.0 if model_scale is None else model_scale, wide,
    )  # fmt: skip
    return state, model


def ancestral_step_fwd(
    x: Tensor,
    model_output: Tensor,
    noise: Tensor | None,
    coefs: Numbers,
    *,
    nonzero: float | Tensor = 1.0,
    clamp: tuple[float, float] | None = None,
) -> Tensor:
    """As `reference.ancestral_step_fwd`, but where ``nonzero`` is 0 no log variance matters."""
    if noise is None or not _serves([x, model_output, noise]):
        return reference.ancestral_step_fwd(
            x, model_output, noise, coefs, nonzero=nonzero, clamp=clamp
        )
    eps, v = _parts(x, model_output)
    factors, tensor = _split(coefs, x)
    out = _new(x)
    _raw.ancestral_step.default(
        out, x, eps, v, noise, factors, tensor, _mask(nonzero, x), clamp or ()
    )
    return out


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
    """As `reference.ancestral_step_bwd`."""
    if noise is None or not _serves([g, x, model_output, noise]):
        return reference.ancestral_step_bwd(
            g, x, model_output, noise, coefs, nonzero=nonzero, clamp=clamp, needs_x=needs_x,
            needs_model_output=needs_model_output, needs_noise=needs_noise,
        )  # fmt: skip
    eps, v = _parts(x, model_output)
    factors, tensor = _split(coefs, x)
    dx = _new(x) if needs_x else None
    doutput = _new(model_output) if needs_model_output else None
    dnoise = _new(noise) if needs_noise else None
    deps, dv = (None, None) if doutput is None else _parts(x, doutput)
    _raw.ancestral_step_bwd.default(
        g, x, eps, v, noise, factors, tensor, _mask(nonzero, x), clamp or (), dx, deps, dv, dnoise
    )
    return AncestralGrads(dx, doutput, dnoise)


def flow_pair_fwd(
    x0: Tensor,
    t: Tensor,
    x1: Tensor | None = None,  # None draws the normals of `seed` at step 0
    *,
    seed: int = 0,
    sigma_min: float = 1e-5,
) -> tuple[Tensor, Tensor]:
    """As `reference.flow_pair_fwd`."""
    if x1 is not None and not _serves([x0, x1, t]):
        return reference.flow_pair_fwd(x0, t, x1, sigma_min=sigma_min)
    x_t, v = _new(x0), _new(x0)
    _raw.flow_pair.default(x_t, v, None, x0, x1, t, sigma_min, signed(seed))
    return x_t, v


def flow_pair_bwd(
    gx: Tensor | None,
    gv: Tensor | None,
    x0: Tensor,
    t: Tensor,
    x1: Tensor | None = None,
    *,
    seed: int = 0,
    sigma_min: float = 1e-5,
    needs_x0: bool = True,
    needs_x1: bool = True,
    needs_t: bool = True,
) -> FlowPairGrads:
    """As `reference.flow_pair_bwd`; noise that was drawn is drawn again."""
    if x1 is not None and not _serves([x0, x1, t]):
        return reference.flow_pair_bwd(
            gx, gv, x0, t, x1, sigma_min=sigma_min, needs_x0=needs_x0, needs_x1=needs_x1,
            needs_t=needs_t,
        )  # fmt: skip
    dx0 = _new(x0) if needs_x0 else None
    dx1 = _new(x0 if x1 is None else x1) if needs_x1 else None
    dt = _new(t) if needs_t else None
    _raw.flow_pair_bwd.default(gx, gv, x0, x1, t, sigma_min, signed(seed), dx0, dx1, dt)
    return FlowPairGrads(dx0, dx1, dt)


def _serves(
    tensors: Sequence[Tensor], amount: float | Tensor = 0.0, *dtypes: torch.dtype | None
) -> bool:
    """Whether the extension knows this case."""
    if isinstance(amount, Tensor) and amount.ndim:
        return False
    if not 0 < len(tensors) <= MAX_TERMS:
        return False
    for x in tensors:
        if x.dtype not in _DTYPES:
            return False
    return all(dtype is None or dtype in _DTYPES for dtype in dtypes)


def _new(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty contiguous tensor."""
    return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)


def _sums(g: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float64, device=g.device)


def _split(coefs: Numbers, like: Tensor) -> tuple[Sequence[float], Tensor | None]:
    """Coefficients as numbers or as a tensor, the other one empty."""
    if isinstance(coefs, Tensor):
        dtype = coefs.dtype if coefs.dtype == torch.float32 else torch.float64
        return (), coefs.to(like.device, dtype)
    return coefs, None


def _operands(
    g: Tensor, terms: Sequence[Tensor], coefs: Numbers, reads: bool
) -> tuple[Sequence[Tensor], Sequence[float], Tensor | None]:
    """Terms and coefficients of a backward; terms that are not read may have any shape."""
    if not terms:
        return [g], [0.0], None
    numbers, tensor = _split(coefs, g)
    if reads:
        return terms, numbers, tensor
    wide = any(x.dtype == torch.float64 for x in terms)
    return [g.double() if wide else g] * len(terms), numbers, tensor


def _pulled(
    draw: Draw | None, z0: Tensor | None, dz0: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The given noise, and dz0 where something is pulled back to it."""
    if draw is None:
        return None, None
    back = z0 is not None and draw.kind in OF_Z0
    return draw.given, dz0 if back else None


def _injected(
    draw: Draw | None, z0: Tensor | None, noise_coef: float | Tensor
) -> tuple[Tensor | None, float, Tensor | None, list[int], list[float]]:
    """Source, amount as a number and as a tensor, words and numbers, as the schemas have them."""
    if draw is None:
        return None, 0.0, None, [], []
    amount = noise_coef if isinstance(noise_coef, Tensor) else None
    number = 0.0 if isinstance(noise_coef, Tensor) else noise_coef
    source = draw.given if draw.kind == GIVEN else None if draw.kind == OFF else z0
    words, numbers = draw.lists
    return source, number, amount, words, numbers


def _parts(x: Tensor, model_output: Tensor) -> tuple[Tensor, Tensor | None]:
    """Epsilon and, where the channels are doubled, v: views that are read in place."""
    if model_output.shape == x.shape:
        return model_output, None
    channels = x.shape[1] if x.ndim > 1 else 0
    doubled = (*x.shape[:1], 2 * channels, *x.shape[2:])
    if tuple(model_output.shape) != doubled:
        _checks.fail(
            "ancestral_step: model_output",
            f"have shape {list(x.shape)} or {list(doubled)}",
            list(model_output.shape),
        )
    return model_output.narrow(1, 0, channels), model_output.narrow(1, channels, channels)


def _mask(nonzero: float | Tensor, x: Tensor) -> Tensor | None:
    """The factor of the noise as a tensor; None for 1. The kernels on a GPU read it in float32."""
    if not isinstance(nonzero, Tensor):
        if nonzero == 1.0:
            return None
        single = torch.tensor(nonzero, dtype=torch.float32)
        exact = single.item() == nonzero
        nonzero = single if exact else torch.tensor(nonzero, dtype=torch.float64)
    double = nonzero.dtype == torch.float64 and not x.is_cuda
    return nonzero.to(x.device, torch.float64 if double else torch.float32)
