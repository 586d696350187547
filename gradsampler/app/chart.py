# SPDX-License-Identifier: Apache-2.0
"""A plan as a picture, with matplotlib, which is imported only when one is drawn."""

from pathlib import Path
from typing import Any

from gradsampler.memory import Plan, Revolve

_INK, _FAINT, _ACCENT = "#1b1b1f", "#8a8a94", "#c2410c"
_MIB = 2**20


def memory_against_time(path: Path, plan: Plan) -> None:
    """Writes a PNG: a point for each strategy, a curve for revolve, a line for the budget."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(6.4, 4.0), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axis: Any = figure.subplots()
    slots, most = [1], plan.predictor.most_slots()
    while slots[-1] < most:
        slots.append(min(2 * slots[-1], most))
    curve = [plan.predictor.revolve(count) for count in slots]
    axis.plot(
        [row.factor for row in curve],
        [row.peak / _MIB for row in curve],
        color=_FAINT, marker=".", linewidth=1, label=f"revolve, 1 to {most} slots",
    )  # fmt: skip
    for row in plan:
        place, color = (row.factor, row.peak / _MIB), _ACCENT if row.fits else _FAINT
        axis.plot(*place, marker="o", color=color, linestyle="none")
        # Revolve with many slots lies on checkpoint: its name goes below the point.
        shift, side = ((-5, -5), "right") if isinstance(row.memory, Revolve) else ((5, 5), "left")
        axis.annotate(
            row.name, place, shift, textcoords="offset points", fontsize=8, color=_INK,
            ha=side, va="top" if side == "right" else "baseline",
        )  # fmt: skip
    axis.axhline(plan.budget / _MIB, color=_INK, linewidth=0.8, linestyle="--", label="budget")
    axis.set(xscale="log", yscale="log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("time over that of store", fontsize=8, color=_INK)
    axis.set_ylabel("peak memory [MiB]", fontsize=8, color=_INK)
    axis.tick_params(which="both", labelsize=7, colors=_FAINT, length=2)
    axis.legend(fontsize=7, frameon=False)
    for spine in axis.spines.values():
        spine.set_color("#d8d8de")
    figure.savefig(path, facecolor="white")
