# SPDX-License-Identifier: Apache-2.0
"""Argument errors in one voice: ``argument must be expected, got what came``."""

import difflib
import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real
from typing import NoReturn

import torch
from torch import Tensor


def fail(argument: str, expected: str, got: object, hint: str = "") -> NoReturn:
    """Raises ValueError naming the argument, what was expected and what came."""
    raise ValueError(f"{argument} must {expected}, got {got}" + (f"; {hint}" if hint else ""))


def fail_type(argument: str, expected: str, got: object) -> NoReturn:
    """Raises TypeError naming the argument, the expected type and the type that came."""
    raise TypeError(f"{argument} must {expected}, got {type(got).__name__}")


def choice(argument: str, got: object, names: Iterable[str]) -> str:
    """Returns ``got`` if it is one of ``names``; else says the nearest and lists the rest."""
    known = sorted(names)
    if not isinstance(got, str):
        fail_type(argument, f"be one of {', '.join(known)}", got)
    if got in known:
        return got
    near = difflib.get_close_matches(got, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}?" if near else ""
    fail(argument, f"be one of {', '.join(known)}", repr(got), hint)


def floating(argument: str, x: object) -> Tensor:
    """Returns ``x`` if it is a tensor of a real floating dtype."""
    if not isinstance(x, Tensor):
        fail_type(argument, "be a torch.Tensor", x)
    if not x.dtype.is_floating_point:
        fail(argument, "have a floating-point dtype", str(x.dtype))
    return x


def shape(argument: str, x: Tensor, expected: Sequence[int]) -> Tensor:
    """Returns ``x`` if its shape is ``expected``."""
    if tuple(x.shape) != tuple(expected):
        fail(argument, f"have shape {list(expected)}", list(x.shape))
    return x


def device(argument: str, x: Tensor, expected: torch.device) -> Tensor:
    """Returns ``x`` if it lives on the device ``expected``."""
    if x.device != expected:
        fail(argument, f"be on {expected}", str(x.device))
    return x


def batched(argument: str, x: object) -> Tensor:
    """Returns ``x`` if it is a non-empty floating tensor [B, *state], with a state axis or more."""
    x = floating(argument, x)
    if x.ndim < 2:
        fail(argument, "have shape [B, *state] with at least one state axis", list(x.shape))
    if x.numel() == 0:
        fail(argument, "hold at least one element", list(x.shape))
    return x


def integer(argument: str, x: object, least: int) -> int:
    """Returns ``x`` if it is an int (no bool) of at least ``least``."""
    if isinstance(x, bool) or not isinstance(x, Integral):
        fail_type(argument, "be an int", x)
    if x < least:
        fail(argument, f"be at least {least}", x)
    return int(x)


def finite(argument: str, x: object, least: float | None = None) -> float:
    """Returns ``x`` as a float if it is a finite real number of at least ``least``."""
    if isinstance(x, bool) or not isinstance(x, Real):
        fail_type(argument, "be a real number", x)
    try:
        value = float(x)
    except OverflowError:
        value = math.inf
    bound = "" if least is None else f" of at least {least}"
    if not math.isfinite(value) or (least is not None and value < least):
        fail(argument, f"be a finite number{bound}", x)
    return value
