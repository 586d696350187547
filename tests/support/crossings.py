# SPDX-License-Identifier: Apache-2.0
"""Counts what passes between the host and a device, without one.

Torch's meta device has shapes and no numbers: what is read back from it, and what is copied to it,
is what a run on a GPU would wait for.
"""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")


class Crossings(TorchDispatchMode):
    """Names of the operators that read back from the device or copy to it, in their order."""

    def __init__(self):
        super().__init__()
        self.names = []
        self._made = _Made(self.names)

    def __enter__(self):
        self._made.__enter__()
        return super().__enter__()

    def __exit__(self, *raised):
        super().__exit__(*raised)
        self._made.__exit__(*raised)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        here = args[0].device if args and isinstance(args[0], torch.Tensor) else None
        name = function._schema.name
        if name == "aten::_local_scalar_dense" and here == META:
            self.names.append("read")
            return torch.zeros((), dtype=args[0].dtype).item()
        if name == "aten::_to_copy":
            there = kwargs.get("device") or here
            if here == META and there != META:
                self.names.append("read")
                dtype = kwargs.get("dtype") or args[0].dtype
                return torch.zeros(args[0].shape, dtype=dtype, device=there)
            if here != META and there == META:
                self.names.append("copy")
        if name == "aten::copy_" and here != args[1].device:
            self.names.append("copy" if here == META else "read")
            return args[0]
        return function(*args, **kwargs)


class _Made(TorchFunctionMode):
    """Sees tensors that are made of numbers of the host, which no dispatcher tells of."""

    def __init__(self, names):
        super().__init__()
        self._names = names

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        made = function in (torch.tensor, torch.as_tensor) and not isinstance(args[0], torch.Tensor)
        if made and result.device == META:
            self._names.append("copy")
        return result
