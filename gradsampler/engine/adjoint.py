# SPDX-License-Identifier: Apache-2.0
"""The gradient of a run by its transposed program, one model call's activations at a time."""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from gradsampler import transforms
from gradsampler.contract import GIVEN, Draw
from gradsampler.engine import graph
from gradsampler.engine.circumstances import Circumstances
from gradsampler.engine.program import (
    START,
    Z0,
    Absorption,
    Descent,
    Evaluation,
    Gathering,
    Pullback,
    Slot,
    Stage,
    column,
)
from gradsampler.engine.replay import Sketch, changed
from gradsampler.engine.trajectory import GradientWarning, Trajectory
from gradsampler.repetition import ReplayError


class States(Protocol):
    """Keeps the states that the model was evaluated on, from the run until its backward."""

    def save(self, index: int, x: Tensor) -> None:
        """Keeps the state of evaluation ``index``; called in increasing order."""

    def load(self, index: int) -> Tensor:
        """Returns it; called in decreasing order."""

    def release(self) -> list[Tensor]:
        """Hands kept tensors over to autograd, which frees them and guards them from changes."""

    def adopt(self, tensors: Sequence[Tensor]) -> None:
        """Takes them back for the time of the backward run."""


class Call(NamedTuple):
    """A model call with its graph."""

    x: Tensor  # the state
    scaled: Tensor  # the model's input, a leaf
    level: Tensor  # a leaf
    outputs: tuple[Tensor, ...]


class Opening(NamedTuple):
    """The first model call of a run, where it is made before it is known how to go on."""

    outputs: tuple[Tensor, ...]  # without their graph
    found: graph.Reached
    detached: bool  # whether the run has been warned that no gradient passes
    circumstances: Circumstances  # that have captured it
    graph: int  # bytes of its graph


class Gradients:
    """Sums of cotangents of what a run is differentiated by; None where it is not."""

    def __init__(self, z0: Tensor | None, numbers: Tensor | None) -> None:
        self.z0 = None if z0 is None else torch.zeros_like(z0)
        self._shape = None if numbers is None else numbers.shape
        self._numbers: dict[int, Tensor] = {}  # by position; 0-d or [B] on the device of the run
        self.tensors: dict[int, Tensor] = {}  # by position in `Adjoint.inputs`
        self._own: set[int] = set()  # those that are sums made here, and in nobody else's hands

    def add_z0(self, gradient: Tensor | None) -> None:
        """Adds to the gradient of z0."""
        if self.z0 is not None and gradient is not None:
            self.z0.add_(gradient)

    def number(self, position: int, value: Tensor, cotangent: Tensor) -> None:
        """Adds <value, cotangent>, by sample where the numbers are, to that of a coefficient."""
        if self._shape is not None:
            products = value.to(cotangent.dtype) * cotangent
            if len(self._shape) == 1:
                product = torch.sum(products, dtype=torch.float64)
            else:
                product = torch.sum(products.flatten(1), dim=1, dtype=torch.float64)
            known = self._numbers.get(position)
            self._numbers[position] = product if known is None else known + product

    def numbers(self) -> Tensor | None:
        """The gradient of all coefficients, [C] or [C, B] float64 on the CPU."""
        if self._shape is None:
            return None
        gradient = torch.zeros(self._shape, dtype=torch.float64)
        if self._numbers:
            gradient[list(self._numbers)] = torch.stack(list(self._numbers.values())).cpu()
        return gradient

    def add(self, positions: Sequence[int], gradients: Sequence[Tensor | None]) -> None:
        """Adds to the gradients of the inputs at ``positions``; sums are in float32 at least."""
        sums: list[Tensor] = []
        fresh: list[Tensor] = []
        for k, gradient in zip(positions, gradients, strict=True):
            if gradient is None:
                continue
            known = self.tensors.get(k)
            if known is None:
                self.tensors[k] = gradient
            elif k in self._own:
                sums.append(known)
                fresh.append(gradient)
            else:
                wide = torch.promote_types(known.dtype, torch.float32)
                self.tensors[k] = known.to(wide) + gradient
                self._own.add(k)
        if sums:
            torch._foreach_add_(sums, fresh)


class Adjoint:
    """A run that kept only the states its model calls saw, and the gradient of that run."""

    def __init__(
        self,
        trajectory: Trajectory,
        states: States,
        z0: Tensor,
        opening: Opening | None = None,
    ) -> None:
        self._trajectory = trajectory
        self._opening = opening
        self._states = states
        self._z0 = z0.detach()
        self._wanted = z0.requires_grad
        self._start = [] if trajectory.start is None else [trajectory.start]
        self._numbers: Any = trajectory.program.numbers(z0.device)
        self._levels = trajectory.program.coefficients.requires_grad
        self._cond = [x.detach().requires_grad_(x.requires_grad) for x in trajectory.cond.tensors]
        self._circumstances = (
            Circumstances(z0.device, trajectory.model, trajectory.cond)
            if opening is None
            else opening.circumstances
        )
        self._known = {*map(id, self._cond)}
        self._precisions = {trajectory.model_dtype, *self._circumstances.precisions}
        self._sketches: dict[int, list[Sketch]] = {}  # of the outputs, by the call
        self._repeats: list[tuple[Evaluation, list[Sketch]]] = []
        self._dtypes: dict[Slot, torch.dtype] = {}  # of the model's outputs
        self._index = {e.state: k for k, e in enumerate(trajectory.program.evaluations)}
        self._leaves: dict[int, Tensor] = {}
        self._outer = False
        self._retains = False  # whether what is pulled back may be pulled back once more
        self._detached = opening is not None and opening.detached
        with torch.no_grad():
            self._output: Tensor | None = self._run()
        self._circumstances.finish()

    def _run(self) -> Tensor:
        """Runs forward; what backward needs is kept."""

        def evaluate(evaluation: Evaluation, x: Tensor, scaled: Tensor | None) -> Sequence[Tensor]:
            self._states.save(self._index[evaluation.state], x)
            return [output.detach() for output in self._first(evaluation, x, scaled).outputs]

        return self._trajectory.forward(self._z0, evaluate)

    def inputs(self) -> list[Tensor]:
        """All that the run depends on beside z0 and the coefficients, found leaves included."""
        trajectory = self._trajectory
        known = [*trajectory.cond.tensors, *trajectory.noise.tensors, *self._start]
        return [*known, *self._leaves.values()]

    def release(self) -> tuple[Tensor, list[Tensor]]:
        """Hands the output and the kept states over: what autograd owns is freed by it."""
        output, self._output = self._output, None
        assert output is not None
        return output, self._states.release()

    def _call(self, evaluation: Evaluation, x: Tensor, scaled: Tensor | None = None) -> Call:
        """Calls the model; its input and its level are fresh leaves."""
        scaled, level = self._trajectory.model_input(evaluation, x, scaled)
        scaled = scaled.detach().requires_grad_()
        level = level.clone()  # a denoiser may change it
        if self._levels:
            level.requires_grad_()
        cond = self._trajectory.cond.filled(self._cond)
        with torch.enable_grad():
            outputs = self._trajectory.call(evaluation, scaled, level, cond)
        return Call(x, scaled, level, outputs)

    def _first(self, evaluation: Evaluation, x: Tensor, scaled: Tensor | None) -> Call:
        """Calls the model for the first time, and finds what else the call depends on."""
        opening, self._opening = self._opening, None
        if opening is not None:
            self._take(evaluation, opening.outputs, opening.found)
            return Call(x, x, x, opening.outputs)
        since = graph.mark()
        with self._circumstances.captured(evaluation):
            call = self._call(evaluation, x, scaled)
        found = graph.reached(call.outputs, since)
        passes = found.leaves.pop(id(call.scaled), None) is not None
        found.leaves.pop(id(call.level), None)
        self._take(evaluation, call.outputs, found)
        if not passes and not self._detached and self._asked():
            self._detached = True
            warnings.warn(GradientWarning(evaluation.step), stacklevel=2)
        return call

    def _take(
        self, evaluation: Evaluation, outputs: Sequence[Tensor], found: graph.Reached
    ) -> None:
        """Takes note of what a first call returned and depends on."""
        for slot, output in zip(evaluation.writes, outputs, strict=True):
            self._dtypes[slot] = output.dtype
        self._outer |= found.outer
        self._sketches[evaluation.state.call] = self._sketched(outputs)
        for key, leaf in found.leaves.items():
            if key not in self._leaves and key not in self._known:
                self._leaves[key] = leaf

    def _again(self, evaluation: Evaluation) -> Call:
        """Calls the model once more on the state that it saw."""
        return self._repeated(evaluation, self._states.load(self._index[evaluation.state]))

    def _repeated(self, evaluation: Evaluation, x: Tensor, scaled: Tensor | None = None) -> Call:
        """Calls the model as the first time; what it returns is compared in the end."""
        call = self._circumstances.again(evaluation, lambda: self._call(evaluation, x, scaled))
        self._repeats.append((evaluation, self._sketched(call.outputs)))
        return call

    def _sketched(self, outputs: Sequence[Tensor]) -> list[Sketch]:
        return [Sketch.of(output, self._precisions) for output in outputs]

    def _compare(self) -> None:
        """Raises where a call that was made again has returned something else."""
        pairs = [
            (evaluation.step, pair)
            for evaluation, again in self._repeats
            for pair in zip(self._sketches[evaluation.state.call], again, strict=True)
        ]
        flags = changed([pair for _, pair in pairs])
        steps = [step for (step, _), flag in zip(pairs, flags, strict=True) if flag]
        if steps:
            raise ReplayError(
                f"the denoiser must return the same when it is called again, got another output at "
                f"step {min(steps)}; does it draw from a generator that is not seen in it, as "
                "numpy's, or were weights or inputs changed since? memory='store' calls it once"
            )

    def _asked(self) -> bool:
        """Whether the state that a model call sees may carry a gradient."""
        trajectory = self._trajectory
        known = [*trajectory.cond.tensors, *trajectory.noise.tensors, *self._start]
        asked = self._wanted or self._levels or any(x.requires_grad for x in known)
        return asked or bool(self._leaves)

    def backward(self, lam: Tensor, kept: Sequence[Tensor], wants_z0: bool) -> Gradients:
        """Runs the transposed program.

        Args:
            lam: [B, *state] cotangent of the output.
            kept: what `release` handed over.
            wants_z0: whether z0 is differentiated by.
        """
        self._states.adopt(kept)
        try:
            gradients = self._transposed(lam, wants_z0)
            self._trajectory.observer.settle()
            self._compare()
        finally:
            self._repeats.clear()
            self._states.release()
        return gradients

    def _transposed(self, lam: Tensor, wants_z0: bool) -> Gradients:
        program = self._trajectory.program
        transposed = program.transposed
        gradients = Gradients(
            self._z0 if wants_z0 else None, program.coefficients if self._levels else None
        )
        given = self._trajectory.given(self._z0)
        inner = self._inner()
        cot: dict[Slot, Tensor] = {program.output: lam.to(self._trajectory.state_dtype)}
        for instruction, gathering, dead in zip(
            transposed.instructions, transposed.gathered, transposed.dead, strict=True
        ):
            if isinstance(instruction, Stage):
                terms = tuple(term for term in instruction.terms if term[0] in cot)
                if instruction.writes in given:
                    for reader, c in terms:
                        gradients.number(c, given[instruction.writes], cot[reader])
                if terms and instruction.writes.kind != "c":
                    cot[instruction.writes] = self._trajectory.combine(terms, cot)
            elif isinstance(instruction, Descent):
                assert gathering is not None
                self._descend(instruction, gathering, cot, gradients)
            elif isinstance(instruction, Pullback):
                self._pull(instruction, cot, inner, gradients)
            elif isinstance(instruction, Absorption) and instruction.state in cot:
                self._absorb(instruction, cot[instruction.state], gradients)
            for slot in dead:
                cot.pop(slot, None)
        gradients.add_z0(cot.get(Z0))
        at_start = len(self._cond) + len(self._trajectory.noise.tensors)
        gradients.add([at_start], [cot.get(START)])
        return gradients

    def _inner(self) -> dict[int, Tensor]:
        """What model calls are differentiated by beside their input, by position in `inputs`."""
        first = len(self._cond) + len(self._trajectory.noise.tensors) + len(self._start)
        found = {**dict(enumerate(self._cond)), **dict(enumerate(self._leaves.values(), first))}
        return {k: x for k, x in found.items() if x.requires_grad}

    def _pull(
        self,
        pullback: Pullback,
        cot: dict[Slot, Tensor],
        inner: dict[int, Tensor],
        gradients: Gradients,
    ) -> None:
        """Calls the model again and pulls the cotangents of its outputs back."""
        evaluation = pullback.evaluation
        x, scaled, level, outputs = self._again(evaluation)
        if self._levels:
            values = zip((evaluation.state, *evaluation.writes), (x, *outputs), strict=True)
            for slot, value in values:
                for reader, c in self._trajectory.program.readers.get(slot, ()):
                    if reader in cot:
                        gradients.number(c, value.detach(), cot[reader])
        pulled: list[Tensor] = []
        cotangents: list[Tensor] = []
        for slot, output in zip(evaluation.writes, outputs, strict=True):
            mu = cot.get(slot)
            if mu is not None and output.requires_grad:
                pulled.append(output)
                cotangents.append(mu if mu.dtype == output.dtype else mu.to(output.dtype))
        if not pulled:
            return
        levels = [level] if self._levels else []
        silent = graph.without_hooks(list(self._leaves.values()))
        with silent, self._circumstances.drawing_nothing(evaluation):
            g, *rest = graph.pulled(
                pulled,
                [scaled, *levels, *inner.values()],
                cotangents,
                retain=self._outer or self._retains,
            )
        if levels:
            dlevel = rest.pop(0)
            if dlevel is not None:
                each = dlevel[:, None]
                gradients.number(evaluation.c_noise, torch.ones_like(each), each)
        gradients.add(list(inner), rest)
        if g is not None:
            self._trajectory.observer.finite(evaluation, g, "the gradient")
            gradients.number(evaluation.c_in, x, g)
            cot[pullback.writes] = g

    def _descend(
        self,
        descent: Descent,
        gathering: Gathering,
        cot: dict[Slot, Tensor],
        gradients: Gradients,
    ) -> None:
        """The cotangents of a state and of an output of the evaluation before, in one launch."""
        slot, output = descent.state.writes, descent.output
        absorption = descent.absorptions[0] if descent.absorptions else None
        lams, a, g, g_scale, b = gathering
        if g not in cot:
            g, g_scale = None, 0.0
        missing = [s for s in lams if s not in cot]
        if missing:
            there = [k for k, s in enumerate(lams) if s in cot]
            lams, a = tuple(lams[k] for k in there), [a[k] for k in there]
            b = None if b is None else [*(b[k] for k in there), b[-1]]
        if not lams and g is None:
            return
        draw = self._draw(absorption) if absorption and gradients.z0 is not None else None
        cot[slot], mu = self._trajectory.backend.adjoint_step(
            [cot[s] for s in lams],
            a,
            None if g is None else cot[g],
            g_scale,
            b,
            self._z0,
            draw,
            self._numbers[absorption.injection.coefficient] if absorption else 0.0,
            gradients.z0,
            mu_dtype=None if output is None else self._dtypes[output.writes],
            lam_dtype=self._trajectory.state_dtype,
        )
        if output is not None and any(s in cot for s, _ in output.terms):
            cot[output.writes] = mu
        if absorption is not None and (draw is None or self._levels):
            self._absorb(absorption, cot[slot], gradients, done=draw is not None)
        for further in descent.absorptions[1:]:
            self._absorb(further, cot[slot], gradients)

    def _draw(self, absorption: Absorption) -> Draw | None:
        """The injection as numbers, if a kernel can pull a cotangent back through it."""
        draw = self._trajectory.draw(absorption.injection, self._z0)
        return None if draw is None or draw.kind == GIVEN else draw

    def _absorb(
        self, absorption: Absorption, lam: Tensor, gradients: Gradients, *, done: bool = False
    ) -> None:
        """Pulls a cotangent back through the noise injected into its state.

        With ``done`` the share of z0 is known already, and the amount of noise is what remains.
        """
        noise, name = self._trajectory.noise, self._trajectory.name(absorption.injection)
        position = absorption.injection.coefficient
        if self._levels:
            gradients.number(position, noise.at(self._z0, *name), lam)
        if done:
            return
        amount = column(self._numbers[position], lam)
        cotangent = noise.transpose(lam * amount, self._z0, *name)
        gradients.add_z0(cotangent.z0)
        positions = [len(self._cond) + k for k in cotangent.tensors]
        gradients.add(positions, list(cotangent.tensors.values()))


class Connection(torch.autograd.Function):
    """Puts a finished run into the autograd graph."""

    @staticmethod
    def forward(ctx: Any, adjoint: Adjoint, z0: Tensor, *inputs: Tensor) -> Tensor:
        """The run's output; ``inputs`` are the coefficients and `Adjoint.inputs`."""
        ctx.adjoint = adjoint
        ctx.count = len(inputs)
        output, states = adjoint.release()
        ctx.save_for_backward(z0, *inputs, *states)
        return output

    @staticmethod
    def backward(ctx: Any, lam: Tensor) -> tuple[Tensor | None, ...]:
        """Cotangents of z0, the coefficients and the inputs."""
        transforms.refuse("memory", "another strategy", lam)
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a run that keeps no activations must be differentiated once, got "
                "create_graph=True; memory='store' has a gradient of the gradient"
            )
        _, _, *saved = ctx.saved_tensors
        inputs, kept = saved[: ctx.count - 1], saved[ctx.count - 1 :]
        gradients = ctx.adjoint.backward(lam, kept, ctx.needs_input_grad[1])
        sums = (gradients.tensors.get(k) for k in range(len(inputs)))
        rest = [g if g is None else g.to(x.dtype) for g, x in zip(sums, inputs, strict=True)]
        return None, gradients.z0, gradients.numbers(), *rest
