# SPDX-License-Identifier: Apache-2.0
"""The generated parts of the documentation are up to date."""

import re
from pathlib import Path

import pytest

from gradsampler import solvers
from gradsampler.app import tables

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "solvers.md"


@pytest.fixture
def shipped(monkeypatch):
    """The registry without what other tests have added."""
    home = solvers.__name__
    kept = {
        name: make
        for name, make in solvers._REGISTRY.items()
        if type(make()).__module__.startswith(home)
    }
    monkeypatch.setattr(solvers, "_REGISTRY", kept)
    return sorted(kept)


def test_the_table_of_solvers_is_up_to_date(shipped):
    text = PAGE.read_text()
    assert text == tables.updated(text), "run make tables"


def test_the_command_writes_it(shipped, tmp_path):
    path = tmp_path / "page.md"
    path.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    tables.main([str(path)])
    lines = path.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert [line.split("`")[1] for line in lines[4:-2]] == shipped


def test_the_rows_say_what_is_known():
    """By hand: RES in its two-step form, Heun's method, and SEEDS-3."""
    assert tables.row("res_2ab")[2:] == ("2", "", "1", "0", "yes", "no", "levels")
    assert tables.row("heun")[2:] == ("2", "", "2", "0", "yes", "no", "levels")
    assert tables.row("seeds_3")[2:] == ("3", "2", "3", "3", "yes", "no", "levels, eta, s_noise")
    assert tables.row("midpoint_reversible")[7] == "yes"
    assert tables.row("ddim")[4:6] == ("1", "0 (1)")
    assert tables.row("sa_solver")[5] == "1"
    assert tables.row("ddpm")[1] == "Ancestral sampling of the DDPM posterior"
    assert tables.row("dpmpp_2m_sde_heun")[1] == "SDE-DPM-Solver++(2M); variant=heun"


def test_the_tables_of_figures_are_those_of_the_latest_rows(monkeypatch):
    """In README.md and docs/: every table between two marks."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import figures

    pages = figures.pages()
    assert len(pages) >= 2
    for path in pages:
        text = path.read_text()
        assert text == figures.updated(text), f"{path.name}: run make plots"


def test_the_readme_names_how_many_there_are(shipped):
    (count,) = re.findall(r"(\d+) solvers", (ROOT / "README.md").read_text())
    assert int(count) == len(shipped)
