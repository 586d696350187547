# SPDX-License-Identifier: Apache-2.0
"""Rows of measurements with their circumstances, appended to results/<device>.csv."""

import csv
import datetime
import json
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
COLUMNS = (
    "op",
    "variant",
    "shape",
    "dtype",
    "metric",
    "unit",
    "median",
    "q20",
    "q80",
    "device",
    "driver",
    "torch",
    "triton",
    "commit",
    "date",
)


def circumstances() -> dict[str, str]:
    """Device, versions, commit and date."""
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "absent"
    return {
        "device": _device(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch.__version__,
        "triton": version,
        "commit": _output("git", "-C", str(RESULTS.parent), "rev-parse", "--short", "HEAD"),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def row(
    op: str,
    variant: str,
    shape: str,
    dtype: str,
    metric: str,
    unit: str,
    values: tuple[float, float, float],
) -> dict[str, str]:
    """One measurement: the median and the 20 % and 80 % quantiles."""
    median, low, high = (f"{value:.6g}" for value in values)
    named = {"op": op, "variant": variant, "shape": shape, "dtype": dtype, "metric": metric}
    return named | {"unit": unit, "median": median, "q20": low, "q80": high}


def append(rows: list[dict[str, str]], folder: Path = RESULTS) -> Path:
    """Appends rows to the file of this device; rows that stand there are never rewritten."""
    around = circumstances()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{around['device'].lower().replace(' ', '-')}.csv"
    fresh = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        writer.writerows(line | around for line in rows)
    return path


def latest(
    op: str, folder: Path | None = None, dtype: str | None = None
) -> dict[tuple[str, str, str], dict[str, str]]:
    """The latest row of each variant, shape and metric of an op, of one dtype or of any, from the
    files of all devices.

    What a shape says of the cores, "..., quiet cores" or "..., cores shared", is left out.
    """
    found = {}
    for path in sorted((folder or RESULTS).glob("*.csv")):
        with path.open(newline="") as file:
            for line in csv.DictReader(file):
                if line["op"] == op and dtype in (None, line["dtype"] or "float32"):
                    shape = re.sub(r", (quiet cores|cores shared)$", "", line["shape"])
                    found[line["variant"], shape, line["metric"]] = line
    return found


def kernels(folder: Path = RESULTS) -> dict[tuple[str, str, str, str], dict[str, Any]]:
    """What is known of each compiled kernel, by its name, architecture, noise and dtype."""
    lines = map(json.loads, (folder / "kernel_budget.jsonl").read_text().splitlines())
    return {
        tuple(each[key] for key in ("kernel", "arch", "noise", "dtype")): each for each in lines
    }


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu {platform.machine()} {torch.get_num_threads()} threads"


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else ""
