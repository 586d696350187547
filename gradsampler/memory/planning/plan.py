# SPDX-License-Identifier: Apache-2.0
"""What each strategy will take, before the run."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gradsampler import _checks, arguments, policies
from gradsampler.arguments import Denoiser
from gradsampler.elementary import Coefficient
from gradsampler.engine import parts
from gradsampler.engine.policy import Policy
from gradsampler.memory import capacity
from gradsampler.memory.base import Memory
from gradsampler.memory.capacity import readable
from gradsampler.memory.planning import following, footprint
from gradsampler.memory.planning.following import After, Following
from gradsampler.memory.planning.footprint import Footprint, undisturbed
from gradsampler.memory.planning.predictor import Predictor, Row
from gradsampler.memory.reversible import Reversible
from gradsampler.noise.sources import NoiseSource
from gradsampler.parameterization import Parameterization
from gradsampler.solvers import Churn, Solver

_TIE = 1.02  # times that are no farther apart count as the same


@dataclass(frozen=True)
class Plan:
    """What each strategy takes. Printing it shows a table; iterating gives its rows."""

    rows: tuple[Row, ...]
    budget: int  # bytes
    predictor: Predictor

    @property
    def footprint(self) -> Footprint:
        """What one call of the denoiser costs."""
        return self.predictor.footprint

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    @property
    def best(self) -> Memory:
        """The fastest strategy that fits; ValueError with the way out where none does."""
        row = self._best()
        if row is None:
            least = min(self.rows, key=lambda row: row.peak)
            _checks.fail(
                "budget",
                f"hold at least the {readable(least.peak)} of {least.name}",
                readable(self.budget),
                _WAY_OUT,
            )
        return row.memory

    def _best(self) -> Row | None:
        fitting = [row for row in self.rows if row.fits]
        fastest = min((row.factor for row in fitting), default=0.0)
        return next((row for row in fitting if row.factor <= _TIE * fastest), None)

    def __str__(self) -> str:
        lines = [("memory", "peak", "host", "evaluations", "time", "exact", "fits")]
        for row in self.rows:
            host = readable(row.host) if row.host else "-"
            exact, fits = ("yes" if flag else "no" for flag in (row.exact, row.fits))
            counts = (f"{row.evaluations:.2f}", f"{row.factor:.2f}")
            lines.append((row.name, readable(row.peak), host, *counts, exact, fits))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = [
            "  ".join([cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])])
            for cells in lines
        ]
        best, call = self._best(), self.footprint
        then = self.predictor.following
        chosen = f"nothing exact fits: {_WAY_OUT}" if best is None else f"best: {best.name}"
        return "\n".join(
            [
                *table,
                f"one call: activations {readable(call.activations)}, state {readable(call.state)}"
                f", forward {call.forward_seconds:.2g} s, backward {call.backward_seconds:.2g} s",
                *(
                    [f"after the run: {readable(then.peak)}, {then.seconds:.2g} s"]
                    * (then.peak > 0)
                ),
                f"budget {readable(self.budget)}; {chosen}",
            ]
        )


_WAY_OUT = (
    "take a smaller batch, activation checkpointing within the denoiser, or "
    "gs.memory.Truncated(steps, inner), which is not the gradient of the run"
)


def plan(
    denoiser: Parameterization | Denoiser,
    z0: Tensor,
    sigmas: Tensor | Sequence[float],
    *,
    budget: int | str | None = None,
    solver: str | Solver = "euler",
    prediction: str = "x0",
    noise: NoiseSource | None = None,
    churn: Churn | None = None,
    eta: Coefficient | None = None,
    s_noise: Coefficient = 1.0,
    start: Tensor | None = None,
    final_denoise: bool = False,
    cond: Mapping[str, Any] | None = None,
    state_dtype: torch.dtype | None = None,
    backend: str | None = None,
    modules: Sequence[nn.Module] = (),
    after: After | None = None,
    gradient: Policy | Sequence[Policy] | None = None,
) -> Plan:
    """Predicts what each memory strategy takes for a run and its backward.

    It calls the denoiser once, at the first level, forward and backward, and assumes that all calls
    cost the same. Use the same circumstances as in the run: autocast, train mode. Random state,
    buffers and ``.grad`` stay as they are. If the first call takes longer than others (a kernel
    search, a compilation), make one before, or the times will be too large; bytes are right.

    Args:
        denoiser, z0, sigmas, solver, prediction, noise, churn, eta, s_noise: as for
            `gradsampler.sample`. A gradient to z0 is planned for.
        start, final_denoise, cond, state_dtype, backend, modules: as for `gradsampler.sample`.
        after: a function from a sample [B, *state] to a scalar loss, such as
            ``lambda x: loss(gs.decode(decoder, x))``. It is called once too, and what it takes,
            forward and backward, is included in all peaks.
        gradient: as for `gradsampler.sample`. Steps and calls that a policy leaves out cost less;
            ``factor`` is the time relative to store with the exact gradient.
        budget: bytes, or a text such as "8GiB" (1024^3) or "500MB"; None is what is free now on
            the device of z0.

    Returns:
        A `Plan` with a row for store, reversible (where the steps can be undone), checkpoint,
        offload (on a device other than the CPU), and revolve with the fewest calls that fit, or
        with one slot, where that takes less than checkpoint; without the package
        checkpoint-schedules there is no row of revolve. ``gs.sample(..., memory=plan.best)`` takes
        the fastest.

    Raises:
        ValueError, TypeError: naming the argument that does not fit, before any model call.

    Example:
        >>> import torch, gradsampler as gs
        >>> z0, levels = torch.zeros(4, 4096), gs.schedules.karras(50)
        >>> plan = gs.memory.plan(lambda x, sigma: x.tanh().cos(), z0, levels, budget="1MB")
        >>> [row.name for row in plan], [row.evaluations for row in plan]
        (['store', 'checkpoint', 'revolve:3'], [1.0, 2.0, 4.6])
        >>> plan.best
        Revolve(slots=3, further=0, to='cpu')
    """
    z0 = _checks.batched("z0", z0).detach()
    if after is not None and not callable(after):
        _checks.fail_type("after", "be callable as after(sample)", after)
    room = None if budget is None else capacity.parsed("budget", budget)
    program, model = arguments.record(
        denoiser,
        sigmas,
        solver=solver,
        prediction=prediction,
        churn=churn,
        eta=eta,
        s_noise=s_noise,
        final_denoise=final_denoise,
        started=start is not None,
    )
    trajectory = arguments.trajectory(
        program,
        model.naming(modules),
        z0,
        start=arguments.checked_start(start, z0, program),
        noise=noise,
        cond=cond,
        state_dtype=state_dtype,
        backend=backend,
    )
    policy = policies.resolve(gradient)
    with undisturbed((), z0.device, parts.reachable(policy).generators):
        placed = policy.placed(program.num_steps)
    room = capacity.free(z0.device) if room is None else room
    if room is None:
        _checks.fail("budget", "be given where the free memory is not known", budget)
    z = z0.to(trajectory.state_dtype)
    integers = Reversible().integers(trajectory, z)
    then = Following() if after is None else following.measured(after, z0)
    call = footprint.measured(trajectory, z.requires_grad_())
    converted = z0.dtype != trajectory.state_dtype
    given = tuple(trajectory.given(z))
    predictor = Predictor(
        program,
        call,
        converted,
        room,
        integers,
        then,
        placed,
        given,
        injected=trajectory.noise.of_z0,
    )
    return Plan(tuple(predictor.rows(away=z0.device.type != "cpu")), room, predictor)
