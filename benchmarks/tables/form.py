# SPDX-License-Identifier: Apache-2.0
"""The form of tables and of the figures in them."""

from collections.abc import Iterable


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
