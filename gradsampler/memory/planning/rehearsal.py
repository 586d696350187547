# SPDX-License-Identifier: Apache-2.0
"""A run and its backward with sizes in place of tensors: what each strategy has alive at most.

It follows `Trajectory.execute`, `Adjoint` and the strategies instruction by instruction, and says
what these hold at the time of each model call.
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass

from gradsampler.engine.cut import Cut
from gradsampler.engine.policy import EXACT, Policy
from gradsampler.engine.program import (
    START,
    Z0,
    Absorption,
    Descent,
    Evaluation,
    Program,
    Pullback,
    Slot,
    Stage,
    fused,
    transpose,
)
from gradsampler.memory import multistage
from gradsampler.memory.multistage import Advance, Restore, Tape
from gradsampler.memory.planning.footprint import Footprint
from gradsampler.memory.planning.heap import Block, Heap, Table, copied, shared
from gradsampler.policies.reach import reached

# Bytes an element of signs in plain torch, which transposes the injection that ends a run; kernels
# transpose the others.
_SIGNS = 24


@dataclass(frozen=True)
class Cost:
    """What a run and its backward take with one strategy."""

    peak: int  # bytes on the device, beyond what was there before the run
    host: int  # bytes in the host's memory where the run is on another device
    calls: int  # evaluations of the model, those of the run included
    pulled: int  # of them, those that backward differentiates


Evaluate = Callable[[Block], Sequence[Block]]


class Rehearsal:
    """One run, and one backward of it, from nothing.

    Args:
        program: what is run.
        footprint: of the one of its evaluations with the most outputs; all are taken to be alike.
        converted: whether z0 has another dtype than the state.
        after: bytes that a decoder and a loss take between the run and its backward.
        policy: of the gradient, placed in the run.
        given: slots that are there before the first instruction.
        injected: whether the noises are made of z0.
    """

    def __init__(
        self,
        program: Program,
        footprint: Footprint,
        *,
        converted: bool = False,
        after: int = 0,
        policy: Policy = EXACT,
        given: Collection[Slot] = (Z0,),
        injected: bool = True,
    ) -> None:
        self._program, self._footprint, self._policy = program, footprint, policy
        self._heap, self._calls, self._pulled, self._after = Heap(), 0, 0, after
        if converted:
            self._heap.new(footprint.state)
        cut = policy.cut(program, given)
        if cut is not None:
            self._head(cut)
        sources = {Z0, START} & set(given) if cut is None else {Z0}
        self._reached = reached(self._program, policy, sources, injected=injected)
        self._evaluations, instructions = self._program.evaluations, self._program.instructions
        self._starts = [k for k, i in enumerate(instructions) if isinstance(i, Evaluation)]
        self._starts.append(len(instructions))

    def _head(self, cut: Cut) -> None:
        """The steps before a cut, which leave constants behind."""
        left: Table = {}
        self._execute(left, 0, cut.start, lambda _: self._called())
        for _ in cut.early:
            self._heap.new(self._footprint.state)
        self._program = cut.program

    def store(self) -> Cost:
        """Plain autograd: everything that the calls keep."""
        cost, graphs, noises = self._footprint, list[list[Block]](), list[Block]()
        learned = self._program.coefficients.requires_grad  # then the stages keep what they read

        def evaluate(x: Block) -> Sequence[Block]:
            outputs, kept = self._called(), noises.copy()
            noises.clear()
            recorded = self._recorded(self._evaluations[len(graphs)])
            if recorded:
                kept.append(self._heap.new(cost.activations))
            if recorded and cost.keeps_input:
                kept.append(self._heap.new(cost.model_input) if cost.model_input else shared(x))
            if learned:
                kept.append(shared(x))
            if learned or (recorded and cost.keeps_outputs):
                kept += map(shared, outputs)
            graphs.append(kept)
            return outputs

        self._execute({}, 0, self._starts[-1], evaluate, noises)
        graphs[-1] += noises
        self._transposed(graphs.pop, skipped=graphs.pop)
        return self._cost()

    def checkpoint(self) -> Cost:
        """All states, one call's activations."""
        self._compared()
        states, evaluations = list[Block](), iter(self._evaluations)

        def evaluate(x: Block) -> Sequence[Block]:
            if self._recalled(next(evaluations)):
                states.append(shared(x))
            return self._called()

        self._execute({}, 0, self._starts[-1], evaluate)
        self._transposed(self._again)
        return self._cost()

    def offload(self) -> Cost:
        """All states on the host, two on their way."""
        self._compared()
        states, evaluations = deque[Block](), iter(self._evaluations)

        def evaluate(x: Block) -> Sequence[Block]:
            if self._recalled(next(evaluations)):
                while len(states) >= 2:
                    self._heap.drop(states.popleft())
                states.append(shared(x))
            return self._called()

        self._execute({}, 0, self._starts[-1], evaluate)
        while states:
            self._heap.drop(states.popleft())
        self._heap.new(2 * self._footprint.state)  # the one that is worked on and the one before it
        self._transposed(self._again)
        count = sum(map(self._recalled, self._evaluations))
        return self._cost(host=self._footprint.state * count)

    def reversible(self, width: int) -> Cost:
        """Two integers of ``width`` bytes an element, and no states."""
        cost = self._footprint
        self._compared()
        self._heap.new(2 * width * cost.elements)
        x = self._heap.new(cost.state)
        injections = max(len(stage.injections) for stage in self._program.stages)

        def leap() -> None:
            for block in self._drawn(injections):
                self._heap.drop(block)

        def again() -> list[Block]:
            call = [self._heap.new(cost.state), *self._again()]
            leap()
            return call

        for _ in self._evaluations:
            outputs = self._called()
            leap()
            following = self._heap.new(cost.state)
            for block in (x, *outputs):
                self._heap.drop(block)
            x = following
        self._transposed(again, skipped=again)
        return self._cost()

    def revolve(self, slots: int) -> Cost:
        """Snapshots, at most ``slots`` at a time, by the schedule of `memory.Revolve`."""
        self._compared()
        schedule = multistage.schedule(len(self._starts) - 1, slots)
        snapshots: dict[int, Table] = {}
        work: Table = {}
        taped: list[Block] = []

        def advance(action: Advance) -> None:
            if action.snapshot:
                snapshots[action.start] = copied(work)
            start, stop = self._starts[action.start], self._starts[action.stop]
            self._execute(work, start, stop, lambda _: self._called())

        def tape(x: Block) -> Sequence[Block]:
            outputs = self._called()
            taped.extend([shared(x), *map(shared, outputs), self._heap.new(self._graph())])
            return outputs

        def again() -> list[Block]:
            while not taped:
                action = next(schedule)
                if isinstance(action, Restore):
                    work.update(copied(snapshots[action.evaluation]))
                    if action.last:
                        self._heap.clear(snapshots.pop(action.evaluation))
                elif isinstance(action, Tape):
                    for output in tape(work[self._evaluations[action.evaluation].state]):
                        self._heap.drop(output)
                    self._heap.clear(work)
                else:
                    advance(action)
            call = taped.copy()
            taped.clear()
            return call

        self._execute(work, 0, self._starts[0], lambda _: ())
        for action in schedule:
            if isinstance(action, Tape):
                break
            if isinstance(action, Advance):
                advance(action)
        self._execute(work, self._starts[-2], self._starts[-1], tape)
        work.clear()  # but for the output, which stays to the end
        self._transposed(again, skipped=again)
        return self._cost()

    def _compared(self) -> None:
        """What calls are compared by, of all of them."""
        self._heap.new(self._footprint.compared * len(self._evaluations))

    def _cost(self, host: int = 0) -> Cost:
        return Cost(self._heap.peak, host, self._calls, self._pulled)

    def _recalled(self, evaluation: Evaluation) -> bool:
        """Whether backward makes a call again; as `Trajectory.recalled`."""
        learned = self._program.coefficients.requires_grad
        return learned or self._policy.pulls(evaluation.step)

    def _recorded(self, evaluation: Evaluation) -> bool:
        """Whether autograd finds a call: by its input, or by something else that has a gradient."""
        policy, step = self._policy, evaluation.step
        seen = policy.enters(step) and evaluation.state in self._reached
        return policy.pulls(step) and (seen or self._footprint.gradients > 0)

    def _execute(
        self,
        slots: Table,
        start: int,
        stop: int,
        evaluate: Evaluate,
        noises: list[Block] | None = None,
    ) -> None:
        """As `Trajectory.execute`; z0 was there before. ``noises`` takes what autograd keeps."""
        instructions, last_reads = self._program.instructions, self._program.dead
        for instruction, dead in zip(instructions[start:stop], last_reads[start:stop], strict=True):
            if isinstance(instruction, Stage):
                drawn = self._drawn(len(instruction.injections), kept=noises is not None)
                slots[instruction.writes] = self._heap.new(self._footprint.state)
                if len(instruction.injections) > 1:  # a launch more
                    self._heap.touch(self._footprint.state)
                for block in drawn if noises is None else ():
                    self._heap.drop(block)
                if noises is not None:
                    noises += drawn
            elif isinstance(instruction, Evaluation):
                outputs = evaluate(slots[instruction.state])
                for block in outputs[len(instruction.writes) :]:  # of a call of fewer branches
                    self._heap.drop(block)
                slots.update(zip(instruction.writes, outputs, strict=False))
            self._heap.clear(slots, dead)

    def _drawn(self, count: int, *, kept: bool = False) -> list[Block]:
        """The noises of a stage where no kernel draws them, or with all that autograd keeps."""
        cost = self._footprint.drawn
        blocks = []
        for _ in range(count):
            self._heap.touch(cost.peak)
            blocks.append(self._heap.new(cost.kept if kept else cost.noise))
        return blocks

    def _transposed(
        self,
        again: Callable[[], list[Block]],
        skipped: Callable[[], list[Block]] = list,
    ) -> None:
        """As `Adjoint._transposed`; ``again`` makes what is alive of the next call to pull back,
        and ``skipped`` of one that is not pulled back.
        """
        self._heap.touch(self._after)
        cost, cot = self._footprint, Table()
        cot[self._program.output] = shared(self._heap.new(cost.state))  # its caller keeps it too
        self._heap.new(cost.state)  # dz0
        gathered, transposed = 0, transpose(self._program)
        if not self._policy.reshapes:
            transposed = fused(transposed)
        # Through how many of a state's noises the kernel pulls back, and what plain torch takes.
        fused_in = 0 if cost.drawn.pulled else 1
        absorbed = cost.state + (cost.drawn.pulled or _SIGNS * cost.elements)
        for instruction, dead in zip(transposed.instructions, transposed.last_reads(), strict=True):
            if isinstance(instruction, Pullback):
                evaluation = instruction.evaluation
                call = again() if self._recalled(evaluation) else skipped()
                enters = self._policy.enters(evaluation.step)
                pulled = self._policy.pulls(evaluation.step) and (enters or cost.gradients > 0)
                if pulled:
                    self._pulled += 1
                    self._heap.touch(cost.backward_peak - cost.held)
                for block in call:
                    self._heap.drop(block)
                if pulled and enters:
                    cot[instruction.writes] = self._heap.new(cost.model_input or cost.state)
                if not pulled:
                    self._heap.clear(cot, dead)
                    continue
                if gathered:  # the new ones, and one sum at a time
                    self._heap.touch(cost.gradients + cost.largest_sum)
                now = cost.sums if gathered else cost.gradients
                self._heap.new(now - gathered)
                gathered = now
            elif isinstance(instruction, Absorption):
                self._heap.touch(absorbed)
            else:
                for slot in _written(instruction):
                    if slot.kind != "c":
                        cot[slot] = self._heap.new(self._size(slot))
                if isinstance(instruction, Descent) and len(instruction.absorptions) > fused_in:
                    self._heap.touch(absorbed)
            self._heap.clear(cot, dead)

    def _called(self) -> list[Block]:
        """A call of which the outputs stay."""
        self._calls += 1
        self._heap.touch(self._footprint.forward_peak)
        return [self._heap.new(size) for size in self._footprint.outputs]

    def _again(self) -> list[Block]:
        """A call made again on a state that is there, with its graph."""
        return [*self._called(), self._heap.new(self._graph())]

    def _graph(self) -> int:
        """Bytes of a call with its graph, without the outputs."""
        return max(0, self._footprint.held - sum(self._footprint.outputs))

    def _size(self, slot: Slot) -> int:
        outputs = self._footprint.outputs
        branch = min(slot.branch, len(outputs) - 1)
        return outputs[branch] if slot.kind == "d" else self._footprint.state


def _written(instruction: object) -> Iterator[Slot]:
    if isinstance(instruction, Descent):
        yield instruction.state.writes
        if instruction.output is not None:
            yield instruction.output.writes
    elif isinstance(instruction, Stage):
        yield instruction.writes
