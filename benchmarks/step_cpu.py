# SPDX-License-Identifier: Apache-2.0
"""Times the native step on the CPU beside what else could run it.

    make bench-cpu

Variants are interleaved call by call in one process and every output is preallocated, so only the
ratios within one table mean anything. `linear` is the native kernel without noise over the same
reads and writes: three terms in, one out. torch.compile and eager compute the one-sine form of
sincos, which is the cheaper one. Each variant is checked against float64 before it is timed.
"""

import argparse
from collections.abc import Callable

import rows
import timing
import torch

from gradsampler import _native, noise

COEFS, SCALE, STEP, STEPS = (0.3, -1.2), 0.7, 17, 50


def compiled_step(x, d, z0, out, gain, rate, amplitude, phase):
    wave = torch.sin(rate * z0 + phase)
    out.copy_(COEFS[0] * x + COEFS[1] * d + SCALE * (gain * z0 + amplitude * wave))


def eager_step(x, d, z0, out, tmp, gain, rate, amplitude, phase):
    torch.mul(z0, rate, out=tmp).add_(phase).sin_().mul_(amplitude).add_(z0, alpha=gain)
    torch.mul(x, COEFS[0], out=out).add_(d, alpha=COEFS[1]).add_(tmp, alpha=SCALE)


def variants(elements: int, dtype: torch.dtype, with_compile: bool):
    """Names to (call, output, float64 answer or None)."""
    generator = torch.Generator().manual_seed(0)
    x, d, z0 = (torch.randn(1, elements, generator=generator).to(dtype) for _ in range(3))
    out, tmp = torch.empty_like(x), torch.empty_like(x)
    sources = {
        "sincos": noise.SinCos(),
        "signed_roll": noise.SignedRoll(3),
        "philox": noise.Philox(5),
    }
    draws = {name: source.draw(z0, STEP, STEPS) for name, source in sources.items()}
    wave = draws["sincos"]
    numbers = (wave.gain, wave.rate, wave.amplitude, wave.phase)
    head = slice(0, min(elements, 4096))

    def native(name):
        return lambda: _native.step_fwd([x, d], COEFS, z0, draws[name], SCALE, out=out)

    exact = COEFS[0] * x[:, head].double() + COEFS[1] * d[:, head].double()
    answer = {
        name: exact + SCALE * sources[name].at(z0.double(), STEP, STEPS)[:, head]
        for name in ("sincos", "philox")
        if elements <= 1 << 20 or name == "sincos"
    }
    calls: dict[str, tuple[Callable, torch.Tensor | None]] = {
        "linear": (
            lambda: _native.step_fwd([x, d, z0], (*COEFS, SCALE), None, None, 0.0, out=out),
            exact + SCALE * z0[:, head].double(),
        ),
        "sincos": (native("sincos"), answer.get("sincos")),
        "signed_roll": (native("signed_roll"), None),
        "philox": (native("philox"), answer.get("philox")),
        "eager_sincos": (lambda: eager_step(x, d, z0, out, tmp, *numbers), answer.get("sincos")),
        "randn_and_update": (
            lambda: (
                torch.mul(x, COEFS[0], out=out)
                .add_(d, alpha=COEFS[1])
                .add_(torch.randn(x.shape, dtype=dtype, out=tmp), alpha=SCALE)
            ),
            None,
        ),
    }
    if with_compile:
        fused = torch.compile(compiled_step, dynamic=False)
        calls["compile_sincos"] = (lambda: fused(x, d, z0, out, *numbers), answer.get("sincos"))
    for name, (call, expected) in calls.items():
        call()
        if expected is not None:
            error = (out[:, head].double() - expected).abs().max().item()
            limit = 1e-5 if dtype == torch.float32 else 0.2
            if error > limit:
                raise SystemExit(f"{name} is wrong by {error}: nothing timed")
    return {name: call for name, (call, _) in calls.items()}


def overhead() -> dict[str, Callable[[], object]]:
    """Calls on 4 elements, where nothing but the call costs."""
    x, d, z0, out, g = (torch.randn(1, 4) for _ in range(5))
    draw = noise.SinCos().draw(z0, STEP, STEPS)
    dz0 = torch.zeros_like(z0)
    needs = {"needs_terms": [True, True]}
    slope = draw.rate * draw.amplitude

    def eager_forward():
        wave = torch.sin(draw.rate * z0 + draw.phase)
        return COEFS[0] * x + COEFS[1] * d + SCALE * (draw.gain * z0 + draw.amplitude * wave)

    def eager_backward():
        dz0.add_(SCALE * g * (draw.gain + slope * torch.cos(draw.rate * z0 + draw.phase)))
        return COEFS[0] * g, COEFS[1] * g

    def native_forward():
        _native.step_fwd([x, d], COEFS, z0, draw, SCALE, out=out)

    def native_backward():
        _native.step_bwd(g, [x, d], COEFS, z0, draw, SCALE, dz0=dz0, **needs)

    return {
        "forward": native_forward,
        "eager_forward": eager_forward,
        "forward_backward": lambda: (native_forward(), native_backward()),
        "eager_forward_backward": lambda: (eager_forward(), eager_backward()),
    }


def measured(
    op: str, calls: dict[str, Callable[[], object]], shape: str, dtype: str, base: str, rounds: int
) -> list[dict[str, str]]:
    """Time of each call, and its ratio to that of ``base``."""
    table = []
    times = timing.interleaved(calls, rounds)
    for name, (median, low, high) in times.items():
        ratio = median / times[base][0]
        print(
            f"{op:14}{name:24}{shape:>12} {dtype:9}{1e3 * median:10.5f} ms "
            f"[{1e3 * low:.5f}, {1e3 * high:.5f}]  {ratio:7.3f} of {base}",
            flush=True,
        )
        table.append(rows.row(op, name, shape, dtype, "time", "s", (median, low, high)))
        table.append(rows.row(op, name, shape, dtype, f"time over {base}", "1", (ratio,) * 3))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="16,1", help="Mi elements, comma separated")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--rehearse", action="store_true", help="small sizes, writes nothing")
    args = parser.parse_args()
    if _native.available() is not None:
        raise SystemExit(f"the extension is not there: {_native.available()}")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.rehearse:
        args.sizes, args.rounds, args.no_compile = "0.01", 2, True

    table = []
    for dtype in args.dtypes.split(","):
        for size in (float(s) for s in args.sizes.split(",")):
            elements = int(size * 2**20)
            calls = variants(elements, getattr(torch, dtype), not args.no_compile)
            rounds = args.rounds if elements > 2**22 else 10 * args.rounds
            table += measured("native step", calls, f"1x{elements}", dtype, "linear", rounds)
    calls, rounds = overhead(), 50 * args.rounds
    table += measured("native call", calls, "1x4", "float32", "eager_forward", rounds)
    if not args.rehearse:
        print(f"{len(table)} rows appended to {rows.append(table)}")


if __name__ == "__main__":
    main()
