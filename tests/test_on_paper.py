# SPDX-License-Identifier: Apache-2.0
"""The estimates of docs/scaling.md agree with what was counted, and with sums made by hand."""

import re
from pathlib import Path

import pytest

from gradsampler.memory import multistage
from gradsampler.memory.multistage import Advance, Tape

ROOT = Path(__file__).parents[1]
CALLS, BLOCKS = 8, 3  # of benchmarks/sharding.py


@pytest.fixture
def paper(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import on_paper

    return on_paper


@pytest.fixture
def counted(paper):
    """What benchmarks/sharding.py counted, by strategy and metric."""
    shape = f"{CALLS} calls, {BLOCKS} blocks and a root, 2 ranks"
    return {
        (variant, metric): float(row["median"])
        for (variant, at, metric), row in paper.rows.latest("fsdp2").items()
        if at == shape
    }


def made(memory):
    """Model calls of a run and its backward."""
    if memory.startswith("revolve:"):
        actions = multistage.schedule(CALLS, int(memory.removeprefix("revolve:")))
        return sum(
            each.stop - each.start if isinstance(each, Advance) else isinstance(each, Tape)
            for each in actions
        )
    return CALLS if memory == "store" else 2 * CALLS


@pytest.mark.parametrize("memory", ["store", "checkpoint", "revolve:3", "reversible"])
@pytest.mark.parametrize("trained", [True, False])
def test_collectives_are_those_that_were_counted(paper, counted, memory, trained):
    variant = f"{memory}, {'trained' if trained else 'frozen'}"
    blocks, roots = paper.gathers(BLOCKS, CALLS, made(memory))
    assert blocks + roots == counted[variant, "all-gathers"]
    reduced = counted.get((variant, "reduce-scatters"), 0)
    assert reduced == (paper.reductions(BLOCKS) if trained else 0)


def test_gathered_bytes_are_those_that_were_counted(paper, counted):
    """Of a block 64 -> 256 -> 64, and of the layers 8 -> 64 and 64 -> 8 around the blocks."""
    block, root = 4 * (64 * 256 + 256 + 256 * 64 + 64), 4 * (8 * 64 + 64 + 64 * 8 + 8)
    for memory in ("store", "checkpoint", "revolve:3"):
        blocks, roots = paper.gathers(BLOCKS, CALLS, made(memory))
        found = counted[f"{memory}, trained", "bytes gathered"]
        assert found == pytest.approx(blocks * block + roots * root, rel=1e-5)  # rows have 6 digits
    assert counted["checkpoint, trained", "most bytes at once"] == block + root


def test_peaks_are_sums_of_states_and_calls(paper):
    state = 4 * 16 * 21 * 90 * 160
    for gpus in paper.GPUS:
        layout = paper.Layout(gpus, gpus)
        found = {row.name: row for row in paper.strategies(layout)}
        call, block = layout.one_call(), layout.one_block()
        expected = {
            "store": 50 * call + block,
            "checkpoint": 50 * state + call + block,
            "offload": call + block,
            "revolve:8": 8 * state + call + block,
            "revolve:3": 3 * state + call + block,
            "reversible": 4 * state + call + block,  # two integers of 8 bytes an element
        }
        for name, least in expected.items():
            # And inputs, outputs and cotangents of the moment; under store, a call's input as well.
            few = (50 if name == "store" else 10) * state
            assert least <= found[name].peak <= least + few, (gpus, name)
        assert found["offload"].host == 50 * state
        assert [round(50 * found[name].evaluations) for name in ("store", "checkpoint")] == [
            50,
            100,
        ]


def test_arithmetic_is_that_of_the_products_of_matrices(paper):
    """By hand, for 14.3e9 weights, 40 blocks of width 5120 and 75,600 tokens."""
    layout = paper.Layout(1, 1)
    weights, attention = 2 * 14_288_491_584 * 75_600, 4 * 40 * 75_600**2 * 5120
    assert paper.forward(layout) == pytest.approx((weights + attention) / 400e12)
    assert paper.backward(layout) == pytest.approx((2 * weights + 3.5 * attention) / 400e12)
    trained = paper.Layout(1, 1, trained=True)
    assert paper.backward(trained) == pytest.approx((3 * weights + 3.5 * attention) / 400e12)
    assert paper.gathering(layout, 100) == paper.exchanging(layout, 100) == 0


def test_the_pages_say_what_is_calculated(paper):
    def told(page, pattern):
        text = " ".join((ROOT / "docs" / page).read_text().split())
        (found,) = re.findall(pattern, text)
        return found

    node, one = paper.Layout(8, 8), paper.Layout(1, 1)
    peaks = {row.name: round((node.fixed() + row.peak) / 1e9) for row in paper.strategies(node)}
    pattern = r'`"checkpoint"` takes (\d+) GB a GPU and `"store"` (\d+) GB'
    assert told("distributed.md", pattern) == (str(peaks["checkpoint"]), str(peaks["store"]))
    together = round((one.one_call() + one.one_block()) / 1e9)
    assert told("scaling.md", r"one call with its backward takes (\d+) GB") == str(together)
    assert told("scaling.md", r"with ([\d.]+) billion") == f"{paper.model().whole / 1e9:.1f}"
    assert told("scaling.md", r"which is ([\d,]+) tokens") == f"{paper.TOKENS:,}"


def test_links_of_one_node_and_of_several(paper):
    """All weights once: 7/8 within a node; of 8 nodes, 7/8 of a GPU's part by its own link."""
    m, passes = paper.model(), 150
    whole = 2 * (passes * m.blocks * m.block + 50 * m.root)
    assert paper.gathering(paper.Layout(8, 8), 100) == pytest.approx(whole * 7 / 8 / 400e9)
    across = whole / 8 * 7 / 8 / 50e9 + whole * 7 / 8 / 400e9
    assert paper.gathering(paper.Layout(64, 64), 100) == pytest.approx(across)
