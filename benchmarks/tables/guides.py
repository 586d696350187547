# SPDX-License-Identifier: Apache-2.0
"""docs/purifier.md, docs/inverse-problems.md, docs/learned-schedules.md."""

import re

import rows

from tables.form import markdown, number, ranged


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


def learned() -> str:
    """How far 8 steps land from 100, on two schedules."""
    found = rows.latest("learned schedule")
    told = {"Karras": "Karras, 8 steps and level 0", "fitted": "fitted, 8 steps and level 0"}
    lines = ((told[way], number(row, 4)) for (way, _, _), row in found.items())
    return markdown(("levels", "error"), lines)


TABLES = {"purifier": purifier, "inverse": inverse, "learned-schedule": learned}
