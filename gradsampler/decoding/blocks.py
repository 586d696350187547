# SPDX-License-Identifier: Apache-2.0
"""A network that is recomputed block by block in backward: the same function, to the bit."""

from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

from gradsampler.engine.recomputation import recomputed
from gradsampler.engine.substitution import replanted

__all__ = ["blocks", "blockwise", "call"]

Module = TypeVar("Module", bound=nn.Module)

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


def blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The innermost modules that consist of others: a residual block, an attention, an upsampler.

    A single layer is none: to keep its input is to keep what its backward needs.
    """
    for child in module.children():
        if isinstance(child, _CONTAINERS) or any(True for _ in blocks(child)):
            yield from blocks(child)
        elif any(True for _ in child.children()):
            yield child


def blockwise(module: Module) -> Module:
    """The module with its blocks recomputed: of each only the input is kept until backward.

    Args:
        module: left as it is; without blocks in it, it is returned.
    """
    return replanted(module, dict.fromkeys(blocks(module), call))


def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Calls a module whose activations are recomputed.

    It may write to lists among its arguments, as causal video decoders do with the frames that
    they remember: each call gets lists of its own, and the first one's are handed on.
    """
    every: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    lists = {key: x for key, x in every if isinstance(x, list)}
    names = frozenset(lists)  # the lists will hold what the call returns: it must not hold them

    def pure(*args: Any, **kwargs: Any) -> Any:
        given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        own = {key: list(x) for key, x in given if key in names}
        filled = [own.get(k, x) for k, x in enumerate(args)]
        return module(*filled, **{key: own.get(key, x) for key, x in kwargs.items()}), own

    roots = (module, args, kwargs)
    result, written = recomputed(pure, args, kwargs, roots=roots, name=type(module).__name__)
    for key, x in lists.items():
        x[:] = written[key]
    return result
