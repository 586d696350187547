# SPDX-License-Identifier: Apache-2.0
"""Private copies of a pipeline's parts: a run changes nothing that is the user's."""

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from gradsampler.engine.substitution import subclass

__all__ = ["copied", "made", "overridden", "plain", "restored", "snapshot"]


def copied(scheduler: Any) -> Any:
    """A scheduler with the same tensors and with lists and dicts of its own.

    `copy.deepcopy` fails where ``model_outputs`` still holds the graph of an earlier run. States of
    an earlier run come without their graph here; tables keep theirs.
    """
    twin = copy.copy(scheduler)
    twin.__dict__.update(pytree.tree_map_only(Tensor, _without_graph, snapshot(scheduler)))
    return twin


def _without_graph(x: Tensor) -> Tensor:
    return x.detach() if x.ndim > 1 and x.grad_fn is not None else x


def plain(scheduler: Any) -> Any:
    """A copy with the methods of its own class back in place."""
    twin = copied(scheduler)
    twin.__class__ = getattr(type(scheduler), "_stands_for", type(scheduler))
    return twin


def snapshot(x: Any) -> dict[str, Any]:
    """The attributes of an object, containers copied and tensors as they are."""
    return {name: _container(value) for name, value in vars(x).items()}


def restored(x: Any, attributes: Mapping[str, Any]) -> None:
    """Puts an object into the state of a snapshot, which stays as it is."""
    x.__dict__.clear()
    x.__dict__.update({name: _container(value) for name, value in attributes.items()})


def made(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The objects among the attributes ``after`` that are not among those ``before``.

    Such as a Brownian tree, which a scheduler builds at its first step and asks at the others.
    """
    plain = (Tensor, list, dict, tuple, str, bytes, int, float, type(None))
    return {k: v for k, v in after.items() if not isinstance(v, plain) and v is not before.get(k)}


def _container(x: Any) -> Any:
    if type(x) is list:
        return [_container(value) for value in x]
    if type(x) is dict:
        return {key: _container(value) for key, value in x.items()}
    return x


def overridden(x: Any, methods: Mapping[str, Callable[..., Any]]) -> Any:
    """Turns ``x`` into a stand-in: ``methods`` take the place of its own.

    Each is called with the method that it replaces, bound, and then with the arguments.
    """

    def method(name: str, replacement: Callable[..., Any]) -> Callable[..., Any]:
        own = getattr(kind, name)

        @functools.wraps(own)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return replacement(functools.partial(own, self), *args, **kwargs)

        return call

    kind = type(x)
    members = {name: method(name, replacement) for name, replacement in methods.items()}
    x.__class__ = subclass(kind, members | {"_stands_for": kind})
    return x
