# SPDX-License-Identifier: Apache-2.0
"""The example that fits the levels of a short run, in a short form, and the page about it."""

import csv
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

import gradsampler as gs

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "learn_schedule.py"
PAGE = (ROOT / "docs" / "learned-schedules.md").read_text()


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(SCRIPT))


def test_levels_start_as_given_and_cannot_cross(example):
    karras = gs.schedules.karras(8, final="zero")
    levels = example["Levels"](karras)
    torch.testing.assert_close(levels().detach(), karras, rtol=1e-12, atol=0)
    with torch.no_grad():
        levels.gaps.uniform_(-9, 9, generator=torch.Generator().manual_seed(0))
    assert (levels().diff() < 0).all()
    assert levels()[-1] == 0


def test_a_short_form_of_the_fit(example):
    """Three steps to land with 30; the loss falls, and the error on other noise with it."""
    job = example["Job"](steps=3, reference=30, updates=20, lr=0.2, batch=16, unseen=32)
    found = example["fit"](job)
    assert found.losses[-1] < 0.65 * found.losses[0]
    assert found.error_after < 0.9 * found.error_before
    assert found.after[-1] == 0
    assert (found.after.diff() < 0).all()


@pytest.mark.thorough
def test_the_script_writes_a_picture(tmp_path, monkeypatch, capsys):
    path = tmp_path / "p.png"
    options = [
        "--updates",
        "2",
        "--steps",
        "3",
        "--reference",
        "6",
        "--batch",
        "4",
        "--unseen",
        "4",
    ]
    monkeypatch.setattr(sys, "argv", ["learn_schedule.py", *options, "--out", str(path)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert f"wrote {path}\n" in capsys.readouterr().out
    assert path.read_bytes().startswith(b"\x89PNG")
    assert 10_000 < path.stat().st_size < 100_000


def test_the_page_quotes_rows():
    files = sorted((ROOT / "benchmarks" / "results").glob("*.csv"))
    lines = [r for path in files for r in csv.DictReader(path.read_text().splitlines())]
    rows = {r["variant"]: r for r in lines if r["op"] == "learned schedule"}
    quoted = dict(
        re.findall(r"^\| (Karras|fitted), 8 steps and level 0 \| ([\d.]+) \|", PAGE, re.M)
    )
    assert set(quoted) == {"Karras", "fitted"}
    for name, told in quoted.items():
        assert f"{float(rows[name]['median']):.4f}" == told
