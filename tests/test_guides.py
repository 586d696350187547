# SPDX-License-Identifier: Apache-2.0
"""The code of every page in docs/ runs, from top to bottom, and says no more than the page does."""

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"
ELSEWHERE = {  # pages that a test of their own runs, with what they suppose
    "cosmos.md": "test_cosmos.py",
    "diffusers.md": "test_diffusers_page.py",
    "gradient-policies.md": "test_policies.py",
    "guidance.md": "test_guidance.py",
    "guided-diffusion.md": "test_guided_diffusion.py",
    "open-sora.md": "test_open_sora.py",
}
GUIDES = sorted(
    path.name
    for path in DOCS.glob("*.md")
    if "```python" in path.read_text() and path.name not in ELSEWHERE
)


def code(page):
    """Its blocks as one program, each line where it is on the page."""
    kept, inside = [], False
    for line in page.read_text().splitlines():
        inside = inside and line != "```"
        kept.append(line if inside else "")
        inside = inside or line == "```python"
    return "\n".join(kept)


@pytest.mark.parametrize("name", GUIDES)
def test_the_code_of_a_page_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    page = DOCS / name
    exec(compile(code(page), str(page), "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("name", ELSEWHERE)
def test_the_other_pages_are_run_where_it_says(name):
    text = (Path(__file__).parent / ELSEWHERE[name]).read_text()
    assert f'"{name}"' in text or f"docs/{name}" in text


@pytest.mark.parametrize("path", sorted((DOCS / "pictures").iterdir()), ids=lambda path: path.name)
def test_every_picture_is_on_a_page_and_comes_from_a_script(path):
    """A PNG beside an SVG of one name is the same picture."""
    pages = [*DOCS.glob("*.md"), DOCS.parent / "README.md"]
    stem = path.stem
    assert any(re.search(rf"pictures/{stem}\.(png|svg)", page.read_text()) for page in pages)
    scripts = [*DOCS.parent.glob("examples/*.py"), *DOCS.parent.glob("benchmarks/*.py")]
    assert any(stem in script.read_text() for script in scripts)
