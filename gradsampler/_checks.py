# SPDX-License-Identifier: Apache-2.0
"""Argument errors in one voice: ``argument must be expected, got what came``."""

import difflib
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
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


def choice(
    argument: str, got: object, names: Iterable[str], spellings: Mapping[str, str] | None = None
) -> str:
    """Returns ``got`` if it is one of ``names``; else says the nearest and lists the rest.

    ``spellings`` has names in use elsewhere, by their letters and digits.
    """
    known = sorted(names)
    if not isinstance(got, str):
        fail_type(argument, f"be one of {', '.join(known)}", got)
    if got in known:
        return got
    letters = {_letters(name): name for name in known}
    meant = letters.get(_letters(got)) or (spellings or {}).get(_letters(got))
    near = [meant] if meant in known else difflib.get_close_matches(got, known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else ""
    fail(argument, f"be one of {', '.join(known)}", repr(got), hint)


def _letters(name: str) -> str:
    plain = re.sub("[^a-z0-9]", "", name.lower().replace("++", "pp"))
    return plain.removeprefix("sample").removesuffix("scheduler")


FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def callers() -> int:
    """The stacklevel at which `warnings.warn` names the line that called the package."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and _ours(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    return level


def _ours(module: str) -> bool:
    return module == "gradsampler" or module.startswith("gradsampler.")


def floating(argument: str, x: object) -> Tensor:
    """Returns ``x`` if it is a dense tensor of a floating dtype that can be computed in."""
    if not isinstance(x, Tensor):
        fail_type(argument, "be a torch.Tensor", x)
    if not x.dtype.is_floating_point:
        fail(argument, "have a floating-point dtype", str(x.dtype))
    if x.dtype not in FLOATING:
        fail(argument, "have a dtype of 16 bits or more", str(x.dtype), "call .to(torch.bfloat16)")
    if distributed(x):
        hint = "give its to_local(), or its full_tensor()"
        fail(argument, "be a plain tensor", "a DTensor", hint)
    if x.layout != torch.strided:
        fail(argument, "be dense", str(x.layout), "call .to_dense()")
    return x


def distributed(x: object) -> bool:
    """Whether ``x`` is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # heavy, and loaded by who makes one
    return module is not None and isinstance(x, module.DTensor)


def valued(argument: str, x: Tensor) -> None:
    """Refuses a tensor without values."""
    if x.is_meta:
        fail(argument, "hold values", "a tensor on the device meta")


def savable(x: Tensor) -> Tensor:
    """Returns ``x``, or a copy of one made in inference mode, which autograd refuses to save."""
    return x.clone() if x.is_inference() and not torch.is_inference_mode_enabled() else x


def prediction(argument: str, x: object) -> Tensor:
    """Returns ``x`` as `floating` does; of another object that a network may return says more."""
    sample = getattr(x, "sample", None)
    if isinstance(sample, Tensor):
        hint = "return its .sample from the denoiser"
        _fail_output(argument, f"{type(x).__name__} with .sample {list(sample.shape)}", hint)
    if isinstance(x, Mapping):
        names = ", ".join(f"{k!r}: {_shortly(v)}" for k, v in x.items())
        _fail_output(argument, f"{type(x).__name__} of {names}", "return one of its values")
    if isinstance(x, Sequence) and not isinstance(x, str):
        parts = ", ".join(map(_shortly, x))
        _fail_output(argument, f"{type(x).__name__} of {parts}", "return one of these, as out[0]")
    return floating(argument, x)


def _fail_output(argument: str, got: str, hint: str) -> NoReturn:
    raise TypeError(f"{argument} must be a torch.Tensor, got {got}; {hint}")


def _shortly(x: object) -> str:
    return f"tensor {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


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


def unmapped(argument: str, x: Tensor, hint: str = "make a run of each") -> Tensor:
    """Returns numbers of a run if they are not those of several runs, by vmap."""
    functorch, inner = torch._C._functorch, x
    while functorch.is_functorch_wrapped_tensor(inner):
        if functorch.is_batchedtensor(inner):
            fail(argument, "be the same for all that vmap maps over", "a tensor that it maps", hint)
        inner = functorch.get_unwrapped(inner)
    return x


def finite(argument: str, x: object, least: float | None = None) -> float:
    """Returns ``x`` as a float if it is a finite real number of at least ``least``."""
    if type(x) is float and math.isfinite(x) and least is None:
        return x
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


def coefficient(argument: str, x: object, least: float | None = None) -> float | Tensor:
    """Returns ``x`` if it is a finite number of at least ``least``: a float, or a 0-d float64
    tensor on the CPU for one of any floating dtype, which may require grad.
    """
    if not isinstance(x, Tensor):
        return finite(argument, x, least)
    shape(argument, floating(argument, unmapped(argument, x)), ())
    finite(argument, x.item(), least)
    return x.to("cpu", torch.float64)
