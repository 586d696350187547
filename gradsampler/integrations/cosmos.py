# SPDX-License-Identifier: Apache-2.0
"""Drop-in for the RES sampler of NVIDIA Cosmos, with the gradient to the initial noise.

It replaces Cosmos's ``imaginaire/modules/res_sampler.py``, with the same names, fields, calls and
results. docs/cosmos.md shows the line to change, docs/seed-mechanisms.md compares the noise modes.
``2ab`` makes one model evaluation a step, the other options as many as their first digit says.
``num_steps`` counts evaluations, so there are ``num_steps // order`` steps.

``2heun_naive`` takes its first slope at the predicted state, ``(x_t - D(x_s, s))/s``, where Heun's
method has ``(x_s - D(x_s, s))/s``: Cosmos does so, and the results have to be the same.
"""

import logging
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gradsampler import _checks
from gradsampler.elementary import Coefficient, as_float
from gradsampler.engine.program import Affine, Recorder
from gradsampler.integrations._res import (
    Amounts,
    Callback,
    Callbacks,
    Network,
    OpenChurn,
    X0Function,
    drawn,
)
from gradsampler.memory import Memory
from gradsampler.noise.sources import NoiseSource, Off, SinCos
from gradsampler.sampling import integrate
from gradsampler.solvers import Churn, Euler, HeunEDMx0, Kutta3, Res2Mid, Res2MidStable, Solver
from gradsampler.solvers.exponential import first_order
from gradsampler.solvers.res import second_order

__all__ = [
    "COMMON_SOLVER_OPTIONS",
    "Sampler",
    "SamplerConfig",
    "SolverConfig",
    "SolverTimestampConfig",
    "differential_equation_solver",
    "get_rev_ts",
]

COMMON_SOLVER_OPTIONS = Literal["2ab", "2mid", "1euler"]

log = logging.getLogger(__name__)


@dataclass
class SolverConfig:
    """The method and its stochasticity (Karras et al. 2022, arXiv 2206.00364, algorithm 2)."""

    is_multi: bool = False  # takes ``multistep``, else ``rk``
    rk: str = "2mid"
    multistep: str = "2ab"
    s_churn: float = 0.0  # 0 is deterministic
    s_t_max: float = math.inf  # levels with s_t_min < sigma < s_t_max are raised
    s_t_min: float = 0.05
    s_noise: float = 1.0


@dataclass
class SolverTimestampConfig:
    """The noise levels; ``is_forward`` exists for compatibility and has no effect."""

    nfe: int = 50  # model evaluations, that of ``sample_clean`` not counted
    t_min: float = 0.002
    t_max: float = 80.0
    order: float = 7.0  # rho
    is_forward: bool = False


@dataclass
class SamplerConfig:
    """A whole run. The added switches may also be set on ``solver``, even on Cosmos's own
    objects."""

    solver: SolverConfig = field(default_factory=SolverConfig)
    timestamps: SolverTimestampConfig = field(default_factory=SolverTimestampConfig)
    sample_clean: bool = True  # one last prediction at the lowest level is the result
    allow_grad: bool | None = None  # None and False record no graph
    learn_noise: bool | None = None
    learnable_step_noise: bool | None = None
    noise: NoiseSource | None = None
    memory: str | Memory | None = None


@dataclass(frozen=True)
class TwoStep(Solver):
    """``2ab``: RES whose second point is the previous step's, wherever churn has put the level.

    Where it has put it above the previous one, `solvers.Res2AB` takes Euler's step instead.
    """

    def step(self, run: Recorder, x: Affine, s: Coefficient, t: Coefficient) -> Affine:
        x, denoised = run.denoise(x, s)
        if len(run.predictions) < 2:
            return first_order(x, denoised, s, t)
        last = run.predictions[-2]
        if math.isclose(as_float(last.sigma), as_float(s), rel_tol=1e-6):
            got = f"{as_float(last.sigma)} and {as_float(s)}"
            _checks.fail("S_churn", "lead two steps to different levels", got, "change the window")
        return second_order(run, x, denoised, last.value, s, last.sigma, t)


@dataclass(frozen=True)
class HeunNaive(Solver):
    """``2heun_naive``: Heun's method but for its first slope, taken at the predicted state."""

    def step(self, run: Recorder, x: Affine, s: Coefficient, t: Coefficient) -> Affine:
        x, denoised = run.denoise(x, s)
        ahead, at_t = run.denoise(first_order(x, denoised, s, t), t)
        return x + 0.5 * (t - s) * ((ahead - denoised) / s + (ahead - at_t) / t)


_MULTISTEP: dict[str, Solver] = {"2ab": TwoStep()}
_RUNGE_KUTTA: dict[str, Solver] = {
    "1euler": Euler(),
    "2mid": Res2Mid(),
    "2mid_stable": Res2MidStable(),
    "2heun_edm": HeunEDMx0(),
    "2heun_naive": HeunNaive(),
    "3kutta_naive": Kutta3(),
}


def get_rev_ts(
    t_min: float, t_max: float, num_steps: int, ts_order: float, is_forward: bool = False
) -> Tensor:
    """Levels evenly spaced in sigma^(1/rho): Karras et al. 2022, arXiv 2206.00364, eq. 5.

    Args:
        t_min: last level, above 0.
        t_max: first level, above t_min.
        num_steps: N, at least 1.
        ts_order: rho, above 0.
        is_forward: reverses the order.

    Returns:
        [N+1] float64, from t_max to t_min.

    Raises:
        ValueError, TypeError: an argument is not as above.

    Example:
        >>> get_rev_ts(1.0, 9.0, 2, 2).tolist()
        [9.0, 4.0, 1.0]
    """
    _checks.integer("num_steps", num_steps, 1)
    for name, value in (("sigma_min (t_min)", t_min), ("rho (ts_order)", ts_order)):
        if not _checks.finite(name, value) > 0:
            _checks.fail(name, "be positive", value)
    if not _checks.finite("sigma_max (t_max)", t_max) > t_min:
        _checks.fail("sigma_max (t_max)", f"be above sigma_min (t_min) = {t_min}", t_max)
    # Not schedules.karras, which pins the ends to the bit: a churn window may begin or end at one.
    high, low = t_max ** (1 / ts_order), t_min ** (1 / ts_order)
    ramp = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    levels = (high + ramp * (low - high)) ** ts_order
    return levels.flip(0) if is_forward else levels


def differential_equation_solver(
    x0_fn: Network,
    sigmas_L: Tensor,
    solver_cfg: SolverConfig,
    callback_fns: Callbacks | None = None,
) -> Callable[[Tensor], Tensor]:
    """A run without `z0` and without the last prediction, under the current grad mode.

    Args:
        x0_fn: denoiser, called in float64.
        sigmas_L: [N+1] decreasing positive levels.
        solver_cfg: the method; the added switches of noise and memory may be set on it.
        callback_fns: as for `Sampler.forward`.

    Returns:
        A function of the state [B, *state] at ``sigmas_L[0]`` that gives the one at
        ``sigmas_L[-1]``, float64.

    Raises:
        ValueError, TypeError: an argument is not as above.

    Example:
        >>> levels = get_rev_ts(1.0, 9.0, 2, 2)
        >>> solve = differential_equation_solver(lambda x, s: 0 * x, levels, SolverConfig())
        >>> solve(torch.full((1, 1), 9.0)).round(decimals=12)
        tensor([[1.]], dtype=torch.float64)
    """
    levels = _checks.floating("sigmas_L", sigmas_L).to("cpu", torch.float64)
    values = levels.detach()
    if (
        values.ndim != 1
        or len(values) < 2
        or not bool((values > 0).all() & (values.diff() < 0).all())
    ):
        _checks.fail("sigmas_L", "hold N+1 >= 2 levels decreasing strictly, above 0", values)
    cfg = SamplerConfig(solver_cfg, sample_clean=False)

    def sample_fn(input_xT_B_StateShape: Tensor) -> Tensor:
        x = _checks.batched("input_xT_B_StateShape", input_xT_B_StateShape)
        return _solved(x0_fn, x, _anchor(x, levels), levels, cfg, callback_fns)

    return sample_fn


class Sampler(nn.Module):
    """Cosmos's sampler; ``z0`` is the initial noise of the latest run with ``allow_grad``.

    It is x_sigma_max / sigma_max, [B, *state] float64: a leaf for an optimiser, or, if the caller's
    own tensor requires grad, an intermediate tensor that keeps its gradient.

    Args:
        cfg: switches that are not given to `forward` as arguments, and the defaults of
            `_forward_impl`.
    """

    def __init__(self, cfg: SamplerConfig | None = None) -> None:
        super().__init__()
        self.cfg = SamplerConfig() if cfg is None else cfg
        self.z0: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        # The anchor belongs to a run; one that is no leaf would keep a model from being copied.
        return {**self.__dict__, "z0": None}

    def forward(
        self,
        x0_fn: Network,
        x_sigma_max: Tensor,
        num_steps: int = 35,
        sigma_min: float = 0.002,
        sigma_max: float = 80,
        rho: float = 7,
        S_churn: float = 0,
        S_min: float = 0,
        S_max: float = math.inf,
        S_noise: float = 1,
        solver_option: str = "2ab",
        *,
        allow_grad: bool | None = None,
        learn_noise: bool | None = None,
        learnable_step_noise: bool | None = None,
        noise: NoiseSource | None = None,
        memory: str | Memory | None = None,
        callback_fns: Callbacks | None = None,
    ) -> Tensor:
        """Samples from the state ``x_sigma_max``, and ends with a prediction at sigma_min.

        The arguments up to ``solver_option`` are Cosmos's; without others the run is Cosmos's, with
        no graph and with the draws of ``torch.randn_like``. Of the others, None is what the
        configuration has.

        Args:
            x0_fn: denoiser (x [B, *state], sigma [B]) -> x0 [B, *state], called in the dtype of
                x_sigma_max; the state between its calls is float64.
            x_sigma_max: [B, *state] floating, sigma_max times standard normal noise.
            num_steps: model evaluations, at least the order of the method.
            sigma_min, sigma_max, rho: see `get_rev_ts`.
            S_churn, S_min, S_max, S_noise: a level with S_min < sigma < S_max is raised by
                min(S_churn/(N+1), sqrt(1.2)-1) of it, and noise scaled by S_noise injected.
            solver_option: 2ab | 1euler | 2mid | 2mid_stable | 2heun_edm | 2heun_naive |
                3kutta_naive.
            allow_grad: records the graph, also under torch.no_grad; the numbers stay the same.
            learn_noise: injects nothing, so that z0 is the only noise. False keeps Cosmos's draws
                whatever ``learnable_step_noise`` is.
            learnable_step_noise: injects `noise.SinCos` of z0; where nothing else sets it the
                environment variable LEARNABLE_STEP_NOISE=1 does.
            noise: another `gradsampler.noise` object to inject.
            memory: as for `gradsampler.sample`; "auto" by default.
            callback_fns: called after each step with the keywords i_th, input_x_B_StateShape,
                output_x_B_StateShape, sigma_cur_0, sigma_next_0 and x0_pred_B_StateShape, the
                prediction at the input. All but i_th are float64 tensors, detached.

        Returns:
            [B, *state] of x_sigma_max's dtype.

        Raises:
            ValueError, TypeError: naming the argument that does not fit, before any model call.

        Example:
            >>> sampler, x = Sampler(), torch.full((1, 2, 2, 8, 8), 80.0)
            >>> video = sampler(lambda x, sigma: 0.7 * x + 0.1, x, 4, allow_grad=True)
            >>> video.square().mean().backward()
            >>> sampler.z0.grad.shape
            torch.Size([1, 2, 2, 8, 8])
        """
        dtype = _checks.batched("x_sigma_max", x_sigma_max).dtype
        option = _checks.choice("solver_option", solver_option, {**_MULTISTEP, **_RUNGE_KUTTA})
        multi = option in _MULTISTEP
        cfg = SamplerConfig(
            SolverConfig(multi, option, option, S_churn, S_max, S_min, S_noise),
            SolverTimestampConfig(num_steps, sigma_min, sigma_max, rho),
            allow_grad=_attribute(self.cfg, "allow_grad") if allow_grad is None else allow_grad,
            memory=_attribute(self.cfg, "memory") if memory is None else memory,
            **self._noise_switches(
                learn_noise=learn_noise, learnable_step_noise=learnable_step_noise, noise=noise
            ),
        )

        def x0_in_dtype(x: Tensor, sigma: Tensor) -> Tensor:
            return x0_fn(x.to(dtype), sigma.to(dtype))

        return self._forward_impl(x0_in_dtype, x_sigma_max, cfg, callback_fns).to(dtype)

    def _noise_switches(self, **given: Any) -> dict[str, Any]:
        """The arguments, filled up from the configuration unless they choose another noise."""
        if given["noise"] is not None:
            return given
        own = {name: _attribute(self.cfg, name) for name in given}
        if given["learn_noise"] or given["learnable_step_noise"]:
            own["noise"] = None
        return {name: own[name] if value is None else value for name, value in given.items()}

    def _forward_impl(
        self,
        denoiser_fn: Network,
        noisy_input_B_StateShape: Tensor,
        sampler_cfg: SamplerConfig | None = None,
        callback_fns: Callbacks | None = None,
    ) -> Tensor:
        """The run of a configuration, [B, *state] float64; the denoiser is called in float64."""
        cfg = self.cfg if sampler_cfg is None else sampler_cfg
        x = _checks.batched("x_sigma_max", noisy_input_B_StateShape)
        allow_grad = bool(_switch(cfg, "allow_grad"))
        if allow_grad and torch.is_inference_mode_enabled():
            _checks.fail("allow_grad", "be False under torch.inference_mode", True)
        (name, _), times = _method(cfg.solver), cfg.timestamps
        order = 1 if cfg.solver.is_multi else int(name[0])
        steps = _checks.integer(f"num_steps (nfe) of {name}", times.nfe, order) // order
        levels = get_rev_ts(times.t_min, times.t_max, steps, times.order)
        with torch.set_grad_enabled(allow_grad):
            z0 = _anchor(x, levels)
            if allow_grad:
                self.z0 = z0 if z0.requires_grad else z0.requires_grad_()
                z0.retain_grad()
            return _solved(denoiser_fn, x, z0, levels, cfg, callback_fns)


def _method(solver: SolverConfig) -> tuple[str, Solver]:
    """The method of a configuration, with its name."""
    field, known = ("multistep", _MULTISTEP) if solver.is_multi else ("rk", _RUNGE_KUTTA)
    name = _checks.choice(f"solver.{field}", getattr(solver, field), known)
    return name, known[name]


def _attribute(cfg: SamplerConfig, name: str) -> Any:
    """An added attribute of a configuration or its solver; Cosmos's own classes lack it."""
    value = getattr(cfg, name, None)
    return getattr(cfg.solver, name, None) if value is None else value


def _switch(cfg: SamplerConfig, name: str) -> bool | None:
    value = _attribute(cfg, name)
    if value is not None and not isinstance(value, bool):
        _checks.fail_type(name, "be True, False or None", value)
    return value


def _anchor(x: Tensor, levels: Tensor) -> Tensor:
    return x.to(torch.float64) / levels[0].to(x.device)


def _solved(
    denoiser_fn: Network,
    x: Tensor,  # [B, *state] the caller's, at levels[0]
    z0: Tensor,  # [B, *state] float64, x / levels[0]
    levels: Tensor,  # [N+1] float64 on the CPU
    cfg: SamplerConfig,
    callback_fns: Callbacks | None,
) -> Tensor:
    """Records the program of a run and runs it: [B, *state] float64."""
    (_, method), solver = _method(cfg.solver), cfg.solver
    noise = _chosen_noise(cfg)
    churn = OpenChurn(solver.s_churn, solver.s_t_min, solver.s_t_max, solver.s_noise, noise is None)
    model = X0Function(denoiser_fn)
    program = method.program(levels, model, churn=churn, final_denoise=cfg.sample_clean)
    amounts = {i.step: program.coefficients[i.coefficient].detach() for i in program.injections}
    if noise is None:
        noise = drawn(x.detach(), amounts) if amounts else Off()
    else:
        noise = _announced(noise, churn, amounts)
    noise = noise.prepare(z0, program.noises)  # once: callbacks ask for it as well
    if callback_fns:
        on_device = levels.detach().to(x.device)
        model.callback = Callback(callback_fns, noise, amounts, z0.detach(), on_device)
    memory, told = _attribute(cfg, "memory") or "auto", model.callback
    out = integrate(program, model, z0, noise=noise, memory=memory, callback=told)
    if told is not None:
        told.reached(out.detach())
    return out


def _chosen_noise(cfg: SamplerConfig) -> NoiseSource | None:
    """The noise in place of Cosmos's draws, None to keep those."""
    noise = _attribute(cfg, "noise")
    learn, learnable = _switch(cfg, "learn_noise"), _switch(cfg, "learnable_step_noise")
    if noise is not None:
        if not isinstance(noise, NoiseSource):
            _checks.fail_type("noise", "be a gradsampler.noise object or None", noise)
        if learn or learnable:
            _checks.fail("noise", "be None with learn_noise or learnable_step_noise", noise)
        return noise
    if learnable is None:
        value = os.environ.get("LEARNABLE_STEP_NOISE", "")
        if value not in ("", "0", "1"):
            _checks.fail("LEARNABLE_STEP_NOISE", "be 0 or 1", repr(value))
        learnable = value == "1"
    if learn is False or not (learn or learnable):
        return None
    return SinCos() if learnable else Off()


def _announced(noise: NoiseSource, churn: Churn, amounts: Amounts) -> NoiseSource:
    """Says what the noise will do in a run; one that would do nothing becomes Off."""
    if isinstance(noise, Off):
        return noise
    if not any(amounts.values()):
        warnings.warn(
            f"{type(noise).__name__} step noise is inert: this run injects nothing; set S_churn "
            "and S_noise above 0 and a window S_min < sigma < S_max that covers levels of the run, "
            f"got S_churn={churn.s_churn}, S_noise={churn.s_noise}, S_min={churn.s_tmin}, "
            f"S_max={churn.s_tmax}",
            stacklevel=2,
        )
        return Off()
    if isinstance(noise, SinCos):
        log.info("Generated %d learnable step noises from z0 (gradient-preserving)", len(amounts))
    return noise
