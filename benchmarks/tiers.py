# SPDX-License-Identifier: Apache-2.0
"""What the two tiers of tests cost, and which lines of the package they run.

Times are those of pytest with two processes, its start included and an installation not; `make
test-all` is both tiers, one after the other. Lines are those of Python code in the package and in
kernels/, by coverage.py; what a test starts as a program of its own does not count. Kernels that
Triton's interpreter runs count as far as it runs their own lines.

make coverage
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import rows

ROOT = Path(__file__).parents[1]
SHORT, THOROUGH = "not thorough and not slow", "thorough and not slow"


def tier(marks: str, *options: str) -> float:
    """Runs the tests with these marks; seconds."""
    start = time.perf_counter()
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-n", "2", "-m", marks, *options]
    done = subprocess.run(command, cwd=ROOT, check=False)
    spent = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"the tests did not pass: {marks}")
    return spent


def times() -> dict[str, float]:
    """Seconds of either verb."""
    short = tier(SHORT)
    return {"make test": short, "make test-all": short + tier(THOROUGH)}


def lines() -> dict[str, float]:
    """Percent of the lines that either verb runs."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        options = ("--cov", "--cov-append", f"--cov-report=json:{report}")
        (ROOT / ".coverage").unlink(missing_ok=True)
        for verb, marks in (("make test", SHORT), ("make test-all", THOROUGH)):
            tier(marks, *options)
            found[verb] = json.loads(report.read_text())["totals"]["percent_covered"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("times", "lines"), help="one part alone")
    parser.add_argument("--cores", default="quiet cores", help="what the row says of them")
    arguments = parser.parse_args()
    table = []
    for part, metric, unit, measure in (
        ("times", "time", "s", times),
        ("lines", "line coverage", "%", lines),
    ):
        if arguments.only in (None, part):
            for verb, value in measure().items():
                shape = f"2 processes, {arguments.cores}"
                table.append(rows.row("tests", verb, shape, "", metric, unit, (value,) * 3))
                print(f"{verb}: {metric} {value:.4g} {unit}", flush=True)
    print(f"{len(table)} rows appended to {rows.append(table)}")


if __name__ == "__main__":
    main()
