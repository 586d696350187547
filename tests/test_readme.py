# SPDX-License-Identifier: Apache-2.0
"""The README's code runs, its pair of examples agree, and what it points to is there."""

import math
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

import gradsampler as gs
from support import problems

ROOT = Path(__file__).parents[1]


@cache
def text():
    return (ROOT / "README.md").read_text()


@cache
def blocks():
    return re.findall(r"^```python\n(.*?)^```", text(), re.MULTILINE | re.DOTALL)


def ran(k):
    """The names after block ``k``; a later block goes on from those of the first alone."""
    names = {"__name__": "readme"}
    for block in [blocks()[0]] * (k > 0) + [blocks()[k]]:
        exec(compile(block, "README.md", "exec"), names)
    return names


def test_has_an_example_of_fifteen_lines():
    lines = [line for line in blocks()[0].splitlines() if line.strip()]
    assert 5 <= len(lines) <= 15
    assert "import gradsampler as gs" in lines


@pytest.mark.parametrize("k", range(len(re.findall("```python", text()))))
def test_every_block_runs(k, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ran(k)
    assert capsys.readouterr() == ("", "")


def test_the_example_and_its_equivalent_agree():
    """One is the package's run, the other a loop: the samples and their gradients to rounding."""
    example, loop = ran(0), ran(1)
    assert "gs.sample" in blocks()[0]
    assert "gs.sample" not in blocks()[1]
    for name in ("x", "gradient"):
        one, other = example[name].detach(), loop[name].detach()
        assert one.shape == other.shape == example["z0"].shape
        assert one is not other
        assert one.norm() > 0
        # float32 through 35 model calls
        assert (one - other).norm() < 1e-4 * other.norm(), name
    assert example["loss"].item() == pytest.approx(loop["loss"].item(), rel=1e-5)


def test_the_example_is_the_same_each_time():
    assert torch.equal(ran(0)["gradient"], ran(0)["gradient"])


def test_claims_the_version_that_is_here():
    assert re.findall(r"gradsampler (\d+\.\d+[.\w]*\w)", text()) == [gs.__version__]


def test_the_citation_is_of_the_version_that_is_here():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == gs.__version__
    assert cited["license"] in text()


def test_the_changelog_begins_with_the_version_that_is_here():
    versions = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    dated = re.fullmatch(rf"{re.escape(gs.__version__)} - (\d{{4}}-\d\d-\d\d)", versions[0])
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert dated, versions[0]
    assert dated[1] == str(cited["date-released"])


def test_lists_every_extra():
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())
    extras = set(told["project"]["optional-dependencies"])
    assert set(re.findall(r"\.\[(\w+)\]", text())) == extras


def test_claims_the_python_that_is_required():
    (minor,) = set(re.findall(r"Python 3\.(\d+)", text()))
    assert f'requires-python = ">=3.{minor}"' in (ROOT / "pyproject.toml").read_text()


def test_its_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)", text()) if "://" not in link]
    named = re.findall(r"`((?:tests|examples|benchmarks|gradsampler)/[\w/.]+)`", text())
    assert links
    for path in links + named:
        assert (ROOT / path).exists(), path


def test_its_commands_are_those_of_the_makefile():
    verbs = re.findall(r"^    make (\w+)", text(), re.MULTILINE)
    assert {"demo", "test"} <= set(verbs)
    for verb in verbs:
        assert re.search(rf"^{verb}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_names_every_noise():
    for source in gs.noise.typical(torch.zeros(1, 2), 1).values():
        assert f"`{type(source).__name__}(" in text(), source


def test_names_only_memory_strategies_that_are_here():
    table = text().split("## Memory")[1].split("\n## ")[0]
    named = set(re.findall(r'^\| `"(\w+)"`', table, re.MULTILINE))
    assert named == set(gs.memory.names()) - {"auto"}


def test_fits_two_screens():
    assert len(text().splitlines()) <= 100


def test_the_solver_of_the_contributors_page_runs_and_has_its_order():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    try:
        exec(compile(block, "CONTRIBUTING.md", "exec"), {"__name__": "page"})
        data = problems.Gaussian(mean=0.4, std=0.5)
        errors = []
        for steps in (64, 128):
            levels = gs.schedules.karras(steps, 0.1, 3.0)
            z0 = torch.ones(1, 2, dtype=torch.float64)
            x = gs.sample(data.denoise, z0, levels, solver="ralston")
            exact = data.ode(3.0 * z0, 3.0, 0.1)
            errors.append((x - exact).abs().max().item())
        assert 1.8 < math.log2(errors[0] / errors[1]) < 2.2
    finally:
        gs.solvers._REGISTRY.pop("ralston", None)
