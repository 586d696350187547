# SPDX-License-Identifier: Apache-2.0
"""One call runs a sampler, and it is differentiable."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gradsampler import _checks, arguments, policies, solvers, transforms
from gradsampler import memory as memories
from gradsampler._uncompiled import uncompiled
from gradsampler.adaptation import adapted
from gradsampler.arguments import Denoiser
from gradsampler.elementary import Coefficient
from gradsampler.engine import stretches
from gradsampler.engine.monitor import Monitor
from gradsampler.engine.observer import Observer, StepInfo
from gradsampler.engine.policy import Policy
from gradsampler.engine.program import Program
from gradsampler.memory import Memory, Store
from gradsampler.noise.energy import Energy
from gradsampler.noise.sources import NoiseSource
from gradsampler.parameterization import Parameterization, parameterize
from gradsampler.solvers import Churn, Solver
from gradsampler.solvers.adaptive import Adaptive

Gradient = Policy | Sequence[Policy] | None


@uncompiled
def sample(
    denoiser: Parameterization | Denoiser,
    z0: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    solver: str | Solver = "euler",
    prediction: str = "x0",
    noise: NoiseSource | None = None,
    churn: Churn | None = None,
    eta: Coefficient | None = None,
    s_noise: Coefficient = 1.0,
    memory: str | Memory = "auto",
    gradient: Gradient = None,
    start: Tensor | None = None,
    final_denoise: bool = False,
    cond: Mapping[str, Any] | None = None,
    callback: Callable[[StepInfo], object] | None = None,
    progress: bool = False,
    state_dtype: torch.dtype | None = None,
    backend: str | None = None,
    check_finite: bool = False,
    monitor: Monitor | None = None,
    modules: Sequence[nn.Module] = (),
    compile: int | None = None,
) -> Tensor:
    """Runs a sampler from the initial noise ``z0``, with gradients through the whole run.

    Gradients reach z0, ``start``, the tensors in ``cond``, the parameters and other leaves that the
    denoiser uses, and ``sigmas``; also, if they are tensors, ``eta``, ``s_noise``, the amounts of a
    `Churn`, the scale of a `Guided`, and the numbers of a `noise.SinCos` or `noise.Given`.

    Args:
        denoiser: callable (x [B, *state], sigma [B], **cond) -> prediction of x's shape; or a
            network wrapped in `EDM`, `VP`, `Flow` or `Guided`.
        z0: [B, *state] standard normal noise of a floating dtype. The state starts at
            sigmas[0] * z0, and the default noise of later steps is computed from it. It may be a
            DTensor, cut along the batch or along the state. Then the denoiser gets DTensors,
            ``start`` and the tensors in ``cond`` have to be DTensors too, and noise and gradients
            are those of the undivided run.
        sigmas: [N+1] noise levels, N >= 1, or [N+1, B] for levels of each sample. Positive, but the
            last may be 0; decreasing for solvers that are `monotone`. With ``prediction="flow"``
            they are flow times of at most 1. For `VP` and `Flow` the first may be infinite: a start
            from noise alone, z0 itself. Converted to float64; may require grad.
        solver: a name of `solvers.names()`, or a `Solver`.
        prediction: what a plain callable returns: "x0" | "epsilon" | "v" | "flow".
        noise: the injected noise, a `gradsampler.noise` object. None injects nothing in a
            deterministic run and SignedRoll(seed=0) in a stochastic one.
        churn: raises the level before each step (Karras et al. 2022, algorithm 2).
        eta: amount of noise of an ancestral or SDE solver; None is the solver's own default. If it
            is a 0-d tensor above 0 it receives its gradient.
        s_noise: factor of the noise of such a solver; a 0-d tensor receives its gradient.
        memory: "auto" | "store" | "checkpoint" | "offload" | "revolve:SLOTS" | "reversible" |
            "truncated:STEPS", or a `gradsampler.memory` object. "auto" stores the activations of
            as many model calls as fit in memory, and recomputes the others in backward.
        gradient: a policy of `gradsampler.policies`, or a list of them, for a gradient that is not
            that of the run: `LastSteps`, `DetachedInput` and others. None is the exact gradient.
        start: [B, *state] the state at sigmas[0], for a run that does not start from noise alone:
            ``x + sigmas[0] * noise`` to purify or edit an image x. z0 is then only the source of
            the injected noise, and has to be independent of the noise in ``start``. At an infinite
            level, the state divided by the level. None is sigmas[0] * z0.
        final_denoise: makes one last denoiser call at sigmas[-1], and returns its prediction.
        cond: passed on to the denoiser as keyword arguments.
        callback: called after each step with a `StepInfo`.
        progress: shows a bar.
        state_dtype: dtype of the state between model calls; None keeps z0's, float32 at least. The
            model is called in the dtype that its parameters share, else in z0's.
        backend: a name of `backends.available()`, or None for the fastest present.
        check_finite: raises if a state or a gradient is not finite: at once on the CPU, else at the
            end of the run or of its backward, each with one copy to the host.
        monitor: a `Monitor`, which records the gradient in backward.
        modules: the nn.Modules inside a denoiser that is a plain callable such as a lambda, so that
            their dtype, buffers and generators are known.
        compile: how many steps become one compiled graph with their model calls; None compiles
            nothing. Memory strategies then store or recompute such groups of steps. A graph is used
            for all groups of the same form, also in later runs, as long as the denoiser is the same
            object; steps that are left over are not compiled. Callbacks, "reversible" and
            "truncated" are not possible with it. Results are those of a compiled denoiser, up to
            rounding.

    Returns:
        [B, *state] of z0's dtype; a DTensor with z0's placements if z0 is one.

    Raises:
        ValueError, TypeError: naming the argument that does not fit, before any model call.
        NonFiniteError: with ``check_finite``, naming the step and the level.

    Warns:
        NoiseWarning: if the injected noise is computed from a z0 that is clearly not standard
            normal.

    Example:
        >>> import torch, gradsampler as gs
        >>> z0 = torch.zeros(2, 3, requires_grad=True)
        >>> sigmas = gs.schedules.karras(8)
        >>> x = gs.sample(lambda x, sigma: 0.5 * x, z0, sigmas, solver="heun")
        >>> x.shape, torch.autograd.grad(x.sum(), z0)[0].isfinite().all().item()
        (torch.Size([2, 3]), True)
    """
    spread = _checks.distributed(z0)
    z0 = z0 if spread else _checks.batched("z0", z0)
    method = solvers.resolve(solver, eta, s_noise)
    if isinstance(method, Adaptive):
        if spread:
            hint = "give the levels that a run of plain tensors has chosen"
            _checks.fail("z0", "be a plain tensor where levels are chosen", "a DTensor", hint)
        if not memories.resolve(memory).any_program:
            way_out = "take solver='midpoint_reversible'"
            got = f"{memory!r} with {type(method).__name__}"
            _checks.fail("memory", "run every solver where levels are chosen", got, way_out)
        sigmas = adapted(
            method,
            denoiser,
            z0,
            sigmas,
            start=start,
            prediction=prediction,
            noise=noise,
            churn=churn,
            cond=cond,
            state_dtype=state_dtype,
            modules=modules,
        )
    program, model = arguments.record(
        denoiser,
        sigmas,
        solver=method,
        prediction=prediction,
        churn=churn,
        final_denoise=final_denoise,
        started=start is not None,
    )
    return integrate(
        program,
        model,
        z0,
        start=start,
        noise=noise,
        memory=memory,
        gradient=gradient,
        cond=cond,
        callback=callback,
        progress=progress,
        state_dtype=state_dtype,
        backend=backend,
        check_finite=check_finite,
        monitor=monitor,
        modules=modules,
        compile=compile,
    )


@uncompiled
def integrate(
    program: Program,
    denoiser: Parameterization | Denoiser,
    z0: Tensor,
    *,
    start: Tensor | None = None,
    noise: NoiseSource | None = None,
    memory: str | Memory = "auto",
    gradient: Gradient = None,
    cond: Mapping[str, Any] | None = None,
    callback: Callable[[StepInfo], object] | None = None,
    progress: bool = False,
    state_dtype: torch.dtype | None = None,
    backend: str | None = None,
    check_finite: bool = False,
    monitor: Monitor | None = None,
    modules: Sequence[nn.Module] = (),
    compile: int | None = None,
) -> Tensor:
    """Runs a program that `Solver.program` or a `solvers.Recorder` wrote down, differentiably.

    With it your own loop, or a solver on levels that `sample` refuses, has every memory strategy.

    Args:
        program: what to run; it holds the levels and how the network's output is read.
        denoiser: what the program was recorded with.
        z0: [B, *state] of a floating dtype.
        start: [B, *state] the first state of a program that reads it; only of such a one.
        noise, memory, gradient, cond, callback, progress, state_dtype, backend: as for `sample`.
        check_finite, monitor, modules, compile: as for it, too.

    Returns:
        [B, *state] of z0's dtype.

    Raises:
        ValueError, TypeError: naming the argument that does not fit, before any model call.
        NonFiniteError: with ``check_finite``, naming the step and the level.

    Example:
        Inversion: Heun's method up the levels, from data to the noise that it comes from.

        >>> import torch, gradsampler as gs
        >>> denoiser, data = lambda x, sigma: 0.5 * x, torch.ones(1, 3)
        >>> up = gs.schedules.karras(50, sigma_min=0.1, sigma_max=10.0).flip(0)
        >>> inversion = gs.solvers.Heun().program(up, denoiser, started=True)
        >>> noise = gs.integrate(inversion, denoiser, torch.zeros(1, 3), start=data) / up[-1]
        >>> (gs.sample(denoiser, noise, up.flip(0), solver="heun") - data).abs().max() < 1e-3
        tensor(True)
    """
    if not isinstance(program, Program):
        _checks.fail_type("program", "be recorded by a Solver or a Recorder", program)
    model = parameterize(denoiser, "x0").naming(modules)
    if callback is not None and not callable(callback):
        _checks.fail_type("callback", "be callable as callback(info), or None", callback)
    if _checks.distributed(z0):
        return _spread(
            program,
            model,
            z0,
            start=start,
            noise=noise,
            memory=memory,
            gradient=gradient,
            cond=cond,
            callback=callback,
            progress=progress,
            state_dtype=state_dtype,
            backend=backend,
            check_finite=check_finite,
            monitor=monitor,
            compile=compile,
        )
    z0 = _checks.batched("z0", z0)
    _checks.valued("z0", z0)
    start = arguments.checked_start(start, z0, program)
    z0, start = _checks.savable(z0), None if start is None else _checks.savable(start)
    strategy, policy = memories.resolve(memory), policies.resolve(gradient)
    _check_watched(strategy, policy, monitor)
    trajectory = arguments.trajectory(
        program,
        model,
        z0,
        start=start,
        noise=noise,
        cond=cond,
        state_dtype=state_dtype,
        backend=backend,
    )
    source = trajectory.noise
    energy = Energy(z0) if program.noises and source.of_z0 and source.normal else None
    state = z0.to(trajectory.state_dtype)
    if compile is not None:
        if callback is not None:
            _checks.fail("callback", "be None with compile", "one")
        if not (strategy.exact and strategy.any_program):
            _checks.fail("memory", "be a strategy for any program with compile", repr(memory))
        if trajectory.parallel:
            _checks.fail("compile", "be None where processes share the network", compile)
        if monitor is not None or not policy.exact:
            _checks.fail("compile", "be None with a gradient policy or a monitor", compile)
        trajectory = stretches.compiled(trajectory, state, compile)
    with Observer(
        trajectory.program,
        callback=callback,
        progress=progress,
        check_finite=check_finite,
        agreement=trajectory.parallel.agreement,
        monitor=monitor,
    ) as observer:
        seen = replace(trajectory, observer=observer)

        def run() -> Tensor:
            if policy.exact or not torch.is_grad_enabled():
                return strategy.run(seen, state)
            name = f"gradient={type(policy).__name__}"
            return strategy.run(policies.applied(policy, seen, state, name), state)

        x = trajectory.parallel.run(run)
    if energy is not None:
        energy.judge()
    return x.to(z0.dtype)


def _spread(
    program: Program,
    model: Parameterization,
    z0: Any,
    *,
    start: Tensor | None,
    noise: NoiseSource | None,
    gradient: Gradient,
    callback: Callable[[StepInfo], object] | None,
    monitor: Monitor | None,
    **options: Any,
) -> Tensor:
    """`integrate` from a DTensor, which each rank does for its part."""
    from gradsampler.distributed.mesh import Layout, Placed  # loaded where there are DTensors

    layout = Layout.of(z0)
    if monitor is not None:
        _checks.fail("monitor", "be None where z0 is a DTensor", type(monitor).__name__)
    policy = policies.resolve(gradient)
    if policy.reshapes and layout.cuts_states:
        got = f"{type(policy).__name__}, which may look at whole samples"
        _checks.fail("gradient", "leave cotangents as they are where a state is cut", got)
    x = integrate(
        layout.program(program),
        Placed(model, layout),
        layout.local("z0", z0),
        start=None if start is None else layout.local("start", start),
        noise=layout.noise(noise, z0, program),
        gradient=gradient,
        callback=None if callback is None else layout.callback(callback),
        **options,
    )
    return layout.whole(x)


def _check_watched(strategy: Memory, policy: Policy, monitor: object) -> None:
    """Checks what is asked of the gradient against the memory strategy."""
    name = type(strategy).__name__
    if transforms.active():  # they see neither a detached tensor nor a hook
        inexact = None if policy.exact else policy
        for argument, value in (("gradient", inexact), ("monitor", monitor)):
            if value is not None:
                expected = "be None under torch.func, vmap and forward mode"
                _checks.fail(argument, expected, type(value).__name__)
    if not policy.whole and not strategy.any_program:
        hint = "take memory='checkpoint'"
        _checks.fail("memory", "be a strategy for the last steps alone", name, hint)
    if monitor is None:
        return
    if not isinstance(monitor, Monitor):
        _checks.fail_type("monitor", "be a gradsampler.Monitor or None", monitor)
    if monitor.beside is not None and isinstance(strategy, Store):
        expected = "pull a call back twice, for a monitor with a gradient beside"
        _checks.fail("memory", expected, name, "take memory='auto' or 'checkpoint'")
