# SPDX-License-Identifier: Apache-2.0
"""A guide as a notebook, executed.

make notebook
"""

import argparse
import re
from pathlib import Path

import jupytext
import nbclient
import nbformat

DOCS = Path(__file__).parents[1]
LINK = re.compile(r"(\]\()(?!https?:|#)([^)\s]+\))")


def unexecuted(page: Path) -> nbformat.NotebookNode:
    """The page's text and code as cells, its links as seen from docs/notebooks/."""
    found = jupytext.reads(page.read_text(), fmt="md")
    for k, cell in enumerate(found.cells):
        cell["id"] = f"cell-{k}"
        if cell.cell_type == "markdown":
            text = LINK.sub(r"\1../\2", cell.source)
            cell.source = text.replace("](../notebooks/", "](")
    found.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
    return found


def executed(page: Path) -> nbformat.NotebookNode:
    """The same with what its cells print; an error is one here as well."""
    found = unexecuted(page)
    nbclient.NotebookClient(found, timeout=600, kernel_name="python3").execute()
    for cell in found.cells:
        cell.metadata.pop("execution", None)  # the times
    found.metadata.pop("language_info", None)
    return found


def main() -> None:
    """Writes the notebook of a page into docs/notebooks/."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path, nargs="?", default=DOCS / "your-own-network.md")
    page = parser.parse_args().page
    path = DOCS / "notebooks" / f"{page.stem}.ipynb"
    path.parent.mkdir(exist_ok=True)
    nbformat.write(executed(page), path)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
