# SPDX-License-Identifier: Apache-2.0
"""Lists, defaults and numbers that the pages tell in prose are those of the code."""

import csv
import inspect
import re
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import torch

import gradsampler as gs
from gradsampler import models
from gradsampler.app.demo import Demo
from gradsampler.engine import buffers, replay
from gradsampler.integrations import cosmos
from gradsampler.memory import Revolve, auto, files, leapfrog

ROOT = Path(__file__).parents[1]
PAGES = [str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))]


@cache
def page(name):
    """A page in one line: a phrase may be broken anywhere."""
    return " ".join((ROOT / name).read_text().split())


def told(name, pattern):
    """What the groups of a pattern match on a page, where it must be found once."""
    found = re.findall(pattern, page(name))
    assert len(found) == 1, (name, pattern, found)
    return found[0]


def shipped(names):
    """Without what a test has registered meanwhile."""
    own = {s for s in names if type(gs.solvers.resolve(s)).__module__.startswith("gradsampler.")}
    assert own
    return own


# Solvers.


def listed():
    """The changelog's lists: "runs of a, b, c;" and "Solvers a, b, c."."""
    lists = re.findall(r"(?:runs of|- Solvers) (\w+(?:, \w+)+)[;.]", page("CHANGELOG.md"))
    return [name for each in lists for name in each.split(", ")]


def test_the_changelog_lists_every_solver_once():
    assert sorted(listed()) == sorted(shipped(gs.solvers.names()))


@pytest.mark.parametrize("name", PAGES)
def test_solvers_that_a_page_names_are_there(name):
    text = page(name)
    named = re.findall(r"solver=\"(\w+)\"|--solver (\w+)", text)
    for solver in {one or other for one, other in named}:
        assert solver in gs.solvers.names(), solver


@pytest.mark.parametrize("name", PAGES)
def test_a_table_of_solvers_has_them_all(name):
    """A table whose first column is headed "solver" or "`solver=`"."""
    text = (ROOT / name).read_text()
    for table in re.findall(
        r"^\| *`?solver=?`? *\|.*\n\|[-| :]+\n((?:\|.*\n)+)", text, re.MULTILINE
    ):
        cells = [row.split("|")[1] for row in table.splitlines()]
        named = {solver for cell in cells for solver in re.findall(r"`\"?(\w+)\"?`", cell)}
        assert named == shipped(gs.solvers.names())


# Memory.


def test_the_strategies_of_the_docstring_are_the_registered_ones():
    (choice,) = re.findall(r"memory: (.*?), or a `gradsampler\.memory`", flat(gs.sample))
    assert {name.split(":")[0] for name in re.findall(r'"([\w:]+)"', choice)} == {
        *gs.memory.names(),
        "truncated",
    }


def flat(documented):
    return " ".join(inspect.getdoc(documented).split())


def test_the_default_strategy_and_its_slots():
    assert told("README.md", r'`"(\w+)"`, the default, is store') == default("memory")
    assert told("docs/memory.md", r'`memory="(\w+)"`, the default') == default("memory")
    assert int(told("README.md", r"\| (\d+) states, or as many as it says")) == Revolve().slots
    assert int(told("docs/memory.md", r'`"revolve:(\d+)"`, or')) == Revolve().slots


def default(argument):
    return inspect.signature(gs.sample).parameters[argument].default


def test_the_calls_that_revolve_makes():
    slots, *rest = told(
        "README.md", r"with (\d+), ([\d.]+) calls a step at N = (\d+), ([\d.]+) at N = (\d+)"
    )
    for calls, steps in (rest[:2], rest[2:]):
        made, z0 = [], torch.ones(1, 2, requires_grad=True)

        def denoiser(x, sigma, made=made):
            made.append(sigma)
            return x / 2

        levels = gs.schedules.karras(int(steps))
        gs.sample(denoiser, z0, levels, memory=f"revolve:{slots}").sum().backward()
        assert f"{len(made) / int(steps):.2f}" == calls


def test_what_auto_takes_of_what_is_free():
    assert float(told("docs/memory.md", r"Of ([\d.]+) of what is free")) == auto._USED
    halves = (
        r"the N states take less than (\w+) of what is free",
        r"they take more than (\w+) of what the host has",
        r"as many slots as (\w+) of the memory holds",
    )
    for pattern in halves:
        assert told("docs/memory.md", pattern) == {0.5: "half"}[auto._STATES]


def test_the_bits_of_reversible():
    assert told("docs/memory.md", r"(\d+) bits where they hold the run with (\d+) of them") == (
        "32",
        str(leapfrog._USUAL),
    )


def test_what_a_replayed_call_may_differ_by():
    pattern = r"For float32 that is (\S+) of the output's size, for bfloat16 (\S+), and less"
    single, half = told("docs/memory.md", pattern)
    assert float(single) == replay._ROUNDING[torch.float32]
    assert float(half) == replay._ROUNDING[torch.bfloat16]


def test_the_room_for_buffers():
    for page in ("docs/memory.md", "DESIGN.md"):
        assert int(told(page, r"(\d+) MiB at most")) * 2**20 == buffers._ROOM


def test_how_far_files_run_ahead():
    ahead = told("DESIGN.md", r"with one thread, (\w+) states ahead at most")
    assert {"one": 1, "two": 2, "three": 3}[ahead] == files._AHEAD


# The main job.


def test_the_demo_in_the_readme():
    job = Demo()
    assert told("README.md", r"optimise (\d+) noises so that their samples are read as a (\d)") == (
        str(job.starts),
        str(job.digit),
    )
    updates, seconds, before, after = told(
        "README.md",
        r"the (\d+) updates of the demo take (\d+) s and raise the mean p\(7\) from ([\d.]+) "
        r"to ([\d.]+\d)",
    )
    assert int(updates) == job.iterations
    shape = f"{job.starts}x1x8x8 {updates} updates"
    with (ROOT / "benchmarks" / "results" / "cpu-x86_64-2-threads.csv").open() as file:
        rows = [
            row for row in csv.DictReader(file) if (row["op"], row["shape"]) == ("optimize", shape)
        ]
    measured = {row["metric"]: float(row["median"]) for row in rows}  # the latest of each
    assert f"{measured['time']:.0f}" == seconds
    assert f"{measured['mean p(7)']:.4f}" == after
    assert f"{baseline(job):.2f}" == before


def baseline(job):
    """The mean p(7) of the samples before any update, by the calls that a user would write."""
    z0 = torch.randn(job.starts, 1, 8, 8, generator=torch.Generator().manual_seed(job.seed))
    network, classifier = models.load_network(), models.load_classifier()
    denoiser = gs.EDM(network, network.sigma_data)
    options = {"solver": job.solver, "churn": gs.Churn(10.0), "noise": job.noise}
    with torch.no_grad():
        x = gs.sample(denoiser, z0, gs.schedules.karras(job.steps), **options)
        return classifier(x).softmax(1)[:, job.digit].mean().item()


# The drop-ins.


def test_the_switches_of_cosmos():
    block = page("docs/cosmos.md").split("| switch | default | effect |")[1].split("Each is")[0]
    table = dict(re.findall(r"\| `(\w+)` \| (\S+) \|", block))
    names = {each.name for each in fields(cosmos.SamplerConfig)}
    assert set(table) - {"callback_fns"} == names - {"solver", "timestamps", "sample_clean"}
