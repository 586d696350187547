# SPDX-License-Identifier: Apache-2.0
"""The exact strategies by name."""

import re
from collections.abc import Sequence

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


def names() -> list[str]:
    """The names that ``memory=`` takes as they stand; all of these give the exact gradient.

    With a number there are "revolve:8" for ``Revolve(8)``, "revolve:8+32" for ``Revolve(8, 32)``,
    and "truncated:4" for ``Truncated(4)``.
    """
    return sorted(_REGISTRY)


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
