# SPDX-License-Identifier: Apache-2.0
"""How a gradient fares on its way through a run, call by call."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gradsampler import _checks
from gradsampler.engine.policy import Policy
from gradsampler.engine.program import Evaluation, Injection, Program, Slot, column

__all__ = ["Monitor", "MonitoredCall"]


class MonitoredCall(NamedTuple):
    """One model call; numbers that were not measured, as of a call not reached, are NaN."""

    step: int
    sigma: float  # the noise level of the call, of the noisiest sample
    lam: float  # |dL/dx|, the cotangent of the state that the call sees
    state: float  # of that the share that comes by the state itself, around the network
    network: float  # and the share that comes through the network
    # |share of dL/dz0| through the noise that the step injects, at its first call; of several
    # injections the root of the sum of squares.
    noise: float
    gain: float  # |J^T w|/|w|, J the Jacobian of the denoised sample D, w = dL/dD
    beside: float  # |dL/dx| of the gradient that is taken beside
    cosine: float  # between the two


_NORMS = MonitoredCall._fields[2:8]


class Monitor:
    """Records the gradient at each step of a run's backward, without extra model calls.

    After the backward, printing it shows a table of its `calls`; `gradient_health.draw` draws it.
    It describes the latest run and the latest backward.

    The gain is that of the clean prediction D which the solver uses, guidance included. Solvers
    that use guidance's predictions separately (those named cfg_pp) have none.

    Args:
        beside: a policy of `gradsampler.policies`. Its gradient is computed as well, by additional
            vector-Jacobian products in the same model calls, and compared with that of the run.
            Not with memory="store".

    Example:
        >>> import torch, gradsampler as gs
        >>> monitor, z0 = gs.Monitor(), torch.ones(1, 2, requires_grad=True)
        >>> x = gs.sample(lambda x, sigma: 0.5 * x, z0, [2.0, 1.0, 0.5], monitor=monitor)
        >>> x.sum().backward()
        >>> [round(call.gain, 6) for call in monitor.calls]
        [0.5, 0.5]
    """

    def __init__(self, beside: Policy | None = None) -> None:
        if beside is not None and not isinstance(beside, Policy):
            _checks.fail_type("Monitor: beside", "be a policy of gradsampler.policies", beside)
        self.beside = beside
        self.policy: Policy | None = None  # the same, in one run
        self._calls: dict[Evaluation, int] = {}
        self._forget()

    def _forget(self) -> None:
        self._finite: dict[tuple[str, int], Tensor] = {}  # "state" or "gradient", and the call
        self._values: dict[tuple[int, str], Tensor] = {}  # squares of norms, by call and column
        self._noise: dict[tuple[Slot, Injection], Tensor] = {}
        self._cosines: dict[str, Tensor] = {}
        self._pulled: tuple[Evaluation, Tensor | None] | None = None  # the latest
        self._lam: tuple[Evaluation, Tensor] | None = None

    def begin(self, program: Program) -> None:
        """Takes note of a run."""
        self._forget()
        self._numbers = program.numbers(torch.device("cpu"))
        self.policy = None if self.beside is None else self.beside.placed(program.num_steps)
        self._calls = {e: k for k, e in enumerate(program.evaluations)}

    def saw(self, evaluation: Evaluation, x: Tensor) -> None:
        """Takes note of a state."""
        self._finite["state", self._calls[evaluation]] = torch.isfinite(x.detach()).all()

    def pulled(
        self, evaluation: Evaluation, cot: Sequence[Tensor | None], g: Tensor | None
    ) -> None:
        """Takes note of the cotangents of a call's outputs and of its input."""
        g = None if g is None else self._times(evaluation.c_in, g.detach())
        self._pulled = evaluation, g
        factors = {slot: c for slot, c in evaluation.denoised if slot != evaluation.state}
        found = [
            (self._numbers[factors[slot]], mu.detach())
            for slot, mu in zip(evaluation.writes, cot, strict=True)
            if mu is not None and slot in factors
        ]
        if g is None or not found:
            return
        # An output's cotangent is its factor in D times dL/dD, if the solver reads D alone.
        squares = sum(_wide(c).square() for c, _ in found)
        w = torch.stack([self._column(c, mu) * mu for c, mu in found]).sum(0)
        w = self._column(1 / _wide(squares), w) * w
        apart = torch.stack([_square(self._column(c, w) * w - mu) for c, mu in found]).sum()
        size = torch.stack([_square(mu) for _, mu in found]).sum()
        skip = [c for slot, c in evaluation.denoised if slot == evaluation.state]
        whole = g + (self._times(skip[0], w) if skip else 0)
        gain = _square(whole) / _square(w)
        self._put(evaluation, "gain", torch.where(apart > 1e-6 * size, torch.nan, gain))

    def descended(self, evaluation: Evaluation, lam: Tensor) -> None:
        """Takes note of the cotangent of the state that a call sees."""
        lam = lam.detach()
        self._finite["gradient", self._calls[evaluation]] = torch.isfinite(lam).all()
        through = self._pulled[1] if self._pulled and self._pulled[0] == evaluation else None
        self._put(evaluation, "lam", _square(lam))
        self._put(evaluation, "state", _square(lam if through is None else lam - through))
        self._put(evaluation, "network", _square(0 * lam if through is None else through))
        self._lam = evaluation, lam

    def aside(self) -> "Monitor":
        """What sees the gradient that is taken beside."""
        return _Aside(self)

    def compared(self, evaluation: Evaluation, lam: Tensor) -> None:
        """Takes note of that of the gradient beside, after the other one."""
        assert self._lam is not None
        exact = self._lam[1].double().flatten()
        self._put(evaluation, "beside", _square(lam))
        self._put(evaluation, "cosine", _cosine([exact], [lam]))

    def absorbed(self, state: Slot, injection: Injection, share: Tensor) -> None:
        """Takes note of a noise's share in the gradient to z0."""
        self._noise[state, injection] = _square(share)

    def compare(self, of: str, exact: Sequence[Tensor], beside: Sequence[Tensor]) -> None:
        """Takes note of a gradient of each, in parts."""
        self._cosines[of] = _cosine(exact, beside)

    @property
    def calls(self) -> list[MonitoredCall]:
        """The model calls of the run, in its order."""
        values = {key: float(x) for key, x in self._values.items()}
        noises: dict[int, float] = {}
        for (_, injection), square in self._noise.items():
            noises[injection.step] = noises.get(injection.step, 0.0) + float(square)
        rows = []
        for evaluation, k in self._calls.items():
            values[k, "noise"] = noises.pop(evaluation.step, torch.nan)
            norms = {n: values.get((k, n), torch.nan) ** 0.5 for n in _NORMS}
            sigma = _wide(self._numbers[evaluation.sigma]).max().item()
            cosine = values.get((k, "cosine"), torch.nan)
            rows.append(MonitoredCall(evaluation.step, sigma, **norms, cosine=cosine))
        return rows

    @property
    def cosines(self) -> dict[str, float]:
        """Between the gradient beside and that of the run: to "z0", "cond", "parameters" ..."""
        return {of: float(x) for of, x in self._cosines.items()}

    @property
    def first_nonfinite(self) -> tuple[str, int] | None:
        """What was the first not to be finite, "state" or "gradient", and at which step."""
        steps = [evaluation.step for evaluation in self._calls]
        forward = [("state", k) for k in range(len(steps))]
        backward = [("gradient", k) for k in reversed(range(len(steps)))]
        for what, k in (*forward, *backward):
            finite = self._finite.get((what, k))
            if finite is not None and not finite:
                return what, steps[k]
        return None

    def __str__(self) -> str:
        names = ["step", "sigma", "|lam|", "by state", "by network", "by noise", "gain"]
        names += ["|lam| beside", "cosine"] if self.beside is not None else []
        lines = [names, *([_text(x) for x in call[: len(names)]] for call in self.calls)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(map(str.rjust, cells, widths)) for cells in lines]
        told = ", ".join(f"{of} {x:.4g}" for of, x in self.cosines.items())
        table += [f"cosine to the gradient of the run: {told}"] if told else []
        broken = self.first_nonfinite
        table += [f"not finite: the {broken[0]} at step {broken[1]}"] if broken else []
        return "\n".join(table)

    def _put(self, evaluation: Evaluation, name: str, value: Tensor) -> None:
        self._values[self._calls[evaluation], name] = value

    def _column(self, c: float | Tensor, x: Tensor) -> float | Tensor:
        c = column(c, x)
        return c.to(x.dtype) if isinstance(c, Tensor) and c.ndim else c

    def _times(self, position: int, x: Tensor) -> Tensor:
        return self._column(self._numbers[position], x) * x


class _Aside(Monitor):
    """Compares a gradient with the one that another monitor sees."""

    def __init__(self, monitor: Monitor) -> None:
        super().__init__()
        self._other = monitor

    def begin(self, program: Program) -> None: ...

    def pulled(
        self, evaluation: Evaluation, cot: Sequence[Tensor | None], g: Tensor | None
    ) -> None: ...

    def descended(self, evaluation: Evaluation, lam: Tensor) -> None:
        self._other.compared(evaluation, lam)

    def absorbed(self, state: Slot, injection: Injection, share: Tensor) -> None: ...


def _wide(c: float | Tensor) -> Tensor:
    return torch.as_tensor(c, dtype=torch.float64)


def _square(x: Tensor) -> Tensor:
    return x.detach().double().square().sum()


def _cosine(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> Tensor:
    a, b = (torch.cat([x.detach().double().flatten() for x in each]) for each in (ours, theirs))
    return torch.dot(a, b) / (a.norm() * b.norm())


def _text(x: float) -> str:
    return str(x) if isinstance(x, int) else "-" if x != x else f"{x:.4g}"
