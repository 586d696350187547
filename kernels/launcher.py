# SPDX-License-Identifier: Apache-2.0
"""Launches that do not ask Triton again which variant of a kernel the arguments need.

Triton binds, specialises and hashes all arguments in Python before every launch, which takes many
times what a small kernel takes. Here a key of the same facts finds what was compiled for them, and
that is handed to the driver directly, by the interface of a compiled kernel that Triton documents.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor


def _facts(x: Any, specialised: bool) -> Any:
    """All that Triton looks at in an argument when it picks a variant."""
    if isinstance(x, Tensor):
        return x.dtype, x.get_device(), x.data_ptr() % 16 == 0
    if type(x) is int:
        width = 32 if -(2**31) <= x < 2**31 else 64 if x < 2**63 else 65
        return width if not specialised else 1 if x == 1 else (width, x % 16 == 0)
    if type(x) is tuple:  # what is in one is specialised whatever Triton was told
        return tuple([_facts(y, True) for y in x])
    return None if x is None else type(x)


class Launcher:
    """A Triton kernel, called with the number of its programs and then with its arguments.

    Those which are no constexpr come first, by position; constexprs follow by name, in order.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self._compiled: dict[Any, Any] = {}
        # The interpreter compiles nothing, and on AMD GPUs variants differ by more than the facts.
        self._specialised: list[bool] | None = None
        if hasattr(kernel, "params") and torch.version.hip is None:
            self._specialised = [
                not p.do_not_specialize for p in kernel.params if not p.is_constexpr
            ]

    def __call__(
        self, programs: int, *arguments: Any, enable_fp_fusion: bool = True, **constants: Any
    ) -> None:
        """Launches, on the current stream of the current device."""
        if self._specialised is None:
            self._by_triton(programs, arguments, constants, enable_fp_fusion)
            return
        key = self.key(arguments, *constants.values(), enable_fp_fusion)
        compiled = self._compiled.get(key)
        if compiled is None:
            found = self._by_triton(programs, arguments, constants, enable_fp_fusion)
            if found is not None:  # hooks of Triton's may keep it from compiling
                self._compiled[key] = found
        else:
            compiled[(programs, 1, 1)](*arguments, *constants.values())

    def key(self, arguments: Sequence[Any], *rest: Any) -> Hashable:
        """What is equal only where Triton needs one and the same variant."""
        assert self._specialised is not None
        return *map(_facts, arguments, self._specialised), *rest

    def _by_triton(
        self, programs: int, arguments: Any, constants: dict[str, Any], enable_fp_fusion: bool
    ) -> Any:
        return self.kernel[(programs,)](*arguments, **constants, enable_fp_fusion=enable_fp_fusion)
