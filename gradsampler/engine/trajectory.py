# SPDX-License-Identifier: Apache-2.0
"""Runs a program around a denoiser."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gradsampler import _checks
from gradsampler.contract import MAX_TERMS, Draw
from gradsampler.engine import weights
from gradsampler.engine.conditioning import Conditioning
from gradsampler.engine.observer import Observer
from gradsampler.engine.policy import EXACT, Policy
from gradsampler.engine.program import (
    START,
    Z0,
    Evaluation,
    Injection,
    Instruction,
    Numbers,
    Program,
    Slot,
    Stage,
    Terms,
    column,
)
from gradsampler.noise.sources import NoiseSource, draw_of, name_of
from gradsampler.ops.backends import Backend
from gradsampler.parameterization import Parameterization

Evaluate = Callable[[Evaluation, Tensor, Tensor | None], Sequence[Tensor]]


class GradientWarning(UserWarning):
    """Autograd sees no path from the denoiser's input at ``step`` to its output."""

    def __init__(self, step: int) -> None:
        super().__init__(
            f"the denoiser detaches at step {step}: no gradient passes from its output to its "
            "input; look for no_grad, inference_mode, detach, item or numpy inside"
        )
        self.step = step

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.step,)  # the text is made anew: pickles go between processes


@dataclass(frozen=True)
class Trajectory:
    """A program with all that it needs to run, except the initial noise."""

    program: Program
    model: Parameterization
    noise: NoiseSource
    cond: Conditioning
    backend: Backend
    state_dtype: torch.dtype  # of the state between model calls
    model_dtype: torch.dtype  # of the model's input
    observer: Observer
    constants: Mapping[Slot, Tensor] = field(default_factory=dict)  # given beside z0, kind "c"
    start: Tensor | None = None  # [B, *state] of the state's dtype, where the program reads one
    policy: Policy = EXACT  # of the gradient

    def given(self, z0: Tensor) -> dict[Slot, Tensor]:
        """What is there before the first instruction."""
        start = {} if self.start is None else {START: self.start}
        return {Z0: z0, **start, **self.constants}

    def forward(self, z0: Tensor, numbers: Numbers, evaluate: Evaluate) -> Tensor:
        """Executes the instructions, and frees each slot after its last use.

        Args:
            z0: [B, *state] of the state's dtype.
            numbers: the program's coefficients.
            evaluate: from an evaluation, its state, and the model's input where that is at hand,
                to the model's outputs.
        """
        slots = self.given(z0)
        self.execute(slots, 0, len(self.program.instructions), z0, numbers, evaluate)
        self.observer.finished()
        return slots[self.program.output]

    def execute(
        self,
        slots: dict[Slot, Tensor],
        start: int,
        stop: int,
        z0: Tensor,
        numbers: Numbers,
        evaluate: Evaluate,
    ) -> None:
        """Executes the instructions from position ``start`` to before ``stop``.

        Args:
            slots: what the instructions before ``start`` left; changed to what these leave.
            start, stop: positions in the program; elsewhere than at its ends, of an evaluation.
            z0, numbers, evaluate: as for `forward`.
        """
        scaled, instructions = None, self.program.instructions[start:stop]
        for instruction, following, dead in zip(
            instructions, (*instructions[1:], None), self.program.dead[start:stop], strict=True
        ):
            if isinstance(instruction, Stage):
                x, scaled = self._stage(instruction, following, slots, numbers, z0)
                slots[instruction.writes] = x
            elif isinstance(instruction, Evaluation):
                x = slots[instruction.state]
                self.observer.evaluating(instruction)
                outputs = evaluate(instruction, x, scaled)
                slots.update(zip(instruction.writes, outputs, strict=True))
                self.observer.evaluated(instruction, x, outputs)
                del x, outputs  # the slots alone keep them, through the next model call
            for slot in dead:
                del slots[slot]

    def unobserved(self) -> "Trajectory":
        """The same without callback, bar and checks, to run parts of it once more."""
        return replace(self, observer=Observer(self.program))

    def _stage(
        self,
        stage: Stage,
        following: Instruction | None,
        slots: dict[Slot, Tensor],
        numbers: Numbers,
        z0: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        """A state, and from the same launch the model's input if that differs from it."""
        scale = None
        shared = not self.program.by_sample
        if shared and isinstance(following, Evaluation) and self._exact(stage, slots):
            c_in = numbers[following.c_in]
            if c_in != 1.0 or self.model_dtype != self.state_dtype:
                scale = c_in
        result = self.combine(stage.terms, slots, numbers, stage.injections, z0, scale)
        return result if isinstance(result, tuple) else (result, None)

    def _exact(self, stage: Stage, slots: dict[Slot, Tensor]) -> bool:
        """Whether the state is rounded by the stage to what it is computed in.

        Then the model's input comes out the same from the stage as from the state, which is all
        that a replay has.
        """
        if torch.is_grad_enabled() or self.state_dtype not in (torch.float32, torch.float64):
            return False
        operands = [*(slots[slot] for slot, _ in stage.terms), *self.noise.tensors]
        wide = any(x.dtype == torch.float64 for x in operands)
        return self.state_dtype == torch.float64 or not wide

    def combine(
        self,
        terms: Terms,
        slots: dict[Slot, Tensor],
        numbers: Numbers,
        injections: Sequence[Injection] = (),
        z0: Tensor | None = None,
        model_scale: float | Tensor | None = None,
    ) -> Any:
        """A combination of slots plus injected noise; with ``model_scale`` a pair, the second
        being the model's input.
        """
        tensors = [slots[slot] for slot, _ in terms]
        factors = [numbers[c] for _, c in terms]
        amounts = [numbers[injection.coefficient] for injection in injections]
        return self.backend.step_fwd(
            *self.operands(tensors, factors, injections, amounts, z0),
            out_dtype=self.state_dtype,
            model_scale=model_scale,
            model_dtype=self.model_dtype,
        )

    def operands(
        self,
        tensors: list[Tensor],
        factors: list[Any],
        injections: Sequence[Injection],
        amounts: list[Any],
        z0: Tensor | None,
    ) -> tuple[list[Tensor], Any, Tensor | None, Draw | None, Any]:
        """The arguments of one launch, which takes few tensors and one noise; what is beyond that
        is added up in launches before.
        """
        draws: list[tuple[Draw | None, Any]] = []
        for injection, amount in zip(injections, amounts, strict=True):
            assert z0 is not None
            named = (injection.step, self.program.num_steps, injection.draw)
            draws.append((draw_of(self.noise, z0, *named, self.state_dtype), amount))
        wide, by_sample = (
            torch.promote_types(self.state_dtype, torch.float32),
            self.program.by_sample,
        )
        while len(draws) > 1 or len(tensors) > MAX_TERMS:
            noise = draws.pop(0) if len(draws) > 1 else (None, 0.0)
            partial = self.backend.step_fwd(
                tensors[:MAX_TERMS], _together(factors[:MAX_TERMS]), z0, *noise, out_dtype=wide
            )
            tensors = [partial, *tensors[MAX_TERMS:]]
            factors = [torch.ones_like(factors[0]) if by_sample else 1.0, *factors[MAX_TERMS:]]
        return tensors, _together(factors), z0, *(draws[0] if draws else (None, 0.0))

    def name(self, injection: Injection) -> tuple[int, ...]:
        """What the noise of an injection is called, as an argument of its source."""
        return name_of(injection.step, self.program.num_steps, injection.draw)

    def model_input(
        self, evaluation: Evaluation, x: Tensor, scaled: Tensor | None, numbers: Numbers
    ) -> tuple[Tensor, Tensor]:
        """What the model is called with: the scaled state [B, *state] and the level [B]."""
        c_in, c_noise = numbers[evaluation.c_in], numbers[evaluation.c_noise]
        if scaled is None:
            scaled = x if isinstance(c_in, float) and c_in == 1.0 else column(c_in, x) * x
        dtype = torch.promote_types(self.model_dtype, torch.float32)
        if isinstance(c_noise, float):  # filled on the device: a copy to it would stall the host
            level = torch.full((), c_noise, dtype=dtype, device=x.device)
        else:
            level = c_noise.to(x.device, dtype)
        return scaled.to(self.model_dtype), level.expand(len(x))

    def buffers(self) -> Iterator[Tensor]:
        """The buffers of the network's modules."""
        for module in self.model.modules():
            yield from module.buffers()

    def call(
        self, evaluation: Evaluation, x: Tensor, level: Tensor, cond: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        """Calls the model and checks what it returns."""
        before = version(x)
        branches = [slot.branch for slot in evaluation.writes]
        try:
            outputs = self.model.at(evaluation.step).chosen(x, level, cond, branches)
        except RuntimeError as error:
            weights.explain(error, self.model, x, level, cond)
            raise
        if version(x) != before:
            _checks.fail(
                f"denoiser: its input at step {evaluation.step}",
                "stay as it is",
                "a change in place",
                "give the denoiser x.clone()",
            )
        for output in outputs:
            name = f"denoiser: the output at step {evaluation.step}"
            _checks.prediction(name, output)
            if self.model.keeps_shape:
                _checks.shape(name, output, x.shape)
            _checks.device(name, output, x.device)
        return outputs


def _together(factors: list[Any]) -> Any:
    """Coefficients as an op takes them: those of each sample as [B, K]."""
    by_sample = bool(factors) and isinstance(factors[0], Tensor) and factors[0].ndim == 1
    return torch.stack(factors, dim=1) if by_sample else factors


def version(x: Tensor) -> int:
    """How often the tensor was changed in place, as far as torch counts."""
    return 0 if x.is_inference() else x._version
