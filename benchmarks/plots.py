# SPDX-License-Identifier: Apache-2.0
"""Pictures of the latest rows in results/, each as PNG and SVG in docs/pictures/.

make plots
"""

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import rows
from tables.scaling import growths

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

STYLE = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a8a94",
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "gradsampler",  # the same file from the same rows
}
OURS, OTHERS, OFF = "#c2410c", "#475569", "#94a3b8"
COLOURS = ("#c2410c", "#1b5e8c", "#2a9d5c", "#7c3aed", "#b58900", "#475569")


def number(row: dict[str, str] | None, field: str = "median") -> float:
    """A field of a row, NaN where there is none."""
    return float(row[field]) if row else float("nan")


def peers() -> Any:
    """Time and memory of every peer, by workload; a hollow mark is a wrong gradient."""
    found = rows.latest("peers")
    works = list(dict.fromkeys(shape for _, shape, _ in found))
    counts = [len({way for way, shape, _ in found if shape == work}) for work in works]
    figure, axes = plt.subplots(
        len(works), 2, figsize=(7.6, 0.19 * sum(counts) + 0.7 * len(works)), height_ratios=counts
    )
    for (left, right), work in zip(axes, works, strict=True):
        ways = list(dict.fromkeys(way for way, shape, _ in found if shape == work))[::-1]
        for axis, metric, scale in (
            (left, "time over autograd", 1),
            (right, "peak live tensors", 2**20),
        ):
            for k, way in enumerate(ways):
                value = number(found[way, work, metric]) / scale
                wrong = number(found[way, work, "gradient error"]) > 1e-3
                colour = OURS if way.startswith("gradsampler") else OTHERS
                face = "white" if wrong else colour
                axis.plot(value, k, "o", ms=4.5, mec=colour, mfc=face)
                axis.axhline(k, color="#eeeef2", lw=0.6, zorder=0)
            axis.set(xscale="log", ylim=(-0.6, len(ways) - 0.4))
            axis.set_yticks(range(len(ways)), ways if axis is left else [""] * len(ways))
            axis.tick_params(axis="y", length=0)
            axis.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.minorticks_off()
            low, high = axis.get_xlim()
            axis.set_xlim(low / 1.2, high * 1.2)
        left.axvline(1, color="#d8d8de", lw=0.8, zorder=0)
        left.set_title(work)
    axes[-1][0].set_xlabel("time over plain autograd")
    axes[-1][1].set_xlabel("peak of live tensors, MiB")
    return figure


def memory() -> Any:
    """Peak memory of a gradient against the number of steps."""
    found = rows.latest("memory")
    figure, axis = plt.subplots(figsize=(6.4, 3.4))
    names = (
        "autograd",
        "torch.utils.checkpoint",
        "checkpoint",
        "revolve:8",
        "reversible",
        "offload to a folder",
    )
    for name, colour in zip(names, ("#475569", "#94a3b8", *COLOURS[:4]), strict=True):
        points = sorted(
            (int(re.search(r"N=(\d+)", shape)[1]), number(row) / 2**20)
            for (way, shape, metric), row in found.items()
            if (way, metric) == (name, "peak live tensors")
        )
        style = "--" if name in ("autograd", "torch.utils.checkpoint") else "-"
        axis.plot(*zip(*points, strict=True), style, marker="o", ms=3, color=colour, label=name)
    axis.set(xscale="log", yscale="log", xlabel="steps N", ylabel="peak of live tensors, MiB")
    axis.set_xticks([16, 64, 256, 1024], ["16", "64", "256", "1024"])
    axis.legend(fontsize=7.5)
    return figure


def scaling() -> Any:
    """Time and memory against the steps, the batch and the state."""
    table = growths()
    figure, axes = plt.subplots(2, 3, figsize=(8.2, 4.6), sharex="col", sharey="row")
    names = {"steps": "steps N", "batch": "batch B", "state": "elements of a sample"}
    ways = list(dict.fromkeys(line[0] for line in table))
    for column, (axis, label) in zip(axes.T, names.items(), strict=True):
        for way, colour in zip(ways, (OTHERS, *COLOURS), strict=False):
            points = [line for line in table if line[:2] == (way, axis)]
            style = {"ls": "--" if way == "autograd" else "-", "color": colour, "label": way}
            x, times, peaks = zip(*((r[2], r[3], r[4] / 2**20) for r in points), strict=True)
            column[0].plot(x, times, marker="o", ms=2.5, lw=1.1, **style)
            column[1].plot(x, peaks, marker="o", ms=2.5, lw=1.1, **style)
        column[1].set(xscale="log", xlabel=label)
        column[1].set_xticks(x, [f"{value:g}" for value in x])
        column[1].xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        for each in column:
            each.set_yscale("log")
    axes[0][0].set_ylabel("seconds a gradient")
    axes[1][0].set_ylabel("peak of live tensors, MiB")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, fontsize=8)
    return figure


def purifier() -> Any:
    """Accuracy of a purified classifier against the size of the attack, by its gradient."""
    found = rows.latest("purifier")
    figure, axis = plt.subplots(figsize=(6.4, 3.4))

    def line(name: str, metric: str, label: str, **style: Any) -> None:
        points = sorted(
            (
                float(re.search(r"box ([\d.]+)", shape)[1]),
                *(number(row, q) for q in ("median", "q20", "q80")),
            )
            for (way, shape, what), row in found.items()
            if what == metric and way in (name, "none")
        )
        x, y, low, high = zip(*points, strict=True)
        axis.plot(x, y, marker="o", ms=3, label=label, **style)
        axis.fill_between(x, low, high, color=style["color"], alpha=0.12, lw=0)

    line("classifier alone", "accuracy without purifier", "no purifier", color="#94a3b8", ls="--")
    names = ("classifier alone", "identity", "fewer steps", "exact", "exact, mean of 4")
    shades = ("#7c3aed", "#1b5e8c", "#2a9d5c", "#e08a5b", "#c2410c")
    for name, colour in zip(names, shades, strict=True):
        line(name, "accuracy", f"purifier, gradient: {name}", color=colour)
    axis.set(xlabel="half width of the box that the attack may use", ylabel="accuracy", ylim=(0, 1))
    axis.legend(fontsize=7.5)
    return figure


SOURCES = ("independent", "mixture 0.4", "mixture 0.8", "signed roll", "signs", "sincos")
SOLVERS = ("heun, churn", "res_2ab, churn", "euler_ancestral", "dpmpp_2m_sde")


def over_steps(axis: Axes, found: dict, prefix: str, solver: str, metric: str) -> None:
    """A metric against N, by source, with the least and the greatest over seeds."""
    for source, colour in zip(SOURCES, COLOURS, strict=True):
        points = []
        for (name, shape, what), row in found.items():
            place = re.match(rf"{re.escape(prefix)} {re.escape(solver)} N=(\d+)$", shape)
            if place and (name, what) == (source, metric):
                points.append((int(place[1]), *(number(row, q) for q in ("median", "q20", "q80"))))
        if points:
            x, y, low, high = zip(*sorted(points), strict=True)
            axis.plot(x, y, marker="o", ms=2.5, lw=1.1, color=colour, label=source)
            axis.fill_between(x, low, high, color=colour, alpha=0.15, lw=0)
    axis.set_xscale("log")
    axis.set_xticks([10, 20, 50, 100, 200], ["10", "20", "50", "100", "200"])
    axis.xaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())


def grid(panels: dict[str, tuple[str, str, str]]) -> Any:
    """Metrics by row, solvers by column."""
    found = rows.latest("noise")
    figure, axes = plt.subplots(
        len(panels),
        4,
        figsize=(9.2, 1.75 * len(panels) + 0.4),
        sharex=True,
        sharey="row",
        squeeze=False,
    )
    for line, (label, (prefix, metric, scale)) in zip(axes, panels.items(), strict=True):
        for axis, solver in zip(line, SOLVERS, strict=True):
            over_steps(axis, found, prefix, solver, metric)
            axis.set_yscale(scale)
            if scale == "log":
                axis.yaxis.set_major_formatter("{x:g}")
        line[0].set_ylabel(label)
    for axis, solver in zip(axes[0], SOLVERS, strict=True):
        axis.set_title(solver)
    for axis in axes[-1]:
        axis.set_xlabel("steps N")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize=8)
    return figure


def noise_samples() -> Any:
    """Are the samples right?"""
    return grid(
        {
            "Gaussian:\ndeviation over data's": ("gaussian", "deviation over data's", "log"),
            "Gaussian: spread of\nenergy over data's": (
                "gaussian",
                "spread of energy over data's",
                "log",
            ),
            "mixture: sliced\nWasserstein distance": (
                "mixture",
                "sliced Wasserstein distance",
                "log",
            ),
            "digits: sliced\nWasserstein distance": (
                "digits",
                "sliced Wasserstein distance",
                "log",
            ),
            "digits: read\nas their class": ("digits", "read as their class", "linear"),
        }
    )


def noise_gradients() -> Any:
    """How much gradient reaches z0?"""
    return grid(
        {
            "median of\n|d log p(7) / d z0|": ("gradient digits", "gradient norm", "log"),
            "cosine between two\ndraws of the noise": (
                "gradient digits",
                "cosine over draws",
                "linear",
            ),
        }
    )


FIGURES: dict[str, Callable[[], Any]] = {
    "peers": peers,
    "memory": memory,
    "scaling": scaling,
    "purifier": purifier,
    "noise-samples": noise_samples,
    "noise-gradients": noise_gradients,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names", nargs="*", help=f"of {', '.join(FIGURES)}; all where none is given"
    )
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.names or FIGURES:
        with plt.rc_context(STYLE):
            figure = FIGURES[name]()
            figure.savefig(arguments.out / f"{name}.png", dpi=130)
            figure.savefig(arguments.out / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)
        print(f"wrote {arguments.out / name}.png and .svg")


if __name__ == "__main__":
    main()
