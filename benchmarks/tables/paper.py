# SPDX-License-Identifier: Apache-2.0
"""docs/scaling.md: on paper."""

import math
from dataclasses import replace

import on_paper

from tables.form import markdown

LAYOUTS = {f"{gpus} GPU" + "s" * (gpus > 1): gpus for gpus in on_paper.GPUS}


def gigabytes(count: float) -> str:
    """By two digits, and whole from ten on."""
    value = count / 1e9
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def seconds(count: float) -> str:
    return f"{count:,.0f}" if count >= 10 else f"{count:.1g}"


def paper_parts() -> str:
    """What a GPU holds, by part."""
    free = [on_paper.Layout(gpus, gpus) for gpus in LAYOUTS.values()]
    state = on_paper.FLOAT32 * math.prod(on_paper.LATENT)
    parts = {
        "weights, its shard": [each.weights() for each in free],
        "weights gathered for a while": [each.gathered() for each in free],
        "gradient of trained weights": [replace(each, trained=True).gradient() for each in free],
        "one state": [state] * len(free),
        "kept by one call, blocks with activation checkpoints": [each.one_call() for each in free],
        "beside it in a block's backward": [each.one_block() for each in free],
        "kept by one call without": [each.one_call(checkpointed=False) for each in free],
    }
    lines = ((name, *map(gigabytes, values)) for name, values in parts.items())
    return markdown(("GB a GPU", *LAYOUTS), lines)


def paper_peaks() -> str:
    """The sum by strategy, frozen and trained."""
    layouts = [
        on_paper.Layout(gpus, gpus, trained)
        for trained in (False, True)
        for gpus in LAYOUTS.values()
    ]
    columns = [(each, list(on_paper.strategies(each))) for each in layouts]
    head = [f"{how}, {told}" for how in ("frozen", "trained") for told in LAYOUTS]
    return markdown(
        ("GB a GPU", *head),
        (
            (f"`{row.name}`", *(gigabytes(each.fixed() + found[k].peak) for each, found in columns))
            for k, row in enumerate(columns[0][1])
        ),
    )


def paper_collectives() -> str:
    """Counts of a run and its backward."""
    m = on_paper.model()
    lines = []
    for row in on_paper.strategies(on_paper.Layout(8, 8)):
        made = on_paper.evaluations(row)
        blocks, roots = on_paper.gathers(m.blocks, on_paper.CALLS, made)
        whole = on_paper.BFLOAT16 * (blocks * m.block + roots * m.root)
        host = gigabytes(row.host) if row.host else "0"
        lines.append(
            (
                f"`{row.name}`",
                f"{made}",
                f"{blocks + roots:,}",
                f"{whole / 1e12:.1f}",
                f"{on_paper.reductions(m.blocks)}",
                f"{on_paper.CALLS}",
                host,
            )
        )
    head = (
        "",
        "model calls",
        "all-gathers",
        "TB gathered",
        "reduce-scatters, if trained",
        "all-reduces of the input's gradient",
        "GB on the host",
    )
    return markdown(head, lines)


def paper_times() -> str:
    """Seconds of arithmetic and of the links, frozen weights."""
    layouts = {told: on_paper.Layout(gpus, gpus) for told, gpus in LAYOUTS.items()}
    layouts["64 GPUs, a copy of the weights a node"] = on_paper.Layout(64, 8)
    lines = []
    for k, row in enumerate(on_paper.strategies(next(iter(layouts.values())))):
        made, cells = on_paper.evaluations(row), []
        for each in layouts.values():
            times = (
                list(on_paper.strategies(each))[k].seconds,
                on_paper.gathering(each, made),
                on_paper.exchanging(each, made),
            )
            cells.append(" + ".join(map(seconds, times)) if each.gpus > 1 else seconds(times[0]))
        lines.append((f"`{row.name}`", *cells))
    return markdown(("s: arithmetic + weights + tokens", *layouts), lines)


TABLES = {
    "paper-parts": paper_parts,
    "paper-peaks": paper_peaks,
    "paper-collectives": paper_collectives,
    "paper-times": paper_times,
}
