# SPDX-License-Identifier: Apache-2.0
"""One call runs a sampler, and it is differentiable."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gradsampler import _checks, backends, solvers
from gradsampler import memory as memories
from gradsampler.conditioning import Conditioning
from gradsampler.memory import Memory
from gradsampler.noise import NoiseSource, Off, SignedRoll
from gradsampler.observer import Observer, StepInfo
from gradsampler.parameterization import (
    Parameterization,
    model_dtype,
    parameterize,
)
from gradsampler.program import Program
from gradsampler.solvers import Churn, Solver
from gradsampler.trajectory import Trajectory

Denoiser = Callable[..., Tensor]


def sample(
    denoiser: Parameterization | Denoiser,
    z0: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    solver: str | Solver = "euler",
    prediction: str = "x0",
    noise: NoiseSource | None = None,
    churn: Churn | None = None,
    eta: float | None = None,
    s_noise: float = 1.0,
    memory: str | Memory = "auto",
    final_denoise: bool = False,
    cond: Mapping[str, Any] | None = None,
    callback: Callable[[StepInfo], object] | None = None,
    progress: bool = False,
    state_dtype: torch.dtype | None = None,
    backend: str | None = None,
    check_finite: bool = False,
) -> Tensor:
    """Runs a sampler from the initial noise ``z0``; gradients flow back through all of it.

    They reach z0, the tensors in ``cond``, the parameters and other leaves that the denoiser uses,
    ``sigmas``, and the tensors of a `noise.Given`.

    Args:
        denoiser: callable (x [B, *state], sigma [B], **cond) -> prediction of x's shape; or a
            network wrapped in `EDM`, `VP`, `Flow` or `Guided`.
        z0: [B, *state] standard normal of a floating dtype; the state starts at sigmas[0] * z0.
        sigmas: [N+1] strictly decreasing noise levels, N >= 1, the last >= 0; with
            ``prediction="flow"`` flow times, the first <= 1. Taken to float64; may require grad.
        solver: a name of `solvers.names()`, or a `Solver`.
        prediction: what a plain callable returns: "x0" | "epsilon" | "v" | "flow".
        noise: the injected noise, a `gradsampler.noise` object. None injects nothing in a
            deterministic run and SignedRoll(seed=0) in a stochastic one.
        churn: raises the level before each step (Karras et al. 2022, algorithm 2).
        eta: amount of noise of an ancestral or SDE solver; None is the solver's own default.
        s_noise: factor of the noise of such a solver.
        memory: "auto" | "store" | "checkpoint" | "offload" | "revolve:SLOTS" | "truncated:STEPS",
            or a `gradsampler.memory` object.
        final_denoise: one last denoiser call at sigmas[-1], whose prediction is returned.
        cond: passed on to the denoiser as keyword arguments.
        callback: called after each step with a `StepInfo`.
        progress: shows a bar.
        state_dtype: dtype of the state between model calls; None keeps z0's, float32 at least. The
            model is called in the dtype that its parameters share, else in z0's.
        backend: a name of `backends.available()`, or None for the fastest present.
        check_finite: raises where a state or a gradient is not finite (reads back at each call).

    Returns:
        [B, *state] of z0's dtype.

    Raises:
        ValueError, TypeError: naming the argument that does not fit, before any model call.
        NonFiniteError: with ``check_finite``, naming the step and the level.

    Example:
        >>> import torch, gradsampler as gs
        >>> z0 = torch.zeros(2, 3, requires_grad=True)
        >>> sigmas = gs.schedules.karras(8)
        >>> x = gs.sample(lambda x, sigma: 0.5 * x, z0, sigmas, solver="heun")
        >>> x.shape, torch.autograd.grad(x.sum(), z0)[0].isfinite().all().item()
        (torch.Size([2, 3]), True)
    """
    z0 = _checks.batched("z0", z0)
    model = parameterize(denoiser, prediction)
    levels = checked_levels(sigmas, flow=prediction == "flow")
    method = solvers.resolve(solver, eta, s_noise)
    _check_solver(method, churn, flow=prediction == "flow")
    program = method.program(levels, model, churn=churn, final_denoise=final_denoise)
    return integrate(
        program,
        model,
        z0,
        noise=noise,
        memory=memory,
        cond=cond,
        callback=callback,
        progress=progress,
        state_dtype=state_dtype,
        backend=backend,
        check_finite=check_finite,
    )


def integrate(
    program: Program,
    model: Parameterization,
    z0: Tensor,
    *,
    noise: NoiseSource | None = None,
    memory: str | Memory = "auto",
    cond: Mapping[str, Any] | None = None,
    callback: Callable[[StepInfo], object] | None = None,
    progress: bool = False,
    state_dtype: torch.dtype | None = None,
    backend: str | None = None,
    check_finite: bool = False,
) -> Tensor:
    """Runs a recorded program; the arguments are those of `sample`."""
    if z0.is_inference() and not torch.is_inference_mode_enabled():
        z0 = z0.clone()  # autograd refuses to save a tensor that was made in inference mode
    source = _noise(noise, program, z0)
    if state_dtype is not None and not isinstance(state_dtype, torch.dtype):
        _checks.fail_type("state_dtype", "be a torch.dtype or None", state_dtype)
    if state_dtype is not None and not state_dtype.is_floating_point:
        _checks.fail("state_dtype", "be a floating-point dtype", str(state_dtype))
    if callback is not None and not callable(callback):
        _checks.fail_type("callback", "be callable as callback(info), or None", callback)
    state = state_dtype or torch.promote_types(z0.dtype, torch.float32)
    strategy, implementation = memories.resolve(memory), backends.choose(backend, z0.device)
    conditioning, dtype = Conditioning(cond), model_dtype(model, z0)
    with Observer(
        program, callback=callback, progress=progress, check_finite=check_finite
    ) as observer:
        trajectory = Trajectory(
            program, model, source, conditioning, implementation, state, dtype, observer
        )
        return strategy.run(trajectory, z0.to(state)).to(z0.dtype)


def checked_levels(sigmas: Tensor | Sequence[float], *, flow: bool) -> Tensor:
    """The noise levels in float64 on the CPU, checked."""
    if not isinstance(sigmas, Tensor):
        try:
            sigmas = torch.tensor(sigmas, dtype=torch.float64)
        except (TypeError, ValueError, RuntimeError):
            _checks.fail_type("sigmas", "be a tensor or a list of numbers", sigmas)
    if sigmas.is_meta or sigmas.is_complex() or sigmas.dtype == torch.bool:
        got = f"{sigmas.dtype} on {sigmas.device}"
        _checks.fail("sigmas", "be real numbers with values", got)
    levels = sigmas.to("cpu", torch.float64)
    if levels.ndim != 1 or len(levels) < 2:
        _checks.fail("sigmas", "have shape [N+1] with N >= 1 steps", list(levels.shape))
    values: list[float] = levels.tolist()
    if not bool(torch.isfinite(levels).all()):
        _checks.fail("sigmas", "be finite", values)
    for i, (s, t) in enumerate(pairwise(values)):
        if not s > t:
            _checks.fail("sigmas", "decrease strictly", f"sigmas[{i}] = {s}, sigmas[{i + 1}] = {t}")
    if values[-1] < 0:
        _checks.fail("sigmas", "be at least 0", f"sigmas[-1] = {values[-1]}")
    if flow and values[0] > 1:
        _checks.fail("sigmas", "be flow times of at most 1", f"sigmas[0] = {values[0]}")
    return levels


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
    steps = list(dict.fromkeys(injection.step for injection in program.injections))
    if noise is None:
        noise = SignedRoll(seed=0) if steps else Off()
    elif not steps and not isinstance(noise, Off):
        warnings.warn(
            f"noise={type(noise).__name__} is inert: this run injects nothing; set churn with a "
            "window that covers levels of the run, or take a stochastic solver with eta > 0",
            stacklevel=4,
        )
    return noise.prepare(z0, steps)
