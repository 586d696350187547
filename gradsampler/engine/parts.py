# SPDX-License-Identifier: Apache-2.0
"""What a denoiser is made of, as far as it can be seen: its modules and its random generators.

Watching each torch function for a ``generator=`` would find those all, but slows every function
down, and a network that was compiled before would be compiled again. So they are looked for in what
the denoiser is made of, once a run.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from functools import cached_property, partial
from types import FunctionType, MethodType, ModuleType, SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gradsampler.engine.functions import foreign, variables

_NO_PARTS = (Tensor, torch.device, torch.dtype, ModuleType, str, bytes, int, float, complex)
_MEMBERS = (FunctionType, torch.Generator)
_LONGEST = 1000  # a longer table is data
_MOST = 100_000  # objects looked at


class Parts(NamedTuple):
    """What can be seen from a denoiser, each once."""

    modules: list[nn.Module]
    generators: list[torch.Generator]


class Seen:
    """What can be seen from ``roots``, looked for at the first question."""

    def __init__(self, *roots: object) -> None:
        self._roots = roots

    @cached_property
    def parts(self) -> Parts:
        """As `reachable`."""
        return reachable(*self._roots)


def reachable(*roots: object) -> Parts:
    """The modules, submodules included, and the torch.Generators that are seen from ``roots``.

    Looks into attributes, lists, tuples, sets and dicts, partials, bound methods, the closures,
    defaults and wrapped forms of functions, and what the names in their code and in that of the
    methods of classes stand for, in their own module and in those that it imports. The inner life
    of the standard library, of torch and numpy, and of the libraries that networks come from, which
    hold no generators, is passed over; the modules of such a network are not. Neither is seen what
    only C code can see.

    Example:
        >>> import torch
        >>> generator = torch.Generator()
        >>> def denoiser(x, sigma):
        ...     return x + sigma * torch.randn(x.shape, generator=generator)
        >>> reachable(denoiser).generators == [generator]
        True
    """
    pending, seen, parts = deque(roots), dict[int, object](), Parts([], [])
    while pending and len(seen) < _MOST:
        x = pending.popleft()
        if x is None or id(x) in seen or isinstance(x, _NO_PARTS):
            continue
        seen[id(x)] = x
        if isinstance(x, torch.Generator):
            parts.generators.append(x)
            continue
        if isinstance(x, nn.Module):
            parts.modules.append(x)
        pending.extend(_parts(x))
    return parts


def _parts(x: object) -> Iterable[object]:
    """What an object consists of."""
    if isinstance(x, (list, tuple, set, frozenset, deque)):
        return x if len(x) <= _LONGEST else ()
    if isinstance(x, dict):
        return x.values() if len(x) <= _LONGEST else ()
    if isinstance(x, FunctionType):
        return _of_function(x)
    if isinstance(x, MethodType):
        return (x.__self__, x.__func__)
    if isinstance(x, partial):
        return (x.func, x.args, x.keywords)
    if isinstance(x, type):
        known = foreign(x.__module__) or x.__module__.startswith("gradsampler.")
        members = [] if known else list(vars(x).values())
        members += [m.__func__ for m in members if isinstance(m, (staticmethod, classmethod))]
        return (*x.__bases__, *(m for m in members if isinstance(m, _MEMBERS)))
    if isinstance(x, nn.Module):  # most of its attributes are empty tables of hooks
        parts = (part for part in vars(x).values() if not isinstance(part, dict) or part)
        return (type(x), *parts, *x._modules.values())
    if foreign(type(x).__module__) and not isinstance(x, SimpleNamespace):
        return ()
    return (type(x), *getattr(x, "__dict__", {}).values())


def _of_function(f: FunctionType) -> Iterator[object]:
    yield getattr(f, "__wrapped__", None)
    if foreign(f.__globals__.get("__name__")):
        return
    yield f.__defaults__
    yield f.__kwdefaults__
    yield from (value for _, value in variables(f))
