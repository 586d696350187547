# SPDX-License-Identifier: Apache-2.0
"""Runs a program around a denoiser."""

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor

from gradsampler import _checks
from gradsampler.contract import GIVEN, MAX_TERMS, Draw
from gradsampler.engine import weights
from gradsampler.engine.conditioning import Conditioning
from gradsampler.engine.observer import Observer
from gradsampler.engine.ownership import large, written_over
from gradsampler.engine.parallel import Parallel, arrived
from gradsampler.engine.parts import Seen
from gradsampler.engine.policy import EXACT, Policy
from gradsampler.engine.program import (
    START,
    Z0,
    Evaluation,
    Injection,
    Launch,
    Numbers,
    Program,
    Slot,
    Terms,
    column,
)
from gradsampler.noise.sharded import Sharded
from gradsampler.noise.sources import Injected, NoiseSource, draw_of, name_of
from gradsampler.ops.backends import Backend
from gradsampler.parameterization import Parameterization

Evaluate = Callable[[Evaluation, Tensor, Tensor | None], Sequence[Tensor]]


_FEW_LEVELS = 2**16  # what the model is told in all calls of a run, in elements


class GradientWarning(UserWarning):
    """No gradient passes through the denoiser at ``step``: it detaches or runs under no_grad."""

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
    device: torch.device
    parallel: Parallel = field(default_factory=Parallel)  # what processes share of the model
    constants: Mapping[Slot, Tensor] = field(default_factory=dict)  # given beside z0, kind "c"
    start: Tensor | None = None  # [B, *state] of the state's dtype, where the program reads one
    policy: Policy = EXACT  # of the gradient
    learned: Sequence[Tensor] | None = None  # the coefficients, where autograd is to reach them
    seen: Seen = field(default_factory=Seen)  # what the model calls are made of

    @property
    def numbers(self) -> Numbers:
        """The program's coefficients."""
        return self._fixed if self.learned is None else self.learned

    @cached_property
    def _fixed(self) -> Numbers:
        return self.program.numbers(self.device)

    @cached_property
    def launches(self) -> list[Launch | None]:
        """For each instruction that is a stage, what it computes."""
        plain = self.learned is None and not self.program.by_sample
        return self.program.launches if plain else self.program.prepared(self.numbers)

    def is_pulled(self, evaluation: Evaluation) -> bool:
        """Whether backward differentiates a call."""
        beside = None if self.observer.monitor is None else self.observer.monitor.policy
        policies = [self.policy, *([] if beside is None else [beside])]
        return any(policy.pulls(evaluation.step) for policy in policies)

    @cached_property
    def recalled(self) -> list[Evaluation]:
        """The evaluations whose calls backward makes again, where no graph of them is kept."""
        learned = self.program.coefficients.requires_grad  # then their outputs are factors
        return [e for e in self.program.evaluations if learned or self.is_pulled(e)]

    def given(self, z0: Tensor) -> dict[Slot, Tensor]:
        """What is there before the first instruction."""
        start = {} if self.start is None else {START: self.start}
        return {Z0: z0, **start, **self.constants}

    def forward(self, z0: Tensor, evaluate: Evaluate) -> Tensor:
        """Executes the instructions, and frees each slot after its last use.

        Args:
            z0: [B, *state] of the state's dtype.
            evaluate: from an evaluation, its state, and the model's input where that is at hand,
                to the model's outputs.
        """
        slots = self.given(z0)
        self.execute(slots, 0, len(self.program.instructions), z0, evaluate)
        self.observer.finished()
        return slots[self.program.output]

    def execute(
        self, slots: dict[Slot, Tensor], start: int, stop: int, z0: Tensor, evaluate: Evaluate
    ) -> None:
        """Executes the instructions from position ``start`` to before ``stop``.

        Args:
            slots: what the instructions before ``start`` left; changed to what these leave.
            start, stop: positions in the program; elsewhere than at its ends, of an evaluation.
            z0, evaluate: as for `forward`.
        """
        program, observer, scaled = self.program, self.observer, None
        watched = observer.looks or observer.monitored
        reuses = self.backend.writes and large(z0) and not torch.is_grad_enabled()
        for instruction, launch, dead in zip(
            program.instructions[start:stop],
            self.launches[start:stop],
            program.dead[start:stop],
            strict=True,
        ):
            if launch is not None:
                memory: dict[str, Any] = {}
                if reuses:
                    spare, scaled = [scaled], None
                    memory = self._memory(launch, slots, dead, spare)
                slots[launch.writes], scaled = self._launched(launch, slots, z0, memory)
            elif isinstance(instruction, Evaluation):
                x = slots[instruction.state]
                if watched:
                    observer.evaluating(instruction)
                outputs = evaluate(instruction, x, scaled)
                for slot, output in zip(instruction.writes, outputs, strict=True):
                    slots[slot] = output
                if watched:
                    observer.evaluated(instruction, x, outputs)
                del x, outputs, output  # the slots alone keep them, through the next model call
            for slot in dead:
                del slots[slot]

    def unobserved(self) -> "Trajectory":
        """The same without callback, bar and checks, to run parts of it once more."""
        return replace(self, observer=Observer(self.program))

    def _memory(
        self,
        launch: Launch,
        slots: dict[Slot, Tensor],
        dead: Set[Slot],
        spare: Sequence[Tensor | None],
    ) -> dict[str, Tensor]:
        """What a stage may write over: a state that dies in it, and the model's last input."""
        memory: dict[str, Tensor] = {}
        for slot in launch.reads:
            if slot.kind == "x" and slot in dead:
                found = written_over(slots, slot)
                if found is not None:
                    memory["out"] = found
                    break
        found = written_over(spare, 0)
        if found is not None and found.dtype == self.model_dtype:
            memory["model_out"] = found
        return memory

    def _launched(
        self,
        launch: Launch,
        slots: dict[Slot, Tensor],
        z0: Tensor,
        memory: Mapping[str, Any],
    ) -> tuple[Tensor, Tensor | None]:
        """A state, and from the same launch the model's input if that differs from it."""
        tensors = [slots[slot] for slot in launch.reads]
        scale = launch.c_in if isinstance(launch.c_in, float) else None  # not a tensor's
        same = scale == 1.0 and self.model_dtype == self.state_dtype
        if same or not self._exact(tensors):
            scale = None
        if launch.plain:
            return self.backend.step(
                tensors, launch.factors, out_dtype=self.state_dtype, model_scale=scale,
                model_dtype=self.model_dtype, **memory,
            )  # fmt: skip
        operands = self.operands(tensors, launch.factors, launch.injections, launch.amounts, z0)
        return self.backend.step(
            *operands,
            out_dtype=self.state_dtype,
            model_scale=scale,
            model_dtype=self.model_dtype,
            **memory,
        )

    def _exact(self, operands: Sequence[Tensor]) -> bool:
        """Whether the state is rounded by the stage to what it is computed in.

        Then the model's input comes out the same from the stage as from the state, which is all
        that a replay has.
        """
        if torch.is_grad_enabled() or self.state_dtype not in (torch.float32, torch.float64):
            return False
        wide = any(x.dtype == torch.float64 for x in (*operands, *self.noise.tensors))
        return self.state_dtype == torch.float64 or not wide

    def combine(
        self,
        terms: Terms,
        slots: dict[Slot, Tensor],
        injections: Sequence[Injection] = (),
        z0: Tensor | None = None,
    ) -> Tensor:
        """A combination of slots plus injected noise."""
        numbers = self.numbers
        tensors = [slots[slot] for slot, _ in terms]
        factors = [numbers[c] for _, c in terms]
        amounts = [numbers[injection.coefficient] for injection in injections]
        operands = self.operands(tensors, factors, injections, amounts, z0)
        return self.backend.step(*operands, out_dtype=self.state_dtype)[0]

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
        if not injections and len(tensors) <= MAX_TERMS:
            return tensors, _together(factors), z0, None, 0.0
        assert z0 is not None or not injections
        draws: list[tuple[Draw | None, Any]] = [
            (self._drawn(injection, cast(Tensor, z0)), amount)
            for injection, amount in zip(injections, amounts, strict=True)
        ]
        wide = torch.promote_types(self.state_dtype, torch.float32)
        by_sample = self.program.by_sample
        while len(draws) > 1 or len(tensors) > MAX_TERMS:
            noise = draws.pop(0) if len(draws) > 1 else (None, 0.0)
            partial = self.backend.step_fwd(
                tensors[:MAX_TERMS], _together(factors[:MAX_TERMS]), z0, *noise, out_dtype=wide
            )
            tensors = [partial, *tensors[MAX_TERMS:]]
            factors = [
                torch.ones_like(factors[0]) if by_sample else 1.0,
                *factors[MAX_TERMS:],
            ]
        return tensors, _together(factors), z0, *(draws[0] if draws else (None, 0.0))

    def draw(self, injection: Injection, z0: Tensor) -> Draw | None:
        """An injection as numbers; None for a source that no kernel knows."""
        if injection.noise not in self._draws:
            self._draws[injection.noise] = self.noise.draw(z0, *self.name(injection))
        return self._draws[injection.noise]

    @cached_property
    def _draws(self) -> dict[Injected, Draw | None]:
        return {}

    def _drawn(self, injection: Injection, z0: Tensor) -> Draw:
        """An injection as numbers; a source that no kernel knows is evaluated."""
        draw = self.draw(injection, z0)
        if draw is not None:
            return draw
        source, (step, number), num_steps = self.noise, injection.noise, self.program.num_steps
        if not isinstance(source, Sharded):
            return draw_of(source, z0, step, num_steps, number, self.state_dtype)
        # That of a part, as this backend draws it for the whole.
        window = source.window(z0)
        numbers = draw_of(window.source, window.z0, step, num_steps, number, self.state_dtype)
        nothing = torch.zeros_like(window.z0)  # without a term it would be another backend's
        wide = torch.promote_types(self.state_dtype, torch.float32)
        noise = self.backend.step_fwd([nothing], [0.0], window.z0, numbers, 1.0, out_dtype=wide)
        return Draw(GIVEN, numbers.step, given=window.own(noise).contiguous())

    def name(self, injection: Injection) -> tuple[int, ...]:
        """What the noise of an injection is called, as an argument of its source."""
        return name_of(injection.step, self.program.num_steps, injection.draw)

    def model_input(
        self, evaluation: Evaluation, x: Tensor, scaled: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """What the model is called with: the scaled state [B, *state] and the level [B]."""
        if scaled is None:
            c_in = self.numbers[evaluation.c_in]
            scaled = x if isinstance(c_in, float) and c_in == 1.0 else column(c_in, x) * x
        if scaled.dtype != self.model_dtype:
            scaled = scaled.to(self.model_dtype)
        if not self._levels:
            self._levels.update(self._told(x.device, len(x)))
        return scaled, self._levels[evaluation.c_noise]

    @cached_property
    def _levels(self) -> dict[int, Tensor]:
        """What the model is told of each level, [B], by the position of the number."""
        return {}

    def _told(self, device: torch.device, batch: int) -> Mapping[int, Tensor]:
        dtype = torch.promote_types(self.model_dtype, torch.float32)
        positions = list(dict.fromkeys(e.c_noise for e in self.program.evaluations))
        if self.learned is not None or self.program.by_sample:
            tensors = cast(Sequence[Tensor], self.numbers)
            return {k: tensors[k].to(device, dtype).expand(batch) for k in positions}
        values = [self.program.floats[k] for k in positions]
        if device.type != "cpu":  # filled there: a copy would have the host wait
            return {
                k: torch.full((), value, dtype=dtype, device=device).expand(batch)
                for k, value in zip(positions, values, strict=True)
            }
        levels = torch.tensor(values, dtype=torch.float64, device="cpu").to(dtype)[:, None]
        levels = levels.expand(-1, batch)
        if levels.numel() <= _FEW_LEVELS:
            levels = levels.contiguous()  # operations on few elements start faster
        return dict(zip(positions, levels.unbind(), strict=True))

    def buffers(self) -> Iterator[Tensor]:
        """The buffers of the network's modules."""
        for module in self.model.modules():
            yield from module.buffers()

    def call(
        self, evaluation: Evaluation, x: Tensor, level: Tensor, cond: dict[str, Any]
    ) -> tuple[Tensor, ...]:
        """Calls the model and checks what it returns."""
        before, told = version(x), version(level)
        model = self.model.at(evaluation.step)
        try:
            if self.parallel:
                with self.parallel.call():
                    outputs = model.chosen(x, level, cond, evaluation.branches)
            else:
                outputs = model.chosen(x, level, cond, evaluation.branches)
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
        if version(level) != told:
            self._levels.clear()  # the denoiser has changed its copy
        for output in outputs:
            if not _alike(output, x):
                return self._checked(evaluation, outputs, x)
        return outputs

    def _checked(
        self, evaluation: Evaluation, outputs: Sequence[Tensor], x: Tensor
    ) -> tuple[Tensor, ...]:
        outputs = tuple(map(arrived, outputs))
        for output in outputs:
            self._check_output(evaluation, output, x)
        return outputs

    def _check_output(self, evaluation: Evaluation, output: object, x: Tensor) -> None:
        name = f"denoiser: the output at step {evaluation.step}"
        found = _checks.prediction(name, output)
        if self.model.keeps_shape:
            _checks.shape(name, found, x.shape)
        _checks.device(name, found, x.device)


def _alike(output: object, x: Tensor) -> bool:
    """Whether an output is at first glance what the input ``x`` is, as almost every one is."""
    return (
        type(output) is Tensor
        and output.dtype == x.dtype
        and output.shape == x.shape
        and output.device == x.device
        and output.layout == torch.strided
    )


def _together(factors: list[Any]) -> Any:
    """Coefficients as an op takes them: those of each sample as [B, K]."""
    by_sample = bool(factors) and isinstance(factors[0], Tensor) and factors[0].ndim == 1
    return torch.stack(factors, dim=1) if by_sample else factors


def version(x: Tensor) -> int:
    """How often the tensor was changed in place, as far as torch counts."""
    return 0 if x.is_inference() else x._version
