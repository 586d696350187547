# SPDX-License-Identifier: Apache-2.0
"""What makes an object the same one in another process, in lines of text."""

import enum
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from gradsampler.engine.functions import foreign, variables
from gradsampler.optimization import digest

__all__ = ["Identity", "Lines"]

Lines = dict[str, str]  # by the place in the object: "" itself, ".weight" an attribute

_PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, PurePath)
_MOST = 100_000  # objects looked at


class Identity:
    """An object in lines of text that are the same in another process.

    Plain values stand for themselves, tensors and arrays by a digest. Of a module count the
    classes, plain attributes, parameters and buffers; of a function its code, closure, defaults,
    and what the global names in its code stand for; of any other object what its method
    ``identity()`` returns, and without one its attributes and the code of its methods. Of what
    torch, numpy and the standard library made counts the name alone.

    Example:
        >>> import torch
        >>> Identity({"solver": "heun", "weight": torch.zeros(2)}).lines[".weight"]
        'torch.float32 [2] af5570f5a1810b7a'
    """

    def __init__(self, value: object) -> None:
        self.lines: Lines = {}
        self.modules: dict[str, nn.Module] = {}  # those found, by their place
        self._seen: dict[int, object] = {}
        self._pending: list[tuple[str, object]] = [("", value)]
        while self._pending and len(self._seen) < _MOST:
            place, value = self._pending.pop()
            text = _plain(value)
            if text is not None:
                self.lines[place] = text
            elif id(value) not in self._seen:
                self._seen[id(value)] = value
                self._look(place, value)

    def by_argument(self) -> dict[str, Lines]:
        """The lines of a dict of arguments, by the name of the argument."""
        split: dict[str, Lines] = {}
        for place, text in self.lines.items():
            if match := re.match(r"\.(\w+)", place):
                split.setdefault(match[1], {})[place[match.end() :]] = text
        return split

    def _later(self, place: str, parts: Iterable[tuple[str, object]]) -> None:
        self._pending += [(f"{place}{name}", part) for name, part in parts]

    def _look(self, place: str, value: Any) -> None:
        if not isinstance(value, MethodType):
            self.lines.setdefault(place, _name(value))
        if isinstance(value, nn.Module):
            self._module(place, value)
        elif isinstance(value, Mapping):
            self._later(place, ((f".{key}", x) for key, x in value.items()))
        elif isinstance(value, list | tuple):
            self._later(place, ((f"[{k}]", x) for k, x in enumerate(value)))
        elif isinstance(value, set | frozenset):
            self._later(place, ((f"[{k}]", x) for k, x in enumerate(sorted(value, key=repr))))
        elif isinstance(value, partial):
            parts = (value.func, value.args, value.keywords)
            self._later(place, zip((".func", ".args", ".keywords"), parts, strict=True))
        elif isinstance(value, MethodType):
            self._later(place, [(f".{value.__name__}", value.__func__), ("", value.__self__)])
        elif isinstance(value, FunctionType):
            self._function(place, value)
        elif not isinstance(value, ModuleType | type | BuiltinFunctionType):
            self._object(place, value)

    def _module(self, place: str, module: nn.Module) -> None:
        settings = []
        for name, part in module.named_modules():
            self._seen[id(part)] = part
            settings.append(f"{name} {_name(part)}")
            for key, x in vars(part).items():
                if key.startswith("_"):
                    continue
                if isinstance(x, Tensor | FunctionType):
                    self._later(place, [(f".{name}.{key}" if name else f".{key}", x)])
                elif all(
                    isinstance(v, _PLAIN) for v in (x if isinstance(x, list | tuple) else [x])
                ):
                    settings.append(f"{name} {key} {x}")
            forward = getattr(type(part), "forward", None)
            if isinstance(forward, FunctionType) and not _known(forward.__module__):
                settings.append(digest.of_code(forward.__code__))
                self._variables(place, forward)
        self.modules[place] = module
        self.lines[place] = f"{_name(module)} {digest.of_texts(settings)}"
        tensors = (*module.named_parameters(), *module.named_buffers())
        self._later(place, ((f".{name}", x) for name, x in tensors))

    def _function(self, place: str, f: FunctionType) -> None:
        if hasattr(f, "__wrapped__"):
            self._later(place, [(".__wrapped__", f.__wrapped__)])
        if not _known(f.__globals__.get("__name__")):
            self.lines[place] = f"{_name(f)} {digest.of_code(f.__code__)}"
            self._later(place, [("()", f.__defaults__), ("(*)", f.__kwdefaults__)])
            self._variables(place, f)

    def _object(self, place: str, value: Any) -> None:
        kind = type(value)
        if callable(getattr(value, "identity", None)):
            told = value.identity()
            self._later(place, [("" if isinstance(told, Mapping) else ".identity", told)])
        elif is_dataclass(value):
            self._later(place, ((f".{f.name}", getattr(value, f.name)) for f in fields(value)))
        elif not foreign(kind.__module__):
            self._later(place, ((f".{k}", x) for k, x in getattr(value, "__dict__", {}).items()))
        theirs = (base for base in kind.__mro__ if not _known(base.__module__))
        members = [x for base in theirs for x in vars(base).values()]
        methods = [x for x in members if isinstance(x, FunctionType)]
        if methods:
            code = digest.of_texts(digest.of_code(method.__code__) for method in methods)
            self.lines[place] = f"{_name(value)} {code}"
        for method in methods:
            self._variables(place, method)

    def _variables(self, place: str, f: FunctionType) -> None:
        self._later(place, ((f".{name}", x) for name, x in variables(f) if x is not None))


def _plain(value: object) -> str | None:
    """The text of a value without parts; None for any other."""
    if isinstance(value, Tensor):
        return digest.of_tensor(value)
    if isinstance(value, bytes):
        return digest.of_bytes(value)
    if isinstance(value, (*_PLAIN, enum.Enum)):
        text = str(value)
        return text if len(text) <= 80 else f"{text[:60]}... {digest.of_texts([text])}"
    if hasattr(value, "tobytes") and hasattr(value, "shape"):  # an array of numpy's
        kind = getattr(value, "dtype", "")
        return f"{kind} {list(value.shape)} {digest.of_bytes(value.tobytes())}"
    return None


def _name(value: object) -> str:
    named = isinstance(value, type | FunctionType | BuiltinFunctionType)
    kind: Any = value if named else type(value)
    # The module of a script has another name where it is imported.
    return (
        f"{kind.__module__}.{kind.__qualname__}" if _known(kind.__module__) else kind.__qualname__
    )


def _known(module: object) -> bool:
    """Whether code of that module is named and not looked at."""
    return foreign(module) or str(module).split(".")[0] == "gradsampler"
