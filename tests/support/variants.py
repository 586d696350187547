# SPDX-License-Identifier: Apache-2.0
"""Which variants of the kernels a test run launches, written down for another Triton to compile.

With GRADSAMPLER_VARIANTS=FOLDER pytest writes one file a process there; ``compile_variants.py``
reads them. A line holds a launch as far as a compiler can tell it from another one: no values but
those of constexprs.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from support import absent_gpu
from support.absent_gpu import Call

_INTEGERS = {"one": 1, "16": 1 << 10, "32 bits": 3, "16, long": 1 << 40, "64 bits": (1 << 40) + 3}


def described(x: Any) -> Any:
    """An argument or constexpr as JSON."""
    if isinstance(x, Tensor):
        aligned = x.data_ptr() % 16 == 0
        return {"tensor": str(x.dtype).removeprefix("torch."), "aligned": aligned}
    if isinstance(x, tuple):
        assert all(y is not None for y in x), (
            "Triton 3.6 compiles no None within a tuple: leave it out"
        )
        return [described(y) for y in x]
    if isinstance(x, tl.dtype):
        return {"dtype": x.name}
    if isinstance(x, int):
        long = not -(2**31) <= x < 2**31
        if x == 1:
            return "one"
        if x % 16 == 0:
            return "16, long" if long else "16"
        return "64 bits" if long else "32 bits"
    return "float" if isinstance(x, float) else x


def constant(x: Any) -> Any:
    """A constexpr as JSON, with its value."""
    return {"dtype": x.name} if isinstance(x, tl.dtype) else x


def line(call: Call) -> str:
    """A call as one line of JSON."""
    options = {name: constant(x) for name, x in call.options.items()}
    return json.dumps([call.kernel, [*map(described, call.arguments)], options])


def _restored(x: Any) -> Any:
    if isinstance(x, list):
        return tuple(map(_restored, x))
    if isinstance(x, dict) and "tensor" in x:
        whole = torch.empty(64, dtype=getattr(torch, x["tensor"]))
        return whole if x["aligned"] else whole[1:]
    if isinstance(x, str):
        return 0.5 if x == "float" else _INTEGERS[x]
    return x


def call(text: str) -> Call:
    """The call that `line` wrote down, on tensors of the CPU."""
    kernel, arguments, options = json.loads(text)
    for name, x in options.items():
        if isinstance(x, dict):
            options[name] = tl.dtype(x["dtype"])
        elif isinstance(x, list):
            options[name] = tuple(x)
    return Call(kernel, _restored(arguments), options)


def read(folder: Path) -> list[str]:
    """The lines of all files, each once."""
    files = sorted(folder.glob("*.jsonl"))
    return sorted({text for path in files for text in path.read_text().splitlines()})


class Recorder:
    """Collects the launches of this process, each variant once."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._lines = folder, set[str]()
        self._seen = absent_gpu.seen(lambda call: self._lines.add(line(call)))
        self._seen.__enter__()

    def write(self) -> None:
        """Adds a file to the folder."""
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"{os.environ.get('PYTEST_XDIST_WORKER', 'main')}-{os.getpid()}.jsonl"
        text = "".join(f"{each}\n" for each in sorted(self._lines))
        (self._folder / name).write_text(text)
