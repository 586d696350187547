# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of figures in README.md and docs/, each from the latest rows in results/.

A table stands between ``<!-- rows: NAME -->`` and ``<!-- rows: end -->``; `TABLES` has the names.

make plots
"""

import math
import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import on_paper
import rows

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- rows: ([\w-]+) -->\n)(.*?)(<!-- rows: end -->)", re.DOTALL)


def markdown(head: Iterable[str], lines: Iterable[Iterable[str]]) -> str:
    """A table, its first column text and the others figures."""
    head = list(head)
    ruled = ["---", *["--:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, ruled, *lines))


def number(row: dict[str, str], digits: int = 2, unit: float = 1.0) -> str:
    """The median of a row."""
    return f"{float(row['median']) / unit:.{digits}f}"


def ranged(row: dict[str, str], digits: int = 2) -> str:
    """The median of a row with the least and the greatest."""
    low, high = (f"{float(row[q]):.{digits}f}" for q in ("q20", "q80"))
    return f"{number(row, digits)} ({low} to {high})"


def size(row: dict[str, str]) -> str:
    """Bytes in MiB, by three digits."""
    value = float(row["median"]) / 2**20
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def power(row: dict[str, str]) -> str:
    """An error."""
    return f"{float(row['median']):.0e}".replace("e-0", "e-")


# Peers.


def works() -> list[str]:
    """The workloads of the peers, in the order of the rows."""
    return list(dict.fromkeys(shape for _, shape, _ in rows.latest("peers")))


def compared(work: str, names: dict[str, str] | None = None) -> str:
    """Every way, or those that are named, on one workload."""
    found = rows.latest("peers")
    ways = list(dict.fromkeys(way for way, shape, _ in found if shape == work))
    names = names or {way: way for way in ways}
    return markdown(
        ("", "time over autograd", "peak, MiB", "error of the gradient"),
        (
            (
                told,
                number(found[way, work, "time over autograd"]),
                size(found[way, work, "peak live tensors"]),
                power(found[way, work, "gradient error"]),
            )
            for way, told in names.items()
        ),
    )


def work(start: str) -> str:
    """The workload whose title begins so."""
    return next(each for each in works() if each.startswith(start))


FIVE = {
    "autograd": "a loop of one's own, autograd",
    "torch.utils.checkpoint": "`torch.utils.checkpoint` around each step",
    "diffusers EulerDiscreteScheduler": "a diffusers scheduler, gradients on",
    "k-diffusion sample_euler": "k-diffusion without its `no_grad`",
    "torchdiffeq odeint_adjoint": "torchdiffeq's `odeint_adjoint`",
    "gradsampler store": '**`gs.sample(..., memory="store")`**',
    "gradsampler checkpoint": '**`memory="checkpoint"`**',
}


# The guides.


def purifier() -> str:
    """Accuracy under attack by the gradient that the attack takes."""
    found = rows.latest("purifier")
    sizes = sorted({re.search(r"box ([\d.]+)", shape)[1] for _, shape, _ in found} - {"0.0"})
    names = ("classifier alone", "identity", "fewer steps", "exact", "exact, mean of 4")
    by = {
        (way, re.search(r"box ([\d.]+)", shape)[1], metric): row
        for (way, shape, metric), row in found.items()
    }
    head = ("gradient of the attack", *(f"half width {each}" for each in sizes))
    lines = [(name, *(ranged(by[name, each, "accuracy"]) for each in sizes)) for name in names]
    bare = [number(by["classifier alone", each, "accuracy without purifier"]) for each in sizes]
    return markdown(head, [*lines, ("no purifier, classifier alone", *bare)])


def inverse() -> str:
    """Distances to the digit and to the measurement."""
    found = rows.latest("inverse")
    by = {(way, shape.split()[-1], metric): row for (way, shape, metric), row in found.items()}
    metrics = ("distance to the digit", "distance to the measurement")
    problems = ("inpainting", "super-resolution")
    return markdown(
        ("", *(f"{p}: {m}" for p in problems for m in metrics)),
        (
            (way, *(number(by[way, p, m], 3) for p in problems for m in metrics))
            for way in ("first guess", "by z0", "by start")
        ),
    )


# Which noise.

SOURCES = ("independent", "mixture 0.4", "mixture 0.8", "signed roll", "signs", "sincos")


def noise(columns: dict[str, tuple[str, str]], digits: int = 2) -> str:
    """By source: metrics at places, with the least and the greatest over seeds."""
    found = rows.latest("noise")
    by = {(source, shape, metric): row for (source, shape, metric), row in found.items()}
    return markdown(
        ("noise", *columns),
        (
            (source, *(ranged(by[source, *place], digits) for place in columns.values()))
            for source in SOURCES
        ),
    )


def noise_samples(place: str, data: str) -> str:
    """Are the samples right?"""
    return noise(
        {
            "deviation over data's": (place, "deviation over data's"),
            "spread of energy over data's": (place, "spread of energy over data's"),
            "sliced Wasserstein distance": (place, "sliced Wasserstein distance"),
        }
        | ({"read as their class": (place, "read as their class")} if data == "digits" else {})
        | ({} if data == "digits" else {"kurtosis over data's": (place, "kurtosis over data's")})
    )


def noise_gradients() -> str:
    """Does the gradient reach z0, and does it depend on the draw?"""
    heun, sde = ("gradient digits heun, churn N=50", "gradient digits dpmpp_2m_sde N=50")
    return noise(
        {
            "norm, heun with churn": (heun, "gradient norm"),
            "norm, dpmpp_2m_sde": (sde, "gradient norm"),
            "cosine of two draws, heun with churn": (heun, "cosine over draws"),
            "cosine of two draws, dpmpp_2m_sde": (sde, "cosine over draws"),
        }
    )


def noise_optimisation(solver: str) -> str:
    """Where an optimisation of z0 ends."""
    place = f"optimisation digits {solver} N=20"
    return noise(
        {
            "p(7) in the end": (place, "p(7) after optimisation"),
            "with other noise": (place, "p(7) with other noise"),
            "updates until the loss is 0.1": (place, "updates until the loss is 0.1"),
        }
    )


def noise_correlations() -> str:
    """Of the injected noises."""
    place = "noises 1x8x8 N=50"
    metrics = (
        "correlation with z0",
        "correlation between steps",
        "spread of correlation between steps",
    )
    return noise({metric: (place, metric) for metric in metrics}, 3)


# Scaling.


def growths() -> list[tuple[str, str, float, float, float]]:
    """Way, what is varied, its value, seconds and bytes, by the value."""
    found = rows.latest("scaling")
    table = []
    for (way, shape, metric), row in found.items():
        axis, state, steps = shape.split()
        batch, channels, side, _ = map(int, state.split("x"))
        value = {"steps": int(steps[2:]), "batch": batch, "state": channels * side * side}[axis]
        if metric == "time":
            peak = float(found[way, shape, "peak live tensors"]["median"])
            table.append((way, axis, value, float(row["median"]), peak))
    return sorted(table, key=lambda line: line[2])


def exponent(points: list[tuple[float, float]]) -> float:
    """The slope of logarithms over the last three points, by least squares."""
    x, y = ([math.log(value) for value in each] for each in zip(*points[-3:], strict=True))
    return statistics.linear_regression(x, y).slope


def slopes() -> str:
    """Exponents of time and memory by steps, batch and state."""
    table = growths()
    ways = list(dict.fromkeys(line[0] for line in table))
    axes = ("steps", "batch", "state")
    head = [f"{what}, {axis}" for what in ("time", "memory") for axis in axes]

    def along(way: str, axis: str, column: int) -> str:
        return f"{exponent([(r[2], r[column]) for r in table if r[:2] == (way, axis)]):.2f}"

    return markdown(
        ("exponent of", *head),
        ((way, *(along(way, axis, column) for column in (3, 4) for axis in axes)) for way in ways),
    )


# On paper.

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


TABLES: dict[str, Callable[[], str]] = {
    "five": lambda: compared(work("convolutions"), FIVE),
    "perceptron": lambda: compared(work("perceptron 16x64 N=256 euler")),
    "perceptron-sde": lambda: compared(work("perceptron 16x64 N=256 euler_maruyama")),
    "convolutions": lambda: compared(work("convolutions")),
    "unet": lambda: compared(work("UNet2DModel")),
    "video": lambda: compared(work("video latent 1x16x8x60x104 N=20 euler")),
    "video-sde": lambda: compared(work("video latent 1x16x8x60x104 N=20 dpmpp_2m_sde")),
    "purifier": purifier,
    "inverse": inverse,
    "noise-gaussian": lambda: noise_samples("gaussian heun, churn N=50", "gaussian"),
    "noise-digits": lambda: noise_samples("digits heun, churn N=50", "digits"),
    "noise-gradients": noise_gradients,
    "noise-optimisation": lambda: noise_optimisation("heun, churn"),
    "noise-optimisation-ancestral": lambda: noise_optimisation("euler_ancestral"),
    "noise-correlations": noise_correlations,
    "slopes": slopes,
    "paper-parts": paper_parts,
    "paper-peaks": paper_peaks,
    "paper-collectives": paper_collectives,
    "paper-times": paper_times,
}


def updated(text: str) -> str:
    """A page with its tables written anew."""
    return BLOCK.sub(lambda block: block[1] + TABLES[block[2]]() + block[4], text)


def pages() -> list[Path]:
    """Those that have such a table."""
    every = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return [path for path in every if BLOCK.search(path.read_text())]


def main() -> None:
    for path in pages():
        path.write_text(updated(path.read_text()))
        print(f"wrote the tables of {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
