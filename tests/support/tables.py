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

PAGE = Path(__file__).parents[2] / "docs" / "diffusers.md"

Row = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table between two marks of a page."""

    name: str
    head: tuple[str, ...]  # of the first columns

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
        errors = [cell for way in ways.WAYS for cell in (f"{way}: sample", "gradient")]
        head = (*self.head, "auto takes", *errors)
        lines = [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]
        return "\n".join([before + begin, *lines, end + after])


PIPELINES = Table("pipelines", ("pipeline", "scheduler"))
SCHEDULERS = Table("schedulers", ("scheduler", "with"))


def pipeline(name: str, found: ways.Compared) -> Row:
    """The row of a pipeline."""
    return found.cells(f"`{found.kind}` ({name})", f"`{found.scheduler}`")


def scheduler(name: str, setup: schedulers.Setup, found: ways.Compared) -> Row:
    """The row of a scheduler."""
    return found.cells(f"`{name}`", setup.text())


@cache
def rows(table: Table) -> list[Row]:
    """The rows of the page as it is."""
    lines = table.within(PAGE.read_text()).strip().splitlines()[2:]
    return [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in lines]


def check(table: Table, row: Row) -> None:
    """Asserts that the page has this row, its errors to an order of magnitude."""
    width = len(table.head) + 1
    (shown,) = [each for each in rows(table) if each[:width] == row[:width]]
    for k, (theirs, ours) in enumerate(zip(shown[width:], row[width:], strict=True)):
        assert (theirs == "") == (ours == ""), (shown, row)
        if theirs != "":
            same = k in (2, 4)  # the samples of steps and calls
            room = 0 if same else 1e-6
            assert float(ours) <= max(10 * float(theirs), room), (shown, row)


def main(argv: Sequence[str]) -> None:
    """Brings the tables in each of the files up to date."""
    warnings.simplefilter("ignore")
    assert diffusers.DiffusionPipeline
    every = {
        PIPELINES: [pipeline(name, ways.pipeline(name)) for name in CASES],
        SCHEDULERS: [
            scheduler(name, setup, ways.scheduler(name, setup))
            for name, setups in schedulers.SETUPS.items()
            for setup in setups
        ],
    }
    for name in argv:
        path = Path(name)
        for table, found in every.items():
            path.write_text(table.written(path.read_text(), found))


if __name__ == "__main__":
    main(sys.argv[1:])
