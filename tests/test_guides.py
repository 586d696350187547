# SPDX-License-Identifier: Apache-2.0
"""The code of every page in docs/ runs, from top to bottom, and every picture has its script."""

import importlib.util
import json
import re
import warnings
from pathlib import Path

import pytest
import torch

from support.tiers import few

DOCS = Path(__file__).parents[1] / "docs"
ELSEWHERE = {  # pages that a test of their own runs, with what they suppose
    "cosmos.md": "test_cosmos.py",
    "diffusers.md": "test_diffusers_page.py",
    "distributed.md": "test_sharing.py",
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


@pytest.mark.parametrize("name", few(GUIDES, "seed-mechanisms.md", "reparameterization.md"))
def test_the_code_of_a_page_runs(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    page = DOCS / name
    exec(compile(code(page), str(page), "exec"), {"__name__": "__main__"})


@pytest.mark.thorough
def test_the_notebook_is_the_guide_executed():
    """Its cells are those of the page today, and what they print is what they print again."""
    found = importlib.util.spec_from_file_location("notebook", DOCS / "site" / "notebook.py")
    made = importlib.util.module_from_spec(found)
    found.loader.exec_module(made)
    page = DOCS / "your-own-network.md"
    kept = json.loads((DOCS / "notebooks" / "your-own-network.ipynb").read_text())
    now = made.unexecuted(page)
    assert ["".join(cell["source"]) for cell in kept["cells"]] == [c.source for c in now.cells]
    code = [cell for cell in kept["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert {each["output_type"] for cell in code for each in cell["outputs"]} == {"stream"}
    again = executed(made, page)
    printed = [cell.outputs for cell in again.cells if cell.cell_type == "code"]
    for one, other in zip(code, printed, strict=True):
        assert shape(one["outputs"]) == shape(other)


def executed(made, page):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the kernel's own packages
        return made.executed(page)


def shape(outputs):
    """What was printed, without the last digits of its figures."""
    return [re.sub(r"-?\d+\.?\d*(e-?\d+)?", "#", "".join(each["text"])) for each in outputs]


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
    root = DOCS.parent
    scripts = [*root.glob("examples/*.py"), *root.glob("benchmarks/*.py"), root / "Makefile"]
    assert any(stem in script.read_text() for script in scripts)
