# SPDX-License-Identifier: Apache-2.0
"""What all solvers share: the loop over the noise levels, and churn."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

from torch import Tensor

from gradsampler import _checks
from gradsampler.elementary import Coefficient, as_float
from gradsampler.engine.program import Affine, Program, Recorder
from gradsampler.parameterization import Parameterization, parameterize


@dataclass(frozen=True)
class Churn:
    """Stochastic churn (Karras et al. 2022, arXiv 2206.00364, algorithm 2, lines 4 to 6).

    Before a step from level s with ``s_tmin <= s <= s_tmax`` the level is raised to
    ``s * (1 + eta)``, ``eta = min(s_churn / num_steps, sqrt(2) - 1)``, by injecting noise.
    """

    s_churn: float
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: float = 1.0

    def __post_init__(self) -> None:
        _checks.finite("Churn: s_churn", self.s_churn, 0.0)
        _checks.finite("Churn: s_tmin", self.s_tmin, 0.0)
        _checks.finite("Churn: s_noise", self.s_noise, 0.0)
        if self.s_tmax != math.inf:
            _checks.finite("Churn: s_tmax", self.s_tmax)
        if not self.s_tmax >= self.s_tmin:
            _checks.fail("Churn: s_tmax", f"be at least s_tmin = {self.s_tmin}", self.s_tmax)

    def eta(self, sigma: float, num_steps: int) -> float:
        """The relative rise of the level ``sigma``, 0 outside the window."""
        if not self.s_tmin <= sigma <= self.s_tmax:
            return 0.0
        return min(self.s_churn / num_steps, math.sqrt(2) - 1)

    def raised(self, run: Recorder, sigma: Coefficient) -> tuple[Affine, Coefficient]:
        """What is added to the state, and the level after it."""
        eta = self.eta(as_float(sigma), run.num_steps)
        if eta == 0:
            return Affine(), sigma
        amount = self.s_noise * sigma * math.sqrt(eta * (2 + eta))
        return amount * run.noise(), sigma * (1 + eta)


class Solver(ABC):
    """A sampling method as a recipe for a `Program`.

    A solver computes with `Affine` expressions in place of tensors, so its file is the method as
    the paper states it, and what comes out is the table of coefficients.
    """

    stochastic: ClassVar[bool] = False  # injects noise of its own
    flow: ClassVar[bool] = False  # also defined in flow time
    monotone: ClassVar[bool] = True  # needs levels that decrease strictly
    ode_order: ClassVar[int | None] = None  # of convergence to the ODE, with eta = 0
    weak_order: ClassVar[int | None] = None  # of the moments' convergence to those of the SDE

    @abstractmethod
    def step(self, run: Recorder, x: Affine, s: Coefficient, t: Coefficient) -> Affine:
        """One step of the method.

        Args:
            run: evaluates the model with ``run.denoise(x, sigma)``, injects with ``run.noise()``.
            x: the state at level s.
            s: current level, a float or 0-d float64, positive.
            t: next level, below s where the solver is `monotone`; may be 0.

        Returns:
            The state at level t.
        """

    def program(
        self,
        sigmas: Tensor,
        denoiser: Parameterization | Callable[..., Tensor],
        *,
        prediction: str = "x0",
        churn: Churn | None = None,
        final_denoise: bool = False,
    ) -> Program:
        """The program of a whole run from ``sigmas[0] * z0``.

        An infinite ``sigmas[0]`` is noise alone, of which the first step is DDIM's for every
        solver: the sample that the model predicts, and z0 at the next level.

        Args:
            sigmas: [N+1] levels, float64 on the CPU; may require grad.
            denoiser: a `Parameterization`, or a plain callable.
            prediction: what a plain callable predicts, "x0" | "epsilon" | "v" | "flow".
            churn: raises the level before each step.
            final_denoise: one last evaluation at ``sigmas[-1]``, whose D is the result.
        """
        levels: Sequence[Coefficient] = sigmas.unbind() if sigmas.requires_grad else sigmas.tolist()
        run = Recorder(parameterize(denoiser, prediction).on(sigmas), len(levels) - 1)
        if math.isinf(as_float(levels[0])):
            noise, denoised = run.denoise(run.z0(), levels[0])
            run.predictions.clear()  # no method interpolates from infinity
            run.step, levels, x = 1, levels[1:], denoised + levels[1] * noise
        else:
            x = levels[0] * run.z0()
        x = self.steps(run, x, levels, churn or Churn(0.0))
        if final_denoise:
            run.step = run.num_steps
            _, x = run.denoise(x, levels[-1])
        return run.finish(x)

    def steps(
        self, run: Recorder, x: Affine, levels: Sequence[Coefficient], churn: Churn
    ) -> Affine:
        """All steps, from the state at the first level to that at the last."""
        for step, (s, t) in enumerate(pairwise(levels), start=run.step):
            run.step = step
            noise, s = churn.raised(run, s)
            x = self.step(run, x + noise, s, t)
        return x


class Sweep(Solver):
    """A method whose step depends on the steps around it: it overrides `steps` instead."""

    def step(self, run: Recorder, x: Affine, s: Coefficient, t: Coefficient) -> Affine:
        return self.steps(run, x, (s, t), Churn(0.0))

    @abstractmethod
    def steps(
        self, run: Recorder, x: Affine, levels: Sequence[Coefficient], churn: Churn
    ) -> Affine: ...
