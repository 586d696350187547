# SPDX-License-Identifier: Apache-2.0
"""What a run of Cosmos's RES sampler shares with no other: its churn, its random draws, and what
its callbacks are told.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradsampler import _checks
from gradsampler.elementary import Coefficient, as_float
from gradsampler.engine.observer import StepInfo
from gradsampler.engine.program import Affine, Recorder
from gradsampler.noise.replayed import Replayed
from gradsampler.noise.sources import NoiseSource
from gradsampler.parameterization import Parameterization, Preconditioning
from gradsampler.solvers import Churn

Network = Callable[[Tensor, Tensor], Tensor]  # (x [B, *state], sigma [B]) -> x0 [B, *state]
Callbacks = Sequence[Callable[..., object]]
Amounts = Mapping[int, Tensor]  # by step, the standard deviation of the noise injected there


@dataclass(frozen=True)
class OpenChurn(Churn):
    """Churn as Cosmos has it: an open window, and S_churn over the number of levels."""

    idle: bool = False  # injects 0 times a noise at S_churn = 0: Cosmos draws it all the same

    def __post_init__(self) -> None:
        # An empty window is no error, so the bounds of a plain Churn are not asked for.
        for name, value in (("churn", self.s_churn), ("noise", self.s_noise)):
            _checks.finite(f"S_{name} (s_{name})", value, 0.0)

    def eta(self, sigma: float, num_steps: int) -> Coefficient:
        if not self.s_tmin < sigma < self.s_tmax:
            return 0.0
        return min(self.s_churn / (num_steps + 1), math.sqrt(1.2) - 1)

    def raised(self, run: Recorder, sigma: Coefficient) -> tuple[Affine, Coefficient]:
        if self.idle and self.s_churn == 0 and self.s_tmin < as_float(sigma) < self.s_tmax:
            return 0.0 * run.noise(), sigma
        return super().raised(run, sigma)


class X0Function(Parameterization):
    """A function of (x, sigma) that predicts x0, called in the dtype of the run, float64."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.callback: Callback | None = None  # is shown the state of each call

    def preconditioning(self, sigma: Coefficient) -> Preconditioning:
        return Preconditioning(0.0, (1.0,), 1.0, sigma)

    def outputs(self, x: Tensor, noise: Tensor, cond: Mapping[str, Any]) -> tuple[Tensor, ...]:
        if self.callback is not None:
            self.callback.reached(x.detach())
        return (_checks.floating("x0_fn: the output", self.network(x, noise.contiguous())),)

    def modules(self) -> Iterator[nn.Module]:
        return iter(())  # their dtype does not count, that of the state does


def drawn(x: Tensor, amounts: Amounts) -> Replayed:
    """Cosmos's noise: ``torch.randn_like`` of the state, from torch's default generator."""

    def draw(z0: Tensor, step: int, number: int) -> Tensor:
        if step > 0:
            return torch.randn_like(z0)
        # Only its first step makes Cosmos's state float64: before that the noise is drawn, and the
        # sum rounded, in the input's dtype.
        noise, amount = torch.randn_like(x), amounts[0].to(z0.device)
        if amount == 0:
            return noise
        return ((x + amount * noise).to(z0.dtype) - x.to(z0.dtype)) / amount

    return Replayed(draw)


@dataclass
class Callback:
    """Passes the steps of a run on to Cosmos's callbacks, under its names."""

    functions: Callbacks
    noise: NoiseSource
    amounts: Amounts
    z0: Tensor  # [B, *state] detached
    levels: Tensor  # [N+1] detached, on the device of the run
    pending: StepInfo | None = None

    def __call__(self, info: StepInfo) -> None:
        """Takes note of a step, to be told of with the state that comes next."""
        self.pending = info

    @torch.no_grad()
    def reached(self, x: Tensor) -> None:
        """Tells of the pending step, if any, after which the state ``x`` is reached."""
        if self.pending is None:
            return
        info, self.pending = self.pending, None
        output, following = x.clone(), info.step + 1
        if following in self.amounts:  # the noise of the next step is in it already
            noise = self.noise.at(self.z0, following, info.num_steps)
            output -= self.amounts[following].item() * noise
        for function in self.functions:
            function(
                i_th=info.step,
                input_x_B_StateShape=info.x,
                output_x_B_StateShape=output,
                sigma_cur_0=self.levels.new_tensor(info.sigma),
                sigma_next_0=self.levels[following],
                x0_pred_B_StateShape=info.denoised,
            )
