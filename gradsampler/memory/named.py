# SPDX-License-Identifier: Apache-2.0
"""The exact strategies by name."""

import os
import re
from collections.abc import Callable, Sequence

from gradsampler import _checks
from gradsampler.memory.auto import Auto
from gradsampler.memory.base import Memory
from gradsampler.memory.checkpoint import Checkpoint
from gradsampler.memory.offload import Offload
from gradsampler.memory.reversible import Reversible
from gradsampler.memory.revolve import Revolve
from gradsampler.memory.store import Store

_REGISTRY: dict[str, type[Memory]] = {
    "auto": Auto,
    "store": Store,
    "checkpoint": Checkpoint,
    "offload": Offload,
    "reversible": Reversible,
    "revolve": Revolve,
}

Folder = str | os.PathLike[str]

# What a class does with other parameters than its defaults, where that is worth a test.
_VARIANTS: dict[str, Callable[[Folder], dict[str, Memory]]] = {
    "offload": lambda folder: {"offload to a folder": Offload(folder)},
    "revolve": lambda folder: {
        "revolve:1": Revolve(1),
        "revolve:3": Revolve(3),
        "revolve:1+2": Revolve(1, 2),
        "revolve:1+2 to a folder": Revolve(1, 2, folder),
    },
}


def names() -> list[str]:
    """The names of strategies that need no number; all of these give the exact gradient.

    With a number there are "revolve:8" for ``Revolve(8)``, "revolve:8+32" for ``Revolve(8, 32)``,
    and "truncated:4" for ``Truncated(4)``.
    """
    return sorted(_REGISTRY)


def typical(folder: Folder) -> dict[str, Memory]:
    """Each registered class with its defaults and, under names of their own, further parameters.

    Args:
        folder: an existing one, for those that keep states in files.

    Example:
        >>> list(typical("."))[:3]
        ['auto', 'store', 'checkpoint']
    """
    found: dict[str, Memory] = {}
    for name, strategy in _REGISTRY.items():
        found |= {name: strategy()}
        found |= _VARIANTS[name](folder) if name in _VARIANTS else {}
    return found


def exact(argument: str, memory: str | Memory, others: Sequence[str] = ()) -> Memory:
    """The strategy for a name or an object; ``others`` are known to the caller."""
    if isinstance(memory, Memory):
        return memory
    slots = re.fullmatch(r"revolve:(\d+)(?:\+(\d+))?", memory) if isinstance(memory, str) else None
    if slots is not None:
        return Revolve(int(slots[1]), int(slots[2] or 0))
    return _REGISTRY[_checks.choice(argument, memory, [*names(), "revolve:8", *others])]()


def number(memory: object, name: str) -> int | None:
    """The number in ``name:number``."""
    before, _, digits = memory.partition(":") if isinstance(memory, str) else ("", "", "")
    return int(digits) if before == name and digits.isdecimal() else None
