# SPDX-License-Identifier: Apache-2.0
"""One call runs a sampler, and it is differentiable."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradsampler import _checks, arguments
from gradsampler import memory as memories
from gradsampler.arguments import Denoiser
from gradsampler.engine.observer import Observer, StepInfo
from gradsampler.engine.program import Program
from gradsampler.memory import Memory
from gradsampler.noise.sources import NoiseSource
from gradsampler.parameterization import Parameterization
from gradsampler.solvers import Churn, Solver


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
        memory: "auto" | "store" | "checkpoint" | "offload" | "revolve:SLOTS" | "reversible" |
            "truncated:STEPS", or a `gradsampler.memory` object. "auto" keeps the activations of as
            many model calls as there is room for, and makes the others again in backward.
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
    program, model = arguments.record(
        denoiser,
        sigmas,
        solver=solver,
        prediction=prediction,
        churn=churn,
        eta=eta,
        s_noise=s_noise,
        final_denoise=final_denoise,
    )
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
    if callback is not None and not callable(callback):
        _checks.fail_type("callback", "be callable as callback(info), or None", callback)
    strategy = memories.resolve(memory)
    trajectory = arguments.trajectory(
        program, model, z0, noise=noise, cond=cond, state_dtype=state_dtype, backend=backend
    )
    with Observer(
        program, callback=callback, progress=progress, check_finite=check_finite
    ) as observer:
        x = strategy.run(replace(trajectory, observer=observer), z0.to(trajectory.state_dtype))
    return x.to(z0.dtype)
