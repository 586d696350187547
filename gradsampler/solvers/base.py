# SPDX-License-Identifier: Apache-2.0
"""What all solvers share: the loop over the noise levels, and churn."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor

from gradsampler import _checks, transforms
from gradsampler.elementary import Coefficient, as_float, sqrt
from gradsampler.engine.program import Affine, Program, Recorder
from gradsampler.parameterization import Parameterization, parameterize


@dataclass(frozen=True)
class Churn:
    """Stochastic churn (Karras et al. 2022, arXiv 2206.00364, algorithm 2, lines 4 to 6).

    Before a step from level s with ``s_tmin <= s <= s_tmax`` the level is raised to
    ``s * (1 + eta)``, ``eta = min(s_churn / num_steps, sqrt(2) - 1)``, by injecting noise. The
    amounts ``s_churn`` and ``s_noise`` may be 0-d tensors, which receive their gradient.
    """

    s_churn: Coefficient
    s_tmin: float = 0.0
    s_tmax: float = math.inf
    s_noise: Coefficient = 1.0

    def __post_init__(self) -> None:
        check_amounts(self, "Churn", "s_churn", "s_noise")
        _checks.finite("Churn: s_tmin", self.s_tmin, 0.0)
        if self.s_tmax != math.inf:
            _checks.finite("Churn: s_tmax", self.s_tmax)
        if not self.s_tmax >= self.s_tmin:
            _checks.fail("Churn: s_tmax", f"be at least s_tmin = {self.s_tmin}", self.s_tmax)

    def eta(self, sigma: float, num_steps: int) -> Coefficient:
        """The relative rise of the level ``sigma``, 0 outside the window."""
        if not self.s_tmin <= sigma <= self.s_tmax:
            return 0.0
        eta, most = self.s_churn / num_steps, math.sqrt(2) - 1
        return eta if eta <= most else 0 * eta + most  # what is learned keeps its graph, slope 0

    def raised(self, run: Recorder, sigma: Coefficient) -> tuple[Affine, Coefficient]:
        """What is added to the state, and the level after it."""
        eta = self.eta(as_float(sigma), run.num_steps)
        if eta == 0:
            return Affine(), sigma
        amount = self.s_noise * sigma * sqrt(eta * (2 + eta))
        return amount * run.noise(), sigma * (1 + eta)


class Solver(ABC):
    """A sampling method as a recipe for a `Program`.

    A solver computes with `Affine` expressions in place of tensors, so its file is the method as
    the paper states it, and what comes out is the table of coefficients.
    """

    # What a method says of itself: ``flow = True`` in its class, or a property where that depends
    # on its numbers.

    @property
    def stochastic(self) -> bool:
        """Whether a step injects noise of its own."""
        return False

    @property
    def flow(self) -> bool:
        """Whether the method is also defined in flow time."""
        return False

    @property
    def monotone(self) -> bool:
        """Whether the levels must decrease strictly."""
        return True

    @property
    def ode_order(self) -> int | None:
        """The order of convergence to the ODE, with eta = 0."""
        return None

    @property
    def weak_order(self) -> int | None:
        """The order in which the moments converge to those of the SDE."""
        return None

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
        started: bool = False,
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
            started: begins with a given state at ``sigmas[0]`` instead, the ``start`` of the run.
        """
        followed = transforms.followed(sigmas)
        levels: Sequence[Coefficient] = sigmas.unbind() if followed else sigmas.tolist()
        run = Recorder(parameterize(denoiser, prediction).on(sigmas), len(levels) - 1)
        if math.isinf(as_float(levels[0])):
            first = run.start() if started else run.z0()
            noise, denoised = run.denoise(first, levels[0])
            run.predictions.clear()  # no method interpolates from infinity
            run.step, levels, x = 1, levels[1:], denoised + levels[1] * noise
        else:
            x = run.start() if started else levels[0] * run.z0()
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


def check_amounts(method: Solver | Churn, owner: str, *names: str) -> None:
    """Checks fields that are amounts of noise, and holds those that are tensors in float64.

    What is learned starts above 0: a method without noise takes another branch, which has no slope.
    """
    for name in names:
        amount = _checks.coefficient(f"{owner}: {name}", getattr(method, name), 0.0)
        learned = isinstance(amount, Tensor) and transforms.followed(amount)
        if learned and amount == 0 and name != "s_noise":
            hint = "start with a little noise"
            _checks.fail(f"{owner}: {name}", "be above 0 where it is learned", 0.0, hint)
        object.__setattr__(method, name, amount)
