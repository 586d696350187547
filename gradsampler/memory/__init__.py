# SPDX-License-Identifier: Apache-2.0
"""Memory strategies by name: what a run keeps for its backward pass."""

from gradsampler import transforms
from gradsampler.memory import named
from gradsampler.memory.auto import Auto
from gradsampler.memory.base import Memory
from gradsampler.memory.checkpoint import Checkpoint
from gradsampler.memory.frozen import freeze
from gradsampler.memory.named import names, typical
from gradsampler.memory.offload import Offload
from gradsampler.memory.planning.plan import Plan, plan
from gradsampler.memory.planning.predictor import Row
from gradsampler.memory.reversible import Reversible
from gradsampler.memory.revolve import Revolve
from gradsampler.memory.store import Store
from gradsampler.memory.truncated import Truncated

__all__ = [
    "Auto",
    "Checkpoint",
    "Memory",
    "Offload",
    "Plan",
    "Reversible",
    "Revolve",
    "Row",
    "Store",
    "Truncated",
    "freeze",
    "names",
    "plan",
    "resolve",
    "typical",
]


def resolve(memory: str | Memory) -> Memory:
    """The strategy for a name of `names()`, "revolve:8", "truncated:4", or an object.

    Raises:
        ValueError: for an unknown name; for all but "store" under torch.func and forward mode.
    """
    steps = named.number(memory, "truncated")
    exact = named.exact("memory", memory, ["truncated:4"]) if steps is None else None
    strategy = exact or Truncated(steps or 1)
    if not strategy.transformable:
        transforms.refuse("memory", repr(memory))
    return strategy
