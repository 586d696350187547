# SPDX-License-Identifier: Apache-2.0
"""Solvers against the results of k-diffusion's own functions, recorded in a table."""

import dataclasses
import json
import math

import pytest
import torch

import gradsampler as gs
from gradsampler import noise as noises
from gradsampler import solvers
from support import k_diffusion_table as recorded

ROWS = json.loads(recorded.FILE.read_text())
FIXED = [row for row in ROWS if row["function"] != "dpm_adaptive"]


def label(row):
    end = "to-zero" if row["levels"][-1] == 0 else "to-sigma_min"
    return "-".join([row["function"], *(f"{k}={v}" for k, v in row["options"].items()), end])


def ours(row):
    """The solver, levels and churn of one of its calls."""
    options, levels, churn = dict(row["options"]), row["levels"], None
    if "s_churn" in options:
        churn = gs.Churn(options.pop("s_churn"), s_noise=options.pop("s_noise"))
    if "solver_type" in options:
        options["variant"] = options.pop("solver_type")
    if row["function"] == "dpmpp_sde":
        options["independent"] = True
    if "n" in options:
        options["evaluations"] = options.pop("n")
        steps = options["evaluations"] // 3 + 1
        ends = [math.log(levels[0]), math.log(levels[-1])]
        levels = torch.linspace(*ends, steps + 1, dtype=torch.float64).exp().tolist()
    solver = dataclasses.replace(solvers.resolve(row["function"]), **options)
    return solver, levels, churn


@pytest.mark.parametrize("row", FIXED, ids=map(label, FIXED))
def test_agrees_with_k_diffusion(row):
    solver, levels, churn = ours(row)
    program, _ = gs.arguments.record(recorded.denoise, levels, solver=solver, churn=churn)
    count = len(program.noises)
    got = gs.sample(
        recorded.denoise,
        recorded.Z0,
        levels,
        solver=solver,
        churn=churn,
        noise=noises.Given(list(recorded.NOISES[:count])) if count else None,
    )
    expected = torch.tensor(row["result"], dtype=torch.float64)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.skipif(not recorded.installed(), reason="k-diffusion is not installed")
def test_the_table_is_what_the_package_computes():
    rows = recorded.table(recorded.sampling())
    assert len(rows) == len(ROWS)
    for got, row in zip(rows, ROWS, strict=True):
        assert {**got, "result": 0, "accepted": 0} == {**row, "result": 0, "accepted": 0}
        for key in ("result", "accepted"):
            torch.testing.assert_close(got.get(key, []), row.get(key, []), rtol=1e-12, atol=1e-12)
