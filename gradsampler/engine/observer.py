# SPDX-License-Identifier: Apache-2.0
"""What looks on while a program runs: callback, progress bar, check for non-finite values."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from gradsampler.engine.agreement import Agreement
from gradsampler.engine.monitor import Monitor
from gradsampler.engine.program import Evaluation, Injection, Program, Slot, column


class NonFiniteError(ArithmeticError):
    """A state, a prediction, or a gradient on its way back is NaN or infinite."""


class StepInfo(NamedTuple):
    """What a callback is told after each step."""

    step: int  # 0 .. num_steps-1
    num_steps: int
    # Level of the step's first model evaluation, churn included; [B] where each sample has its own.
    sigma: float | Tensor
    x: Tensor  # [B, *state] the state at that level, a copy
    denoised: Tensor  # [B, *state] what the model predicted there, detached


class Observer:
    """Follows one run; used as a context manager around it."""

    def __init__(
        self,
        program: Program,
        *,
        callback: Callable[[StepInfo], object] | None = None,
        progress: bool = False,
        check_finite: bool = False,
        agreement: Agreement | None = None,
        monitor: Monitor | None = None,
    ) -> None:
        self.monitor = monitor
        if monitor is not None:
            monitor.begin(program)
        self._numbers = program.numbers(torch.device("cpu"))
        self._num_steps = program.num_steps
        self._callback = callback
        self._check_finite = check_finite
        self._agreement = agreement or Agreement()
        self._unread: list[tuple[Tensor, Evaluation, str]] = []  # checks that a device has made
        self._bar = tqdm(total=program.num_steps, desc="sampling") if progress else None
        self.looks = progress or check_finite or callback is not None
        self._step = -1
        self._info: StepInfo | None = None

    @property
    def checks(self) -> bool:
        """Whether values are looked at."""
        return self._check_finite

    def __enter__(self) -> "Observer":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def evaluating(self, evaluation: Evaluation) -> None:
        """Takes note that the model is about to be evaluated: the step before may be over."""
        if self.looks and evaluation.step != self._step:
            self._end_step(evaluation.step)

    def evaluated(self, evaluation: Evaluation, x: Tensor, outputs: Sequence[Tensor]) -> None:
        """Takes note of a model evaluation."""
        if self.monitor is not None:
            self.monitor.saw(evaluation, x)
        if not self.looks:
            return
        for value, what in ((x, "the state"), *((d, "the model's output") for d in outputs)):
            self.finite(evaluation, value, what)
        if evaluation.step == self._step:
            return
        self._step = evaluation.step
        if self._callback is None or evaluation.step == self._num_steps:
            return
        slots = dict(zip((evaluation.state, *evaluation.writes), (x, *outputs), strict=True))
        denoised = self._denoised(evaluation, slots).to(x.dtype)
        sigma = self._numbers[evaluation.sigma]
        self._info = StepInfo(evaluation.step, self._num_steps, sigma, x.detach().clone(), denoised)

    def finished(self) -> None:
        """Takes note of the end of the run."""
        self.settle()
        self._end_step(self._num_steps)

    @property
    def monitored(self) -> bool:
        """Whether the gradient is looked at."""
        return self.monitor is not None

    def pulled(
        self, evaluation: Evaluation, cot: Sequence[Tensor | None], g: Tensor | None
    ) -> None:
        """Takes note of the cotangents of a call's outputs and of its input."""
        if self.monitor is not None:
            self.monitor.pulled(evaluation, cot, g)

    def descended(self, evaluation: Evaluation, lam: Tensor) -> None:
        """Takes note of the cotangent of the state that a call sees."""
        if self.monitor is not None:
            self.monitor.descended(evaluation, lam)

    def absorbed(self, state: Slot, injection: Injection, share: Tensor) -> None:
        """Takes note of what a noise in a state adds to the gradient to z0."""
        if self.monitor is not None:
            self.monitor.absorbed(state, injection, share)

    def finite(self, evaluation: Evaluation, value: Tensor, what: str) -> None:
        """Raises NonFiniteError, if that check is on and a value is NaN or infinite.

        On another device than the CPU `settle` does, so that no step waits for the device; and
        where ranks make the same calls, so that they raise alike.
        """
        if self._check_finite:
            self._unread.append((torch.isfinite(value).all().logical_not(), evaluation, what))
            if value.device.type == "cpu" and self._agreement.alone:
                self.settle()

    def settle(self) -> None:
        """Reads the checks made since the last time, all at once, and raises for the first."""
        unread, self._unread = self._unread, []
        if not self._check_finite:
            return
        flags = torch.stack([flag for flag, _, _ in unread]).tolist() if unread else []
        # All ranks have made the same checks, and so raise for the same one.
        first = self._agreement.first(flags)
        if first is not None:
            _, evaluation, what = unread[first]
            sigma = torch.as_tensor(self._numbers[evaluation.sigma])
            level = f"{sigma.max().item():.6g}"  # of the noisiest sample
            raise NonFiniteError(
                f"{what} at step {evaluation.step} of {self._num_steps} (sigma = {level}) "
                f"must be finite, got NaN or infinity{self._agreement.elsewhere(flags[first])}"
            )

    def _end_step(self, following: int) -> None:
        # A step may have no evaluation.
        if self._bar is not None and 0 <= self._step < self._num_steps:
            self._bar.update(following - self._step)
        if self._callback is not None and self._info is not None:
            info, self._info = self._info, None
            self._callback(info)

    @torch.no_grad()
    def _denoised(self, evaluation: Evaluation, slots: dict[Slot, Tensor]) -> Tensor:
        total: Tensor | float = 0.0
        for slot, c in evaluation.denoised:
            x = slots[slot].detach()
            total = total + column(self._numbers[c], x) * x
        assert isinstance(total, Tensor)
        return total
