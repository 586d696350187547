# SPDX-License-Identifier: Apache-2.0
"""The benchmark scripts run; that their times mean something only the right machine can show."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gradsampler.ops import backends

ROOT = Path(__file__).parents[1]
PLOTS = ("peers", "memory", "scaling", "purifier", "noise-samples", "noise-gradients")


def run(*command, **environment):
    path = str(ROOT / "benchmarks")
    return subprocess.run(
        [sys.executable, "-P", *command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": path} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.thorough
def test_gpu_benchmark_rehearses_every_part():
    pytest.importorskip("triton")
    done = run("benchmarks/gpu.py", "--rehearse")
    assert done.returncode == 0, done.stderr
    for part in ("step_fwd philox", "step_bwd signed_roll", "adjoint_step", "launch", "crossover"):
        assert part in done.stdout
    assert "leap int64 signed_roll undone" in done.stdout
    for section in ("launch", "crossover", "bandwidth", "peaks", "times", "long"):
        assert re.search(rf"^section {section}: [1-9]\d* rows in ", done.stdout, re.MULTILINE)
    assert done.stdout.splitlines()[-1].startswith("rehearsed")


@pytest.mark.thorough
def test_gpu_benchmark_runs_sections_by_name():
    pytest.importorskip("triton")
    done = run("benchmarks/gpu.py", "launch", "--rehearse")
    assert done.returncode == 0, done.stderr
    for way in ("triton", "triton's own launch", "registered op, out", "ancestral op", "eager"):
        assert re.search(rf"^launch {way} +[\d.]+ us a step", done.stdout, re.MULTILINE), way
    assert "crossover" not in done.stdout
    done = run("benchmarks/gpu.py", "lunch", "--rehearse")
    assert done.returncode == 2
    assert "no section lunch: there are launch, crossover, bandwidth" in done.stderr


@pytest.mark.thorough
def test_calls_benchmark_rehearses_every_part():
    done = run("benchmarks/calls.py", "--rehearse")
    assert done.returncode == 0, done.stderr
    for part in ("public step, sincos", "sample, ODE, no grad", "gradient, tiny network"):
        assert part in done.stdout


@pytest.mark.thorough
def test_memory_benchmark_rehearses_every_part():
    done = run("benchmarks/memory.py", "--rehearse")
    assert done.returncode == 0, done.stderr
    for part in ("memory N=    2 reversible", "time over store", "long run directional"):
        assert part in done.stdout


@pytest.mark.thorough
def test_scaling_benchmark_rehearses_every_part():
    pytest.importorskip("diffusers")
    done = run("benchmarks/scaling.py", "--rehearse", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    for part in ("steps 1x4x8x8 N=4", "parameters of a block", "with an activation checkpoint"):
        assert part in done.stdout


@pytest.mark.thorough
def test_pipelines_benchmark_rehearses():
    pytest.importorskip("diffusers")
    done = run("benchmarks/pipelines.py", "--rehearse", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    for part in ("pipeline with gradients on ", "checkpoint, decode halo ", "tiles ", "frames "):
        assert part in done.stdout


@pytest.mark.thorough
def test_main_job_benchmark_rehearses():
    done = run("benchmarks/main_job.py", "--rehearse")
    assert done.returncode == 0, done.stderr
    for part in ("read as their class", "mean p(7)", "time over store", "own time"):
        assert part in done.stdout


@pytest.mark.thorough
def test_reversible_benchmark_rehearses():
    done = run("benchmarks/reversible.py", "--rehearse", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    for part in ("error on 400 digits", "guidance 7.5", "SignedRoll eta", "time over checkpoint"):
        assert part in done.stdout
    assert done.stdout.splitlines()[-1].startswith("rehearsed")


@pytest.mark.thorough
def test_peers_benchmark_rehearses_and_their_gradients_agree():
    done = run("-m", "peers", "--rehearse", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    line = r"^peers .*? N=\d+ (\w+) +(.*?) +[\d.]+ x .* error (\S+)$"
    lines = re.findall(line, done.stdout, re.MULTILINE)
    assert {"euler", "euler_maruyama", "dpmpp_2m_sde"} == {method for method, _, _ in lines}
    for method, way, error in lines:
        # A discretised adjoint equation is not the adjoint of the discretised equation.
        assert (float(error) < 3e-6) != ("adjoint" in way), (method, way, error)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("script", "parts"),
    [
        ("which_noise", ("correlation with z0", "p(7) with other noise", "cosine over draws")),
        ("purifier", ("classifier alone", "exact, mean of 4", "accuracy without purifier")),
        ("inverse_problems", ("inpainting", "super-resolution", "by start")),
    ],
)
def test_the_studies_rehearse(script, parts):
    done = run(f"benchmarks/{script}.py", "--rehearse", OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    for part in parts:
        assert part in done.stdout


@pytest.mark.thorough
def test_the_pictures_are_drawn_from_the_rows(tmp_path):
    done = run("benchmarks/plots.py", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    drawn = {path.name for path in tmp_path.iterdir()}
    assert drawn == {f"{name}.{kind}" for name in PLOTS for kind in ("png", "svg")}
    kept = ROOT / "docs" / "pictures"
    assert all((kept / name).exists() for name in drawn)


def test_rows_are_appended_with_their_circumstances(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import rows

    line = rows.row("step", "triton", "1x4", "float32", "time", "s", (2.0, 1.0, 3.0))
    first = rows.append([line], tmp_path)
    assert rows.append([line, line], tmp_path) == first
    with first.open() as file:
        table = list(csv.DictReader(file))
    assert len(table) == 3
    assert [table[0][name] for name in ("median", "q20", "q80")] == ["2", "1", "3"]
    assert all(table[0][name] for name in ("device", "torch", "commit", "date"))


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks" / "results").glob("*.csv")), ids=str)
def test_recorded_rows_have_the_columns_of_today(path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import rows

    with path.open() as file:
        reader = csv.DictReader(file)
        assert tuple(reader.fieldnames) == rows.COLUMNS
        signed = ("correlation", "cosine")
        for line in reader:
            value = float(line["median"])
            assert value >= (-1 if line["metric"].startswith(signed) else 0), line


def test_native_step_benchmark_rehearses():
    if not backends.present("cpu"):
        pytest.skip(backends.available()["cpu"])
    done = run("benchmarks/step_cpu.py", "--rehearse")
    assert done.returncode == 0, done.stderr
    for part in ("signed_roll", "randn_and_update", "of linear", "eager_forward_backward"):
        assert part in done.stdout
