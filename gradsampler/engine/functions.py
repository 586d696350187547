# SPDX-License-Identifier: Apache-2.0
"""What a Python function refers to: the variables of its closure and the global names in it."""

import sys
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType

_LIBRARIES = {"torch", "numpy", "diffusers", "transformers", "accelerate", "peft"}
_FOREIGN = {*_LIBRARIES, *sys.stdlib_module_names} - {"__main__"}


def variables(f: FunctionType) -> Iterator[tuple[str, object]]:
    """The names that a function's code uses beside its arguments, and what they stand for.

    They are those of its closure, of its own module, and of modules that are named in the code;
    the code of functions made in it counts as its own.

    Example:
        >>> import torch
        >>> scale = torch.tensor(2.0)
        >>> dict(variables(lambda x: scale * x))
        {'scale': tensor(2.)}
    """
    for name, cell in zip(f.__code__.co_freevars, f.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    names = sorted(_names(f.__code__))
    for name in names:
        value = f.__globals__.get(name)
        if not isinstance(value, ModuleType):
            yield name, value
        elif not foreign(value.__name__):
            there = vars(value)
            yield from ((f"{name}.{each}", there[each]) for each in names if each in there)


def foreign(module: object) -> bool:
    """Whether a module of that name is of the standard library, or one that networks come from."""
    return str(module).split(".")[0] in _FOREIGN


def _names(code: CodeType) -> set[str]:
    """The global names in a function's code and in that of the functions it makes."""
    inner = (_names(c) for c in code.co_consts if isinstance(c, CodeType))
    return set(code.co_names).union(*inner)
