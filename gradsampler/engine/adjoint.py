# SPDX-License-Identifier: Apache-2.0
"""The gradient of a run by its transposed program, one model call's activations at a time."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from gradsampler import transforms
from gradsampler.engine import graph
from gradsampler.engine.circumstances import Circumstances
from gradsampler.engine.cotangents import Cotangents, Gradients
from gradsampler.engine.monitor import Monitor
from gradsampler.engine.observer import Observer
from gradsampler.engine.program import Evaluation, Slot
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
    scaled: Tensor  # the model's input
    level: Tensor
    outputs: tuple[Tensor, ...]


class Opening(NamedTuple):
    """The first model call of a run, where it is made before it is known how to go on."""

    outputs: tuple[Tensor, ...]  # without their graph
    found: graph.Reached
    detached: bool  # whether the run has been warned that no gradient passes
    circumstances: Circumstances  # that have captured it
    graph: int  # bytes of its graph


class Adjoint:
    """A run that kept only the states its model calls saw, and the gradient of that run.

    Of the calls before the first that depends on anything which requires grad, nothing is kept.
    """

    repeats_all: ClassVar[bool] = False  # also calls that no gradient asks for are made again

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
        self._numbers: Any = trajectory.numbers
        self._levels = trajectory.program.coefficients.requires_grad
        self._cond = [
            graph.input_of(x, differentiated=x.requires_grad) for x in trajectory.cond.tensors
        ]
        self._circumstances = (
            Circumstances(z0.device, trajectory.seen, agreement=trajectory.parallel.agreement)
            if opening is None
            else opening.circumstances
        )
        self._precisions = {trajectory.model_dtype, *self._circumstances.precisions}
        self._sketches: dict[int, list[Sketch]] = {}  # of the outputs, by the call
        self._repeats: list[tuple[Evaluation, list[Sketch]]] = []
        self._begin = 0 if self.repeats_all else None  # the first call that is asked for
        self._dtypes: dict[Slot, torch.dtype] = {}  # of the model's outputs
        self._index = {e.state: k for k, e in enumerate(trajectory.recalled)}
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
            outputs = self._first(evaluation, x, scaled).outputs
            self._save(evaluation, x)
            return [output.detach() for output in outputs]

        return self._trajectory.forward(self._z0, evaluate)

    def inputs(self) -> list[Tensor]:
        """All that the run depends on beside z0 and the coefficients, found leaves included."""
        trajectory = self._trajectory
        known = [*trajectory.cond.tensors, *trajectory.noise.tensors, *self._start]
        return [*known, *self._parameters()]

    def _parameters(self) -> list[Tensor]:
        """What the found leaves stand for outside of the run."""
        parallel = self._trajectory.parallel
        owners = ((leaf, parallel.owner(leaf)) for leaf in self._leaves.values())
        return [leaf if owner is None else owner for leaf, owner in owners]

    @property
    def whole(self) -> bool:
        """Whether gradients that nobody asks for are computed as well: wrappers' hooks wait for
        those of their parameters, and a monitor compares all that there are.
        """
        monitor = self._trajectory.observer.monitor
        return bool(self._trajectory.parallel) or (
            monitor is not None and monitor.policy is not None
        )

    def release(self) -> tuple[Tensor, list[Tensor]]:
        """Hands the output and the kept states over: what autograd owns is freed by it."""
        output, self._output = self._output, None
        assert output is not None
        return output, self._states.release()

    def _call(self, evaluation: Evaluation, x: Tensor, scaled: Tensor | None = None) -> Call:
        """Calls the model; its input and its level have no graph before them."""
        scaled, level = self._trajectory.model_input(evaluation, x, scaled)
        level = level.clone()  # a denoiser may change it
        cond = self._trajectory.cond.filled(self._cond)
        with torch.enable_grad():
            scaled = graph.input_of(scaled)
            if self._levels:
                level = graph.input_of(level)
            outputs = self._trajectory.call(evaluation, scaled, level, cond)
        return Call(x, scaled, level, outputs)

    def _first(self, evaluation: Evaluation, x: Tensor, scaled: Tensor | None) -> Call:
        """Calls the model for the first time, and finds what else the call depends on."""
        opening, self._opening = self._opening, None
        if opening is not None:
            self._take(evaluation, opening.outputs, opening.found)
            return Call(x, x, x, opening.outputs)
        since = graph.mark()
        call = self._circumstances.captured(evaluation, lambda: self._call(evaluation, x, scaled))
        found = graph.reached(call.outputs, since, until=self._cond)
        passes = found.leaves.pop(id(graph.leaf_of(call.scaled)), None) is not None
        found.leaves.pop(id(graph.leaf_of(call.level)), None)
        self._take(evaluation, call.outputs, found)
        if not passes and not self._detached and self._asked():
            pulled = self._trajectory.is_pulled(evaluation)
            self._detached = pulled and self._trajectory.policy.enters(evaluation.step)
            if self._detached:
                warnings.warn(GradientWarning(evaluation.step), stacklevel=2)
        return call

    def _take(
        self, evaluation: Evaluation, outputs: Sequence[Tensor], found: graph.Reached
    ) -> None:
        """Takes note of what a first call returned and depends on."""
        for slot, output in zip(evaluation.writes, outputs, strict=True):
            self._dtypes[slot] = output.dtype
        self._outer |= found.outer
        for key, leaf in found.leaves.items():
            if key not in self._leaves:
                self._leaves[key] = leaf
        if self._begin is None and self._asked():
            self._begin = self._index.get(evaluation.state)
        if self._begin is not None:
            self._sketches[evaluation.state.call] = self._sketched(outputs)

    def _save(self, evaluation: Evaluation, x: Tensor) -> None:
        """Keeps the state that a call has seen, if a gradient may ask for it."""
        k = self._index.get(evaluation.state)
        if self._begin is not None and k is not None:  # backward passes over others
            self._states.save(k - self._begin, x)

    def _load(self, evaluation: Evaluation) -> Tensor:
        assert self._begin is not None
        return self._states.load(self._index[evaluation.state] - self._begin)

    def _again(self, evaluation: Evaluation) -> Call:
        """Calls the model once more on the state that it saw."""
        return self._repeated(evaluation, self._load(evaluation))

    def _repeated(self, evaluation: Evaluation, x: Tensor, scaled: Tensor | None = None) -> Call:
        """Calls the model as the first time; what it returns is compared in the end."""
        call = self._circumstances.again(evaluation, lambda: self._call(evaluation, x, scaled))
        first = self._sketches[evaluation.state.call]
        if not all(sketch.matches(y) for sketch, y in zip(first, call.outputs, strict=True)):
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
        failures, self._circumstances.failures = self._circumstances.failures, {}
        for (step, _), flag in zip(pairs, flags, strict=True):
            if flag:
                failures.setdefault(step, _another(step))
        # All ranks raise, or none: else the others would wait for the next run of this one.
        first = self._trajectory.parallel.agreement.least(min(failures, default=math.inf))[0]
        if first < math.inf:
            raise failures.get(int(first)) or _another(int(first), " on another rank")

    def _asked(self) -> bool:
        """Whether the state that a model call sees may carry a gradient."""
        trajectory = self._trajectory
        known = [*trajectory.cond.tensors, *trajectory.noise.tensors, *self._start]
        asked = self._wanted or self._levels or any(x.requires_grad for x in known)
        return asked or bool(self._leaves)

    def pulled(self, lam: Tensor, kept: Sequence[Tensor], wanted: Sequence[bool]) -> Gradients:
        """The gradients of the run; those that processes share are reduced. As `backward`."""
        parallel = self._trajectory.parallel
        if not parallel:
            return self.backward(lam, kept, wanted)
        with parallel.backward():
            gradients = self.backward(lam, kept, wanted)
        parameters = self._parameters()
        first = len(self.inputs()) - len(parameters)
        positions = list(range(first, first + len(parameters)))
        gradients.add(positions, [parallel.reduced(each) for each in parameters])
        return gradients

    def backward(self, lam: Tensor, kept: Sequence[Tensor], wanted: Sequence[bool]) -> Gradients:
        """Runs the transposed program.

        Args:
            lam: [B, *state] cotangent of the output.
            kept: what `release` handed over.
            wanted: whether the gradients of z0, of the coefficients and of each of `inputs` are.
        """
        self._states.adopt(kept)
        try:
            gradients = self._transposed(lam, wanted)
            self._trajectory.observer.settle()
            self._compare()
        finally:
            self._repeats.clear()
            self._states.release()
        return gradients

    def _transposed(self, lam: Tensor, wanted: Sequence[bool]) -> Gradients:
        trajectory = self._trajectory
        z0 = self._z0 if wanted[0] else None
        numbers = trajectory.program.coefficients if self._levels and wanted[1] else None
        gradients = Gradients(z0, numbers)
        taken = [self._cotangents(trajectory, lam, gradients)]
        inner = {k: x for k, x in self._inner().items() if wanted[2 + k]}
        monitor = trajectory.observer.monitor
        if monitor is not None and monitor.policy is not None:
            observer = Observer(trajectory.program, monitor=monitor.aside())
            other = replace(trajectory, policy=monitor.policy, observer=observer)
            cut = monitor.policy.cut(trajectory.program, trajectory.given(self._z0))
            if cut is not None:
                other = replace(other, program=cut.program, constants={})
            taken.append(self._cotangents(other, lam, Gradients(z0, None)))
        for evaluation in reversed(trajectory.program.evaluations):
            for each in taken:
                each.advance()
            asking = [each for each in taken if each.evaluation is evaluation]
            self._pull(evaluation, asking, inner)
        for each in taken:
            each.advance()
        if monitor is not None and len(taken) > 1:
            self._compare_gradients(monitor, gradients, taken[1].gradients)
        return gradients

    def _cotangents(self, trajectory: Trajectory, lam: Tensor, gradients: Gradients) -> Cotangents:
        count = len(self._cond)
        return Cotangents(trajectory, self._z0, lam, gradients, self._dtypes, count)

    def _inner(self) -> dict[int, Tensor]:
        """What model calls are differentiated by beside their input, by position in `inputs`."""
        first = len(self._cond) + len(self._trajectory.noise.tensors) + len(self._start)
        found = {**dict(enumerate(self._cond)), **dict(enumerate(self._leaves.values(), first))}
        return {k: x for k, x in found.items() if x.requires_grad}

    def _pull(
        self, evaluation: Evaluation, asking: Sequence[Cotangents], inner: dict[int, Tensor]
    ) -> None:
        """Calls the model again and pulls the cotangents of its outputs back."""
        pulls = self._levels or any(each.policy.pulls(evaluation.step) for each in asking)
        if not pulls or not self._reached(evaluation):
            self._skip(evaluation)
            return
        call = self._again(evaluation)
        for k, each in enumerate(asking):
            each.weigh(call.x, call.outputs)
            pairs = each.of_outputs(call.outputs) if each.policy.pulls(evaluation.step) else []
            if pairs:
                again = self._outer or self._retains or k + 1 < len(asking)
                self._differentiate(evaluation, call, each, pairs, inner, again=again)
            each.told()

    def _skip(self, evaluation: Evaluation) -> None:
        """Passes over a call that is not pulled back."""
        if self._reached(evaluation):
            self._load(evaluation)

    def _reached(self, evaluation: Evaluation) -> bool:
        """Whether backward makes the call again, for something that requires grad."""
        k = self._index.get(evaluation.state)
        return k is not None and self._begin is not None and k >= self._begin

    def _differentiate(
        self,
        evaluation: Evaluation,
        call: Call,
        asking: Cotangents,
        pairs: Sequence[tuple[Tensor, Tensor]],
        inner: dict[int, Tensor],
        *,
        again: bool,
    ) -> None:
        """The vector-Jacobian products of a call; with ``again`` its graph is needed once more."""
        enters, gradients = asking.policy.enters(evaluation.step), asking.gradients
        entry = [call.scaled] if enters else []
        levels = [call.level] if gradients.numbered else []
        inputs = [*entry, *levels, *inner.values()]
        if not inputs:
            return
        leaves, parallel = list(self._leaves.values()), self._trajectory.parallel
        with (
            graph.without_hooks(leaves),
            parallel.catching(leaves),
            self._circumstances.drawing_nothing(evaluation),
        ):
            outputs, cotangents = [output for output, _ in pairs], [mu for _, mu in pairs]
            rest = [*graph.pulled(outputs, inputs, cotangents, retain=again)]
        g = rest.pop(0) if entry else None
        if levels:
            dlevel = rest.pop(0)
            if dlevel is not None:
                each = dlevel[:, None]
                gradients.number(evaluation.c_noise, torch.ones_like(each), each)
        if parallel:
            owned = [parallel.owner(x) is not None for x in inner.values()]
            rest = [None if there else g for there, g in zip(owned, rest, strict=True)]
        gradients.add(list(inner), rest)
        if g is not None:
            asking.enter(call.x, g)

    def _compare_gradients(self, monitor: Monitor, ours: Gradients, theirs: Gradients) -> None:
        """Tells the monitor of two gradients, by what the inputs are to a user."""
        if ours.z0 is not None and theirs.z0 is not None:
            monitor.compare("z0", [ours.z0], [theirs.z0])
        given = len(self._trajectory.noise.tensors)
        kinds = ["cond"] * len(self._cond) + ["noise"] * given + ["start"] * len(self._start)
        kinds += ["parameters"] * len(self._leaves)
        for kind in dict.fromkeys(kinds):
            found = [k for k in ours.tensors if kinds[k] == kind]
            pairs = [(ours.tensors[k], theirs.tensors.get(k)) for k in found]
            if pairs:
                others = [torch.zeros_like(a) if b is None else b for a, b in pairs]
                monitor.compare(kind, [a for a, _ in pairs], others)


def _another(step: int, where: str = "") -> ReplayError:
    return ReplayError(
        "the denoiser must return the same when it is called again, got another output at step "
        f"{step}{where}; does it draw from a generator that is not seen in it, as numpy's, or were "
        "weights or inputs changed since? memory='store' calls it once"
    )


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
        wanted = ctx.needs_input_grad[1:] if ctx.adjoint.whole else graph.wanted(ctx)
        gradients = ctx.adjoint.pulled(lam, kept, wanted)
        sums = (gradients.tensors.get(k) for k in range(len(inputs)))
        rest = [g if g is None else g.to(x.dtype) for g, x in zip(sums, inputs, strict=True)]
        return None, gradients.z0, gradients.numbers(), *rest
