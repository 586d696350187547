# SPDX-License-Identifier: Apache-2.0
"""The arguments of a run, checked: as a program, and as a trajectory that only misses z0."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gradsampler import _checks, solvers, transforms
from gradsampler.elementary import Coefficient
from gradsampler.engine import parts, weights
from gradsampler.engine.conditioning import Conditioning
from gradsampler.engine.observer import Observer
from gradsampler.engine.parallel import Parallel
from gradsampler.engine.program import START, Program
from gradsampler.engine.samples import together
from gradsampler.engine.trajectory import Trajectory
from gradsampler.noise.sources import NoiseSource, Off, SignedRoll
from gradsampler.ops import backends
from gradsampler.parameterization import Parameterization, by_value, model_dtype, parameterize
from gradsampler.solvers import Churn, Solver, programs
from gradsampler.solvers.programs import Programs

Denoiser = Callable[..., Tensor]

_PROGRAMS = Programs(count=64)


def record(
    denoiser: Parameterization | Denoiser,
    sigmas: Tensor | Sequence[float],
    *,
    solver: str | Solver = "euler",
    prediction: str = "x0",
    churn: Churn | None = None,
    eta: Coefficient | None = None,
    s_noise: Coefficient = 1.0,
    final_denoise: bool = False,
    started: bool = False,
) -> tuple[Program, Parameterization]:
    """The program of a solver around a denoiser; the arguments are those of `sample`.

    With ``started`` it begins with a state that is given.
    """
    model = parameterize(denoiser, prediction)
    method = solvers.resolve(solver, eta, s_noise)
    levels = checked_levels(sigmas, flow=prediction == "flow", monotone=method.monotone)
    _check_solver(method, churn, flow=prediction == "flow")

    def program(levels: Tensor) -> Program:
        return method.program(
            levels, model, churn=churn, final_denoise=final_denoise, started=started
        )

    def recorded() -> Program:
        if levels.ndim == 1:
            return program(levels)
        return together([program(each) for each in levels.unbind(1)])

    parts = (by_value(model), programs.described(method), programs.described(churn or Churn(0.0)))
    if transforms.followed(levels) or None in parts:
        return recorded(), model
    key = (parts, levels.shape, tuple(levels.flatten().tolist()), final_denoise, started)
    return _PROGRAMS.get(key, recorded), model


def trajectory(
    program: Program,
    model: Parameterization,
    z0: Tensor,
    *,
    start: Tensor | None = None,
    noise: NoiseSource | None = None,
    cond: Mapping[str, Any] | None = None,
    state_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Trajectory:
    """All that a run from ``z0`` needs beside it; the arguments are those of `sample`.

    Nobody looks on.
    """
    conditioning = Conditioning(cond)
    seen = parts.Seen(model, conditioning)
    weights.check(model, seen, saved=z0.requires_grad)
    if program.by_sample and program.coefficients.shape[1] != len(z0):
        _checks.fail(
            "sigmas", f"have shape [N+1, {len(z0)}]", f"{program.coefficients.shape[1]} columns"
        )
    source = _noise(noise, program, z0)
    if state_dtype is not None and not isinstance(state_dtype, torch.dtype):
        _checks.fail_type("state_dtype", "be a torch.dtype or None", state_dtype)
    if state_dtype is not None and state_dtype not in _checks.FLOATING:
        _checks.fail("state_dtype", "be a floating-point dtype of 16 bits or more", state_dtype)
    widest = z0.dtype if start is None else torch.promote_types(z0.dtype, start.dtype)
    state = state_dtype or torch.promote_types(widest, torch.float32)
    chosen = backends.choose(backend, z0.device)
    if transforms.followed(program.coefficients):  # whose op knows one way alone
        chosen = replace(chosen, torch_up_to=0)
    return Trajectory(
        program,
        model,
        source,
        conditioning,
        chosen,
        state,
        model_dtype(model, z0),
        Observer(program),
        z0.device,
        Parallel.of(lambda: seen.parts.modules),
        start=None if start is None else start.to(state),
        seen=seen,
    )


def checked_start(start: object, z0: Tensor, program: Program) -> Tensor | None:
    """The state that a run starts from, checked against z0 and against the program."""
    read = START in program.readers
    if start is None:
        if read:
            hint = "it was recorded with run.start() or started=True"
            _checks.fail("start", "be given, as the program begins with it", None, hint)
        return None
    _checks.shape("start", _checks.floating("start", start), z0.shape)
    start = _checks.device("start", _checks.floating("start", start), z0.device)
    if not read:
        hint = "record it with run.start() or started=True"
        _checks.fail("start", "be None, as the program begins with z0", "a tensor", hint)
    return start


def checked_levels(
    sigmas: Tensor | Sequence[float], *, flow: bool, monotone: bool = True
) -> Tensor:
    """The noise levels in float64 on the CPU, checked."""
    if not isinstance(sigmas, Tensor):
        try:
            sigmas = torch.tensor(sigmas, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            _checks.fail_type("sigmas", "be a tensor or a list of numbers", sigmas)
    if sigmas.is_meta or sigmas.is_complex() or sigmas.dtype == torch.bool:
        got = f"{sigmas.dtype} on {sigmas.device}"
        _checks.fail("sigmas", "be real numbers with values", got)
    hint = "give sigmas [N+1, B], a schedule for each sample, or make a run of each"
    levels = _checks.unmapped("sigmas", sigmas, hint).to("cpu", torch.float64)
    if levels.ndim not in (1, 2) or len(levels) < 2 or levels.numel() == 0:
        expected = "have shape [N+1] with N >= 1 steps, or [N+1, B]"
        _checks.fail("sigmas", expected, list(levels.shape))
    for b, each in enumerate(levels.detach().unbind(1) if levels.ndim == 2 else [levels]):
        name = "sigmas" if levels.ndim == 1 else f"sigmas[:, {b}]"
        _check_levels(name, each.tolist(), flow=flow, monotone=monotone)
    return levels


def _check_levels(name: str, values: list[float], *, flow: bool, monotone: bool) -> None:
    if not all(map(math.isfinite, values[1:])) or not values[0] > -math.inf:
        _checks.fail(name, "be finite, but for an infinite first one", values)
    for i, (s, t) in enumerate(pairwise(values)):
        if monotone and not s > t:
            _checks.fail(name, "decrease strictly", f"sigmas[{i}] = {s}, sigmas[{i + 1}] = {t}")
        if not s > 0:
            _checks.fail(name, "be positive up to the last", f"sigmas[{i}] = {s}")
    if values[-1] < 0:
        _checks.fail(name, "be at least 0", f"sigmas[-1] = {values[-1]}")
    if flow and max(values) > 1:
        _checks.fail(name, "be flow times of at most 1", f"a time of {max(values)}")


def _check_solver(solver: Solver, churn: Churn | None, *, flow: bool) -> None:
    if churn is not None and not isinstance(churn, Churn):
        _checks.fail_type("churn", "be a gradsampler.Churn or None", churn)
    name = type(solver).__name__
    if churn is not None and (flow or solver.stochastic):
        why = "flow time" if flow else f"{name}, which injects noise of its own"
        _checks.fail("churn", f"be None with {why}", churn)
    if flow and not solver.flow:
        known = ", ".join(solvers.names(flow=True))
        _checks.fail("solver", f"be defined in flow time ({known})", name)


def _noise(noise: NoiseSource | None, program: Program, z0: Tensor) -> NoiseSource:
    """The noise source of the run, checked against its injections."""
    if noise is not None and not isinstance(noise, NoiseSource):
        _checks.fail_type("noise", "be a gradsampler.noise object or None", noise)
    injected = program.noises
    if noise is None:
        noise = SignedRoll(seed=0) if injected else Off()
    elif not injected and not isinstance(noise, Off):
        warnings.warn(
            f"noise={type(noise).__name__} is inert: this run injects nothing; set churn with a "
            "window that covers levels of the run, or take a stochastic solver with eta > 0",
            stacklevel=_checks.callers(),
        )
    return noise.prepare(z0, injected)
