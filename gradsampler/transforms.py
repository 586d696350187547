# SPDX-License-Identifier: Apache-2.0
"""Derivatives beside plain backward: torch.func's transforms, vmap and forward mode.

Our own autograd nodes and kernels know nothing of their tensors. So under one of them the ops
compute in plain torch, which all of them see through, and what is not plain torch is refused.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from gradsampler import _checks


def active(cotangent: Tensor | None = None) -> bool:
    """Whether a transform of torch.func, a vmap, or a level of forward mode is at work.

    That of ``is_grads_batched`` shows in the cotangent alone.
    """
    functorch = torch._C._functorch
    if functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return True
    return cotangent is not None and functorch.is_legacy_batchedtensor(cotangent)


def followed(x: Tensor) -> bool:
    """Whether a derivative by the tensor may be asked for, backward or forward."""
    if x.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


def refuse(what: str, got: object, cotangent: Tensor | None = None) -> None:
    """Raises where one is at work, for ``what`` makes model calls again in backward."""
    if active(cotangent):
        _checks.fail(
            what,
            "be 'store' under torch.func, vmap, is_grads_batched and forward mode",
            got,
            "memory='store' is plain autograd, which they see through",
        )
