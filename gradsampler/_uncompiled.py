# SPDX-License-Identifier: Apache-2.0
"""Functions that torch.compile leaves out of its graphs."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def uncompiled(function: Callable[P, R]) -> Callable[P, R]:
    """Has a compiled caller break its graph at the call, inside which nothing is compiled.

    As `torch.compiler.disable`, which however loads the compiler when a function is defined.
    """

    @wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_dynamo_compiling():
            result: R = torch.compiler.disable(function)(*args, **kwargs)
            return result
        return function(*args, **kwargs)

    return called
