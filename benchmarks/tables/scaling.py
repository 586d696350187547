# SPDX-License-Identifier: Apache-2.0
"""docs/scaling.md: as measured."""

import math
import statistics

import rows

from tables.form import markdown


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


TABLES = {"slopes": slopes}
