# SPDX-License-Identifier: Apache-2.0
"""The backward of a run between its model calls: cotangents by slot, and what they add up to."""

from collections.abc import Sequence, Set
from typing import Any

import torch
from torch import Tensor

from gradsampler import _checks
from gradsampler.contract import GIVEN, SIGNED_ROLL, Draw
from gradsampler.engine.ownership import large, written_over
from gradsampler.engine.policy import Policy
from gradsampler.engine.program import (
    START,
    Z0,
    Absorption,
    Descent,
    Evaluation,
    Gathering,
    Instruction,
    Pullback,
    Slot,
    Stage,
    column,
    transpose,
)
from gradsampler.engine.trajectory import Trajectory
from gradsampler.noise.sharded import Sharded


class Gradients:
    """Sums of cotangents of what a run is differentiated by; None where it is not."""

    def __init__(self, z0: Tensor | None, numbers: Tensor | None) -> None:
        self.z0 = None if z0 is None else torch.zeros_like(z0)
        self._shape = None if numbers is None else numbers.shape
        self._numbers: dict[int, Tensor] = {}  # by position; 0-d or [B] on the device of the run
        self.tensors: dict[int, Tensor] = {}  # by position in `Adjoint.inputs`
        self._own: set[int] = set()  # those that are sums made here, and in nobody else's hands

    @property
    def numbered(self) -> bool:
        """Whether the coefficients have one."""
        return self._shape is not None

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
            elif k in self._own and _checks.distributed(known):  # of which no list is made
                known.add_(gradient)
            elif k in self._own:
                sums.append(known)
                fresh.append(gradient)
            else:
                wide = torch.promote_types(known.dtype, torch.float32)
                self.tensors[k] = known.to(wide) + gradient
                self._own.add(k)
        if sums:
            torch._foreach_add_(sums, fresh)


class Cotangents:
    """One transposed program on its way, which stops where it needs a model call.

    Args:
        trajectory: whose program is transposed, under its policy.
        z0: [B, *state] of the state's dtype.
        lam: [B, *state] cotangent of the output.
        gradients: what is summed up.
        dtypes: of the model's outputs, filled in before they are needed.
        conditioning: how many tensors of cond come before those of the noise among the inputs.
    """

    def __init__(
        self,
        trajectory: Trajectory,
        z0: Tensor,
        lam: Tensor,
        gradients: Gradients,
        dtypes: dict[Slot, torch.dtype],
        conditioning: int,
    ) -> None:
        program, policy = trajectory.program, trajectory.policy
        self.gradients = gradients
        self._trajectory, self._z0, self._dtypes = trajectory, z0, dtypes
        self._numbers: Any = trajectory.numbers
        self._given = trajectory.given(z0)
        self._noise = conditioning  # position of the noise's tensors
        self._readers = program.readers
        self._cot: dict[Slot, Tensor] = {program.output: lam.to(trajectory.state_dtype)}
        self._seen = {evaluation.state: evaluation for evaluation in program.evaluations}
        self._first = program.first_calls
        whole = policy.reshapes or trajectory.observer.monitored
        transposed = transpose(program) if whole else program.transposed
        parts = (transposed.instructions, transposed.gathered, transposed.dead)
        self._rest = iter(zip(*parts, strict=True))
        self._pullback: Pullback | None = None
        self._ended = False
        self._dead: Set[Slot] = set()
        self._reuses = trajectory.backend.writes and large(z0) and not whole  # by descents
        self._spare: list[Tensor] = []  # the last cotangent of an output that was pulled back

    @property
    def policy(self) -> Policy:
        """What is taken of the derivatives."""
        return self._trajectory.policy

    @property
    def evaluation(self) -> Evaluation | None:
        """The model call that is needed next."""
        return None if self._pullback is None else self._pullback.evaluation

    def advance(self) -> None:
        """Goes on to the next model call, or to the end; there it stays."""
        if self._ended:
            return
        self._drop(self._dead)
        self._pullback = None
        for instruction, gathering, dead in self._rest:
            if isinstance(instruction, Pullback):
                self._pullback, self._dead = instruction, dead
                return
            self._carry(instruction, gathering, dead)
            self._drop(dead)
        self._ended = True
        self.gradients.add_z0(self._cot.get(Z0))
        start = self._noise + len(self._trajectory.noise.tensors)
        self.gradients.add([start], [self._cot.get(START)])

    def of_outputs(self, outputs: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """The outputs of the call that have a cotangent, each with it in its dtype."""
        assert self._pullback is not None
        pairs = zip(self._pullback.evaluation.writes, outputs, strict=True)
        return [
            (output, mu if mu.dtype == output.dtype else mu.to(output.dtype))
            for slot, output in pairs
            if (mu := self._cot.get(slot)) is not None and output.requires_grad
        ]

    def weigh(self, x: Tensor, outputs: Sequence[Tensor]) -> None:
        """Takes note of what the call read and wrote, for the gradient of the coefficients."""
        assert self._pullback is not None
        if not self.gradients.numbered:
            return
        evaluation = self._pullback.evaluation
        for slot, value in zip((evaluation.state, *evaluation.writes), (x, *outputs), strict=True):
            for reader, c in self._readers.get(slot, ()):
                if reader in self._cot:
                    self.gradients.number(c, value.detach(), self._cot[reader])

    def enter(self, x: Tensor, g: Tensor) -> None:
        """Takes the cotangent of the model's input, which was ``x`` times c_in."""
        assert self._pullback is not None
        evaluation = self._pullback.evaluation
        self._trajectory.observer.finite(evaluation, g, "the gradient")
        self.gradients.number(evaluation.c_in, x, g)
        self._cot[self._pullback.writes] = g

    def told(self) -> None:
        """Tells the observer of the call's cotangents."""
        assert self._pullback is not None
        evaluation = self._pullback.evaluation
        outputs = [self._cot.get(slot) for slot in evaluation.writes]
        self._trajectory.observer.pulled(evaluation, outputs, self._cot.get(self._pullback.writes))

    def _drop(self, dead: Set[Slot]) -> None:
        for slot in dead:
            cotangent = self._cot.pop(slot, None)
            if self._reuses and slot.kind == "d" and cotangent is not None:
                self._spare = [cotangent]

    def _carry(
        self, instruction: Instruction, gathering: Gathering | None, dead: Set[Slot]
    ) -> None:
        if isinstance(instruction, Stage):
            self._combine(instruction)
        elif isinstance(instruction, Descent):
            assert gathering is not None
            self._descend(instruction, gathering, dead)
        elif isinstance(instruction, Absorption) and instruction.state in self._cot:
            self._absorb(instruction, self._cot[instruction.state])

    def _combine(self, stage: Stage) -> None:
        slot = stage.writes
        terms = tuple(term for term in stage.terms if term[0] in self._cot)
        if slot in self._given:
            for reader, c in terms:
                self.gradients.number(c, self._given[slot], self._cot[reader])
        if not terms or slot.kind == "c":
            return
        lam = self._trajectory.combine(terms, self._cot)
        if slot in self._seen:
            self._trajectory.observer.descended(self._seen[slot], lam)
            if slot in self._first:
                lam = self.policy.passes(self._first[slot], lam)
        self._cot[slot] = lam

    def _memory(
        self, lams: Sequence[Slot], dead: Set[Slot], draw: Draw | None, mu_dtype: torch.dtype | None
    ) -> dict[str, Tensor]:
        """What a descent may write over: a cotangent that dies in it, and one that has died."""
        memory: dict[str, Tensor] = {}
        spare, self._spare = self._spare, []
        if not self._reuses:
            return memory
        if spare and mu_dtype is not None:
            found = written_over(spare, 0)
            if found is not None and (found.shape, found.dtype) == (self._z0.shape, mu_dtype):
                memory["mu_out"] = found
        if draw is None or draw.kind != SIGNED_ROLL:  # which reads of other places
            for slot in lams:
                found = written_over(self._cot, slot) if slot in dead else None
                if found is not None and found.dtype == self._trajectory.state_dtype:
                    memory["lam_out"] = found
                    break
        return memory

    def _descend(self, descent: Descent, gathering: Gathering, dead: Set[Slot]) -> None:
        """The cotangents of a state and of an output of the evaluation before, in one launch."""
        cot, gradients = self._cot, self.gradients
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
        mu_dtype = None if output is None else self._dtypes[output.writes]
        memory = self._memory(lams, dead, draw, mu_dtype)
        cot[slot], mu = self._trajectory.backend.adjoint(
            [cot[s] for s in lams],
            a,
            None if g is None else cot[g],
            g_scale,
            b,
            self._z0,
            draw,
            self._numbers[absorption.injection.coefficient] if absorption else 0.0,
            gradients.z0,
            mu_dtype=mu_dtype,
            lam_dtype=self._trajectory.state_dtype,
            **memory,
        )
        if mu is not None and output is not None and any(s in cot for s, _ in output.terms):
            cot[output.writes] = mu
        if absorption is not None and (draw is None or gradients.numbered):
            done = draw is not None or self._absorb_part(absorption, cot[slot])
            if gradients.numbered or not done:
                self._absorb(absorption, cot[slot], done=done)
        for further in descent.absorptions[1:]:
            self._absorb(further, cot[slot])

    def _draw(self, absorption: Absorption) -> Draw | None:
        """The injection as numbers, if a kernel can pull a cotangent back through it."""
        draw = self._trajectory.draw(absorption.injection, self._z0)
        return None if draw is None or draw.kind == GIVEN else draw

    def _absorb(self, absorption: Absorption, lam: Tensor, *, done: bool = False) -> None:
        """Pulls a cotangent back through the noise injected into its state.

        With ``done`` the share of z0 is known already, and the amount of noise is what remains.
        """
        noise, name = self._trajectory.noise, self._trajectory.name(absorption.injection)
        position = absorption.injection.coefficient
        if self.gradients.numbered:
            self.gradients.number(position, noise.at(self._z0, *name), lam)
        if done:
            return
        amount = column(self._numbers[position], lam)
        cotangent = noise.transpose(lam * amount, self._z0, *name)
        if cotangent.z0 is not None:
            observer = self._trajectory.observer
            observer.absorbed(absorption.state, absorption.injection, cotangent.z0)
        self.gradients.add_z0(cotangent.z0)
        positions = [self._noise + k for k in cotangent.tensors]
        self.gradients.add(positions, list(cotangent.tensors.values()))

    def _absorb_part(self, absorption: Absorption, lam: Tensor) -> bool:
        """Has the backend do for a part of a batch what it does within a launch for the whole.

        Returns:
            Whether it does that, so that the share of z0 is known.
        """
        noise, name = self._trajectory.noise, self._trajectory.name(absorption.injection)
        gradients = self.gradients
        if not isinstance(noise, Sharded) or not noise.of_z0 or gradients.z0 is None:
            return False
        if self._trajectory.program.by_sample:
            return False
        window = noise.window(self._z0)
        draw = window.source.draw(window.z0, *name)
        if draw is None or draw.kind == GIVEN:
            return False
        dz0 = window.spread(gradients.z0)
        self._trajectory.backend.adjoint_step(
            [window.spread(lam)],
            [1.0],
            None,
            0.0,
            None,
            window.z0,
            draw,
            self._numbers[absorption.injection.coefficient],
            dz0,
            mu_dtype=None,
            lam_dtype=self._trajectory.state_dtype,
        )
        gradients.z0.copy_(window.own(dz0))
        return True
