# SPDX-License-Identifier: Apache-2.0
"""Runs cases in two connected processes, as torchrun would, one pair for many cases.

A case is the name of a module in here and its case: both processes call
``support.sharing.run("ddp/store/all/once")`` for "sharing ddp/store/all/once". Who waits for a
process that is gone, or that waits for something else, gives up after `PATIENCE`. A pair costs
seconds to begin with, so a test is a list of cases.
"""

import datetime
import importlib
import json
import os
import subprocess
import sys
import traceback
import warnings
from pathlib import Path

PATIENCE = 60  # seconds
WORLD = 2
TESTS = Path(__file__).parents[1]


def results(cases: list[str], folder: Path, world: int = WORLD) -> dict[str, str]:
    """By case: nothing where it passed on all ranks, else what was raised and where.

    A case that fails may leave ranks waiting for one another: the others get new processes.
    """
    found: dict[str, str] = {}
    left = list(cases)
    while left:
        attempt = folder / f"attempt{len(found)}"
        attempt.mkdir(parents=True)
        ranks = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-m",
                    "support.ranks",
                    str(attempt),
                    str(k),
                    str(world),
                    *left,
                ],
                env=os.environ | {"PYTHONPATH": str(TESTS), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for k in range(world)
        ]
        said = []
        for rank in ranks:
            try:
                said.append(rank.communicate(timeout=PATIENCE * (len(left) + 2))[0])
            except subprocess.TimeoutExpired:
                rank.kill()
                said.append(rank.communicate()[0] + "\nkilled: it waited for ever")
        new = {}
        for k in range(world):
            path = attempt / f"rank{k}.jsonl"
            for line in path.read_text().splitlines() if path.exists() else ():
                case, error = json.loads(line)
                new[case] = new.get(case, "") + (f"rank {k}:\n{error}" if error else "")
        if not new:
            new[left[0]] = "no rank came to the end of it:\n" + "\n".join(said)
        found |= new
        left = [case for case in left if case not in found]
    return found


def check(cases: list[str], folder: Path, world: int = WORLD) -> None:
    """Asserts that all of them pass."""
    failed = {case: error for case, error in results(cases, folder, world).items() if error}
    assert not failed, "\n".join(f"{case}\n{error}" for case, error in failed.items())


def chunks(cases: list[str], size: int = 48) -> list[list[str]]:
    """Lists of about as many cases as a test should have."""
    return [cases[k : k + size] for k in range(0, len(cases), size)]


def main(folder: str, rank: str, world: str, *cases: str) -> None:
    """One rank."""
    import torch
    import torch.distributed as dist

    from support.leaving import leave

    torch.set_num_threads(1)
    warnings.simplefilter("error")
    store = dist.FileStore(f"{folder}/store", int(world))
    patience = datetime.timedelta(seconds=PATIENCE)
    dist.init_process_group(
        "gloo", store=store, rank=int(rank), world_size=int(world), timeout=patience
    )
    with (Path(folder) / f"rank{rank}.jsonl").open("w") as file:
        for case in cases:
            error = ""
            try:
                module, name = case.split(" ", 1)
                importlib.import_module(f"support.{module}").run(name)
            except BaseException:
                error = traceback.format_exc()
            file.write(json.dumps([case, error]) + "\n")
            file.flush()
            failed = torch.tensor(float(bool(error)))
            try:
                dist.all_reduce(failed)
            except RuntimeError:  # the other rank is gone
                failed.fill_(1)
            if failed:
                os._exit(1)
    dist.destroy_process_group()
    leave()


if __name__ == "__main__":
    main(*sys.argv[1:])
