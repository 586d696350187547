# SPDX-License-Identifier: Apache-2.0
"""Runs in two processes: training under DistributedDataParallel and fully_shard, agreement."""

import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
import torch

from gradsampler.app.cli import main
from support import agreeing, ranks, searching, spread, together
from support.sharing import MEMORIES, TARGETS, WAYS, WRAPPERS

ROOT = Path(__file__).parents[1]
QUICK = [
    "ddp/checkpoint/all/once",
    "ddp-static/revolve/all/once",
    "fsdp/checkpoint/all/once",
    "fsdp/auto/start/no_sync",
    "fsdp-gathered/store/frozen/joint",
]
QUICK_AGREEING = [
    "auto_keeps_what_the_poorest_rank_has_room_for",
    "replay_error_of_one_rank_is_raised_on_all",
    "what_cannot_be_served_is_an_error_before_the_first_call",
]
QUICK_SPREAD = [
    "gradients_are_those_of_the_loop:rows",
    "noise_is_that_of_the_whole:batch",
    "what_cannot_be_served_is_an_error_at_the_door",
]

CELLS = [
    *product(WRAPPERS, MEMORIES, TARGETS, ["once"]),
    *product(["ddp", "fsdp", "hsdp-1x2"], ["store", "checkpoint", "auto"], ["all"], WAYS),
    *product(WRAPPERS, ["checkpoint"], ["all"], ["twice", "joint", "no_sync"]),
]


# What the wrappers themselves do not have. DDP: autograd.grad, no_sync under static_graph, frozen
# networks; and it waits for a parameter without a gradient, as in a truncated run, unless it is
# told to look for such. FSDP2: autograd.grad by its shards, but where a run is no plain autograd.
def served(wrapper, strategy, target, way):
    if wrapper.startswith("ddp"):
        waits = wrapper not in ("ddp-unused", "ddp-static", "ddp-static-view", "ddp-experts")
        return not (
            way == "grad"
            or target == "frozen"
            or (way == "no_sync" and "static" in wrapper)
            or (waits and strategy == "truncated")
        )
    return not (strategy == "store" and way == "grad")


CASES = list(dict.fromkeys([*QUICK, *("/".join(cell) for cell in CELLS if served(*cell))]))


def test_the_cheapest_of_each_kind(tmp_path):
    sharing = [f"sharing {case}" for case in QUICK]
    others = [f"agreeing {case}" for case in QUICK_AGREEING]
    ranks.check([*sharing, *others, *(f"spread {case}" for case in QUICK_SPREAD)], tmp_path)


@pytest.mark.thorough
@pytest.mark.parametrize("cases", ranks.chunks([c for c in CASES if c not in QUICK]))
def test_gradients_are_those_of_one_process(cases, tmp_path):
    ranks.check([f"sharing {case}" for case in cases], tmp_path)


@pytest.mark.thorough
def test_two_shards_and_two_copies(tmp_path):
    """HSDP on four ranks."""
    cells = product(["hsdp-2x2"], MEMORIES, ["all"], ["once"])
    ways = product(["hsdp-2x2"], ["checkpoint", "auto"], ["all"], WAYS)
    cases = ["/".join(cell) for cell in (*cells, *ways)]
    ranks.check([f"sharing {case}" for case in cases], tmp_path, world=4)


@pytest.mark.thorough
def test_all_ranks_do_the_same(tmp_path):
    names = [name for name in agreeing.CASES if name not in QUICK_AGREEING]
    ranks.check([f"agreeing {name}" for name in names], tmp_path)


@pytest.mark.thorough
def test_states_that_are_dtensors(tmp_path):
    names = [name for name in spread.CASES if name not in QUICK_SPREAD]
    ranks.check([f"spread {name}" for name in names], tmp_path)


@pytest.mark.thorough
def test_searches_over_noises(tmp_path):
    folders = {name: tmp_path / name for name in searching.CASES}
    for folder in folders.values():
        folder.mkdir()
    cases = [f"searching {name} {folder}" for name, folder in folders.items()]
    ranks.check(cases, tmp_path / "ranks")


@pytest.mark.thorough
def test_one_sample_over_two_ranks(tmp_path):
    ranks.check([f"together {name}" for name in together.CASES], tmp_path)


def torchrun(*command, folder):
    """Two processes under torchrun, whose port is a free one; what they say."""
    path = os.pathsep.join(str(ROOT / each) for each in ("benchmarks", "examples", "tests"))
    launch = ["-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += ["-m", "support.leaving"]
    done = subprocess.run(
        [sys.executable, *launch, *map(str, command)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.thorough
def test_the_command_line_shares_its_noises(tmp_path):
    """Ranks of torchrun find what one process does, and write once."""
    script = tmp_path / "command.py"
    script.write_text("import sys\nfrom gradsampler.app.cli import main\nassert main() == 0\n")
    found = []
    for objective in ("digit", "diverge"):
        command = ["optimize", "--objective", objective, "--starts", 3, "--steps", 4]
        command += ["--iterations", 3, "--out"]
        assert main([*map(str, command), str(tmp_path / "alone")]) == 0
        said = torchrun(script, *command, tmp_path / "shared", folder=tmp_path)
        assert said.count("picture:") == 1
        for folder in ("alone", "shared"):
            found.append(json.loads((tmp_path / folder / f"{objective}.json").read_text()))
        alone, shared = found[-2:]
        assert shared["after"] == pytest.approx(alone["after"], rel=1e-4)
        assert shared["norms"] == pytest.approx(alone["norms"], rel=1e-5)
        losses = [[step["loss"] for step in each["history"]] for each in (alone, shared)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.thorough
def test_the_code_of_the_page_runs(tmp_path):
    page = (ROOT / "docs" / "distributed.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 6
    script = tmp_path / "page.py"
    script.write_text("\n".join([*blocks, "dist.barrier()", "dist.destroy_process_group()"]))
    torchrun(script, folder=tmp_path)


@pytest.mark.thorough
def test_the_collectives_are_those_of_the_page(tmp_path):
    said = torchrun(ROOT / "benchmarks" / "sharding.py", "--rehearse", folder=tmp_path)
    page = (ROOT / "docs" / "distributed.md").read_text()
    for name in ("store", "auto", "checkpoint", "revolve:3"):
        found = dict(re.findall(rf"^{name}, trained +(\S.*?) +(\d+)$", said, re.MULTILINE))
        (told,) = re.findall(rf"^\| {name}[^|]*\| (\d+) \| (\d+) \| (\d+) \|", page, re.MULTILINE)
        names = ("all-gathers forward", "all-gathers", "reduce-scatters")
        assert told == tuple(found[each] for each in names)
        block = 4 * (2 * 64 * 256 + 256 + 64)
        root = 4 * (8 * 64 + 64 + 64 * 8 + 8)
        assert int(found["most bytes at once"]) == block + root


@pytest.mark.thorough
def test_the_examples_run_in_short_forms(tmp_path):
    search = [ROOT / "examples" / "search_noises.py", "--iterations", 2, "--steps", 4]
    said = torchrun(*search, "--noises", 3, "--out", tmp_path / "found", folder=tmp_path)
    begin, end = map(float, re.search(r"loss ([\d.]+) to ([\d.]+)", said).groups())
    assert end < begin
    assert (tmp_path / "found" / "search-noises.png").exists()
    tune = [ROOT / "examples" / "finetune_fsdp.py", "--updates", 6, "--steps", 4, "--lr", 3e-3]
    said = torchrun(*tune, folder=tmp_path)
    begin, end = map(float, re.search(r"mean: ([\d.]+) to ([\d.]+)", said).groups())
    assert end > 2 * begin
    said = torchrun(ROOT / "examples" / "cut_unet.py", folder=tmp_path)
    errors = re.findall(r"[\d.]+e-\d+", said)
    assert len(errors) == 3
    assert max(map(float, errors)) < 1e-12
    alone, together = map(int, re.search(r"(\d+) bytes alone, (\d+) a rank", said).groups())
    newest = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
    assert together < (0.7 if newest else 0.85) * alone  # DTensor kept more of its moves before
