# SPDX-License-Identifier: Apache-2.0
"""On paper: a gradient through a video model of 14 billion parameters, on 1, 8 and 64 GPUs.

Nothing of this size is run. Bytes are those that `scaling.py` measured on small models of the same
make, scaled by tokens and width; peaks are what `gs.memory.plan` makes of these; collectives follow
a formula that `sharding.py`'s counts agree with. What is assumed is in the constants and in
docs/scaling.md, whose tables `figures.py` writes from here.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from math import prod

import rows
import torch

import gradsampler as gs
from gradsampler.memory.planning.footprint import Footprint
from gradsampler.memory.planning.predictor import Predictor, Row

LATENT = (16, 21, 90, 160)  # 81 frames of 720p: channels, frames, height, width
TOKENS = 21 * (90 // 2) * (160 // 2)
CALLS = 50  # model calls of a run: 50 steps of Euler's method
BFLOAT16, FLOAT32 = 2, 4  # bytes
SPEED = 400e12  # floating-point operations a second that a GPU does of these
NODE = 8  # GPUs in a node
INSIDE, BETWEEN = 400e9, 50e9  # bytes a second of a GPU's links, within a node and to other nodes
GPUS = (1, 8, 64)


@dataclass(frozen=True)
class Model:
    """A transformer by what was counted and measured."""

    blocks: int
    width: int
    block: int  # parameters
    whole: int  # parameters
    kept: float  # bytes that a block keeps, a token and unit of width
    kept_trained: float
    kept_checkpointed: float  # by a block with an activation checkpoint
    beside: float  # more in the backward of one

    @property
    def root(self) -> int:
        """Parameters outside of the blocks."""
        return self.whole - self.blocks * self.block


@cache
def model() -> Model:
    """That of the latest rows."""
    found = rows.latest("video model")

    def counted(metric: str) -> int:
        return int(float(found["14B", "x".join(map(str, LATENT)), metric]["median"]))

    def measured(metric: str) -> float:
        """On the largest of the small models."""
        values = {
            prod(map(int, shape.split()[::4])): float(row["median"])
            for (_, shape, name), row in found.items()
            if name == metric
        }
        return values[max(values)]

    return Model(
        blocks=counted("blocks"),
        width=counted("width"),
        block=counted("parameters of a block"),
        whole=counted("parameters"),
        kept=measured("kept by a block, frozen"),
        kept_trained=measured("kept by a block, trained"),
        kept_checkpointed=measured("kept by a block with an activation checkpoint"),
        beside=measured("beside it in a block's backward, frozen"),
    )


# Collectives of FSDP2.


def gathers(blocks: int, calls: int, evaluations: int) -> tuple[int, int]:
    """All-gathers of blocks and of the root, in a run of ``calls`` model calls and its backward.

    A block is gathered in each of the ``evaluations``, those made again included, and in the
    backward of each call. The root stays gathered until a backward has used it.
    """
    return blocks * (evaluations + calls), calls


def reductions(blocks: int) -> int:
    """Reduce-scatters of a run, if the weights are trained: one a group."""
    return blocks + 1


# What a GPU holds.


@dataclass(frozen=True)
class Layout:
    """One sample on a number of GPUs, which share tokens and weights."""

    gpus: int
    shards: int  # GPUs that share one copy of the weights
    trained: bool = False

    @property
    def nodes(self) -> int:
        return max(1, self.gpus // NODE)

    def tokens(self) -> float:
        return TOKENS / self.gpus

    def weights(self) -> float:
        """Bytes of the shard."""
        return BFLOAT16 * model().whole / self.shards

    def gathered(self) -> float:
        """Bytes of the root, of a block that computes and of the one that comes next."""
        m = model()
        return BFLOAT16 * (m.root + 2 * m.block) if self.shards > 1 else 0.0

    def gradient(self) -> float:
        """Bytes of the sum over the calls, which is whole until it is reduced."""
        return BFLOAT16 * model().whole if self.trained else 0.0

    def one_call(self, *, checkpointed: bool = True) -> float:
        """Bytes that the blocks keep of a call."""
        m = model()
        each = m.kept_checkpointed if checkpointed else (m.kept_trained if self.trained else m.kept)
        return m.blocks * each * m.width * self.tokens()

    def one_block(self) -> float:
        """Bytes beside these while the backward of a block computes."""
        m = model()
        more = m.kept_trained - m.kept if self.trained else 0.0
        return (m.beside + more) * m.width * self.tokens()

    def fixed(self) -> float:
        """Bytes whatever the strategy."""
        return self.weights() + self.gathered() + self.gradient()


# Arithmetic and links, in seconds.


def forward(layout: Layout) -> float:
    """Of a model call."""
    return _linear(layout) + _attention(layout)


def backward(layout: Layout) -> float:
    """Of its backward, each block computed a second time before its own."""
    linear = (2 if layout.trained else 1) * _linear(layout)  # to the weights as well, to the input
    return forward(layout) + linear + 2.5 * _attention(layout)  # 5 products of matrices for 2


def _linear(layout: Layout) -> float:
    return 2 * model().whole * layout.tokens() / SPEED


def _attention(layout: Layout) -> float:
    m = model()
    return 4 * m.blocks * TOKENS * layout.tokens() * m.width / SPEED


def gathering(layout: Layout, evaluations: int) -> float:
    """Of all all-gathers of a run: shards of other nodes come by each GPU's own link, and are then
    passed on within the node.
    """
    m = model()
    blocks, roots = gathers(m.blocks, CALLS, evaluations)
    whole = BFLOAT16 * (blocks * m.block + roots * m.root)
    within = min(layout.shards, NODE)
    nodes = layout.shards // within
    return whole / within * (1 - 1 / nodes) / BETWEEN + whole * (1 - 1 / within) / INSIDE


def exchanging(layout: Layout, evaluations: int) -> float:
    """Of attention over tokens that are shared: Ulysses within a node, a ring between nodes."""
    m = model()
    within = min(layout.gpus, NODE)
    piece = BFLOAT16 * layout.tokens() * m.width
    ulysses = 4 * piece * (1 - 1 / within) / INSIDE  # queries, keys, values and the result
    ring = 2 * piece * (layout.nodes - 1) / BETWEEN  # keys and values of each other node
    once, pulled = m.blocks * (ulysses + ring), m.blocks * (ulysses + 2 * ring)
    return evaluations * once + CALLS * (once + pulled)


# What gs.memory.plan makes of it.


def footprint(layout: Layout) -> Footprint:
    """A call of the large model, as `gs.memory.plan` would measure it."""
    elements = prod(LATENT)
    outputs = BFLOAT16 * elements
    activations = int(layout.one_call())
    held = activations + 2 * outputs  # with the input in the model's dtype
    return replace(
        small("euler").footprint,
        elements=elements,
        state=FLOAT32 * elements,
        model_input=outputs,
        outputs=(outputs,),
        output_dtype=torch.bfloat16,
        activations=activations,
        held=held,
        forward_peak=held + int(layout.one_block()),
        backward_peak=held + int(layout.one_block()),
        forward_seconds=forward(layout),
        backward_seconds=backward(layout),
    )


@cache
def small(solver: str) -> Predictor:
    """The planner's of a run of as many calls whose denoiser costs nothing."""
    levels = gs.schedules.karras(CALLS)
    options = {"solver": solver, "budget": "1GB"}
    return gs.memory.plan(lambda x, sigma: x.tanh(), torch.zeros(1, 4), levels, **options).predictor


def strategies(layout: Layout) -> Iterator[Row]:
    """Peaks beside what is fixed, calls and times by strategy."""
    paper = replace(small("euler"), footprint=footprint(layout), budget=2**62)
    found = {row.name: row for row in paper.rows(away=True)}
    yield from (found[name] for name in ("store", "checkpoint", "offload"))
    yield from (paper.revolve(slots) for slots in (8, 3))
    undone = replace(small("midpoint_reversible"), footprint=paper.footprint, budget=2**62)
    yield next(row for row in undone.rows(away=True) if row.name == "reversible")


def evaluations(row: Row) -> int:
    """Model calls of a run and its backward."""
    return round(CALLS * row.evaluations)
