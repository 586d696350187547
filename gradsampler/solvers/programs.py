# SPDX-License-Identifier: Apache-2.0
"""Programs that were recorded before, for runs with equal arguments."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import fields, is_dataclass
from threading import Lock

import torch

from gradsampler.engine.program import Program
from gradsampler.solvers.base import Churn, Solver


class Programs:
    """The latest programs by what they were recorded from, by value; safe with threads.

    Args:
        count: how many are kept.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._known: OrderedDict[Hashable, Program] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable, record: Callable[[], Program]) -> Program:
        """The program with that key, recorded where it is not known."""
        with self._lock:
            found = self._known.get(key)
            if found is not None:
                self._known.move_to_end(key)
                return found
        with torch.inference_mode(False):  # whose tensors no later run could differentiate
            found = record()  # without the lock: twice at worst, to the same
        with self._lock:
            self._known[key] = found
            while len(self._known) > self._count:
                self._known.popitem(last=False)
        return found


def described(method: Solver | Churn) -> Hashable | None:
    """A solver or a churn by value; None where its fields are not plain numbers and names."""
    if not is_dataclass(method):
        return None
    values = tuple(getattr(method, field.name) for field in fields(method))
    plain = all(isinstance(value, (int, float, str, type(None))) for value in values)
    return (type(method), values) if plain else None
