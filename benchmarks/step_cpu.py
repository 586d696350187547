# SPDX-License-Identifier: Apache-2.0
"""Times the native step, its backward and the adjoint step on the CPU beside what else could run.

    make bench-cpu

Variants are interleaved call by call in one process and every output is preallocated, so only the
ratios within one table mean anything; step_calls.py says what each computes. Each variant is
checked against float64 before it is timed.
"""

import argparse
from collections.abc import Callable

import rows
import step_calls
import timing
import torch
from step_calls import COEFS, SCALE, STEP, STEPS

from gradsampler import noise
from gradsampler.ops import native


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
        native.step_fwd([x, d], COEFS, z0, draw, SCALE, out=out)

    def native_backward():
        native.step_bwd(g, [x, d], COEFS, z0, draw, SCALE, dz0=dz0, **needs)

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
            f"{op:16}{name:24}{shape:>12} {dtype:9}{1e3 * median:10.5f} ms "
            f"[{1e3 * low:.5f}, {1e3 * high:.5f}]  {ratio:7.3f} of {base}",
            flush=True,
        )
        table.append(rows.row(op, name, shape, dtype, "time", "s", (median, low, high)))
        table.append(rows.row(op, name, shape, dtype, f"time over {base}", "1", (ratio,) * 3))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", default="16,1", help="Mi elements, comma separated")
    parser.add_argument("--dtypes", default="float32,bfloat16,float16,float64")
    parser.add_argument("--ops", default=",".join(step_calls.TABLES))
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--rehearse", action="store_true", help="small sizes, writes nothing")
    args = parser.parse_args()
    if native.available() is not None:
        raise SystemExit(f"the extension is not there: {native.available()}")
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.rehearse:
        args.sizes, args.rounds, args.no_compile = "0.01", 2, True

    table = []
    for dtype in args.dtypes.split(","):
        for size in (float(s) for s in args.sizes.split(",")):
            elements = int(size * 2**20)
            inputs = step_calls.Inputs(elements, getattr(torch, dtype))
            rounds = args.rounds if elements > 2**22 else 10 * args.rounds
            for op, calls_of in step_calls.TABLES.items():
                if op not in args.ops.split(","):
                    continue
                calls = calls_of(inputs, not args.no_compile)
                for name, call in calls.items():
                    call.check(f"{op} {name} {dtype}")
                timed = {name: call.run for name, call in calls.items()}
                table += measured(op, timed, f"1x{elements}", dtype, "linear", rounds)
    calls, rounds = overhead(), 50 * args.rounds
    table += measured("native call", calls, "1x4", "float32", "eager_forward", rounds)
    if not args.rehearse:
        print(f"{len(table)} rows appended to {rows.append(table)}")


if __name__ == "__main__":
    main()
