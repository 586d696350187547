# SPDX-License-Identifier: Apache-2.0
"""What step_cpu.py times: the native step, its backward and the adjoint step, and their rivals.

Every call writes into tensors that are there already, and stands beside its answer in float64. The
rivals compute the one-sine form of sincos, which is the cheaper one.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gradsampler import contract, noise
from gradsampler.contract import Draw
from gradsampler.ops import native

COEFS, SCALE, STEP, STEPS = (0.3, -1.2), 0.7, 17, 50
LAMS, NEXT = (0.3, -1.2, 0.5), (0.1, 0.2, 0.3)  # lam and mu of the adjoint step
SOURCES = {
    "sincos": noise.SinCos(),
    "signed_roll": noise.SignedRoll(3),
    "philox": noise.Philox(5),
    "mixture": noise.Mixture(noise.SinCos(), 0.4, 5),
}


class Call(NamedTuple):
    """Something to time, what it writes, and the first elements of that in float64 if known."""

    run: Callable[[], object]
    results: tuple[Tensor, ...]
    expected: tuple[Tensor, ...] | None = None

    def check(self, name: str) -> None:
        """Stops everything if the call computes something else."""
        for x in self.results:
            x.zero_()
        self.run()
        for got, exact in zip(self.results, self.expected or (), strict=False):
            limit = {torch.float64: 1e-10, torch.float32: 1e-5}.get(got.dtype, 0.2)
            error = (got[:, : exact.shape[1]].double() - exact).abs().max().item()
            if error > limit:
                raise SystemExit(f"{name} is wrong by {error}: nothing timed")


class Inputs:
    """The tensors of one table, [1, elements], and the one-sine form's numbers."""

    def __init__(self, elements: int, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(0)
        draws = (torch.randn(1, elements, generator=generator) for _ in range(4))
        self.x, self.d, self.z0, self.g = (x.to(dtype) for x in draws)
        self.out, self.second, self.third, self.tmp = (torch.empty_like(self.x) for _ in range(4))
        self.draws: dict[str, Draw] = {k: s.draw(self.z0, STEP, STEPS) for k, s in SOURCES.items()}
        self.wave = self.draws["sincos"]
        self.numbers = (self.wave.gain, self.wave.rate, self.wave.amplitude, self.wave.phase)
        self.head = [x[:, :4096].double() for x in (self.x, self.d, self.z0, self.g)]
        self.whole = elements <= 1 << 20

    def noise(self, name: str) -> Tensor | None:
        """The first elements of a noise in float64, unless that takes all of a large tensor."""
        if name == "sincos":
            return SOURCES[name].at(self.head[2], STEP, STEPS)
        if self.whole:
            return SOURCES[name].at(self.z0.double(), STEP, STEPS)[:, :4096]
        return None

    def slope(self) -> Tensor:
        """d n / d z0 of sincos."""
        gain, rate, amplitude, phase = self.numbers
        return gain + rate * amplitude * torch.cos(rate * self.head[2] + phase)


def forward(i: Inputs, with_compile: bool) -> dict[str, Call]:
    """``out = sum c x + s n(z0)``; `linear` has the same reads and writes, and no noise."""
    x, d, z0, _ = i.head
    exact = COEFS[0] * x + COEFS[1] * d
    calls = {
        "linear": Call(
            lambda: native.step_fwd([i.x, i.d, i.z0], (*COEFS, SCALE), out=i.out),
            (i.out,),
            (exact + SCALE * z0,),
        )
    }
    for name, draw in i.draws.items():
        n = i.noise(name)
        calls[name] = Call(
            lambda draw=draw: native.step_fwd([i.x, i.d], COEFS, i.z0, draw, SCALE, out=i.out),
            (i.out,),
            None if n is None else (exact + SCALE * n,),
        )
    answer = calls["sincos"].expected

    def eager() -> None:
        gain, rate, amplitude, phase = i.numbers
        torch.mul(i.z0, rate, out=i.tmp).add_(phase).sin_().mul_(amplitude).add_(i.z0, alpha=gain)
        torch.mul(i.x, COEFS[0], out=i.out).add_(i.d, alpha=COEFS[1]).add_(i.tmp, alpha=SCALE)

    def randn() -> None:
        torch.mul(i.x, COEFS[0], out=i.out).add_(i.d, alpha=COEFS[1])
        i.out.add_(torch.randn(i.x.shape, dtype=i.x.dtype, out=i.tmp), alpha=SCALE)

    def fused(x, d, z0, out, gain, rate, amplitude, phase):
        wave = torch.sin(rate * z0 + phase)
        out.copy_(COEFS[0] * x + COEFS[1] * d + SCALE * (gain * z0 + amplitude * wave))

    calls["eager_sincos"] = Call(eager, (i.out,), answer)
    calls["randn_and_update"] = Call(randn, (i.out,))
    if with_compile:
        run = torch.compile(fused, dynamic=False)
        calls["compile_sincos"] = Call(
            lambda: run(i.x, i.d, i.z0, i.out, *i.numbers), (i.out,), answer
        )
    return calls


def backward(i: Inputs, with_compile: bool) -> dict[str, Call]:
    """``dx = c g``, ``dz0 += s n'(z0) g``; `linear` adds a multiple of g and does not read z0."""
    results = (dx, dd, dz0) = (i.out, i.second, i.third)
    g = i.head[3]
    plain = (COEFS[0] * g, COEFS[1] * g)
    answer = (*plain, SCALE * i.slope() * g)
    calls = {}
    given = Draw(contract.GIVEN, STEP, given=i.g)
    for name, draw in {"linear": given, **i.draws}.items():
        if name == "philox":
            continue  # nothing is pulled back through it
        injected = native._injected(draw, i.z0, SCALE)
        targets = (None, dz0) if name == "linear" else (dz0, None)
        calls[name] = Call(
            lambda injected=injected, targets=targets: native._raw.step_bwd.default(
                i.g, [i.g, i.g], COEFS, None, *injected, (), [dx, dd], [0, 1], None, None, *targets
            ),
            results,
            {"linear": (*plain, SCALE * g), "sincos": answer}.get(name, plain),
        )  # fmt: skip

    def eager() -> None:
        gain, rate, amplitude, phase = i.numbers
        torch.mul(i.g, COEFS[0], out=dx)
        torch.mul(i.g, COEFS[1], out=dd)
        torch.mul(i.z0, rate, out=i.tmp).add_(phase).cos_().mul_(rate * amplitude).add_(gain)
        dz0.addcmul_(i.tmp, i.g, value=SCALE)

    def fused(g, z0, dx, dd, dz0, gain, rate, amplitude, phase):
        dx.copy_(COEFS[0] * g)
        dd.copy_(COEFS[1] * g)
        dz0.add_(SCALE * (gain + rate * amplitude * torch.cos(rate * z0 + phase)) * g)

    calls["eager_sincos"] = Call(eager, results, answer)
    if with_compile:
        run = torch.compile(fused, dynamic=False)
        calls["compile_sincos"] = Call(
            lambda: run(i.g, i.z0, dx, dd, dz0, *i.numbers), results, answer
        )
    return calls


def adjoint(i: Inputs, with_compile: bool) -> dict[str, Call]:
    """``lam = sum a lams + s g``, ``mu = sum b lams + b' lam``, ``dz0 += s n'(z0) lam``."""
    results = (lam, mu, dz0) = (i.out, i.second, i.third)
    x, d, _, g = i.head
    first = LAMS[0] * x + LAMS[1] * d + LAMS[2] * g
    plain = (first, NEXT[0] * x + NEXT[1] * d + NEXT[2] * first)
    answer = (*plain, SCALE * i.slope() * first)
    calls = {}
    for name, draw in {"linear": None, **i.draws}.items():
        if name == "philox":
            continue
        injected = native._injected(draw, i.z0, SCALE)
        calls[name] = Call(
            lambda name=name, injected=injected: native._raw.adjoint_step.default(
                lam, mu, None if name == "linear" else dz0, [i.x, i.d, i.g], True, LAMS, NEXT,
                *injected,
            ),
            results,
            answer if name == "sincos" else plain,
        )  # fmt: skip

    def eager() -> None:
        gain, rate, amplitude, phase = i.numbers
        torch.mul(i.x, LAMS[0], out=lam).add_(i.d, alpha=LAMS[1]).add_(i.g, alpha=LAMS[2])
        torch.mul(i.x, NEXT[0], out=mu).add_(i.d, alpha=NEXT[1]).add_(lam, alpha=NEXT[2])
        torch.mul(i.z0, rate, out=i.tmp).add_(phase).cos_().mul_(rate * amplitude).add_(gain)
        dz0.addcmul_(i.tmp, lam, value=SCALE)

    def fused(x, d, g, z0, lam, mu, dz0, gain, rate, amplitude, phase):
        new = LAMS[0] * x + LAMS[1] * d + LAMS[2] * g
        lam.copy_(new)
        mu.copy_(NEXT[0] * x + NEXT[1] * d + NEXT[2] * new)
        dz0.add_(SCALE * (gain + rate * amplitude * torch.cos(rate * z0 + phase)) * new)

    calls["eager_sincos"] = Call(eager, results, answer)
    if with_compile:
        run = torch.compile(fused, dynamic=False)
        calls["compile_sincos"] = Call(
            lambda: run(i.x, i.d, i.g, i.z0, lam, mu, dz0, *i.numbers), results, answer
        )
    return calls


TABLES = {"native step": forward, "native backward": backward, "native adjoint": adjoint}
