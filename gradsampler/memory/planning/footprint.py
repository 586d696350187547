# SPDX-License-Identifier: Apache-2.0
"""What one model call costs: measured once, forward and backward, without a run."""

import gc
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from gradsampler.engine import graph
from gradsampler.engine.adjoint import Adjoint, Call
from gradsampler.engine.program import Evaluation
from gradsampler.engine.trajectory import Trajectory
from gradsampler.memory.checkpoint import Resident
from gradsampler.memory.planning import drawn
from gradsampler.memory.planning.gauge import gauge
from gradsampler.memory.saved import Saved, address
from gradsampler.repetition import RandomState


@dataclass(frozen=True)
class Footprint:
    """Bytes and seconds of one evaluation of the model, forward and backward.

    The peaks count from the state on: the model's input, the outputs and what the backward returns
    are in them, the state and the outputs' cotangents are not.
    """

    elements: int  # of a state
    state: int  # bytes of a state
    model_input: int  # bytes of the scaled state; 0 where that is the state itself
    outputs: tuple[int, ...]  # bytes of each network call's output
    output_dtype: torch.dtype
    activations: int  # bytes that autograd keeps beside input and outputs
    keeps_input: bool  # whether it keeps these too
    keeps_outputs: bool
    gradients: int  # bytes of the gradients of parameters, conditioning and levels
    sums: int  # bytes of their sums over calls
    largest_sum: int  # of these
    compared: int  # bytes by which a call is compared with the one that is made again
    held: int  # bytes alive after the call
    forward_peak: int
    backward_peak: int
    forward_seconds: float
    backward_seconds: float
    drawn: drawn.Drawn  # what one injection costs, beside the state that it is added to


def measured(trajectory: Trajectory, z0: Tensor) -> Footprint:
    """The footprint of an evaluation in a run from ``z0`` [B, *state] in its state dtype: of the
    first one with the most outputs, on the first state.

    One forward and one backward of the model, and one noise where no kernel draws it, under the
    circumstances of this moment (autocast, train mode). Random state, buffers of modules and
    ``.grad`` stay as they are. On CUDA the peak statistics of the allocator start anew. On the CPU
    a `torch.compile`d model is measured as it runs uncompiled.
    """
    with undisturbed(trajectory.buffers(), z0.device):
        return _Probe(trajectory, z0).footprint


def size(x: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return x.numel() * x.element_size()


class _Probe(Adjoint):
    """The first model call of a run, and its backward."""

    footprint: Footprint

    def __init__(self, trajectory: Trajectory, z0: Tensor) -> None:
        super().__init__(trajectory, Resident(), z0)

    def _run(self) -> Tensor:
        trajectory, evaluations = self._trajectory, self._trajectory.program.evaluations
        first, evaluation = evaluations[0], max(evaluations, key=lambda each: len(each.writes))
        start = trajectory.program.instructions.index(first)
        slots = trajectory.given(self._z0)
        trajectory.execute(slots, 0, start, self._z0, _never)
        x = slots[first.state]
        given = trajectory.given(self._z0).values()
        known = [*given, *self._cond, *trajectory.buffers()]
        counter = gauge(x.device)
        with counter:
            torch.zeros((), device=x.device)  # torch imports now what the first use of a mode needs
        noise = drawn.measured(trajectory, self._z0)
        with counter, Saved(known) as saved:
            call = self._first(evaluation, x, None)
        forward_peak, held = counter.peak, counter.live
        cotangents = [torch.ones_like(output) for output in call.outputs]
        with counter, timed(x.device) as backward:
            gradients = self._pulled(call, cotangents)
        sums = [g.numel() * max(4, g.element_size()) for g in gradients]
        compared = sum(sketch.size for each in self._sketches.values() for sketch in each)
        same = address(call.scaled) == address(x)
        self.footprint = Footprint(
            elements=x.numel(),
            state=size(x),
            model_input=0 if same else size(call.scaled),
            outputs=tuple(size(output) for output in call.outputs),
            output_dtype=call.outputs[0].dtype,
            activations=saved.beside([call.scaled, *call.outputs]),
            keeps_input=saved.has(call.scaled),
            keeps_outputs=any(saved.has(output) for output in call.outputs),
            gradients=sum(size(g) for g in gradients),
            sums=sum(sums),
            largest_sum=max(sums, default=0),
            compared=compared,
            held=held - compared,
            forward_peak=forward_peak - compared,
            backward_peak=max(counter.peak, held) - compared,
            forward_seconds=sum(self._seconds),
            backward_seconds=sum(backward),
            drawn=noise,
        )
        return self._z0

    def _call(self, evaluation: Evaluation, x: Tensor, scaled: Tensor | None = None) -> Call:
        with timed(x.device) as self._seconds:
            return super()._call(evaluation, x, scaled)

    def _pulled(self, call: Call, cotangents: list[Tensor]) -> list[Tensor]:
        """The gradients of a call, without that of its input."""
        pairs = [p for p in zip(call.outputs, cotangents, strict=True) if p[0].requires_grad]
        inner = [call.level, *self._cond, *self._leaves.values()]
        if not pairs:
            return []
        with graph.without_hooks(list(self._leaves.values())):
            _, *rest = torch.autograd.grad(
                [output for output, _ in pairs],
                [call.scaled, *(x for x in inner if x.requires_grad)],
                [mu for _, mu in pairs],
                allow_unused=True,
                retain_graph=self._outer,
            )
        return [g for g in rest if g is not None]


def _never(evaluation: Evaluation, x: Tensor, scaled: Tensor | None) -> Sequence[Tensor]:
    raise AssertionError("no evaluation comes before the first")


@contextmanager
def timed(device: torch.device) -> Iterator[list[float]]:
    """Appends the seconds that a with statement takes, the device's work included.

    Without the garbage collector, which may take longer than a small network.
    """
    module = None if device.type == "cpu" else torch.get_device_module(device)
    seconds: list[float] = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        if module is not None:
            module.synchronize(device)
        begin = time.perf_counter()
        yield seconds
        if module is not None:
            module.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    finally:
        if collecting:
            gc.enable()


@contextmanager
def undisturbed(
    buffers: Iterable[Tensor], device: torch.device, generators: Sequence[torch.Generator] = ()
) -> Iterator[None]:
    """Afterwards the random state and the buffers are as they were."""
    random = RandomState(device, generators=generators)
    copies = [(x, x.clone()) for x in buffers]
    try:
        yield
    finally:
        random.restore()
        with torch.no_grad():
            for x, copy in copies:
                if not torch.equal(x, copy):
                    x.copy_(copy)
