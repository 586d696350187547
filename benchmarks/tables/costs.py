# SPDX-License-Identifier: Apache-2.0
"""benchmarks/README.md, docs/diffusers.md, docs/distributed.md: times, peaks, collectives."""

import rows

from tables.form import markdown, number, size

MEBI = 2**20


def native() -> str:
    """The native step with sincos noise."""
    sizes = {"1x16777216": "16 Mi", "1x1048576": "1 Mi"}
    limits = {
        ("1x16777216", "float32"): (" (limit 1.1)", " (1.05)", " (5)"),
        ("1x16777216", "bfloat16"): (" (1.1)", " (1.05)", " (5)"),
        ("1x1048576", "float32"): ("", " (2)", ""),
        ("1x1048576", "bfloat16"): ("", " (2)", ""),
    }
    lines = []
    for (shape, dtype), (one, two, three) in limits.items():
        found = rows.latest("native step", dtype=dtype)
        ours, compiled, eager = (
            float(found[way, shape, "time"]["median"])
            for way in ("sincos", "compile_sincos", "eager_sincos")
        )
        over = number(found["sincos", shape, "time over linear"])
        cells = (over + one, f"{compiled / ours:.2f}{two}", f"{eager / ours:.2f}{three}")
        lines.append((f"{sizes[shape]} {dtype}", *cells))
    head = (
        "over a linear kernel of the same traffic",
        "torch.compile over ours",
        "eager over ours",
    )
    return markdown(("size, dtype", *head), lines)


def peaks() -> str:
    """Peak memory against N."""
    found = rows.latest("memory")
    ways = {
        "autograd": "autograd, store",
        "torch.utils.checkpoint": "torch.utils.checkpoint",
        "checkpoint": "checkpoint",
        "offload to a folder": "offload to a folder",
        "revolve:8": "revolve:8",
        "reversible": "reversible",
    }
    return markdown(
        ("N", *ways.values()),
        (
            (
                str(steps),
                *(size(found[way, f"1x4x256x256 N={steps}", "peak live tensors"]) for way in ways),
            )
            for steps in (16, 64, 256, 1024)
        ),
    )


def ratios() -> str:
    """Times over those of another strategy."""
    places = {
        "small, z0 alone": "1x4x256x256 N=64 z0",
        "small, with parameters": "1x4x256x256 N=64 z0 and parameters",
        "deep, z0 alone": "1x4x256x256 N=16 z0, deep",
    }
    pairs = {
        ("checkpoint", "store"): "1.4",
        ("offload to a folder", "checkpoint"): "1.05",
        ("reversible", "checkpoint, midpoint_reversible"): "1.1",
        ("revolve:8", "checkpoint"): "",
    }
    found = rows.latest("gradient")
    digits = {
        "checkpoint": found["checkpoint", "16x1x8x8 N=35", "time over store"],
        "reversible": rows.latest("reversible")[
            "memory=reversible", "64x1x8x8 N=64", "time over checkpoint"
        ],
    }
    lines = []
    for (way, base), limit in pairs.items():
        cells = (number(found[way, place, f"time over {base}"]) for place in places.values())
        last = number(digits[way]) if way in digits else ""
        lines.append((f"{way} over {base.split(',')[0]}", limit, *cells, last))
    return markdown(("", "limit", *places, "digits"), lines)


def kernels() -> str:
    """Instructions an element of compiled kernels, with the limits set."""
    told = {
        ("step_fwd", "sincos"): ("step forward, sincos", "24 and 28"),
        ("step_bwd", "sincos"): ("step backward, sincos, dz0 accumulated", "26 and 30"),
        ("step_fwd", "signed_roll"): ("step forward, signed roll", ""),
        ("step_fwd", "philox"): ("step forward, philox", ""),
        ("step_fwd", "philox+signed_roll"): ("step forward, philox and signed roll", ""),
        ("leap int32", "sincos"): ("leap on int32, sincos, model input as well", ""),
        ("leap int64", "sincos"): ("leap on int64, sincos, model input as well", ""),
    }
    compiled = rows.kernels()
    lines = []
    for (name, noise), (line, limit) in told.items():
        pair = [compiled[name, "sm_90", noise, dtype] for dtype in ("float32", "bfloat16")]
        bound = " and ".join(f"{each['memory_bound_below']:.1f}" for each in pair)
        counts = (f"{each['instructions_per_element']:.1f}" for each in pair)
        lines.append((line, *counts, bound, limit))
    return markdown(("kernel", "float32", "bf16", "memory bound below", "limit set"), lines)


def pixels(
    op: str, ways: tuple[str, ...], shape: str, sides: tuple[int, ...] = (128, 256, 512)
) -> str:
    """Peaks by the side of an image, or by another size."""
    found = rows.latest(op)
    return markdown(
        ("", *map(str, sides)),
        (
            (
                way,
                *(
                    number(found[way, shape.format(side), "peak live tensors"], 0, MEBI)
                    for side in sides
                ),
            )
            for way in ways
        ),
    )


PIPELINES = (
    "the pipeline with gradients on",
    "the pipeline, enable_gradient_checkpointing",
    "checkpoint, decode blocks",
    "revolve:2, decode blocks",
)
DECODERS = ("store", "blocks", "halo", "tiles")


VIDEOS = ("store", "blocks", "frames")


def collectives() -> str:
    """Counts under FSDP2."""
    found = rows.latest("fsdp2")
    shape = "8 calls, 3 blocks and a root, 2 ranks"
    metrics = ("all-gathers forward", "all-gathers", "reduce-scatters")
    told = {"auto": "auto, with room for all"}
    return markdown(
        ("memory", "all-gathers in the run", "with its backward", "reduce-scatters, if trained"),
        (
            (told.get(way, way), *(number(found[f"{way}, trained", shape, m], 0) for m in metrics))
            for way in ("store", "auto", "checkpoint", "reversible", "revolve:3")
        ),
    )


TABLES = {
    "native": native,
    "peaks": peaks,
    "ratios": ratios,
    "kernels": kernels,
    "pipeline-peaks": lambda: pixels("pipeline", PIPELINES, "1x3x{0}x{0} N=10"),
    "decode-peaks": lambda: pixels("decode", DECODERS, "1x3x{0}x{0}"),
    "video-peaks": lambda: pixels("decode of a video", VIDEOS, "1x3x{0}x64x64", (9, 17, 33)),
    "collectives": collectives,
}
