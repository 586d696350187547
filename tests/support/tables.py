# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/diffusers.md: ``make tables`` measures and writes them, tests hold them.

PYTHONPATH=tests python -m support.tables docs/diffusers.md
"""

import sys
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from support import schedulers, ways
from support.pipelines import CASES, diffusers
from support.schedulers import leveled

PAGE = Path(__file__).parents[2] / "docs" / "diffusers.md"

Row = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table between two marks of a page."""

    name: str
    known: tuple[str, ...]  # heads of the columns that have to be as they are
    measured: tuple[str, ...]  # of those which hold errors
    exact: tuple[int, ...] = ()  # of these, the ones where 0 says that it is equal to the bit

    @property
    def marks(self) -> tuple[str, str]:
        """The lines around it."""
        return f"<!-- {self.name}: begin -->", f"<!-- {self.name}: end -->"

    def within(self, text: str) -> str:
        """What lies between the marks."""
        begin, end = self.marks
        return text.split(begin)[1].split(end)[0]

    def written(self, text: str, rows: Iterable[Row]) -> str:
        """The page with these rows."""
        begin, end = self.marks
        before, after = text.split(begin)[0], text.split(end)[1]
        head = self.known + self.measured
        lines = [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]
        return "\n".join([before + begin, *lines, end + after])


WAYS = tuple(cell for way in ways.WAYS for cell in (f"{way}: sample", "gradient"))
PIPELINES = Table("pipelines", ("pipeline", "scheduler", "auto takes"), WAYS, exact=(2, 4))
SCHEDULERS = Table("schedulers", ("scheduler", "with", "auto takes"), WAYS, exact=(2, 4))
LEVELS = Table("levels", ("scheduler", "with"), ("by program", "by the pipeline's own code"))


def pipeline(name: str, found: ways.Compared) -> Row:
    """The row of a pipeline."""
    return found.cells(f"`{found.kind}` ({name})", f"`{found.scheduler}`")


def scheduler(name: str, setup: schedulers.Setup, found: ways.Compared) -> Row:
    """The row of a scheduler."""
    return found.cells(f"`{name}`", setup.text())


def other(name: str) -> Row:
    """The row of a scheduler whose states have no gradient."""
    return (f"`{name}`", schedulers.OTHER[name], "none", *[""] * len(WAYS))


def levels(name: str, setup: schedulers.Setup, found: ways.Levels) -> Row:
    """The row of a scheduler whose levels can be given."""
    return (f"`{name}`", setup.text(), *found.cells())


@cache
def rows(table: Table) -> list[Row]:
    """The rows of the page as it is."""
    lines = table.within(PAGE.read_text()).strip().splitlines()[2:]
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]


def check(table: Table, row: Row) -> None:
    """Asserts that the page has this row, its errors to an order of magnitude."""
    width = len(table.known)
    (shown,) = [each for each in rows(table) if each[:width] == row[:width]]
    for k, (theirs, ours) in enumerate(zip(shown[width:], row[width:], strict=True)):
        if theirs in ("", "NaN", "none"):
            assert ours == theirs, (shown, row)
        else:
            room = 0 if k in table.exact else 1e-6
            bound = max(10 * float(theirs), room) * (1 + 1e-9)  # ten times 1e-6 is less than 1e-5
            assert float(ours) <= bound, (shown, row)


def main(argv: Sequence[str]) -> None:
    """Brings the tables in each of the files up to date."""
    warnings.simplefilter("ignore")
    assert diffusers.DiffusionPipeline
    setups = [(name, setup) for name, each in schedulers.SETUPS.items() for setup in each]
    every = {
        PIPELINES: [pipeline(name, ways.pipeline(name)) for name in CASES],
        SCHEDULERS: sorted(
            [
                *(scheduler(*setup, ways.scheduler(*setup)) for setup in setups),
                *map(other, schedulers.OTHER),
            ],
            key=lambda row: row[0],
        ),
        LEVELS: [
            levels(name, setup, ways.levels(name, setup))
            for name, setup in ((name, schedulers.SETUPS[name][k]) for name, k in leveled())
        ],
    }
    for name in argv:
        path = Path(name)
        for table, found in every.items():
            path.write_text(table.written(path.read_text(), found))


if __name__ == "__main__":
    main(sys.argv[1:])
