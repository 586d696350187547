# SPDX-License-Identifier: Apache-2.0
"""Modules in the place of others: the same in all, state included, but what their call does.

The modules of the user stay as they are. A call is a matter of the class, so what is attached to
the object still runs inside it: hooks, a compiled forward, a forward that was replaced.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import nn

__all__ = ["Call", "replanted", "stand_in", "subclass"]

Call = Callable[..., Any]  # of (module, *args, **kwargs)
Module = TypeVar("Module", bound=nn.Module)


def stand_in(module: Module, call: Call) -> Module:
    """A module that shares the state of ``module`` and is called otherwise.

    Args:
        module: the module.
        call: called with the module and the arguments in the place of ``module(...)``.

    Example:
        >>> import torch
        >>> linear = torch.nn.Linear(2, 2)
        >>> doubled = stand_in(linear, lambda module, x: 2 * module(x))
        >>> x = torch.ones(1, 2)
        >>> isinstance(doubled, torch.nn.Linear), torch.equal(doubled(x), 2 * linear(x))
        (True, True)
    """

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return call(module, *args, **kwargs)

    kind = type(module)
    twin: Module = object.__new__(subclass(kind, {"__call__": __call__}))
    object.__setattr__(twin, "__dict__", module.__dict__)
    return twin


def subclass(kind: type, members: Mapping[str, Any]) -> type:
    """A subclass that goes by the name of its base."""
    told = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), dict(members) | told)


def replanted(module: Module, chosen: Mapping[nn.Module, Call]) -> Module:
    """A copy of a tree of modules in which some are stand-ins; parameters and buffers are shared.

    Args:
        module: the root, which is not chosen itself.
        chosen: by module, its call.
    """
    children: dict[str, nn.Module | None] = {}
    for name, child in module._modules.items():
        if child is None:
            children[name] = None
        elif child in chosen:
            children[name] = stand_in(child, chosen[child])
        else:
            children[name] = replanted(child, chosen)
    if all(children[name] is child for name, child in module._modules.items()):
        return module
    twin: Module = object.__new__(type(module))
    object.__setattr__(twin, "__dict__", {**module.__dict__, "_modules": children})
    return twin
