# SPDX-License-Identifier: Apache-2.0
"""Memory strategies by name: what a run keeps for its backward pass."""

from gradsampler import _checks
from gradsampler.memory.base import Memory
from gradsampler.memory.checkpoint import Checkpoint
from gradsampler.memory.store import Store

__all__ = ["Checkpoint", "Memory", "Store", "names", "resolve"]

_REGISTRY: dict[str, type[Memory]] = {"store": Store, "checkpoint": Checkpoint}


def names() -> list[str]:
    """The names that ``memory=`` takes."""
    return sorted((*_REGISTRY, "auto"))


def resolve(memory: str | Memory) -> Memory:
    """The strategy for a name or an object; "auto" is checkpoint."""
    if isinstance(memory, Memory):
        return memory
    name = _checks.choice("memory", memory, names())
    return _REGISTRY["checkpoint" if name == "auto" else name]()
