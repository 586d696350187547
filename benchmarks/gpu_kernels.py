# SPDX-License-Identifier: Apache-2.0
"""The parts of gpu.py that time the kernels: bandwidth, launches, and where they overtake torch.

Each op's values are compared with the reference before it is timed.
"""

import os
from collections.abc import Callable
from functools import partial

import rows
import timing
import torch
from torch import Tensor

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import gradsampler as gs
from gradsampler.contract import Draw
from gradsampler.ops import backends, reference
from support import absent_gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Rows = list[dict[str, str]]


def triton() -> backends.Backend:
    return backends.choose("triton", torch.device(DEVICE))


def draws(z0: Tensor) -> dict[str, Draw | None]:
    return {
        "off": None,
        "sincos": gs.noise.SinCos().draw(z0, 7, 35),
        "signed_roll": gs.noise.SignedRoll().draw(z0, 7, 35),
        "philox": gs.noise.Philox().draw(z0, 7, 35),
    }


def eager_wave(z0: Tensor, draw: Draw) -> Tensor:
    return draw.gain * z0 + draw.amplitude * torch.sin(draw.rate * z0 + draw.phase)


def formula(x: Tensor, d: Tensor, z0: Tensor, draw: Draw) -> Tensor:
    return 0.9 * x + 0.1 * d + 0.3 * eager_wave(z0, draw)


def backward_formula(g: Tensor, z0: Tensor, dz0: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    slope = draw.gain + draw.rate * draw.amplitude * torch.cos(draw.rate * z0 + draw.phase)
    dz0.add_(0.3 * slope * g)
    return 0.9 * g, 0.1 * g


def assert_close(got: Tensor, expected: Tensor) -> None:
    tolerance = 1e-5 if got.dtype == torch.float32 else 2e-2
    error = (got.double() - expected.double()).abs().max() / expected.double().abs().max()
    assert float(error) <= tolerance, f"wrong by {float(error):.3g}: not timed"


def measured(
    table: Rows,
    op: str,
    x: Tensor,
    moved: int,
    variants: dict[str, Callable[[], object]],
    rounds: int,
) -> None:
    """Times the variants on the device beside a copy of the same bytes; adds bandwidths."""
    source = torch.empty(moved // 2, dtype=torch.int8, device=x.device)
    target = torch.empty_like(source)
    every = {"copy": lambda: target.copy_(source), **variants}
    found = timing.interleaved(every, rounds, clock=timing.device)
    shape, dtype = "x".join(map(str, x.shape)), str(x.dtype).removeprefix("torch.")
    copy = found["copy"][0]
    for name, times in found.items():
        table.append(rows.row(op, name, shape, dtype, "device time", "s", times))
        share = copy / times[0]
        table.append(
            rows.row(op, name, shape, dtype, "bandwidth over copy", "1", (share, share, share))
        )
        rate = moved / times[0] / 1e12
        print(f"{op:24} {name:14} {shape:>16} {dtype:9} {times[0] * 1e6:10.1f} us "
              f"{rate:7.3f} TB/s {share:6.3f} of copy", flush=True)  # fmt: skip


def forward(table: Rows, size: int, dtype: torch.dtype, rounds: int) -> None:
    x, d, z0 = (torch.randn(1, size, device=DEVICE).to(dtype) for _ in range(3))
    out, backend = torch.empty_like(x), triton()
    compiled = torch.compile(formula) if DEVICE == "cuda" else formula
    for kind, draw in draws(z0).items():
        terms, coefs = [x, d], [0.9, 0.1]
        amount = 0.0 if draw is None else 0.3

        def fused(terms=terms, coefs=coefs, draw=draw, amount=amount) -> object:
            return backend.step_fwd(terms, coefs, z0, draw, amount, out=out)

        fused()
        assert_close(out, reference.step_fwd(terms, coefs, z0, draw, amount))
        variants: dict[str, Callable[[], object]] = {"triton": fused}
        if kind == "sincos":
            variants["torch.compile"] = lambda draw=draw: compiled(x, d, z0, draw)
            variants["eager"] = lambda draw=draw: formula(x, d, z0, draw)
        tensors = 4 if kind in ("sincos", "signed_roll") else 3
        measured(table, f"step_fwd {kind}", x, tensors * x.nbytes, variants, rounds)


def backward(table: Rows, size: int, dtype: torch.dtype, rounds: int) -> None:
    g, z0 = (torch.randn(1, size, device=DEVICE).to(dtype) for _ in range(2))
    dz0, backend = torch.zeros(1, size, device=DEVICE, dtype=dtype), triton()
    compiled = torch.compile(backward_formula) if DEVICE == "cuda" else backward_formula
    for kind, draw in draws(z0).items():
        if kind not in ("sincos", "signed_roll"):
            continue

        def fused(draw=draw) -> object:
            return backend.step_bwd(
                g, [g, g], [0.9, 0.1], z0, draw, 0.3, dz0=dz0, needs_terms=[True, True]
            )

        dz0.zero_()
        fused()
        expected = torch.zeros_like(dz0)
        reference.step_bwd(
            g, [g, g], [0.9, 0.1], z0, draw, 0.3, dz0=expected, needs_terms=[True, True]
        )
        assert_close(dz0, expected)
        variants: dict[str, Callable[[], object]] = {"triton": fused}
        if kind == "sincos":
            variants["torch.compile"] = lambda draw=draw: compiled(g, z0, dz0, draw)
            variants["eager"] = lambda draw=draw: backward_formula(g, z0, dz0, draw)
        tensors = 6 if kind == "sincos" else 5
        measured(table, f"step_bwd {kind}", g, tensors * g.nbytes, variants, rounds)


def adjoint(table: Rows, size: int, dtype: torch.dtype, rounds: int) -> None:
    lam, g, z0 = (torch.randn(1, size, device=DEVICE).to(dtype) for _ in range(3))
    dz0, backend = torch.zeros_like(lam), triton()
    draw = draws(z0)["sincos"]

    def fused() -> object:
        return backend.adjoint_step([lam], [0.9], g, 0.5, [0.2, 0.1], z0, draw, 0.3, dz0)

    got = fused()
    expected = reference.adjoint_step(
        [lam], [0.9], g, 0.5, [0.2, 0.1], z0, draw, 0.3, torch.zeros_like(dz0)
    )
    assert_close(got[0], expected[0])
    assert_close(got[1], expected[1])
    measured(table, "adjoint_step sincos", lam, 7 * lam.nbytes, {"triton": fused}, rounds)


def leap(table: Rows, size: int, dtype: torch.dtype, rounds: int) -> None:
    """A step on a state in integers, forward and back; ``dtype`` is the model's."""
    x, z0 = (torch.randn(1, size, device=DEVICE) for _ in range(2))
    d, backend = torch.randn(1, size, device=DEVICE).to(dtype), triton()
    overflow = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    for integer in (torch.int32, torch.int64):
        for kind, draw in draws(z0).items():
            carried = torch.zeros(1, size, dtype=integer, device=DEVICE)
            there = carried.clone()

            def moved(
                backend: backends.Backend, carried: Tensor, sign: int, draw: Draw | None = draw
            ) -> tuple[Tensor | None, Tensor | None]:
                return backend.leap(
                    carried, [x, d], [0.9 * 2**20, 0.1 * 2**20], z0, draw, 0.3 * 2**20, sign=sign,
                    scale=2.0**-20, overflow=overflow, out_dtype=x.dtype, wants_state=sign > 0,
                    model_scale=0.5, model_dtype=dtype,
                )  # fmt: skip

            found = moved(backend, carried, 1)
            moved(backends.REFERENCE, there, 1)
            assert int((carried - there).abs().max()) <= 2, "wrong integers: not timed"
            expected = reference.fixed_point(carried, 2.0**-20, x.dtype, 0.5, dtype)
            if DEVICE == "cuda":  # the interpreter cuts bfloat16 off
                assert all(map(torch.equal, found, expected)), "wrong bits: not timed"
            moved(backend, carried, -1)
            assert not carried.any(), "not undone: not timed"
            operands = 2 * carried.nbytes + x.nbytes + d.nbytes
            operands += z0.nbytes if kind in ("sincos", "signed_roll") else 0
            name = f"leap {str(integer).removeprefix('torch.')} {kind}"
            variants: dict[str, Callable[[], object]] = {
                "triton": partial(moved, backend, carried, 1)
            }
            measured(table, name, d, operands + x.nbytes + d.nbytes, variants, rounds)
            variants = {"triton": partial(moved, backend, carried, -1)}
            measured(table, f"{name} undone", d, operands, variants, rounds)


def launch(table: Rows, calls: int) -> None:
    """Host time a step for a small latent, by every way to launch it, and in a CUDA graph."""
    x, d, z0 = (torch.randn(1, 4, 64, 64, device=DEVICE) for _ in range(3))
    out, draw, sincos = torch.empty_like(x), draws(z0)["sincos"], gs.noise.SinCos()
    assert draw is not None
    row = [1.3, 0.9, 0.6, 0.35, -1.0, -3.5]

    def step(backend: backends.Backend) -> Callable[[], object]:
        return lambda: backend.step_fwd([x, d], [0.9, 0.1], z0, draw, 0.3, out=out)

    def owned() -> object:
        with absent_gpu.unprepared():
            return step(triton())()

    runs: dict[str, Callable[[], object]] = {
        "triton": step(triton()),
        "triton's own launch": owned,
        "registered op": lambda: gs.ops.step([x, d], [0.9, 0.1], z0, sincos, 7, 35, 0.3),
        "registered op, out": lambda: gs.ops.step(
            [x, d], [0.9, 0.1], z0, sincos, 7, 35, 0.3, out=out
        ),
        "ancestral op": lambda: gs.ops.ancestral_step(x, d, row, z0, clamp=(-1.0, 1.0)),
        "eager": lambda: formula(x, d, z0, draw),
    }
    if backends.present("cuda"):
        runs["cuda"] = step(backends.choose("cuda", torch.device("cuda")))
    if DEVICE == "cuda":
        runs["torch.compile"] = torch.compile(lambda: formula(x, d, z0, draw))
        runs["cuda graph of 35"] = captured(runs["triton"], 35)
        runs["cuda graph of 35, ancestral op"] = captured(runs["ancestral op"], 35)
    for name, run in runs.items():
        per_step = 35 if name.startswith("cuda graph") else 1
        spent = timing.host(run, calls) / per_step
        table.append(
            rows.row("launch", name, "1x4x64x64", "float32", "host time a step", "s", (spent,) * 3)
        )
        print(f"launch {name:30} {spent * 1e6:9.2f} us a step of a 4x64x64 latent", flush=True)


def captured(run: Callable[[], object], steps: int) -> Callable[[], object]:
    """A CUDA graph of several steps; capture fails if a step synchronises with the host."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(steps):
            run()
    return graph.replay


def plain_step(backend: backends.Backend, size: int) -> Callable[[], object]:
    x, d, z0 = (torch.randn(1, size, device=DEVICE) for _ in range(3))
    draw = draws(z0)["sincos"]
    return lambda: backend.step_fwd([x, d], [0.9, 0.1], z0, draw, 0.3)


def crossover(table: Rows, sizes: list[int], calls: int, rounds: int) -> None:
    """Time of a step in a row of many, host and device together, by backend and size."""
    names = [n for n in ("triton", "cuda", "reference") if backends.present(n)]
    for size in sizes:
        steps = {
            name: plain_step(backends.choose(name, torch.device(DEVICE)), size) for name in names
        }
        runs = {name: partial(repeated, step, calls) for name, step in steps.items()}
        found = timing.interleaved(runs, rounds)
        for name, times in found.items():
            each = tuple(t / calls for t in times)
            table.append(rows.row("crossover", name, f"1x{size}", "float32", "time", "s", each))
        text = "  ".join(f"{name} {found[name][0] / calls * 1e6:9.2f} us" for name in names)
        print(f"crossover {size:>10} elements: {text}", flush=True)


def repeated(run: Callable[[], object], calls: int) -> None:
    for _ in range(calls):
        run()
