# SPDX-License-Identifier: Apache-2.0
"""Gives files outside docs/ a place in the site, and points links between all of them there.

A page is written for those who read it in the repository, where its links have to work as well. So
README.md is the front page, and a file of code that some page links to is a page of its own.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
PLACES = {
    "README.md": "index.md",
    "DESIGN.md": "design.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks.md",
    "csrc/README.md": "native.md",
    "gradsampler/models/CARD.md": "models.md",
}
LINK = re.compile(r"(\]\()([^)\s#]+)((?:#[^)\s]*)?\))")
SHOWN = {".py", ".toml", ".h", ".cpp", ".cu", ".cuh", ".yml", ".json", ".jsonl", ".csv"}


def place(path: str) -> str:
    """Where a file of the repository is in the site."""
    if path in PLACES:
        return PLACES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"source/{path}.md"


def origin(place: str) -> str:
    """The page of the repository that is at a place of the site."""
    return next((path for path, at in PLACES.items() if at == place), f"docs/{place}")


def target(link: str, page: str) -> str | None:
    """The file of the repository that a link on one of its pages leads to."""
    if "://" in link:
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    return path if (ROOT / path).is_file() else None


def moved(text: str, page: str) -> str:
    """The text of a page with its links as they are in the site."""

    def there(match: re.Match[str]) -> str:
        before, link, after = match.groups()
        path = target(link, page)
        if path is None:
            return match[0]
        return before + posixpath.relpath(place(path), posixpath.dirname(place(page))) + after

    return LINK.sub(there, text)


def source(path: str) -> str:
    """A file of code as a page."""
    text = (ROOT / path).read_text()
    language = Path(path).suffix[1:].replace("jsonl", "json")
    return f"# {path}\n\n````{language}\n{text}````\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages from outside docs/, and each file of code that a page links to."""
    pages = {file.src_uri: (ROOT / "docs" / file.src_uri) for file in files.documentation_pages()}
    for path, at in PLACES.items():
        files.append(File.generated(config, at, content=(ROOT / path).read_text()))
        pages[at] = ROOT / path
    linked = {
        path
        for at, file in pages.items()
        for _, link, _ in LINK.findall(file.read_text())
        if (path := target(link, origin(at)))
    }
    for path in sorted(linked):
        if place(path).startswith("source/") and Path(path).suffix in SHOWN:
            files.append(File.generated(config, place(path), content=source(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Points the links of a page to where things are in the site."""
    at = page.file.src_uri
    return markdown if at.startswith("source/") else moved(markdown, origin(at))
