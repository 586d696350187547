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


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import figures

    return figures


def test_figures_are_those_of_the_latest_rows(figures):
    """In README.md, docs/ and benchmarks/: every table between two marks, every quote of a row."""
    pages = figures.pages()
    assert {"README.md", "peers.md", "scaling.md"} <= {path.name for path in pages}
    for path in pages:
        text = path.read_text()
        assert text == figures.updated(text), f"{path.name}: run make plots"


def test_a_quote_is_the_median_of_its_row_in_the_form_of_the_figure(figures, tmp_path, monkeypatch):
    """By hand: three decimals, a unit, an exponent, another dtype, a comment in two lines."""
    rows = figures.quotes.rows
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    table = [
        rows.row("op", "ours, out", "1x4, quiet cores", dtype, metric, "s", (value,) * 3)
        for dtype, metric, value in (
            ("float32", "time", 0.0012344),
            ("float32", "error", 4.76e-7),
            ("bfloat16", "time", 0.5),
        )
    ]
    rows.append(table, tmp_path)
    for figure, named, found in (
        ("9.999", "op; ours, out; 1x4; time; ms", "1.234"),
        ("1e-3", "op; ours, out; 1x4; error", "5e-7"),
        ("0.1", "op; ours,\nout; 1x4; time; bfloat16", "0.5"),
    ):
        text = f"took {figure}<!-- row: {named} --> in all"
        assert figures.updated(text) == f"took {found}<!-- row: {named} --> in all"
    with pytest.raises(KeyError):
        figures.updated("1<!-- row: op; another; 1x4; time -->")


HELD = {"seed-mechanisms.md", "CARD.md"}  # by tests that compute or measure them: cosmos, models


def test_measured_tables_name_their_rows(figures):
    """A line with two decimals is generated, or quotes its rows."""
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "benchmarks" / "README.md"]
    generated = re.compile(r"<!-- (\w+): [\w-]+ -->\n.*?<!-- \1: end -->", re.DOTALL)
    for path in pages:
        if path.name in HELD:
            continue
        for line in generated.sub("", path.read_text()).splitlines():
            cells = [cell.strip() for cell in line.split("|")] if line.startswith("|") else []
            bare = [cell for cell in cells if re.fullmatch(r"\d+\.\d+", cell)]
            assert len(bare) < 2, (path.name, line)


def test_the_readme_names_how_many_there_are(shipped):
    (count,) = re.findall(r"(\d+) solvers", (ROOT / "README.md").read_text())
    assert int(count) == len(shipped)
