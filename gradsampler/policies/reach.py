# SPDX-License-Identifier: Apache-2.0
"""A trajectory under a policy, and what the policy cuts off from the sample."""

import warnings
from collections.abc import Iterable, Sequence, Set
from dataclasses import replace

import torch
from torch import Tensor

from gradsampler import _checks
from gradsampler.engine.cut import noise_slot
from gradsampler.engine.policy import Policy
from gradsampler.engine.program import (
    START,
    Z0,
    Evaluation,
    Injection,
    Program,
    Slot,
    Stage,
)
from gradsampler.engine.trajectory import Trajectory
from gradsampler.policies.together import Together


def applied(policy: Policy, trajectory: Trajectory, z0: Tensor, name: str) -> Trajectory:
    """The trajectory under a policy, which runs what that needs; warns of what receives nothing.

    Args:
        policy: as a user gives it.
        trajectory: of which nothing has run.
        z0: [B, *state] of the state's dtype.
        name: of the argument that asks for the policy, with its value.
    """
    start, placed = trajectory.start, policy.placed(trajectory.program.num_steps)
    if not trajectory.policy.exact:
        placed = Together([trajectory.policy, placed])
    taken = replace(trajectory, policy=placed)
    cut = placed.cut(trajectory.program, trajectory.given(z0))
    if cut is not None:
        slots = _head(trajectory, z0, cut.start) | _noises(trajectory, z0, cut.early)
        constants = {cut.names[slot]: x for slot, x in slots.items()}
        taken = replace(taken, program=cut.program, constants=constants, start=None)
    why = "since what leads from it to the sample is constant under this gradient; take the exact"
    if z0.requires_grad and not reaches(taken, Z0):
        text = f"{name}: the gradient to z0 is zero, {why} one, or noise that is made of z0"
        warnings.warn(text, stacklevel=_checks.callers())
    if start is not None and start.requires_grad and not reaches(taken, START):
        text = f"{name}: start receives no gradient, {why} one"
        warnings.warn(text, stacklevel=_checks.callers())
    return taken


def reaches(trajectory: Trajectory, source: Slot) -> bool:
    """Whether a gradient passes from the output to z0 or to the start."""
    injected = source == Z0 and trajectory.noise.of_z0
    return trajectory.program.output in reached(
        trajectory.program, trajectory.policy, {source}, injected=injected
    )


def reached(
    program: Program, policy: Policy, sources: Set[Slot], *, injected: bool
) -> frozenset[Slot]:
    """The slots that depend on ``sources``, and with ``injected`` on a noise."""
    fixed = (program.coefficients == 0).reshape(len(program.coefficients), -1).all(1).tolist()
    found = set(sources)
    for i in program.instructions:
        if isinstance(i, Stage):
            noise = injected and any(not fixed[each.coefficient] for each in i.injections)
            if noise or any(slot in found and not fixed[c] for slot, c in i.terms):
                found.add(i.writes)
        elif isinstance(i, Evaluation):
            passed = policy.pulls(i.step) and policy.enters(i.step)
            found |= set(i.writes) if passed and i.state in found else set()
    return frozenset(found)


def _head(trajectory: Trajectory, z0: Tensor, stop: int) -> dict[Slot, Tensor]:
    """Runs to before instruction ``stop``; returns the tensors that the rest of the run reads.

    Grad mode is on in each model call, as with every other gradient, and its graph is dropped.
    """
    tensors = [x.detach() for x in trajectory.cond.tensors]

    def evaluate(evaluation: Evaluation, x: Tensor, scaled: Tensor | None) -> Sequence[Tensor]:
        scaled, level = trajectory.model_input(evaluation, x, scaled)
        with torch.enable_grad():
            outputs = trajectory.call(evaluation, scaled, level, trajectory.cond.filled(tensors))
        return [output.detach() for output in outputs]

    with torch.no_grad():
        slots = {slot: x.detach() for slot, x in trajectory.given(z0).items()}
        trajectory.execute(slots, 0, stop, z0.detach(), evaluate)
    return slots


def _noises(
    trajectory: Trajectory, z0: Tensor, injections: Iterable[Injection]
) -> dict[Slot, Tensor]:
    """The noises of those injections."""
    with torch.no_grad():
        return {
            noise_slot(injection): trajectory.noise.at(z0, *trajectory.name(injection)).detach()
            for injection in injections
        }
