# SPDX-License-Identifier: Apache-2.0
"""Triton's own way from a launch to machine code, for a GPU that is not here.

One object takes the place of Triton's driver: it names the device and stream that a launch would
use, and its target. All else, from the specialisation of the arguments on, is Triton's.
"""

import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget

import gradsampler.kernels
from gradsampler.kernels.launcher import Launcher

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Call(NamedTuple):
    """A launch that was asked for."""

    kernel: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]  # constexprs, and what Triton's compiler is told


def _launchers() -> dict[str, Launcher]:
    found = {}
    for module in pkgutil.iter_modules(gradsampler.kernels.__path__, "gradsampler.kernels."):
        for name, each in vars(importlib.import_module(module.name)).items():
            if isinstance(each, Launcher):
                found[name] = each
    return found


LAUNCHERS = _launchers()


@contextmanager
def seen(see: Any, *, instead: bool = False) -> Iterator[None]:
    """Calls ``see(Call)`` before every launch, or instead of it."""

    def watched(name: str, run: Any) -> Any:
        def watch(*arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            see(Call(name, arguments, options))
            return None if instead else run(*arguments, grid=grid, warmup=warmup, **options)

        return watch

    kernels = {name: launcher.kernel for name, launcher in LAUNCHERS.items()}
    before = {name: kernel.run for name, kernel in kernels.items()}
    for name, kernel in kernels.items():
        kernel.run = watched(name, before[name])
    try:
        yield
    finally:
        for name, kernel in kernels.items():
            kernel.run = before[name]


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Collects every launch instead of launching."""
    calls: list[Call] = []
    with seen(calls.append, instead=True):
        yield calls


@contextmanager
def unprepared() -> Iterator[None]:
    """Launches by Triton's own way, to compare with the prepared one."""
    before = {name: launcher._specialised for name, launcher in LAUNCHERS.items()}
    for launcher in LAUNCHERS.values():
        launcher._specialised = None
    try:
        yield
    finally:
        for name, launcher in LAUNCHERS.items():
            launcher._specialised = before[name]


class AbsentDriver:
    """What `JITFunction.run` asks a driver for."""

    def __init__(self, arch: str) -> None:
        self._arch = arch

    def get_current_target(self) -> GPUTarget:
        """The architecture to compile for."""
        return TARGETS[self._arch]

    def get_current_device(self) -> int:
        """A number for each architecture: Triton keeps what it compiled by device."""
        return list(TARGETS).index(self._arch)

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return 0


def compiled(call: Call, arch: str) -> Any:
    """Triton's compiled kernel for a call, machine code included."""
    triton.runtime.driver.set_active(AbsentDriver(arch))
    kernel = LAUNCHERS[call.kernel].kernel
    return kernel.warmup(*call.arguments, grid=(1,), **call.options)


def variant(call: Call, arch: str = "sm_90") -> Any:
    """What tells the variant of a call from others: calls of equal ones compile once."""
    keys: list[Any] = []

    def keep(*, key: Any, **_: Any) -> bool:
        keys.append(key)
        return True  # do not compile

    hooks = triton.knobs.runtime
    before, hooks.jit_cache_hook = hooks.jit_cache_hook, keep
    try:
        found = compiled(call, arch)
    finally:
        hooks.jit_cache_hook = before
    return (call.kernel, keys[0] if found is None else found.hash)
