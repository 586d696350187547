# SPDX-License-Identifier: Apache-2.0
"""Writes the figures of README.md, docs/ and benchmarks/README.md from the latest rows in results/.

A table stands between ``<!-- rows: NAME -->`` and ``<!-- rows: end -->``; `tables/` has the names.
Single figures name their rows as `quotes.py` says.

make plots
"""

import re
from pathlib import Path

import quotes
from tables import TABLES

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"(<!-- rows: ([\w-]+) -->\n)(.*?)(<!-- rows: end -->)", re.DOTALL)


def updated(text: str) -> str:
    """A page with its tables and quotes written anew."""
    return quotes.updated(BLOCK.sub(lambda block: block[1] + TABLES[block[2]]() + block[4], text))


def pages() -> list[Path]:
    """Those that have such a table or quote."""
    every = [ROOT / "README.md", ROOT / "DESIGN.md", ROOT / "benchmarks" / "README.md"]
    every += sorted((ROOT / "docs").glob("*.md"))
    return [path for path in every if "<!-- row" in path.read_text()]


def main() -> None:
    for path in pages():
        path.write_text(updated(path.read_text()))
        print(f"wrote the figures of {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
